//! A rank's questions to the homes of remote latents: one connection and one Attend stream for each home, kept open, on a
//! thread of their own. It carries encoded messages and keeps account of answers; what is asked, and what a missing answer
//! means, is the rank's and the engine's business.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use perigee_engine::remote::{AttentionClient, RemoteHome};
use perigee_proto::internal::{AttendAnswer, AttendQuery};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use crate::links::Links;
use crate::peers::Peers;

/// How long a home may take to accept a stream.
const OPEN_PATIENCE: Duration = Duration::from_secs(1);
/// Pauses between attempts to reach a home.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A connection that no step asked about for that long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// Asks homes over gRPC.
pub struct GrpcAttention {
    board: Arc<Board>,
    opened: mpsc::UnboundedSender<Link>,
}

/// A home's connection that is to be kept: its address, and the questions for it.
struct Link {
    endpoint: String,
    questions: mpsc::UnboundedReceiver<AttendQuery>,
}

/// What the asking thread and the connections both see.
#[derive(Default)]
struct Board {
    state: Mutex<State>,
    /// Where the time that answers take is noted.
    links: Links,
    /// Nothing more is awaited.
    settled: Condvar,
}

#[derive(Default)]
struct State {
    homes: HashMap<String, Home>,
    /// Answers to the questions since the last collection, in order.
    slots: Vec<Slot>,
    /// Call number of the first of them. Earlier calls are late.
    first: u64,
    /// How many of them are awaited.
    waiting: usize,
}

#[derive(Debug)]
enum Slot {
    Awaited,
    Answered(Vec<u8>),
    Failed,
}

/// What is known of a home.
struct Home {
    questions: mpsc::UnboundedSender<AttendQuery>,
    /// Calls without an answer, and when they were made.
    open: BTreeMap<u64, Instant>,
    /// The replica that was last asked there.
    replica: String,
    /// It was lost or could not be reached, and has not been reached since.
    is_down: bool,
    /// When a step was last interested in it.
    used: Instant,
}

impl GrpcAttention {
    /// A client whose connections run on a thread of its own, which ends with it.
    ///
    /// # Errors
    /// The operating system gave no thread.
    pub fn start(peers: Peers) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let board = Arc::new(Board { links: peers.links().clone(), ..Board::default() });
        let (opened, mut links) = mpsc::unbounded_channel();
        let shared = Arc::clone(&board);
        let work = move || {
            runtime.block_on(async {
                while let Some(link) = links.recv().await {
                    tokio::spawn(keep(link, peers.clone(), Arc::clone(&shared)));
                }
            });
        };
        std::thread::Builder::new().name("perigee-ask".into()).spawn(work)?;
        Ok(Self { board, opened })
    }
}

impl AttentionClient for GrpcAttention {
    fn ask(&mut self, home: &RemoteHome, message: Vec<u8>) {
        let mut state = self.board.state.lock();
        let call = state.first + state.slots.len() as u64;
        let first = state.first;
        let known = state.homes.entry(home.endpoint.clone()).or_insert_with(|| {
            let (sender, questions) = mpsc::unbounded_channel();
            let link = Link { endpoint: home.endpoint.clone(), questions };
            // Without its thread the home stays unreached: the channel's other end is gone with the link.
            let is_down = self.opened.send(link).is_err();
            let (open, replica) = (BTreeMap::new(), home.replica.clone());
            Home { questions: sender, open, replica, is_down, used: Instant::now() }
        });
        let now = Instant::now();
        known.used = now;
        if known.replica != home.replica {
            known.replica.clone_from(&home.replica);
        }
        let question = AttendQuery { call, data: message };
        let is_sent = !known.is_overdue(first) && known.questions.send(question).is_ok();
        if is_sent {
            known.open.insert(call, now);
            state.waiting += 1;
        }
        state.slots.push(if is_sent { Slot::Awaited } else { Slot::Failed });
    }

    fn collect(&mut self, until: Instant) -> Vec<Option<Vec<u8>>> {
        let mut state = self.board.state.lock();
        while state.waiting > 0 {
            if self.board.settled.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.waiting = 0;
        state.first += state.slots.len() as u64;
        let slots = std::mem::take(&mut state.slots);
        let answer = |slot| match slot {
            Slot::Answered(data) => Some(data),
            Slot::Awaited | Slot::Failed => None,
        };
        slots.into_iter().map(answer).collect()
    }

    fn is_overdue(&self, home: &RemoteHome) -> bool {
        let mut state = self.board.state.lock();
        let first = state.first;
        state.homes.get_mut(&home.endpoint).is_some_and(|known| {
            known.used = Instant::now();
            known.is_overdue(first)
        })
    }
}

impl std::fmt::Debug for GrpcAttention {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let homes: Vec<String> = self.board.state.lock().homes.keys().cloned().collect();
        formatter.debug_struct("GrpcAttention").field("homes", &homes).finish_non_exhaustive()
    }
}

impl Home {
    /// Whether asking it would only cost time, where calls before `first` are late.
    fn is_overdue(&self, first: u64) -> bool {
        self.is_down || self.open.first_key_value().is_some_and(|(call, _)| *call < first)
    }
}

impl Board {
    /// A call is over.
    fn settle(&self, endpoint: &str, call: u64, outcome: Slot) {
        let mut state = self.state.lock();
        let Some(home) = state.homes.get_mut(endpoint) else { return };
        let Some(asked) = home.open.remove(&call) else { return };
        if matches!(outcome, Slot::Answered(_)) {
            self.links.answered(&home.replica, asked.elapsed());
        }
        self.put(&mut state, call, outcome);
    }

    /// The home is not there: whatever it was asked fails at once.
    fn lost(&self, endpoint: &str) {
        let mut state = self.state.lock();
        let Some(home) = state.homes.get_mut(endpoint) else { return };
        home.is_down = true;
        for call in std::mem::take(&mut home.open).into_keys() {
            self.put(&mut state, call, Slot::Failed);
        }
    }

    fn reached(&self, endpoint: &str) {
        if let Some(home) = self.state.lock().homes.get_mut(endpoint) {
            home.is_down = false;
        }
    }

    /// Whether nobody is interested in a home any more; it is forgotten then.
    fn forgets(&self, endpoint: &str) -> bool {
        let mut state = self.state.lock();
        let is_idle = state.homes.get(endpoint).is_none_or(|home| home.used.elapsed() > IDLE);
        if is_idle {
            state.homes.remove(endpoint);
        }
        is_idle
    }

    fn put(&self, state: &mut State, call: u64, outcome: Slot) {
        let Some(index) = call.checked_sub(state.first) else { return };
        let Some(slot) = state.slots.get_mut(index as usize) else { return };
        if matches!(slot, Slot::Awaited) {
            *slot = outcome;
            state.waiting = state.waiting.saturating_sub(1);
            if state.waiting == 0 {
                self.settled.notify_all();
            }
        }
    }
}

/// Keeps a home's stream, and comes back with growing pauses, until nobody asks for the home any more.
async fn keep(mut link: Link, peers: Peers, board: Arc<Board>) {
    let mut pause = FIRST_PAUSE;
    let mut is_told = false;
    loop {
        let why = match open(&peers, &link.endpoint).await {
            Ok(stream) => {
                board.reached(&link.endpoint);
                tracing::debug!(home = link.endpoint, "home reached");
                (pause, is_told) = (FIRST_PAUSE, false);
                stream.carry(&mut link, &board).await
            }
            Err(why) => why,
        };
        if board.forgets(&link.endpoint) {
            return;
        }
        board.lost(&link.endpoint);
        // What came while the connection was being made has failed with it. From here on nothing comes until it is made.
        while link.questions.try_recv().is_ok() {}
        // The first failure says it all; the next ones are the same.
        if !std::mem::replace(&mut is_told, true) {
            tracing::warn!(home = link.endpoint, why, "home lost, its sessions' steps wait for it");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// An Attend stream that the home accepted.
struct AskingStream {
    questions: mpsc::UnboundedSender<AttendQuery>,
    answers: Streaming<AttendAnswer>,
}

async fn open(peers: &Peers, endpoint: &str) -> Result<AskingStream, String> {
    let exchange = async {
        let mut client = peers.connect(endpoint).await?;
        let (questions, body) = mpsc::unbounded_channel();
        let response = client.attend(UnboundedReceiverStream::new(body)).await;
        let answers = response.map_err(|status| status.message().to_owned())?.into_inner();
        Ok(AskingStream { questions, answers })
    };
    // A stopped process accepts connections and nothing more.
    let silent = |_| format!("no answer within {OPEN_PATIENCE:?}");
    tokio::time::timeout(OPEN_PATIENCE, exchange).await.map_err(silent)?
}

impl AskingStream {
    /// Carries questions and answers until the stream ends or nobody asks any more, and says why.
    async fn carry(mut self, link: &mut Link, board: &Board) -> String {
        loop {
            tokio::select! {
                question = link.questions.recv() => {
                    let Some(question) = question else { return "nobody asks".to_owned() };
                    if self.questions.send(question).is_err() {
                        return "the home ended the stream".to_owned();
                    }
                }
                answer = self.answers.message() => match answer {
                    Ok(Some(answer)) => board.settle(&link.endpoint, answer.call, outcome(&link.endpoint, answer)),
                    Ok(None) => return "the home ended the stream".to_owned(),
                    Err(status) => return status.message().to_owned(),
                },
                () = tokio::time::sleep(IDLE) => {}
            }
            // Cheap enough for every message, and never true right after a question.
            if self.is_idle(link, board) {
                return "nobody asks".to_owned();
            }
        }
    }

    fn is_idle(&self, link: &Link, board: &Board) -> bool {
        let state = board.state.lock();
        state.homes.get(&link.endpoint).is_none_or(|home| home.used.elapsed() > IDLE)
    }
}

fn outcome(home: &str, answer: AttendAnswer) -> Slot {
    if answer.code == 0 {
        return Slot::Answered(answer.data);
    }
    tracing::warn!(home, code = answer.code, message = answer.message, "a home could not read a query");
    Slot::Failed
}
