//! The scheduler of one replica: pure state that takes tasks and outcomes and gives a plan for every step. The problem
//! and the rules are in the README beside this file. It knows no device, no clock, no channel and no sampling.

mod admit;
pub mod arrivals;
mod budget;
pub mod moves;
mod parking;
mod place;
mod task;
#[cfg(test)]
mod tests;
pub mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

pub use self::arrivals::Adopted;
pub use self::moves::{FreezeCopies, FreezeRefused, FrozenView, Released, StateAt};
use self::parking::ParkLedger;
use self::task::{Place, Task};
use self::types::Rank;
pub use self::types::{
    Fork, Limits, NeverFits, NewTask, Occupancy, Parking, Plan, PlannedRow, Removed, SessionView, Status, TaskId,
};
use crate::cache::{CacheError, Latents, PagePool, SlotPool};

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
    deadlines: BTreeSet<(Instant, TaskId)>,
    arrivals: u64,
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
            deadlines: BTreeSet::new(),
            arrivals: 0,
        }
    }

    /// What there is to share.
    pub fn limits(&self) -> &Limits {
        &self.limits
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
        if let Some(leader) = self.leaders.remove(&id) {
            self.remove_follower(leader, id)?;
            return Ok(Some(Removed::default()));
        }
        let Some(mut task) = self.tasks.remove(&id) else { return Ok(None) };
        self.unlist(&task);
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
        if let Place::Parked { bytes, .. } = task.place {
            self.parked.give_back(bytes);
            task.place = Place::Queued;
            task.latents = Latents::new();
            task.computed = 0;
        }
        Ok(())
    }

    /// A running session's state or some of its latents are lost: it queues to be computed again, with all latents here.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken; inside, [`NeverFits`] as for [`Self::park_failed`].
    pub fn restart(&mut self, id: TaskId) -> Result<Result<(), NeverFits>, CacheError> {
        let Some(mut task) = self.tasks.remove(&id) else { return Ok(Ok(())) };
        if matches!(task.place, Place::Running { .. }) {
            self.running.remove(&task.rank());
            self.strip(&mut task)?;
            self.queue.insert(task.rank());
        }
        self.tasks.insert(id, task);
        Ok(Ok(()))
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
            ..Occupancy::default()
        };
        for task in self.tasks.values() {
            let left = task.length - task.computed;
            counts.queued_tokens += if left > 1 { left } else { 0 };
            match task.place {
                Place::Running { .. } => counts.running += task.sessions(),
                Place::Queued => counts.waiting += task.sessions(),
                Place::Parked { .. } => counts.parked += task.sessions(),
            }
        }
        counts
    }

    /// Checks every account against every task.
    ///
    /// # Errors
    /// [`CacheError`] says what does not add up.
    pub fn audit(&self) -> Result<(), CacheError> {
        let on_device = || self.tasks.values().filter(|task| !matches!(task.place, Place::Parked { .. }));
        self.pages.audit(on_device().flat_map(|task| task.latents.local_pages()))?;
        self.slots.audit(self.tasks.values().flat_map(|task| match &task.place {
            Place::Running { slots, reserved } => slots.slots().chain(reserved.iter().copied()).collect(),
            _ => Vec::new(),
        }))?;
        let parked_bytes: u64 = self
            .tasks
            .values()
            .map(|task| match task.place {
                Place::Parked { bytes, .. } => bytes,
                _ => 0,
            })
            .sum();
        self.parked.audit(parked_bytes)?;
        let ranks = |running| {
            let listed = move |task: &&Task| matches!(task.place, Place::Running { .. }) == running;
            self.tasks.values().filter(listed).map(Task::rank).collect::<BTreeSet<Rank>>()
        };
        if ranks(true) != self.running || ranks(false) != self.queue {
            return Err(CacheError::Unbalanced("the queue and the running set differ from the tasks".into()));
        }
        let unreserved = |task: &&Task| match &task.place {
            Place::Running { reserved, .. } => reserved.len() != task.followers.len(),
            _ => false,
        };
        if let Some(task) = self.tasks.values().find(unreserved) {
            return Err(CacheError::Unbalanced(format!("task {} has not a slot for every follower", task.id.0)));
        }
        let followers: BTreeMap<TaskId, TaskId> =
            self.tasks.values().flat_map(|task| task.followers.iter().map(|&follower| (follower, task.id))).collect();
        if followers != self.leaders {
            return Err(CacheError::Unbalanced("followers differ from their tasks'".into()));
        }
        Ok(())
    }

    fn remove_follower(&mut self, leader: TaskId, id: TaskId) -> Result<(), CacheError> {
        let Some(task) = self.tasks.get_mut(&leader) else { return Ok(()) };
        task.followers.retain(|&follower| follower != id);
        let slot = match &mut task.place {
            Place::Running { reserved, .. } => reserved.pop(),
            _ => None,
        };
        let deadline = task.deadline;
        self.forget_deadline(deadline, id);
        slot.map_or(Ok(()), |slot| self.slots.release(slot))
    }

    /// The first follower takes the place of a removed session that was prefilled for it too.
    fn hand_down(&mut self, mut task: Task) -> Result<Removed, CacheError> {
        let heir = task.followers.remove(0);
        task.id = heir;
        self.leaders.remove(&heir);
        for follower in &task.followers {
            self.leaders.insert(*follower, heir);
        }
        let slot = match &mut task.place {
            Place::Running { reserved, .. } => reserved.pop(),
            _ => None,
        };
        match task.place {
            Place::Running { .. } => self.running.insert(task.rank()),
            _ => self.queue.insert(task.rank()),
        };
        self.tasks.insert(heir, task);
        slot.map_or(Ok(()), |slot| self.slots.release(slot))?;
        Ok(Removed { parked: None, heir: Some(heir) })
    }

    /// Takes everything from a task that is in no list: slots, pages, park memory; it is queued and uncomputed then.
    /// Returns the key of its copy in host memory.
    fn strip(&mut self, task: &mut Task) -> Result<Option<u64>, CacheError> {
        let latents = std::mem::take(&mut task.latents);
        task.computed = 0;
        match std::mem::replace(&mut task.place, Place::Queued) {
            Place::Queued => Ok(None),
            Place::Parked { key, bytes } => {
                self.parked.give_back(bytes);
                Ok(Some(key))
            }
            Place::Running { slots, reserved } => {
                self.release_device(latents.local_pages(), slots.slots().chain(reserved))?;
                Ok(None)
            }
        }
    }

    fn release_device(
        &mut self,
        pages: impl Iterator<Item = u32>,
        slots: impl Iterator<Item = u32>,
    ) -> Result<(), CacheError> {
        for page in pages {
            self.pages.release(page)?;
        }
        for slot in slots {
            self.slots.release(slot)?;
        }
        Ok(())
    }

    fn unlist(&mut self, task: &Task) {
        match task.place {
            Place::Running { .. } => self.running.remove(&task.rank()),
            _ => self.queue.remove(&task.rank()),
        };
    }

    fn forget_deadline(&mut self, deadline: Option<Instant>, id: TaskId) {
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, id));
        }
    }
}
