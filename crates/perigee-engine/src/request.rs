//! Plain types at the engine's door: what a request asks for and what comes back. The worker's service turns the wire
//! into these and back; nothing here serialises to a client. What a session keeps serialises, because it moves with it.

use std::sync::Arc;

use perigee_sampling::SamplingParams;
use perigee_text::grammar::{Grammar, GrammarSource};
use perigee_trace::TraceContext;
use serde::{Deserialize, Serialize};

use crate::moves::Reported;

/// A session's name, unique in the cluster; the router makes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub String);

/// The stream that a session's events leave by: one per attached router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouterId(pub u64);

/// A validated request. With n > 1 it has n sessions, which share one prefill and then fork.
#[derive(Debug, Clone)]
pub struct Request {
    /// Request id, from client to rank in every log line.
    pub request_id: String,
    /// One session for every choice, in order.
    pub sessions: Vec<SessionId>,
    /// Choice of the first session: 0, except where one choice of several is replayed. Noise depends on it.
    pub first_choice: u32,
    /// The epoch that the router gave the sessions.
    pub epoch: u64,
    /// Prompt tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens already delivered of the only choice, when a session is replayed; events go on after them.
    pub delivered: Vec<u32>,
    /// Sampling parameters; the seed is set.
    pub sampling: SamplingParams,
    /// When to stop.
    pub stop: StopRule,
    /// Log-probabilities of prompt tokens with the top n alternatives, if asked for.
    pub prompt_logprobs: Option<u32>,
    /// Larger goes first; 0 is the default.
    pub priority: i32,
    /// When the client stops waiting.
    pub deadline: Option<std::time::Instant>,
    /// Separates prefix caches of tenants.
    pub cache_salt: String,
    /// Whether text is wanted (there is a tokenizer) or ids only.
    pub text: bool,
    /// What the text must be.
    pub grammar: Option<StartGrammar>,
    /// Where it is in its trace, if it has one.
    pub trace: Option<TraceContext>,
}

/// A grammar that was compiled before its request came to the engine, since that may take a while.
#[derive(Debug, Clone)]
pub struct StartGrammar {
    /// What it was made of, which moves with sessions.
    pub source: GrammarSource,
    /// It, after the tokens that were delivered before. Every session follows a copy.
    pub start: Arc<Grammar>,
}

/// When generation ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopRule {
    /// Most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// No end-of-sequence or stop token before that many tokens.
    pub min_tokens: u32,
    /// Do not stop at the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Further tokens that end generation.
    pub stop_token_ids: Vec<u32>,
    /// Strings that end generation; they are not part of the text.
    pub stop: Vec<String>,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, stop token or stop string.
    Stop,
    /// `max_tokens` or the model's length limit.
    Length,
    /// The client or the router aborted it.
    Aborted,
    /// Its deadline passed.
    DeadlineExceeded,
    /// The engine failed.
    Error,
}

/// A token with its log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural log of its probability under the raw logits.
    pub logprob: f32,
}

/// Log-probabilities at one position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionLogprobs {
    /// The token at that position.
    pub chosen: TokenLogprob,
    /// The n most likely tokens, most likely first.
    pub top: Vec<TokenLogprob>,
}

/// Token counts of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt: u64,
    /// Generated tokens.
    pub completion: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached: u64,
}

/// One thing that happened to a session. Token indices of a session are 0, 1, 2, ... and it ends at most once.
#[derive(Debug, Clone, PartialEq)]
pub struct SessionEvent {
    /// The session.
    pub session: SessionId,
    /// Its epoch on this replica; a router accepts only the current one.
    pub epoch: u64,
    /// Choice of its request.
    pub choice: u32,
    /// Index of `token`, or of the next token where there is none.
    pub index: u64,
    /// The token, none where only text or the end is reported.
    pub token: Option<u32>,
    /// Text that became final with this event; may be empty while a character or a stop string is undecided.
    pub text: String,
    /// Log-probabilities of the token, where asked for.
    pub logprobs: Option<PositionLogprobs>,
    /// Log-probabilities of the prompt (none for its first token), on the first event of choice 0 .. n - 1 where asked.
    pub prompt_logprobs: Option<Vec<Option<PositionLogprobs>>>,
    /// The end, and why.
    pub finish: Option<FinishReason>,
    /// What went wrong where `finish` is `Error`, and what to do.
    pub error: Option<String>,
    /// Counts, on the last event.
    pub usage: Option<Usage>,
}

/// Everything that one step did for one router's sessions, and the load after it.
#[derive(Debug, Clone, PartialEq)]
pub struct EventBatch {
    /// Events, in order.
    pub events: Vec<SessionEvent>,
    /// What was said of moves, in order; each names its place among the events.
    pub reports: Vec<Reported>,
    /// Load after the step.
    pub load: Load,
}

/// How busy a replica is; sent with every batch of events and at least twice a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Sessions in the running batch.
    pub running: u32,
    /// Sessions that wait for a slot, pages or budget.
    pub waiting: u32,
    /// Prompt tokens not yet prefilled, of running and waiting sessions.
    pub queued_tokens: u64,
    /// Free state slots.
    pub slots_free: u32,
    /// All state slots.
    pub slots_total: u32,
    /// Free latent pages.
    pub pages_free: u32,
    /// All latent pages.
    pub pages_total: u32,
    /// Sessions parked in host memory.
    pub parked: u32,
    /// Smoothed time of a step, in milliseconds.
    pub step_ms: f32,
    /// Steps done since the start.
    pub steps: u64,
    /// Sessions that run elsewhere and have latents here.
    pub homes: u32,
    /// Tokens in the contexts of running sessions.
    pub context_tokens: u64,
}

/// A session as operators see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// The session.
    pub session: SessionId,
    /// Its request.
    pub request_id: String,
    /// Its epoch.
    pub epoch: u64,
    /// `waiting`, `prefill`, `decode` or `parked`.
    pub status: &'static str,
    /// Tokens in its context.
    pub context: u64,
    /// Where its latents are, in order of position.
    pub segments: Vec<SegmentInfo>,
}

/// A run of positions whose latents one replica holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentInfo {
    /// The replica; empty for the one that answers.
    pub home: String,
    /// Which run of it.
    pub incarnation: String,
    /// First position.
    pub first: u64,
    /// Number of positions.
    pub tokens: u64,
}

/// A request that was refused at the door.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefusedRequest {
    /// A field has a value that this replica cannot serve.
    #[error("{field}: {message}")]
    Invalid {
        /// Field name as in the public API.
        field: &'static str,
        /// What is wrong and what would do.
        message: String,
    },
    /// The queue is full; try again after a while or elsewhere.
    #[error("replica is full: {waiting} requests wait (limit {limit})")]
    Full {
        /// Requests waiting.
        waiting: usize,
        /// The limit.
        limit: usize,
    },
    /// The engine stopped or is draining.
    #[error("replica does not take requests: {0}")]
    Unavailable(String),
}
