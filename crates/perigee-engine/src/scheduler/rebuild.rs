//! Latents that nobody has any more, computed again beside their session: a *scratch* task feeds the session's tokens from
//! the first one on into a slot and pages of its own, under the token budget like a prompt, and draws nothing. The session
//! stands still meanwhile and keeps its state; in the end the scratch's pages take the places of all that was elsewhere.
//! All pages are taken in the beginning, so that a session which stands still waits for nobody.

use super::Scheduler;
use super::task::{Place, Task};
use super::types::{Plan, Rank, TaskId};
use crate::cache::{CacheError, Latents, SlotPair};

impl Scheduler {
    /// Begins to compute again what a running session has elsewhere; `scratch` is a new id. False, and nothing is changed,
    /// where there is no slot, or too few pages are spare.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn begin_rebuild(&mut self, id: TaskId, scratch: TaskId) -> Result<bool, CacheError> {
        let task = self.tasks.get(&id).filter(|task| !task.frozen && task.followers.is_empty());
        let Some(task) = task.filter(|task| matches!(task.place, Place::Running { .. })).cloned() else {
            return Ok(false);
        };
        let Some(end) = task.latents.remote_ranges().map(|(_, range)| range.end).last() else { return Ok(false) };
        let spare = self.spare_pages(self.running_sessions().max(1), self.promised_pages());
        let needed = Latents::new().missing_for(end);
        let has_room = self.seated_sessions() < self.limits.max_running() && needed as u64 <= spare;
        if !has_room || self.is_rebuilding(id) {
            return Ok(false);
        }
        let Some(slot) = self.slots.allocate() else { return Ok(false) };
        let Some(pages) = self.pages.allocate_many(needed) else {
            self.slots.release(slot)?;
            return Ok(false);
        };
        self.drop_following(id)?;
        let mut latents = Latents::new();
        pages.into_iter().for_each(|page| latents.append(page));
        let place = Place::Running { slots: SlotPair::in_place(slot), reserved: Vec::new() };
        let scratch =
            Task { is_scratch: true, length: end, most: end, scored: 0, ..task.fork(scratch, 0, latents, place) };
        self.rebuilds.insert(id, scratch.id);
        self.running.insert(scratch.rank());
        self.tasks.insert(scratch.id, scratch);
        self.hold(id);
        Ok(true)
    }

    /// Whether a session's latents are being computed again.
    pub fn is_rebuilding(&self, id: TaskId) -> bool {
        self.rebuilds.contains_key(&id)
    }

    /// The session for which a scratch task works; the task itself where it is none.
    pub fn session_of(&self, id: TaskId) -> TaskId {
        let found = self.rebuilds.iter().find(|(_, scratch)| **scratch == id);
        found.map_or(id, |(session, _)| *session)
    }

    /// A session whose scratch has computed everything: its latents are all here from the next plan on, and it goes on.
    /// Returned is whether it was that one's turn.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn end_rebuild(&mut self, id: TaskId) -> Result<bool, CacheError> {
        let scratch = self.rebuilds.get(&id).and_then(|scratch| self.tasks.get(scratch));
        let Some(scratch) = scratch.filter(|scratch| scratch.computed == scratch.length).cloned() else {
            return Ok(false);
        };
        let lost = || CacheError::Unbalanced(format!("session {} is gone while its latents are computed", id.0));
        let pages: Vec<u32> = scratch.latents.local_pages().collect();
        let task = self.tasks.get_mut(&id).ok_or_else(lost)?;
        let remote: Vec<(u64, u64)> = task.latents.remote_segments().collect();
        for (first, count) in remote {
            let taken = pages.get(first as usize..(first + count) as usize).ok_or_else(lost)?;
            for &page in taken {
                self.pages.share(page)?;
            }
            task.latents.localise(first, taken.to_vec());
        }
        let Place::Running { slots, .. } = &mut task.place else { return Err(lost()) };
        let shadow = slots.has_shadow().then_some(slots.write);
        *slots = SlotPair::in_place(slots.read);
        self.release_slots(shadow.into_iter())?;
        self.cancel_rebuild(id)?;
        Ok(true)
    }

    /// What was computed again for a session is given up, and the session goes on as it was.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn cancel_rebuild(&mut self, id: TaskId) -> Result<(), CacheError> {
        let Some(scratch) = self.rebuilds.remove(&id) else { return Ok(()) };
        if let Some(mut scratch) = self.tasks.remove(&scratch) {
            self.unlist(scratch.rank());
            self.strip(&mut scratch)?;
        }
        self.unhold(id);
        Ok(())
    }

    /// Somebody better needs a scratch's pages: its session starts over, since it cannot go on either.
    pub(super) fn preempt_rebuild(&mut self, scratch: Rank, plan: &mut Plan) -> Result<(), CacheError> {
        let id = self.session_of(scratch.id);
        self.cancel_rebuild(id)?;
        let restarted = self.restart(id)?;
        match restarted.never {
            None => plan.restarts.push(id),
            Some(never) => plan.evicted.push((id, never)),
        }
        Ok(())
    }
}
