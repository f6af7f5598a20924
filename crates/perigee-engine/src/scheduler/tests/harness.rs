//! A model of execution for one scheduler: it does what plans say, on paper, and checks each of them against everything
//! that must hold whatever the workload.

use std::collections::{BTreeMap, BTreeSet};

use perigee_backend::PAGE_TOKENS;

use super::device::Device;
use super::moving::Away;
use crate::scheduler::budget::REMOTE_ROW_TOKENS;
use crate::scheduler::task::{Place, Task};
use crate::scheduler::types::Rank;
use crate::scheduler::{Limits, NewTask, Plan, Scheduler, Status, TaskId};

/// What a session still has to do.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub(super) length: u64,
    /// Draws to make.
    pub(super) output: u64,
    /// Only prompt logits are wanted.
    pub(super) score: bool,
    /// The first session of its request: those of a request have the same prompt.
    pub(super) family: u64,
}

/// How often the cases occurred that a test is about.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// Rows with latents elsewhere, and those of them that did not count.
    pub(super) remote_rows: u64,
    pub(super) faults: u64,
    /// Sessions with latents elsewhere that went to host memory.
    pub(super) remote_parks: u64,
    /// Sessions that were too long to be computed again here.
    pub(super) evicted: u64,
    /// Steps in which those that stand still keep the best task from its row.
    pub(super) waits: u64,
    /// Sessions that left a shared prefill with copies.
    pub(super) splits: u64,
    /// Sessions that left while they were in host memory.
    pub(super) left_parked: u64,
    /// Sessions of which pages stayed, and those that found some when they came back.
    pub(super) homes: u64,
    pub(super) returns: u64,
}

/// What goes wrong in a step.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mishaps {
    /// Parking does.
    pub(super) park: bool,
    /// Coming back from host memory does.
    pub(super) unpark: bool,
    /// Homes do not answer rows whose session has an odd number, or those with an even one.
    pub(super) faults: [bool; 2],
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
    pub(super) next_id: u64,
    pub(super) device: Device,
    /// Sessions that went elsewhere.
    pub(super) away: Vec<Away>,
    /// Home entries by key: the family whose pages they are.
    pub(super) homes: BTreeMap<u64, u64>,
    pub(super) reserved: BTreeSet<TaskId>,
    pub(super) seen: Seen,
    /// Plans in a row that moved sessions but had no row.
    rowless: u32,
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
            device: Device::default(),
            away: Vec::new(),
            homes: BTreeMap::new(),
            reserved: BTreeSet::new(),
            seen: Seen::default(),
            rowless: 0,
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
            let work = Work { length: arrival.prompt, output: arrival.output, score: arrival.score, family: ids[0].0 };
            self.work.insert(*id, work);
        }
        Some(ids)
    }

    pub(super) fn cancel(&mut self, id: TaskId) {
        if self.work.remove(&id).is_some() {
            let removed = self.scheduler.remove(id).unwrap().expect("a session with work is known");
            removed.parked.into_iter().for_each(|key| self.device.drop_parked(key));
            self.check();
        }
    }

    pub(super) fn status(&self, id: TaskId) -> Status {
        self.scheduler.session(id).unwrap().status
    }

    /// Plans a step, checks it, and does it.
    pub(super) fn step(&mut self, mishaps: Mishaps) -> Plan {
        let queued_before: Vec<Rank> = self.scheduler.queue.iter().copied().collect();
        let plan = self.scheduler.plan().unwrap();
        self.steps += 1;
        self.preemptions += plan.parks.len() as u64;
        self.scheduler.audit().unwrap();
        self.check_limits(&plan);
        self.check_rows(&plan);
        self.check_copies(&plan);
        self.check_service(&plan);
        self.check_order(&plan, &queued_before);
        self.check_progress(&plan);
        self.carry_out(&plan, mishaps);
        self.check();
        plan
    }

    /// Accounts add up, and slots and pages hold what they should.
    pub(super) fn check(&self) {
        self.scheduler.audit().unwrap();
        for task in self.scheduler.tasks.values() {
            if let Place::Running { slots, .. } = &task.place {
                let family = self.work[&task.id].family;
                self.device.check(family, task.computed, slots.read, &task.latents);
            }
        }
        assert_eq!(self.scheduler.occupancy().homes, self.homes.len() as u64);
        for (key, family) in &self.homes {
            for (number, page) in self.scheduler.homes[key].numbered() {
                self.device.check_page(page, *family, number, (number + 1) * PAGE_TOKENS as u64);
            }
        }
    }

    /// Steps until everything is done, at most `bound` times.
    pub(super) fn finish(&mut self, bound: u64) {
        for _ in 0..bound {
            if self.work.is_empty() {
                break;
            }
            self.step(Mishaps::default());
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
            assert_eq!(row.remote, task.latents.is_remote());
            assert_eq!(row.remote, row.write_slot != row.read_slot, "a step with latents elsewhere is a transaction");
            assert!(!row.remote || row.tokens <= REMOTE_ROW_TOKENS);
            assert!(!self.scheduler.stands_still(task), "a row for one that stands still: {task:?}");
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

    /// Nobody is passed over without reason: decodes get their token, and the oldest prefill its chunk, while there are pages and
    /// prompts need not wait for those that decode.
    fn check_service(&self, plan: &Plan) {
        let pages_left = self.scheduler.pages.free() > 0;
        let has_row = |id: TaskId| plan.rows.iter().any(|row| row.task == id);
        let waits = self.prompts_wait();
        let mut best_prefill_seen = false;
        for task in self.scheduler.running_tasks() {
            let unparked = plan.unparks.iter().any(|unpark| unpark.task == task.id);
            let needs_page = task.latents.capacity() <= task.computed;
            if task.decodes() {
                assert!(has_row(task.id) || (needs_page && !pages_left), "decode passed over: {task:?}");
            } else if !best_prefill_seen {
                best_prefill_seen = true;
                let waits_to_fork = task.forks_now() && unparked;
                assert!(
                    has_row(task.id) || waits || waits_to_fork || (needs_page && !pages_left),
                    "passed over: {task:?}"
                );
            }
        }
    }

    /// Better tasks are admitted first, except that one which does not fit is overtaken a bounded number of times; that is
    /// not counted while those who stand still keep it out.
    fn check_order(&mut self, plan: &Plan, queued_before: &[Rank]) {
        let still = self.scheduler.count_still();
        for better in queued_before {
            if plan.admitted.contains(&better.id) {
                self.overtaken.remove(&better.id);
                continue;
            }
            if !self.scheduler.could_run(&self.scheduler.tasks[&better.id], &still) {
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

    /// Whether prompts wait for those that decode.
    fn prompts_wait(&self) -> bool {
        self.scheduler.prompts_wait && self.scheduler.decodes_prevail()
    }

    /// The best running task has a row, unless it waits for those that decode, all pages are with those that stand still, or it just
    /// came back and forks in the next step; and nothing goes back and forth without one.
    fn check_progress(&mut self, plan: &Plan) {
        let has_row = |id: TaskId| plan.rows.iter().any(|row| row.task == id);
        if let Some(best) = self.scheduler.running.first().filter(|best| !has_row(best.id)) {
            let others_keep = self.scheduler.pages.free() == 0 && self.scheduler.count_still().pages > 0;
            let is_back = plan.unparks.iter().any(|unpark| unpark.task == best.id);
            assert!(others_keep || is_back || self.prompts_wait(), "no row for {best:?}: {plan:?}");
            self.seen.waits += u64::from(others_keep);
        }
        let moves_only = plan.rows.is_empty() && !plan.is_empty();
        self.rowless = if moves_only { self.rowless + 1 } else { 0 };
        assert!(self.rowless <= 1, "the plans move sessions and run nothing: {plan:?}");
        let was_nothing_to_run = |task: &Task| self.scheduler.stands_still(task) || !has_row(task.id);
        assert!(!plan.is_empty() || self.scheduler.tasks.values().all(was_nothing_to_run));
    }

    fn carry_out(&mut self, plan: &Plan, mishaps: Mishaps) {
        for (id, _) in &plan.evicted {
            self.evict(*id);
        }
        for park in &plan.parks {
            self.seen.remote_parks += u64::from(self.scheduler.tasks[&park.task].latents.is_remote());
            self.device.park(park);
            if mishaps.park {
                self.device.drop_parked(park.key);
                if self.scheduler.park_failed(park.task).is_err() {
                    self.evict(park.task);
                }
            }
        }
        let mut lost = BTreeSet::new();
        for unpark in &plan.unparks {
            if mishaps.unpark {
                self.device.drop_parked(unpark.key);
                lost.insert(unpark.task);
                if self.scheduler.restart(unpark.task).unwrap().never.is_some() {
                    self.evict(unpark.task);
                }
            } else {
                self.device.unpark(unpark);
            }
        }
        self.device.clear_and_copy(plan);
        for row in plan.rows.iter().filter(|row| !lost.contains(&row.task)) {
            let Some(work) = self.work.get_mut(&row.task) else { panic!("a row for a removed session") };
            let is_faulty = row.remote && mishaps.faults[row.task.0 as usize % 2];
            self.device.run(row, work.family, is_faulty);
            self.seen.remote_rows += u64::from(row.remote);
            if is_faulty {
                self.seen.faults += 1;
                continue;
            }
            self.scheduler.advance(row.task, row.tokens);
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

    /// A session that can never be computed again here ends.
    pub(super) fn evict(&mut self, id: TaskId) {
        self.seen.evicted += 1;
        self.work.remove(&id).expect("a session with work");
        assert_eq!(self.scheduler.remove(id).unwrap().unwrap().parked, None);
    }
}
