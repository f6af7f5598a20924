//! Pages for the rows of a step, preemption where there are too few, and forks: rules 3 to 5 of the README. Who runs and how many
//! tokens a row has at most is decided before.

use std::collections::BTreeSet;

use super::Scheduler;
use super::budget::Share;
use super::task::{Place, Task};
use super::types::{Fork, Parking, Plan, PlannedRow, Rank, TaskId};
use crate::cache::{CacheError, Latents, SlotPair};

impl Scheduler {
    /// Makes rows of the shares, better first.
    pub(super) fn place_rows(&mut self, shares: &[Share], plan: &mut Plan) -> Result<(), CacheError> {
        // Tasks with a row must keep their pages; those admitted just now may have a copy on the way in.
        let mut settled: BTreeSet<TaskId> = plan.admitted.iter().copied().collect();
        for share in shares {
            if !self.running.contains(&share.rank) || share.tokens == 0 {
                continue;
            }
            let Some(task) = self.tasks.get(&share.rank.id) else { continue };
            let forks = task.forks_now();
            if forks && plan.unparks.iter().any(|unpark| unpark.task == share.rank.id) {
                // If the copy cannot be brought back, only this task may be hurt by it: fork in the next step.
                continue;
            }
            if !self.place_row(share.rank, share.tokens, &settled, plan)? {
                continue;
            }
            settled.insert(share.rank.id);
            if forks {
                self.fork_followers(share.rank, &mut settled, plan)?;
            }
        }
        Ok(())
    }

    /// Adds a task's row with as many tokens as there are pages for; false if that is none.
    fn place_row(
        &mut self,
        rank: Rank,
        tokens: u64,
        settled: &BTreeSet<TaskId>,
        plan: &mut Plan,
    ) -> Result<bool, CacheError> {
        let Some(task) = self.tasks.get(&rank.id) else { return Ok(false) };
        let missing = task.latents.missing_for(task.computed + tokens);
        self.make_room(rank, missing, settled, plan)?;
        let Some(task) = self.tasks.get_mut(&rank.id) else { return Ok(false) };
        for page in (0..missing).map_while(|_| self.pages.allocate()) {
            task.latents.append(page);
        }
        let end = task.latents.capacity().min(task.computed + tokens);
        let Place::Running { slots, .. } = &task.place else { return Ok(false) };
        if end <= task.computed {
            return Ok(false);
        }
        if task.computed == 0 {
            plan.clear_slots.push(slots.read);
        }
        plan.rows.push(row(task, *slots, end));
        Ok(true)
    }

    /// Preempts worse tasks without a row, worst first, until `pages` pages are free or nobody is left.
    fn make_room(
        &mut self,
        rank: Rank,
        pages: usize,
        settled: &BTreeSet<TaskId>,
        plan: &mut Plan,
    ) -> Result<(), CacheError> {
        while self.pages.free() < pages {
            let victim = self.running.iter().rev().take_while(|other| **other > rank);
            let Some(victim) = victim.copied().find(|other| !settled.contains(&other.id)) else { break };
            self.preempt(victim, plan)?;
        }
        Ok(())
    }

    /// Takes slots and pages from a running task: to host memory while there is room for it, else to nowhere. The old slot
    /// of a transaction is the one that counts.
    fn preempt(&mut self, rank: Rank, plan: &mut Plan) -> Result<(), CacheError> {
        if self.tasks.get(&rank.id).is_some_and(|task| task.is_scratch) {
            return self.preempt_rebuild(rank, plan);
        }
        let Some(mut task) = self.tasks.remove(&rank.id) else { return Ok(()) };
        self.running.remove(&rank);
        self.drop_following(rank.id)?;
        let room = if task.computed > 0 { self.parked.take(task.latents.local_page_count()) } else { None };
        match (room, &task.place) {
            (Some((key, bytes)), Place::Running { slots, reserved }) => {
                let (slots, reserved) = (*slots, reserved.clone());
                let pages = task.latents.detach();
                self.release_pages(pages.iter().copied())?;
                self.release_slots(slots.slots().chain(reserved))?;
                plan.parks.push(Parking { task: rank.id, key, slot: slots.read, pages });
                task.place = Place::Parked { key, bytes };
            }
            _ => match self.start_over(&mut task)? {
                Ok(()) => plan.restarts.push(rank.id),
                Err(never) => plan.evicted.push((rank.id, never)),
            },
        }
        self.tasks.insert(rank.id, task);
        self.list(rank.id);
        Ok(())
    }

    /// Makes every follower of a prefilled task a task of its own, with a row for the last prompt token.
    fn fork_followers(
        &mut self,
        rank: Rank,
        settled: &mut BTreeSet<TaskId>,
        plan: &mut Plan,
    ) -> Result<(), CacheError> {
        let Some(parent) = self.tasks.get_mut(&rank.id) else { return Ok(()) };
        let Place::Running { slots, reserved } = &mut parent.place else { return Ok(()) };
        let (parent_slot, reserved) = (slots.read, std::mem::take(reserved));
        let followers = std::mem::take(&mut parent.followers);
        parent.barrier = None;
        for (child, slot) in followers.into_iter().zip(reserved) {
            self.leaders.remove(&child);
            plan.forks.push(Fork { parent: rank.id, child });
            self.fork_one(rank, child, (parent_slot, slot), settled, plan)?;
        }
        Ok(())
    }

    fn fork_one(
        &mut self,
        parent_rank: Rank,
        child: TaskId,
        (from_slot, to_slot): (u32, u32),
        settled: &mut BTreeSet<TaskId>,
        plan: &mut Plan,
    ) -> Result<(), CacheError> {
        // Copying the partial page and growing into a new one both take one page.
        self.make_room(parent_rank, 1, settled, plan)?;
        let Some(parent) = self.tasks.get(&parent_rank.id) else { return Ok(()) };
        let Some(page) = self.pages.allocate() else {
            self.slots.release(to_slot)?;
            let task = parent.fork(child, 0, Latents::new(), Place::Queued);
            self.queue.insert(task.rank());
            self.tasks.insert(child, task);
            plan.restarts.push(child);
            return Ok(());
        };
        let (mut latents, partial) = parent.latents.fork(parent.computed);
        for shared in latents.local_pages() {
            self.pages.share(shared)?;
        }
        latents.append(page);
        if let Some(partial) = partial {
            plan.copy_pages.push((partial, page));
        }
        let slots = SlotPair::in_place(to_slot);
        let place = Place::Running { slots, reserved: Vec::new() };
        let task = parent.fork(child, parent.computed, latents, place);
        if task.computed == 0 {
            plan.clear_slots.push(to_slot);
        } else {
            plan.copy_slots.push((from_slot, to_slot));
        }
        plan.rows.push(row(&task, slots, task.length));
        settled.insert(child);
        self.running.insert(task.rank());
        self.tasks.insert(child, task);
        Ok(())
    }
}

fn row(task: &Task, slots: SlotPair, end: u64) -> PlannedRow {
    let position = task.computed;
    let scored_from = task.scored.max(position);
    let wants_prompt_logits =
        task.prompt_logits && task.barrier.is_some_and(|barrier| end <= barrier) && scored_from < end;
    PlannedRow {
        task: task.id,
        position,
        tokens: end - position,
        read_slot: slots.read,
        write_slot: slots.write,
        segments: task.latents.row_segments(end),
        remote: task.latents.is_remote(),
        draws: end == task.length && !task.is_scratch,
        prompt_logits_from: wants_prompt_logits.then_some(scored_from),
    }
}
