//! The launched steps of a modelled executor: computed at once, told later.

use std::collections::VecDeque;

use super::model_cache::refused;
use crate::executor::{ExecutorError, StepOutput, StepPlan};

/// What the engine may have in flight: a step that is read next, and the one behind it.
const MOST: usize = 2;

#[derive(Debug, Default)]
pub(super) struct ModelFlights {
    pub(super) runs: bool,
    /// Which draws are not made: every so many.
    undrawn: u64,
    draws: u64,
    flights: VecDeque<StepOutput>,
    /// What the step launched last drew.
    drawn: Vec<u32>,
}

impl ModelFlights {
    pub(super) fn running(undrawn: u64) -> Self {
        Self { runs: true, undrawn, ..Self::default() }
    }

    /// Gives a step that is fed its tokens.
    pub(super) fn feed(&self, plan: &mut StepPlan) -> Result<(), ExecutorError> {
        if plan.feed.is_empty() {
            return Ok(());
        }
        if plan.feed.len() != plan.batch.tokens.len() || self.flights.is_empty() {
            return Err(refused(format!("{} draws feed {} tokens", plan.feed.len(), plan.batch.tokens.len())));
        }
        let drawn = |from: &u32| self.drawn.get(*from as usize).copied();
        let tokens: Option<Vec<u32>> = plan.feed.iter().map(drawn).collect();
        plan.batch.tokens = tokens.ok_or_else(|| refused("a draw that was not there feeds a step".into()))?;
        Ok(())
    }

    /// A step was launched that gives this.
    pub(super) fn began(&mut self, mut output: StepOutput) {
        self.drawn.clear();
        for sampled in &mut output.sampled {
            self.draws += 1;
            if self.undrawn > 0 && self.draws.is_multiple_of(self.undrawn) {
                *sampled = None;
            }
            self.drawn.push(sampled.as_ref().map_or(0, |sampled| sampled.token));
        }
        self.flights.push_back(output);
    }

    pub(super) fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        if self.flights.len() > MOST {
            return Err(refused(format!("{} steps in flight", self.flights.len())));
        }
        self.flights.pop_front().ok_or_else(|| refused("no step is in flight".into()))
    }
}
