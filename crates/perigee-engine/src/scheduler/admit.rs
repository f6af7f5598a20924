//! Who gets slots: rule 1 of the README. It gives no pages, except to sessions that come back from host memory.

use super::Scheduler;
use super::task::{Place, Task};
use super::types::{Limits, NeverFits, Parking, Plan, Rank, TaskId};
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
        self.check_arrival(most, 0)
    }

    /// Whether a session of at most `most` positions, of which `remote` in full pages are elsewhere, fits an empty replica.
    ///
    /// # Errors
    /// [`NeverFits`] says what is too much and what would do.
    pub fn check_arrival(&self, most: u64, remote: u64) -> Result<(), NeverFits> {
        if most > self.max_length {
            return Err(NeverFits::Length { wanted: most, limit: self.max_length });
        }
        let (local, positions) = (most.saturating_sub(remote), u64::from(self.pages) * PAGE_TOKENS as u64);
        if local > positions {
            return Err(NeverFits::Pages { wanted: local, limit: positions });
        }
        Ok(())
    }
}

impl Scheduler {
    /// Moves tasks from the queue to the running set, better first.
    pub(super) fn admit(&mut self, plan: &mut Plan) {
        if self.queue.is_empty() {
            return;
        }
        let mut seated = self.seated_sessions();
        if seated >= self.limits.max_running() {
            return;
        }
        let mut running = self.running_sessions();
        let mut promised = self.promised_pages();
        let mut still = None;
        let mut overtaken: Vec<TaskId> = Vec::new();
        let candidates: Vec<Rank> = self.queue.iter().copied().collect();
        for rank in candidates {
            if seated >= self.limits.max_running() || self.slots.free() == 0 {
                break;
            }
            let Some(task) = self.tasks.get(&rank.id) else { continue };
            let (sessions, owed) = (task.sessions(), task.owed_pages());
            let fits = seated + sessions <= self.limits.max_running()
                && task.slots_needed() <= self.slots.free() as u64
                && match running {
                    0 => task.queued_pages() <= self.pages.free() as u64,
                    _ => task.parked_pages() + owed <= self.spare_pages(running, promised),
                };
            if fits && self.admit_one(rank, plan) {
                seated += sessions;
                running += sessions;
                promised += owed;
                self.count_overtaken(&overtaken);
            } else {
                overtaken.push(rank.id);
            }
            if overtaken.iter().any(|id| self.may_not_be_passed(*id, &mut still)) {
                break;
            }
        }
    }

    /// Gives a queued task its slots, and its pages if it was parked; false, and nothing given, if there are too few.
    fn admit_one(&mut self, rank: Rank, plan: &mut Plan) -> bool {
        let Some(task) = self.tasks.get_mut(&rank.id) else { return false };
        if (self.slots.free() as u64) < task.slots_needed() {
            return false;
        }
        let parked = match task.place {
            Place::Parked { key, bytes } => {
                let Some(pages) = self.pages.allocate_many(task.latents.local_page_count()) else { return false };
                Some((key, bytes, pages))
            }
            _ => None,
        };
        let Some(slots) = self.slots.allocate_pair(task.latents.is_remote()) else { return false };
        let reserved = task.followers.iter().filter_map(|_| self.slots.allocate()).collect();
        task.place = Place::Running { slots, reserved };
        task.overtaken = 0;
        if let Some((key, bytes, pages)) = parked {
            self.parked.give_back(bytes);
            task.latents.attach(&pages);
            plan.unparks.push(Parking { task: rank.id, key, slot: slots.read, pages });
        }
        self.queue.remove(&rank);
        self.running.insert(rank);
        plan.admitted.push(rank.id);
        true
    }

    pub(super) fn count_overtaken(&mut self, overtaken: &[TaskId]) {
        for id in overtaken {
            if let Some(task) = self.tasks.get_mut(id) {
                task.overtaken = task.overtaken.saturating_add(1);
            }
        }
    }

    /// Whether a task that does not fit was overtaken so often that nobody may pass it any more. One that those who stand
    /// still keep out is passed all the same: it would wait no shorter. `still` is counted where it is needed.
    pub(super) fn may_not_be_passed(&self, id: TaskId, still: &mut Option<Still>) -> bool {
        let Some(task) = self.tasks.get(&id).filter(|task| task.overtaken >= self.limits.bypass_limit) else {
            return false;
        };
        self.could_run(task, still.get_or_insert_with(|| self.count_still()))
    }

    /// Whether a task in the queue could be admitted if nothing ran.
    pub(super) fn could_run(&self, task: &Task, still: &Still) -> bool {
        still.sessions + task.sessions() <= self.limits.max_running()
            && still.slots + task.slots_needed() <= self.slots.total() as u64
            && still.pages + task.queued_pages() <= self.pages.total() as u64
    }

    /// What no running task can get, however long it waits for the others: what frozen and held tasks, reservations and home
    /// entries hold.
    pub(super) fn count_still(&self) -> Still {
        let tasks = || self.tasks.values().filter(|task| self.stands_still(task));
        let seated = tasks().filter(|task| matches!(task.place, Place::Running { .. }));
        let task_pages = seated.clone().flat_map(|task| task.latents.local_pages());
        let mut held = vec![false; self.pages.total()];
        for page in task_pages.chain(self.kept_pages()) {
            if let Some(held) = held.get_mut(page as usize) {
                *held = true;
            }
        }
        let slots = tasks().flat_map(Task::slots).chain(self.reserved_slots());
        Still {
            sessions: seated.map(Task::sessions).sum::<u64>() + self.reservations.len() as u64,
            slots: slots.count() as u64,
            pages: held.into_iter().filter(|held| *held).count() as u64,
        }
    }

    /// Free pages beyond what `running` sessions still need for the tokens they know, and a page for each to grow.
    pub(super) fn spare_pages(&self, running: u64, promised: u64) -> u64 {
        let headroom = running.max(self.limits.headroom_pages());
        (self.pages.free() as u64).saturating_sub(promised + headroom)
    }

    pub(super) fn running_tasks(&self) -> impl Iterator<Item = &Task> {
        self.running.iter().filter_map(|rank| self.tasks.get(&rank.id))
    }

    /// Sessions that may get a row.
    pub(super) fn running_sessions(&self) -> u64 {
        self.running_tasks().map(Task::sessions).sum()
    }

    /// Pages that running tasks still need for the tokens they know.
    pub(super) fn promised_pages(&self) -> u64 {
        self.running_tasks().map(Task::owed_pages).sum()
    }

    /// Sessions with slots, those that stand still and those to come included: each may want a row later.
    pub(super) fn seated_sessions(&self) -> u64 {
        let seated = self.tasks.values().filter(|task| matches!(task.place, Place::Running { .. }));
        seated.map(Task::sessions).sum::<u64>() + self.reservations.len() as u64
    }
}

/// What is held by those that get no rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Still {
    pub(super) sessions: u64,
    pub(super) slots: u64,
    pub(super) pages: u64,
}
