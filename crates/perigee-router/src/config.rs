//! What a router is told at its start: limits on everything that a client controls, and the times after which it gives
//! up waiting. Listeners, the registry and the tokenizer are parameters of `serve`, not settings.

use std::time::Duration;

use perigee_text::stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS};

use crate::balance::Balance;

/// Limits on requests and connections. A request beyond one is INVALID_ARGUMENT or RESOURCE_EXHAUSTED, never an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Largest request message, in bytes.
    pub message_bytes: usize,
    /// Longest text to encode, in bytes.
    pub text_bytes: usize,
    /// Most choices of a request.
    pub choices: u32,
    /// Most prompts of one HTTP call; each is a request.
    pub prompts: usize,
    /// Most alternatives that logprobs and prompt_logprobs may ask for.
    pub logprobs: u32,
    /// Most log-probabilities of prompt tokens in all choices of a request: a message must hold those of one choice.
    pub prompt_logprobs: u64,
    /// Most stop strings.
    pub stop_strings: usize,
    /// Longest stop string, in bytes.
    pub stop_bytes: usize,
    /// Most stop token ids.
    pub stop_token_ids: usize,
    /// Most entries of logit_bias.
    pub logit_bias: usize,
    /// Longest cache salt, in bytes.
    pub cache_salt_bytes: usize,
    /// Most requests at once on this router.
    pub requests: usize,
    /// Most bytes of tokens that wait for a slow reader of one stream; its request is aborted beyond that.
    pub buffered_bytes: usize,
    /// Most calls at once on one connection.
    pub streams_per_connection: u32,
    /// Largest header list, in bytes.
    pub header_bytes: u32,
    /// Most streams that a client may have opened and reset before they were accepted; its connection ends beyond that.
    pub pending_resets: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 16 << 20,
            text_bytes: 8 << 20,
            choices: 16,
            prompts: 128,
            logprobs: 20,
            prompt_logprobs: 200_000,
            stop_strings: MAX_STOP_STRINGS,
            stop_bytes: MAX_STOP_BYTES,
            stop_token_ids: 64,
            logit_bias: 1024,
            cache_salt_bytes: 128,
            requests: 4096,
            buffered_bytes: 2 << 20,
            streams_per_connection: 1024,
            header_bytes: 16 << 10,
            pending_resets: 20,
        }
    }
}

/// How long a router waits in moves and replays of sessions. Whoever is lost is noticed by its lease, sooner than by these:
/// they are for messages that got lost, and for work that does not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveTimes {
    /// For a source to have handed a session over; then the move is taken back. The session stands still for a part of it.
    pub prepare: Duration,
    /// For the answer to start, release or the end of a move; then it is said again, and after three times given up. Longer
    /// than a step of a replica takes.
    pub answer: Duration,
    /// For a replica to take over a session whose owner was lost; then its request ends with UNAVAILABLE. A request with a
    /// deadline waits until that.
    pub replay: Duration,
}

impl Default for MoveTimes {
    fn default() -> Self {
        Self { prepare: Duration::from_secs(10), answer: Duration::from_secs(2), replay: Duration::from_secs(30) }
    }
}

/// What a router is told at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterConfig {
    /// Limits on requests and connections.
    pub limits: Limits,
    /// How long a replica may be silent before its sessions count as lost, and how long it may go on with them after
    /// this router's last word.
    pub lease: Duration,
    /// How long running requests may go on after the order to shut down.
    pub grace: Duration,
    /// Patience in moves and replays of sessions.
    pub moves: MoveTimes,
    /// Whether sessions move by themselves to even out loads.
    pub balance: Balance,
    /// Digest of the only model to route to. Without one it is that of the first replica attached.
    pub model_digest: Option<String>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            lease: Duration::from_secs(2),
            grace: Duration::from_secs(30),
            moves: MoveTimes::default(),
            balance: Balance::default(),
            model_digest: None,
        }
    }
}

impl RouterConfig {
    /// Everything that is wrong with it, before a port opens.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.lease < Duration::from_millis(100) || self.lease > Duration::from_secs(3600) {
            faults.push(format!("lease: expected 0.1 to 3600 seconds, found {:?}", self.lease));
        }
        for (name, time) in [("prepare", self.moves.prepare), ("answer", self.moves.answer)] {
            if time < Duration::from_millis(10) || time > Duration::from_secs(3600) {
                faults.push(format!("moves: {name}: expected 0.01 to 3600 seconds, found {time:?}"));
            }
        }
        if self.moves.replay > Duration::from_secs(24 * 3600) {
            faults.push(format!("moves: replay: expected at most a day, found {:?}", self.moves.replay));
        }
        if self.limits.text_bytes > self.limits.message_bytes {
            faults.push("limits: text_bytes must not exceed message_bytes".to_owned());
        }
        if self.limits.requests == 0 || self.limits.choices == 0 || self.limits.streams_per_connection == 0 {
            faults.push("limits: requests, choices and streams_per_connection must be at least 1".to_owned());
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_faults_and_each_fault_is_told() {
        assert_eq!(RouterConfig::default().faults(), Vec::<String>::new());
        let bad = RouterConfig {
            lease: Duration::ZERO,
            limits: Limits { requests: 0, text_bytes: usize::MAX, ..Limits::default() },
            moves: MoveTimes { prepare: Duration::ZERO, answer: Duration::MAX, replay: Duration::MAX },
            ..RouterConfig::default()
        };
        assert_eq!(bad.faults().len(), 6);
    }
}
