//! First steps of a loaded replica, so that the first request finds everything touched.

use perigee_backend::{Backend, Row, Segment, StepBatch};
use perigee_engine::executor::{Executor, StepPlan};
use perigee_engine::ranks::Ranks;

use crate::error::Result;

/// Runs one token through every rank; whoever takes the slot and the page later finds no trace of it.
///
/// # Errors
/// A rank failed.
pub(crate) fn warm<B: Backend>(ranks: &mut Ranks<B>) -> Result<()> {
    let row = Row {
        tokens: 1,
        position: 0,
        read_slot: 0,
        write_slot: 0,
        segments: vec![Segment { start: 0, end: 1, pages: vec![0] }],
    };
    let batch = StepBatch { tokens: vec![0], rows: vec![row], logits: vec![0] };
    ranks.step(&StepPlan { clear_slots: vec![0], batch, ..StepPlan::default() }, &[], false)?;
    Ok(())
}
