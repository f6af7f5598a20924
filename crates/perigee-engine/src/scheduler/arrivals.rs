//! Room for sessions that come from elsewhere, and for pages of those that went: reservations, adoption, home entries. It
//! preempts nobody and takes no part in planning.

use std::time::Instant;

use super::Scheduler;
use super::moves::Released;
use super::task::{Place, Task};
use super::types::{NeverFits, TaskId};
use crate::cache::{CacheError, HomePages, Latents, SlotPair};

/// A session as it arrives: what the handoff said, in slot and pages reserved for it.
#[derive(Debug, Clone)]
pub struct Adopted {
    /// Larger goes first.
    pub priority: i32,
    /// When nobody wants it any more.
    pub deadline: Option<Instant>,
    /// Tokens known.
    pub length: u64,
    /// Most positions that it may ever compute.
    pub most: u64,
    /// Tokens covered by its state and latents.
    pub computed: u64,
    /// Positions from the start whose prompt logits were had.
    pub scored: u64,
    /// Whether prompt logits are still wanted; then nothing was drawn yet.
    pub prompt_logits: bool,
    /// Where its latents are: local pages are reserved ones or those of `home`.
    pub latents: Latents,
    /// Pages that were a home entry of this session here, see [`Scheduler::take_home`].
    pub home: Option<HomePages>,
}

/// What is held for a session whose handoff is on its way.
#[derive(Debug)]
pub(super) struct Reservation {
    slots: SlotPair,
    pages: Vec<u32>,
}

impl Scheduler {
    /// A slot for a session that arrives, two if its steps will be transactions (`shadow`). It passes those that queue, as a
    /// later task may: the same number of times. None: full.
    pub fn reserve(&mut self, id: TaskId, shadow: bool) -> Option<SlotPair> {
        let is_known = self.tasks.contains_key(&id) || self.leaders.contains_key(&id);
        if is_known || self.reservations.contains_key(&id) || self.seated_sessions() >= self.limits.max_running() {
            return None;
        }
        let queued: Vec<TaskId> = self.queue.iter().map(|rank| rank.id).collect();
        let mut still = None;
        if queued.iter().any(|id| self.may_not_be_passed(*id, &mut still)) {
            return None;
        }
        let slots = self.slots.allocate_pair(shadow)?;
        self.count_overtaken(&queued);
        self.reservations.insert(id, Reservation { slots, pages: Vec::new() });
        Some(slots)
    }

    /// Pages for a session with a reservation: all or none. They are taken from nobody, and while something runs, those that
    /// it still needs for the tokens it knows stay free.
    pub fn reserve_pages(&mut self, id: TaskId, count: usize) -> Option<Vec<u32>> {
        let running = self.running_sessions();
        let available = match running {
            0 => self.pages.free() as u64,
            _ => self.spare_pages(running, self.promised_pages()),
        };
        let reservation = self.reservations.get_mut(&id)?;
        if count as u64 > available {
            return None;
        }
        let pages = self.pages.allocate_many(count)?;
        reservation.pages.extend(&pages);
        Some(pages)
    }

    /// Gives back what was reserved; nothing where nothing is.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn cancel_reserve(&mut self, id: TaskId) -> Result<Released, CacheError> {
        let Some(Reservation { slots, pages }) = self.reservations.remove(&id) else { return Ok(Released::default()) };
        let slots: Vec<u32> = slots.slots().collect();
        self.release_slots(slots.iter().copied())?;
        Ok(Released { slots, pages: self.release_pages(pages.into_iter())?, ..Released::default() })
    }

    /// The reserved session is a frozen one from now on; [`Self::thaw`] lets it run. One whose latents are all here gives
    /// its shadow slot back, and pages that it does not name are free.
    ///
    /// # Errors
    /// [`CacheError`] if nothing is reserved, or not what the session names; inside, [`NeverFits`] if it can grow beyond what
    /// this replica holds: then only the pages of `home` have become part of the reservation.
    pub fn adopt(&mut self, id: TaskId, session: Adopted) -> Result<Result<(), NeverFits>, CacheError> {
        let Some(mut reservation) = self.reservations.remove(&id) else {
            return Err(unfit(id, "arrives without a reservation"));
        };
        reservation.pages.extend(session.home.iter().flat_map(HomePages::iter));
        let most = session.most.max(session.length);
        if let Err(never) = self.limits.check_arrival(most, session.latents.remote_positions()) {
            self.reservations.insert(id, reservation);
            return Ok(Err(never));
        }
        if session.computed >= session.length || session.latents.capacity() < session.computed {
            return Err(unfit(id, "arrives with more computed than it has tokens or latents for"));
        }
        let Reservation { slots, pages } = reservation;
        // A mark for each page of the pool, not a set of its own ones: its client waits, and it may have thousands.
        let mut unnamed = vec![false; self.pages.total()];
        for &page in &pages {
            unnamed.get_mut(page as usize).into_iter().for_each(|mark| *mark = true);
        }
        let mut take = |page: u32| unnamed.get_mut(page as usize).is_some_and(std::mem::take);
        if !session.latents.local_pages().all(&mut take) {
            return Err(unfit(id, "names pages that are not its own"));
        }
        self.release_pages(pages.into_iter().filter(|page| take(*page)))?;
        let slots = self.fit_shadow(id, slots, session.latents.is_remote())?;
        self.deadlines.extend(session.deadline.map(|deadline| (deadline, id)));
        let task = Task {
            id,
            followers: Vec::new(),
            priority: session.priority,
            arrival: self.arrivals,
            deadline: session.deadline,
            frozen: true,
            is_scratch: false,
            length: session.length,
            most,
            computed: session.computed,
            // Nothing is drawn before all prompt logits are there, so the last token known is the prompt's.
            barrier: session.prompt_logits.then(|| session.length.saturating_sub(1)),
            prompt_logits: session.prompt_logits,
            scored: session.scored,
            overtaken: 0,
            latents: session.latents,
            place: Place::Running { slots, reserved: Vec::new() },
        };
        self.arrivals += 1;
        self.tasks.insert(id, task);
        Ok(Ok(()))
    }

    /// Takes over references to the pages of a session that went, under a key.
    pub fn keep_home(&mut self, key: u64, pages: HomePages) {
        // Keys are not used twice; if one were, no reference would be lost.
        self.homes.entry(key).or_default().pages.extend(pages.pages);
    }

    /// The pages of a home entry.
    pub fn home(&self, key: u64) -> Option<&HomePages> {
        self.homes.get(&key)
    }

    /// Hands out the references of a home entry.
    pub fn take_home(&mut self, key: u64) -> Option<HomePages> {
        self.homes.remove(&key)
    }

    /// Frees a home entry; returned are the pages that nobody else refers to.
    ///
    /// # Errors
    /// [`CacheError`] if the accounts are broken.
    pub fn free_home(&mut self, key: u64) -> Result<Vec<u32>, CacheError> {
        let pages = self.take_home(key).unwrap_or_default();
        self.release_pages(pages.iter())
    }

    /// Pages of reservations, of what follows, and of home entries.
    pub(super) fn kept_pages(&self) -> impl Iterator<Item = u32> + '_ {
        let reserved = self.reservations.values().flat_map(|reservation| reservation.pages.iter().copied());
        let following = self.following.values().flatten().copied();
        reserved.chain(following).chain(self.homes.values().flat_map(HomePages::iter))
    }

    pub(super) fn reserved_slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.reservations.values().flat_map(|reservation| reservation.slots.slots())
    }

    /// A session's slots as its latents ask for them.
    fn fit_shadow(&mut self, id: TaskId, slots: SlotPair, shadow: bool) -> Result<SlotPair, CacheError> {
        match (slots.has_shadow(), shadow) {
            (true, false) => {
                self.slots.release(slots.write)?;
                Ok(SlotPair::in_place(slots.read))
            }
            (false, true) => match self.slots.allocate() {
                Some(write) => Ok(SlotPair { write, ..slots }),
                None => Err(unfit(id, "has latents elsewhere and no second slot was reserved")),
            },
            _ => Ok(slots),
        }
    }
}

fn unfit(id: TaskId, what: &str) -> CacheError {
    CacheError::Unbalanced(format!("session {} {what}", id.0))
}
