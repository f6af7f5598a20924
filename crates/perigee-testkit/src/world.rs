//! Replicas that hand sessions to each other within one process: real engines over real ranks, which are threads, with
//! handoffs and attention carried by calls. A small router drives them. What processes, connections and the shipped router
//! add is left out; in exchange everything between the parts can be broken on purpose.

mod carry;
mod course;
mod faults;
mod neighbours;
mod pairing;
mod relay;

pub use carry::{Carriage, Tamper};
pub use course::{Course, Message, Moment, Order, Trouble};
pub use faults::{Fault, Poisoned, Stage};
pub use neighbours::Neighbours;
pub use pairing::{PairCounts, PairTrouble, Pairing};
pub use relay::Relay;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use perigee_collectives::{Collective, thread_group};
use perigee_cpu::CpuBackend;
use perigee_engine::executor::Executor;
use perigee_engine::homes::HomeDirectory;
use perigee_engine::link::{LeaderLink, channel_link};
use perigee_engine::moves::{FollowPolicy, MoveConfig, Way};
use perigee_engine::rank::Rank;
use perigee_engine::ranks::Ranks;
use perigee_engine::remote::RemoteCounts;
use perigee_engine::{Engine, EngineConfig, EngineHandle, EngineObserver};
use perigee_migration::{AttendShape, Layout, Place};
use perigee_worker::WorkerConfig;
use perigee_worker::load::{Opened, cpu_backend, open, tokenizer};
use perigee_worker::moving::attend_shape;

use self::carry::{Home, Homes, Questions};
use self::faults::Faulty;
use self::neighbours::Sharing;
use crate::error::{Result, TestkitError};

/// Longest wait for a rank that is alive.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Debug, Clone)]
pub struct WorldSpec {
    /// Model as `--model` takes it.
    pub model: String,
    /// Number of ranks of every replica.
    pub degrees: Vec<usize>,
    /// State slots of each but the last.
    pub slots: usize,
    /// State slots of the last.
    pub last_slots: usize,
    /// Latent pages of each.
    pub pages: usize,
    /// Most tokens of a step.
    pub step_tokens: usize,
    /// How long a replica waits for a router that is silent.
    pub silence: Duration,
    /// How long something is kept for who may come back.
    pub grace: Duration,
    /// Which latents follow their sessions.
    pub follow: FollowPolicy,
    /// A fault to plant in every replica.
    pub fault: Option<(Fault, Stage)>,
    /// What replicas reach of each other's state slots; none where they reach nothing.
    pub neighbours: Option<Neighbours>,
    /// By which ways states may go.
    pub ways: Vec<Way>,
    /// The account of pairs.
    pub pairing: Pairing,
}

impl WorldSpec {
    /// Replicas of `random:tiny` with these numbers of ranks.
    pub fn new(degrees: &[usize]) -> Self {
        Self {
            model: "random:tiny".into(),
            degrees: degrees.to_vec(),
            slots: 16,
            last_slots: 16,
            pages: 128,
            step_tokens: 128,
            silence: Duration::from_secs(2),
            grace: Duration::from_secs(10),
            follow: FollowPolicy::Never,
            fault: None,
            neighbours: None,
            ways: vec![Way::Slots],
            pairing: Pairing::default(),
        }
    }
}

/// A replica of a world.
pub struct Member {
    /// Its name.
    pub name: String,
    /// The way to its engine.
    pub engine: EngineHandle,
    /// What asking others cost it.
    pub asked: Arc<Asked>,
    /// What became of slots that it gave back after moves.
    pub poisoned: Arc<Poisoned>,
    is_dead: AtomicBool,
}

impl Member {
    /// Whether it was not killed.
    pub fn is_alive(&self) -> bool {
        !self.is_dead.load(Ordering::Relaxed)
    }
}

/// What remote rows cost, summed over steps.
#[derive(Debug, Default)]
pub struct Asked {
    query_bytes: AtomicU64,
    answer_bytes: AtomicU64,
    tokens: AtomicU64,
}

impl Asked {
    /// Bytes of queries and of answers, and the tokens that asked.
    pub fn totals(&self) -> (u64, u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (read(&self.query_bytes), read(&self.answer_bytes), read(&self.tokens))
    }
}

impl EngineObserver for Asked {
    fn asked(&self, counts: &RemoteCounts) {
        self.query_bytes.fetch_add(counts.query_bytes, Ordering::Relaxed);
        self.answer_bytes.fetch_add(counts.answer_bytes, Ordering::Relaxed);
        self.tokens.fetch_add(counts.tokens, Ordering::Relaxed);
    }
}

/// Replicas that know each other. Their engines end with it.
pub struct World {
    /// The replicas, in the order of their degrees.
    pub members: Vec<Member>,
    /// What attention questions look like.
    pub shape: AttendShape,
    carriage: Carriage,
    homes: Homes,
}

impl World {
    /// Starts the engines. Handoffs run as tasks of the calling runtime.
    ///
    /// # Errors
    /// The model cannot be opened, or a rank cannot start.
    pub fn start(spec: &WorldSpec) -> Result<Self> {
        let first = config(spec, (1, spec.slots))?;
        let opened = open(&first)?;
        let shape = attend_shape(opened.source.config());
        let homes: Homes = Arc::new(Mutex::new(Default::default()));
        let carriage = Carriage::new(homes.clone());
        let mut members = Vec::new();
        for (index, &degree) in spec.degrees.iter().enumerate() {
            let name = format!("member-{index}");
            let is_last = index + 1 == spec.degrees.len();
            let config = config(spec, (degree, if is_last { spec.last_slots } else { spec.slots }))?;
            let opened = open(&config)?;
            let ranks = start_ranks(&opened, &config, (&homes, shape))?;
            let directory = HomeDirectory::new();
            let reader = ranks.latent_reader();
            let can_answer = reader.is_some();
            if let (Some(reader), Some(geometry), Ok(mut homes)) = (reader, ranks.geometry(), homes.lock()) {
                let home = Home { directory: directory.clone(), reader, model: ranks.answer_model(), geometry };
                homes.insert(name.clone(), home);
            }
            let poisoned = Arc::new(Poisoned::default());
            let executor = Faulty::new(ranks, spec.fault, poisoned.clone());
            let executor =
                Box::new(Sharing::new(executor, (spec.neighbours.clone(), spec.pairing.clone()), &name, degree));
            let asked = Arc::new(Asked::default());
            let moves = MoveConfig {
                place: Place {
                    replica: name.clone(),
                    incarnation: "1".into(),
                    ranks: degree as u32,
                    layout: Layout::Replicated,
                },
                endpoint: name.clone(),
                model: opened.digest.clone(),
                homes: directory.clone(),
                can_answer,
                connector: Arc::new(carriage.clone()),
                silence: spec.silence,
                grace: spec.grace,
                patience: Duration::from_millis(250),
                misses: 3,
                shape,
                follow: spec.follow,
                ways: spec.ways.clone(),
            };
            let engine_config = EngineConfig {
                eos_token_ids: opened.source.config().eos.clone(),
                tokenizer: tokenizer(&opened.spec)?,
                observer: asked.clone(),
                moves: Some(moves),
                ..EngineConfig::default()
            };
            let engine = Engine::start(executor, engine_config);
            let engine = engine.map_err(|error| TestkitError::Options(error.to_string()))?;
            carriage.add(&name, engine.clone());
            members.push(Member { name, engine, asked, poisoned, is_dead: AtomicBool::new(false) });
        }
        Ok(Self { members, shape, carriage, homes })
    }

    /// The handoffs, to be damaged or recorded.
    pub fn carriage(&self) -> &Carriage {
        &self.carriage
    }

    /// Ends a replica at once: its engine, handoffs to it and its answers to others.
    pub fn kill(&self, index: usize) {
        let member = &self.members[index];
        member.is_dead.store(true, Ordering::Relaxed);
        self.carriage.remove(&member.name);
        if let Ok(mut homes) = self.homes.lock() {
            homes.remove(&member.name);
        }
        member.engine.shutdown();
    }

    /// Waits until no session is anywhere and every slot and page is free.
    ///
    /// # Errors
    /// Something is still held after `limit`.
    pub async fn all_free(&self, limit: Duration) -> Result<()> {
        let free = async || {
            let is_free = |member: &Member| {
                let load = member.engine.load();
                let is_free = load.slots_free == load.slots_total && load.pages_free == load.pages_total;
                is_free || !member.is_alive()
            };
            Ok(self.members.iter().all(is_free).then_some(()))
        };
        let waited = crate::sandbox::eventually("every slot and page free", limit, free).await;
        waited.map(|_| ()).map_err(|error| {
            let loads: Vec<String> =
                self.members.iter().map(|member| format!("{}: {:?}", member.name, member.engine.load())).collect();
            TestkitError::Process { what: error.to_string(), message: loads.join("; ") }
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.members.iter().for_each(|member| member.engine.shutdown());
        self.carriage.forget();
    }
}

fn config(spec: &WorldSpec, (degree, slots): (usize, usize)) -> Result<WorkerConfig> {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        worker: WorkerConfig,
    }
    let arguments = [
        "perigee-worker".to_owned(),
        format!("--model={}", spec.model),
        format!("--tp={degree}"),
        "--threads=1".to_owned(),
        format!("--state-slots={slots}"),
        format!("--latent-pages={}", spec.pages),
        format!("--token-budget={}", spec.step_tokens),
        format!("--max-batch={slots}"),
    ];
    let line = Line::try_parse_from(arguments).map_err(|error| TestkitError::Options(error.to_string()))?;
    Ok(line.worker)
}

/// Loads the ranks of a replica; all but the first follow on threads of their own.
fn start_ranks(
    opened: &Opened,
    config: &WorkerConfig,
    (homes, shape): (&Homes, AttendShape),
) -> Result<Ranks<CpuBackend>> {
    let mut loaded = Vec::new();
    for (rank, seat) in thread_group(config.tp).into_iter().enumerate() {
        let config = WorkerConfig { rank, ..config.clone() };
        let seat: Box<dyn Collective> = Box::new(seat);
        let mut rank: Rank<CpuBackend> = opened.load(&config, cpu_backend(&config, seat))?;
        rank.set_attention(Box::new(Questions::new(homes.clone())), shape);
        loaded.push(rank);
    }
    let mut links: Vec<Box<dyn LeaderLink>> = Vec::new();
    let followers = loaded.split_off(1);
    for (index, mut follower) in followers.into_iter().enumerate() {
        let (link, mut other_end) = channel_link();
        links.push(Box::new(link));
        let name = format!("world-rank-{}", index + 1);
        let thread = std::thread::Builder::new().name(name);
        // A follower whose leader is gone has nobody to tell why it ends.
        let follow = move || drop(follower.follow(&mut other_end));
        thread.spawn(follow).map_err(|error| TestkitError::Options(error.to_string()))?;
    }
    let leader = loaded.pop().ok_or_else(|| TestkitError::Options("no ranks".into()))?;
    Ok(Ranks::new(leader, links, STEP_TIMEOUT)?)
}
