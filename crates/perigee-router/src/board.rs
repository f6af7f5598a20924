//! What replicas report, side by side: a choice among a thousand of them reads their reports in one pass over memory, without
//! a lock or an allocation for each. Streams write into their rows as they take in loads and send requests.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::attachment::Attachment;
use crate::route::{Chooser, Demand, Report};

/// The reports of a set of streams, a row each. A set that changes gets another board.
#[derive(Debug, Default)]
pub(crate) struct Board {
    rows: Mutex<Rows>,
}

#[derive(Debug, Default)]
struct Rows {
    /// Streams by row.
    ids: Vec<u64>,
    reports: Vec<Packed>,
    chooser: Chooser,
}

/// A report in half a line of memory: rows are written wherever loads come in, so that a choice among a thousand finds most of
/// them in another processor's cache, and waits for each line.
#[derive(Debug, Clone, Copy)]
struct Packed {
    /// What replicas report has this precision.
    decode_ms: f32,
    prompt_token_ms: f32,
    step_tokens: u32,
    queued_tokens: u32,
    running: u32,
    /// [`CLOSED`] where a replica takes no requests.
    waiting: u32,
    slots_free: u32,
    pages_free: u32,
}

const _: () = assert!(size_of::<Packed>() == 32);

/// So many never wait.
const CLOSED: u32 = u32::MAX;

impl Packed {
    fn of(report: Option<Report>) -> Self {
        let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let Report { decode_ms, prompt_token_ms, step_tokens, queued_tokens, running, waiting, slots_free, pages_free } =
            report.unwrap_or_default();
        Self {
            decode_ms: decode_ms as f32,
            prompt_token_ms: prompt_token_ms as f32,
            step_tokens: number(step_tokens),
            queued_tokens: number(queued_tokens),
            running: number(running),
            waiting: if report.is_some() { number(waiting).min(CLOSED - 1) } else { CLOSED },
            slots_free: number(slots_free),
            pages_free: number(pages_free),
        }
    }

    fn read(self) -> Option<Report> {
        (self.waiting != CLOSED).then(|| Report {
            decode_ms: f64::from(self.decode_ms),
            prompt_token_ms: f64::from(self.prompt_token_ms),
            step_tokens: u64::from(self.step_tokens),
            queued_tokens: u64::from(self.queued_tokens),
            running: u64::from(self.running),
            waiting: u64::from(self.waiting),
            slots_free: u64::from(self.slots_free),
            pages_free: u64::from(self.pages_free),
        })
    }
}

/// A stream's place on a board.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    board: Arc<Board>,
    index: usize,
}

/// A row that was chosen, and what it says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Chosen {
    pub(crate) index: usize,
    pub(crate) report: Report,
}

impl Board {
    /// A board for these streams, in their order. They leave the boards on which they were.
    pub(crate) fn of(attachments: &[Arc<Attachment>]) -> Arc<Self> {
        let rows = Rows {
            ids: attachments.iter().map(|attachment| attachment.id).collect(),
            reports: vec![Packed::of(None); attachments.len()],
            chooser: Chooser::of(attachments.len()),
        };
        let board = Arc::new(Self { rows: Mutex::new(rows) });
        for (index, attachment) in attachments.iter().enumerate() {
            attachment.report_to(Row { board: board.clone(), index });
        }
        board
    }

    /// The row where a request would have its first token soonest, of none of the streams `tried`.
    pub(crate) fn choose(&self, demand: Demand, tried: &[u64]) -> Option<Chosen> {
        let Rows { ids, reports, chooser } = &mut *self.rows.lock();
        let is_tried = |index: usize| !tried.is_empty() && ids.get(index).is_some_and(|id| tried.contains(id));
        let open = |index: usize| reports.get(index).and_then(|packed| packed.read()).filter(|_| !is_tried(index));
        let (index, report) = chooser.choose(open, demand)?;
        Some(Chosen { index, report })
    }
}

impl Row {
    /// Writes what a stream reports now.
    pub(crate) fn write(&self, report: Option<Report>) {
        let Rows { reports, chooser, .. } = &mut *self.board.rows.lock();
        if let Some(row) = reports.get_mut(self.index) {
            *row = Packed::of(report);
            chooser.set(self.index, report);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_keeps_what_is_reported_and_bounds_what_cannot_be() {
        let report = Report {
            decode_ms: f64::from(12.3_f32),
            prompt_token_ms: f64::from(0.017_f32),
            step_tokens: 8192,
            queued_tokens: 1 << 30,
            running: 64,
            waiting: 3,
            slots_free: 5,
            pages_free: 1 << 20,
        };
        assert_eq!(Packed::of(Some(report)).read(), Some(report));
        assert_eq!(Packed::of(None).read(), None);
        let endless = Report { waiting: u64::MAX, queued_tokens: u64::MAX, ..report };
        let read = Packed::of(Some(endless)).read().map(|read| (read.waiting, read.queued_tokens));
        assert_eq!(read, Some((u64::from(CLOSED) - 1, u64::from(u32::MAX))), "it is full, not closed");
    }
}
