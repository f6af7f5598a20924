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
    /// None where a replica takes no requests.
    reports: Vec<Option<Report>>,
    chooser: Chooser,
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
            reports: vec![None; attachments.len()],
            chooser: Chooser::default(),
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
        let untried = |index: usize| tried.is_empty() || !tried.contains(&ids[index]);
        let open = reports.iter().enumerate().filter_map(|(index, report)| Some((index, report.as_ref()?)));
        let (index, report) = chooser.choose(open.filter(|(index, _)| untried(*index)), demand)?;
        Some(Chosen { index, report: *report })
    }
}

impl Row {
    /// Writes what a stream reports now.
    pub(crate) fn write(&self, report: Option<Report>) {
        if let Some(row) = self.board.rows.lock().reports.get_mut(self.index) {
            *row = report;
        }
    }
}
