//! What an engine is started with, and how it becomes the scheduler's limits. Reading it from files or flags is the
//! worker's affair.

use std::sync::Arc;
use std::time::Instant;

use perigee_text::Tokenizer;
use perigee_text::grammar::GrammarCompiler;

use crate::executor::{CacheBytes, ExecutorLimits};
use crate::moves::MoveConfig;
use crate::observer::{EngineObserver, Silent};
use crate::scheduler::Limits;

/// Tells the time; a simulation puts its own in place.
pub trait Clock: Send + Sync {
    /// The time now; never goes back.
    fn now(&self) -> Instant;
}

/// The machine's monotonic clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// Settings of an engine.
#[derive(Clone)]
pub struct EngineConfig {
    /// Most requests that wait for their first slot; more are refused.
    pub queue_limit: usize,
    /// Most tokens in a step; the executor's own limit holds as well.
    pub token_budget: usize,
    /// Most prompt tokens in a step in which sessions decode too.
    pub beside_tokens: usize,
    /// How many times the time of a step of decode rows alone a token takes at most, on average, while prompts are computed: after a
    /// step with prompt tokens come as many without as that needs. Without it, prompts are in every step that has room for them.
    pub prompt_slowdown: Option<f64>,
    /// Most rows in a step; the executor's own limit holds as well.
    pub max_batch: usize,
    /// Host memory for parked sessions over all ranks, in bytes; 0 recomputes instead.
    pub park_bytes: u64,
    /// How many later requests may be admitted before one that does not fit yet.
    pub bypass_limit: u32,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: Vec<u32>,
    /// Makes text of tokens; without one, requests for text or with stop strings are refused.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Makes grammars of sessions that come from other replicas; without one, those with a grammar are refused.
    pub grammars: Option<Arc<GrammarCompiler>>,
    /// Takes measurements.
    pub observer: Arc<dyn EngineObserver>,
    /// Tells the time.
    pub clock: Arc<dyn Clock>,
    /// How sessions move to and from here; without it none does.
    pub moves: Option<MoveConfig>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            queue_limit: 1024,
            token_budget: usize::MAX,
            beside_tokens: usize::MAX,
            prompt_slowdown: None,
            max_batch: usize::MAX,
            park_bytes: 4 << 30,
            bypass_limit: 8,
            eos_token_ids: Vec::new(),
            tokenizer: None,
            grammars: None,
            observer: Arc::new(Silent),
            clock: Arc::new(SystemClock),
            moves: None,
        }
    }
}

impl EngineConfig {
    /// The scheduler's limits over an executor's.
    ///
    /// # Errors
    /// [`StartError::Limit`] names what is zero or does not fit, where nothing could ever run.
    pub(crate) fn limits(&self, executor: &ExecutorLimits, bytes: CacheBytes) -> Result<Limits, StartError> {
        let limits = Limits {
            slots: count("state slots", executor.slots)?,
            pages: count("latent pages", executor.pages)?,
            step_tokens: count("token budget", executor.step_tokens.min(self.token_budget))?.into(),
            beside_tokens: self.beside_tokens.max(1) as u64,
            step_rows: count("batch size", executor.step_rows.min(self.max_batch))?.into(),
            max_length: count("model length", executor.max_model_len)?.into(),
            park_bytes: self.park_bytes,
            slot_bytes: bytes.slot,
            page_bytes: bytes.page,
            bypass_limit: self.bypass_limit,
        };
        let (idle, sessions) = (limits.idle_slots(), limits.max_running());
        if idle > 0 {
            let slots = limits.slots;
            tracing::warn!(
                slots,
                idle,
                sessions,
                "more state slots than the batch size and the token budget let sessions run"
            );
        }
        Ok(limits)
    }
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A size with which nothing could run.
    #[error("{what} must be between 1 and {}, but is {found}", u32::MAX)]
    Limit {
        /// Which size.
        what: &'static str,
        /// What it is.
        found: usize,
    },
    /// The operating system gave no thread.
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

fn count(what: &'static str, found: usize) -> Result<u32, StartError> {
    u32::try_from(found).ok().filter(|count| *count > 0).ok_or(StartError::Limit { what, found })
}
