//! One segment on its way to its session's owner, outside the step loop: pages come from the home, are checked, and go to
//! the engine a few at a time. What is fetched, and into which pages, is the engine's decision.

use std::ops::Range;
use std::sync::mpsc;

use perigee_migration::{Geometry, HandoffError, PAGE_POSITIONS, PageSlice};
use tokio::sync::oneshot;

use crate::handle::Command;
use crate::request::SessionId;
use crate::scheduler::TaskId;

/// Why pages were not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Another page is due.
    #[error("latents of layer {layer} at position {first}, expected layer {due_layer} at position {due}")]
    Order {
        /// The layer that came.
        layer: u32,
        /// Its first position.
        first: u64,
        /// The layer that is due.
        due_layer: u32,
        /// The position that is due.
        due: u64,
    },
    /// They are not what the home says that they are.
    #[error("latents of layer {layer} at position {first} changed on the way")]
    Digest {
        /// Index among the MLA layers.
        layer: u32,
        /// First position.
        first: u64,
    },
    /// Their size or place is no page's.
    #[error(transparent)]
    Page(#[from] HandoffError),
    /// The session wants them no more: it ended, moved on, or gave its place up.
    #[error("the session wants its pages no more")]
    Unwanted,
    /// The ranks could not write them, or hold something else than was written.
    #[error("the ranks did not take them: {0}")]
    Ranks(String),
    /// The engine ended.
    #[error("the replica stopped")]
    Stopped,
}

/// A segment to be fetched. Dropped before all of it is there, it is a fetch that failed.
#[derive(Debug)]
pub struct Fetching {
    pub(super) task: TaskId,
    /// Tells this fetch from earlier ones of the session.
    pub(super) number: u64,
    pub(super) session: SessionId,
    pub(super) epoch: u64,
    pub(super) positions: Range<u64>,
    pub(super) geometry: Geometry,
    pub(super) commands: mpsc::Sender<Command>,
    /// Layer and first position that are due next.
    pub(super) due: (u32, u64),
    pub(super) failure: Option<String>,
}

impl Fetching {
    /// The session.
    pub fn session(&self) -> &str {
        &self.session.0
    }

    /// Its epoch here.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Which positions are wanted: whole pages.
    pub fn positions(&self) -> Range<u64> {
        self.positions.clone()
    }

    /// Whether everything is there.
    pub fn is_complete(&self) -> bool {
        self.due.1 >= self.positions.end
    }

    /// Takes whole pages, of each all MLA layers in order. Returns once they are where they belong, so that a home cannot
    /// send faster than the steps here let them in.
    ///
    /// # Errors
    /// Nothing more should be fetched.
    pub async fn push(&mut self, pages: Vec<PageSlice>) -> Result<(), FetchError> {
        let taken = self.take(pages).await;
        if let Err(error) = &taken {
            self.failure = Some(error.to_string());
        }
        taken
    }

    /// Gives up, and says why.
    pub fn fail(mut self, why: String) {
        self.failure = Some(why);
    }

    async fn take(&mut self, pages: Vec<PageSlice>) -> Result<(), FetchError> {
        let mut due = self.due;
        for page in &pages {
            self.check(page, due)?;
            due = if due.0 + 1 < self.geometry.mla_layers { (due.0 + 1, due.1) } else { (0, due.1 + PAGE_POSITIONS) };
        }
        if due.0 != 0 || pages.is_empty() {
            let (due_layer, due) = due;
            return Err(FetchError::Order { layer: 0, first: due + PAGE_POSITIONS, due_layer, due });
        }
        let (task, number) = (self.task, self.number);
        let (reply, answer) = oneshot::channel();
        let command = Command::PagesCame { task, number, pages, reply };
        self.commands.send(command).map_err(|_| FetchError::Stopped)?;
        answer.await.unwrap_or(Err(FetchError::Stopped))?;
        self.due = due;
        Ok(())
    }

    fn check(&self, page: &PageSlice, (due_layer, due): (u32, u64)) -> Result<(), FetchError> {
        let PageSlice { layer, first, .. } = *page;
        if (layer, first) != (due_layer, due) || first >= self.positions.end {
            return Err(FetchError::Order { layer, first, due_layer, due });
        }
        // Made anew from the bytes, which checks their number.
        let found = PageSlice::new(&self.geometry, layer, first, page.bytes.clone())?;
        let is_whole = u64::from(found.positions) == PAGE_POSITIONS;
        if is_whole && found.digest == page.digest { Ok(()) } else { Err(FetchError::Digest { layer, first }) }
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        if self.is_complete() {
            return;
        }
        let why = self.failure.take().unwrap_or_else(|| "the home did not give all of it".into());
        let (task, number) = (self.task, self.number);
        if self.commands.send(Command::FetchFailed { task, number, why }).is_err() {
            tracing::debug!("a fetch outlived its engine");
        }
    }
}
