//! The segment table of a session: which positions have their latents on another replica. Everything that no segment
//! names is with the session, so a table never says the same thing twice. It knows no page numbers; those are the
//! owner's and the homes' affair.

use std::ops::Range;

use crate::geometry::{Layout, PAGE_POSITIONS};

/// A replica that holds latents, in one of its runs: pages of an earlier run are gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Name of the replica.
    pub replica: String,
    /// Which run of it.
    pub incarnation: String,
    /// Its tensor-parallel degree.
    pub ranks: u32,
    /// How its ranks share latents.
    pub layout: Layout,
}

impl Place {
    /// Whether two places are the same run of the same replica.
    pub fn is_same_run(&self, other: &Self) -> bool {
        self.replica == other.replica && self.incarnation == other.incarnation
    }
}

/// Consecutive whole pages with one home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Who holds them.
    pub home: Place,
    /// First position, a multiple of [`PAGE_POSITIONS`].
    pub first: u64,
    /// Number of positions, a multiple of [`PAGE_POSITIONS`].
    pub tokens: u64,
}

impl Segment {
    /// One past the last position.
    pub fn end(&self) -> u64 {
        self.first.saturating_add(self.tokens)
    }

    /// Its positions.
    pub fn positions(&self) -> Range<u64> {
        self.first..self.end()
    }
}

/// A segment or a range that cannot be in a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// It has no positions, or more than there are numbers for.
    #[error("a segment of {tokens} positions from {first}; expected at least one page")]
    Length {
        /// First position.
        first: u64,
        /// Number of positions.
        tokens: u64,
    },
    /// It does not begin or end between pages.
    #[error("a segment boundary at position {position}, which is no multiple of {PAGE_POSITIONS}")]
    Boundary {
        /// The boundary.
        position: u64,
    },
    /// Two segments overlap, or they are not in order.
    #[error("a segment from position {first} where positions up to {end} are taken")]
    Order {
        /// Where it begins.
        first: u64,
        /// Where the one before it ends.
        end: u64,
    },
    /// Positions that the session has not got are in a segment, or those of its last, unfilled page.
    #[error("a segment that ends at position {end}, but only {sealed} positions are in full pages")]
    Unsealed {
        /// Where the segment ends.
        end: u64,
        /// Positions in full pages.
        sealed: u64,
    },
}

/// What moves with a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// State and the unfilled last page; full pages stay where they are.
    Split,
    /// The pages that the source holds, too.
    Whole,
}

/// What became of a table at its new owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Segments that are elsewhere.
    pub table: SegmentTable,
    /// Positions whose pages the new owner held all along: local without a copy, ascending.
    pub returned: Vec<Range<u64>>,
    /// Positions that an earlier run of the new owner held: to be fetched from nobody, but rebuilt.
    pub lost: Vec<Range<u64>>,
}

/// The positions of a session that are elsewhere: segments in order of position, disjoint, neighbours of one home joined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SegmentTable {
    segments: Vec<Segment>,
}

impl SegmentTable {
    /// A session whose latents are all with it.
    pub fn new() -> Self {
        Self::default()
    }

    /// A table of segments in order of position; neighbours with the same home are joined.
    ///
    /// # Errors
    /// [`SegmentError`] names the first segment that is empty, cut through a page, out of order or overlapping.
    pub fn from_segments(segments: impl IntoIterator<Item = Segment>) -> Result<Self, SegmentError> {
        let mut table = Self::new();
        let mut end = 0;
        for segment in segments {
            check_range(segment.first, segment.tokens)?;
            if segment.first < end {
                return Err(SegmentError::Order { first: segment.first, end });
            }
            end = segment.end();
            table.join(segment);
        }
        Ok(table)
    }

    /// The segments in order of position.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Whether all latents are with the session.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Positions in segments.
    pub fn tokens(&self) -> u64 {
        self.segments.iter().map(|segment| segment.tokens).sum()
    }

    /// Checks that a session with `context` positions can have this table: its last, unfilled page is with it.
    ///
    /// # Errors
    /// [`SegmentError::Unsealed`].
    pub fn check(&self, context: u64) -> Result<(), SegmentError> {
        let sealed = sealed(context);
        match self.segments.last().map(Segment::end) {
            Some(end) if end > sealed => Err(SegmentError::Unsealed { end, sealed }),
            _ => Ok(()),
        }
    }

    /// Positions before `end` that are in no segment, ascending and each range as long as it can be.
    pub fn gaps(&self, end: u64) -> Vec<Range<u64>> {
        let starts = std::iter::once(0).chain(self.segments.iter().map(Segment::end));
        let ends = self.segments.iter().map(|segment| segment.first).chain([end]);
        starts.zip(ends).map(|(start, stop)| start..stop.min(end)).filter(|gap| gap.start < gap.end).collect()
    }

    /// Remote homes, each once and in order of their first position, with the positions that each holds.
    pub fn homes(&self) -> Vec<(&Place, Vec<Range<u64>>)> {
        let mut homes: Vec<(&Place, Vec<Range<u64>>)> = Vec::new();
        for segment in &self.segments {
            match homes.iter_mut().find(|(home, _)| home.is_same_run(&segment.home)) {
                Some((_, ranges)) => ranges.push(segment.positions()),
                None => homes.push((&segment.home, vec![segment.positions()])),
            }
        }
        homes
    }

    /// All positions of a session with `context` positions, the local ones under the name of `owner`, in order. Only the
    /// last one may end within a page.
    pub fn view(&self, owner: &Place, context: u64) -> Vec<Segment> {
        let local = self.gaps(context).into_iter().map(|gap| segment_of(owner, &gap));
        let mut all: Vec<Segment> = self.segments.iter().cloned().chain(local).collect();
        all.sort_by_key(|segment| segment.first);
        all
    }

    /// The table that a handoff from `source` carries. In split mode the source's full pages become a segment of it; in
    /// whole mode they stay gaps, because the pages travel. The unfilled last page always travels.
    pub fn hand_over(&self, source: &Place, context: u64, mode: Mode) -> Self {
        if mode == Mode::Whole {
            return self.clone();
        }
        let mut table = Self::new();
        self.view(source, sealed(context)).into_iter().for_each(|segment| table.join(segment));
        table
    }

    /// The table as it is at the session's new owner, `here`: segments that were here become local or are lost.
    pub fn arrive(self, here: &Place) -> Arrival {
        let mut arrival = Arrival { table: Self::new(), returned: Vec::new(), lost: Vec::new() };
        for segment in self.segments {
            if segment.home.replica != here.replica {
                arrival.table.join(segment);
            } else if segment.home.is_same_run(here) {
                push_range(&mut arrival.returned, segment.positions());
            } else {
                push_range(&mut arrival.lost, segment.positions());
            }
        }
        arrival
    }

    /// Positions that came to the session: pages followed it, or were rebuilt. Positions that were local already may be
    /// among them. Segments are cut where the range begins and ends.
    ///
    /// # Errors
    /// The range is empty or cuts through a page.
    pub fn localise(&mut self, range: Range<u64>) -> Result<(), SegmentError> {
        check_range(range.start, range.end.saturating_sub(range.start))?;
        let mut kept = Vec::with_capacity(self.segments.len() + 1);
        for segment in self.segments.drain(..) {
            let before = segment.first..segment.end().min(range.start);
            let after = segment.first.max(range.end)..segment.end();
            kept.extend(
                [before, after].iter().filter(|part| part.start < part.end).map(|p| segment_of(&segment.home, p)),
            );
        }
        self.segments = kept;
        Ok(())
    }

    /// The first `pages` pages in segments of one home, in one range: what to fetch next from it.
    pub fn first_of(&self, home: &Place, pages: u64) -> Option<Range<u64>> {
        let segment = self.segments.iter().find(|segment| segment.home.is_same_run(home))?;
        let tokens = segment.tokens.min(pages.saturating_mul(PAGE_POSITIONS));
        (tokens > 0).then(|| segment.first..segment.first + tokens)
    }

    /// Positions that a replica held in any run but `alive`; with none, in any run at all. They must be rebuilt.
    pub fn lost_at(&self, replica: &str, alive: Option<&str>) -> Vec<Range<u64>> {
        let mut lost = Vec::new();
        for segment in &self.segments {
            if segment.home.replica == replica && alive != Some(segment.home.incarnation.as_str()) {
                push_range(&mut lost, segment.positions());
            }
        }
        lost
    }

    /// Appends a segment that lies behind all others.
    fn join(&mut self, segment: Segment) {
        match self.segments.last_mut() {
            Some(last) if last.end() == segment.first && last.home == segment.home => last.tokens += segment.tokens,
            _ => self.segments.push(segment),
        }
    }
}

/// Positions in full pages of a session with `context` positions.
pub fn sealed(context: u64) -> u64 {
    context - context % PAGE_POSITIONS
}

fn segment_of(home: &Place, range: &Range<u64>) -> Segment {
    Segment { home: home.clone(), first: range.start, tokens: range.end - range.start }
}

fn push_range(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

fn check_range(first: u64, tokens: u64) -> Result<(), SegmentError> {
    let Some(end) = first.checked_add(tokens).filter(|_| tokens > 0) else {
        return Err(SegmentError::Length { first, tokens });
    };
    match [first, end].into_iter().find(|position| position % PAGE_POSITIONS != 0) {
        Some(position) => Err(SegmentError::Boundary { position }),
        None => Ok(()),
    }
}

#[cfg(test)]
#[path = "segments_tests.rs"]
mod tests;
