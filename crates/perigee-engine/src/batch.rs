//! A plan's rows as a batch for the ranks, and what the batch gave back to sessions and scheduler. When steps run, and
//! which rows there are, is decided elsewhere.

use std::time::Instant;

use perigee_backend::{Row, StepBatch};
use perigee_sampling::{Draw, Sampled};
use perigee_text::grammar::Grammar;

use crate::executor::{ExecutorError, StepOutput, StepPlan};
use crate::grammars::follow;
use crate::request::FinishReason;
use crate::scheduler::{Plan, PlannedRow, TaskId};
use crate::sequence::Sequence;
use crate::step::{EngineCore, Fatal, Sink};

impl EngineCore {
    /// Runs rows, those that draw first, as the plan has them.
    pub(crate) fn execute(&mut self, plan: &Plan, rows: &[&PlannedRow]) -> Result<StepOutput, ExecutorError> {
        let traces = self.rank_notes(rows);
        let mut batch = StepBatch::default();
        let mut draws = Vec::new();
        let mut wants_logits = false;
        for row in rows {
            // A scratch feeds its session's tokens.
            let Some(session) = self.sessions.get(&self.scheduler.session_of(row.task)) else {
                return Err(defect(format!("a row of session {} which does not exist", row.task.0)));
            };
            let sequence = &session.sequence;
            let Some(tokens) = sequence.tokens.get(row.position as usize..row.end() as usize) else {
                return Err(defect(format!("a row up to {} of {} tokens", row.end(), sequence.length())));
            };
            let first = batch.tokens.len() as u64;
            if let Some(from) = row.prompt_logits_from {
                wants_logits = true;
                batch.logits.extend((from - row.position..row.tokens).map(|offset| (first + offset) as u32));
            }
            if row.draws {
                batch.logits.push((first + row.tokens - 1) as u32);
                draws.push(draw(sequence, session.grammar.as_ref()));
            }
            batch.tokens.extend_from_slice(tokens);
            batch.rows.push(batch_row(row));
        }
        let positions = batch.logits.len();
        let step = StepPlan {
            clear_slots: plan.clear_slots.clone(),
            copy_slots: plan.copy_slots.clone(),
            copy_pages: plan.copy_pages.clone(),
            remote: self.remote_plan(rows),
            traces,
            batch,
            feed: Vec::new(),
        };
        let vocab = self.executor.limits().vocab;
        let output = self.executor.step(&step, &draws, wants_logits)?;
        let got = output.logits.as_ref().map_or(0, Vec::len);
        if output.sampled.len() != draws.len() || (wants_logits && got != positions * vocab) {
            let drawn = output.sampled.len();
            return Err(defect(format!("{drawn} of {} draws, {got} logits for {positions} positions", draws.len())));
        }
        Ok(output)
    }

    /// Launches rows that draw a token each. With `feed` every one is fed with the draw of that row of the step in flight,
    /// which nobody knows yet.
    pub(crate) fn launch(&mut self, plan: &Plan, rows: &[&PlannedRow], feed: Vec<u32>) -> Result<(), ExecutorError> {
        let traces = self.rank_notes(rows);
        let ahead = u64::from(!feed.is_empty());
        let mut batch = StepBatch::default();
        let mut draws = Vec::with_capacity(rows.len());
        for (row, index) in rows.iter().zip(0..) {
            let Some(session) = self.sessions.get(&row.task) else {
                return Err(defect(format!("a row of session {} which does not exist", row.task.0)));
            };
            let sequence = &session.sequence;
            let token = sequence.tokens.get(row.position as usize).copied().unwrap_or_default();
            if row.end() != sequence.length() + ahead {
                return Err(defect(format!(
                    "a decode row up to {} of {} tokens",
                    row.end(),
                    sequence.length() + ahead
                )));
            }
            draws.push(draw_ahead(sequence, ahead));
            batch.logits.push(index);
            batch.tokens.push(token);
            batch.rows.push(batch_row(row));
        }
        let step = StepPlan {
            clear_slots: plan.clear_slots.clone(),
            copy_slots: plan.copy_slots.clone(),
            copy_pages: plan.copy_pages.clone(),
            traces,
            batch,
            feed,
            ..StepPlan::default()
        };
        self.executor.launch(&step, &draws)
    }

    /// Takes a step's results into sessions and scheduler.
    pub(crate) fn apply(&mut self, rows: &[&PlannedRow], output: StepOutput, now: Instant) -> Result<(), Fatal> {
        if output.remote.tokens > 0 {
            self.config.observer.asked(&output.remote);
        }
        let missed = self.take_misses(rows, &output, now)?;
        let vocab = self.executor.limits().vocab;
        let logits = output.logits.unwrap_or_default();
        let mut logits = logits.chunks_exact(vocab);
        let mut sampled = output.sampled.into_iter();
        for row in rows {
            let counts = !missed.contains(&row.task);
            if counts {
                self.scheduler.advance(row.task, row.tokens);
                self.end_rebuild(row.task)?;
            }
            if row.draws {
                logits.next();
                if let Some(sampled) = sampled.next().flatten().filter(|_| counts) {
                    self.take_token(row.task, &sampled, now)?;
                }
            } else if let Some(from) = row.prompt_logits_from {
                let positions: Vec<&[f32]> = logits.by_ref().take((row.end() - from) as usize).collect();
                if counts {
                    self.take_prompt_logits(row, from, &positions)?;
                }
            }
        }
        Ok(())
    }

    fn take_token(&mut self, id: TaskId, sampled: &Sampled, now: Instant) -> Result<(), Fatal> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        let observer = &self.config.observer;
        match session.last_token.replace(now) {
            None => {
                observer.first_token(now.saturating_duration_since(session.arrived));
                session.span.note_first_token(now);
            }
            Some(last) => observer.next_token(now.saturating_duration_since(last)),
        }
        let completes = match follow(session, sampled.token) {
            Ok(completes) => completes,
            Err(error) => return self.end(id, FinishReason::Error, Some(error.to_string())),
        };
        match session.sequence.accept(sampled.token, completes, self.config.tokenizer.as_deref()) {
            Ok(accepted) => {
                if accepted.finish.is_none() {
                    self.scheduler.append(id);
                }
                self.emit_token(id, sampled, accepted)
            }
            Err(error) => self.end(id, FinishReason::Error, Some(error.to_string())),
        }
    }

    fn take_prompt_logits(&mut self, row: &PlannedRow, from: u64, positions: &[&[f32]]) -> Result<(), Fatal> {
        let Some(session) = self.sessions.get_mut(&row.task) else { return Ok(()) };
        let sequence = &mut session.sequence;
        let Some(prompt) = &mut sequence.prompt_logprobs else { return Ok(()) };
        let predicted = sequence.tokens.get(from as usize + 1..).unwrap_or_default();
        for (logits, token) in positions.iter().zip(predicted) {
            if let Err(error) = prompt.record(logits, *token) {
                return self.end(row.task, FinishReason::Error, Some(error.to_string()));
            }
        }
        let complete = prompt.positions.len() as u64 == sequence.prompt_length;
        if complete && matches!(session.sink, Sink::Score(_)) { self.finish_score(row.task) } else { Ok(()) }
    }
}

fn batch_row(row: &PlannedRow) -> Row {
    Row {
        tokens: row.tokens as u32,
        position: row.position,
        read_slot: row.read_slot,
        write_slot: row.write_slot,
        segments: row.segments.clone(),
    }
}

fn draw<'a>(sequence: &'a Sequence, grammar: Option<&'a Grammar>) -> Draw<'a> {
    Draw { allowed: grammar.map(Grammar::allowed), ..draw_ahead(sequence, 0) }
}

/// The draw that follows after `ahead` further tokens.
fn draw_ahead(sequence: &Sequence, ahead: u64) -> Draw<'_> {
    Draw {
        params: &sequence.sampling,
        choice: sequence.choice,
        position: sequence.length() + ahead,
        counts: &sequence.counts,
        banned: sequence.banned(sequence.completion() + ahead),
        allowed: None,
    }
}

/// Something that engine and executor disagree on: nothing after it can be trusted.
fn defect(message: String) -> ExecutorError {
    ExecutorError { rank: 0, message: format!("engine and executor disagree: {message}"), fatal: true }
}
