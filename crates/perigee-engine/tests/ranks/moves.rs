//! States that move between replicas of 1, 2 and 4 ranks: what is exported is what is imported, digests say so, and a
//! session goes on from it.

use perigee_backend::{DType, StateKind};
use perigee_engine::executor::{Executor, StateSource};
use perigee_migration::{DigestMismatch, Tensor, TensorDigests};

use crate::group::{Fed, Group, Options, distance, feed, spans, text};

#[test]
fn a_state_is_the_same_state_at_any_number_of_ranks() {
    let prompt = text(7, 0..70);
    let mut groups = [1, 2, 4].map(Group::new);
    for from in 0..groups.len() {
        groups[from].begin(1, &[0, 1], &prompt);
        let slices = groups[from].ranks.export_slot(StateSource::Slot(1)).unwrap();
        let digests = groups[from].ranks.digest_slot(1).unwrap();
        let geometry = groups[from].ranks.geometry().unwrap();
        assert_eq!((geometry.kda_heads, geometry.kda_layers, geometry.mla_layers), (4, 3, 2));
        let bytes: u64 = slices.iter().map(|slice| slice.bytes.len() as u64).sum();
        assert_eq!(bytes, geometry.recurrent_bytes() + geometry.tail_bytes());
        let mut sum = TensorDigests::new(&geometry);
        slices.iter().for_each(|slice| sum.add(slice.tensor(), slice.digest));
        assert_eq!(sum, digests, "digests of the parts are those of the slot");
        assert!(digests.numbers()[..12].iter().all(|&number| number != 0));
        assert_eq!(digests.numbers()[12..], [0, 0], "latents are counted by themselves");
        for to in &mut groups {
            to.ranks.import_state(2, &slices).unwrap();
            assert_eq!(to.ranks.geometry().unwrap(), geometry);
            assert_eq!(to.ranks.digest_slot(2).unwrap(), digests);
        }
    }
}

#[test]
fn a_session_goes_on_where_its_state_and_pages_were_brought() {
    let (prompt, next) = (text(7, 0..70), text(7, 70..75));
    let [mut one, mut two, mut four] = [1, 2, 4].map(Group::new);
    four.begin(0, &[3, 5], &prompt);
    let expected = four.step(&feed(&[Fed::local(0, &[3, 5], 70, &next)])).1;
    four.begin(0, &[3, 5], &prompt);
    for target in [&mut one, &mut two] {
        target.take_state(&mut four, 0, 4);
        target.take_pages(&mut four, &spans(&[3, 5], 0, 70), &[9, 2]);
        let logits = target.step(&feed(&[Fed::local(4, &[9, 2], 70, &next)])).1;
        for (found, expected) in logits.iter().zip(&expected) {
            assert!(distance(found, expected) < 1e-5, "{}", distance(found, expected));
        }
    }
}

#[test]
fn bf16_states_keep_their_bits() {
    let bf16 = |tp| Group::open(&Options { tp, dtype: DType::Bf16, ..Options::default() });
    let (mut two, mut one) = (bf16(2), bf16(1));
    two.begin(0, &[0, 1], &text(9, 0..66));
    let geometry = two.ranks.geometry().unwrap();
    assert_eq!(
        (geometry.recurrent_dtype, geometry.tail_dtype, geometry.latent_dtype),
        (DType::Fp32, DType::Bf16, DType::Bf16)
    );
    one.take_state(&mut two, 0, 3);
    one.take_pages(&mut two, &spans(&[0, 1], 0, 66), &[4, 7]);
    assert_eq!(one.ranks.digest_slot(3).unwrap(), two.ranks.digest_slot(0).unwrap());
    let digests = two.ranks.digest_pages(&spans(&[0, 1], 0, 66)).unwrap();
    assert_eq!(one.ranks.digest_pages(&spans(&[4, 7], 0, 66)).unwrap(), digests);
}

#[test]
fn a_flipped_bit_shows_in_the_digest_of_its_tensor() {
    let (mut two, mut one) = (Group::new(2), Group::new(1));
    two.begin(0, &[0], &text(1, 0..10));
    let mut slices = two.ranks.export_slot(StateSource::Slot(0)).unwrap();
    let wanted = Tensor::State { layer: 2, kind: StateKind::ConvK };
    // The part of the second rank.
    let slice = slices.iter_mut().rfind(|slice| slice.tensor() == wanted).unwrap();
    assert_eq!(slice.part.first_head, 2);
    slice.bytes[21] ^= 0x10;
    one.ranks.import_state(0, &slices).unwrap();
    let error = two.ranks.digest_slot(0).unwrap().compare(&one.ranks.digest_slot(0).unwrap()).unwrap_err();
    assert!(matches!(error, DigestMismatch::Tensor { tensor, .. } if tensor == wanted), "{error}");
}

#[test]
fn a_parked_state_is_exported_from_where_it_is() {
    let mut two = Group::new(2);
    two.begin(5, &[0], &text(1, 0..20));
    let slices = two.ranks.export_slot(StateSource::Slot(5)).unwrap();
    two.ranks.park(77, 5, &[0]).unwrap();
    two.ranks.poison(&[5], &[0]).unwrap();
    assert_eq!(two.ranks.export_slot(StateSource::Parked(77)).unwrap(), slices);
    let unknown = two.ranks.export_slot(StateSource::Parked(78)).unwrap_err();
    assert!(unknown.message.contains("78") && !unknown.fatal, "{unknown}");
}

#[test]
fn a_session_that_has_not_begun_is_zero() {
    let mut two = Group::new(2);
    two.begin(0, &[0], &text(1, 0..20));
    let empty = two.ranks.export_slot(StateSource::Empty).unwrap();
    two.ranks.import_state(0, &empty).unwrap();
    assert_eq!(two.ranks.digest_slot(0).unwrap(), TensorDigests::new(&two.ranks.geometry().unwrap()));
    let fresh = two.step(&feed(&[Fed::local(0, &[0], 0, &[3, 4])])).1;
    assert_eq!(fresh, two.begin(1, &[1], &[3, 4]));
}

#[test]
fn what_was_given_back_is_poison_on_every_rank() {
    let mut four = Group::new(4);
    four.begin(2, &[0], &text(1, 0..20));
    four.ranks.poison(&[2], &[0]).unwrap();
    for slice in four.ranks.export_slot(StateSource::Slot(2)).unwrap() {
        let numbers = slice.bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        assert!(numbers.clone().count() > 0 && numbers.clone().all(f32::is_nan), "{:?}", slice.part);
    }
    for page in four.ranks.export_pages(&spans(&[0], 0, 20)).unwrap() {
        assert!(page.bytes.as_chunks().0.iter().all(|&bytes| f32::from_le_bytes(bytes).is_nan()));
    }
}

#[test]
fn slots_and_slices_that_do_not_exist_are_refused_and_nothing_breaks() {
    let mut two = Group::new(2);
    two.begin(0, &[0], &text(1, 0..20));
    let slices = two.ranks.export_slot(StateSource::Slot(0)).unwrap();
    for error in [
        two.ranks.export_slot(StateSource::Slot(6)).unwrap_err(),
        two.ranks.digest_slot(6).unwrap_err(),
        two.ranks.import_state(6, &slices).unwrap_err(),
        two.ranks.poison(&[6], &[]).unwrap_err(),
        two.ranks.poison(&[], &[16]).unwrap_err(),
    ] {
        assert!(error.message.contains("out of range") && !error.fatal, "{error}");
    }
    let mut short = slices.clone();
    short[3].bytes.pop();
    let mut beyond = slices.clone();
    beyond[0].part.first_head = 3;
    for wrong in [short, beyond] {
        let error = two.ranks.import_state(1, &wrong).unwrap_err();
        assert!(error.message.contains("fits no slot"), "{error}");
    }
    two.ranks.import_state(1, &slices).unwrap();
}
