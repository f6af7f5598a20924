//! A model of execution for one scheduler: it does what plans say, on paper, and checks each of them against everything
//! that must hold whatever the workload.

use std::collections::{BTreeMap, BTreeSet};

use perigee_backend::PAGE_TOKENS;

use crate::scheduler::task::Place;
use crate::scheduler::{Limits, NewTask, Plan, Scheduler, Status, TaskId};

/// What a session still has to do.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub(super) length: u64,
    /// Draws to make.
    pub(super) output: u64,
    /// Only prompt logits are wanted.
    pub(super) score: bool,
}

/// A request of `sessions` sessions.
#[derive(Debug, Clone)]
pub(super) struct Arrival {
    pub(super) sessions: u64,
    pub(super) priority: i32,
    pub(super) prompt: u64,
    pub(super) output: u64,
    pub(super) prompt_logits: bool,
    pub(super) score: bool,
}

impl Arrival {
    pub(super) fn plain(prompt: u64, output: u64) -> Self {
        Self { sessions: 1, priority: 0, prompt, output, prompt_logits: false, score: false }
    }
}

pub(super) struct Harness {
    pub(super) scheduler: Scheduler,
    pub(super) work: BTreeMap<TaskId, Work>,
    pub(super) finished: BTreeSet<TaskId>,
    /// How many worse tasks were admitted while a task of this first session queued.
    overtaken: BTreeMap<TaskId, u32>,
    pub(super) preemptions: u64,
    pub(super) steps: u64,
    next_id: u64,
}

impl Harness {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            work: BTreeMap::new(),
            finished: BTreeSet::new(),
            overtaken: BTreeMap::new(),
            preemptions: 0,
            steps: 0,
            next_id: 0,
        }
    }

    /// Adds an arrival's sessions; none if it never fits.
    pub(super) fn arrive(&mut self, arrival: &Arrival) -> Option<Vec<TaskId>> {
        let ids: Vec<TaskId> = (self.next_id..self.next_id + arrival.sessions).map(TaskId).collect();
        let new = NewTask {
            id: ids[0],
            followers: ids[1..].to_vec(),
            priority: arrival.priority,
            deadline: None,
            length: arrival.prompt,
            most: arrival.prompt + arrival.output.saturating_sub(1),
            prompt_logits: arrival.prompt_logits || arrival.score,
        };
        self.scheduler.add(new).ok()?;
        self.next_id += arrival.sessions;
        for id in &ids {
            let work = Work { length: arrival.prompt, output: arrival.output, score: arrival.score };
            self.work.insert(*id, work);
        }
        Some(ids)
    }

    pub(super) fn cancel(&mut self, id: TaskId) {
        if self.work.remove(&id).is_some() {
            self.scheduler.remove(id).unwrap().expect("a session with work is known");
            self.scheduler.audit().unwrap();
        }
    }

    pub(super) fn status(&self, id: TaskId) -> Status {
        self.scheduler.session(id).unwrap().status
    }

    /// Plans a step, checks it, and does it; `lost_park` and `lost_unpark` make those operations fail.
    pub(super) fn step(&mut self, lost_park: bool, lost_unpark: bool) -> Plan {
        let queued_before: Vec<_> = self.scheduler.queue.iter().copied().collect();
        let plan = self.scheduler.plan().unwrap();
        self.steps += 1;
        self.preemptions += plan.parks.len() as u64;
        self.scheduler.audit().unwrap();
        self.check_limits(&plan);
        self.check_rows(&plan);
        self.check_copies(&plan);
        self.check_service(&plan);
        self.check_order(&plan, &queued_before);
        if let Some(best) = self.scheduler.running.first() {
            // The one exception: a task that came back from host memory waits a step before it forks.
            let progress = plan.rows.iter().any(|row| row.task == best.id);
            assert!(
                progress || plan.unparks.iter().any(|unpark| unpark.task == best.id),
                "no row for {best:?}: {plan:?}"
            );
        }
        self.carry_out(&plan, lost_park, lost_unpark);
        self.scheduler.audit().unwrap();
        plan
    }

    /// Steps until everything is done, at most `bound` times.
    pub(super) fn finish(&mut self, bound: u64) {
        for _ in 0..bound {
            if self.work.is_empty() {
                break;
            }
            self.step(false, false);
        }
        assert!(self.work.is_empty(), "not done after {bound} steps: {:?}", self.work);
        assert!(self.scheduler.is_empty());
        let occupancy = self.scheduler.occupancy();
        let limits = self.scheduler.limits();
        assert_eq!(occupancy.slots_free, u64::from(limits.slots));
        assert_eq!(occupancy.pages_free, u64::from(limits.pages));
    }

    fn check_limits(&self, plan: &Plan) {
        let limits = self.scheduler.limits();
        let tokens: u64 = plan.rows.iter().map(|row| row.tokens).sum();
        assert!(tokens <= limits.step_tokens, "{tokens} tokens in a step of {}", limits.step_tokens);
        assert!(plan.rows.len() as u64 <= limits.step_rows);
        let logits: u64 = plan
            .rows
            .iter()
            .map(|row| u64::from(row.draws) + row.prompt_logits_from.map_or(0, |from| row.end() - from))
            .sum();
        assert!(logits <= limits.step_rows, "{logits} positions with logits for {} rows", limits.step_rows);
        assert!(self.scheduler.occupancy().running <= limits.max_running());
    }

    fn check_rows(&self, plan: &Plan) {
        let mut slots = BTreeSet::new();
        let mut drawing_over = false;
        for row in &plan.rows {
            let task = &self.scheduler.tasks[&row.task];
            assert!(row.tokens > 0);
            assert_eq!(row.position, task.computed);
            assert!(row.end() <= task.length);
            assert_eq!(row.draws, row.end() == task.length);
            assert!(row.draws || row.end() <= task.stop());
            assert!(!(row.draws && drawing_over), "drawing rows come first");
            drawing_over |= !row.draws;
            assert!(slots.insert(row.read_slot), "two rows with slot {}", row.read_slot);
            assert!(row.write_slot == row.read_slot || slots.insert(row.write_slot));
            assert!(matches!(&task.place, Place::Running { slots, .. } if slots.read == row.read_slot));
            assert_eq!(row.segments.last().unwrap().end, row.end());
            let written = row.position / PAGE_TOKENS as u64..row.end().div_ceil(PAGE_TOKENS as u64);
            for number in written {
                let segment = row.segments.last().unwrap();
                let (page, _) = segment.locate((number * PAGE_TOKENS as u64).max(row.position));
                assert_eq!(self.scheduler.pages.references(page), 1, "a shared page is written");
            }
            assert_eq!(row.position == 0, plan.clear_slots.contains(&row.read_slot));
        }
        let tasks: BTreeSet<TaskId> = plan.rows.iter().map(|row| row.task).collect();
        assert_eq!(tasks.len(), plan.rows.len(), "two rows of one session");
    }

    /// No copy reads what an earlier operation of the same plan overwrote.
    fn check_copies(&self, plan: &Plan) {
        let arriving: BTreeSet<u32> = plan.unparks.iter().flat_map(|unpark| unpark.pages.iter().copied()).collect();
        let copied_to: BTreeSet<u32> = plan.copy_pages.iter().map(|copy| copy.1).collect();
        assert_eq!(copied_to.len(), plan.copy_pages.len());
        for (from, to) in &plan.copy_pages {
            assert!(!arriving.contains(from) && !copied_to.contains(from) && !arriving.contains(to));
        }
        let slots_to: BTreeSet<u32> = plan.copy_slots.iter().map(|copy| copy.1).collect();
        for (from, _) in &plan.copy_slots {
            assert!(!slots_to.contains(from) && !plan.clear_slots.contains(from));
            assert!(plan.unparks.iter().all(|unpark| unpark.slot != *from));
        }
    }

    /// Nobody is passed over without reason: decodes get their token, and the oldest prefill its chunk, while there are pages.
    fn check_service(&self, plan: &Plan) {
        let pages_left = self.scheduler.pages.free() > 0;
        let has_row = |id: TaskId| plan.rows.iter().any(|row| row.task == id);
        let mut best_prefill_seen = false;
        for task in self.scheduler.running_tasks() {
            let unparked = plan.unparks.iter().any(|unpark| unpark.task == task.id);
            let needs_page = task.latents.capacity() <= task.computed;
            if task.decodes() {
                assert!(has_row(task.id) || (needs_page && !pages_left), "decode passed over: {task:?}");
            } else if !best_prefill_seen {
                best_prefill_seen = true;
                let waits_to_fork = task.forks_now() && unparked;
                assert!(has_row(task.id) || waits_to_fork || (needs_page && !pages_left), "passed over: {task:?}");
            }
        }
    }

    /// Better tasks are admitted first, except that one which does not fit is overtaken a bounded number of times.
    fn check_order(&mut self, plan: &Plan, queued_before: &[crate::scheduler::types::Rank]) {
        for better in queued_before {
            if plan.admitted.contains(&better.id) {
                self.overtaken.remove(&better.id);
                continue;
            }
            let worse =
                queued_before.iter().filter(|other| *other > better && plan.admitted.contains(&other.id)).count()
                    as u32;
            let count = self.overtaken.entry(better.id).or_default();
            *count += worse;
            let limit = self.scheduler.limits().bypass_limit;
            assert!(*count <= limit, "{better:?} was overtaken {count} times");
        }
    }

    fn carry_out(&mut self, plan: &Plan, lost_park: bool, lost_unpark: bool) {
        let mut lost = BTreeSet::new();
        for park in plan.parks.iter().filter(|_| lost_park) {
            self.scheduler.park_failed(park.task).unwrap();
        }
        for unpark in plan.unparks.iter().filter(|_| lost_unpark) {
            self.scheduler.restart(unpark.task).unwrap().unwrap();
            lost.insert(unpark.task);
        }
        for row in plan.rows.iter().filter(|row| !lost.contains(&row.task)) {
            self.scheduler.advance(row.task, row.tokens);
            let Some(work) = self.work.get_mut(&row.task) else { panic!("a row for a removed session") };
            assert!(row.end() <= work.length);
            let scored = work.score && row.end() + 1 == work.length;
            if row.draws {
                assert!(!work.score);
                work.length += 1;
                work.output -= 1;
            }
            if scored || (row.draws && work.output == 0) {
                self.work.remove(&row.task);
                self.scheduler.remove(row.task).unwrap().unwrap();
                self.finished.insert(row.task);
            } else if row.draws {
                self.scheduler.append(row.task);
            }
        }
    }
}
