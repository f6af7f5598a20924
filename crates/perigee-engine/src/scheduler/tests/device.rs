//! What slots, pages and host memory hold, on paper: enough to tell a state or a page that is another session's, of another
//! position, or of a step that did not count.

use std::collections::BTreeMap;

use perigee_backend::PAGE_TOKENS;

use crate::cache::Latents;
use crate::scheduler::{Parking, Plan, PlannedRow};

/// A state after `computed` tokens. Sessions of one request are of a family; new states are of none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    family: Option<u64>,
    computed: u64,
}

/// Latents of the first `filled` positions of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Page {
    family: u64,
    number: u64,
    filled: u64,
}

#[derive(Debug, Default)]
pub(super) struct Device {
    slots: BTreeMap<u32, State>,
    pages: BTreeMap<u32, Page>,
    host: BTreeMap<u64, (State, Vec<Page>)>,
}

impl Device {
    /// Cache work of a plan, apart from unparks, in its order.
    pub(super) fn park(&mut self, park: &Parking) {
        let pages = park.pages.iter().map(|page| self.pages[page]).collect();
        self.host.insert(park.key, (self.slots[&park.slot], pages));
    }

    pub(super) fn unpark(&mut self, unpark: &Parking) {
        let (state, pages) = self.host.remove(&unpark.key).expect("a session comes back that was parked");
        assert_eq!(pages.len(), unpark.pages.len());
        self.slots.insert(unpark.slot, state);
        self.pages.extend(unpark.pages.iter().copied().zip(pages));
    }

    pub(super) fn drop_parked(&mut self, key: u64) {
        assert!(self.host.remove(&key).is_some(), "copy {key} is not in host memory");
    }

    pub(super) fn clear_and_copy(&mut self, plan: &Plan) {
        for slot in &plan.clear_slots {
            self.slots.insert(*slot, State { family: None, computed: 0 });
        }
        self.copy(&plan.copy_slots, &plan.copy_pages);
    }

    pub(super) fn copy(&mut self, slots: &[(u32, u32)], pages: &[(u32, u32)]) {
        for (from, to) in slots {
            self.slots.insert(*to, self.slots[from]);
        }
        for (from, to) in pages {
            self.pages.insert(*to, self.pages[from]);
        }
    }

    /// Runs a row; what a faulty one wrote is worth nothing.
    pub(super) fn run(&mut self, row: &PlannedRow, family: u64, is_faulty: bool) {
        let tokens = PAGE_TOKENS as u64;
        let state = self.slots[&row.read_slot];
        assert_eq!(state.computed, row.position, "{row:?} reads {state:?}");
        assert!(state.family == Some(family) || (state.family.is_none() && row.position == 0), "{row:?}: {state:?}");
        for segment in &row.segments {
            for (number, page) in (segment.start / tokens..).zip(&segment.pages) {
                self.check_page(*page, family, number, row.position);
                let end = if is_faulty { row.position } else { row.end() };
                let filled = end.saturating_sub(number * tokens).min(tokens);
                self.pages.insert(*page, Page { family, number, filled });
            }
        }
        match is_faulty {
            true => self.slots.remove(&row.write_slot),
            false => self.slots.insert(row.write_slot, State { family: Some(family), computed: row.end() }),
        };
    }

    /// A state arrives from elsewhere, with pages by number.
    pub(super) fn import(&mut self, family: u64, computed: u64, slot: u32, pages: &[(u64, u32)]) {
        self.slots.insert(slot, State { family: Some(family), computed });
        for &(number, page) in pages {
            let filled = (computed - number * PAGE_TOKENS as u64).min(PAGE_TOKENS as u64);
            self.pages.insert(page, Page { family, number, filled });
        }
    }

    /// What was there is gone: whoever still reads it is found out.
    pub(super) fn poison(&mut self, slots: &[u32], pages: &[u32]) {
        self.slots.retain(|slot, _| !slots.contains(slot));
        self.pages.retain(|page, _| !pages.contains(page));
    }

    /// A session's state and latents are where they are said to be.
    pub(super) fn check(&self, family: u64, computed: u64, slot: u32, latents: &Latents) {
        if computed > 0 {
            assert_eq!(self.slots.get(&slot), Some(&State { family: Some(family), computed }), "slot {slot}");
        }
        for (number, page) in latents.numbered_local_pages() {
            self.check_page(page, family, number, computed);
        }
    }

    /// The page holds what a session with `computed` positions has in it.
    pub(super) fn check_page(&self, page: u32, family: u64, number: u64, computed: u64) {
        let due = computed.saturating_sub(number * PAGE_TOKENS as u64).min(PAGE_TOKENS as u64);
        if due > 0 {
            let held = self.pages.get(&page);
            assert!(
                held.is_some_and(|held| (held.family, held.number) == (family, number) && held.filled >= due),
                "page {page} has {held:?}, not {due} positions of page {number} of family {family}"
            );
        }
    }
}
