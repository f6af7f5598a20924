//! Decode steps as graphs: one for each size of the ladder, recorded from the ops of the first step of that size and run as
//! a whole from then on. Steps that others take part in are cut at the MLA layers and have a graph for each piece. What a step is about (tokens, slots, places, who attends to what) is sent to fixed addresses before;
//! rows that pad it to its size are skipped there. Any other step is run op by op.

use std::collections::HashMap;

use perigee_backend::{Recorded, Result, StepBatch};

use crate::backend::CudaBackend;
use crate::exchange::Exchange;
use crate::graph::Graph;
use crate::ladder::{ladder, rung};
use crate::step::DecodeForm;

/// The graphs of a backend. They go before the communicator whose calls they hold.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    ladder: Vec<usize>,
    graphs: HashMap<Part, Graph>,
    /// Addresses that the graphs were recorded with.
    bases: Vec<u64>,
    /// What is being recorded.
    recording: Option<Part>,
    /// Rows of the step whose pieces are offered, padding included.
    rows: usize,
    /// The thresholds that they were recorded with.
    #[cfg(feature = "tuning")]
    variant: usize,
    /// Whether a step was run op by op: the first one makes plans and buffers, which a recording may not.
    has_run: bool,
}

/// What a graph runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Part {
    /// Rows of the step, padding included.
    rows: usize,
    /// Which piece of it; none for the whole step.
    piece: Option<usize>,
}

impl Recorder {
    /// Records steps of up to `most` rows from now on.
    pub(crate) fn set_most(&mut self, most: usize) {
        if self.ladder.last() != Some(&most) {
            self.ladder = ladder(most);
            self.graphs.clear();
        }
    }

    /// Whether ops are recorded and not run.
    pub(crate) fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Whether a step is recorded as a whole: what one op leaves to the next need not outlast a piece, which may be run without the
    /// next being recorded.
    pub(crate) fn records_whole(&self) -> bool {
        self.recording.is_some_and(|part| part.piece.is_none())
    }

    pub(crate) fn note_run(&mut self) {
        self.has_run = true;
    }
}

/// Whether every row of a batch feeds one token and wants its logits, in their order.
fn only_decodes(batch: &StepBatch) -> bool {
    let rows = batch.rows.len();
    batch.tokens.len() == rows && batch.logits.iter().copied().eq(0..rows as u32)
}

impl CudaBackend {
    /// Gives up a recording whose step failed.
    pub(crate) fn abandon_recording(&mut self) {
        (self.deferred_sum, self.deferred_norm, self.moved_stream) = (None, None, None);
        if self.recorder.recording.take().is_some() {
            Graph::abandon(&self.stream);
        }
    }

    /// See [`perigee_backend::Backend::run_recorded`].
    pub(crate) fn recorded_run(&mut self, batch: &StepBatch) -> Result<Recorded> {
        match self.prepare(batch)? {
            Some(rows) => self.play(Part { rows, piece: None }),
            None => Ok(Recorded::No),
        }
    }

    /// See [`perigee_backend::Backend::begin_pieces`].
    pub(crate) fn pieces_begin(&mut self, batch: &StepBatch) -> Result<bool> {
        let rows = self.prepare(batch)?;
        self.recorder.rows = rows.unwrap_or_default();
        Ok(rows.is_some())
    }

    /// See [`perigee_backend::Backend::run_piece`].
    pub(crate) fn piece_run(&mut self, number: usize) -> Result<Recorded> {
        self.play(Part { rows: self.recorder.rows, piece: Some(number) })
    }

    /// Sends the plan of a step that can be recorded, and says how many rows it has with those that pad it.
    fn prepare(&mut self, batch: &StepBatch) -> Result<Option<usize>> {
        self.abandon_recording();
        // What goes through host memory waits for it. All ranks decide alike: it depends on the plan and on the steps before.
        let on_device = !matches!(self.exchange, Exchange::Host(_));
        let size = rung(&self.recorder.ladder, batch.rows.len())
            .filter(|_| self.recorder.has_run && on_device && only_decodes(batch));
        let Some(rows) = size else { return Ok(None) };
        self.stream.device().bind()?;
        self.exchange.check()?;
        let planning = self.planning();
        let form = DecodeForm { rows, pages: self.cache()?.shape().pages, formula: self.formula };
        if !self.step.begin_decode(&self.stream, batch, &self.feed, planning, form)? {
            return Ok(None);
        }
        let fed = std::mem::take(&mut self.feed).len();
        self.feed_run(fed)?;
        self.reserve_scratch(rows)?;
        self.reserve_gather(rows)?;
        #[cfg(feature = "tuning")]
        self.follow_tuning()?;
        let bases = self.bases();
        if self.recorder.bases != bases {
            // What they address has moved.
            self.stream.wait()?;
            self.recorder.graphs.clear();
            self.recorder.bases = bases;
        }
        Ok(Some(rows))
    }

    /// Forgets what was recorded with other thresholds.
    #[cfg(feature = "tuning")]
    fn follow_tuning(&mut self) -> Result<()> {
        let chosen = crate::tuning::chosen();
        if self.recorder.variant != chosen {
            self.stream.wait()?;
            self.recorder.graphs.clear();
            self.recorder.variant = chosen;
        }
        Ok(())
    }

    /// Runs what is recorded of the step, or begins to record it.
    fn play(&mut self, part: Part) -> Result<Recorded> {
        if let Some(graph) = self.recorder.graphs.get(&part) {
            graph.launch(&self.stream)?;
            return Ok(Recorded::Done);
        }
        Graph::begin(&self.stream)?;
        self.recorder.recording = Some(part);
        Ok(Recorded::Recording)
    }

    /// Ends the recording and runs it.
    pub(crate) fn recording_end(&mut self) -> Result<()> {
        if let Some(sum) = self.deferred_sum.take() {
            self.moe_combine(&sum)?;
        }
        self.settle_norm()?;
        let Some(part) = self.recorder.recording.take() else { return Ok(()) };
        let graph = Graph::end(&self.stream)?;
        graph.launch(&self.stream)?;
        self.recorder.graphs.insert(part, graph);
        tracing::debug!(rows = part.rows, piece = part.piece, "recorded a decode step");
        Ok(())
    }

    /// Addresses of the buffers that can be replaced by larger ones between steps.
    fn bases(&self) -> Vec<u64> {
        let gathered = match &self.exchange {
            Exchange::Nccl(nccl) => nccl.gathered_address(),
            Exchange::Alone | Exchange::Host(_) => 0,
        };
        vec![self.scratch.address(), self.step.decode_address(), self.selected_address(), gathered]
    }
}

#[cfg(test)]
mod tests {
    use perigee_backend::Row;

    use super::*;

    #[test]
    fn only_whole_decode_steps_are_recorded() {
        let row = Row { tokens: 1, position: 3, read_slot: 0, write_slot: 0, segments: vec![] };
        let batch = StepBatch { tokens: vec![5, 6], rows: vec![row.clone(), row.clone()], logits: vec![0, 1] };
        assert!(only_decodes(&batch));
        assert!(!only_decodes(&StepBatch { logits: vec![1], ..batch.clone() }));
        assert!(!only_decodes(&StepBatch { logits: vec![1, 0], ..batch.clone() }));
        let longer = Row { tokens: 2, ..row };
        assert!(!only_decodes(&StepBatch {
            tokens: vec![5, 6, 7],
            rows: vec![batch.rows[0].clone(), longer],
            ..batch
        }));
    }
}
