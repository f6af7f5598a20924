//! Pages that move: exported as they are, written on every rank, and found out where a rank has something else.

use std::time::Duration;

use perigee_engine::executor::{Executor, PageSpan};
use perigee_engine::link::{LeaderLink, LinkError};
use perigee_engine::protocol::{RankCommand, RankReply};
use perigee_migration::Digest;

use crate::group::{Group, Options, spans, text};

#[test]
fn pages_arrive_as_they_left() {
    let prompt = text(5, 0..150);
    let mut groups = [1, 2, 4].map(Group::new);
    let [one, two, four] = &mut groups;
    two.begin(0, &[8, 2, 11], &prompt);
    let source = spans(&[8, 2, 11], 0, 150);
    let slices = two.ranks.export_pages(&source).unwrap();
    let named: Vec<_> = slices.iter().map(|slice| (slice.first, slice.layer, slice.positions)).collect();
    assert_eq!(named, [(0, 0, 64), (0, 1, 64), (64, 0, 64), (64, 1, 64), (128, 0, 22), (128, 1, 22)]);
    let digests = two.ranks.digest_pages(&source).unwrap();
    let sum = |layer| slices.iter().filter(|slice| slice.layer == layer).map(|slice| slice.digest).sum::<Digest>();
    assert_eq!(digests, [sum(0), sum(1)]);
    for target in [one, four] {
        target.take_pages(two, &source, &[0, 15, 7]);
        let copies = spans(&[0, 15, 7], 0, 150);
        assert_eq!(target.ranks.export_pages(&copies).unwrap(), slices);
        assert_eq!(target.ranks.digest_pages(&copies).unwrap(), digests);
        let swapped = spans(&[15, 0, 7], 0, 150);
        assert_ne!(target.ranks.digest_pages(&swapped).unwrap(), digests, "positions count");
    }
}

#[test]
fn a_flipped_bit_shows_in_the_digest_of_its_layer() {
    let mut two = Group::new(2);
    two.begin(0, &[0, 1], &text(5, 0..70));
    let source = spans(&[0, 1], 0, 70);
    let mut slices = two.ranks.export_pages(&source).unwrap();
    slices[3].bytes[100] ^= 1;
    two.ranks.import_pages(&[3, 3, 4, 4].into_iter().zip(slices).collect::<Vec<_>>()).unwrap();
    let (right, wrong) =
        (two.ranks.digest_pages(&source).unwrap(), two.ranks.digest_pages(&spans(&[3, 4], 0, 70)).unwrap());
    assert_eq!(right[0], wrong[0]);
    assert_ne!(right[1], wrong[1]);
}

/// Flips a bit of every page that the leader sends.
struct Careless(Box<dyn LeaderLink>);

impl LeaderLink for Careless {
    fn send(&mut self, command: &RankCommand) -> Result<(), LinkError> {
        let mut command = command.clone();
        if let RankCommand::ImportPages { pages } = &mut command {
            pages.iter_mut().filter(|page| page.layer == 1).for_each(|page| page.bytes[0] ^= 1);
        }
        self.0.send(&command)
    }

    fn receive(&mut self, timeout: Duration) -> Result<RankReply, LinkError> {
        self.0.receive(timeout)
    }

    fn poll(&mut self) -> Option<Result<RankReply, LinkError>> {
        self.0.poll()
    }
}

#[test]
fn a_rank_with_other_latents_is_named() {
    let mut two = Group::open(&Options { tp: 2, link: &|link| Box::new(Careless(link)), ..Options::default() });
    let span = PageSpan { page: 0, first: 0, positions: 20 };
    two.begin(0, &[0], &text(5, 0..20));
    two.ranks.digest_pages(&[span]).unwrap();
    let slices = two.ranks.export_pages(&[span]).unwrap();
    two.ranks.import_pages(&slices.into_iter().map(|slice| (0, slice)).collect::<Vec<_>>()).unwrap();
    let error = two.ranks.digest_pages(&[span]).unwrap_err();
    assert_eq!((error.rank, error.fatal), (1, false));
    assert!(error.message.contains("MLA layer 1"), "{error}");
}

#[test]
fn pages_that_do_not_exist_are_refused() {
    let mut two = Group::new(2);
    two.begin(0, &[0], &text(5, 0..64));
    let slices = two.ranks.export_pages(&spans(&[0], 0, 64)).unwrap();
    assert!(two.ranks.import_pages(&[(16, slices[0].clone())]).unwrap_err().message.contains("out of range"));
    let spans = [
        PageSpan { page: 16, first: 0, positions: 1 },
        PageSpan { page: 0, first: 1, positions: 1 },
        PageSpan { page: 0, first: 0, positions: 65 },
        PageSpan { page: 0, first: 0, positions: 0 },
    ];
    for span in spans {
        assert!(!two.ranks.export_pages(&[span]).unwrap_err().fatal);
        assert!(!two.ranks.digest_pages(&[span]).unwrap_err().fatal);
    }
}
