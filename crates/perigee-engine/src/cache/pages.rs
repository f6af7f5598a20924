//! Reference-counted latent pages. A page number stands for 64 absolute positions in every MLA layer, on every rank;
//! sessions that forked share full pages. It does not know what a page holds or who holds it.

use super::CacheError;

const WHAT: &str = "latent page";

/// The pages of a replica: free plus used is always the total.
#[derive(Debug, Clone)]
pub struct PagePool {
    /// References to every page; 0 is free.
    references: Vec<u32>,
    /// Free pages; the last one is handed out next.
    free: Vec<u32>,
}

impl PagePool {
    /// A pool of `total` free pages.
    pub fn new(total: u32) -> Self {
        Self { references: vec![0; total as usize], free: (0..total).rev().collect() }
    }

    /// A free page with one reference, none if all are used.
    pub fn allocate(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        if let Some(references) = self.references.get_mut(page as usize) {
            *references = 1;
        }
        Some(page)
    }

    /// `count` free pages with one reference each, or none at all.
    pub fn allocate_many(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.free.len() {
            return None;
        }
        (0..count).map(|_| self.allocate()).collect()
    }

    /// Adds a reference to a page in use.
    ///
    /// # Errors
    /// [`CacheError::NotInUse`] for a free page, [`CacheError::OutOfRange`].
    pub fn share(&mut self, page: u32) -> Result<(), CacheError> {
        let references = self.references_mut(page)?;
        if *references == 0 {
            return Err(CacheError::NotInUse { what: WHAT, index: page });
        }
        *references += 1;
        Ok(())
    }

    /// Drops a reference; true if it was the last one and the page is free now.
    ///
    /// # Errors
    /// [`CacheError::DoubleRelease`] for a free page, [`CacheError::OutOfRange`].
    pub fn release(&mut self, page: u32) -> Result<bool, CacheError> {
        let references = self.references_mut(page)?;
        if *references == 0 {
            return Err(CacheError::DoubleRelease { what: WHAT, index: page });
        }
        *references -= 1;
        let last = *references == 0;
        if last {
            self.free.push(page);
        }
        Ok(last)
    }

    /// References to a page; 0 for a free one.
    pub fn references(&self, page: u32) -> u32 {
        self.references.get(page as usize).copied().unwrap_or(0)
    }

    /// Free pages.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages with at least one reference.
    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.references.len()
    }

    /// Checks that the free list holds exactly the pages without references, once each, and that `holders` (every
    /// reference that anybody holds, in any order) explains all counts.
    ///
    /// # Errors
    /// [`CacheError::Unbalanced`] says what differs.
    pub fn audit(&self, holders: impl Iterator<Item = u32>) -> Result<(), CacheError> {
        let mut expected = vec![0_u32; self.total()];
        for page in holders {
            match expected.get_mut(page as usize) {
                Some(count) => *count += 1,
                None => return Err(CacheError::OutOfRange { what: WHAT, index: page, total: self.total() }),
            }
        }
        if let Some(page) = (0..self.total()).find(|&page| expected[page] != self.references[page]) {
            return Err(CacheError::Unbalanced(format!(
                "page {page} has {} references, its holders {}",
                self.references[page], expected[page]
            )));
        }
        let mut listed = self.free.clone();
        listed.sort_unstable();
        let unreferenced: Vec<u32> =
            (0..self.total() as u32).filter(|&page| self.references[page as usize] == 0).collect();
        if listed != unreferenced {
            return Err(CacheError::Unbalanced(format!(
                "{} pages are listed as free, {} have no reference",
                listed.len(),
                unreferenced.len()
            )));
        }
        Ok(())
    }

    fn references_mut(&mut self, page: u32) -> Result<&mut u32, CacheError> {
        let total = self.references.len();
        self.references.get_mut(page as usize).ok_or(CacheError::OutOfRange { what: WHAT, index: page, total })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_handed_out_once_and_come_back() {
        let mut pool = PagePool::new(3);
        let pages = pool.allocate_many(3).unwrap();
        assert_eq!(pages, [0, 1, 2]);
        assert_eq!(pool.allocate(), None);
        assert_eq!(pool.allocate_many(1), None);
        assert!(pool.release(1).unwrap());
        assert_eq!((pool.free(), pool.used(), pool.total()), (1, 2, 3));
        assert_eq!(pool.allocate_many(2), None, "all or nothing");
        assert_eq!(pool.free(), 1);
        assert_eq!(pool.allocate(), Some(1));
        pool.audit([0, 1, 2].into_iter()).unwrap();
    }

    #[test]
    fn a_shared_page_is_free_after_its_last_release() {
        let mut pool = PagePool::new(2);
        let page = pool.allocate().unwrap();
        pool.share(page).unwrap();
        assert_eq!(pool.references(page), 2);
        pool.audit([page, page].into_iter()).unwrap();
        assert!(!pool.release(page).unwrap());
        assert_eq!(pool.used(), 1);
        assert!(pool.release(page).unwrap());
        assert_eq!(pool.free(), 2);
        pool.audit(std::iter::empty()).unwrap();
    }

    #[test]
    fn misuse_is_a_typed_error() {
        let mut pool = PagePool::new(2);
        assert_eq!(pool.release(0), Err(CacheError::DoubleRelease { what: WHAT, index: 0 }));
        assert_eq!(pool.share(1), Err(CacheError::NotInUse { what: WHAT, index: 1 }));
        assert_eq!(pool.release(2), Err(CacheError::OutOfRange { what: WHAT, index: 2, total: 2 }));
        let page = pool.allocate().unwrap();
        assert!(matches!(pool.audit(std::iter::empty()), Err(CacheError::Unbalanced(_))));
        assert!(matches!(pool.audit([page, page].into_iter()), Err(CacheError::Unbalanced(_))));
        pool.audit([page].into_iter()).unwrap();
    }
}
