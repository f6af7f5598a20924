//! The scheduler of one replica: pure state that takes tasks and outcomes and gives a plan for every step. The problem
//! and the rules are in the README beside this file. It knows no device, no clock, no channel and no sampling.

mod admit;
pub mod ahead;
pub mod arrivals;
mod audit;
mod budget;
pub mod following;
pub mod moves;
mod parking;
mod place;
pub mod rebuild;
mod task;
#[cfg(test)]
mod tests;
pub mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

pub use self::arrivals::Adopted;
use self::arrivals::Reservation;
pub use self::moves::{FreezeCopies, FreezeRefused, FrozenView, Released, StateAt};
use self::parking::ParkLedger;
use self::task::{Place, Task};
use self::types::Rank;
pub use self::types::{
    Fork, Limits, NeverFits, NewTask, Occupancy, Parking, Plan, PlannedRow, Removed, Restarted, SessionView, Status,
    TaskId,
};
use crate::cache::{CacheError, HomePages, PagePool, SlotPool};

/// The tasks of a replica and the accounts of its slots, pages and park memory.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pages: PagePool,
    slots: SlotPool,
    parked: ParkLedger,
    tasks: BTreeMap<TaskId, Task>,
    /// The task that each follower is still part of.
    leaders: BTreeMap<TaskId, TaskId>,
    running: BTreeSet<Rank>,
    queue: BTreeSet<Rank>,
    /// Sessions that get no row for now; a task of several stands still while one of them is here.
    held: BTreeSet<TaskId>,
    reservations: BTreeMap<TaskId, Reservation>,
    /// Pages that a session's latents are being brought into; they are not among its latents yet.
    following: BTreeMap<TaskId, Vec<u32>>,
    /// The scratch tasks that compute sessions' latents again.
    rebuilds: BTreeMap<TaskId, TaskId>,
    /// Pages of sessions that went, by the key of the entry.
    homes: BTreeMap<u64, HomePages>,
    deadlines: BTreeSet<(Instant, TaskId)>,
    arrivals: u64,
    /// Whether prefills get no tokens while at least as many sessions decode.
    prompts_wait: bool,
}

impl Scheduler {
    /// A scheduler without tasks.
    pub fn new(limits: Limits) -> Self {
        Self {
            pages: PagePool::new(limits.pages),
            slots: SlotPool::new(limits.slots),
            parked: ParkLedger::new(limits.park_bytes, limits.slot_bytes, limits.page_bytes),
            limits,
            tasks: BTreeMap::new(),
            leaders: BTreeMap::new(),
            running: BTreeSet::new(),
            queue: BTreeSet::new(),
            held: BTreeSet::new(),
            reservations: BTreeMap::new(),
            following: BTreeMap::new(),
            rebuilds: BTreeMap::new(),
            homes: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            arrivals: 0,
            prompts_wait: false,
        }
    }

    /// What there is to share.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether prefills get no tokens in the plans that follow, as long as [`Self::decodes_prevail`].
    pub fn set_prompts_wait(&mut self, wait: bool) {
        self.prompts_wait = wait;
    }

    /// Queues a task. Ids must be new.
    ///
    /// # Errors
    /// [`NeverFits`] if it can never run here, however empty the replica is.
    pub fn add(&mut self, new: NewTask) -> Result<(), NeverFits> {
        self.limits.check(1 + new.followers.len() as u64, new.most)?;
        let ids = std::iter::once(new.id).chain(new.followers.iter().copied());
        if let Some(deadline) = new.deadline {
            self.deadlines.extend(ids.map(|id| (deadline, id)));
        }
        self.leaders.extend(new.followers.iter().map(|&follower| (follower, new.id)));
        let task = Task::new(new, self.arrivals);
        self.arrivals += 1;
        self.queue.insert(task.rank());
        self.tasks.insert(task.id, task);
        Ok(())
    }

    /// Takes a session out, wherever it is, and frees what it held. None if it is not here.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn remove(&mut self, id: TaskId) -> Result<Option<Removed>, CacheError> {
        self.cancel_rebuild(id)?;
        self.held.remove(&id);
        self.drop_following(id)?;
        if let Some(leader) = self.leaders.remove(&id) {
            self.remove_follower(leader, id)?;
            return Ok(Some(Removed::default()));
        }
        let Some(mut task) = self.tasks.remove(&id) else { return Ok(None) };
        self.unlist(task.rank());
        self.forget_deadline(task.deadline, id);
        if !task.followers.is_empty() {
            return self.hand_down(task).map(Some);
        }
        let parked = self.strip(&mut task)?;
        Ok(Some(Removed { parked, heir: None }))
    }

    /// Sessions whose deadline is not after `now`; they stay until removed.
    pub fn expired(&self, now: Instant) -> Vec<TaskId> {
        self.deadlines.iter().take_while(|(deadline, _)| *deadline <= now).map(|&(_, id)| id).collect()
    }

    /// The next step. Slots and pages are given out and taken as the plan says; `computed` counts change only with
    /// [`Self::advance`].
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn plan(&mut self) -> Result<Plan, CacheError> {
        let mut plan = Plan::default();
        self.admit(&mut plan);
        let shares = self.shares();
        self.place_rows(&shares, &mut plan)?;
        plan.rows.sort_by_key(|row| !row.draws);
        Ok(plan)
    }

    /// A planned row was done: `tokens` more are computed.
    pub fn advance(&mut self, id: TaskId, tokens: u64) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        let Place::Running { slots, .. } = &mut task.place else { return };
        slots.commit();
        task.computed += tokens;
        if let Some(barrier) = task.barrier {
            task.scored = task.scored.max(task.computed.min(barrier));
        }
    }

    /// A token was drawn for a session.
    pub fn append(&mut self, id: TaskId) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.length += 1;
        }
    }

    /// Parking did not work: the session will be computed again.
    ///
    /// # Errors
    /// [`NeverFits`] if that is impossible: it came from elsewhere and is too long for this replica alone. It waits to be
    /// removed then.
    pub fn park_failed(&mut self, id: TaskId) -> Result<(), NeverFits> {
        let Some(task) = self.tasks.get_mut(&id) else { return Ok(()) };
        let Place::Parked { bytes, .. } = task.place else { return Ok(()) };
        self.parked.give_back(bytes);
        let outcome = task.lose_everything(&self.limits);
        self.list(id);
        outcome
    }

    /// A session's state or some of its latents are lost: it queues to be computed again, with all latents here. One in host
    /// memory leaves its copy there, which is to be dropped.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn restart(&mut self, id: TaskId) -> Result<Restarted, CacheError> {
        self.cancel_rebuild(id)?;
        self.drop_following(id)?;
        let Some(mut task) = self.tasks.remove(&id) else { return Ok(Restarted::default()) };
        let rank = task.rank();
        let mut restarted = Restarted::default();
        match task.place {
            Place::Running { .. } => {
                self.unlist(rank);
                restarted.never = self.start_over(&mut task)?.err();
            }
            Place::Parked { key, bytes } => {
                self.unlist(rank);
                self.parked.give_back(bytes);
                restarted = Restarted { parked: Some(key), never: task.lose_everything(&self.limits).err() };
            }
            Place::Queued | Place::Evicted => {}
        }
        self.tasks.insert(id, task);
        self.list(id);
        Ok(restarted)
    }

    /// Whether any task is left.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// How far a session is and where its latents are. None if it is not here.
    pub fn session(&self, id: TaskId) -> Option<SessionView<'_>> {
        let task = self.tasks.get(self.leaders.get(&id).unwrap_or(&id))?;
        Some(SessionView { status: task.status(), computed: task.computed, latents: &task.latents })
    }

    /// Counts for load reports.
    pub fn occupancy(&self) -> Occupancy {
        let mut counts = Occupancy {
            slots_free: self.slots.free() as u64,
            pages_free: self.pages.free() as u64,
            homes: self.homes.len() as u64,
            ..Occupancy::default()
        };
        for task in self.tasks.values() {
            if task.frozen {
                counts.parked += 1;
                continue;
            }
            let left = task.length - task.computed;
            counts.queued_tokens += if left > 1 { left } else { 0 };
            match task.place {
                Place::Running { .. } => {
                    counts.running += task.sessions();
                    counts.context_tokens += task.computed;
                }
                Place::Queued | Place::Evicted => counts.waiting += task.sessions(),
                Place::Parked { .. } => counts.parked += task.sessions(),
            }
        }
        counts
    }

    fn remove_follower(&mut self, leader: TaskId, id: TaskId) -> Result<(), CacheError> {
        let Some(task) = self.tasks.get_mut(&leader) else { return Ok(()) };
        task.followers.retain(|&follower| follower != id);
        let (slot, deadline) = (task.take_reserved(), task.deadline);
        self.forget_deadline(deadline, id);
        self.list(leader);
        self.release_slots(slot.into_iter())
    }

    /// The first follower takes the place of a removed session that was prefilled for it too.
    fn hand_down(&mut self, task: Task) -> Result<Removed, CacheError> {
        let heir = self.enthrone_heir(task);
        let slot = self.tasks.get_mut(&heir).and_then(Task::take_reserved);
        self.list(heir);
        self.release_slots(slot.into_iter())?;
        Ok(Removed { parked: None, heir: Some(heir) })
    }

    /// The first follower leads the task from now on, which is back among the tasks but in no list. Its former leader's
    /// reserved slot is one too many.
    fn enthrone_heir(&mut self, mut task: Task) -> TaskId {
        let heir = task.followers.remove(0);
        task.id = heir;
        self.leaders.remove(&heir);
        for follower in &task.followers {
            self.leaders.insert(*follower, heir);
        }
        self.tasks.insert(heir, task);
        heir
    }

    /// Takes everything from a task that is in no list, for good: slots, pages, park memory. Returns the key of its copy in
    /// host memory.
    fn strip(&mut self, task: &mut Task) -> Result<Option<u64>, CacheError> {
        let latents = std::mem::take(&mut task.latents);
        match std::mem::replace(&mut task.place, Place::Queued) {
            Place::Queued | Place::Evicted => Ok(None),
            Place::Parked { key, bytes } => {
                self.parked.give_back(bytes);
                Ok(Some(key))
            }
            Place::Running { slots, reserved } => {
                self.release_pages(latents.local_pages())?;
                self.release_slots(slots.slots().chain(reserved))?;
                Ok(None)
            }
        }
    }

    /// Takes slots and pages from a running task that is in no list, to compute it again if that is possible.
    fn start_over(&mut self, task: &mut Task) -> Result<Result<(), NeverFits>, CacheError> {
        self.release_pages(task.latents.local_pages())?;
        self.release_slots(task.slots())?;
        Ok(task.lose_everything(&self.limits))
    }

    /// Drops references; returned are the pages that are free now.
    fn release_pages(&mut self, pages: impl Iterator<Item = u32>) -> Result<Vec<u32>, CacheError> {
        let mut freed = Vec::new();
        for page in pages {
            if self.pages.release(page)? {
                freed.push(page);
            }
        }
        Ok(freed)
    }

    fn release_slots(&mut self, mut slots: impl Iterator<Item = u32>) -> Result<(), CacheError> {
        slots.try_for_each(|slot| self.slots.release(slot))
    }

    /// Whether a task gets no row and is left alone.
    fn stands_still(&self, task: &Task) -> bool {
        task.frozen || task.session_ids().any(|id| self.held.contains(&id))
    }

    /// Puts a task into the list in which it belongs, if any; it is in no other.
    fn list(&mut self, id: TaskId) {
        let Some(task) = self.tasks.get(&id).filter(|task| !self.stands_still(task)) else { return };
        match task.place {
            Place::Running { .. } => self.running.insert(task.rank()),
            Place::Queued | Place::Parked { .. } => self.queue.insert(task.rank()),
            Place::Evicted => false,
        };
    }

    fn unlist(&mut self, rank: Rank) {
        self.running.remove(&rank);
        self.queue.remove(&rank);
    }

    /// The client of a session, and of those that share its prefill, waits until then, or for as long as it takes.
    pub fn set_deadline(&mut self, id: TaskId, deadline: Option<Instant>) {
        let leader = self.leaders.get(&id).copied().unwrap_or(id);
        let Some(task) = self.tasks.get_mut(&leader) else { return };
        let former = std::mem::replace(&mut task.deadline, deadline);
        for id in task.session_ids().collect::<Vec<_>>() {
            self.forget_deadline(former, id);
            self.deadlines.extend(deadline.map(|deadline| (deadline, id)));
        }
    }

    fn forget_deadline(&mut self, deadline: Option<Instant>, id: TaskId) {
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, id));
        }
    }
}
