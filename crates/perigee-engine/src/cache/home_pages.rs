//! Pages of a session by position, in runs: those that a replica keeps of a session which moved away, or those that one which
//! arrives will have. They are references in the page pool, whoever holds the value; it frees nothing by itself. A session
//! stands still while they are looked through, so all work is by runs, of which a session has a few however long it is.

use std::ops::Range;

/// Full pages of a session, ascending by position, with gaps where the session's latents were elsewhere already.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HomePages {
    /// Runs of neighbours: number of the first page (position / 64), and the pages in order. Ascending and disjoint.
    pub pages: Vec<(u64, Vec<u32>)>,
}

impl HomePages {
    /// Appends a page that lies behind all others; a neighbour joins the last run.
    pub fn push(&mut self, number: u64, page: u32) {
        match self.pages.last_mut() {
            Some((first, run)) if *first + run.len() as u64 == number => run.push(page),
            _ => self.pages.push((number, vec![page])),
        }
    }

    /// Appends neighbours that lie behind all others, from number `first` on.
    pub fn extend(&mut self, first: u64, pages: &[u32]) {
        match self.pages.last_mut() {
            _ if pages.is_empty() => {}
            Some((start, run)) if *start + run.len() as u64 == first => run.extend_from_slice(pages),
            _ => self.pages.push((first, pages.to_vec())),
        }
    }

    /// The pages with these numbers that are there, in runs of neighbours.
    pub fn within(&self, numbers: Range<u64>) -> impl Iterator<Item = (u64, &[u32])> {
        self.pages.iter().filter_map(move |(first, run)| {
            let start = numbers.start.max(*first);
            let end = numbers.end.min(*first + run.len() as u64);
            let pages = (start < end).then(|| run.get((start - first) as usize..(end - first) as usize))??;
            Some((start, pages))
        })
    }

    /// The page with this number.
    pub fn get(&self, number: u64) -> Option<u32> {
        self.within(number..number + 1).find_map(|(_, pages)| pages.first().copied())
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.pages.iter().all(|(_, run)| run.is_empty())
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.pages.iter().map(|(_, run)| run.len()).sum()
    }

    /// Every page with its number from position 0.
    pub fn numbered(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.pages.iter().flat_map(|(first, run)| (*first..).zip(run.iter().copied()))
    }

    /// Every page.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.pages.iter().flat_map(|(_, run)| run.iter().copied())
    }
}

impl FromIterator<(u64, u32)> for HomePages {
    /// From pages with their numbers, in any order.
    fn from_iter<I: IntoIterator<Item = (u64, u32)>>(pages: I) -> Self {
        let mut numbered: Vec<(u64, u32)> = pages.into_iter().collect();
        numbered.sort_unstable();
        let mut kept = Self::default();
        numbered.into_iter().for_each(|(number, page)| kept.push(number, page));
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_runs_are_found_and_joined() {
        let kept: HomePages = [(5, 7), (0, 9), (6, 2), (1, 4)].into_iter().collect();
        assert_eq!(kept.pages, [(0, vec![9, 4]), (5, vec![7, 2])]);
        let within = |numbers: Range<u64>| kept.within(numbers).map(|(first, pages)| (first, pages.to_vec()));
        assert_eq!(within(1..6).collect::<Vec<_>>(), [(1, vec![4]), (5, vec![7])]);
        assert_eq!(within(2..5).count() + within(7..9).count(), 0);
        assert_eq!([0, 1, 2, 6].map(|number| kept.get(number)), [Some(9), Some(4), None, Some(2)]);
        let mut joined = HomePages::default();
        for (first, pages) in [(0, [1, 2].as_slice()), (2, &[3]), (3, &[]), (4, &[5])] {
            joined.extend(first, pages);
        }
        assert_eq!(joined.pages, [(0, vec![1, 2, 3]), (4, vec![5])]);
    }

    #[test]
    fn neighbours_form_runs() {
        let mut kept = HomePages::default();
        assert!(kept.is_empty());
        [(0, 9), (1, 4), (5, 7), (6, 2)].into_iter().for_each(|(number, page)| kept.push(number, page));
        assert_eq!(kept.pages, [(0, vec![9, 4]), (5, vec![7, 2])]);
        assert_eq!((kept.len(), kept.is_empty()), (4, false));
        assert_eq!(kept.numbered().collect::<Vec<_>>(), [(0, 9), (1, 4), (5, 7), (6, 2)]);
        assert_eq!(kept.iter().collect::<Vec<_>>(), [9, 4, 7, 2]);
    }
}
