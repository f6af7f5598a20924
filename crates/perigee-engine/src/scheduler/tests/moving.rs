//! Moves in the model: sessions freeze, go elsewhere and come back, with what they hold at each end.

use std::collections::BTreeMap;

use perigee_migration::segments::{Mode, Place, SegmentTable};
use perigee_migration::{Layout, PAGE_POSITIONS};

use super::harness::{Harness, Work};
use crate::cache::Latents;
use crate::scheduler::{Adopted, FreezeRefused, StateAt, TaskId};

/// A session that runs elsewhere.
#[derive(Debug, Clone)]
pub(super) struct Away {
    pub(super) work: Work,
    pub(super) computed: u64,
    pub(super) scored: u64,
    pub(super) prompt_logits: bool,
    /// What is not with it.
    pub(super) table: SegmentTable,
    /// Key of its home entry here.
    pub(super) home: Option<u64>,
}

/// How a session comes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Return {
    /// Tokens that it went on elsewhere, where it could.
    pub(super) progress: u64,
    pub(super) mode: Mode,
    /// Whether two slots are reserved whatever the table says.
    pub(super) shadow: bool,
    /// Whether it runs at once.
    pub(super) thaw: bool,
}

pub(super) fn place(replica: &str) -> Place {
    Place { replica: replica.into(), incarnation: "1".into(), ranks: 1, layout: Layout::Replicated }
}

impl Away {
    /// A session that was never here.
    pub(super) fn foreign(family: u64, length: u64, output: u64) -> Self {
        Self {
            work: Work { length, output, score: false, family },
            computed: length - 1,
            scored: 0,
            prompt_logits: false,
            table: SegmentTable::new(),
            home: None,
        }
    }

    fn go_on(&mut self, tokens: u64) {
        let decodes = self.computed + 1 == self.work.length && !self.work.score && !self.prompt_logits;
        if decodes {
            let drawn = tokens.min(self.work.output - 1);
            self.work.length += drawn;
            self.work.output -= drawn;
            self.computed += drawn;
        }
    }
}

impl Harness {
    /// Freezes a session, with the copies that it asks for; whether it could.
    pub(super) fn freeze(&mut self, id: TaskId) -> bool {
        let pages_free = self.scheduler.pages.free();
        match self.scheduler.freeze(id).unwrap() {
            Ok(copies) => {
                self.seen.splits += copies.slots.len() as u64;
                self.device.copy(&copies.slots, &copies.pages);
                let frozen = self.scheduler.frozen(id).expect("it was frozen");
                assert_eq!(frozen.length, self.work[&id].length);
                assert_eq!(frozen.state == StateAt::Empty, frozen.computed == 0);
            }
            Err(refused) => assert_eq!((refused, pages_free), (FreezeRefused::NoPage, 0)),
        }
        self.check();
        self.scheduler.frozen(id).is_some()
    }

    /// A frozen session leaves.
    pub(super) fn leave(&mut self, id: TaskId, keep: bool) {
        let Some(frozen) = self.scheduler.frozen(id) else { return };
        let (computed, scored, prompt_logits) = (frozen.computed, frozen.scored, frozen.prompt_logits);
        let is_on_device = !matches!(frozen.state, StateAt::Parked(_));
        let mode = if keep && is_on_device { Mode::Split } else { Mode::Whole };
        let table = frozen.latents.table().hand_over(&place("here"), computed, mode);
        let released = self.scheduler.release(id, keep).unwrap().expect("it was frozen");
        let work = self.work.remove(&id).expect("a frozen session has work");
        self.device.poison(&released.slots, &released.pages);
        released.parked.into_iter().for_each(|key| self.device.drop_parked(key));
        let home = (!released.home.is_empty()).then_some(id.0);
        if let Some(key) = home {
            assert!(keep && is_on_device);
            self.seen.homes += 1;
            self.scheduler.keep_home(key, released.home);
            self.homes.insert(key, work.family);
        }
        self.seen.left_parked += u64::from(!is_on_device);
        self.away.push(Away { work, computed, scored, prompt_logits, table, home });
        self.check();
    }

    pub(super) fn free_home(&mut self, key: u64) {
        self.homes.remove(&key);
        let freed = self.scheduler.free_home(key).unwrap();
        self.device.poison(&[], &freed);
        self.check();
    }

    /// A session comes back, or comes for the first time. None: there is no room, or pages that it counted on are gone.
    pub(super) fn come(&mut self, mut away: Away, how: Return) -> Option<TaskId> {
        away.go_on(how.progress);
        let (id, context) = (TaskId(self.next_id), away.computed);
        self.next_id += 1;
        let arrival = away.table.hand_over(&place("there"), context, how.mode).arrive(&place("here"));
        let slots = self.scheduler.reserve(id, how.shadow || !arrival.table.is_empty())?;
        self.reserved.insert(id);
        self.check();
        let kept: BTreeMap<u64, u32> = away
            .home
            .and_then(|key| self.scheduler.homes.get(&key))
            .map(|home| home.numbered().collect())
            .unwrap_or_default();
        let numbers = |start: u64, end: u64| start / PAGE_POSITIONS..end.div_ceil(PAGE_POSITIONS);
        let returned: Vec<u64> = arrival.returned.iter().flat_map(|range| numbers(range.start, range.end)).collect();
        let due: Vec<u64> = arrival.table.gaps(context).iter().flat_map(|gap| numbers(gap.start, gap.end)).collect();
        let due: Vec<u64> = due.into_iter().filter(|number| !returned.contains(number)).collect();
        let reserved = self.scheduler.reserve_pages(id, due.len());
        self.check();
        let (Some(reserved), true) = (reserved, returned.iter().all(|number| kept.contains_key(number))) else {
            self.cancel_reserve(id);
            return None;
        };
        let due: Vec<(u64, u32)> = due.into_iter().zip(reserved).collect();
        self.device.import(away.work.family, context, slots.read, &due);
        let local = returned.iter().map(|number| (*number, kept[number])).chain(due).collect();
        let latents =
            Latents::assemble(&arrival.table, |_| "there:1".into(), &local, context).expect("every page is there");
        self.adopt(id, away, latents, how.thaw)
    }

    fn adopt(&mut self, id: TaskId, away: Away, latents: Latents, thaw: bool) -> Option<TaskId> {
        let home = away.home.and_then(|key| {
            self.homes.remove(&key);
            self.scheduler.take_home(key)
        });
        let was_home = home.is_some();
        let adopted = Adopted {
            priority: 0,
            deadline: None,
            length: away.work.length,
            most: away.work.length + away.work.output.saturating_sub(1),
            computed: away.computed,
            scored: away.scored,
            prompt_logits: away.prompt_logits,
            latents,
            home,
        };
        if self.scheduler.adopt(id, adopted).unwrap().is_err() {
            self.cancel_reserve(id);
            return None;
        }
        self.reserved.remove(&id);
        self.seen.returns += u64::from(was_home);
        self.work.insert(id, away.work);
        self.check();
        if thaw {
            self.scheduler.thaw(id);
            self.check();
        }
        Some(id)
    }

    pub(super) fn cancel_reserve(&mut self, id: TaskId) {
        self.reserved.remove(&id);
        let released = self.scheduler.cancel_reserve(id).unwrap();
        self.device.poison(&released.slots, &released.pages);
        self.check();
    }

    /// A session's latents are lost: it is computed again, or ends where that cannot be.
    pub(super) fn rebuild(&mut self, id: TaskId) {
        if self.scheduler.restart(id).unwrap().never.is_some() {
            self.evict(id);
        }
        self.check();
    }

    /// Whatever stands still goes on or is given up.
    pub(super) fn settle(&mut self) {
        let ids: Vec<TaskId> = self.work.keys().copied().collect();
        for id in ids {
            self.scheduler.thaw(id);
            self.scheduler.unhold(id);
            self.check();
        }
        while let Some(&id) = self.reserved.first() {
            self.cancel_reserve(id);
        }
        while let Some(&key) = self.homes.keys().next() {
            self.free_home(key);
        }
    }
}
