//! Which pages of a session come along, and which of them came. What this takes does not grow with pages that stay elsewhere: the
//! session stands still while it is made and looked through.

use std::ops::Range;

use crate::geometry::PAGE_POSITIONS;

/// Pages that are due, in every MLA layer.
#[derive(Debug, Clone, Default)]
pub(super) struct DuePages {
    /// How many are due before each run, and its page numbers, ascending.
    runs: Vec<(usize, Range<u64>)>,
    count: usize,
    /// [MLA layers, due pages]: whether they came.
    came: Vec<bool>,
}

impl DuePages {
    /// The pages of these positions, which are ascending and share no page.
    pub(super) fn of(positions: &[Range<u64>], layers: u32) -> Self {
        let mut count = 0;
        let mut runs = Vec::with_capacity(positions.len());
        for range in positions {
            let pages = range.start / PAGE_POSITIONS..range.end.div_ceil(PAGE_POSITIONS);
            let length = (pages.end - pages.start) as usize;
            runs.push((count, pages));
            count += length;
        }
        Self { runs, count, came: vec![false; count * layers as usize] }
    }

    /// The mark of the page that begins at position `first` in a layer; none if it is not due.
    pub(super) fn mark(&mut self, layer: u32, first: u64) -> Option<&mut bool> {
        let page = first / PAGE_POSITIONS;
        let run = self.runs.partition_point(|(_, pages)| pages.start <= page).checked_sub(1)?;
        let (before, pages) = self.runs.get(run).filter(|(_, pages)| pages.contains(&page))?;
        self.came.get_mut(layer as usize * self.count + before + (page - pages.start) as usize)
    }

    /// Layer and first position of a page that did not come.
    pub(super) fn missing(&self) -> Option<(u32, u64)> {
        let index = self.came.iter().position(|came| !came)?;
        let (layer, due) = (index / self.count, index % self.count);
        let run = self.runs.partition_point(|(before, _)| *before <= due).checked_sub(1)?;
        let (before, pages) = self.runs.get(run)?;
        Some((layer as u32, (pages.start + (due - before) as u64) * PAGE_POSITIONS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_due_are_marked_and_missed() {
        let mut due = DuePages::of(&[64..192, 640..700], 2);
        assert_eq!(due.missing(), Some((0, 64)));
        for first in [0, 192, 576, 704, u64::MAX] {
            assert!(due.mark(0, first).is_none(), "{first}");
        }
        assert!(due.mark(2, 64).is_none());
        for (layer, first, next) in [
            (0, 64, Some((0, 128))),
            (1, 640, Some((0, 128))),
            (0, 128, Some((0, 640))),
            (0, 640, Some((1, 64))),
            (1, 128, Some((1, 64))),
            (1, 64, None),
        ] {
            let mark = due.mark(layer, first).expect("due");
            assert!(!std::mem::replace(mark, true), "{layer} {first}");
            assert_eq!(due.missing(), next);
        }
        assert_eq!(DuePages::default().missing(), None);
    }
}
