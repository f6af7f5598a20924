//! What comes to the step loop and what leaves it: commands, new sessions, their ends. It plans and runs no steps.

use std::sync::Arc;
use std::time::Instant;

use perigee_migration::epochs::PartyEvent;
use perigee_sampling::{Sampled, SamplingParams};
use tokio::sync::oneshot;

use crate::cache::{Home, LatentSegment};
use crate::handle::{Command, EngineHealth, QueuePermit, ScoreError, ScoreReply, ScoreRequest};
use crate::request::{FinishReason, Request, RouterId, SegmentInfo, SessionEvent, SessionId, SessionInfo, StopRule};
use crate::scheduler::{NewTask, Status, TaskId};
use crate::sequence::{Accepted, Sequence, SequenceError, TextContext, drawn_logprobs};
use crate::step::{EngineCore, Fatal, Session, Sink};

impl EngineCore {
    pub(crate) fn handle(&mut self, command: Command) -> Result<(), Fatal> {
        match command {
            Command::Attach(router, sender) => self.outbox.attach(router, sender),
            Command::Detach(router) => self.detach(router)?,
            Command::Renew(router, until) => self.outbox.renew(router, until),
            Command::Submit(router, request, permit) => self.take_request(router, &request, permit)?,
            Command::Score(request, permit, reply) => self.take_score(*request, permit, reply)?,
            Command::Abort(session, up_to) => self.take_abort(&session, up_to)?,
            Command::Move(router, session, command, order) => self.take_move(router, session, command, order)?,
            Command::TakeOver(router, order) => self.take_over(router, &order)?,
            Command::HandoffOpened { session, next, room } => self.handoff_opened(&session, next, room)?,
            Command::HandoffUnderway { session, next } => self.handoff_underway(&session, next)?,
            Command::HandoffDone { session, next, result } => self.handoff_done(&session, next, result)?,
            Command::HandoffOffer { header, demand, reply } => self.handoff_offer(*header, demand, reply)?,
            Command::HandoffParts { session, next, parts, reply } => {
                self.handoff_parts(&session, next, parts, reply)?;
            }
            Command::HandoffVerify { session, next, summary, grammar, reply } => {
                self.handoff_verify(&session, next, (*summary, grammar), reply)?;
            }
            Command::HandoffBroken { session, next } => {
                self.drive(&session, PartyEvent::Broken { next })?;
            }
            Command::PagesCame { task, number, pages, reply } => self.pages_came(task, number, pages, reply)?,
            Command::FetchFailed { task, number, why } => self.fetch_failed(task, number, &why)?,
            Command::HomeSaid { home, answer } => self.home_said(&home, &answer)?,
            Command::HomeGivenUp(session, epoch) => self.home_given_up(&session, epoch)?,
            Command::Sessions(reply) => self.answer(reply, self.session_infos()),
            // Nothing outlives its session yet, so there is nothing to drop.
            Command::FlushCache(reply) => self.answer(reply, 0),
            Command::Shutdown => self.shut_down()?,
        }
        Ok(())
    }

    /// Ends sessions whose deadline or router's lease is over, and scoring whose caller is gone.
    pub(crate) fn end_what_is_due(&mut self, now: Instant) -> Result<(), Fatal> {
        for router in self.outbox.lapsed(now) {
            tracing::warn!(?router, "a router's lease ran out; its sessions end");
            self.detach(router)?;
        }
        for id in self.scheduler.expired(now) {
            self.end(id, FinishReason::DeadlineExceeded, None)?;
        }
        let is_abandoned = |session: &Session| matches!(&session.sink, Sink::Score(reply) if reply.is_closed());
        let abandoned: Vec<TaskId> =
            self.sessions.iter().filter(|(_, session)| is_abandoned(session)).map(|(&id, _)| id).collect();
        abandoned.into_iter().try_for_each(|id| self.end(id, FinishReason::Aborted, None))
    }

    /// Closes a router's stream and ends its sessions; those that are being moved wait for it for a while, and those that
    /// may outlive it for another one.
    pub(crate) fn detach(&mut self, router: RouterId) -> Result<(), Fatal> {
        self.outbox.detach(router);
        let belongs = |session: &Session| matches!(session.sink, Sink::Router(owner) if owner == router);
        let sessions = self.sessions.iter().filter(|(_, session)| belongs(session));
        let ids: Vec<(TaskId, SessionId)> =
            sessions.map(|(&id, session)| (id, session.sequence.session.clone())).collect();
        for (id, session) in ids {
            if !self.park_for(&session)? && !self.orphan(id, &session)? {
                self.end(id, FinishReason::Aborted, None)?;
            }
        }
        Ok(())
    }

    /// Ends every session and the engine.
    pub(crate) fn shut_down(&mut self) -> Result<(), Fatal> {
        let ids: Vec<TaskId> = self.sessions.keys().copied().collect();
        for id in ids {
            self.end(id, FinishReason::Error, Some("the replica was shut down; try again elsewhere".into()))?;
        }
        self.ended = true;
        // Before anybody hears of the end: this process may be over right after.
        self.executor.shutdown();
        self.shared.health.send_replace(EngineHealth::Stopped);
        Ok(())
    }

    /// Tells every session's end when the ranks can do nothing any more; the accounts are left as they are.
    pub(crate) fn end_without_ranks(&mut self, message: &str) {
        self.names.clear();
        for session in std::mem::take(&mut self.sessions).into_values() {
            self.tell_end(session, FinishReason::Error, Some(format!("the replica failed: {message}; try again")));
        }
    }

    /// Ends a session before its time: frees what it held and tells whoever waits for it.
    pub(crate) fn end(&mut self, id: TaskId, reason: FinishReason, error: Option<String>) -> Result<(), Fatal> {
        if let Some(session) = self.drop_session(id)? {
            let (name, epoch) = (session.sequence.session.clone(), session.sequence.epoch);
            self.tell_end(session, reason, error);
            self.party_ended(&name, epoch)?;
        }
        Ok(())
    }

    /// The prompt's log-probabilities are complete: the answer goes out.
    pub(crate) fn finish_score(&mut self, id: TaskId) -> Result<(), Fatal> {
        if let Some(Session { sequence, sink: Sink::Score(reply), .. }) = self.forget(id)? {
            self.config.observer.finished(FinishReason::Length);
            self.answer(reply, Ok(sequence.prompt_logprobs.map(|prompt| prompt.positions).unwrap_or_default()));
        }
        Ok(())
    }

    /// Tells a router of a token that was accepted, and frees the session if it was the last.
    pub(crate) fn emit_token(&mut self, id: TaskId, sampled: &Sampled, accepted: Accepted) -> Result<(), Fatal> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        let Sink::Router(router) = session.sink else { return Ok(()) };
        let mut event = event(&mut session.sequence);
        event.index = event.index.saturating_sub(1);
        event.token = Some(sampled.token);
        event.text = accepted.text;
        event.logprobs = drawn_logprobs(sampled);
        event.finish = accepted.finish;
        event.usage = accepted.finish.map(|_| session.sequence.usage());
        if let Some(kept) = &mut session.kept {
            kept.push(&event);
        }
        self.outbox.push(router, event);
        if let Some(reason) = accepted.finish {
            self.config.observer.finished(reason);
            self.forget(id)?;
        }
        Ok(())
    }

    fn take_request(&mut self, router: RouterId, request: &Request, permit: QueuePermit) -> Result<(), Fatal> {
        if !self.outbox.is_attached(router) {
            tracing::warn!(request = request.request_id, "a request of a router that is not attached was dropped");
            return Ok(());
        }
        for session in &request.sessions {
            if !self.submit_party(router, session, request.epoch)? {
                return Ok(());
            }
        }
        let permit = Arc::new(permit);
        let mut waiting = Vec::with_capacity(request.sessions.len());
        for (index, name) in request.sessions.iter().enumerate() {
            match self.sequence(request, index as u32, name.clone()) {
                Ok((sequence, finish)) => {
                    let mut session = self.session(sequence, Sink::Router(router), request.deadline, &permit);
                    session.grammar = request.grammar.as_ref().map(|grammar| grammar.start.fork());
                    match finish {
                        Some(reason) => {
                            self.tell_end(session, reason, None);
                            self.party_ended(name, request.epoch)?;
                        }
                        None => waiting.push(session),
                    }
                }
                Err(error) => {
                    tracing::error!(request = request.request_id, %error, "a request's text state could not be made");
                    self.refuse_late(router, request, index as u32, name, &error);
                    self.party_ended(name, request.epoch)?;
                }
            }
        }
        self.enqueue(waiting)
    }

    fn take_score(&mut self, request: ScoreRequest, permit: QueuePermit, reply: ScoreReply) -> Result<(), Fatal> {
        let name = SessionId(format!("score:{}:{}", request.request_id, self.next_task));
        let prompt_only = Request {
            request_id: request.request_id,
            sessions: vec![name.clone()],
            first_choice: 0,
            epoch: 0,
            prompt: request.tokens,
            delivered: Vec::new(),
            sampling: SamplingParams::greedy(),
            stop: StopRule::default(),
            prompt_logprobs: Some(request.top),
            priority: request.priority,
            deadline: request.deadline,
            cache_salt: String::new(),
            text: false,
            grammar: None,
            resumable: false,
            trace: None,
        };
        match self.sequence(&prompt_only, 0, name) {
            Ok((sequence, _)) if sequence.length() == 1 => {
                self.answer(reply, Ok(vec![None]));
                Ok(())
            }
            Ok((sequence, _)) => {
                let session = self.session(sequence, Sink::Score(reply), request.deadline, &Arc::new(permit));
                self.enqueue(vec![session])
            }
            Err(error) => {
                self.answer(reply, Err(ScoreError::Failed(error.to_string())));
                Ok(())
            }
        }
    }

    fn sequence(
        &self,
        request: &Request,
        index: u32,
        name: SessionId,
    ) -> Result<(Sequence, Option<FinishReason>), SequenceError> {
        let context = TextContext {
            tokenizer: self.config.tokenizer.as_deref(),
            eos_token_ids: &self.config.eos_token_ids,
            max_length: self.scheduler.limits().max_length,
        };
        Sequence::new(request, index, name, &context)
    }

    fn session(&self, sequence: Sequence, sink: Sink, deadline: Option<Instant>, permit: &Arc<QueuePermit>) -> Session {
        Session::new(sequence, sink, deadline, self.config.clock.now(), Arc::clone(permit))
    }

    /// Queues the sessions of a request as one task.
    fn enqueue(&mut self, sessions: Vec<Session>) -> Result<(), Fatal> {
        let Some(first) = sessions.first() else { return Ok(()) };
        let sequence = &first.sequence;
        let ids: Vec<TaskId> = (0..sessions.len() as u64).map(|offset| TaskId(self.next_task + offset)).collect();
        self.next_task += ids.len() as u64;
        let (Some((&id, followers)), output) = (ids.split_first(), u64::from(sequence.stop.max_tokens)) else {
            return Ok(());
        };
        let task = NewTask {
            id,
            followers: followers.to_vec(),
            priority: sequence.priority,
            deadline: first.deadline,
            length: sequence.length(),
            most: (sequence.prompt_length + output).saturating_sub(1),
            prompt_logits: sequence.prompt_logprobs.is_some(),
        };
        let refused = self.scheduler.add(task).err();
        for (id, session) in ids.into_iter().zip(sessions) {
            self.names.insert(session.sequence.session.clone(), id);
            self.sessions.insert(id, session);
            if let Some(error) = refused {
                // The door lets nothing through that never fits.
                self.end(id, FinishReason::Error, Some(format!("the request does not fit: {error:?}")))?;
            }
        }
        Ok(())
    }

    /// A session is over: takes it out of every table and frees what it held.
    fn forget(&mut self, id: TaskId) -> Result<Option<Session>, Fatal> {
        let session = self.drop_session(id)?;
        if let Some(session) = &session {
            let (name, epoch) = (session.sequence.session.clone(), session.sequence.epoch);
            self.party_ended(&name, epoch)?;
        }
        Ok(session)
    }

    /// Takes a session out of the tables of what runs here and frees what it held.
    pub(crate) fn drop_session(&mut self, id: TaskId) -> Result<Option<Session>, Fatal> {
        self.give_up_homes(id);
        let removed = self.scheduler.remove(id)?.unwrap_or_default();
        if let Some(heir) = removed.heir {
            self.copy_prompt_logprobs(id, heir);
        }
        let session = self.sessions.remove(&id);
        if let Some(session) = &session {
            self.names.remove(&session.sequence.session);
            self.note_left(id, session);
        }
        if let Some(key) = removed.parked {
            self.drop_parked(key)?;
        }
        Ok(session)
    }

    /// Tells whoever waits for a session that it ended without a further token.
    fn tell_end(&mut self, mut session: Session, reason: FinishReason, error: Option<String>) {
        self.config.observer.finished(reason);
        match session.sink {
            Sink::Router(router) => {
                let usage = Some(session.sequence.usage());
                let event = event(&mut session.sequence);
                self.outbox.push(router, SessionEvent { finish: Some(reason), error, usage, ..event });
            }
            Sink::Score(reply) => {
                let failure = match reason {
                    FinishReason::DeadlineExceeded => ScoreError::DeadlineExceeded,
                    _ => ScoreError::Failed(error.unwrap_or_else(|| "it was aborted".into())),
                };
                self.answer(reply, Err(failure));
            }
        }
    }

    /// Tells a router that a session could not even begin.
    fn refuse_late(
        &mut self,
        router: RouterId,
        request: &Request,
        index: u32,
        name: &SessionId,
        error: &SequenceError,
    ) {
        self.config.observer.finished(FinishReason::Error);
        let event = SessionEvent {
            session: name.clone(),
            epoch: request.epoch,
            choice: request.first_choice + index,
            index: request.delivered.len() as u64,
            token: None,
            text: String::new(),
            logprobs: None,
            prompt_logprobs: None,
            finish: Some(FinishReason::Error),
            error: Some(error.to_string()),
            usage: None,
        };
        self.outbox.push(router, event);
    }

    /// Whoever asked may be gone by now; then the answer is of no use to anybody.
    pub(crate) fn answer<T>(&self, reply: oneshot::Sender<T>, value: T) {
        if reply.send(value).is_err() {
            tracing::debug!("nobody waits for an answer any more");
        }
    }

    fn session_infos(&self) -> Vec<SessionInfo> {
        let info = |(id, session): (&TaskId, &Session)| {
            let view = self.scheduler.session(*id)?;
            let sequence = &session.sequence;
            let segments = view.latents.segments().iter().map(|segment| segment_info(segment, view.computed));
            Some(SessionInfo {
                session: sequence.session.clone(),
                request_id: sequence.request_id.clone(),
                epoch: sequence.epoch,
                status: match view.status {
                    Status::Waiting => "waiting",
                    Status::Prefill => "prefill",
                    Status::Decode => "decode",
                    Status::Parked => "parked",
                },
                context: sequence.length(),
                segments: segments.filter(|segment| segment.tokens > 0).collect(),
            })
        };
        self.sessions.iter().filter_map(info).collect()
    }
}

fn segment_info(segment: &LatentSegment, computed: u64) -> SegmentInfo {
    let (first, tokens) = segment.positions(computed);
    let (home, incarnation) = match &segment.home {
        Home::Local { .. } => (String::new(), String::new()),
        Home::Remote { replica, incarnation, .. } => (replica.clone(), incarnation.clone()),
    };
    SegmentInfo { home, incarnation, first, tokens }
}

/// An event of a session; the first one takes the prompt's log-probabilities along.
fn event(sequence: &mut Sequence) -> SessionEvent {
    let complete = sequence
        .prompt_logprobs
        .take_if(|prompt| prompt.positions.len() as u64 == sequence.prompt_length)
        .map(|prompt| prompt.positions);
    SessionEvent { prompt_logprobs: complete, ..sequence.event() }
}
