//! Steps that are begun on every rank before the one before is read. The other ranks answer a step as soon as they have queued
//! it, in order; an answer that nobody has asked for yet is kept with its step when another command goes out.

use perigee_backend::Backend;
use perigee_sampling::Draw;

use super::{LeaderHooks, Ranks, local, output};
use crate::executor::{ExecutorError, StepOutput, StepPlan};
use crate::protocol::{ForcedExperts, RankCommand};
use crate::remote::StepReport;

/// A step that was launched and not collected.
#[derive(Debug)]
pub(super) struct Flight {
    /// What this rank has to say of it.
    own: StepReport,
    /// What all ranks say, once the others have been heard.
    heard: Option<Result<StepReport, ExecutorError>>,
}

impl<B: Backend> Ranks<B> {
    pub(super) fn launch_step(&mut self, plan: &StepPlan, draws: &[Draw<'_>]) -> Result<(), ExecutorError> {
        self.send_behind(&RankCommand::Step { plan: plan.clone().into(), forced: ForcedExperts::new() })?;
        let mut hooks = LeaderHooks { forced: &ForcedExperts::new(), trace: None };
        let queued = self.own.step(plan, &mut hooks).and_then(|report| {
            self.own.queue_draws(draws)?;
            Ok(report)
        });
        match queued {
            Ok(own) => {
                self.in_flight.push_back(Flight { own, heard: None });
                Ok(())
            }
            Err(error) => {
                // The others' answers to this step come behind those to the steps in flight.
                self.hear_flights();
                self.settle(Err(error)).map(drop)
            }
        }
    }

    pub(super) fn collect_step(&mut self) -> Result<StepOutput, ExecutorError> {
        // Before the others are waited for: if one of them is gone, this tells at once and by name.
        let drawn = self.own.collect_draws();
        let Some(Flight { own, heard }) = self.in_flight.pop_front() else {
            return Err(ExecutorError { rank: 0, message: "no step is in flight".into(), fatal: true });
        };
        match (drawn, heard) {
            (Ok(sampled), Some(heard)) => Ok(output(sampled, None, heard?)),
            (Ok(sampled), None) => Ok(output(sampled, None, self.settle(Ok(own))?)),
            (Err(error), Some(Ok(_))) => Err(local(&error.into())),
            (Err(_), Some(Err(lost))) => Err(lost),
            (Err(error), None) => Err(self.settle(Err(error.into())).err().unwrap_or_else(unfinished)),
        }
    }

    /// Takes in the other ranks' answers to every step in flight.
    pub(super) fn hear_flights(&mut self) {
        let mut flights = std::mem::take(&mut self.in_flight);
        for flight in flights.iter_mut().filter(|flight| flight.heard.is_none()) {
            flight.heard = Some(self.settle(Ok(std::mem::take(&mut flight.own))));
        }
        self.in_flight = flights;
    }
}

/// What a step is that failed here and nowhere said so.
fn unfinished() -> ExecutorError {
    ExecutorError { rank: 0, message: "a step in flight was not finished".into(), fatal: true }
}
