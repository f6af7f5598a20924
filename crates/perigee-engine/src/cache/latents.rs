//! Where a session's latents are: a list of segments of whole pages in order of position, each with a home: this replica,
//! or one that the session ran on before. It does not know whether a remote home still answers.

use std::ops::Range;

use perigee_backend::{PAGE_TOKENS, Segment};
use perigee_migration::segments::{self, Place, SegmentTable};
use perigee_migration::{Layout, Segment as RemoteSegment};
use serde::{Deserialize, Serialize};

use super::HomePages;

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
        /// Where it answers: its internal gRPC address, host:port.
        endpoint: String,
        /// Its tensor-parallel degree.
        ranks: u32,
        /// How its ranks share the pages.
        #[serde(with = "layout_number")]
        layout: Layout,
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

    /// The latents that segments say, in order of position and without gaps.
    pub fn from_segments(segments: Vec<LatentSegment>) -> Self {
        Self { segments }
    }

    /// The latents of a session of `context` positions that arrived: what `table` names is elsewhere, and every other page
    /// is in `local`, by number from position 0. None if a page is in neither, or the table goes beyond full pages.
    pub fn assemble(
        table: &SegmentTable,
        endpoint_of: impl Fn(&Place) -> String,
        local: &HomePages,
        context: u64,
    ) -> Option<Self> {
        table.check(context).ok()?;
        let tokens = PAGE_TOKENS as u64;
        let mut latents = Self::new();
        for segment in table.segments() {
            latents.append_known(segment.first / tokens, local)?;
            let Place { replica, incarnation, ranks, layout } = segment.home.clone();
            let endpoint = endpoint_of(&segment.home);
            let pages = segment.tokens / tokens;
            let home = Home::Remote { replica, incarnation, endpoint, ranks, layout, pages };
            latents.segments.push(LatentSegment { first_page: segment.first / tokens, home });
        }
        latents.append_known(context.div_ceil(tokens), local)?;
        Some(latents)
    }

    /// Whether some of them are on another replica.
    pub fn is_remote(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment.home, Home::Remote { .. }))
    }

    /// The positions that are elsewhere, as a handoff names them.
    pub fn table(&self) -> SegmentTable {
        let tokens = PAGE_TOKENS as u64;
        let remote = self.segments.iter().filter_map(|segment| match &segment.home {
            Home::Local { .. } => None,
            Home::Remote { replica, incarnation, ranks, layout, pages, .. } => {
                let (replica, incarnation) = (replica.clone(), incarnation.clone());
                let home = Place { replica, incarnation, ranks: *ranks, layout: *layout };
                Some(RemoteSegment { home, first: segment.first_page * tokens, tokens: pages * tokens })
            }
        });
        // Whole pages in order of position: there is nothing to refuse.
        SegmentTable::from_segments(remote).unwrap_or_default()
    }

    /// Other replicas' segments with the positions of each.
    pub fn remote_ranges(&self) -> impl Iterator<Item = (&Home, Range<u64>)> {
        let tokens = PAGE_TOKENS as u64;
        self.segments
            .iter()
            .filter(|segment| matches!(segment.home, Home::Remote { .. }))
            .map(move |segment| (&segment.home, segment.first_page * tokens..segment.end_page() * tokens))
    }

    /// A segment of another replica turns local: its pages are these, in order. False, and nothing done, where none begins at
    /// this page with so many.
    pub fn localise(&mut self, first_page: u64, pages: Vec<u32>) -> bool {
        let is_it = |segment: &LatentSegment| {
            let is_remote = matches!(segment.home, Home::Remote { .. });
            is_remote && segment.first_page == first_page && segment.page_count() == pages.len() as u64
        };
        let Some(index) = self.segments.iter().position(is_it) else { return false };
        self.segments[index].home = Home::Local { pages };
        let segments = std::mem::take(&mut self.segments);
        for segment in segments {
            match (self.segments.last_mut().map(|last| &mut last.home), segment.home) {
                (Some(Home::Local { pages }), Home::Local { pages: more }) => pages.extend(more),
                (_, home) => self.segments.push(LatentSegment { home, ..segment }),
            }
        }
        true
    }

    /// Other replicas' segments: number of the first page, and of pages.
    pub fn remote_segments(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let remote = self.segments.iter().filter(|segment| matches!(segment.home, Home::Remote { .. }));
        remote.map(|segment| (segment.first_page, segment.page_count()))
    }

    /// Positions that are elsewhere.
    pub fn remote_positions(&self) -> u64 {
        self.remote_ranges().map(|(_, range)| range.end - range.start).sum()
    }

    /// The full local pages of a session of which `sealed_positions` positions are in full pages: what stays when it moves
    /// away. None while it is parked.
    pub fn home_pages(&self, sealed_positions: u64) -> HomePages {
        let full = segments::sealed(sealed_positions) / PAGE_TOKENS as u64;
        let mut kept = HomePages::default();
        for segment in &self.segments {
            let Home::Local { pages } = &segment.home else { continue };
            let pages = &pages[..full.saturating_sub(segment.first_page).min(pages.len() as u64) as usize];
            // Parked are all of them or none.
            if pages.first().is_some_and(|page| *page != PARKED) {
                kept.extend(segment.first_page, pages);
            }
        }
        kept
    }

    /// Local pages with their numbers from position 0, in order.
    pub fn numbered_local_pages(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.segments.iter().flat_map(|segment| {
            let pages = match &segment.home {
                Home::Local { pages } => pages.as_slice(),
                Home::Remote { .. } => &[],
            };
            (segment.first_page..).zip(pages.iter().copied())
        })
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

    /// Appends the pages before number `end` that `local` names; None if it lacks one.
    fn append_known(&mut self, end: u64, local: &HomePages) -> Option<()> {
        for (first, more) in local.within(self.end_page()..end) {
            if first != self.end_page() {
                return None;
            }
            match self.segments.last_mut().map(|segment| &mut segment.home) {
                Some(Home::Local { pages }) => pages.extend_from_slice(more),
                _ => {
                    self.segments.push(LatentSegment { first_page: first, home: Home::Local { pages: more.to_vec() } })
                }
            }
        }
        (self.end_page() >= end).then_some(())
    }

    fn end_page(&self) -> u64 {
        self.segments.last().map_or(0, LatentSegment::end_page)
    }
}

/// A layout on the wire is its number, as in every other format.
mod layout_number {
    use perigee_migration::Layout;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(layout: &Layout, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(layout.number())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Layout, D::Error> {
        let number = u8::deserialize(deserializer)?;
        Layout::from_number(number).ok_or_else(|| D::Error::custom(format!("no layout of latents has number {number}")))
    }
}

#[cfg(test)]
#[path = "latents_tests.rs"]
mod tests;
