//! One run of a cell: a batch of sessions handed in at once, the engine turned by hand until all have ended, and the times of
//! that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use perigee_backend::Backend;
use perigee_backend::random::mix;
use perigee_engine::request::{EventBatch, Request, RouterId, SessionId, StopRule};
use perigee_engine::{EngineCore, EngineHandle, Turn};
use perigee_sampling::SamplingParams;
use tokio::sync::mpsc::UnboundedReceiver;

use super::shared::{SharedRanks, Touched};
use super::{BesideResult, Cell};
use crate::error::{Result, WorkerError};

const ROUTER: RouterId = RouterId(1);
/// Token ids of prompts, where the vocabulary has as many.
const TOKENS: std::ops::Range<u64> = 100..160_000;

/// Most tokens of a session beside which a prompt is computed.
pub(super) const BESIDE_TOKENS: usize = 1024;
/// Steps before the prompt comes that are not counted, and that are.
const SETTLE: u64 = 8;
const ALONE: u64 = 32;

/// What a run took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// From handing in the batch to the last first token.
    pub(super) ttft: Duration,
    /// From there to the first end.
    window: Duration,
    /// Steps in that time; all sessions decoded in each.
    pub(super) steps: u64,
    /// Experts touched in one of them, over all mixture layers, the mean.
    pub(super) experts: f64,
}

impl Run {
    /// Seconds of a step of the whole batch; without such steps, infinite.
    pub(super) fn tpot(&self) -> f64 {
        if self.steps == 0 { f64::INFINITY } else { self.window.as_secs_f64() / self.steps as f64 }
    }
}

/// An engine that is turned by hand, and the way in and out of it.
pub(super) struct Driver<B: Backend + 'static> {
    core: EngineCore,
    handle: EngineHandle,
    events: UnboundedReceiver<EventBatch>,
    ranks: SharedRanks<B>,
    vocab: usize,
    /// State of the prompts' random source.
    drawn: u64,
    runs: u64,
}

/// Sessions of a run: tokens that each has drawn.
struct Progress {
    tokens: HashMap<SessionId, u64>,
    ended: usize,
}

impl Progress {
    /// Tokens of the session that has drawn fewest.
    fn least(&self) -> u64 {
        self.tokens.values().copied().min().unwrap_or(0)
    }
}

impl<B: Backend + 'static> Driver<B> {
    pub(super) fn new(core: EngineCore, handle: EngineHandle, ranks: SharedRanks<B>, vocab: usize) -> Self {
        let events = handle.attach(ROUTER);
        Self { core, handle, events, ranks, vocab, drawn: 0, runs: 0 }
    }

    /// Runs a batch whose sessions draw `max_tokens` each.
    pub(super) fn cell(&mut self, cell: Cell, max_tokens: usize) -> Result<Run> {
        self.runs += 1;
        let requests: Vec<Request> = (0..cell.batch).map(|index| self.request(cell, index, max_tokens)).collect();
        let mut progress = Progress { tokens: requests.iter().map(|r| (r.sessions[0].clone(), 0)).collect(), ended: 0 };
        let begun = Instant::now();
        for request in requests {
            self.submit(request)?;
        }
        let mut all_draw: Option<(Instant, u64, Touched)> = None;
        let mut run = Run { ttft: Duration::ZERO, window: Duration::ZERO, steps: 0, experts: 0.0 };
        while progress.ended < cell.batch {
            self.turn(&mut progress)?;
            let now = Instant::now();
            let least = progress.least();
            match all_draw {
                None if least > 0 => {
                    run.ttft = now - begun;
                    let touched = self.ranks.touched()?;
                    // Counting is no part of a step.
                    all_draw = Some((Instant::now(), least, touched));
                }
                Some((since, base, before)) if progress.ended > 0 && run.steps == 0 => {
                    run.window = now - since;
                    run.steps = least - base;
                    // A step that was launched behind the last one read is counted on both sides.
                    let touched = self.ranks.touched()?;
                    run.experts = (touched.experts - before.experts) as f64 / (touched.steps - before.steps) as f64;
                }
                _ => {}
            }
        }
        Ok(run)
    }

    /// Lets a cell's sessions decode and computes a prompt beside them.
    pub(super) fn beside(&mut self, cell: Cell, prompt: usize) -> Result<BesideResult> {
        self.runs += 1;
        let requests: Vec<Request> = (0..cell.batch).map(|index| self.request(cell, index, BESIDE_TOKENS)).collect();
        let names = |requests: &[Request]| requests.iter().map(|r| (r.sessions[0].clone(), 0)).collect();
        let mut progress = Progress { tokens: names(&requests), ended: 0 };
        for request in requests {
            self.submit(request)?;
        }
        let first = self.turn_until(&mut progress, |least| least >= SETTLE)?;
        let alone = self.turn_until(&mut progress, |least| least >= SETTLE + ALONE)?;
        let guest = self.request(Cell { batch: 1, context: prompt }, cell.batch, 1);
        self.submit(guest)?;
        let begun = Instant::now();
        let before = progress.least();
        let (mut longest, mut last, mut seen) = (Duration::ZERO, begun, before);
        while progress.ended == 0 {
            self.turn(&mut progress)?;
            if progress.least() > seen {
                let now = Instant::now();
                (longest, last, seen) = (longest.max(now - last), now, progress.least());
            }
        }
        let took = begun.elapsed();
        let tokens = progress.least() - before;
        if tokens == 0 || seen >= BESIDE_TOKENS as u64 {
            return Err(WorkerError::Bench(format!(
                "{tokens} tokens came beside a prompt of {prompt}: it is too short or too long"
            )));
        }
        while progress.ended <= cell.batch {
            self.turn(&mut progress)?;
        }
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(BesideResult {
            prompt,
            alone_ms: milliseconds(alone - first) / ALONE as f64,
            beside_ms: milliseconds(last - begun) / tokens as f64,
            longest_ms: milliseconds(longest),
            prompt_tok_s: prompt as f64 / took.as_secs_f64(),
        })
    }

    fn submit(&self, request: Request) -> Result<()> {
        self.handle.submit(ROUTER, request).map_err(|error| WorkerError::Bench(error.to_string()))
    }

    /// One turn of the engine.
    fn turn(&mut self, progress: &mut Progress) -> Result<()> {
        if self.core.turn() == Turn::Stopped {
            return Err(WorkerError::Bench("the engine stopped in the middle of a cell".into()));
        }
        self.take_events(progress)
    }

    /// Turns until every session has drawn enough; the time then.
    fn turn_until(&mut self, progress: &mut Progress, enough: impl Fn(u64) -> bool) -> Result<Instant> {
        while !enough(progress.least()) {
            self.turn(progress)?;
        }
        Ok(Instant::now())
    }

    fn take_events(&mut self, progress: &mut Progress) -> Result<()> {
        while let Ok(batch) = self.events.try_recv() {
            for event in batch.events {
                if let Some(error) = event.error {
                    return Err(WorkerError::Bench(error));
                }
                if let Some(tokens) = progress.tokens.get_mut(&event.session) {
                    *tokens += u64::from(event.token.is_some());
                }
                progress.ended += usize::from(event.finish.is_some());
            }
        }
        Ok(())
    }

    fn request(&mut self, cell: Cell, index: usize, max_tokens: usize) -> Request {
        let name = format!("bench-{}-{index}", self.runs);
        let (low, high) =
            if TOKENS.end <= self.vocab as u64 { (TOKENS.start, TOKENS.end) } else { (0, self.vocab as u64) };
        let mut draw = || {
            self.drawn += 1;
            (low + mix(self.drawn.wrapping_mul(0x9e37_79b9_7f4a_7c15)) % (high - low)) as u32
        };
        Request {
            grammar: None,
            resumable: false,
            trace: None,
            request_id: name.clone(),
            sessions: vec![SessionId(name)],
            first_choice: 0,
            epoch: 1,
            prompt: std::iter::repeat_with(&mut draw).take(cell.context).collect(),
            delivered: Vec::new(),
            sampling: SamplingParams::greedy(),
            stop: StopRule {
                max_tokens: u32::try_from(max_tokens).unwrap_or(u32::MAX),
                ignore_eos: true,
                ..StopRule::default()
            },
            prompt_logprobs: None,
            priority: 0,
            deadline: None,
            cache_salt: String::new(),
            text: false,
        }
    }
}
