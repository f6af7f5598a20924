//! The pages that a replica keeps of a session which moved away: page numbers by position. They are references in the
//! page pool, whoever holds the value; it frees nothing by itself.

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

#[cfg(test)]
mod tests {
    use super::*;

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
