//! Draws through the public interface: distribution, repetition, order of operations, logprobs, margins and errors.
//! All seeds are fixed, so each test passes always or never.

use perigee_sampling::{
    Draw, Noise, SampleError, Sampled, SamplingParams, Scratch, TokenCounts, prompt_logprobs, sample,
};

const LOGITS: [f32; 12] = [1.0, 0.3, -0.5, 2.0, 0.0, 1.5, -1.0, 0.7, -2.0, 1.2, 0.1, -0.2];

fn draw(logits: &[f32], params: &SamplingParams, choice: u32, position: u64) -> Sampled {
    let counts = TokenCounts::new();
    let draw = Draw { params, choice, position, counts: &counts, banned: &[], allowed: None };
    sample(logits, &draw, &mut Scratch::new()).expect("the row has a token to draw")
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|l| l.exp()).sum();
    logits.iter().map(|l| l.exp() / total).collect()
}

/// Pearson's statistic of counts against probabilities.
fn chi_square(counts: &[u64], probabilities: &[f64]) -> f64 {
    let draws = counts.iter().sum::<u64>() as f64;
    let cell = |(&count, &p): (&u64, &f64)| (count as f64 - draws * p).powi(2) / (draws * p);
    counts.iter().zip(probabilities).map(cell).sum()
}

#[test]
fn draws_are_distributed_as_the_softmax() {
    // 0.1 % quantile of chi-square with 11 degrees of freedom.
    const LIMIT: f64 = 31.26;
    for (temperature, seed) in [(1.0f32, 1u64), (0.7, 2), (1.6, u64::MAX)] {
        let params = SamplingParams { temperature, seed, ..SamplingParams::default() };
        let mut counts = [0u64; LOGITS.len()];
        for position in 0..20_000 {
            counts[draw(&LOGITS, &params, 0, position).token as usize] += 1;
        }
        let scaled: Vec<f64> = LOGITS.iter().map(|&l| f64::from(l) / f64::from(temperature)).collect();
        let statistic = chi_square(&counts, &softmax(&scaled));
        assert!(statistic < LIMIT, "temperature {temperature}: chi-square {statistic}, counts {counts:?}");
    }
}

#[test]
fn filtered_draws_are_distributed_as_the_renormalised_rest() {
    // Top-k leaves tokens 3, 5, 9, 0 (logits 2.0, 1.5, 1.2, 1.0); 0.1 % quantile with 3 degrees of freedom.
    const LIMIT: f64 = 16.27;
    let params = SamplingParams { top_k: 4, seed: 5, ..SamplingParams::default() };
    let mut counts = [0u64; LOGITS.len()];
    for position in 0..20_000 {
        counts[draw(&LOGITS, &params, 0, position).token as usize] += 1;
    }
    let kept = [3, 5, 9, 0].map(|token: usize| counts[token]);
    assert_eq!(kept.iter().sum::<u64>(), 20_000);
    let statistic = chi_square(&kept, &softmax(&[2.0, 1.5, 1.2, 1.0]));
    assert!(statistic < LIMIT, "chi-square {statistic}, counts {kept:?}");
}

/// Pairs of draws that differ in one coordinate of the noise are independent: their joint counts fit the product.
#[test]
fn choices_positions_and_seeds_are_independent() {
    // 0.1 % quantile of chi-square with 15 degrees of freedom.
    const LIMIT: f64 = 37.70;
    let logits = [0.5f32, 0.0, -0.5, 0.2];
    let probabilities = softmax(&logits.map(f64::from));
    let joint: Vec<f64> = probabilities.iter().flat_map(|a| probabilities.iter().map(move |b| a * b)).collect();
    let at = |seed, choice, position| {
        let params = SamplingParams { seed, ..SamplingParams::default() };
        draw(&logits, &params, choice, position).token
    };
    const HIGH: u64 = 1 << 32;
    type Pair<'a> = &'a dyn Fn(u64) -> (u32, u32);
    let pairs: [(&str, Pair<'_>); 5] = [
        ("choices", &|i| (at(9, 0, i), at(9, 1, i))),
        ("positions", &|i| (at(9, 0, 2 * i), at(9, 0, 2 * i + 1))),
        ("high halves of positions", &|i| (at(9, 0, i), at(9, 0, i + HIGH))),
        ("seeds", &|i| (at(9, 0, i), at(10, 0, i))),
        ("high halves of seeds", &|i| (at(9, 0, i), at(9 + HIGH, 0, i))),
    ];
    for (name, pair) in &pairs {
        let mut counts = [0u64; 16];
        for i in 0..20_000 {
            let (a, b) = pair(i);
            counts[(a * 4 + b) as usize] += 1;
        }
        let statistic = chi_square(&counts, &joint);
        assert!(statistic < LIMIT, "{name}: chi-square {statistic}, counts {counts:?}");
    }
}

#[test]
fn a_draw_repeats_whatever_was_drawn_before() {
    let params =
        SamplingParams { top_p: 0.9, top_k: 9, min_p: 0.05, logprobs: Some(3), seed: 77, ..Default::default() };
    let counts = TokenCounts::new();
    let mut scratch = Scratch::new();
    let longer: Vec<f32> = (0..500).map(|i| (i % 17) as f32).collect();
    for position in 0..200 {
        let draw = Draw { params: &params, choice: 2, position, counts: &counts, banned: &[], allowed: None };
        let fresh = sample(&LOGITS, &draw, &mut Scratch::new()).unwrap();
        sample(&longer, &draw, &mut scratch).unwrap();
        assert_eq!(sample(&LOGITS, &draw, &mut scratch).unwrap(), fresh);
    }
}

/// Pinned by an independent computation (tests/reference_draws.py): a device and a later version must draw these.
#[test]
fn pinned_draws() {
    let logits: Vec<f32> = (0..1000u32).map(|token| ((token * 37) % 101) as f32 / 16.0).collect();
    let params = SamplingParams { temperature: 0.75, seed: 0x0123_4567_89ab_cdef, ..SamplingParams::default() };
    let tokens = |choice, first: u64| -> Vec<u32> {
        (first..first + 8).map(|position| draw(&logits, &params, choice, position).token).collect()
    };
    assert_eq!(tokens(0, 0), PINNED_FIRST);
    assert_eq!(tokens(3, 0xffff_fffc), PINNED_AROUND_2_TO_32);
}

const PINNED_FIRST: [u32; 8] = [625, 379, 431, 144, 371, 322, 144, 884];
const PINNED_AROUND_2_TO_32: [u32; 8] = [8, 371, 256, 666, 390, 292, 434, 726];

#[test]
fn greedy_takes_the_largest_and_the_lowest_id_among_equals() {
    let greedy = SamplingParams::greedy();
    assert_eq!(draw(&LOGITS, &greedy, 0, 0).token, 3);
    assert_eq!(draw(&LOGITS, &greedy, 0, 0).margin, 0.5);
    let tied = draw(&[0.0, 4.0, 4.0, 1.0], &greedy, 0, 0);
    assert_eq!((tied.token, tied.margin), (1, 0.0));
    assert_eq!(draw(&[-0.0, 0.0, -1.0], &greedy, 0, 0).token, 0);
    assert_eq!(
        draw(&[f32::NEG_INFINITY, -3.0], &greedy, 0, 0),
        Sampled { token: 1, logprob: None, top: vec![], margin: f32::INFINITY }
    );
    // Filters and seed do not matter.
    let filtered = SamplingParams { top_k: 1, top_p: 0.1, min_p: 1.0, seed: 4, ..SamplingParams::greedy() };
    assert_eq!(draw(&LOGITS, &filtered, 5, 9), draw(&LOGITS, &greedy, 0, 0));
}

#[test]
fn extreme_temperatures_stay_finite() {
    let cold = SamplingParams { temperature: f32::from_bits(1), ..SamplingParams::default() };
    let hot = SamplingParams { temperature: f32::MAX, ..SamplingParams::default() };
    let logits = [f32::MAX, -f32::MAX, 1.0];
    for position in 0..100 {
        assert_eq!(draw(&logits, &cold, 0, position).token, 0);
        assert!(draw(&LOGITS, &hot, 0, position).margin.is_finite());
    }
    let mut seen = [false; LOGITS.len()];
    for position in 0..500 {
        seen[draw(&LOGITS, &hot, 0, position).token as usize] = true;
    }
    assert_eq!(seen, [true; LOGITS.len()]);
}

/// The sampled margin: the winner's lead in scaled logit plus noise, or the nearest cut.
#[test]
fn the_margin_is_the_lead_or_the_cut() {
    let temperature = 0.8f32;
    for position in 0..200 {
        let params = SamplingParams { temperature, seed: 3, ..SamplingParams::default() };
        let mut noise = Noise::new(3, 1, position);
        let mut scores: Vec<(f64, u32)> = (0..)
            .zip(LOGITS)
            .map(|(token, logit)| (f64::from(logit) / f64::from(temperature) + noise.gumbel(token), token))
            .collect();
        scores.sort_by(|a, b| b.partial_cmp(a).unwrap());
        let lead = (scores[0].0 - scores[1].0) as f32;
        let plain = draw(&LOGITS, &params, 1, position);
        assert_eq!((plain.token, plain.margin), (scores[0].1, lead));

        // The 3rd and 4th largest logits are 1.2 and 1.0.
        let cut = (f64::from(1.2f32) - 1.0) / f64::from(temperature);
        let kept: Vec<_> = scores.iter().filter(|&&(_, token)| [3, 5, 9].contains(&token)).collect();
        let filtered = draw(&LOGITS, &SamplingParams { top_k: 3, ..params.clone() }, 1, position);
        assert_eq!(filtered.token, kept[0].1);
        assert_eq!(filtered.margin, (kept[0].0 - kept[1].0).min(cut) as f32);
    }
}

fn greedy_with(params: SamplingParams, counts: &TokenCounts, logits: &[f32]) -> Sampled {
    let params = SamplingParams { temperature: 0.0, ..params };
    let draw = Draw { params: &params, choice: 0, position: 0, counts, banned: &[], allowed: None };
    sample(logits, &draw, &mut Scratch::new()).expect("the row has a token to draw")
}

#[test]
fn repetition_penalty_divides_positive_and_multiplies_negative_logits() {
    let mut counts = TokenCounts::from_prompt(&[0]);
    counts.record_output(1);
    let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
    // 6 / 2 and 5 / 2 fall behind 4; the margin shows the penalised value.
    let positive = greedy_with(params.clone(), &counts, &[6.0, 5.0, 4.0]);
    assert_eq!((positive.token, positive.margin), (2, 1.0));
    // -1 * 2 falls behind -1.5.
    let negative = greedy_with(params, &counts, &[-1.0, -4.0, -1.5]);
    assert_eq!((negative.token, negative.margin), (2, 0.5));
}

#[test]
fn presence_and_frequency_penalties_count_the_output_only() {
    let mut counts = TokenCounts::from_prompt(&[0, 0]);
    for token in [1, 2, 2, 2] {
        counts.record_output(token);
    }
    let logits = [3.0, 3.5, 4.0];
    let presence = greedy_with(SamplingParams { presence_penalty: 1.25, ..Default::default() }, &counts, &logits);
    // 3, 2.25, 2.75
    assert_eq!((presence.token, presence.margin), (0, 0.25));
    let frequency = greedy_with(SamplingParams { frequency_penalty: 0.25, ..Default::default() }, &counts, &logits);
    // 3, 3.25, 3.25
    assert_eq!((frequency.token, frequency.margin), (1, 0.0));
    let encouraged = greedy_with(SamplingParams { frequency_penalty: -2.0, ..Default::default() }, &counts, &logits);
    // 3, 5.5, 10
    assert_eq!((encouraged.token, encouraged.margin), (2, 4.5));
}

/// The order shows where the results differ: penalties before bias, masks last, counts beyond the row without effect.
#[test]
fn penalties_come_before_bias_and_masks_last() {
    let mut counts = TokenCounts::from_prompt(&[0, 900]);
    counts.record_output(0);
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        logit_bias: vec![(0, 10.0)],
        ..SamplingParams::greedy()
    };
    // 4 / 2 - 0.5 + 10; bias first would give (4 + 10) / 2 - 0.5, presence first (4 - 0.5) / 2 + 10.
    let sampled = greedy_with(params.clone(), &counts, &[4.0, 5.0]);
    assert_eq!((sampled.token, sampled.margin), (0, 6.5));

    let mut scratch = Scratch::new();
    let draw = Draw { params: &params, choice: 0, position: 0, counts: &counts, banned: &[0, 7], allowed: None };
    assert_eq!(sample(&[4.0, 5.0], &draw, &mut scratch).unwrap().token, 1);
    let draw = Draw { banned: &[], allowed: Some(&[0b10]), ..draw };
    assert_eq!(sample(&[4.0, 5.0], &draw, &mut scratch).unwrap().token, 1);
}

#[test]
fn masks_cover_word_borders() {
    let logits: Vec<f32> = (0..130).map(|token| token as f32).collect();
    let params = SamplingParams::greedy();
    let counts = TokenCounts::new();
    let mut scratch = Scratch::new();
    for allowed in [0u32, 63, 64, 127, 128, 129] {
        let mut mask = [0u64; 3];
        mask[allowed as usize / 64] |= 1 << (allowed % 64);
        mask[0] |= 1;
        let draw = Draw { params: &params, choice: 0, position: 0, counts: &counts, banned: &[], allowed: Some(&mask) };
        assert_eq!(sample(&logits, &draw, &mut scratch).unwrap().token, allowed);
    }
}

/// Finite values saturate and never become impossible or NaN.
#[test]
fn extreme_penalties_and_biases_saturate() {
    let mut counts = TokenCounts::new();
    counts.record_output(0);
    counts.record_output(1);
    let params = SamplingParams {
        repetition_penalty: f32::MIN_POSITIVE,
        logit_bias: vec![(1, f32::MAX), (2, -f32::MAX)],
        ..SamplingParams::greedy()
    };
    let sampled = greedy_with(params, &counts, &[1e30, f32::MAX, -f32::MAX]);
    assert_eq!((sampled.token, sampled.margin), (0, 0.0));
    let sampled =
        greedy_with(SamplingParams { logit_bias: vec![(0, -f32::MAX)], ..Default::default() }, &counts, &[-f32::MAX]);
    assert_eq!(sampled.token, 0);
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let expected: Vec<f64> = softmax(&LOGITS.map(f64::from)).iter().map(|p| p.ln()).collect();
    let params = SamplingParams {
        temperature: 0.3,
        top_k: 2,
        repetition_penalty: 1.5,
        logit_bias: vec![(8, 50.0)],
        logprobs: Some(4),
        ..SamplingParams::default()
    };
    let sampled = draw(&LOGITS, &params, 0, 0);
    assert_eq!(sampled.token, 8);
    assert!((f64::from(sampled.logprob.unwrap()) - expected[8]).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [3, 5, 9, 0]);
    for (token, logprob) in sampled.top {
        assert!((f64::from(logprob) - expected[token as usize]).abs() < 1e-6);
    }
    let only_own = draw(&LOGITS, &SamplingParams { logprobs: Some(0), ..SamplingParams::greedy() }, 0, 0);
    assert!(only_own.logprob.is_some() && only_own.top.is_empty());
    assert_eq!(draw(&LOGITS, &SamplingParams::greedy(), 0, 0).logprob, None);
}

#[test]
fn prompt_logprobs_rank_ties_by_id_and_stop_at_the_vocabulary() {
    let row = [1.0f32, 2.0, 1.0, 2.0, f32::NEG_INFINITY];
    let found = prompt_logprobs(&row, 2, 3).unwrap();
    let total: f64 = [1.0f64, 2.0, 1.0, 2.0].iter().map(|l| l.exp()).sum();
    assert!((f64::from(found.logprob) - (1.0 - total.ln())).abs() < 1e-6);
    assert_eq!(found.top.iter().map(|&(token, _)| token).collect::<Vec<_>>(), [1, 3, 0]);
    let all = prompt_logprobs(&row, 4, 20).unwrap();
    assert_eq!((all.logprob, all.top.len()), (f32::NEG_INFINITY, 5));
    assert_eq!(prompt_logprobs(&row, 5, 1), Err(SampleError::TokenOutOfRange { token: 5, vocab: 5 }));
    assert!(matches!(prompt_logprobs(&[0.0, f32::NAN], 0, 1), Err(SampleError::BadLogit { token: 1, .. })));
    assert_eq!(prompt_logprobs(&[f32::NEG_INFINITY; 3], 0, 1), Err(SampleError::NoCandidate));
    // Large logits do not overflow.
    assert_eq!(prompt_logprobs(&[3e38, -3e38], 0, 0).unwrap().logprob, 0.0);
}

#[test]
fn what_cannot_be_drawn_is_a_typed_error() {
    let counts = TokenCounts::new();
    let mut scratch = Scratch::new();
    for params in
        [SamplingParams::greedy(), SamplingParams::default(), SamplingParams { top_p: 0.5, ..Default::default() }]
    {
        let draw = Draw { params: &params, choice: 0, position: 0, counts: &counts, banned: &[], allowed: None };
        let nan = sample(&[0.0, 1.0, f32::NAN], &draw, &mut scratch).unwrap_err();
        assert!(matches!(nan, SampleError::BadLogit { token: 2, value } if value.is_nan()));
        let infinite = sample(&[0.0, f32::INFINITY], &draw, &mut scratch).unwrap_err();
        assert_eq!(infinite, SampleError::BadLogit { token: 1, value: f32::INFINITY });
        assert_eq!(sample(&[], &draw, &mut scratch), Err(SampleError::NoCandidate));
        assert_eq!(sample(&[f32::NEG_INFINITY; 2], &draw, &mut scratch), Err(SampleError::NoCandidate));
        let banned = Draw { banned: &[0, 1], ..draw };
        assert_eq!(sample(&[1.0, 2.0], &banned, &mut scratch), Err(SampleError::NoCandidate));
        let nothing_allowed = Draw { allowed: Some(&[0]), ..draw };
        assert_eq!(sample(&[1.0, 2.0], &nothing_allowed, &mut scratch), Err(SampleError::NoCandidate));
        let short = Draw { allowed: Some(&[u64::MAX]), ..draw };
        assert_eq!(sample(&[0.0; 65], &short, &mut scratch), Err(SampleError::MaskTooShort { words: 1, vocab: 65 }));
    }
}
