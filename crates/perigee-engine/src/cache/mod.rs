//! Accounts of what a replica's ranks keep for sessions: latent pages, state slots, and which of them belong to whom.
//! Numbers only: no bytes and no device are touched here, the executor does what the accounts say.

pub mod home_pages;
pub mod latents;
pub mod pages;
pub mod slots;

pub use home_pages::HomePages;
pub use latents::{Home, LatentSegment, Latents};
pub use pages::PagePool;
pub use slots::{SlotPair, SlotPool};

/// An account that does not add up: a defect of the caller, after which the accounts cannot be trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// Something was released that nobody held.
    #[error("{what} {index} was released but is not in use; the caches' accounts are wrong, restart the replica")]
    DoubleRelease {
        /// `latent page` or `state slot`.
        what: &'static str,
        /// Its number.
        index: u32,
    },
    /// Something was shared that nobody holds.
    #[error("{what} {index} was shared but is not in use; the caches' accounts are wrong, restart the replica")]
    NotInUse {
        /// `latent page` or `state slot`.
        what: &'static str,
        /// Its number.
        index: u32,
    },
    /// A number that the pool does not have.
    #[error("{what} {index} does not exist, there are {total}; the caches' accounts are wrong, restart the replica")]
    OutOfRange {
        /// `latent page` or `state slot`.
        what: &'static str,
        /// Its number.
        index: u32,
        /// How many there are.
        total: usize,
    },
    /// Free and used do not sum up, or a holder's list differs from the pool's.
    #[error("the caches' accounts do not add up: {0}; restart the replica")]
    Unbalanced(String),
}
