//! The account of host memory for parked sessions: how much is promised, and names for the copies. It does not choose
//! who parks and holds no bytes.

use crate::cache::CacheError;

#[derive(Debug)]
pub(crate) struct ParkLedger {
    limit: u64,
    used: u64,
    slot_bytes: u64,
    page_bytes: u64,
    keys: u64,
}

impl ParkLedger {
    pub(crate) fn new(limit: u64, slot_bytes: u64, page_bytes: u64) -> Self {
        Self { limit, used: 0, slot_bytes, page_bytes, keys: 0 }
    }

    /// Takes room for a slot and `pages` pages: a new key and the bytes taken, none if there is no room.
    pub(crate) fn take(&mut self, pages: usize) -> Option<(u64, u64)> {
        let bytes = self.slot_bytes + self.page_bytes * pages as u64;
        if self.limit == 0 || self.used + bytes > self.limit {
            return None;
        }
        self.used += bytes;
        self.keys += 1;
        Some((self.keys, bytes))
    }

    pub(crate) fn give_back(&mut self, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
    }

    pub(crate) fn audit(&self, held: u64) -> Result<(), CacheError> {
        if self.used != held || held > self.limit {
            return Err(CacheError::Unbalanced(format!(
                "{} bytes of park memory are taken, sessions hold {held}, the limit is {}",
                self.used, self.limit
            )));
        }
        Ok(())
    }
}
