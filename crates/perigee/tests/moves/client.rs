//! A client whose sessions move while it reads: it asks for each move of its schedule when that is due, one at a time for a
//! session, and checks what holds for every stream, moved or not: indices without gap or repeat, one end, epochs that only
//! rise, one replica for an epoch.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use perigee_proto::v1::{
    FinishReason, GenerateRequest, GenerateResponse, ListSessionsRequest, MigrateRequest, MigrateResponse,
    PositionLogprobs, SessionInfo,
};
use perigee_testkit::sandbox::Clients;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::plan::{Move, Schedule};

/// How often, and after how long each time, a client looks for a session that it has no response of.
const LOOKS: usize = 1000;
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

/// One choice as its client received it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Choice {
    pub(crate) session: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<PositionLogprobs>,
    pub(crate) prompt_logprobs: Vec<PositionLogprobs>,
    pub(crate) finish: Option<FinishReason>,
    /// Replica and number of tokens of every epoch, in order.
    pub(crate) epochs: BTreeMap<u64, (String, usize)>,
    /// How many tokens there were when the first move was asked for.
    pub(crate) disturbed: Option<usize>,
}

/// A move that was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Moved {
    pub(crate) planned: Move,
    /// Tokens of the session when it was asked for, prompt included.
    pub(crate) context: usize,
    pub(crate) answer: Result<MigrateResponse, Status>,
}

/// What a client saw.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) choices: Vec<Choice>,
    pub(crate) moves: Vec<Moved>,
    /// The status that the stream ended with, where that was not its own end.
    pub(crate) failed: Option<Status>,
    /// Rules of streams that were broken.
    pub(crate) broken: Vec<String>,
}

/// A look over the shoulder of a client that moves nothing itself.
pub(crate) struct Watch {
    tokens: Arc<AtomicUsize>,
    /// Its client goes away once this is set.
    enough: Arc<AtomicBool>,
    /// Gets session and replica of the first response.
    first: Option<oneshot::Sender<(String, String)>>,
}

impl Watch {
    pub(crate) fn new(
        tokens: Arc<AtomicUsize>,
        enough: Arc<AtomicBool>,
        first: oneshot::Sender<(String, String)>,
    ) -> Self {
        Self { tokens, enough, first: Some(first) }
    }

    /// Whether the client stays.
    fn sees(&mut self, response: &GenerateResponse) -> bool {
        if let Some(first) = self.first.take() {
            // A test that is over looks no more.
            let _ = first.send((response.session_id.clone(), response.replica.clone()));
        }
        self.tokens.fetch_add(usize::from(response.token_id.is_some()), Ordering::Relaxed);
        !self.enough.load(Ordering::Relaxed)
    }
}

/// Reads the answer to a request, which is wanted until its deadline, while somebody watches, until the client has enough
/// of it.
pub(crate) async fn read(
    clients: &Clients,
    request: &GenerateRequest,
    deadline: Option<Duration>,
    watch: Watch,
) -> Answer {
    let schedule = Schedule { request: request.clone(), moves: Vec::new() };
    let mut client = Client::new(clients, &schedule, &[]);
    client.watch = Some(watch);
    let mut call = tonic::Request::new(request.clone());
    deadline.into_iter().for_each(|deadline| call.set_timeout(deadline));
    match clients.inference.clone().generate(call).await {
        Ok(stream) => client.read(stream.into_inner()).await,
        Err(status) => client.answer.failed = Some(status),
    }
    client.answer
}

/// Runs a schedule to the end of its stream. `names` are the replicas in order.
pub(crate) async fn run(clients: &Clients, schedule: &Schedule, names: &[String]) -> Answer {
    let mut client = Client::new(clients, schedule, names);
    match clients.inference.clone().generate(schedule.request.clone()).await {
        Ok(stream) => client.read(stream.into_inner()).await,
        Err(status) => client.answer.failed = Some(status),
    }
    client.answer
}

/// A move, the tokens of its session when it was asked for, the answer.
type Done = (Move, usize, Result<MigrateResponse, Status>);

struct Client<'a> {
    clients: &'a Clients,
    request: &'a GenerateRequest,
    names: &'a [String],
    /// What is still to be asked for.
    due: Vec<Move>,
    /// Choices with a move on its way.
    moving: Vec<bool>,
    done: mpsc::UnboundedSender<Done>,
    ended: mpsc::UnboundedReceiver<Done>,
    watch: Option<Watch>,
    answer: Answer,
}

impl<'a> Client<'a> {
    fn new(clients: &'a Clients, schedule: &'a Schedule, names: &'a [String]) -> Self {
        let count = schedule.request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1) as usize;
        let (done, ended) = mpsc::unbounded_channel();
        let answer =
            Answer { choices: vec![Choice::default(); count], moves: Vec::new(), failed: None, broken: Vec::new() };
        let (due, moving) = (schedule.moves.clone(), vec![false; count]);
        Self { clients, request: &schedule.request, names, due, moving, done, ended, watch: None, answer }
    }

    async fn read(&mut self, mut stream: tonic::Streaming<GenerateResponse>) {
        loop {
            self.ask_for_what_is_due();
            tokio::select! {
                next = stream.message() => match next {
                    Ok(Some(response)) => {
                        let stays = self.watch.as_mut().is_none_or(|watch| watch.sees(&response));
                        self.take(response);
                        if !stays {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(status) => {
                        self.answer.failed = Some(status);
                        break;
                    }
                },
                Some(done) = self.ended.recv() => self.moved(done),
            }
        }
        while self.moving.contains(&true) {
            match self.ended.recv().await {
                Some(done) => self.moved(done),
                None => break,
            }
        }
        if self.answer.failed.is_none() && self.answer.choices.iter().any(|choice| choice.finish.is_none()) {
            self.broken("the stream ended before its choices");
        }
    }

    fn ask_for_what_is_due(&mut self) {
        let mut later = Vec::new();
        for planned in std::mem::take(&mut self.due) {
            let index = planned.choice as usize;
            let (choice, is_moving) = (&mut self.answer.choices[index], self.moving[index]);
            let is_due = planned.after.is_none_or(|after| choice.tokens.len() >= after);
            if !is_due || is_moving || choice.finish.is_some() {
                later.push(planned);
                continue;
            }
            // Before its first response a session is known by its request alone, and may be any of its choices.
            let is_known = !choice.session.is_empty();
            choice.disturbed.get_or_insert(choice.tokens.len());
            self.moving[index] = true;
            let tokens = self.request.token_ids.len() + choice.tokens.len();
            let asking = Asking {
                clients: self.clients.clone(),
                names: self.names.to_vec(),
                request: self.request.request_id.clone(),
                session: choice.session.clone(),
                on: choice.epochs.last_key_value().map(|(_, (replica, _))| replica.clone()),
                planned,
            };
            if !is_known {
                self.answer.choices.iter_mut().for_each(|choice| choice.disturbed = Some(0));
            }
            let done = self.done.clone();
            tokio::spawn(async move {
                let answer = asking.ask().await;
                // The client waits for it, unless it has failed.
                let _ = done.send((planned, tokens, answer));
            });
        }
        self.due = later;
    }

    fn moved(&mut self, (planned, context, answer): Done) {
        self.moving[planned.choice as usize] = false;
        self.answer.moves.push(Moved { planned, context, answer });
    }

    fn broken(&mut self, what: &str) {
        self.answer.broken.push(format!("{}: {what}", self.request.request_id));
    }

    fn take(&mut self, response: GenerateResponse) {
        let told = format!("{response:?}");
        let Some(choice) = self.answer.choices.get_mut(response.choice as usize) else {
            return self.broken(&format!("a choice that nobody asked for: {told}"));
        };
        let mut faults = Vec::new();
        let mut rule = |holds: bool, what: &str| {
            if !holds {
                faults.push(format!("{what}: {told}"));
            }
        };
        rule(choice.finish.is_none(), "a response after the end of its choice");
        rule(response.index == choice.tokens.len() as u64, "a gap or a repeat");
        let newest = choice.epochs.last_key_value().map_or(0, |(epoch, _)| *epoch);
        rule(response.epoch >= newest.max(1), "an epoch of the past");
        let epoch = choice.epochs.entry(response.epoch).or_insert_with(|| (response.replica.clone(), 0));
        rule(epoch.0 == response.replica, "one epoch of two replicas");
        rule(choice.session.is_empty() || choice.session == response.session_id, "another session");
        if choice.session.is_empty() {
            choice.session = response.session_id;
            choice.prompt_logprobs = response.prompt_logprobs;
        }
        if let Some(token) = response.token_id {
            epoch.1 += 1;
            choice.tokens.push(token);
            choice.logprobs.extend(response.logprobs);
        }
        choice.text.push_str(&response.text);
        let finish = FinishReason::try_from(response.finish_reason).unwrap_or_default();
        if finish != FinishReason::Unspecified {
            choice.finish = Some(finish);
            let usage = response.usage.unwrap_or_default();
            let counts = (usage.prompt as usize, usage.completion as usize);
            rule(counts == (self.request.token_ids.len(), choice.tokens.len()), "wrong counts");
        }
        faults.iter().for_each(|fault| self.broken(fault));
    }
}

/// One move as it is asked for.
struct Asking {
    clients: Clients,
    names: Vec<String>,
    request: String,
    /// Empty before its first response.
    session: String,
    /// The replica of its last token.
    on: Option<String>,
    planned: Move,
}

impl Asking {
    async fn ask(mut self) -> Result<MigrateResponse, Status> {
        if self.session.is_empty() {
            (self.session, self.on) = self.find(|session| session.request_id == self.request).await?;
        }
        loop {
            let at = self.on.as_ref().and_then(|on| self.names.iter().position(|name| name == on)).unwrap_or(0);
            let to = self.names[(at + self.planned.further) % self.names.len()].clone();
            let request = MigrateRequest { session_id: self.session.clone(), to, mode: self.planned.mode.into() };
            match self.clients.cluster.clone().migrate(request).await {
                // Early moves of several choices may mean one session. What the error says is done.
                Err(status) if status.message().contains("is being moved already: try again") => {
                    tokio::time::sleep(10 * BETWEEN_LOOKS).await;
                    (_, self.on) = self.find(|session| session.session == self.session).await?;
                }
                answer => return answer.map(tonic::Response::into_inner),
            }
        }
    }

    /// A session that is looked for, and its owner.
    async fn find(&self, is_it: impl Fn(&SessionInfo) -> bool) -> Result<(String, Option<String>), Status> {
        for _ in 0..LOOKS {
            // A replica in a long step answers too late: then again.
            let listed = self.clients.cluster.clone().list_sessions(ListSessionsRequest::default()).await;
            let listed = listed.map(|answer| answer.into_inner().sessions).unwrap_or_default();
            if let Some(found) = listed.into_iter().find(&is_it) {
                return Ok((found.session, Some(found.owner)));
            }
            // It comes to its replica in a moment, or has ended.
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
        Err(Status::not_found("the request has no session any more"))
    }
}
