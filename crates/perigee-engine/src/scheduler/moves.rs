//! Sessions that stand still because they leave: freezing, splitting off a shared prefill, giving up. It moves nothing
//! itself and knows no epochs: what it hands out, the engine exports.

use perigee_backend::PAGE_TOKENS;

use super::Scheduler;
use super::task::{Place, Task};
use super::types::TaskId;
use crate::cache::{CacheError, HomePages, Latents, SlotPair};

/// Copies to run at once, so that a session which shared a prefill stands alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FreezeCopies {
    /// Slot copies (from, to).
    pub slots: Vec<(u32, u32)>,
    /// Page copies (from, to).
    pub pages: Vec<(u32, u32)>,
    /// The session that goes on with the prefill, where the frozen one shared it: both have the prompt's log-probabilities
    /// that were had so far.
    pub shared_with: Option<TaskId>,
    /// Whether that one only now takes over the prefill, which the frozen session led before.
    pub is_heir: bool,
}

/// Why a session cannot be frozen now. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FreezeRefused {
    /// It is not here.
    #[error("the session is not here")]
    NotHere,
    /// It shares a prefill and there is no page for its own copy of the last one; later there may be.
    #[error("there is no free page for the session's own copy of its last page")]
    NoPage,
}

/// Where a session's state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateAt {
    /// In a state slot.
    Slot(u32),
    /// In host memory, with its local pages, under this key.
    Parked(u64),
    /// Nowhere: nothing is computed yet.
    Empty,
}

/// A session that stands still.
#[derive(Debug, Clone, Copy)]
pub struct FrozenView<'a> {
    /// Where its state is.
    pub state: StateAt,
    /// Tokens covered by state and latents.
    pub computed: u64,
    /// Tokens known.
    pub length: u64,
    /// Positions from the start whose prompt logits were had.
    pub scored: u64,
    /// Where its latents are. While it is parked the pages have no numbers, only a count.
    pub latents: &'a Latents,
    /// Whether prompt logits are still wanted.
    pub prompt_logits: bool,
}

/// What a session or a reservation held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Released {
    /// Slots that are free now.
    pub slots: Vec<u32>,
    /// Pages that are free now: nobody else refers to them.
    pub pages: Vec<u32>,
    /// Pages that were to be kept; their references are the caller's, to be handed to [`Scheduler::keep_home`].
    pub home: HomePages,
    /// Its copy in host memory, to be dropped.
    pub parked: Option<u64>,
}

impl Scheduler {
    /// The session stands still from now on: it keeps what it holds and gets no row until [`Self::thaw`]; pages that its
    /// latents were being brought into are free. One that shares a
    /// prefill leaves it first, with copies of its own of what is computed; if that is in host memory, it leaves with
    /// nothing and the others keep it.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken; inside, [`FreezeRefused`].
    pub fn freeze(&mut self, id: TaskId) -> Result<Result<FreezeCopies, FreezeRefused>, CacheError> {
        let leader = self.leaders.get(&id).copied().unwrap_or(id);
        self.drop_following(id)?;
        self.cancel_rebuild(id)?;
        let Some(task) = self.tasks.get_mut(&leader).filter(|task| task.place != Place::Evicted) else {
            return Ok(Err(FreezeRefused::NotHere));
        };
        if task.followers.is_empty() {
            task.frozen = true;
            let rank = task.rank();
            self.unlist(rank);
            return Ok(Ok(FreezeCopies::default()));
        }
        let is_shared = matches!(task.place, Place::Running { .. });
        if is_shared && task.computed % PAGE_TOKENS as u64 != 0 && self.pages.free() == 0 {
            return Ok(Err(FreezeRefused::NoPage));
        }
        let stays = self.leave_group(leader, id);
        let mut copies = FreezeCopies { shared_with: Some(stays), is_heir: leader == id, ..FreezeCopies::default() };
        let split = self.split(stays, id, &mut copies)?;
        self.tasks.insert(id, Task { frozen: true, ..split });
        self.list(stays);
        Ok(Ok(copies))
    }

    /// A frozen session goes on.
    pub fn thaw(&mut self, id: TaskId) {
        if let Some(task) = self.tasks.get_mut(&id) {
            task.frozen = false;
            self.list(id);
        }
    }

    /// A frozen session, if it is one.
    pub fn frozen(&self, id: TaskId) -> Option<FrozenView<'_>> {
        let task = self.tasks.get(&id).filter(|task| task.frozen)?;
        Some(FrozenView {
            state: match &task.place {
                Place::Running { slots, .. } if task.computed > 0 => StateAt::Slot(slots.read),
                Place::Parked { key, .. } => StateAt::Parked(*key),
                _ => StateAt::Empty,
            },
            computed: task.computed,
            length: task.length,
            scored: task.scored,
            latents: &task.latents,
            prompt_logits: task.wants_prompt_logits(),
        })
    }

    /// Ends a frozen session: all that it held is free, except, with `keep`, its full local pages. None if it is not
    /// frozen here.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn release(&mut self, id: TaskId, keep: bool) -> Result<Option<Released>, CacheError> {
        let Some(mut task) = self.tasks.remove(&id) else { return Ok(None) };
        if !task.frozen {
            self.tasks.insert(id, task);
            return Ok(None);
        }
        self.held.remove(&id);
        self.forget_deadline(task.deadline, id);
        if !matches!(task.place, Place::Running { .. }) {
            let parked = self.strip(&mut task)?;
            return Ok(Some(Released { parked, ..Released::default() }));
        }
        let slots: Vec<u32> = task.slots().collect();
        self.release_slots(slots.iter().copied())?;
        let home = if keep { task.latents.home_pages(task.computed) } else { HomePages::default() };
        let full = if keep { task.computed / PAGE_TOKENS as u64 } else { 0 };
        let rest = task.latents.numbered_local_pages().skip_while(|(number, _)| *number < full);
        let pages = self.release_pages(rest.map(|(_, page)| page))?;
        Ok(Some(Released { slots, pages, home, parked: None }))
    }

    /// The session keeps everything, in whatever place it is, and gets no row until [`Self::unhold`]. One that has not forked
    /// yet holds back those that it shares a prefill with.
    pub fn hold(&mut self, id: TaskId) {
        if let Some(task) = self.tasks.get(self.leaders.get(&id).unwrap_or(&id)) {
            let rank = task.rank();
            self.held.insert(id);
            self.unlist(rank);
        }
    }

    /// Ends [`Self::hold`].
    pub fn unhold(&mut self, id: TaskId) {
        if self.held.remove(&id) {
            self.list(self.leaders.get(&id).copied().unwrap_or(id));
        }
    }

    /// Takes a session out of a task of several, whose state stays with the others: the task's leader now.
    fn leave_group(&mut self, leader: TaskId, id: TaskId) -> TaskId {
        if leader != id {
            self.leaders.remove(&id);
            if let Some(task) = self.tasks.get_mut(&leader) {
                task.followers.retain(|&follower| follower != id);
            }
            return leader;
        }
        match self.tasks.remove(&leader) {
            Some(task) => {
                self.unlist(task.rank());
                self.enthrone_heir(task)
            }
            None => leader,
        }
    }

    /// A task for a session that left the one which `stays`: with copies where that runs, in the slot that was reserved.
    fn split(&mut self, stays: TaskId, id: TaskId, copies: &mut FreezeCopies) -> Result<Task, CacheError> {
        let Some(task) = self.tasks.get_mut(&stays) else { return Err(no_such_task(stays)) };
        let reserved = task.take_reserved();
        let (Place::Running { slots, .. }, Some(slot)) = (&task.place, reserved) else {
            return Ok(task.split(id, 0, Latents::new(), Place::Queued));
        };
        if task.computed == 0 {
            let split = task.split(id, 0, Latents::new(), Place::Queued);
            self.slots.release(slot)?;
            return Ok(split);
        }
        let (mut latents, partial) = task.latents.fork(task.computed);
        for shared in latents.local_pages() {
            self.pages.share(shared)?;
        }
        if let Some(partial) = partial {
            let page = self.pages.allocate().ok_or_else(|| CacheError::Unbalanced("a free page is gone".into()))?;
            latents.append(page);
            copies.pages.push((partial, page));
        }
        copies.slots.push((slots.read, slot));
        let place = Place::Running { slots: SlotPair::in_place(slot), reserved: Vec::new() };
        Ok(task.split(id, task.computed, latents, place))
    }
}

fn no_such_task(id: TaskId) -> CacheError {
    CacheError::Unbalanced(format!("task {} is gone", id.0))
}
