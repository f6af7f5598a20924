//! A fake replica that follows the rules of moves by itself, as a test sees it: which of its messages get lost, are doubled
//! or are its last, and what it holds. How it acts is `stage`'s.

mod stage;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perigee_migration::epochs::Party;
use perigee_proto::internal::{Prepare, Submit};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::stage::Stage;
use super::fake::{Attached, FakeReplica, Sandbox};

/// Time between tokens.
pub(super) const TICK: Duration = Duration::from_millis(200);
const SILENCE: Duration = Duration::from_secs(2);
pub(super) const GRACE: Duration = Duration::from_secs(10);

/// Messages that a test can do something to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Said {
    Prepare,
    Start,
    Release,
    AbortMove,
    Abort,
    Ready,
    Started,
    Released,
    Aborted,
    Failed,
    /// The handoff between replicas.
    Handoff,
}

/// What becomes of the next message of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Lost,
    Doubled,
    /// The replica dies with it: before it is heard, after it is said.
    Last,
    /// The replica cannot carry it out.
    Refused,
}

/// The token of a choice at an index.
pub(super) fn token_of(choice: u32, index: u64) -> u32 {
    100 + ((index + 7 * u64::from(choice)) % 200) as u32
}

/// What is known of a session that runs, and goes with it.
#[derive(Debug, Clone)]
struct Record {
    choice: u32,
    prompt: u64,
    index: u64,
    most: u64,
}

#[derive(Debug, Default)]
struct Held {
    party: Party,
    record: Option<Record>,
    arriving: Option<Record>,
    order: Option<Prepare>,
    freezing: bool,
    timers: HashMap<bool, Instant>,
    reply: Option<oneshot::Sender<bool>>,
}

/// What a test sees and sets.
#[derive(Debug, Default)]
pub(super) struct Shared {
    sessions: BTreeMap<String, Held>,
    fates: Vec<(Said, Fate)>,
    /// Handoffs are verified only so long after they came.
    pub(super) verify_after: Duration,
    /// Every submission that came.
    pub(super) submits: Vec<Submit>,
    pub(super) heard: Vec<Said>,
}

struct Offer {
    session: String,
    epoch: u64,
    next: u64,
    record: Record,
    reply: oneshot::Sender<bool>,
}

enum Own {
    Answered { session: String, next: u64, is_right: bool },
    Verify { session: String, next: u64 },
}

/// Where replicas find each other.
#[derive(Clone, Default)]
pub(super) struct Hub {
    doors: Arc<Mutex<HashMap<String, mpsc::UnboundedSender<Offer>>>>,
}

/// A replica that acts by itself.
pub(super) struct Actor {
    pub(super) name: String,
    pub(super) shared: Arc<Mutex<Shared>>,
    replica: FakeReplica,
    task: JoinHandle<()>,
    hub: Hub,
}

impl Actor {
    pub(super) async fn start(sandbox: &Sandbox, hub: &Hub, name: &str) -> Self {
        let (replica, attached) = sandbox.add(name).await;
        let shared = Arc::new(Mutex::new(Shared::default()));
        let task = spawn(attached, shared.clone(), hub, name);
        Self { name: name.to_owned(), shared, replica, task, hub: hub.clone() }
    }

    /// Does something to the next message of a kind.
    pub(super) fn fate(&self, said: Said, fate: Fate) {
        self.shared.lock().fates.push((said, fate));
    }

    /// Whether everything that was to happen to messages has happened.
    pub(super) fn is_fated(&self) -> bool {
        !self.shared.lock().fates.is_empty()
    }

    /// Its process ends.
    pub(super) fn kill(&mut self) {
        self.replica.kill.take();
        self.task.abort();
    }

    /// Its stream breaks; it attaches again with nothing left of its sessions.
    pub(super) async fn reattach(&mut self) {
        self.task.abort();
        let attached = self.replica.attached().await;
        self.shared.lock().sessions.clear();
        self.task = spawn(attached, self.shared.clone(), &self.hub, &self.name);
    }

    /// Sessions of which it holds a slot or pages.
    pub(super) fn holds(&self) -> Vec<String> {
        let shared = self.shared.lock();
        let held = shared.sessions.iter().filter(|(_, held)| !held.party.is_over());
        held.map(|(session, _)| session.clone()).collect()
    }

    /// Sessions that it steps.
    pub(super) fn steps(&self) -> Vec<String> {
        let shared = self.shared.lock();
        let held = shared.sessions.iter().filter(|(_, held)| held.party.stepping().is_some());
        held.map(|(session, _)| session.clone()).collect()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn spawn(attached: Attached, shared: Arc<Mutex<Shared>>, hub: &Hub, name: &str) -> JoinHandle<()> {
    let (door, offers) = mpsc::unbounded_channel();
    hub.doors.lock().insert(name.to_owned(), door);
    tokio::spawn(Stage::new(attached, shared, hub.clone()).run(offers))
}
