//! Who gets slots: rule 1 of the README. It gives no pages, except to sessions that come back from host memory.

use super::Scheduler;
use super::task::{Place, Task};
use super::types::{Limits, NeverFits, Parking, Plan, Rank, TaskId};
use crate::cache::SlotPair;
use perigee_backend::PAGE_TOKENS;

impl Limits {
    /// Pages kept free at admission while anything runs, so that a session that came back does not have to leave again at
    /// once: a thirty-second of all.
    fn headroom_pages(&self) -> u64 {
        u64::from(self.pages / 32)
    }

    /// Whether `sessions` sessions of at most `most` positions fit an empty replica.
    ///
    /// # Errors
    /// [`NeverFits`] says what is too much and what would do.
    pub fn check(&self, sessions: u64, most: u64) -> Result<(), NeverFits> {
        if sessions > self.max_running() {
            return Err(NeverFits::Sessions { wanted: sessions, limit: self.max_running() });
        }
        if most > self.max_length {
            return Err(NeverFits::Length { wanted: most, limit: self.max_length });
        }
        let positions = u64::from(self.pages) * PAGE_TOKENS as u64;
        if most > positions {
            return Err(NeverFits::Pages { wanted: most, limit: positions });
        }
        Ok(())
    }
}

impl Scheduler {
    /// Moves tasks from the queue to the running set, better first.
    pub(super) fn admit(&mut self, plan: &mut Plan) {
        let mut running = self.running_sessions();
        if running >= self.limits.max_running() || self.queue.is_empty() {
            return;
        }
        let mut promised: u64 = self.running_tasks().map(Task::owed_pages).sum();
        let mut overtaken: Vec<TaskId> = Vec::new();
        let candidates: Vec<Rank> = self.queue.iter().copied().collect();
        for rank in candidates {
            if running >= self.limits.max_running() || self.slots.free() == 0 {
                break;
            }
            let Some(task) = self.tasks.get(&rank.id) else { continue };
            let sessions = task.sessions();
            let parked_pages = match task.place {
                Place::Parked { .. } => task.latents.local_page_count(),
                _ => 0,
            };
            let owed = task.owed_pages();
            let headroom = running.max(self.limits.headroom_pages());
            let free = self.pages.free() as u64;
            let fits = running + sessions <= self.limits.max_running()
                && sessions <= self.slots.free() as u64
                && parked_pages as u64 <= free
                && (running == 0 || free >= promised + parked_pages as u64 + owed + headroom);
            if fits && self.admit_one(rank, plan) {
                running += sessions;
                promised += owed;
                self.count_overtaken(&overtaken);
            } else {
                overtaken.push(rank.id);
            }
            if overtaken.iter().any(|id| self.may_not_be_passed(*id)) {
                break;
            }
        }
    }

    /// Gives a queued task its slots, and its pages if it was parked; false, and nothing given, if there are too few.
    fn admit_one(&mut self, rank: Rank, plan: &mut Plan) -> bool {
        let Some(task) = self.tasks.get_mut(&rank.id) else { return false };
        if self.slots.free() < task.sessions() as usize {
            return false;
        }
        let parked = match task.place {
            Place::Parked { key, bytes } => {
                let Some(pages) = self.pages.allocate_many(task.latents.local_page_count()) else { return false };
                Some((key, bytes, pages))
            }
            _ => None,
        };
        let Some(slot) = self.slots.allocate() else { return false };
        let reserved = task.followers.iter().filter_map(|_| self.slots.allocate()).collect();
        task.place = Place::Running { slots: SlotPair::in_place(slot), reserved };
        task.overtaken = 0;
        if let Some((key, bytes, pages)) = parked {
            self.parked.give_back(bytes);
            task.latents.attach(&pages);
            plan.unparks.push(Parking { task: rank.id, key, slot, pages });
        }
        self.queue.remove(&rank);
        self.running.insert(rank);
        plan.admitted.push(rank.id);
        true
    }

    fn count_overtaken(&mut self, overtaken: &[TaskId]) {
        for id in overtaken {
            if let Some(task) = self.tasks.get_mut(id) {
                task.overtaken += 1;
            }
        }
    }

    /// Whether a task that does not fit was overtaken so often that nobody may pass it any more.
    fn may_not_be_passed(&self, id: TaskId) -> bool {
        self.tasks.get(&id).is_some_and(|task| task.overtaken >= self.limits.bypass_limit)
    }

    pub(super) fn running_tasks(&self) -> impl Iterator<Item = &Task> {
        self.running.iter().filter_map(|rank| self.tasks.get(&rank.id))
    }

    fn running_sessions(&self) -> u64 {
        self.running_tasks().map(Task::sessions).sum()
    }
}
