//! Whether the accounts of slots, pages and park memory add up with what tasks, reservations and home entries hold, and
//! the lists with the tasks. It changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::Scheduler;
use super::task::{Place, Task};
use super::types::{Rank, TaskId};
use crate::cache::CacheError;

impl Scheduler {
    /// Checks every account against every holder.
    ///
    /// # Errors
    /// [`CacheError`] says what does not add up.
    pub fn audit(&self) -> Result<(), CacheError> {
        let on_device = self.tasks.values().filter(|task| !matches!(task.place, Place::Parked { .. }));
        self.pages.audit(on_device.flat_map(|task| task.latents.local_pages()).chain(self.kept_pages()))?;
        self.slots.audit(self.tasks.values().flat_map(Task::slots).chain(self.reserved_slots()))?;
        let parked_bytes = self.tasks.values().map(|task| match task.place {
            Place::Parked { bytes, .. } => bytes,
            _ => 0,
        });
        self.parked.audit(parked_bytes.sum())?;
        self.audit_lists()?;
        self.audit_names()?;
        self.tasks.values().try_for_each(audit_task)
    }

    fn audit_lists(&self) -> Result<(), CacheError> {
        let ranks = |belongs: fn(&Place) -> bool| {
            let listed = move |task: &&Task| belongs(&task.place) && !self.stands_still(task);
            self.tasks.values().filter(listed).map(Task::rank).collect::<BTreeSet<Rank>>()
        };
        let running = ranks(|place| matches!(place, Place::Running { .. }));
        let queue = ranks(|place| matches!(place, Place::Queued | Place::Parked { .. }));
        if running != self.running || queue != self.queue {
            return Err(CacheError::Unbalanced("the queue and the running set differ from the tasks".into()));
        }
        let (seated, limit) = (self.seated_sessions(), self.limits.max_running());
        if seated > limit {
            return Err(CacheError::Unbalanced(format!("{seated} sessions have slots, the limit is {limit}")));
        }
        Ok(())
    }

    /// Every name that is noted anywhere is a session's.
    fn audit_names(&self) -> Result<(), CacheError> {
        let followers: BTreeMap<TaskId, TaskId> =
            self.tasks.values().flat_map(|task| task.followers.iter().map(|&follower| (follower, task.id))).collect();
        if followers != self.leaders {
            return Err(CacheError::Unbalanced("followers differ from their tasks'".into()));
        }
        let is_known = |id: &TaskId| self.tasks.contains_key(id) || self.leaders.contains_key(id);
        if let Some(id) = self.held.iter().chain(self.deadlines.iter().map(|(_, id)| id)).find(|id| !is_known(id)) {
            return Err(CacheError::Unbalanced(format!("session {} is noted but not here", id.0)));
        }
        if let Some(id) = self.reservations.keys().find(|id| is_known(id)) {
            return Err(CacheError::Unbalanced(format!("session {} is here and has a reservation", id.0)));
        }
        Ok(())
    }
}

/// A task holds what its place and its latents ask for.
fn audit_task(task: &Task) -> Result<(), CacheError> {
    let unbalanced = |what: &str| Err(CacheError::Unbalanced(format!("task {} {what}", task.id.0)));
    if task.frozen && !task.followers.is_empty() {
        return unbalanced("is frozen and has followers");
    }
    match &task.place {
        Place::Running { reserved, .. } if reserved.len() != task.followers.len() => {
            unbalanced("has not a slot for every follower")
        }
        Place::Running { slots, .. } if slots.has_shadow() != task.latents.is_remote() => {
            unbalanced("has a shadow slot without latents elsewhere, or the reverse")
        }
        Place::Running { .. } | Place::Parked { .. } if task.latents.capacity() < task.computed => {
            unbalanced("has computed positions without a place")
        }
        Place::Queued | Place::Evicted if task.computed > 0 || task.latents.capacity() > 0 => {
            unbalanced("has latents without a state")
        }
        _ => Ok(()),
    }
}
