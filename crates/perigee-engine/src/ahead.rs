//! Steps ahead: where the executor can, a step in which every row draws is launched without being waited for, and before it is
//! read the next one is launched behind it, fed with what it draws. Commands, plans and moves see no step in flight: whatever
//! is to be done between two steps is done after the last one was read. A session that ends with a step has a row in the next
//! one all the same, whose result is nobody's; what that row writes lies in slots and pages that are written again, in order,
//! before anybody reads them.

use std::sync::mpsc::TryRecvError;
use std::time::Instant;

use crate::executor::ExecutorError;
use crate::handle::Command;
use crate::request::FinishReason;
use crate::scheduler::{Plan, PlannedRow};
use crate::step::{EngineCore, Fatal};

/// A step that was launched and not read.
#[derive(Debug)]
pub(crate) struct Flight {
    rows: Vec<PlannedRow>,
    launched: Instant,
}

impl EngineCore {
    /// Whether a planned step can be launched: each row draws one token, by what is known without the others' results.
    pub(crate) fn may_launch(&self, rows: &[&PlannedRow]) -> bool {
        let is_simple = |row: &PlannedRow| {
            let feeds_one = row.draws && row.tokens == 1 && !row.remote && row.prompt_logits_from.is_none();
            feeds_one
                && self.sessions.get(&row.task).is_some_and(|session| {
                    session.grammar.is_none() && !session.draws_late && !session.sequence.sampling.needs_counts()
                })
        };
        self.executor.runs_ahead() && rows.iter().all(|row| is_simple(row))
    }

    /// Launches a planned step.
    pub(crate) fn take_off(&mut self, plan: &Plan, rows: &[&PlannedRow]) -> Result<(), ExecutorError> {
        let launched = self.config.clock.now();
        self.launch(plan, rows, Vec::new())?;
        self.flight = Some(Flight { rows: rows.iter().copied().cloned().collect(), launched });
        Ok(())
    }

    /// Launches the step behind the one in flight, where that is possible, and reads the one in flight. False if there is none.
    pub(crate) fn go_on(&mut self) -> Result<bool, Fatal> {
        let Some(flight) = self.flight.take() else { return Ok(false) };
        let next = if self.is_quiet() { self.launch_next(&flight.rows) } else { None };
        self.land(flight)?;
        match next {
            None => {}
            Some((next, Ok(()))) => self.flight = Some(next),
            Some((next, Err(error))) => {
                let rows: Vec<&PlannedRow> = next.rows.iter().collect();
                self.end_failed(&rows, error)?;
            }
        }
        Ok(true)
    }

    /// Reads the step in flight, if there is one.
    pub(crate) fn settle(&mut self) -> Result<(), Fatal> {
        match self.flight.take() {
            Some(flight) => self.land(flight),
            None => Ok(()),
        }
    }

    fn launch_next(&mut self, rows: &[PlannedRow]) -> Option<(Flight, Result<(), ExecutorError>)> {
        let (feed, rows): (Vec<u32>, Vec<PlannedRow>) = self.scheduler.plan_ahead(rows)?.into_iter().unzip();
        let launched = self.config.clock.now();
        let begun = self.launch(&Plan::default(), &rows.iter().collect::<Vec<_>>(), feed);
        Some((Flight { rows, launched }, begun))
    }

    /// Takes in what a step gave, for the sessions that still wait for it.
    fn land(&mut self, flight: Flight) -> Result<(), Fatal> {
        let collected = self.executor.collect();
        let is_awaited = |row: &&PlannedRow| self.scheduler.is_before(row.task, row);
        let mut output = match collected {
            Ok(output) if output.sampled.len() == flight.rows.len() => output,
            Ok(output) => {
                let message = format!("{} draws of {} rows in flight", output.sampled.len(), flight.rows.len());
                return Err(Fatal::Executor(ExecutorError { rank: 0, message, fatal: true }));
            }
            Err(error) => return self.end_failed(&flight.rows.iter().filter(is_awaited).collect::<Vec<_>>(), error),
        };
        let (mut rows, mut sampled, mut undrawn) = (Vec::new(), Vec::new(), Vec::new());
        for (row, draw) in flight.rows.iter().zip(output.sampled).filter(|(row, _)| is_awaited(row)) {
            if draw.is_none() {
                undrawn.push(row.task);
                continue;
            }
            rows.push(row);
            sampled.push(draw);
        }
        output.sampled = sampled;
        let now = self.config.clock.now();
        let since = self.landed.map_or(flight.launched, |landed| landed.max(flight.launched));
        self.landed = Some(now);
        self.note_step(&rows, now.saturating_duration_since(since));
        self.apply(&rows, output, now)?;
        for id in undrawn {
            // Its row in the next step is fed with nothing, and its logits are gone.
            if let Some(session) = self.sessions.get_mut(&id) {
                session.draws_late = true;
            }
            self.start_over(id, "the device could not draw its token")?;
        }
        Ok(())
    }

    /// Whether nobody wants anything done before the next step. A router's word that its lease goes on is heard at once.
    fn is_quiet(&mut self) -> bool {
        while self.held_back.is_none() {
            match self.inbox.try_recv() {
                Ok(Command::Renew(router, until)) => self.outbox.renew(router, until),
                Ok(command) => self.held_back = Some(command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
        let now = self.config.clock.now();
        self.held_back.is_none()
            && self.outbox.lapsed(now).is_empty()
            && self.scheduler.expired(now).is_empty()
            && self.next_due().is_none_or(|due| due > now)
            && !self.moves_are_due(now)
    }

    /// A step failed: its sessions end, or all of them where the ranks are broken.
    pub(crate) fn end_failed(&mut self, rows: &[&PlannedRow], error: ExecutorError) -> Result<(), Fatal> {
        if error.fatal {
            return Err(Fatal::Executor(error));
        }
        tracing::error!(%error, rows = rows.len(), "a step failed; its sessions end");
        for row in rows {
            let id = self.scheduler.session_of(row.task);
            self.end(id, FinishReason::Error, Some(format!("a step failed: {error}; try again")))?;
        }
        Ok(())
    }
}
