//! Tests of queries and answers: round trips, the byte formula, split attention through both formats, and refusals.

use proptest::prelude::*;

use super::*;
use crate::merge::merge;
use crate::testing::{config, noise};

/// The shape of the published 48B model.
const PUBLISHED: AttendShape = AttendShape { layers: 7, heads: 32, latent: 512, rope: 64, tokens: 64 };

const SMALL: AttendShape = AttendShape { layers: 2, heads: 4, latent: 3, rope: 2, tokens: 8 };

/// Numbers between -1 and 1.
fn numbers(seed: u64, count: u64) -> Vec<f32> {
    noise(seed, count as usize).into_iter().map(|byte| f32::from(byte) / 127.5 - 1.0).collect()
}

fn query(heads: &HeadRange, dtype: DType, (tokens, ranges): (u32, &[(u64, u64)]), seed: u64) -> SessionQuery {
    let values = numbers(seed, u64::from(tokens) * heads.query_width());
    SessionQuery {
        session: format!("session {seed}"),
        epoch: seed + 1,
        ranges: ranges.iter().map(|&(first, pages)| first * 64..(first + pages) * 64).collect(),
        tokens,
        values: QueryValues::from_f32(&values, dtype),
    }
}

fn batch(shape: &AttendShape, dtype: DType, sessions: u64) -> QueryBatch {
    let heads = HeadRange { layer: 1, first_head: 0, heads: shape.heads, latent: shape.latent, rope: shape.rope };
    let sessions = (0..sessions).map(|seed| query(&heads, dtype, (1, &[(0, 2), (5, 1)]), seed)).collect();
    QueryBatch { heads, dtype, sessions }
}

fn answers(query: &QueryBatch) -> AnswerBatch {
    let sessions = query.sessions.iter().zip(100..).map(|(asked, seed)| {
        let tokens = u64::from(asked.tokens);
        let output = numbers(seed, tokens * query.heads.output_width());
        SessionAnswer::answered(asked, output, numbers(seed, tokens * u64::from(query.heads.heads)))
    });
    AnswerBatch { heads: query.heads, sessions: sessions.collect() }
}

#[test]
fn asking_costs_what_the_formula_says() {
    assert_eq!(attention_bytes(&PUBLISHED, DType::Bf16, 1), 7 * (32 * 576 * 2 + 32 * 513 * 4));
    assert_eq!(attention_bytes(&PUBLISHED, DType::Bf16, 1), 717_696);
    assert_eq!(break_even_tokens(&PUBLISHED, DType::Bf16, DType::Bf16, 89), 1);
    assert_eq!(break_even_tokens(&PUBLISHED, DType::Bf16, DType::Bf16, 8_900), 100);
    assert_eq!(break_even_tokens(&AttendShape { heads: 0, layers: 0, ..SMALL }, DType::Bf16, DType::Bf16, 5), 0);
}

/// One token on every layer, from an owner of 1, 2 or 4 ranks to one home or two: what the messages carry.
#[test]
fn messages_carry_as_many_bytes_as_the_formula_says() {
    for (dtype, ranks, homes) in [(DType::Bf16, 1, 1), (DType::Bf16, 4, 2), (DType::Fp32, 2, 1), (DType::Fp32, 1, 3)] {
        let (mut payload, mut encoded, mut messages) = (0, 0, 0);
        for (layer, rank) in (0..homes).flat_map(|_| (0..7).flat_map(|layer| (0..ranks).map(move |rank| (layer, rank))))
        {
            let each = 32 / ranks;
            let heads = HeadRange { layer, first_head: rank * each, heads: each, latent: 512, rope: 64 };
            let asked = QueryBatch { heads, dtype, sessions: vec![query(&heads, dtype, (1, &[(0, 16)]), 1)] };
            let answer = answers(&asked);
            payload += asked.payload_bytes() + answer.payload_bytes();
            encoded += asked.encode(&PUBLISHED).unwrap().len() + answer.encode(&asked).unwrap().len();
            messages += 2;
        }
        let formula = attention_bytes(&PUBLISHED, dtype, homes);
        assert_eq!(payload, formula, "{dtype:?} {ranks} {homes}");
        let headers = encoded as u64 - formula;
        assert!(headers <= messages * 100, "{headers} bytes of headers in {messages} messages");
    }
}

#[test]
fn halves_are_rounded_as_backends_round() {
    let mut values: Vec<f32> = [0.0, -0.0, 1.0, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-40, 3.004].into();
    values.extend([0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff].map(f32::from_bits));
    values.extend(noise(3, 4000).as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)));
    for value in values {
        let QueryValues::Bf16(halves) = QueryValues::from_f32(&[value], DType::Bf16) else { panic!() };
        assert_eq!(halves, [half::bf16::from_f32(value).to_bits()], "{value} {:08x}", value.to_bits());
        let back = QueryValues::Bf16(halves.clone()).to_f32()[0];
        assert_eq!(back.to_bits(), half::bf16::from_bits(halves[0]).to_f32().to_bits());
    }
}

proptest! {
    #![proptest_config(config(200))]

    #[test]
    fn what_was_asked_and_answered_comes_back(
        (layer, first_head, heads) in (0_u32..2, 0_u32..4, 1_u32..5),
        sessions in prop::collection::vec((1_u32..5, prop::collection::vec((0_u64..4, 1_u64..4), 1..4), any::<u64>(), 0_usize..7), 0..5),
        bf16 in any::<bool>(),
    ) {
        let heads = HeadRange { layer, first_head, heads: heads.min(4 - first_head), latent: 3, rope: 2 };
        let dtype = if bf16 { DType::Bf16 } else { DType::Fp32 };
        let mut asked = QueryBatch { heads, dtype, sessions: Vec::new() };
        let mut statuses = Vec::new();
        for (tokens, steps, seed, status) in sessions {
            // (gap, length) in pages, one behind the other.
            let mut at = 0;
            let ranges: Vec<(u64, u64)> = steps.iter().map(|&(gap, pages)| { at += gap + pages; (at - pages, pages) }).collect();
            asked.sessions.push(query(&heads, dtype, (tokens, &ranges), seed % 1000));
            statuses.push(super::answer::AnswerStatus::Answered);
            if let Some(refusal) = [AnswerStatus::Unknown, AnswerStatus::Stale, AnswerStatus::Missing, AnswerStatus::Busy].get(status) {
                *statuses.last_mut().unwrap() = *refusal;
            }
        }
        let message = asked.encode(&SMALL).unwrap();
        prop_assert_eq!(&QueryBatch::decode(&message, &SMALL).unwrap(), &asked);

        let mut answer = answers(&asked);
        for ((answer, asked), &status) in answer.sessions.iter_mut().zip(&asked.sessions).zip(&statuses) {
            if status != AnswerStatus::Answered {
                *answer = SessionAnswer::refused(asked, status);
            } else if let Some(lse) = answer.lse.first_mut() {
                *lse = f32::NEG_INFINITY;
            }
        }
        let message = answer.encode(&asked).unwrap();
        prop_assert_eq!(&AnswerBatch::decode(&message, &asked, &SMALL).unwrap(), &answer);
    }

    #[test]
    fn noise_is_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(QueryBatch::decode(&bytes, &SMALL).is_err());
        // Noise under a right checksum: whatever reads as a message is one that could be sent.
        let asked = batch(&SMALL, DType::Bf16, 1);
        for mark in [*b"PRGQ", *b"PRGA"] {
            let message = seal(u32::from_le_bytes(mark), &bytes);
            if let Ok(found) = QueryBatch::decode(&message, &SMALL) {
                prop_assert_eq!(found.encode(&SMALL).unwrap(), &message[..]);
            }
            prop_assert!(AnswerBatch::decode(&message, &asked, &SMALL).is_err());
        }
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_is_an_error() {
    let asked = batch(&SMALL, DType::Bf16, 2);
    let (question, answer) = (asked.encode(&SMALL).unwrap(), answers(&asked).encode(&asked).unwrap());
    for bit in 0..question.len() * 8 {
        let mut damaged = question.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(QueryBatch::decode(&damaged, &SMALL).is_err(), "bit {bit}");
    }
    for bit in 0..answer.len() * 8 {
        let mut damaged = answer.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(AnswerBatch::decode(&damaged, &asked, &SMALL).is_err(), "bit {bit}");
    }
    assert!((0..question.len()).all(|length| QueryBatch::decode(&question[..length], &SMALL).is_err()));
    assert!((0..answer.len()).all(|length| AnswerBatch::decode(&answer[..length], &asked, &SMALL).is_err()));
    assert!(matches!(QueryBatch::decode(&answer, &SMALL), Err(AttendError::Mark { .. })), "an answer is no question");
    let mut later = question;
    later[4] = 2;
    assert_eq!(QueryBatch::decode(&later, &SMALL), Err(AttendError::Version { expected: 1, found: 2 }));
}

/// A count of sessions or tokens far beyond what follows, under a right checksum.
#[test]
fn lies_about_sizes_are_refused() {
    let asked = batch(&SMALL, DType::Bf16, 1);
    let message = asked.encode(&SMALL).unwrap();
    let with = |offset: usize, value: u32| {
        let mut body = message[PREFIX..].to_vec();
        body[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        QueryBatch::decode(&seal(u32::from_le_bytes(*b"PRGQ"), &body), &SMALL).unwrap_err()
    };
    let shape = |what, expected, found| AttendError::Shape { what, expected, found };
    assert_eq!(with(0, 2), shape("MLA layer, at most", 1, 2));
    assert_eq!(with(4, 3), shape("heads up to", 4, 7));
    assert_eq!(with(8, u32::MAX), shape("heads up to", 4, u32::MAX.into()));
    assert_eq!(with(8, 0), shape("heads up to", 4, 0));
    assert_eq!(with(12, 512), shape("latent width", 3, 512));
    assert_eq!(with(16, 64), shape("shared key width", 2, 64));
    assert_eq!(with(21, u32::MAX), shape("sessions", MOST_ENTRIES.into(), u32::MAX.into()));
    assert!(matches!(with(21, 60_000), AttendError::Field(FieldError::Short { .. })));
    // Behind the sessions' count: name (2 + 9), epoch (8), number of ranges.
    assert_eq!(with(44, u32::MAX), shape("ranges of a session", MOST_ENTRIES.into(), u32::MAX.into()));
    // Two ranges of 16 bytes later: tokens.
    assert_eq!(with(80, 9), shape("tokens of a session, at most", 8, 9));
    assert!(matches!(with(80, 8), AttendError::Field(FieldError::Short { field: "queries", .. })));
}

#[test]
fn queries_that_no_home_would_take_are_not_sent() {
    let refused = |change: fn(&mut SessionQuery)| {
        let mut asked = batch(&SMALL, DType::Bf16, 1);
        change(&mut asked.sessions[0]);
        asked.encode(&SMALL).unwrap_err()
    };
    let shape = |what, expected, found| AttendError::Shape { what, expected, found };
    assert_eq!(refused(|query| query.ranges.clear()), shape("ranges or tokens of a session", 1, 0));
    assert_eq!(refused(|query| query.ranges[0].end -= 1), shape("range boundary", 64, 127));
    assert_eq!(refused(|query| query.ranges[1].start = 64), shape("range from", 128, 64));
    assert_eq!(refused(|query| query.ranges[0].end = 0), shape("positions of a range", 64, 0));
    assert_eq!(refused(|query| query.tokens = 2), shape("numbers of queries", 40, 20));
    let typed = refused(|query| query.values = QueryValues::from_f32(&query.values.to_f32(), DType::Fp32));
    assert_eq!(typed, AttendError::Dtype { session: "session 0".into(), expected: DType::Bf16 });
}

#[test]
fn answers_to_something_else_are_refused() {
    let asked = batch(&SMALL, DType::Fp32, 2);
    let right = answers(&asked).encode(&asked).unwrap();
    let read = |asked: &QueryBatch| AnswerBatch::decode(&right, asked, &SMALL).unwrap_err();
    let mut other = asked.clone();
    other.heads.layer = 0;
    assert!(matches!(read(&other), AttendError::Mismatch { .. }));
    let mut other = asked.clone();
    other.sessions[1].epoch = 9;
    let error = read(&other);
    assert_eq!(
        error,
        AttendError::Mismatch {
            expected: "session session 1 in epoch 9".into(),
            found: "session session 1 in epoch 2".into()
        }
    );
    let mut other = asked.clone();
    other.sessions.pop();
    assert_eq!(read(&other), AttendError::Shape { what: "sessions", expected: 1, found: 2 });
}

#[test]
fn numbers_that_no_attention_gives_are_refused() {
    let asked = batch(&SMALL, DType::Fp32, 1);
    let refused = |change: fn(&mut SessionAnswer)| {
        let mut answer = answers(&asked);
        change(&mut answer.sessions[0]);
        answer.encode(&asked).unwrap_err()
    };
    let wrong = |what| AttendError::NotFinite { session: "session 0".into(), what };
    assert_eq!(refused(|answer| answer.output[3] = f32::NAN), wrong("outputs"));
    assert_eq!(refused(|answer| answer.output[3] = f32::NEG_INFINITY), wrong("outputs"));
    assert_eq!(refused(|answer| answer.lse[0] = f32::NAN), wrong("log-sum-exps"));
    assert_eq!(refused(|answer| answer.lse[0] = f32::INFINITY), wrong("log-sum-exps"));
    assert!(matches!(refused(|answer| answer.status = AnswerStatus::Busy), AttendError::Shape { found: 12, .. }));
}

/// Attention of every head over keys [n, R + r], whose first R numbers are the values.
fn attend(queries: &[f32], heads: &HeadRange, keys: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (latent, width) = (heads.latent as usize, (heads.latent + heads.rope) as usize);
    let (mut output, mut lses) = (Vec::new(), Vec::new());
    for query in queries.chunks_exact(width) {
        let scores = keys.chunks_exact(width).map(|key| key.iter().zip(query).map(|(k, q)| k * q).sum::<f32>());
        let weights: Vec<f32> = scores.map(f32::exp).collect();
        let total: f32 = weights.iter().sum();
        let average =
            |c: usize| weights.iter().zip(keys.chunks_exact(width)).map(|(w, key)| w * key[c]).sum::<f32>() / total;
        output.extend((0..latent).map(average));
        lses.push(total.ln());
    }
    (output, lses)
}

/// A home's answer, sent and read and merged into the owner's own part, is attention over all keys.
#[test]
fn attention_split_between_owner_and_home_is_the_whole() {
    let asked = batch(&SMALL, DType::Fp32, 1);
    let heads = asked.heads;
    let keys = numbers(9, 256 * 5);
    let (remote, local) = keys.split_at(192 * 5);
    let question = QueryBatch::decode(&asked.encode(&SMALL).unwrap(), &SMALL).unwrap();
    let queries = question.sessions[0].values.to_f32();
    let (output, lse) = attend(&queries, &heads, remote);
    let answer = AnswerBatch { heads, sessions: vec![SessionAnswer::answered(&question.sessions[0], output, lse)] };
    let answer = AnswerBatch::decode(&answer.encode(&question).unwrap(), &asked, &SMALL).unwrap();
    let (mut output, mut lse) = attend(&queries, &heads, local);
    merge(&mut output, &mut lse, &answer.sessions[0].output, &answer.sessions[0].lse).unwrap();
    let (whole, whole_lse) = attend(&queries, &heads, &keys);
    let worst =
        output.iter().zip(&whole).chain(lse.iter().zip(&whole_lse)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-6, "{worst}");
}
