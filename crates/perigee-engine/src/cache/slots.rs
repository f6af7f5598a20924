//! State slots: a session that runs holds one, and reads and writes it in every step. One with latents elsewhere has a
//! second, shadow slot, which makes its steps transactions. It does not know what a slot holds.

use serde::{Deserialize, Serialize};

use super::CacheError;

const WHAT: &str = "state slot";

/// The state slots of a replica: free plus used is always the total.
#[derive(Debug, Clone)]
pub struct SlotPool {
    used: Vec<bool>,
    /// Free slots; the last one is handed out next.
    free: Vec<u32>,
}

impl SlotPool {
    /// A pool of `total` free slots.
    pub fn new(total: u32) -> Self {
        Self { used: vec![false; total as usize], free: (0..total).rev().collect() }
    }

    /// A free slot, none if all are used.
    pub fn allocate(&mut self) -> Option<u32> {
        let slot = self.free.pop()?;
        if let Some(used) = self.used.get_mut(slot as usize) {
            *used = true;
        }
        Some(slot)
    }

    /// The slots of a session, two if its steps are transactions; none if there are too few.
    pub fn allocate_pair(&mut self, shadow: bool) -> Option<SlotPair> {
        if self.free() < 1 + usize::from(shadow) {
            return None;
        }
        let read = self.allocate()?;
        let write = if shadow { self.allocate()? } else { read };
        Some(SlotPair { read, write })
    }

    /// Frees a slot.
    ///
    /// # Errors
    /// [`CacheError::DoubleRelease`] for a free slot, [`CacheError::OutOfRange`].
    pub fn release(&mut self, slot: u32) -> Result<(), CacheError> {
        let total = self.used.len();
        match self.used.get_mut(slot as usize) {
            None => Err(CacheError::OutOfRange { what: WHAT, index: slot, total }),
            Some(false) => Err(CacheError::DoubleRelease { what: WHAT, index: slot }),
            Some(used) => {
                *used = false;
                self.free.push(slot);
                Ok(())
            }
        }
    }

    /// Free slots.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All slots.
    pub fn total(&self) -> usize {
        self.used.len()
    }

    /// Checks that `holders` (every slot that anybody holds, in any order) are exactly the used slots, once each.
    ///
    /// # Errors
    /// [`CacheError::Unbalanced`] says what differs.
    pub fn audit(&self, holders: impl Iterator<Item = u32>) -> Result<(), CacheError> {
        let mut held: Vec<u32> = holders.collect();
        held.sort_unstable();
        let used: Vec<u32> = (0..self.total() as u32).filter(|&slot| self.used[slot as usize]).collect();
        if held != used {
            return Err(CacheError::Unbalanced(format!("slots {used:?} are used, sessions hold {held:?}")));
        }
        let mut listed = self.free.clone();
        listed.sort_unstable();
        let unused: Vec<u32> = (0..self.total() as u32).filter(|&slot| !self.used[slot as usize]).collect();
        if listed != unused {
            return Err(CacheError::Unbalanced(format!("slots {listed:?} are listed as free, {unused:?} are")));
        }
        Ok(())
    }
}

/// The slots of a running session: what its next step reads and what it writes. They differ only where a step is a
/// transaction, which [`SlotPair::commit`] ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotPair {
    /// The slot with the session's state.
    pub read: u32,
    /// The slot that gets the state after the step.
    pub write: u32,
}

impl SlotPair {
    /// One slot, updated in place.
    pub fn in_place(slot: u32) -> Self {
        Self { read: slot, write: slot }
    }

    /// The step is good: what it wrote is the state now, and the old slot becomes the shadow.
    pub fn commit(&mut self) {
        std::mem::swap(&mut self.read, &mut self.write);
    }

    /// Whether it has a shadow, so that a step counts only once it is committed.
    pub fn has_shadow(&self) -> bool {
        self.read != self.write
    }

    /// Every slot of the pair, once.
    pub fn slots(&self) -> impl Iterator<Item = u32> + use<> {
        let shadow = self.has_shadow().then_some(self.write);
        std::iter::once(self.read).chain(shadow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_handed_out_once_and_come_back() {
        let mut pool = SlotPool::new(2);
        assert_eq!((pool.allocate(), pool.allocate(), pool.allocate()), (Some(0), Some(1), None));
        pool.audit([1, 0].into_iter()).unwrap();
        pool.release(0).unwrap();
        assert_eq!((pool.free(), pool.used(), pool.total()), (1, 1, 2));
        assert_eq!(pool.release(0), Err(CacheError::DoubleRelease { what: WHAT, index: 0 }));
        assert_eq!(pool.release(2), Err(CacheError::OutOfRange { what: WHAT, index: 2, total: 2 }));
        assert!(matches!(pool.audit([0, 1].into_iter()), Err(CacheError::Unbalanced(_))));
        pool.audit([1].into_iter()).unwrap();
    }

    #[test]
    fn a_pair_is_given_whole_or_not_at_all() {
        let mut pool = SlotPool::new(4);
        assert_eq!(pool.allocate_pair(false), Some(SlotPair::in_place(0)));
        assert_eq!(pool.allocate_pair(true), Some(SlotPair { read: 1, write: 2 }));
        assert_eq!((pool.allocate_pair(true), pool.free()), (None, 1));
        assert_eq!(pool.allocate_pair(false), Some(SlotPair::in_place(3)));
    }

    #[test]
    fn a_transaction_swaps_and_an_update_in_place_does_not() {
        let mut pair = SlotPair { read: 3, write: 5 };
        assert_eq!(pair.slots().collect::<Vec<_>>(), [3, 5]);
        assert!(pair.has_shadow() && !SlotPair::in_place(3).has_shadow());
        pair.commit();
        assert_eq!(pair, SlotPair { read: 5, write: 3 });
        let mut single = SlotPair::in_place(4);
        single.commit();
        assert_eq!(single.slots().collect::<Vec<_>>(), [4]);
    }
}
