//! Pages that follow their session: taken before anything is brought into them, and the session's own once a segment is
//! whole. It brings nothing and judges nobody's need; a session that loses its place, or stands still to leave, loses them.

use super::Scheduler;
use super::task::Place;
use super::types::TaskId;
use crate::cache::{CacheError, Home, SlotPair};

impl Scheduler {
    /// Pages to bring a remote segment of a running session into: all or none, one segment at a time. They are taken from
    /// nobody, and only while nobody queues for room.
    pub fn follow(&mut self, id: TaskId, count: usize) -> Option<Vec<u32>> {
        let task = self.tasks.get(&id).filter(|task| !task.frozen && task.latents.is_remote())?;
        let is_running = matches!(task.place, Place::Running { .. });
        if !is_running || self.is_rebuilding(id) || self.following.contains_key(&id) || !self.queue.is_empty() {
            return None;
        }
        let spare = self.spare_pages(self.running_sessions().max(1), self.promised_pages());
        if count == 0 || count as u64 > spare {
            return None;
        }
        let pages = self.pages.allocate_many(count)?;
        self.following.insert(id, pages.clone());
        Some(pages)
    }

    /// The pages that a session's latents are being brought into.
    pub fn following(&self, id: TaskId) -> Option<&[u32]> {
        self.following.get(&id).map(Vec::as_slice)
    }

    /// Nothing more is brought: the pages are free. Returned are those that were.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn drop_following(&mut self, id: TaskId) -> Result<Vec<u32>, CacheError> {
        match self.following.remove(&id) {
            Some(pages) => self.release_pages(pages.into_iter()),
            None => Ok(Vec::new()),
        }
    }

    /// The remote segment that begins at `first_page` is in the pages that were taken for it: from the next plan on it is
    /// local. A session whose latents are all here gives its shadow slot back, which is returned.
    ///
    /// # Errors
    /// [`CacheError`] if nothing was taken for it, or there is no such segment.
    pub fn localise(&mut self, id: TaskId, first_page: u64) -> Result<Option<u32>, CacheError> {
        let unfit = || CacheError::Unbalanced(format!("session {} has no segment at page {first_page} to bring", id.0));
        let pages = self.following.remove(&id).ok_or_else(unfit)?;
        let task = self.tasks.get_mut(&id).ok_or_else(unfit)?;
        if !task.latents.localise(first_page, pages) {
            return Err(unfit());
        }
        let Place::Running { slots, .. } = &mut task.place else { return Err(unfit()) };
        if task.latents.is_remote() || !slots.has_shadow() {
            return Ok(None);
        }
        let shadow = slots.write;
        *slots = SlotPair::in_place(slots.read);
        self.slots.release(shadow)?;
        Ok(Some(shadow))
    }

    /// Whether somebody waits for pages while home entries hold some.
    pub fn is_short_of_pages(&self) -> bool {
        if self.homes.is_empty() {
            return false;
        }
        let free = self.pages.free() as u64;
        let running = self.running_sessions();
        let waits = |rank: &super::types::Rank| {
            let task = self.tasks.get(&rank.id);
            task.is_some_and(|task| {
                task.parked_pages() + task.owed_pages() > self.spare_pages(running, self.promised_pages())
            })
        };
        self.promised_pages() > free || self.queue.first().is_some_and(waits)
    }

    /// The session that would be missed least among those with latents in this run of a replica, if it can be computed anew
    /// here.
    pub fn worst_remote(&self, replica: &str, incarnation: &str) -> Option<TaskId> {
        let is_there = |home: &Home| matches!(home, Home::Remote { replica: name, incarnation: run, .. } if name == replica && run == incarnation);
        let ranks = self.running.iter().chain(&self.queue);
        let tasks = ranks.filter_map(|rank| self.tasks.get(&rank.id));
        let here = tasks.filter(|task| {
            task.latents.segments().iter().any(|segment| is_there(&segment.home))
                && self.limits.check(task.sessions(), task.most).is_ok()
        });
        here.max_by_key(|task| task.rank()).map(|task| task.id)
    }
}
