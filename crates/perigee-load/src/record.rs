//! What one request came to. All times are from the start of the run.

use std::time::Duration;

use crate::target::Failure;

/// Tokens that arrived together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// When.
    pub at: Duration,
    /// How many.
    pub tokens: u32,
}

/// A session that went on at another replica, or there under another epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// When its first token from there came.
    pub at: Duration,
    /// Replica before.
    pub from: String,
    /// Replica after.
    pub to: String,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// With all that was asked for.
    Completed,
    /// By the client, on purpose.
    Cancelled,
    /// Otherwise.
    Failed(Failure),
}

/// What one request came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Its conversation.
    pub conversation: usize,
    /// Its turn there.
    pub turn: usize,
    /// When it should have been sent: what its latencies are counted from. So a client or server that falls behind cannot
    /// hide it by asking later.
    pub intended: Duration,
    /// When it was.
    pub sent: Duration,
    /// Tokens as they came.
    pub pieces: Vec<Piece>,
    /// The end of its stream.
    pub ended: Duration,
    /// How it ended.
    pub ending: Ending,
    /// Prompt tokens by the server's count.
    pub prompt_tokens: u64,
    /// Of these, found in a cache.
    pub cached_tokens: u64,
    /// Generated tokens: the server's count where it gives one.
    pub output_tokens: u64,
    /// Its moves.
    pub moves: Vec<Move>,
}

impl Outcome {
    /// Time to the first token.
    pub fn ttft(&self) -> Option<Duration> {
        self.pieces.first().map(|first| first.at.saturating_sub(self.intended))
    }

    /// Time a token after the first; none with fewer than two, or where all came together.
    pub fn tpot(&self) -> Option<Duration> {
        let [first, .., last] = self.pieces.as_slice() else { return None };
        let more = u32::try_from(self.output_tokens.saturating_sub(1)).ok().filter(|more| *more > 0)?;
        Some(last.at.saturating_sub(first.at) / more)
    }

    /// Time to the end.
    pub fn e2e(&self) -> Duration {
        self.ended.saturating_sub(self.intended)
    }

    /// Times between pieces.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.pieces.windows(2).map(|pair| pair[1].at.saturating_sub(pair[0].at))
    }
}
