//! Prompts that are filled in: nothing is left as it was, all ranks have the same latents, and sessions go on from there.

use perigee_backend::DType;
use perigee_engine::executor::Executor;

use crate::group::{Fed, Group, LIMITS, Options, feed, spans, text};

const PAGES: [u32; 3] = [4, 2, 9];

fn filling(tp: usize, dtype: DType) -> Group {
    Group::open(&Options { tp, dtype, fills: Some(u64::MAX), ..Options::default() })
}

/// Feeds a chunk of a prompt that wants the logits of its last token.
fn chunk(group: &mut Group, range: std::ops::Range<u32>) -> Vec<f32> {
    let prompt = text(5, range.clone());
    let mut plan = feed(&[Fed::local(0, &PAGES, range.start.into(), &prompt)]);
    plan.batch.logits = vec![range.len() as u32 - 1];
    plan.clear_slots = if range.start == 0 { vec![0] } else { Vec::new() };
    group.step(&plan).1.remove(0)
}

#[test]
fn all_ranks_have_the_same_latents_however_a_prompt_is_cut() {
    for dtype in [DType::Fp32, DType::Bf16] {
        let digests = [1, 2].map(|tp| {
            let [mut whole, mut cut] = [(); 2].map(|()| filling(tp, dtype));
            for group in [&mut whole, &mut cut] {
                group.ranks.poison(&[0], &PAGES).unwrap();
            }
            let at_once = chunk(&mut whole, 0..150);
            let in_parts = [0..70, 70..71, 71..150].map(|range| chunk(&mut cut, range));
            for logits in in_parts.iter().chain([&at_once]) {
                assert!(logits.len() == LIMITS.vocab && logits.iter().all(|logit| logit.is_finite()));
            }
            // Of the first page the cut prompt left no computed token.
            let of = |group: &mut Group, to| group.ranks.digest_pages(&spans(&PAGES, 0, to)).unwrap();
            assert_eq!(of(&mut cut, 64), of(&mut whole, 64));
            let next = feed(&[Fed::local(0, &PAGES, 150, &[7])]);
            assert!(whole.step(&next).1[0].iter().all(|logit| logit.is_finite()), "it goes on");
            of(&mut whole, 149)
        });
        assert_eq!(digests[0], digests[1]);
    }
}

#[test]
fn what_lies_beyond_a_position_is_computed() {
    let mut part = Group::open(&Options { fills: Some(100), ..Options::default() });
    let mut whole = filling(1, DType::Fp32);
    for group in [&mut part, &mut whole] {
        group.ranks.poison(&[0], &PAGES).unwrap();
        let logits = [0..70, 70..150].map(|range| chunk(group, range));
        assert!(logits.iter().flatten().all(|logit| logit.is_finite()));
    }
    let [part, whole] = [part, whole].map(|mut group| {
        [0, 1].map(|page| {
            group.ranks.digest_pages(&spans(&PAGES[page..], 64 * page as u64, 64 * page as u64 + 64)).unwrap()
        })
    });
    assert_eq!(part[0], whole[0]);
    assert_ne!(part[1], whole[1]);
}

#[test]
fn rows_whose_logits_are_wanted_are_computed() {
    let (mut plain, mut filled) = (Group::new(1), filling(1, DType::Fp32));
    let (prompt, short) = (text(5, 0..100), text(3, 0..80));
    let mut plan = feed(&[Fed::local(0, &PAGES, 0, &prompt), Fed::local(1, &[0, 1], 0, &short)]);
    // All of the second row, the last one of the first.
    plan.batch.logits = (99..180).collect();
    plan.clear_slots = vec![0, 1];
    let right = plain.begin(1, &[0, 1], &short);
    let (_, logits) = filled.step(&plan);
    assert_eq!(logits.len(), 81);
    assert!(logits[1..].iter().zip(&right).all(|(found, right)| crate::group::distance(found, right) < 1e-5));
    let computed = plain.begin(0, &PAGES, &prompt);
    assert!(crate::group::distance(&logits[0], &computed[99]) > 1e-3, "a filled prompt says something else");
}
