//! What kernels know of the current step: tokens, rows, places of latents and the attention plan, packed into one block and
//! sent once. Sections have sizes rounded up to powers of two, so that steps of like size find them at the same addresses.

use std::mem::take;

use bytemuck::{NoUninit, cast_slice};
use perigee_backend::{BackendError, PAGE_TOKENS, Result, Row, Segment, StepBatch};

use crate::expand::{Expansion, is_expanded};
use crate::formula::{Fault, Formula};
use crate::needs::{CHUNK_TOKENS, ITEM_ROWS};
use crate::params::{AttendItem, AttendMerge, AttendRange, KdaChunk, KdaRow};
use crate::stream::Stream;
use crate::transfer::Upload;

/// An item's result that needs no merge.
const NO_PART: u32 = u32::MAX;
/// The place of a row that pads a step, as in `mla/params.h`.
const NO_PLACE: u32 = u32::MAX;
/// Least keys of a split: below it a split costs more than it gains.
const LEAST_SPLIT: usize = 64;
/// Least pages that a block is dealt.
const LEAST_PAGES: usize = 2;

/// A section of the block: where it lies on the device and how many elements it has.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Section {
    pub(crate) address: u64,
    pub(crate) count: usize,
}

/// The current step.
#[derive(Debug, Default)]
pub(crate) struct Step {
    upload: Option<Upload>,
    /// Of decode steps of a fixed form: its sections never move.
    decode_upload: Option<Upload>,
    packed: Vec<u8>,
    pub(crate) tokens: Section,
    /// The draw that each token comes from, where the step is fed with draws.
    pub(crate) feed: Section,
    /// One number: tokens that do not pad the step.
    pub(crate) live: Section,
    pub(crate) logits: Section,
    /// Place of each token's latent: page * 64 + offset.
    pub(crate) places: Section,
    /// Rows of one token.
    pub(crate) decode_rows: Section,
    /// Rows of several tokens.
    pub(crate) prefill_rows: Section,
    /// Chunks of the rows of several tokens, row after row.
    pub(crate) chunks: Section,
    /// First chunk of every row of several tokens, and one past the last.
    pub(crate) row_chunks: Section,
    pub(crate) pages: Section,
    pub(crate) ranges: Section,
    pub(crate) items: Section,
    pub(crate) merges: Section,
    /// First item of every block where items of single tokens are dealt out to blocks, and one past the last.
    pub(crate) first_items: Section,
    pub(crate) gather_runs: Section,
    pub(crate) expanded_items: Section,
    /// Rows that attend in the expanded form.
    pub(crate) expansion: Expansion,
    /// The numbers in `row_chunks`, for launches by groups of rows.
    pub(crate) chunk_bounds: Vec<u32>,
    /// Partial results of attention.
    pub(crate) parts: usize,
    /// Most tokens of an item.
    pub(crate) item_tokens: usize,
}

/// What the attention plan depends on besides the batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Planning {
    /// Query heads of MLA layers, 0 where there are none.
    pub(crate) heads: usize,
    /// Items that fill the device.
    pub(crate) items: usize,
    /// Blocks that items of single tokens are dealt out to, 0 where no kernel takes them so.
    pub(crate) blocks: usize,
    /// Keys of a stretch of the expanded form of attention, 0 where no row attends in it.
    pub(crate) stretch: usize,
}

impl Step {
    /// Plans a batch and sends the plan.
    pub(crate) fn begin(
        &mut self,
        stream: &Stream,
        batch: &StepBatch,
        feed: &[u32],
        planning: Planning,
        formula: Formula,
    ) -> Result<()> {
        let mut rows = Rows::new(batch)?;
        rows.append_positions(batch, formula);
        let attention = Attention::plan(batch, planning);
        self.expansion =
            if planning.stretch > 0 { Expansion::plan(batch, planning.stretch) } else { Expansion::default() };
        let (runs, items) = (take(&mut self.expansion.runs), take(&mut self.expansion.items));
        self.packed.clear();
        self.tokens = self.pack(&batch.tokens);
        self.feed = self.pack(feed);
        self.live = self.pack(&[batch.tokens.len() as u32]);
        self.logits = self.pack(&batch.logits);
        self.places = self.pack(&rows.places);
        self.decode_rows = self.pack(&rows.decode);
        self.prefill_rows = self.pack(&rows.prefill);
        self.chunks = self.pack(&rows.chunks);
        self.row_chunks = self.pack(&rows.row_chunks);
        self.items = self.pack(&attention.items);
        self.merges = self.pack(&attention.merges);
        self.first_items = self.pack(&attention.first_items);
        self.ranges = self.pack(&attention.ranges);
        self.gather_runs = self.pack(&runs);
        self.expanded_items = self.pack(&items);
        self.pages = self.pack(&attention.pages);
        self.chunk_bounds = rows.row_chunks;
        self.parts = attention.parts as usize;
        self.item_tokens = attention.item_tokens;
        self.send(stream)
    }

    /// Appends a section; its address is an offset until `send`.
    fn pack<T: NoUninit>(&mut self, values: &[T]) -> Section {
        let offset = self.packed.len();
        let bytes: &[u8] = cast_slice(values);
        self.packed.extend_from_slice(bytes);
        self.packed.resize(offset + bytes.len().next_power_of_two().max(256), 0);
        Section { address: offset as u64, count: values.len() }
    }

    fn send(&mut self, stream: &Stream) -> Result<()> {
        let bytes = self.packed.len();
        if self.upload.as_ref().is_none_or(|upload| upload.capacity() < bytes) {
            // Work already queued may still read the block that goes.
            stream.wait()?;
            self.upload = Some(Upload::new(stream.device(), bytes.next_power_of_two().max(1 << 16), "step plan")?);
        }
        let Some(upload) = &mut self.upload else { return Ok(()) };
        upload.send(stream, &self.packed)?;
        let base = upload.address();
        self.shift(base);
        Ok(())
    }

    /// Adds the block's address to the sections' offsets.
    fn shift(&mut self, base: u64) {
        for section in [
            &mut self.tokens,
            &mut self.feed,
            &mut self.live,
            &mut self.logits,
            &mut self.places,
            &mut self.decode_rows,
            &mut self.prefill_rows,
            &mut self.chunks,
            &mut self.row_chunks,
            &mut self.items,
            &mut self.merges,
            &mut self.first_items,
            &mut self.ranges,
            &mut self.gather_runs,
            &mut self.expanded_items,
            &mut self.pages,
        ] {
            section.address += base;
        }
    }

    /// Plans a batch of one-token rows in a fixed form and sends the plan: rows, items and merges that are not there are
    /// zeros, and every section lies where it lay in the last step of that form. False where the plan does not fit it.
    pub(crate) fn begin_decode(
        &mut self,
        stream: &Stream,
        batch: &StepBatch,
        feed: &[u32],
        planning: Planning,
        form: DecodeForm,
    ) -> Result<bool> {
        let mut rows = Rows::new(batch)?;
        rows.places.resize(form.rows, NO_PLACE);
        rows.append_positions(batch, form.formula);
        let attention = Attention::plan(batch, planning);
        let items = form.items(planning);
        // Pages come last, and only those that there are are sent.
        let pages = form.fixed_bytes(planning);
        if self.decode_upload.as_ref().is_none_or(|upload| upload.capacity() < pages + form.page_bytes()) {
            stream.wait()?;
            let bytes = (pages + form.page_bytes()).next_power_of_two();
            self.decode_upload = Some(Upload::new(stream.device(), bytes, "plan of a decode step")?);
        }
        let Some(upload) = &self.decode_upload else { return Ok(false) };
        let fits = attention.items.len() <= items
            && attention.ranges.len() <= items * RANGES_PER_ITEM
            && attention.item_tokens <= 1
            && attention.parts as usize <= form.parts(planning)
            && pages + size_of_val(attention.pages.as_slice()) <= upload.capacity();
        if !fits {
            return Ok(false);
        }
        self.packed.clear();
        self.tokens = self.pack_fixed(&batch.tokens, form.rows);
        self.feed = self.pack_fixed(feed, form.rows);
        self.live = self.pack_fixed(&[batch.tokens.len() as u32], 1);
        self.logits = self.pack_fixed(&batch.logits, form.rows);
        self.places = self.pack_fixed(&rows.places, form.places());
        self.decode_rows = self.pack_fixed(&rows.decode, form.rows);
        self.items = self.pack_fixed(&attention.items, items);
        self.merges = self.pack_fixed(&attention.merges, form.rows);
        self.first_items = self.pack_fixed(&attention.first_items, attention.first_items.len());
        self.ranges = self.pack_fixed(&attention.ranges, items * RANGES_PER_ITEM);
        let none = Section { address: 0, count: 0 };
        (self.prefill_rows, self.chunks, self.row_chunks) = (none, none, none);
        (self.gather_runs, self.expanded_items) = (none, none);
        self.expansion = Expansion::default();
        self.pages = self.pack(&attention.pages);
        self.chunk_bounds.clear();
        // Not the parts of this step: where they lie in working memory is recorded, and other steps have more of them.
        self.parts = form.parts(planning);
        self.item_tokens = 1;
        if let Some(upload) = &mut self.decode_upload {
            upload.send(stream, &self.packed[..self.packed.len().min(upload.capacity())])?;
            let base = upload.address();
            self.shift(base);
        }
        Ok(true)
    }

    /// Device address of the plans of decode steps, 0 before the first.
    pub(crate) fn decode_address(&self) -> u64 {
        self.decode_upload.as_ref().map_or(0, Upload::address)
    }

    /// Appends a section of `capacity` elements; the missing ones are zeros.
    fn pack_fixed<T: NoUninit>(&mut self, values: &[T], capacity: usize) -> Section {
        let offset = self.packed.len();
        self.packed.extend_from_slice(cast_slice(values));
        self.packed.resize(offset + capacity * size_of::<T>(), 0);
        self.packed.resize(self.packed.len().next_multiple_of(SECTION_ALIGNMENT), 0);
        Section { address: offset as u64, count: capacity }
    }
}

/// Ranges of keys that a decode step's plan has room for, for each item.
const RANGES_PER_ITEM: usize = 4;
/// Sections of a fixed form begin at multiples of this.
const SECTION_ALIGNMENT: usize = 256;

/// The form of decode steps of one size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecodeForm {
    /// Rows, padding included.
    pub(crate) rows: usize,
    /// Latent pages that there are.
    pub(crate) pages: usize,
    pub(crate) formula: Formula,
}

impl DecodeForm {
    /// Numbers in the section of places.
    fn places(self) -> usize {
        if self.formula.has(Fault::Rotary) { 2 * self.rows } else { self.rows }
    }

    /// Most items of attention: one for each row, and the splits that fill the device.
    fn items(self, planning: Planning) -> usize {
        self.rows + planning.items
    }

    /// Most partial results of attention.
    fn parts(self, planning: Planning) -> usize {
        2 * planning.items
    }

    /// Bytes before the pages.
    fn fixed_bytes(self, planning: Planning) -> usize {
        let section = |elements: usize, bytes: usize| (elements * bytes).next_multiple_of(SECTION_ALIGNMENT);
        let items = self.items(planning);
        section(self.rows, 4) * 3
            + section(self.places(), 4)
            + section(1, 4)
            + section(self.rows, size_of::<KdaRow>())
            + section(items, size_of::<AttendItem>())
            + section(self.rows, size_of::<AttendMerge>())
            + section(planning.blocks + 1, 4)
            + section(items * RANGES_PER_ITEM, size_of::<AttendRange>())
    }

    /// Bytes for the page tables: every page once, a partial one for each row, and as much again for pages that forks share.
    fn page_bytes(self) -> usize {
        (2 * self.pages + self.rows) * 4
    }
}

/// Rows as KDA and the latent store see them.
#[derive(Debug, Default)]
struct Rows {
    decode: Vec<KdaRow>,
    prefill: Vec<KdaRow>,
    chunks: Vec<KdaChunk>,
    row_chunks: Vec<u32>,
    places: Vec<u32>,
}

impl Rows {
    fn new(batch: &StepBatch) -> Result<Self> {
        let mut rows = Self { row_chunks: vec![0], ..Self::default() };
        let mut first_token = 0;
        for row in &batch.rows {
            let end = row.position + u64::from(row.tokens);
            if end > u64::from(u32::MAX) {
                return Err(BackendError::Range { what: "position", index: end, limit: u64::from(u32::MAX) });
            }
            rows.place(row)?;
            let entry =
                KdaRow { first_token, tokens: row.tokens, read_slot: row.read_slot, write_slot: row.write_slot };
            first_token += row.tokens;
            if row.tokens == 1 {
                rows.decode.push(entry);
                continue;
            }
            for first in (0..row.tokens).step_by(CHUNK_TOKENS) {
                let tokens = (row.tokens - first).min(CHUNK_TOKENS as u32);
                rows.chunks.push(KdaChunk { row: rows.prefill.len() as u32, first, tokens });
            }
            rows.prefill.push(entry);
            rows.row_chunks.push(rows.chunks.len() as u32);
        }
        Ok(rows)
    }

    /// The mistake of rotary positions takes each token's behind the places.
    fn append_positions(&mut self, batch: &StepBatch, formula: Formula) {
        if formula.has(Fault::Rotary) {
            let positions = batch.rows.iter().flat_map(|row| (row.position..).take(row.tokens as usize));
            self.places.extend(positions.map(|position| position as u32));
        }
    }

    /// Places of the row's new latents; the segments that hold them were checked to be there.
    fn place(&mut self, row: &Row) -> Result<()> {
        let mut segments = row.segments.iter();
        let mut current = segments.next();
        for position in row.position..row.position + u64::from(row.tokens) {
            while current.is_some_and(|segment| segment.end <= position) {
                current = segments.next();
            }
            let Some(segment) = current.filter(|segment| segment.start <= position) else {
                return Err(BackendError::Batch(format!("no segment has room for the latents of position {position}")));
            };
            let (page, offset) = segment.locate(position);
            self.places.push(page * PAGE_TOKENS as u32 + offset as u32);
        }
        Ok(())
    }
}

/// Which block computes which queries against which keys.
#[derive(Debug, Default)]
pub(crate) struct Attention {
    pub(crate) items: Vec<AttendItem>,
    pub(crate) ranges: Vec<AttendRange>,
    pub(crate) merges: Vec<AttendMerge>,
    pub(crate) pages: Vec<u32>,
    pub(crate) parts: u32,
    pub(crate) item_tokens: usize,
    /// First item of every block and one past the last, where items are dealt out to blocks, else nothing.
    pub(crate) first_items: Vec<u32>,
}

impl Attention {
    /// Cuts each row into tiles of queries, and each tile's keys into splits as even as pages allow. The split length is such
    /// that all splits together just fill the device; a tile with one split needs no merge. Where all rows are of one token and
    /// a kernel takes them so, the keys are dealt out to blocks instead.
    pub(crate) fn plan(batch: &StepBatch, planning: Planning) -> Self {
        let mut plan = Self::default();
        if planning.heads == 0 {
            return plan;
        }
        let is_dealt = |row: &Row| row.tokens == 1 || (planning.stretch > 0 && is_expanded(row));
        if planning.blocks > 0 && batch.rows.iter().all(is_dealt) {
            plan.deal(batch, planning);
            return plan;
        }
        let tile = (ITEM_ROWS / planning.heads).max(1);
        let is_apart = |row: &Row| planning.stretch > 0 && is_expanded(row);
        let rows = || batch.rows.iter().filter(|row| !is_apart(row));
        let tiles: usize = rows().map(|row| (row.tokens as usize).div_ceil(tile)).sum();
        let keys: u64 =
            rows().map(|row| keys_before(row, u64::MAX) * (row.tokens as usize).div_ceil(tile) as u64).sum();
        let free = planning.items.saturating_sub(tiles).max(1);
        let even = if tiles >= planning.items { usize::MAX } else { (keys as usize).div_ceil(free) };
        let split = even.max(LEAST_SPLIT).checked_next_multiple_of(PAGE_TOKENS).unwrap_or(usize::MAX);
        let mut first_token = 0;
        for row in &batch.rows {
            if is_apart(row) {
                first_token += row.tokens;
                continue;
            }
            let tables = plan.tables(row);
            for first in (0..row.tokens).step_by(tile) {
                let tokens = (row.tokens - first).min(tile as u32);
                let item = AttendItem {
                    first_token: first_token + first,
                    tokens,
                    first_position: (row.position + u64::from(first)) as u32,
                    first_range: 0,
                    ranges: 0,
                    part: NO_PART,
                };
                plan.item_tokens = plan.item_tokens.max(tokens as usize);
                plan.tile(row, &tables, item, split);
            }
            first_token += row.tokens;
        }
        plan
    }

    /// Deals the pages of all rows of one token out to blocks, as many to each, in the order of rows: a row whose pages more than
    /// one block has is merged.
    fn deal(&mut self, batch: &StepBatch, planning: Planning) {
        let single = || batch.rows.iter().filter(|row| row.tokens == 1);
        let pages: usize = single().map(|row| pages_before(row, row.position + 1)).sum();
        let share = pages.div_ceil(planning.blocks).max(LEAST_PAGES);
        let mut room = share;
        self.first_items.push(0);
        let mut first_token = 0;
        for row in &batch.rows {
            if row.tokens == 1 {
                let template = AttendItem {
                    first_token,
                    tokens: 1,
                    first_position: row.position as u32,
                    first_range: 0,
                    ranges: 0,
                    part: NO_PART,
                };
                self.item_tokens = 1;
                self.deal_row(row, template, share, &mut room);
            }
            first_token += row.tokens;
        }
        self.first_items.resize(planning.blocks + 1, self.items.len() as u32);
    }

    /// Items of one row: one for each block that has some of its pages. `room` is what the current block has left of its share.
    fn deal_row(&mut self, row: &Row, template: AttendItem, share: usize, room: &mut usize) {
        let tables = self.tables(row);
        let first_item = self.items.len();
        let mut item = AttendItem { first_range: self.ranges.len() as u32, ..template };
        for (segment, pages) in row.segments.iter().zip(tables) {
            let last = segment.end.min(row.position + 1);
            let mut start = segment.start;
            while start < last {
                if *room == 0 {
                    if item.ranges > 0 {
                        self.items.push(item);
                        item = AttendItem { first_range: self.ranges.len() as u32, ..template };
                    }
                    self.first_items.push(self.items.len() as u32);
                    *room = share;
                }
                let page = start / PAGE_TOKENS as u64;
                let end = last.min((page + *room as u64) * PAGE_TOKENS as u64);
                let first_page = (segment.start / PAGE_TOKENS as u64) as u32;
                self.ranges.push(AttendRange { pages, first_page, start: start as u32, end: end as u32 });
                item.ranges += 1;
                *room -= (end.div_ceil(PAGE_TOKENS as u64) - page) as usize;
                start = end;
            }
        }
        if item.ranges > 0 {
            self.items.push(item);
        }
        self.close(first_item);
    }

    /// Blocks that items are dealt out to.
    pub(crate) fn blocks(&self) -> usize {
        self.first_items.len().saturating_sub(1)
    }

    /// Appends the row's page tables; where each segment's begins.
    fn tables(&mut self, row: &Row) -> Vec<u32> {
        row.segments
            .iter()
            .map(|segment| {
                let at = self.pages.len() as u32;
                self.pages.extend_from_slice(&segment.pages);
                at
            })
            .collect()
    }

    /// Items of one tile: ranges are gathered until a split is full.
    fn tile(&mut self, row: &Row, tables: &[u32], template: AttendItem, split: usize) {
        let end = u64::from(template.first_position) + u64::from(template.tokens);
        let first_item = self.items.len();
        let mut item = AttendItem { first_range: self.ranges.len() as u32, ..template };
        let mut room = split;
        for (segment, &pages) in row.segments.iter().zip(tables) {
            let last = segment.end.min(end);
            let mut start = segment.start;
            while start < last {
                // A split ends at a page's end.
                let reach = start.saturating_add(room as u64) / PAGE_TOKENS as u64 * PAGE_TOKENS as u64;
                let stop = if reach > start { reach.min(last) } else { last.min(start + PAGE_TOKENS as u64) };
                let first_page = (segment.start / PAGE_TOKENS as u64) as u32;
                self.ranges.push(AttendRange { pages, first_page, start: start as u32, end: stop as u32 });
                item.ranges += 1;
                room = room.saturating_sub((stop - start) as usize);
                start = stop;
                if room < PAGE_TOKENS {
                    self.items.push(item);
                    item = AttendItem { first_range: self.ranges.len() as u32, ..template };
                    room = split;
                }
            }
        }
        if item.ranges > 0 {
            self.items.push(item);
        }
        self.close(first_item);
    }

    /// Items from `first` on are all of one tile: several are merged.
    fn close(&mut self, first_item: usize) {
        let count = (self.items.len() - first_item) as u32;
        if count <= 1 {
            return;
        }
        let template = self.items[first_item];
        // No keys at all cannot happen: a row holds at least its own. Several items are merged.
        for item in &mut self.items[first_item..] {
            item.part = self.parts;
            self.parts += 1;
        }
        let first_part = self.parts - count;
        self.merges.push(AttendMerge {
            first_token: template.first_token,
            tokens: template.tokens,
            first_part,
            parts: count,
        });
    }
}

/// Local pages of a row with keys below a position; one that two segments share counts for each.
fn pages_before(row: &Row, end: u64) -> usize {
    row.segments.iter().map(|segment| Segment::pages_for(segment.start, segment.end.min(end))).sum()
}

/// Local keys of a row below a position.
fn keys_before(row: &Row, end: u64) -> u64 {
    row.segments.iter().map(|segment| segment.end.min(end).saturating_sub(segment.start)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: u64, end: u64, first: u32) -> Segment {
        let count = Segment::pages_for(start, end) as u32;
        Segment { start, end, pages: (first..first + count).collect() }
    }

    fn batch(rows: Vec<Row>) -> StepBatch {
        let tokens = rows.iter().map(|row| row.tokens).sum::<u32>();
        StepBatch { tokens: vec![0; tokens as usize], rows, logits: vec![] }
    }

    fn row(position: u64, tokens: u32, segments: Vec<Segment>) -> Row {
        Row { tokens, position, read_slot: 0, write_slot: 0, segments }
    }

    /// Every token sees every local key at or before it exactly once.
    fn check_cover(batch: &StepBatch, plan: &Attention) {
        let mut first_token = 0u32;
        for row in &batch.rows {
            for at in 0..row.tokens {
                let (token, position) = (first_token + at, (row.position + u64::from(at)) as u32);
                let mut seen = Vec::new();
                for item in &plan.items {
                    if !(item.first_token..item.first_token + item.tokens).contains(&token) {
                        continue;
                    }
                    assert_eq!(item.first_position + token - item.first_token, position);
                    for range in &plan.ranges[item.first_range as usize..(item.first_range + item.ranges) as usize] {
                        seen.extend(range.start..range.end.min(position + 1));
                    }
                }
                seen.sort_unstable();
                let expected: Vec<u32> = row
                    .segments
                    .iter()
                    .flat_map(|segment| segment.start as u32..segment.end.min(u64::from(position) + 1) as u32)
                    .collect();
                assert_eq!(seen, expected, "token {token}");
            }
            first_token += row.tokens;
        }
    }

    #[test]
    fn splits_cover_each_key_once() {
        let batch = batch(vec![
            row(5000, 1, vec![segment(0, 777, 0), segment(777, 4001, 40), segment(4500, 5001, 100)]),
            row(60, 9, vec![segment(0, 69, 200)]),
            row(0, 1, vec![segment(0, 1, 210)]),
        ]);
        for heads in [4, 32, 100] {
            for items in [1, 8, 264] {
                let plan = Attention::plan(&batch, Planning { heads, items, blocks: 0, stretch: 0 });
                check_cover(&batch, &plan);
                let merged: u32 = plan.merges.iter().map(|merge| merge.parts).sum();
                assert_eq!(merged, plan.parts);
            }
        }
    }

    #[test]
    fn a_long_context_fills_the_device_and_a_full_batch_is_not_split() {
        let long = batch(vec![row(131_071, 1, vec![segment(0, 131_072, 0)])]);
        let plan = Attention::plan(&long, Planning { heads: 32, items: 264, blocks: 0, stretch: 0 });
        assert!((200..=264).contains(&plan.items.len()), "{} items", plan.items.len());
        assert_eq!(plan.merges.len(), 1);
        let many = batch((0..300).map(|at| row(999, 1, vec![segment(0, 1000, at * 16)])).collect());
        let plan = Attention::plan(&many, Planning { heads: 32, items: 264, blocks: 0, stretch: 0 });
        assert_eq!((plan.items.len(), plan.parts), (300, 0));
    }

    #[test]
    fn tokens_are_dealt_out_to_blocks() {
        let planning = |blocks| Planning { heads: 32, items: 264, blocks, stretch: 0 };
        let uneven = batch(vec![
            row(5000, 1, vec![segment(0, 777, 0), segment(777, 4001, 40), segment(4500, 5001, 100)]),
            row(0, 1, vec![segment(0, 1, 210)]),
            row(699, 1, vec![segment(130, 700, 220)]),
        ]);
        for blocks in [1, 8, 132] {
            let plan = Attention::plan(&uneven, planning(blocks));
            check_cover(&uneven, &plan);
            assert_eq!(plan.blocks(), blocks);
            assert_eq!((plan.first_items[0], plan.first_items[blocks] as usize), (0, plan.items.len()));
            let merged: u32 = plan.merges.iter().map(|merge| merge.parts).sum();
            assert_eq!(merged, plan.parts);
        }
        // 100 rows of 16 pages and a key: 1,700 pages are 13 for each of 132 blocks.
        let even = batch((0..100).map(|at| row(1024, 1, vec![segment(0, 1025, at * 17)])).collect());
        let plan = Attention::plan(&even, planning(132));
        check_cover(&even, &plan);
        let pages = |range: &AttendRange| (range.end.div_ceil(64) - range.start / 64) as usize;
        for items in plan.first_items.windows(2) {
            let items = &plan.items[items[0] as usize..items[1] as usize];
            let ranges = items
                .iter()
                .flat_map(|item| &plan.ranges[item.first_range as usize..(item.first_range + item.ranges) as usize]);
            assert!(ranges.map(pages).sum::<usize>() <= 13);
        }
    }

    #[test]
    fn decode_forms_have_room_for_splits_of_any_context() {
        for rows in [1, 2, 3, 8, 24, 100, 256, 300] {
            for context in [1, 63, 64, 65, 1000, 4097, 131_072] {
                let pages = (context as u32).div_ceil(64);
                let batch =
                    batch((0..rows).map(|at| row(context - 1, 1, vec![segment(0, context, at * pages)])).collect());
                for blocks in [0, 132] {
                    let planning = Planning { heads: 32, items: 264, blocks, stretch: 0 };
                    let plan = Attention::plan(&batch, planning);
                    let form =
                        DecodeForm { rows: rows as usize, pages: (rows * pages) as usize, formula: Formula::default() };
                    assert!(plan.items.len() <= form.items(planning), "{rows} x {context}: {} items", plan.items.len());
                    assert!(plan.ranges.len() <= form.items(planning) * RANGES_PER_ITEM);
                    assert!(plan.merges.len() <= rows as usize && plan.item_tokens == 1);
                    assert!(plan.parts as usize <= form.parts(planning), "{rows} x {context}: {} parts", plan.parts);
                }
            }
        }
    }

    #[test]
    fn rows_of_several_tokens_are_cut_into_chunks() {
        let batch = batch(vec![
            row(0, 130, vec![segment(0, 130, 0)]),
            row(7, 1, vec![segment(0, 8, 9)]),
            row(0, 64, vec![segment(0, 64, 10)]),
        ]);
        let rows = Rows::new(&batch).unwrap();
        assert_eq!((rows.decode.len(), rows.prefill.len()), (1, 2));
        assert_eq!(rows.chunks.iter().map(|chunk| chunk.tokens).collect::<Vec<_>>(), [64, 64, 2, 64]);
        assert_eq!(rows.row_chunks, [0, 3, 4]);
        assert_eq!(rows.places[129], 2 * 64 + 1);
        assert_eq!(rows.places[130], 9 * 64 + 7);
    }
}
