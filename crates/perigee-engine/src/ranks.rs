//! A replica's ranks as the leader drives them: its own, and the others behind links. Every command goes to all before any
//! answer is awaited, and every rank's answer is part of the result, so that a failed rank can never look healthy.

mod ahead;
mod moves;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use perigee_backend::{Backend, LatentReader, PairOrder, PairState, Routing, StateKind, StatePart};
use perigee_migration::{Digest, Geometry, PageSlice, StateSlice, TensorDigests};
use perigee_model::ModelError;
use perigee_model::forward::StepHooks;
use perigee_sampling::{Draw, Sampled, Scratch};

use self::ahead::Flight;
use crate::executor::{
    CacheBytes, Executor, ExecutorError, ExecutorLimits, PageSpan, StateSource, StepOutput, StepPlan,
};
use crate::homes::AnswerModel;
use crate::link::{LeaderLink, LinkError};
use crate::protocol::{ForcedExperts, RankCommand, RankReply};
use crate::rank::{Rank, is_fatal};
use crate::remote::{Refusal, StepReport};
use crate::traces::TraceNotes;

/// What a traced step shows: values that are the same on every rank.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// (layer, residual stream [tokens, d] after it).
    pub hidden: Vec<(usize, Vec<f32>)>,
    /// (layer, the layer's own selection, `top_k` for each token, ascending).
    pub experts: Vec<(usize, Vec<u32>)>,
}

/// All ranks of a replica.
pub struct Ranks<B: Backend> {
    own: Rank<B>,
    /// Ranks 1, 2, ...
    others: Vec<Box<dyn LeaderLink>>,
    /// How long a rank may take for one command.
    timeout: Duration,
    weight_bytes: Vec<u64>,
    scratch: Scratch,
    /// Steps that were launched and not collected, oldest first.
    in_flight: VecDeque<Flight>,
}

impl<B: Backend> Ranks<B> {
    /// The leader's rank and links to ranks 1, 2, ... in order. Asks every rank for its weight bytes, which also shows
    /// that it answers.
    ///
    /// # Errors
    /// A rank does not answer.
    pub fn new(own: Rank<B>, others: Vec<Box<dyn LeaderLink>>, timeout: Duration) -> Result<Self, ExecutorError> {
        let mut ranks = Self {
            own,
            others,
            timeout,
            weight_bytes: Vec::new(),
            scratch: Scratch::new(),
            in_flight: VecDeque::new(),
        };
        let replies = ranks.tell(&RankCommand::WeightBytes)?;
        for (rank, reply) in replies.into_iter().enumerate() {
            match reply {
                RankReply::Bytes(bytes) if bytes.len() == 8 => {
                    let mut word = [0u8; 8];
                    word.copy_from_slice(&bytes);
                    ranks.weight_bytes.push(u64::from_le_bytes(word));
                }
                other => return Err(unexpected(rank, &other)),
            }
        }
        Ok(ranks)
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        1 + self.others.len()
    }

    /// The model numbers of the KDA layers, in order.
    pub fn kda_layers(&self) -> Vec<usize> {
        self.own.kda_layers()
    }

    /// Runs a step on every rank; with a trace, this rank's layers are recorded. Logits come back for
    /// `plan.batch.logits`.
    ///
    /// # Errors
    /// Any rank failed or was lost.
    pub fn forward(
        &mut self,
        plan: &StepPlan,
        forced: &ForcedExperts,
        trace: Option<&mut Trace>,
    ) -> Result<Vec<f32>, ExecutorError> {
        self.run(plan, forced, trace)?;
        self.own.logits(plan.batch.logits.len()).map_err(|error| local(&error.into()))
    }

    /// Distinct experts computed with, summed over mixture layers and steps since the start. Every rank has a part of every
    /// expert, so this one's count is that of all.
    ///
    /// # Errors
    /// A fault of this rank's device.
    pub fn experts_touched(&mut self) -> Result<u64, ExecutorError> {
        self.own.experts_touched().map_err(|error| local(&error.into()))
    }

    /// Runs a step on every rank and leaves the logits where they are.
    fn run(
        &mut self,
        plan: &StepPlan,
        forced: &ForcedExperts,
        trace: Option<&mut Trace>,
    ) -> Result<StepReport, ExecutorError> {
        self.send(&RankCommand::Step { plan: plan.clone().into(), forced: forced.clone() })?;
        let mut hooks = LeaderHooks { forced, trace };
        let mut own = self.own.step(plan, &mut hooks);
        if !self.others.is_empty()
            && let Err(error) = self.own.finish()
        {
            // Before the others are waited for: if one of them is gone, this tells at once and by name.
            own = own.and(Err(error.into()));
        }
        self.settle(own)
    }

    /// A whole recurrent state of one KDA layer (index among KDA layers), [Hk, D, D] as bytes, gathered from the ranks.
    ///
    /// # Errors
    /// Any rank failed or was lost.
    pub fn recurrent_state(&mut self, slot: u32, layer: u32) -> Result<Vec<u8>, ExecutorError> {
        let heads = self.own.heads_per_rank() as u32;
        let mut bytes = Vec::new();
        for rank in 0..self.size() as u32 {
            let part = StatePart { layer, kind: StateKind::Recurrent, first_head: rank * heads, heads };
            bytes.extend(self.export_state(slot, &part)?);
        }
        Ok(bytes)
    }

    /// Attention over this replica's latents beside its steps, where the backend offers that. All ranks hold the same
    /// latents, so this one answers for all.
    pub fn latent_reader(&self) -> Option<Arc<dyn LatentReader>> {
        self.own.latent_reader()
    }

    /// What answering others needs to know of the model.
    pub fn answer_model(&self) -> AnswerModel {
        self.own.answer_model()
    }

    /// Ends the other ranks in order; their processes exit.
    pub fn shutdown(&mut self) {
        for link in &mut self.others {
            // A rank that is already gone needs no goodbye.
            let _ = link.send(&RankCommand::Shutdown);
        }
    }

    /// Sends a command to the other ranks, whose answers to those before have been taken in then.
    fn send(&mut self, command: &RankCommand) -> Result<(), ExecutorError> {
        self.hear_flights();
        self.send_behind(command)
    }

    /// Sends a command to the other ranks.
    fn send_behind(&mut self, command: &RankCommand) -> Result<(), ExecutorError> {
        for (index, link) in self.others.iter_mut().enumerate() {
            link.send(command).map_err(|error| lost(index + 1, &error))?;
        }
        Ok(())
    }

    /// Every rank executes a command; answers in rank order.
    fn tell(&mut self, command: &RankCommand) -> Result<Vec<RankReply>, ExecutorError> {
        self.send(command)?;
        let own = self.own.execute(command);
        self.gather(own)
    }

    /// The other ranks' answers behind this one's.
    fn gather(&mut self, own: RankReply) -> Result<Vec<RankReply>, ExecutorError> {
        let mut replies = vec![own];
        for (index, link) in self.others.iter_mut().enumerate() {
            replies.push(link.receive(self.timeout).map_err(|error| lost(index + 1, &error))?);
        }
        for (rank, reply) in replies.iter().enumerate() {
            if let RankReply::Failed { message, fatal } = reply {
                return Err(ExecutorError { rank, message: message.clone(), fatal: *fatal });
            }
        }
        Ok(replies)
    }

    /// Collects the other ranks' answers to a step after this rank's own result. Where the exchange broke, the rank that
    /// went missing is named rather than the ones that noticed.
    fn settle(&mut self, own: Result<StepReport, ModelError>) -> Result<StepReport, ExecutorError> {
        let patience = if own.as_ref().is_err_and(is_fatal) { Duration::from_millis(200) } else { self.timeout };
        let (mut reports, mut failures) = (Vec::new(), Vec::new());
        for (index, link) in self.others.iter_mut().enumerate() {
            match link.receive(patience) {
                Ok(RankReply::Stepped(report)) => reports.push(report),
                Ok(RankReply::Failed { message, fatal }) => {
                    failures.push((false, ExecutorError { rank: index + 1, message, fatal }));
                }
                Ok(other) => failures.push((false, unexpected(index + 1, &other))),
                Err(error) => failures.push((true, lost(index + 1, &error))),
            }
        }
        let first_lost = failures.iter().position(|(is_lost, _)| *is_lost);
        if let Some(index) = first_lost {
            return Err(failures.swap_remove(index).1);
        }
        let mut whole = own.map_err(|error| local(&error))?;
        if let Some((_, error)) = failures.into_iter().next() {
            return Err(error);
        }
        reports.into_iter().for_each(|report| whole.join(report));
        Ok(whole)
    }
}

impl<B: Backend> Executor for Ranks<B> {
    fn limits(&self) -> ExecutorLimits {
        self.own.limits()
    }

    fn cache_bytes(&self) -> CacheBytes {
        let CacheBytes { slot, page } = self.own.cache_bytes();
        CacheBytes { slot: slot * self.size() as u64, page: page * self.size() as u64 }
    }

    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        let rows = plan.batch.logits.len();
        if draws.len() > rows {
            let message = format!("{} draws from {rows} rows of logits", draws.len());
            return Err(ExecutorError { rank: 0, message, fatal: false });
        }
        let report = self.run(plan, &ForcedExperts::new(), None)?;
        let sampled = self.own.sample(draws, &mut self.scratch).map_err(|error| local(&error.into()))?;
        let logits = want_logits.then(|| self.own.logits(rows)).transpose().map_err(|error| local(&error.into()))?;
        Ok(output(sampled.into_iter().map(Some).collect(), logits, report))
    }

    fn runs_ahead(&self) -> bool {
        self.own.runs_ahead()
    }

    fn launch(&mut self, plan: &StepPlan, draws: &[Draw<'_>]) -> Result<(), ExecutorError> {
        self.launch_step(plan, draws)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.collect_step()
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::Park { key, slot, pages: pages.to_vec() }).map(drop)
    }

    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::Unpark { key, slot, pages: pages.to_vec() }).map(drop)
    }

    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::DropParked { key }).map(drop)
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>, ExecutorError> {
        let replies = self.tell(&RankCommand::ExportState { slot, part: *part })?;
        let held = replies.into_iter().find_map(|reply| match reply {
            RankReply::Bytes(bytes) => Some(bytes),
            _ => None,
        });
        held.ok_or_else(|| ExecutorError {
            rank: 0,
            message: format!("heads {}..{} are on no single rank", part.first_head, part.first_head + part.heads),
            fatal: false,
        })
    }

    fn weight_bytes(&self) -> Vec<u64> {
        self.weight_bytes.clone()
    }

    fn note(&mut self, notes: TraceNotes) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::Note { notes }).map(drop)
    }

    fn shutdown(&mut self) {
        Self::shutdown(self);
    }

    fn geometry(&self) -> Option<Geometry> {
        self.own.geometry()
    }

    fn export_slot(&mut self, from: StateSource) -> Result<Vec<StateSlice>, ExecutorError> {
        self.slices(from)
    }

    fn import_state(&mut self, slot: u32, slices: &[StateSlice]) -> Result<(), ExecutorError> {
        self.write_slot(slot, slices)
    }

    fn digest_slot(&mut self, slot: u32) -> Result<TensorDigests, ExecutorError> {
        self.slot_digests(slot)
    }

    fn share_slots(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        self.shared_slots()
    }

    fn open_slots(&mut self, shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        self.open_peer(shared)
    }

    fn take_slot(&mut self, shared: &[Vec<u8>], from: u32, slot: u32) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::TakeSlot { shared: moves::by_rank(shared), from, slot }).map(drop)
    }

    fn close_slots(&mut self, shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::CloseSlots { shared: moves::by_rank(shared) }).map(drop)
    }

    fn invite_pairs(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        self.pair_invitations()
    }

    fn pairs(&mut self, invitations: &[Vec<u8>], order: PairOrder) -> Result<PairState, ExecutorError> {
        self.order_pairs(invitations, order)
    }

    fn export_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<PageSlice>, ExecutorError> {
        self.page_slices(pages)
    }

    fn import_pages(&mut self, pages: &[(u32, PageSlice)]) -> Result<(), ExecutorError> {
        self.write_pages(pages)
    }

    fn digest_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<Digest>, ExecutorError> {
        self.page_digests(pages)
    }

    fn poison(&mut self, slots: &[u32], pages: &[u32]) -> Result<(), ExecutorError> {
        self.tell(&RankCommand::Poison { slots: slots.to_vec(), pages: pages.to_vec() }).map(drop)
    }
}

/// The leader's hooks of a step: forced experts, and a trace where one is wanted.
struct LeaderHooks<'a, 'b> {
    forced: &'a ForcedExperts,
    trace: Option<&'b mut Trace>,
}

impl StepHooks for LeaderHooks<'_, '_> {
    fn is_plain(&self) -> bool {
        self.forced.is_empty() && self.trace.is_none()
    }

    fn routing(&mut self, layer: usize) -> Routing<'_> {
        match self.forced.iter().find(|(number, _)| *number as usize == layer) {
            Some((_, experts)) => Routing::Forced(experts),
            None => Routing::Free,
        }
    }

    fn traced(&self) -> bool {
        self.trace.is_some()
    }

    fn hidden(&mut self, layer: usize, values: Vec<f32>) {
        if let Some(trace) = &mut self.trace {
            trace.hidden.push((layer, values));
        }
    }

    fn experts(&mut self, layer: usize, selected: Vec<u32>) {
        if let Some(trace) = &mut self.trace {
            trace.experts.push((layer, selected));
        }
    }
}

fn output(sampled: Vec<Option<Sampled>>, logits: Option<Vec<f32>>, report: StepReport) -> StepOutput {
    let StepReport { faulty, refusals, counts } = report;
    let refusals = refusals.into_iter().map(|Refusal { row, status }| (row, status)).collect();
    StepOutput { sampled, logits, faulty, refusals, remote: counts }
}

fn local(error: &ModelError) -> ExecutorError {
    ExecutorError { rank: 0, message: error.to_string(), fatal: is_fatal(error) }
}

fn lost(rank: usize, error: &LinkError) -> ExecutorError {
    ExecutorError { rank, message: error.to_string(), fatal: true }
}

fn unexpected(rank: usize, reply: &RankReply) -> ExecutorError {
    ExecutorError { rank, message: format!("an answer that does not fit the command: {reply:?}"), fatal: true }
}
