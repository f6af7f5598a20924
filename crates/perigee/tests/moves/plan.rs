//! Random schedules from a seed: what a client asks for, and after which of its tokens the session moves where. Schedules
//! come in groups over one prompt, and those of a group in pairs over one request, so that their undisturbed runs are
//! computed once.

use perigee_proto::v1::{GenerateRequest, MigrateMode, SamplingParams};
use perigee_testkit::Numbers;

/// Tokenizers of random models give bytes the lowest ids that are not special (0, 1 and 2).
const FIRST_BYTE: u32 = 3;
/// Most moves of one session.
pub(crate) const MOST_MOVES: usize = 5;

/// A session of a request and where it goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Move {
    /// Which choice.
    pub(crate) choice: u32,
    /// After that many of its tokens; none as soon as the session is known, which is before its first token.
    pub(crate) after: Option<usize>,
    /// How many replicas further than the one that it is on.
    pub(crate) further: usize,
    /// What goes along.
    pub(crate) mode: MigrateMode,
}

/// A request and its moves.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    pub(crate) request: GenerateRequest,
    pub(crate) moves: Vec<Move>,
}

/// Schedules over one prompt.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) seed: u64,
    pub(crate) schedules: Vec<Schedule>,
}

/// How large a group is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Prompt lengths, log-uniform.
    pub(crate) prompt: (usize, usize),
    /// Tokens of a choice.
    pub(crate) output: (usize, usize),
    pub(crate) schedules: usize,
    /// Token ids of the model.
    pub(crate) vocab: usize,
    /// Number of replicas.
    pub(crate) replicas: usize,
}

/// Random token ids, without special ones.
pub(crate) fn prompt(numbers: &mut Numbers, vocab: usize, length: usize) -> Vec<u32> {
    (0..length).map(|_| numbers.between(FIRST_BYTE as usize, vocab - 1) as u32).collect()
}

/// The group of a seed.
pub(crate) fn group(seed: u64, sizes: Sizes) -> Group {
    let mut numbers = Numbers::new(seed);
    let length = log_uniform(&mut numbers, sizes.prompt);
    let prompt = prompt(&mut numbers, sizes.vocab, length);
    let mut schedules: Vec<Schedule> = Vec::new();
    for number in 0..sizes.schedules {
        let request = match schedules.last() {
            Some(before) if number % 2 == 1 => before.request.clone(),
            _ => request(&mut numbers, prompt.clone(), sizes),
        };
        let request = GenerateRequest { request_id: format!("move-{seed}-{number}"), ..request };
        let mut moves = moves(&mut numbers, &request, sizes.replicas);
        if number == 0 {
            // Every group has one that moves before its first token.
            moves[0].after = None;
        }
        schedules.push(Schedule { request, moves });
    }
    Group { seed, schedules }
}

/// A group over one prompt whose requests have so many choices each, every one of which moves by itself.
pub(crate) fn group_of_choices(seed: u64, choices: &[u32], sizes: Sizes) -> Group {
    let mut group = group(seed, Sizes { schedules: choices.len(), ..sizes });
    let mut numbers = Numbers::new(!seed);
    for (schedule, &count) in group.schedules.iter_mut().zip(choices) {
        let asked = GenerateRequest { sampling: None, ..schedule.request.clone() };
        schedule.moves.clear();
        for choice in 0..count {
            let planned = moves(&mut numbers, &asked, sizes.replicas);
            schedule.moves.extend(planned.into_iter().map(|planned| Move { choice, ..planned }));
        }
        schedule.moves.sort_by_key(|planned| planned.after);
        if let Some(sampling) = &mut schedule.request.sampling {
            sampling.n = Some(count);
        }
    }
    group
}

fn log_uniform(numbers: &mut Numbers, (low, high): (usize, usize)) -> usize {
    let share = numbers.between(0, 1 << 20) as f64 / f64::from(1 << 20);
    let (low_log, high_log) = ((low as f64).ln(), (high as f64).ln());
    ((low_log + share * (high_log - low_log)).exp().round() as usize).clamp(low, high)
}

fn request(numbers: &mut Numbers, token_ids: Vec<u32>, sizes: Sizes) -> GenerateRequest {
    let most = numbers.between(sizes.output.0, sizes.output.1);
    GenerateRequest {
        sampling: Some(sampling(numbers, most, token_ids.len())),
        stop: if numbers.one_in(3) { vec!["abca".into(), "cab".into(), "bbb".into()] } else { Vec::new() },
        token_ids,
        max_tokens: Some(most as u32),
        ..GenerateRequest::default()
    }
}

fn sampling(numbers: &mut Numbers, most: usize, prompt: usize) -> SamplingParams {
    let greedy = numbers.one_in(3);
    // Letters that are likely make stop strings occur; not so likely that every run is short.
    let letters = if numbers.one_in(3) { vec![("a", 3.0), ("b", 3.0), ("c", 3.0)] } else { Vec::new() };
    let letters = letters.into_iter().map(|(letter, bias)| (u32::from(letter.as_bytes()[0]) + FIRST_BYTE, bias));
    let mut sometimes = |value: f32, one_in: usize| numbers.one_in(one_in).then_some(value);
    let params = SamplingParams {
        temperature: if greedy { Some(0.0) } else { sometimes(0.8, 2) },
        top_p: sometimes(0.9, 3),
        min_p: sometimes(0.02, 4),
        repetition_penalty: sometimes(1.2, 3),
        presence_penalty: sometimes(0.6, 3),
        frequency_penalty: sometimes(-0.3, 4),
        logit_bias: letters.collect(),
        ..SamplingParams::default()
    };
    SamplingParams {
        top_k: numbers.one_in(3).then_some(40),
        seed: Some(numbers.next_u64()),
        n: numbers.one_in(4).then(|| numbers.between(2, 3) as u32),
        min_tokens: numbers.between(most / 2, most) as u32,
        ignore_eos: numbers.one_in(2),
        logprobs: numbers.one_in(3).then(|| numbers.between(0, 4) as u32),
        prompt_logprobs: (prompt < 1000 && numbers.one_in(8)).then(|| numbers.between(0, 2) as u32),
        ..params
    }
}

fn moves(numbers: &mut Numbers, request: &GenerateRequest, replicas: usize) -> Vec<Move> {
    let choices = request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1) as usize;
    let most = request.max_tokens.unwrap_or(1) as usize;
    let count = numbers.between(1, MOST_MOVES);
    let mut moves: Vec<Move> = Vec::new();
    for _ in 0..count {
        moves.push(Move {
            choice: numbers.between(0, choices - 1) as u32,
            // The end of a session overtakes a move that begins too late to be done before it.
            after: Some(numbers.between(1, most * 3 / 4)),
            further: numbers.between(1, replicas - 1),
            mode: numbers.pick(&[MigrateMode::Split, MigrateMode::Split, MigrateMode::Whole]),
        });
    }
    if numbers.one_in(3) {
        moves[0].after = None;
    }
    moves.sort_by_key(|planned| planned.after);
    moves
}
