//! First steps of a loaded replica, so that the first request finds everything touched and, on GPUs, every decode step
//! recorded.

use perigee_backend::{Backend, Row, Segment, StepBatch};
use perigee_engine::executor::{Executor, StepPlan};
use perigee_engine::ranks::Ranks;

use crate::device::Device;
use crate::error::Result;

/// Runs steps of one token a row through every rank: one such step, and on GPUs one of every recorded size, the largest
/// first. Whoever takes the slots and the page later finds no trace of it.
///
/// # Errors
/// A rank failed.
pub(crate) fn warm<B: Backend>(ranks: &mut Ranks<B>, device: &Device) -> Result<()> {
    let limits = ranks.limits();
    for rows in sizes(device, limits.step_rows.min(limits.slots)) {
        ranks.step(&step(rows as u32), &[], false)?;
    }
    Ok(())
}

/// Rows of the steps to run. A step of one row comes first, since the first step is never recorded.
fn sizes(device: &Device, most: usize) -> Vec<usize> {
    let mut sizes = vec![1];
    if *device != Device::Cpu {
        sizes.extend(perigee_cuda::ladder(most).into_iter().rev());
    }
    sizes
}

/// A step of `rows` rows, each the first token of a session; all share a page.
fn step(rows: u32) -> StepPlan {
    let row = |slot| Row {
        tokens: 1,
        position: 0,
        read_slot: slot,
        write_slot: slot,
        segments: vec![Segment { start: 0, end: 1, pages: vec![0] }],
    };
    let batch =
        StepBatch { tokens: vec![0; rows as usize], rows: (0..rows).map(row).collect(), logits: (0..rows).collect() };
    StepPlan { clear_slots: (0..rows).collect(), batch, ..StepPlan::default() }
}

#[cfg(test)]
mod tests {
    use perigee_backend::batch::BatchLimits;

    use super::*;

    #[test]
    fn every_recorded_size_is_run_once_after_a_first_step() {
        assert_eq!(sizes(&Device::Cpu, 64), [1]);
        assert_eq!(sizes(&Device::Cuda(vec![0]), 8), [1, 8, 6, 4, 3, 2, 1]);
    }

    #[test]
    fn steps_are_valid() {
        for rows in [1, 7] {
            let limits = BatchLimits { tokens: 7, vocab: 1, slots: 7, pages: 1 };
            step(rows).batch.validate(&limits).unwrap();
        }
    }
}
