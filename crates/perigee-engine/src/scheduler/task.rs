//! What the scheduler keeps of a task: how far it is, where it stands and what it holds. It does not decide anything.

use std::cmp::Reverse;
use std::time::Instant;

use super::types::{Limits, NeverFits, NewTask, Rank, Status, TaskId};
use crate::cache::{Latents, SlotPair};

/// Where a task stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the queue with nothing: new, or to be computed again.
    Queued,
    /// Running, with slots for itself and for its followers.
    Running { slots: SlotPair, reserved: Vec<u32> },
    /// In the queue, with its state and latents in host memory.
    Parked { key: u64, bytes: u64 },
    /// With nothing, and too long to be computed again here: it waits to be removed.
    Evicted,
}

#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) id: TaskId,
    pub(crate) followers: Vec<TaskId>,
    pub(crate) priority: i32,
    pub(crate) arrival: u64,
    pub(crate) deadline: Option<Instant>,
    /// Whether it stands still because it moves; then it has no followers.
    pub(crate) frozen: bool,
    /// Whether it only computes another one's latents again.
    pub(crate) is_scratch: bool,
    /// Tokens known.
    pub(crate) length: u64,
    /// Most positions that it may ever compute.
    pub(crate) most: u64,
    /// Tokens covered by state and latents.
    pub(crate) computed: u64,
    /// Position of the last prompt token where a row must end before it: a fork, or the end of prompt logits.
    pub(crate) barrier: Option<u64>,
    /// Whether logits are wanted for positions before the barrier.
    pub(crate) prompt_logits: bool,
    /// Positions from the start whose logits were already had: a recomputation does not ask again.
    pub(crate) scored: u64,
    /// How many later tasks were admitted before this one since it queued.
    pub(crate) overtaken: u32,
    /// The local pages are in the pool's books except while parked.
    pub(crate) latents: Latents,
    pub(crate) place: Place,
}

impl Task {
    pub(crate) fn new(new: NewTask, arrival: u64) -> Self {
        let barrier = (new.prompt_logits || !new.followers.is_empty()).then(|| new.length.saturating_sub(1));
        Self {
            id: new.id,
            followers: new.followers,
            priority: new.priority,
            arrival,
            deadline: new.deadline,
            frozen: false,
            is_scratch: false,
            length: new.length,
            most: new.most,
            computed: 0,
            barrier,
            prompt_logits: new.prompt_logits,
            scored: 0,
            overtaken: 0,
            latents: Latents::new(),
            place: Place::Queued,
        }
    }

    /// A follower that leaves with what `latents` says; it has the same tokens and its prompt logits are done.
    pub(crate) fn fork(&self, id: TaskId, computed: u64, latents: Latents, place: Place) -> Self {
        Self {
            id,
            followers: Vec::new(),
            computed,
            barrier: None,
            prompt_logits: false,
            overtaken: 0,
            latents,
            place,
            ..self.clone()
        }
    }

    /// A session that leaves before the prefill is done: with a copy of what is computed, or with nothing. It still wants
    /// the prompt logits that are to come.
    pub(crate) fn split(&self, id: TaskId, computed: u64, latents: Latents, place: Place) -> Self {
        let barrier = self.barrier.filter(|_| self.prompt_logits);
        Self { barrier, prompt_logits: self.prompt_logits, ..self.fork(id, computed, latents, place) }
    }

    pub(crate) fn rank(&self) -> Rank {
        Rank { priority: Reverse(self.priority), arrival: self.arrival, id: self.id }
    }

    /// Sessions in the task, its own and the followers'.
    pub(crate) fn sessions(&self) -> u64 {
        1 + self.followers.len() as u64
    }

    /// The sessions: its own and the followers'.
    pub(crate) fn session_ids(&self) -> impl Iterator<Item = TaskId> + '_ {
        std::iter::once(self.id).chain(self.followers.iter().copied())
    }

    /// A slot that was reserved for a follower which left.
    pub(crate) fn take_reserved(&mut self) -> Option<u32> {
        match &mut self.place {
            Place::Running { reserved, .. } => reserved.pop(),
            _ => None,
        }
    }

    /// State and latents are gone, wherever they were: all of it is to be computed again, here.
    ///
    /// # Errors
    /// [`NeverFits`] if that is impossible; it is evicted then.
    pub(crate) fn lose_everything(&mut self, limits: &Limits) -> Result<(), NeverFits> {
        let possible = limits.check(self.sessions(), self.most);
        self.latents = Latents::new();
        self.computed = 0;
        self.place = if possible.is_ok() { Place::Queued } else { Place::Evicted };
        possible
    }

    /// Slots that it holds while it runs: one for each session, and a shadow where steps are transactions.
    pub(crate) fn slots_needed(&self) -> u64 {
        self.sessions() + u64::from(self.latents.is_remote())
    }

    /// Pages that it must get to be admitted, because its latents are in host memory.
    pub(crate) fn parked_pages(&self) -> u64 {
        match self.place {
            Place::Parked { .. } => self.latents.local_page_count() as u64,
            _ => 0,
        }
    }

    /// Pages that it must get, once in the queue, to compute every token it knows; those of followers apart.
    pub(crate) fn queued_pages(&self) -> u64 {
        self.parked_pages() + self.latents.missing_for(self.length) as u64
    }

    /// Its slots while it runs, none else.
    pub(crate) fn slots(&self) -> impl Iterator<Item = u32> + '_ {
        let held = match &self.place {
            Place::Running { slots, reserved } => Some(slots.slots().chain(reserved.iter().copied())),
            _ => None,
        };
        held.into_iter().flatten()
    }

    /// Whether prompt logits are still to come.
    pub(crate) fn wants_prompt_logits(&self) -> bool {
        self.prompt_logits && self.barrier.is_some_and(|barrier| self.scored < barrier)
    }

    /// Where rows must end next: the barrier as long as it matters, else the last token known.
    pub(crate) fn stop(&self) -> u64 {
        match self.barrier {
            Some(barrier) if self.computed < barrier && self.needs_barrier(barrier) => barrier,
            _ => self.length,
        }
    }

    fn needs_barrier(&self, barrier: u64) -> bool {
        !self.followers.is_empty() || (self.prompt_logits && self.scored < barrier)
    }

    /// Whether the followers leave now.
    pub(crate) fn forks_now(&self) -> bool {
        !self.followers.is_empty() && self.barrier == Some(self.computed)
    }

    /// Whether one more token ends in a draw: a decode row.
    pub(crate) fn decodes(&self) -> bool {
        self.computed + 1 == self.length && self.stop() == self.length
    }

    /// Positions from `computed` on whose logits were already had, before one whose logits are wanted.
    pub(crate) fn free_of_logits(&self) -> u64 {
        self.scored.saturating_sub(self.computed)
    }

    /// Pages that the task needs beyond what it holds, to compute every token it knows, followers included.
    pub(crate) fn owed_pages(&self) -> u64 {
        let own = self.latents.missing_for(self.length) as u64;
        let tokens = perigee_backend::PAGE_TOKENS as u64;
        let per_follower = self.barrier.map_or(0, |barrier| self.length.div_ceil(tokens) - barrier / tokens);
        own + self.followers.len() as u64 * per_follower
    }

    pub(crate) fn status(&self) -> Status {
        match self.place {
            _ if self.frozen => Status::Parked,
            Place::Queued | Place::Evicted => Status::Waiting,
            Place::Parked { .. } => Status::Parked,
            Place::Running { .. } if self.decodes() => Status::Decode,
            Place::Running { .. } => Status::Prefill,
        }
    }
}
