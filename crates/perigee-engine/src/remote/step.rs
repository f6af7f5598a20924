//! One step's questions on one rank: every MLA layer sends the absorbed queries of this rank's heads to the homes, lets the
//! local part be computed, and merges what came back. A row that misses one answer is faulty from there on and asks no
//! more; the step itself goes on.

use std::ops::Range;
use std::time::{Duration, Instant};

use perigee_backend::{DType, Routing};
use perigee_migration::attend::{AnswerStatus, HeadRange, QueryValues, SessionQuery};
use perigee_migration::{AnswerBatch, AttendShape, QueryBatch};
use perigee_model::forward::{RemotePart, StepHooks};

use super::{Refusal, RemoteAttention, RemoteCounts, RemotePlan, StepReport};
use crate::executor::StepPlan;

/// Which rank asks, and in which type its queries travel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seat {
    pub(crate) rank: usize,
    pub(crate) dtype: DType,
}

/// A question on its way.
struct Pending {
    home: usize,
    question: QueryBatch,
    /// For every session of the question: which of the plan's remote rows asks, and for which tokens of the step.
    askers: Vec<(usize, Range<usize>)>,
}

/// The questions of one step.
pub(crate) struct RemoteStep<'a> {
    plan: &'a RemotePlan,
    attention: Option<&'a mut RemoteAttention>,
    seat: Seat,
    /// Of every remote row: its tokens within the step.
    spans: Vec<Range<usize>>,
    /// Of every remote row: whether it missed an answer.
    faulty: Vec<bool>,
    refusals: Vec<Option<AnswerStatus>>,
    /// Of every home: whether it is not asked any more.
    given_up: Vec<bool>,
    pending: Vec<Pending>,
    /// How long this step may still wait.
    patience: Duration,
    counts: RemoteCounts,
}

impl<'a> RemoteStep<'a> {
    /// A step that has asked nobody. Rows of homes that are overdue are faulty at once, and all are without a client.
    pub(crate) fn new(plan: &'a StepPlan, attention: Option<&'a mut RemoteAttention>, seat: Seat) -> Self {
        let StepPlan { batch, remote, .. } = plan;
        let mut starts = Vec::with_capacity(batch.rows.len());
        let mut tokens = 0;
        for row in &batch.rows {
            starts.push(tokens..tokens + row.tokens as usize);
            tokens += row.tokens as usize;
        }
        let spans: Vec<_> = remote.rows.iter().filter_map(|row| starts.get(row.row as usize).cloned()).collect();
        let given_up =
            remote.homes.iter().map(|home| attention.as_ref().is_none_or(|with| with.client.is_overdue(home)));
        let given_up: Vec<bool> = given_up.collect();
        let counts =
            RemoteCounts { tokens: spans.iter().map(|span| span.len() as u64).sum(), ..RemoteCounts::default() };
        let mut step = Self {
            plan: remote,
            attention,
            seat,
            spans,
            faulty: vec![false; remote.rows.len()],
            refusals: vec![None; remote.rows.len()],
            given_up,
            pending: Vec::new(),
            patience: Duration::from_millis(remote.patience_ms.into()),
            counts,
        };
        step.mark_faulty();
        step
    }

    /// What became of it. Answers that nobody waited for, because the step broke off, are let go.
    pub(crate) fn finish(mut self) -> StepReport {
        if let (Some(attention), false) = (&mut self.attention, self.pending.is_empty()) {
            attention.client.collect(Instant::now());
        }
        let rows = self.plan.rows.iter().zip(&self.faulty);
        let faulty = rows.filter(|(_, is_faulty)| **is_faulty).map(|(row, _)| row.row).collect();
        let refused = self.plan.rows.iter().zip(&self.refusals);
        let refusals = refused.filter_map(|(row, status)| status.map(|status| Refusal { row: row.row, status }));
        StepReport { faulty, refusals: refusals.collect(), counts: self.counts }
    }

    fn is_asking(&self) -> bool {
        !self.pending.is_empty() || self.faulty.contains(&false)
    }

    /// Tokens of the step from the first to the last that ask.
    fn asking(&self) -> Range<usize> {
        let spans = || self.spans.iter().zip(&self.faulty).filter(|(_, is_faulty)| !**is_faulty).map(|(span, _)| span);
        spans().map(|span| span.start).min().unwrap_or(0)..spans().map(|span| span.end).max().unwrap_or(0)
    }

    /// Sends the queries [tokens, heads * (R + r)] of an MLA layer, those of the tokens that ask.
    fn ask(&mut self, layer: usize, queries: &[f32]) {
        let Some(shape) = self.attention.as_ref().map(|attention| attention.shape) else { return };
        let asking = self.asking();
        let width = queries.len() / asking.len().max(1);
        let heads = width as u32 / (shape.latent + shape.rope).max(1);
        let first_head = self.seat.rank as u32 * heads;
        let heads = HeadRange { layer: layer as u32, first_head, heads, latent: shape.latent, rope: shape.rope };
        for home in 0..self.plan.homes.len() {
            if self.given_up[home] {
                continue;
            }
            for pending in self.questions(home, heads, &shape, (asking.start, queries)) {
                self.send(pending, &shape);
            }
        }
    }

    /// The questions to one home: sessions together as long as a message has at most as many tokens as a session may.
    /// The queries begin with those of token `from`.
    fn questions(
        &self,
        home: usize,
        heads: HeadRange,
        shape: &AttendShape,
        (from, queries): (usize, &[f32]),
    ) -> Vec<Pending> {
        let dtype = self.seat.dtype;
        let width = heads.query_width() as usize;
        let most = shape.tokens.max(1) as usize;
        let mut questions: Vec<Pending> = Vec::new();
        let mut room = 0;
        for (index, row) in self.plan.rows.iter().enumerate().filter(|(index, _)| !self.faulty[*index]) {
            let Some(part) = row.parts.iter().find(|part| part.home as usize == home) else { continue };
            let span = &self.spans[index];
            for first in span.clone().step_by(most) {
                let tokens = first..span.end.min(first + most);
                if tokens.len() > room {
                    let question = QueryBatch { heads, dtype, sessions: Vec::new() };
                    questions.push(Pending { home, question, askers: Vec::new() });
                    room = most;
                }
                room -= tokens.len();
                let query = SessionQuery {
                    session: row.session.clone(),
                    epoch: row.epoch,
                    ranges: part.ranges.clone(),
                    tokens: tokens.len() as u32,
                    values: QueryValues::from_f32(
                        &queries[(tokens.start - from) * width..(tokens.end - from) * width],
                        dtype,
                    ),
                };
                if let Some(pending) = questions.last_mut() {
                    pending.question.sessions.push(query);
                    pending.askers.push((index, tokens));
                }
            }
        }
        questions
    }

    fn send(&mut self, pending: Pending, shape: &AttendShape) {
        let (Some(attention), Some(home)) = (&mut self.attention, self.plan.homes.get(pending.home)) else { return };
        match pending.question.encode(shape) {
            Ok(message) => {
                self.counts.query_bytes += pending.question.payload_bytes();
                attention.client.ask(home, message);
                self.pending.push(pending);
            }
            Err(error) => {
                tracing::error!(home = home.replica, %error, "a question cannot be asked");
                pending.askers.iter().for_each(|(row, _)| self.faulty[*row] = true);
            }
        }
    }

    /// Waits for the answers to a layer's questions, no longer than the step's patience lasts.
    fn answers(&mut self) -> Vec<RemotePart> {
        let pending = std::mem::take(&mut self.pending);
        let Some(attention) = &mut self.attention else { return Vec::new() };
        let shape = attention.shape;
        let began = Instant::now();
        let answers = attention.client.collect(began + self.patience);
        let waited = began.elapsed();
        self.counts.wait += waited;
        self.patience = self.patience.saturating_sub(waited);
        let mut parts = Vec::new();
        for (pending, answer) in pending.iter().zip(answers.into_iter().chain(std::iter::repeat(None))) {
            match answer.map(|answer| AnswerBatch::decode(&answer, &pending.question, &shape)) {
                Some(Ok(answer)) => self.take(pending, &answer, &mut parts),
                Some(Err(error)) => {
                    tracing::error!(home = self.plan.homes[pending.home].replica, %error, "an answer cannot be used");
                    self.given_up[pending.home] = true;
                }
                None => self.given_up[pending.home] = true,
            }
        }
        self.mark_faulty();
        parts
    }

    /// Takes an answer apart into one part for every token.
    fn take(&mut self, pending: &Pending, answer: &AnswerBatch, parts: &mut Vec<RemotePart>) {
        self.counts.answer_bytes += answer.payload_bytes();
        let (width, heads) = (answer.heads.output_width() as usize, answer.heads.heads as usize);
        for ((row, tokens), answer) in pending.askers.iter().zip(&answer.sessions) {
            if answer.status != AnswerStatus::Answered {
                self.faulty[*row] = true;
                self.refusals[*row].get_or_insert(answer.status);
                continue;
            }
            let of_tokens = answer.output.chunks_exact(width).zip(answer.lse.chunks_exact(heads));
            parts.extend(tokens.clone().zip(of_tokens).map(|(token, (output, lse))| RemotePart {
                token,
                output: output.to_vec(),
                lse: lse.to_vec(),
            }));
        }
    }

    /// Rows of homes that were given up are faulty.
    fn mark_faulty(&mut self) {
        for (row, is_faulty) in self.plan.rows.iter().zip(&mut self.faulty) {
            *is_faulty |= row.parts.iter().any(|part| self.given_up.get(part.home as usize) != Some(&false));
        }
    }
}

/// Hooks of a step with remote rows: another's hooks, with the questions added.
pub(crate) struct RemoteHooks<'a, 'b> {
    pub(crate) inner: &'a mut dyn StepHooks,
    pub(crate) asking: &'a mut RemoteStep<'b>,
}

impl StepHooks for RemoteHooks<'_, '_> {
    fn is_plain(&self) -> bool {
        self.inner.is_plain()
    }

    fn routing(&mut self, layer: usize) -> Routing<'_> {
        self.inner.routing(layer)
    }

    fn traced(&self) -> bool {
        self.inner.traced()
    }

    fn hidden(&mut self, layer: usize, values: Vec<f32>) {
        self.inner.hidden(layer, values);
    }

    fn experts(&mut self, layer: usize, selected: Vec<u32>) {
        self.inner.experts(layer, selected);
    }

    fn remote(&self) -> bool {
        self.asking.is_asking()
    }

    fn asking(&self) -> Range<usize> {
        self.asking.asking()
    }

    fn ask(&mut self, index: usize, queries: &[f32]) {
        self.asking.ask(index, queries);
    }

    fn answers(&mut self, _index: usize) -> Vec<RemotePart> {
        self.asking.answers()
    }
}
