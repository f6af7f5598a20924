//! Stand-ins for tests and simulations, here and in other crates: a modelled executor, a clock that is set by hand, and
//! plain requests. Nothing that serves uses them.

mod model_ahead;
mod model_cache;
mod model_executor;
mod model_sizes;
#[cfg(test)]
mod model_tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use perigee_sampling::SamplingParams;

pub use self::model_cache::ModelPages;
pub use self::model_executor::ModelExecutor;
pub use self::model_sizes::{Faults, ModelCounters, ModelSizes, RemoteAnswer};
use crate::config::Clock;
use crate::request::{Request, SessionId, StopRule};

/// A clock that stands still until it is told to go on.
#[derive(Debug)]
pub struct ManualClock {
    start: Instant,
    nanoseconds: AtomicU64,
}

impl Default for ManualClock {
    fn default() -> Self {
        Self { start: Instant::now(), nanoseconds: AtomicU64::new(0) }
    }
}

impl ManualClock {
    /// Moves the time on.
    pub fn advance(&self, by: Duration) {
        let nanoseconds = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        self.start + Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed))
    }
}

/// A greedy request of one session, for exactly `max_tokens` token ids; its request id is the session's name.
pub fn greedy_request(session: &str, prompt: Vec<u32>, max_tokens: u32) -> Request {
    Request {
        request_id: session.to_owned(),
        sessions: vec![SessionId(session.to_owned())],
        first_choice: 0,
        epoch: 1,
        prompt,
        delivered: Vec::new(),
        sampling: SamplingParams::greedy(),
        stop: StopRule { max_tokens, ignore_eos: true, ..StopRule::default() },
        prompt_logprobs: None,
        priority: 0,
        deadline: None,
        cache_salt: String::new(),
        grammar: None,
        resumable: false,
        trace: None,
        text: false,
    }
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014) over a running hash and a value.
fn mix(hash: u64, value: u64) -> u64 {
    let mut mixed =
        hash.rotate_left(23) ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
