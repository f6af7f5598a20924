//! Room for sessions that come from elsewhere, and for pages of those that went: reservations, adoption, home entries. It
//! preempts nobody and takes no part in planning.

use std::time::Instant;

use super::Scheduler;
use super::moves::Released;
use super::types::{NeverFits, TaskId};
use crate::cache::{CacheError, HomePages, Latents, SlotPair};

/// A session as it arrives: what the handoff said, in slot and pages reserved for it.
#[derive(Debug, Clone)]
pub struct Adopted {
    /// Larger goes first.
    pub priority: i32,
    /// When nobody wants it any more.
    pub deadline: Option<Instant>,
    /// Tokens known.
    pub length: u64,
    /// Most positions that it may ever compute.
    pub most: u64,
    /// Tokens covered by its state and latents.
    pub computed: u64,
    /// Positions from the start whose prompt logits were had.
    pub scored: u64,
    /// Whether prompt logits are still wanted; then nothing was drawn yet.
    pub prompt_logits: bool,
    /// Where its latents are: local pages are reserved ones or those of `home`.
    pub latents: Latents,
    /// Pages that were a home entry of this session here, see [`Scheduler::take_home`].
    pub home: Option<HomePages>,
}

impl Scheduler {
    /// A slot for a session that arrives, two if its steps will be transactions (`shadow`). None: full.
    pub fn reserve(&mut self, _id: TaskId, _shadow: bool) -> Option<SlotPair> {
        None
    }

    /// Pages for a session with a reservation: all or none.
    pub fn reserve_pages(&mut self, _id: TaskId, _count: usize) -> Option<Vec<u32>> {
        None
    }

    /// Gives back what was reserved.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn cancel_reserve(&mut self, _id: TaskId) -> Result<Released, CacheError> {
        Ok(Released::default())
    }

    /// The reserved session is a frozen one from now on; [`Self::thaw`] lets it run. One whose latents are all here gives
    /// its shadow slot back, and pages that it does not name are free.
    ///
    /// # Errors
    /// [`CacheError`] if nothing is reserved, or the session names pages that are not its own; inside, [`NeverFits`] if it
    /// can grow beyond what this replica holds: nothing has changed then.
    pub fn adopt(&mut self, _id: TaskId, _session: Adopted) -> Result<Result<(), NeverFits>, CacheError> {
        Ok(Ok(()))
    }

    /// Takes over references to the pages of a session that went, under a key.
    pub fn keep_home(&mut self, _key: u64, _pages: HomePages) {}

    /// Hands out the references of a home entry.
    pub fn take_home(&mut self, _key: u64) -> Option<HomePages> {
        None
    }

    /// Frees a home entry; returned are the pages that nobody else refers to.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn free_home(&mut self, _key: u64) -> Result<Vec<u32>, CacheError> {
        Ok(Vec::new())
    }
}
