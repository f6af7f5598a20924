//! The rows of a step that begins before the one in flight is read: those of that step again, each a token on. It preempts
//! nobody, admits nobody and changes nothing but pages that rows grow into; where that is not enough, the step is planned when the
//! one in flight is done.

use super::Scheduler;
use super::task::{Place, Task};
use super::types::{PlannedRow, TaskId};

impl Scheduler {
    /// The rows that follow `rows`, which are in flight and draw a token each, every one with the index of the row that it
    /// follows. Sessions that end with the step in flight, as far as is known, have none. None at all where anything but these
    /// rows could be planned, or the step needs room that is not free.
    pub fn plan_ahead(&mut self, rows: &[PlannedRow]) -> Option<Vec<(u32, PlannedRow)>> {
        if self.may_admit() || !self.following.is_empty() || !self.rebuilds.is_empty() {
            return None;
        }
        let here = |row: &&PlannedRow| self.is_before(row.task, row);
        if rows.iter().filter(here).count() != self.running.len() {
            return None;
        }
        let goes_on =
            |row: &&PlannedRow| here(row) && self.tasks.get(&row.task).is_some_and(|task| row.end() < task.most);
        let next: Vec<(u32, TaskId)> =
            (0..).zip(rows).filter(|(_, row)| goes_on(row)).map(|(index, row)| (index, row.task)).collect();
        let missing = |task: &Task| task.latents.missing_for(task.computed + 2);
        let tasks = next.iter().filter_map(|(_, id)| self.tasks.get(id));
        if next.is_empty() || tasks.map(missing).sum::<usize>() > self.pages.free() {
            return None;
        }
        let mut planned = Vec::with_capacity(next.len());
        for (index, id) in next {
            let task = self.tasks.get_mut(&id)?;
            for page in (0..missing(task)).map_while(|_| self.pages.allocate()) {
                task.latents.append(page);
            }
            let Place::Running { slots, .. } = &task.place else { return None };
            let (position, end) = (task.computed + 1, task.computed + 2);
            let segments = task.latents.row_segments(end);
            let (read_slot, write_slot) = (slots.read, slots.write);
            let (tokens, remote, draws, prompt_logits_from) = (1, false, true, None);
            let row = PlannedRow {
                task: id,
                position,
                tokens,
                read_slot,
                write_slot,
                segments,
                remote,
                draws,
                prompt_logits_from,
            };
            planned.push((index, row));
        }
        Some(planned)
    }

    /// Whether a session is where it was when this decode row of it was planned: the row is what it waits for.
    pub fn is_before(&self, id: TaskId, row: &PlannedRow) -> bool {
        self.tasks.get(&id).is_some_and(|task| {
            let in_place = matches!(&task.place, Place::Running { slots, .. } if slots.read == slots.write);
            let is_plain = in_place && !task.frozen && !task.is_scratch && !task.latents.is_remote();
            is_plain && task.followers.is_empty() && task.computed == row.position && task.length == row.end()
        })
    }

    /// Whether a queued task may have to be let in.
    fn may_admit(&self) -> bool {
        !self.queue.is_empty() && self.slots.free() > 0 && self.seated_sessions() < self.limits.max_running()
    }
}
