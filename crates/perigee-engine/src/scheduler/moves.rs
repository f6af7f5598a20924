//! Sessions that stand still because they leave: freezing, splitting off a shared prefill, giving up. It moves nothing
//! itself and knows no epochs: what it hands out, the engine exports.

use super::Scheduler;
use super::types::TaskId;
use crate::cache::{CacheError, HomePages, Latents};

/// Copies to run at once, so that a session which shared a prefill stands alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FreezeCopies {
    /// Slot copies (from, to).
    pub slots: Vec<(u32, u32)>,
    /// Page copies (from, to).
    pub pages: Vec<(u32, u32)>,
    /// The session that goes on with the prefill, where the frozen one shared it: both have the prompt's log-probabilities
    /// that were had so far.
    pub shared_with: Option<TaskId>,
    /// Whether that one only now takes over the prefill, which the frozen session led before.
    pub is_heir: bool,
}

/// Why a session cannot be frozen now. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FreezeRefused {
    /// It is not here.
    #[error("the session is not here")]
    NotHere,
    /// It shares a prefill and there is no page for its own copy of the last one; later there may be.
    #[error("there is no free page for the session's own copy of its last page")]
    NoPage,
}

/// Where a session's state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateAt {
    /// In a state slot.
    Slot(u32),
    /// In host memory, with its local pages, under this key.
    Parked(u64),
    /// Nowhere: nothing is computed yet.
    Empty,
}

/// A session that stands still.
#[derive(Debug, Clone, Copy)]
pub struct FrozenView<'a> {
    /// Where its state is.
    pub state: StateAt,
    /// Tokens covered by state and latents.
    pub computed: u64,
    /// Tokens known.
    pub length: u64,
    /// Positions from the start whose prompt logits were had.
    pub scored: u64,
    /// Where its latents are. While it is parked the pages have no numbers, only a count.
    pub latents: &'a Latents,
    /// Whether prompt logits are still wanted.
    pub prompt_logits: bool,
}

/// What a session or a reservation held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Released {
    /// Slots that are free now.
    pub slots: Vec<u32>,
    /// Pages that are free now: nobody else refers to them.
    pub pages: Vec<u32>,
    /// Pages that were to be kept; their references are the caller's, to be handed to [`Scheduler::keep_home`].
    pub home: HomePages,
    /// Its copy in host memory, to be dropped.
    pub parked: Option<u64>,
}

impl Scheduler {
    /// The session stands still from now on: it keeps what it holds and gets no row until [`Self::thaw`]. One that shares a
    /// prefill leaves it first with a copy of its own.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken; inside, [`FreezeRefused`].
    pub fn freeze(&mut self, _id: TaskId) -> Result<Result<FreezeCopies, FreezeRefused>, CacheError> {
        Ok(Err(FreezeRefused::NotHere))
    }

    /// A frozen session goes on.
    pub fn thaw(&mut self, _id: TaskId) {}

    /// A frozen session, if it is one.
    pub fn frozen(&self, _id: TaskId) -> Option<FrozenView<'_>> {
        None
    }

    /// Ends a frozen session: all that it held is free, except, with `keep`, its full local pages. None if it is not
    /// frozen here.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn release(&mut self, _id: TaskId, _keep: bool) -> Result<Option<Released>, CacheError> {
        Ok(None)
    }

    /// The session keeps everything, in whatever place it is, and gets no row until [`Self::unhold`]. One that has not forked
    /// yet holds back those that it shares a prefill with.
    pub fn hold(&mut self, _id: TaskId) {}

    /// Ends [`Self::hold`].
    pub fn unhold(&mut self, _id: TaskId) {}
}
