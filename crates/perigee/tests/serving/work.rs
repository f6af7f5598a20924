//! Random requests from a seed: every way of sampling and stopping that the proto offers, and clients that lose interest.

use perigee_proto::v1::{GenerateRequest, SamplingParams};
use perigee_testkit::Numbers;

/// Token ids of `random:tiny`: the first 259 are bytes and special tokens, the others have no text.
pub(crate) const VOCAB: usize = 512;
/// The end of sequence of `random:tiny`.
pub(crate) const EOS: u32 = 2;
/// Its tokenizer gives bytes the lowest ids that are not special (0, 1 and 2).
const FIRST_BYTE: u32 = 3;

/// How large requests are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) prompt: (usize, usize),
    pub(crate) output: (usize, usize),
    /// One request in so many has several choices.
    pub(crate) choices_one_in: usize,
    /// One client in so many goes away before the end.
    pub(crate) leaves_one_in: usize,
}

/// A request, and after how many tokens its client goes away.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    pub(crate) request: GenerateRequest,
    pub(crate) leaves_after: Option<usize>,
}

pub(crate) fn byte(letter: char) -> u32 {
    u32::from(letter as u8) + FIRST_BYTE
}

/// Random token ids, without special ones.
pub(crate) fn prompt(numbers: &mut Numbers, length: usize) -> Vec<u32> {
    (0..length).map(|_| numbers.between(FIRST_BYTE as usize, VOCAB - 1) as u32).collect()
}

/// The requests of a seed.
pub(crate) fn requests(seed: u64, count: usize, sizes: Sizes) -> Vec<Work> {
    let mut numbers = Numbers::new(seed);
    (0..count).map(|number| work(&mut numbers, number, sizes)).collect()
}

fn work(numbers: &mut Numbers, number: usize, sizes: Sizes) -> Work {
    let most = numbers.between(sizes.output.0, sizes.output.1);
    // Short prompts and those around a page are as likely as all others.
    let length = match numbers.between(0, 3) {
        0 => numbers.between(1, 4),
        1 => numbers.between(62, 67),
        _ => numbers.between(1, 300),
    };
    let sampling = sampling(numbers, most, sizes);
    let choices = sampling.n.unwrap_or(1) as usize;
    let request = GenerateRequest {
        request_id: format!("request-{number}"),
        token_ids: prompt(numbers, length.clamp(sizes.prompt.0, sizes.prompt.1)),
        stop: if numbers.one_in(4) { vec!["abc".into(), "ca".into(), "bb".into()] } else { Vec::new() },
        max_tokens: Some(most as u32),
        priority: numbers.between(0, 2) as i32 - 1,
        sampling: Some(sampling),
        ..GenerateRequest::default()
    };
    let leaves_after = numbers.one_in(sizes.leaves_one_in).then(|| numbers.between(0, most * choices / 2));
    Work { request, leaves_after }
}

fn sampling(numbers: &mut Numbers, most: usize, sizes: Sizes) -> SamplingParams {
    let greedy = numbers.one_in(3);
    // Letters that are likely make stop strings and stop tokens occur.
    let likes_letters = numbers.one_in(2);
    let letters = "abc".chars().map(|letter| (byte(letter), 6.0));
    let mut sometimes = |value: f32, one_in: usize| numbers.one_in(one_in).then_some(value);
    let params = SamplingParams {
        temperature: if greedy { Some(0.0) } else { sometimes(0.8, 2) },
        top_p: sometimes(0.9, 3),
        min_p: sometimes(0.02, 4),
        repetition_penalty: sometimes(1.2, 3),
        presence_penalty: sometimes(0.6, 3),
        frequency_penalty: sometimes(-0.3, 4),
        logit_bias: if likes_letters { letters.collect() } else { Default::default() },
        ..SamplingParams::default()
    };
    SamplingParams {
        top_k: numbers.one_in(3).then_some(40),
        seed: Some(numbers.next_u64()),
        n: numbers.one_in(sizes.choices_one_in).then(|| numbers.between(2, 4) as u32),
        min_tokens: if numbers.one_in(3) { numbers.between(0, most) as u32 } else { 0 },
        ignore_eos: numbers.one_in(2),
        stop_token_ids: if numbers.one_in(5) { vec![byte('c'), 300, 301, 302] } else { Vec::new() },
        logprobs: numbers.one_in(3).then(|| numbers.between(0, 5) as u32),
        prompt_logprobs: numbers.one_in(6).then(|| numbers.between(0, 3) as u32),
        ..params
    }
}
