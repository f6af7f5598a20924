//! Where a session's latents are: a list of segments of whole pages in order of position, each with a home. All homes
//! are this replica until sessions move; nothing here assumes it, so a moved session's list is the same type.

use perigee_backend::{PAGE_TOKENS, Segment};
use serde::{Deserialize, Serialize};

/// Stands for the pages of a parked session until it has pages again.
const PARKED: u32 = u32::MAX;

/// Who holds a segment's pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Home {
    /// This replica, in these pages.
    Local {
        /// Page numbers in order of position.
        pages: Vec<u32>,
    },
    /// Another replica, which answers attention queries over them.
    Remote {
        /// Its name.
        replica: String,
        /// Which run of it: pages of an earlier run are gone.
        incarnation: String,
        /// Its tensor-parallel degree.
        ranks: u32,
        /// How its ranks share the pages.
        layout: u32,
        /// Number of pages.
        pages: u64,
    },
}

/// Consecutive pages with one home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatentSegment {
    /// Absolute number of the first page: position / 64.
    pub first_page: u64,
    /// Who holds the pages.
    pub home: Home,
}

impl LatentSegment {
    /// Number of pages.
    pub fn page_count(&self) -> u64 {
        match &self.home {
            Home::Local { pages } => pages.len() as u64,
            Home::Remote { pages, .. } => *pages,
        }
    }

    /// (first position, positions) of the segment, for a session with `computed` positions.
    pub fn positions(&self, computed: u64) -> (u64, u64) {
        let start = self.first_page * PAGE_TOKENS as u64;
        let end = (self.end_page() * PAGE_TOKENS as u64).min(computed);
        (start, end.saturating_sub(start))
    }

    fn end_page(&self) -> u64 {
        self.first_page + self.page_count()
    }
}

/// A session's latents, without gaps from position 0 to the end of the last page.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latents {
    segments: Vec<LatentSegment>,
}

impl Latents {
    /// No latents yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The segments in order.
    pub fn segments(&self) -> &[LatentSegment] {
        &self.segments
    }

    /// Local pages in order of position.
    pub fn local_pages(&self) -> impl Iterator<Item = u32> + '_ {
        self.segments
            .iter()
            .filter_map(|segment| match &segment.home {
                Home::Local { pages } => Some(pages.as_slice()),
                Home::Remote { .. } => None,
            })
            .flatten()
            .copied()
    }

    /// Number of local pages.
    pub fn local_page_count(&self) -> usize {
        self.local_pages().count()
    }

    /// Pages to append so that every position before `end` has a place.
    pub fn missing_for(&self, end: u64) -> usize {
        end.div_ceil(PAGE_TOKENS as u64).saturating_sub(self.end_page()) as usize
    }

    /// One past the last position that has a place.
    pub fn capacity(&self) -> u64 {
        self.end_page() * PAGE_TOKENS as u64
    }

    /// Appends a local page: to the last segment if that is local, else in a new one.
    pub fn append(&mut self, page: u32) {
        let first_page = self.end_page();
        match self.segments.last_mut().map(|segment| &mut segment.home) {
            Some(Home::Local { pages }) => pages.push(page),
            _ => self.segments.push(LatentSegment { first_page, home: Home::Local { pages: vec![page] } }),
        }
    }

    /// The local segments of positions before `end`, as a row of a step names them.
    pub fn row_segments(&self, end: u64) -> Vec<Segment> {
        let tokens = PAGE_TOKENS as u64;
        self.segments
            .iter()
            .filter_map(|segment| match &segment.home {
                Home::Local { pages } => {
                    let start = segment.first_page * tokens;
                    let end = end.min(segment.end_page() * tokens);
                    let pages = pages.get(..Segment::pages_for(start, end))?;
                    (start < end).then(|| Segment { start, end, pages: pages.to_vec() })
                }
                Home::Remote { .. } => None,
            })
            .collect()
    }

    /// The latents of a fork at `computed` positions: the same full pages (the caller adds a reference to every local
    /// one), and the local page that holds the rest, of which the fork needs a copy as its next page.
    pub fn fork(&self, computed: u64) -> (Self, Option<u32>) {
        let full = computed / PAGE_TOKENS as u64;
        let mut segments = Vec::with_capacity(self.segments.len());
        let mut partial = None;
        for segment in &self.segments {
            let kept = full.saturating_sub(segment.first_page).min(segment.page_count());
            match &segment.home {
                Home::Local { pages } => {
                    if computed > full * PAGE_TOKENS as u64 && (segment.first_page..segment.end_page()).contains(&full)
                    {
                        partial = pages.get(kept as usize).copied();
                    }
                    let pages = pages.iter().copied().take(kept as usize).collect();
                    segments.push(LatentSegment { first_page: segment.first_page, home: Home::Local { pages } });
                }
                Home::Remote { .. } => segments.push(segment.clone()),
            }
        }
        segments.retain(|segment| segment.page_count() > 0);
        (Self { segments }, partial)
    }

    /// Gives up the local pages of a session that is parked: returns them, and remembers how many there were.
    pub fn detach(&mut self) -> Vec<u32> {
        self.local_mut().map(|page| std::mem::replace(page, PARKED)).collect()
    }

    /// Gives a parked session local pages again, as many as [`Self::detach`] returned, in order.
    pub fn attach(&mut self, pages: &[u32]) {
        for (place, &page) in self.local_mut().zip(pages) {
            *place = page;
        }
    }

    fn local_mut(&mut self) -> impl Iterator<Item = &mut u32> {
        self.segments
            .iter_mut()
            .filter_map(|segment| match &mut segment.home {
                Home::Local { pages } => Some(pages.iter_mut()),
                Home::Remote { .. } => None,
            })
            .flatten()
    }

    fn end_page(&self) -> u64 {
        self.segments.last().map_or(0, LatentSegment::end_page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(pages: &[u32]) -> Latents {
        let mut latents = Latents::new();
        pages.iter().for_each(|&page| latents.append(page));
        latents
    }

    /// Two pages elsewhere, then two here.
    fn moved() -> Latents {
        let home = Home::Remote { replica: "a".into(), incarnation: "1".into(), ranks: 2, layout: 0, pages: 2 };
        let mut latents = Latents { segments: vec![LatentSegment { first_page: 0, home }] };
        latents.append(7);
        latents.append(8);
        latents
    }

    #[test]
    fn pages_are_counted_from_position_zero() {
        let latents = local(&[4, 5]);
        assert_eq!(latents.capacity(), 128);
        assert_eq!(latents.missing_for(128), 0);
        assert_eq!(latents.missing_for(129), 1);
        assert_eq!(moved().capacity(), 256);
        assert_eq!(moved().missing_for(257), 1);
        assert_eq!(moved().local_pages().collect::<Vec<_>>(), [7, 8]);
    }

    #[test]
    fn a_row_names_only_local_pages_up_to_its_end() {
        assert_eq!(local(&[4, 5]).row_segments(60), [Segment { start: 0, end: 60, pages: vec![4] }]);
        assert_eq!(moved().row_segments(193), [Segment { start: 128, end: 193, pages: vec![7, 8] }]);
        assert_eq!(moved().row_segments(128), []);
    }

    #[test]
    fn a_fork_shares_full_pages_and_names_the_partial_one() {
        assert_eq!(local(&[4, 5]).fork(70), (local(&[4]), Some(5)));
        assert_eq!(local(&[4, 5]).fork(128), (local(&[4, 5]), None));
        assert_eq!(local(&[4, 5]).fork(64), (local(&[4]), None), "an empty page is not worth a copy");
        assert_eq!(local(&[4]).fork(0), (Latents::new(), None));
        let (forked, partial) = moved().fork(200);
        assert_eq!((forked.local_pages().collect::<Vec<_>>(), partial), (vec![7], Some(8)));
        assert_eq!(forked.capacity(), 192);
    }

    #[test]
    fn parking_keeps_the_shape() {
        let mut latents = moved();
        assert_eq!(latents.detach(), [7, 8]);
        assert_eq!(latents.capacity(), 256);
        latents.attach(&[1, 2]);
        assert_eq!(latents.row_segments(256), [Segment { start: 128, end: 256, pages: vec![1, 2] }]);
    }
}
