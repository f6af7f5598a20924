//! Rows whose latents are partly elsewhere: whom a step must ask, and what becomes of sessions whose homes did not answer.
//! How questions travel is `remote`'s affair.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use perigee_migration::AnswerStatus;

use crate::cache::Home;
use crate::executor::StepOutput;
use crate::remote::{RemoteHome, RemotePlan, RemoteRanges, RemoteRow};
use crate::request::FinishReason;
use crate::scheduler::{NeverFits, PlannedRow, TaskId};
use crate::step::{EngineCore, Fatal};

/// Longest pause of a session between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl EngineCore {
    /// Whom the rows of a step must ask.
    pub(crate) fn remote_plan(&self, rows: &[&PlannedRow]) -> RemotePlan {
        let mut plan = RemotePlan::default();
        let Some(config) = &self.config.moves else { return plan };
        plan.patience_ms = u32::try_from(config.patience.as_millis()).unwrap_or(u32::MAX);
        for (index, row) in (0..).zip(rows).filter(|(_, row)| row.remote) {
            let (Some(held), Some(view)) = (self.sessions.get(&row.task), self.scheduler.session(row.task)) else {
                continue;
            };
            let mut parts: Vec<RemoteRanges> = Vec::new();
            for (home, range) in view.latents.remote_ranges() {
                let Home::Remote { replica, incarnation, endpoint, .. } = home else { continue };
                let home = plan.home(replica, incarnation, endpoint);
                match parts.iter_mut().find(|part| part.home == home) {
                    Some(part) => part.ranges.push(range),
                    None => parts.push(RemoteRanges { home, ranges: vec![range] }),
                }
            }
            let sequence = &held.sequence;
            plan.rows.push(RemoteRow { row: index, session: sequence.session.0.clone(), epoch: sequence.epoch, parts });
        }
        plan
    }

    /// Sessions whose homes did not answer: their step does not count. They try again after a pause, or are computed anew.
    pub(crate) fn take_misses(
        &mut self,
        rows: &[&PlannedRow],
        output: &StepOutput,
        now: Instant,
    ) -> Result<BTreeSet<TaskId>, Fatal> {
        let Some(config) = self.config.moves.clone() else { return Ok(BTreeSet::new()) };
        let is_faulty = |index: u32| output.faulty.contains(&index);
        let mut missed = BTreeSet::new();
        for (index, row) in (0..).zip(rows).filter(|(_, row)| row.remote) {
            let Some(held) = self.sessions.get_mut(&row.task) else { continue };
            if !is_faulty(index) {
                held.misses = 0;
                continue;
            }
            missed.insert(row.task);
            held.misses += 1;
            let refusal = output.refusals.iter().find(|(row, _)| *row == index).map(|(_, status)| *status);
            let session = held.sequence.session.clone();
            match refusal {
                Some(AnswerStatus::Stale) => {
                    let message = "another replica owns it";
                    self.end(row.task, FinishReason::Error, Some(message.into()))?;
                }
                Some(AnswerStatus::Unknown | AnswerStatus::Missing) => {
                    self.rebuild(row.task, "a home has lost them")?
                }
                _ if held.misses >= config.misses => self.rebuild(row.task, "a home does not answer")?,
                _ => {
                    let pause = config.patience.saturating_mul(1 << held.misses.min(8)).min(LONGEST_PAUSE);
                    held.retry_at = Some(now + pause);
                    tracing::debug!(session = session.0, misses = held.misses, "a home did not answer");
                    self.scheduler.hold(row.task);
                }
            }
        }
        Ok(missed)
    }

    /// Sessions whose pause is over step again.
    pub(crate) fn end_pauses(&mut self, now: Instant) {
        for (id, held) in &mut self.sessions {
            if held.retry_at.is_some_and(|due| due <= now) {
                held.retry_at = None;
                self.scheduler.unhold(*id);
            }
        }
    }

    /// The next time at which something is due without a command.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.sessions.values().filter_map(|held| held.retry_at).min()
    }

    /// Latents that nobody has any more are computed again: beside the session, whose state is as it was, where there is
    /// room for that, else with the state.
    pub(super) fn rebuild(&mut self, id: TaskId, why: &'static str) -> Result<(), Fatal> {
        if self.scheduler.is_rebuilding(id) {
            return Ok(());
        }
        if !self.scheduler.begin_rebuild(id, TaskId(self.next_task))? {
            return self.start_over(id, why);
        }
        self.next_task += 1;
        if let Some(held) = self.sessions.get_mut(&id) {
            held.misses = 0;
            held.retry_at = None;
            tracing::warn!(session = held.sequence.session.0, why, "latents are computed again");
        }
        Ok(())
    }

    /// A session's latents are all here again, if it was the last row of them.
    pub(crate) fn end_rebuild(&mut self, row: TaskId) -> Result<(), Fatal> {
        let id = self.scheduler.session_of(row);
        if id == row {
            return Ok(());
        }
        // What other homes hold of it is not needed any more either.
        let homes = self.homes_of(id);
        if self.scheduler.end_rebuild(id)? {
            let session = self.sessions.get(&id).map(|held| held.sequence.session.0.as_str());
            tracing::info!(session, "latents are here again");
            self.give_up(homes);
        }
        Ok(())
    }

    /// A session is computed anew from its tokens: slower, never wrong.
    pub(crate) fn start_over(&mut self, id: TaskId, why: &'static str) -> Result<(), Fatal> {
        self.give_up_homes(id);
        let Some(held) = self.sessions.get_mut(&id) else { return Ok(()) };
        held.misses = 0;
        held.retry_at = None;
        tracing::warn!(session = held.sequence.session.0, why, "a session is computed anew");
        self.config.observer.preempted(crate::observer::Preemption::Recomputed);
        self.scheduler.unhold(id);
        let restarted = self.scheduler.restart(id)?;
        if let Some(key) = restarted.parked {
            self.drop_parked(key)?;
        }
        match restarted.never {
            None => Ok(()),
            Some(never) => self.end_never_fits(id, never),
        }
    }

    /// A session that came from elsewhere cannot be computed anew: it is too long for this replica alone.
    pub(crate) fn end_never_fits(&mut self, id: TaskId, never: NeverFits) -> Result<(), Fatal> {
        let message = format!("its latents are lost and do not fit here: {never:?}; replay it elsewhere");
        self.end(id, FinishReason::Error, Some(message))
    }
}

impl RemotePlan {
    /// The number of a home in the plan.
    fn home(&mut self, replica: &str, incarnation: &str, endpoint: &str) -> u32 {
        let known = self.homes.iter().position(|home| home.replica == replica && home.incarnation == incarnation);
        let index = known.unwrap_or_else(|| {
            let (replica, incarnation) = (replica.to_owned(), incarnation.to_owned());
            self.homes.push(RemoteHome { replica, incarnation, endpoint: endpoint.to_owned() });
            self.homes.len() - 1
        });
        index as u32
    }
}
