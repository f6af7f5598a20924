//! Which rows of a step attend in the expanded form, and the plan for them: the context in stretches whose keys and values are
//! expanded into working memory one after the other, so that memory does not depend on the context's length.

use perigee_backend::{PAGE_TOKENS, Row, StepBatch};

use crate::params::{ExpandedItem, GatherRun};

/// Query tokens of an item.
const ITEM_TOKENS: usize = 128;
/// Tokens from which a row attends in the expanded form. Expanding a key costs as much as about 170 queries save in operations;
/// but the expanded form's kernel is several times as fast an operation.
const LEAST_TOKENS: u32 = 256;

/// As in `mla/params.h`.
const FIRST_STRETCH: u32 = 1;
const LAST_STRETCH: u32 = 2;

/// Whether a row attends in the expanded form: it has many tokens, and all keys before them are here.
pub(crate) fn is_expanded(row: &Row) -> bool {
    let mut covered = 0;
    for segment in &row.segments {
        if segment.start != covered {
            return false;
        }
        covered = segment.end;
    }
    row.tokens >= LEAST_TOKENS && covered >= end(row)
}

/// One past the row's last position.
fn end(row: &Row) -> u64 {
    row.position + u64::from(row.tokens)
}

/// Consecutive tokens of the step whose rows attend in the same form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: usize,
    pub(crate) tokens: usize,
    pub(crate) is_expanded: bool,
}

/// Keys that are expanded together, and who attends to them: parts of the plan's runs and items.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) first_run: usize,
    pub(crate) runs: usize,
    pub(crate) first_item: usize,
    pub(crate) items: usize,
    pub(crate) keys: usize,
}

/// The plan; without spans where no row attends in the expanded form.
#[derive(Debug, Default)]
pub(crate) struct Expansion {
    pub(crate) spans: Vec<Span>,
    pub(crate) stretches: Vec<Stretch>,
    pub(crate) runs: Vec<GatherRun>,
    pub(crate) items: Vec<ExpandedItem>,
}

impl Expansion {
    /// Rows one after the other, in stretches of up to `most_keys`; a context that does not fit what is left of a stretch, but fits one, begins a new one.
    pub(crate) fn plan(batch: &StepBatch, most_keys: usize) -> Self {
        let mut plan = Self::default();
        if !batch.rows.iter().any(is_expanded) {
            return plan;
        }
        let mut first_token = 0;
        let mut stretch = Stretch::default();
        for row in &batch.rows {
            plan.span(first_token as usize, row);
            if is_expanded(row) {
                let mut start = 0;
                if end(row) as usize > most_keys - stretch.keys && end(row) as usize <= most_keys {
                    plan.close(&mut stretch);
                }
                while start < end(row) {
                    let stop = end(row).min(start + (most_keys - stretch.keys) as u64);
                    plan.items(row, first_token, start, stop, stretch.keys);
                    plan.runs(row, start, stop, stretch.keys);
                    stretch.keys += (stop - start) as usize;
                    start = stop;
                    if stretch.keys == most_keys {
                        plan.close(&mut stretch);
                    }
                }
            }
            first_token += row.tokens;
        }
        plan.close(&mut stretch);
        plan
    }

    /// Whether a token of the step attends in the expanded form.
    pub(crate) fn holds(&self, token: usize) -> bool {
        self.spans.iter().any(|span| span.is_expanded && (span.first..span.first + span.tokens).contains(&token))
    }

    fn span(&mut self, first: usize, row: &Row) {
        let (tokens, is_expanded) = (row.tokens as usize, is_expanded(row));
        match self.spans.last_mut() {
            Some(span) if span.is_expanded == is_expanded => span.tokens += tokens,
            _ => self.spans.push(Span { first, tokens, is_expanded }),
        }
    }

    /// Tiles of the row's queries that see keys of a stretch, those that see most first.
    fn items(&mut self, row: &Row, first_token: u32, start: u64, stop: u64, first_row: usize) {
        for first in (0..row.tokens).step_by(ITEM_TOKENS).rev() {
            let tokens = (row.tokens - first).min(ITEM_TOKENS as u32);
            let seen = row.position + u64::from(first + tokens);
            if seen <= start {
                continue;
            }
            let is_first = if start == 0 { FIRST_STRETCH } else { 0 };
            let is_last = if seen <= stop { LAST_STRETCH } else { 0 };
            self.items.push(ExpandedItem {
                first_token: first_token + first,
                tokens,
                first_position: (row.position + u64::from(first)) as u32,
                first_key: start as u32,
                first_row: first_row as u32,
                keys: (seen.min(stop) - start) as u32,
                flags: is_first | is_last,
            });
        }
    }

    /// Where the keys of a stretch lie, page by page.
    fn runs(&mut self, row: &Row, start: u64, stop: u64, first_row: usize) {
        let page_tokens = PAGE_TOKENS as u64;
        for segment in &row.segments {
            let (mut at, last) = (segment.start.max(start), segment.end.min(stop));
            while at < last {
                let next = (at / page_tokens + 1).saturating_mul(page_tokens).min(last);
                let (page, offset) = segment.locate(at);
                self.runs.push(GatherRun {
                    place: page * PAGE_TOKENS as u32 + offset as u32,
                    row: first_row as u32 + (at - start) as u32,
                    keys: (next - at) as u32,
                });
                at = next;
            }
        }
    }

    /// Ends a stretch, if it holds anything, and begins the next.
    fn close(&mut self, stretch: &mut Stretch) {
        stretch.runs = self.runs.len() - stretch.first_run;
        stretch.items = self.items.len() - stretch.first_item;
        if stretch.keys > 0 {
            self.stretches.push(*stretch);
        }
        *stretch = Stretch { first_run: self.runs.len(), first_item: self.items.len(), ..Stretch::default() };
    }
}

#[cfg(test)]
mod tests {
    use perigee_backend::Segment;

    use super::*;

    fn row(position: u64, tokens: u32, bounds: &[u64]) -> Row {
        let segments = bounds
            .windows(2)
            .map(|pair| {
                let pages = Segment::pages_for(pair[0], pair[1]) as u32;
                Segment {
                    start: pair[0],
                    end: pair[1],
                    pages: (0..pages).map(|page| page + 7 * pair[0] as u32).collect(),
                }
            })
            .collect();
        Row { tokens, position, read_slot: 0, write_slot: 0, segments }
    }

    fn batch(rows: Vec<Row>) -> StepBatch {
        let tokens = rows.iter().map(|row| row.tokens as usize).sum();
        StepBatch { tokens: vec![0; tokens], rows, logits: vec![] }
    }

    /// Every query of every expanded row sees each key at or before it exactly once, in order, from the page that holds it.
    fn check(batch: &StepBatch, most_keys: usize) {
        let plan = Expansion::plan(batch, most_keys);
        let mut first_token = 0;
        for row in &batch.rows {
            for token in first_token..first_token + row.tokens {
                assert_eq!(plan.holds(token as usize), is_expanded(row));
                if !is_expanded(row) || (token - first_token) % 61 != 0 && token + 1 != first_token + row.tokens {
                    continue;
                }
                let position = row.position + u64::from(token - first_token);
                let mut seen = 0;
                let mut flags = Vec::new();
                for stretch in &plan.stretches {
                    assert!(stretch.keys <= most_keys);
                    let items = &plan.items[stretch.first_item..stretch.first_item + stretch.items];
                    let Some(item) = items.iter().find(|i| (i.first_token..i.first_token + i.tokens).contains(&token))
                    else {
                        continue;
                    };
                    assert_eq!(u64::from(item.first_position + token - item.first_token), position);
                    assert_eq!(u64::from(item.first_key), seen);
                    seen += u64::from(item.keys);
                    flags.push(item.flags);
                    for key in (0..item.keys).step_by(37) {
                        let runs = &plan.runs[stretch.first_run..stretch.first_run + stretch.runs];
                        let at = item.first_row + key;
                        let run = runs.iter().find(|run| (run.row..run.row + run.keys).contains(&at)).unwrap();
                        let absolute = u64::from(item.first_key + key);
                        let segment = row.segments.iter().find(|s| (s.start..s.end).contains(&absolute)).unwrap();
                        let (page, offset) = segment.locate(absolute);
                        assert_eq!(run.place + at - run.row, page * PAGE_TOKENS as u32 + offset as u32);
                    }
                }
                assert!(seen > position, "token {token} sees {seen} keys");
                assert_eq!(flags[0] & FIRST_STRETCH, FIRST_STRETCH);
                assert_eq!(flags[flags.len() - 1] & LAST_STRETCH, LAST_STRETCH);
                assert!(flags[1..].iter().all(|flags| flags & FIRST_STRETCH == 0));
                assert!(flags[..flags.len() - 1].iter().all(|flags| flags & LAST_STRETCH == 0));
            }
            first_token += row.tokens;
        }
    }

    #[test]
    fn every_key_is_seen_once_whatever_the_rows() {
        for most_keys in [320, 8192] {
            check(&batch(vec![row(0, 300, &[0, 300])]), most_keys);
            let rows = vec![row(9000, 1, &[0, 9001]), row(8100, 500, &[0, 63, 100, 8600]), row(0, 256, &[0, 256])];
            check(&batch(rows), most_keys);
            let rows = vec![row(20_000, 8192, &[0, 20_001, 28_192]), row(5, 20, &[0, 25]), row(0, 1024, &[0, 1024])];
            check(&batch(rows), most_keys);
            check(&batch((0..9).map(|_| row(0, 1024, &[0, 1024])).collect()), most_keys);
        }
    }

    #[test]
    fn rows_with_keys_elsewhere_or_few_tokens_stay_absorbed() {
        assert!(is_expanded(&row(64, 256, &[0, 320])));
        assert!(!is_expanded(&row(64, 255, &[0, 319])));
        assert!(!is_expanded(&row(64, 256, &[64, 320])));
        assert!(!is_expanded(&row(128, 256, &[0, 64, 64]).with_gap()));
        let plan = Expansion::plan(&batch(vec![row(8, 1, &[0, 9])]), 8192);
        assert!(plan.spans.is_empty() && plan.stretches.is_empty());
    }

    trait Gap {
        fn with_gap(self) -> Self;
    }

    impl Gap for Row {
        fn with_gap(mut self) -> Self {
            self.segments = [row(0, 0, &[0, 64]).segments, row(0, 0, &[128, 384]).segments].concat();
            self
        }
    }

    #[test]
    fn spans_join_rows_of_one_form() {
        let plan = Expansion::plan(&batch(vec![row(8, 1, &[0, 9]), row(7, 1, &[0, 8]), row(0, 256, &[0, 256])]), 8192);
        let span = |first, tokens, is_expanded| Span { first, tokens, is_expanded };
        assert_eq!(plan.spans, [span(0, 2, false), span(2, 256, true)]);
        assert_eq!(plan.stretches, [Stretch { first_run: 0, runs: 4, first_item: 0, items: 2, keys: 256 }]);
    }
}
