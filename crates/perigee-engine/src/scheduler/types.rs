//! The words of the scheduler: limits, tasks as they arrive, and the plan that comes out. Plain data without behaviour
//! beyond construction and checks.

use std::cmp::Reverse;
use std::time::Instant;

use perigee_backend::Segment;

use crate::cache::Latents;

/// A session's number in the scheduler and the engine; unique for the life of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub u64);

/// What there is to share, fixed for the life of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// State slots, at least 1.
    pub slots: u32,
    /// Latent pages, at least 1.
    pub pages: u32,
    /// Most tokens in a step, at least 1.
    pub step_tokens: u64,
    /// Most tokens of prefills in a step in which at least as many sessions decode, at least 1.
    pub beside_tokens: u64,
    /// Most rows in a step, and most positions with logits, at least 1.
    pub step_rows: u64,
    /// Most positions of a session.
    pub max_length: u64,
    /// Host memory for parked sessions, in bytes.
    pub park_bytes: u64,
    /// Bytes of a slot over all ranks.
    pub slot_bytes: u64,
    /// Bytes of a page over all ranks and layers.
    pub page_bytes: u64,
    /// How many later tasks may be admitted before one that does not fit yet.
    pub bypass_limit: u32,
}

impl Limits {
    /// Most sessions that hold slots at once: each can decode in every step, and a quarter of the tokens stays for
    /// prefill.
    pub fn max_running(&self) -> u64 {
        let for_decodes = (self.step_tokens - self.step_tokens / 4).max(1);
        for_decodes.min(self.step_rows).min(u64::from(self.slots))
    }

    /// State slots that nothing can ever need: a session that runs has two at most.
    pub fn idle_slots(&self) -> u64 {
        u64::from(self.slots).saturating_sub(2 * self.max_running())
    }
}

/// A task as it arrives.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// The session.
    pub id: TaskId,
    /// Further sessions of the same prompt, which fork from this one.
    pub followers: Vec<TaskId>,
    /// Larger goes first.
    pub priority: i32,
    /// When nobody wants it any more.
    pub deadline: Option<Instant>,
    /// Tokens known: the prompt, and output that was made elsewhere. At least 1.
    pub length: u64,
    /// Most positions that it may ever compute.
    pub most: u64,
    /// Whether logits of every prompt position but the last are wanted.
    pub prompt_logits: bool,
}

/// Why a task can never run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeverFits {
    /// It has more sessions than can run at once.
    Sessions {
        /// Sessions asked for.
        wanted: u64,
        /// Most at once.
        limit: u64,
    },
    /// It may become longer than a session can be.
    Length {
        /// Positions asked for.
        wanted: u64,
        /// Most positions of a session.
        limit: u64,
    },
    /// Its latents may need more pages than there are.
    Pages {
        /// Positions asked for.
        wanted: u64,
        /// Most positions that all pages hold.
        limit: u64,
    },
}

/// Order of tasks: smaller is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: Reverse<i32>,
    pub(crate) arrival: u64,
    pub(crate) id: TaskId,
}

/// What to do in one step. Order: parks, unparks, cleared slots, slot copies, page copies, rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Sessions to copy to host memory; their slots and pages are given away in this very plan.
    pub parks: Vec<Parking>,
    /// Sessions to bring back from host memory, whose copies are dropped then.
    pub unparks: Vec<Parking>,
    /// Sessions that lost slot and pages and will be computed again.
    pub restarts: Vec<TaskId>,
    /// Sessions that lost slot and pages and can never be computed again here, because they came from elsewhere and are too
    /// long for this replica alone: to be ended with an error, and removed.
    pub evicted: Vec<(TaskId, NeverFits)>,
    /// Tasks that got slots.
    pub admitted: Vec<TaskId>,
    /// Sessions that became tasks of their own.
    pub forks: Vec<Fork>,
    /// Slots to zero.
    pub clear_slots: Vec<u32>,
    /// Slot copies (from, to).
    pub copy_slots: Vec<(u32, u32)>,
    /// Page copies (from, to).
    pub copy_pages: Vec<(u32, u32)>,
    /// Rows: those that draw first, then the others, each by rank.
    pub rows: Vec<PlannedRow>,
}

impl Plan {
    /// Whether there is nothing to run on the device.
    pub fn is_empty(&self) -> bool {
        self.parks.is_empty() && self.unparks.is_empty() && self.evicted.is_empty() && self.rows.is_empty()
    }
}

/// A session on its way to or from host memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parking {
    /// The session.
    pub task: TaskId,
    /// Name of the copy in host memory.
    pub key: u64,
    /// Its slot.
    pub slot: u32,
    /// Its local pages in order of position.
    pub pages: Vec<u32>,
}

/// A session that left the task which prefilled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// The session that was prefilled.
    pub parent: TaskId,
    /// The one that forked.
    pub child: TaskId,
}

/// A session's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedRow {
    /// The session.
    pub task: TaskId,
    /// Position of the first token fed.
    pub position: u64,
    /// Tokens fed, at least 1.
    pub tokens: u64,
    /// State slot read.
    pub read_slot: u32,
    /// State slot written.
    pub write_slot: u32,
    /// Local latents up to the row's end.
    pub segments: Vec<Segment>,
    /// Whether latents before them are elsewhere. Then the two slots differ, and the row counts only if it is advanced.
    pub remote: bool,
    /// Whether the next token is drawn from the last position's logits.
    pub draws: bool,
    /// First position whose logits are wanted as prompt logits, if any; they go up to the row's end.
    pub prompt_logits_from: Option<u64>,
}

impl PlannedRow {
    /// One past the last position fed.
    pub fn end(&self) -> u64 {
        self.position + self.tokens
    }
}

/// What became of a removed task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Its copy in host memory, to be dropped.
    pub parked: Option<u64>,
    /// The session that is prefilled instead, if this one was prefilled for others too.
    pub heir: Option<TaskId>,
}

/// What became of a task that is to be computed again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restarted {
    /// Its copy in host memory, to be dropped.
    pub parked: Option<u64>,
    /// Why it cannot be computed here: it came from elsewhere and is too long for this replica alone. It waits to be
    /// removed then.
    pub never: Option<NeverFits>,
}

/// Where a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Queued without state.
    Waiting,
    /// Running, more than its last token to feed.
    Prefill,
    /// Running, one token a step.
    Decode,
    /// In host memory, or frozen.
    Parked,
}

/// A session as seen from outside; one that has not forked yet looks like the one that is prefilled for it.
#[derive(Debug, Clone, Copy)]
pub struct SessionView<'a> {
    /// Where it is.
    pub status: Status,
    /// Tokens covered by its state and latents.
    pub computed: u64,
    /// Where its latents are; while parked, how many there are.
    pub latents: &'a Latents,
}

/// Counts for load reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Sessions with slots.
    pub running: u64,
    /// Sessions without slot that are not parked.
    pub waiting: u64,
    /// Sessions in host memory, and frozen ones wherever they are.
    pub parked: u64,
    /// Known tokens that are not computed yet, decode tokens not counted.
    pub queued_tokens: u64,
    /// Computed tokens of sessions with slots.
    pub context_tokens: u64,
    /// Sessions that went and of which full pages are kept.
    pub homes: u64,
    /// Free slots.
    pub slots_free: u64,
    /// Free pages.
    pub pages_free: u64,
}
