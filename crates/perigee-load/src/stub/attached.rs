//! One router's stream to a stub replica: requests come in, and every step sends a token of each session that runs.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use perigee_proto::internal::{
    Counts, EventBatch, Finish, Flushed, Load, ReplicaMessage, RouterMessage, SessionEvent, Sessions, Submit,
    replica_message, router_message,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::StubReplica;

/// How often a replica with nothing to do tells its load.
const IDLE: Duration = Duration::from_millis(400);
/// What stands in for a token's text.
const TEXT: &str = " word";

pub(super) struct Attached {
    replica: StubReplica,
    to_router: mpsc::UnboundedSender<Result<ReplicaMessage, Status>>,
    running: Vec<Running>,
    waiting: VecDeque<Running>,
    /// Prompt tokens that the next step reads.
    unread: u64,
    steps: u64,
    random: ChaCha8Rng,
    started: Instant,
}

struct Running {
    session: String,
    epoch: u64,
    choice: u32,
    index: u64,
    max_tokens: u64,
    prompt: u64,
}

impl Attached {
    pub(super) fn new(replica: StubReplica, to_router: mpsc::UnboundedSender<Result<ReplicaMessage, Status>>) -> Self {
        let started = Instant::now();
        let (running, waiting) = (Vec::new(), VecDeque::new());
        let random = ChaCha8Rng::seed_from_u64(replica.seed);
        Self { replica, to_router, running, waiting, unread: 0, steps: 0, random, started }
    }

    /// Steps until the router goes away.
    pub(super) async fn run(mut self, mut from_router: Streaming<RouterMessage>) {
        let welcome = replica_message::Body::Welcome(self.replica.welcome());
        let mut alive = self.send(welcome) && self.step();
        let mut due = Instant::now() + IDLE;
        let mut rings = self.replica.pacer.at(due);
        while alive {
            tokio::select! {
                // A step that is due comes first: a router with much to say must not hold it up.
                biased;
                _ = &mut rings => {
                    alive = self.step();
                    // A step that was late, because this process had no processor, makes no later one late.
                    due = (due + self.pause()).max(Instant::now());
                    rings = self.replica.pacer.at(due);
                }
                message = from_router.message() => match message {
                    Ok(Some(RouterMessage { body: Some(body) })) => {
                        let was_idle = self.running.is_empty();
                        alive = self.take(body);
                        if was_idle && !self.running.is_empty() {
                            due = Instant::now() + self.replica.phase + self.pause();
                            rings = self.replica.pacer.at(due);
                        }
                    }
                    Ok(Some(RouterMessage { body: None })) => {}
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    /// Time until the next batch.
    fn pause(&mut self) -> Duration {
        if self.running.is_empty() {
            return IDLE;
        }
        let steps = &self.replica.steps;
        steps.draw(steps.time(self.running.len(), self.unread), &mut self.random)
    }

    fn send(&self, body: replica_message::Body) -> bool {
        self.to_router.send(Ok(ReplicaMessage { body: Some(body) })).is_ok()
    }

    fn take(&mut self, body: router_message::Body) -> bool {
        use router_message::Body;
        match body {
            Body::Submit(submit) => self.submit(&submit),
            Body::Abort(abort) => {
                let is_over = |one: &Running| abort.sessions.contains(&one.session);
                self.running.retain(|one| !is_over(one));
                self.waiting.retain(|one| !is_over(one));
                self.fill();
            }
            Body::ListSessions(asked) => {
                let answer = Sessions { call: asked.call, sessions: Vec::new() };
                return self.send(replica_message::Body::Sessions(answer));
            }
            Body::Flush(asked) => return self.send(replica_message::Body::Flushed(Flushed { call: asked.call })),
            // Nothing here moves, and a lease is never needed: a stub that steps for nobody does no harm.
            Body::Hello(_) | Body::Renew(_) | Body::Prepare(_) | Body::Start(_) => {}
            Body::Release(_) | Body::AbortMove(_) | Body::TakeOver(_) | Body::Drain(_) => {}
        }
        true
    }

    fn submit(&mut self, submit: &Submit) {
        for (choice, session) in submit.sessions.iter().enumerate() {
            self.waiting.push_back(Running {
                session: session.clone(),
                epoch: submit.epoch,
                choice: submit.first_choice + choice as u32,
                index: submit.delivered.len() as u64,
                max_tokens: u64::from(submit.max_tokens),
                prompt: submit.prompt.len() as u64,
            });
        }
        self.fill();
    }

    fn fill(&mut self) {
        while self.running.len() < self.replica.slots as usize
            && let Some(next) = self.waiting.pop_front()
        {
            self.unread += next.prompt;
            self.running.push(next);
        }
    }

    /// Sends a token of every running session, and the load.
    fn step(&mut self) -> bool {
        let token = self.replica.clock.read();
        self.unread = 0;
        self.steps += 1;
        let events = self.running.iter_mut().map(|one| one.step(token)).collect();
        self.running.retain(|one| one.index < one.max_tokens);
        let load = self.load();
        self.fill();
        let clock = self.started.elapsed().as_micros() as u64 + 1;
        self.send(replica_message::Body::Batch(EventBatch { events, load: Some(load), clock }))
    }

    fn load(&self) -> Load {
        let steps = &self.replica.steps;
        let milliseconds = |time: Duration| time.as_secs_f32() * 1e3;
        let decode_ms = milliseconds(steps.time(self.running.len(), 0));
        let slots = self.replica.slots;
        Load {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            queued_tokens: self.waiting.iter().map(|one| one.prompt).sum(),
            slots_free: slots.saturating_sub(self.running.len() as u32),
            slots_total: slots,
            pages_free: 1 << 20,
            pages_total: 1 << 20,
            step_ms: decode_ms,
            steps: self.steps,
            decode_ms,
            prompt_token_ms: milliseconds(steps.per_prompt_token),
            ..Load::default()
        }
    }
}

impl Running {
    fn step(&mut self, token: u32) -> SessionEvent {
        let index = self.index;
        self.index += 1;
        let mut event = SessionEvent {
            session: self.session.clone(),
            epoch: self.epoch,
            choice: self.choice,
            index,
            token: Some(token),
            text: TEXT.to_owned(),
            ..SessionEvent::default()
        };
        if self.index >= self.max_tokens {
            event.set_finish(Finish::Length);
            event.usage = Some(Box::new(Counts { prompt: self.prompt, completion: self.index, cached: 0 }));
        }
        event
    }
}
