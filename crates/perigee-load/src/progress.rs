//! How far a run is, for whoever watches it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters that a run keeps while it goes on.
#[derive(Debug, Default)]
pub struct Progress {
    sent: AtomicU64,
    completed: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    tokens: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Requests sent.
    pub sent: u64,
    /// Of these, completed.
    pub completed: u64,
    /// Given up on purpose.
    pub cancelled: u64,
    /// Failed.
    pub failed: u64,
    /// Tokens received.
    pub tokens: u64,
}

impl Progress {
    /// Reads the counters.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            sent: self.sent.load(Relaxed),
            completed: self.completed.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            failed: self.failed.load(Relaxed),
            tokens: self.tokens.load(Relaxed),
        }
    }

    pub(crate) fn send(&self) {
        self.sent.fetch_add(1, Relaxed);
    }

    pub(crate) fn hear(&self, tokens: u32) {
        self.tokens.fetch_add(u64::from(tokens), Relaxed);
    }

    pub(crate) fn end(&self, ending: &crate::Ending) {
        let counter = match ending {
            crate::Ending::Completed => &self.completed,
            crate::Ending::Cancelled => &self.cancelled,
            crate::Ending::Failed(_) => &self.failed,
        };
        counter.fetch_add(1, Relaxed);
    }
}

impl Snapshot {
    /// Requests that are neither completed nor given up nor failed.
    pub fn in_flight(&self) -> u64 {
        self.sent.saturating_sub(self.completed + self.cancelled + self.failed)
    }
}
