//! The random schedules: sessions that move while they prefill and decode, several at a time, over replicas of one, two and
//! four ranks, split and whole. Every stream equals its undisturbed run; what moved is of constant size; afterwards nothing
//! is held anywhere.
//!
//! PERIGEE_MOVE_SCHEDULES asks for another number of them, PERIGEE_MOVE_SEED for others; a failure names the seed of its
//! group, which PERIGEE_MOVE_SEED with four schedules repeats. The long run, outside the suite:
//! `PERIGEE_MOVE_SCHEDULES=3000 cargo test -p perigee --test moves random_schedules -- --nocapture`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use perigee_model::ModelSpec;
use perigee_proto::v1::MigrateMode;
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec, metric};
use tokio::task::JoinSet;
use tonic::Code;

use crate::client::{Answer, Moved, run};
use crate::judge::{Judge, Told};
use crate::plan::{Group, Sizes, group, group_of_choices};

/// The seed of the first group.
const SEED: u64 = 5000;
/// Schedules over one prompt.
const GROUP: usize = 4;
/// Schedules of `random:tiny` in the suite, besides the long ones.
const SCHEDULES: usize = 296;
/// Length of the long prompt, and how many sessions its requests have; each of them moves by itself.
const LONG: (usize, [u32; 2]) = (20_000, [3, 2]);
/// Groups at once.
const AT_ONCE: usize = 2;
/// Connections that clients share.
const CONNECTIONS: usize = 2;
/// How long slots and pages may take to come back once the last stream has ended: the grace time of what a lost message
/// left behind, and a little.
const FREED: Duration = Duration::from_secs(15);
/// Degrees of the replicas.
const DEGREES: [usize; 4] = [1, 2, 4, 1];
/// Positions of a page.
const PAGE: u64 = 64;

/// A number from the environment.
pub(crate) fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, expected a number")))
}

/// What came of the moves of a run.
#[derive(Debug, Default)]
struct Tally {
    /// Moves by what became of them.
    moves: BTreeMap<String, usize>,
    /// Sessions that had moved before their first token.
    in_prefill: usize,
    /// Sessions by number of moves that succeeded.
    by_count: BTreeMap<usize, usize>,
    failures: Vec<String>,
}

impl Tally {
    fn count(&self, what: &str) -> usize {
        self.moves.get(what).copied().unwrap_or(0)
    }

    fn take(&mut self, sizes: &StateSizes, group: &Group, answers: &[Answer]) {
        for (schedule, answer) in group.schedules.iter().zip(answers) {
            for moved in &answer.moves {
                let result = judge_move(sizes, moved);
                let what = match &result {
                    Ok(what) => what.clone(),
                    Err(fault) => {
                        let name = &schedule.request.request_id;
                        self.failures.push(format!("seed {}, {name}: {fault}: {moved:?}", group.seed));
                        "broke a rule".to_owned()
                    }
                };
                *self.moves.entry(what).or_default() += 1;
            }
            self.in_prefill += answer
                .choices
                .iter()
                .filter(|choice| choice.epochs.first_key_value().is_some_and(|(epoch, _)| *epoch > 1))
                .count();
            let succeeded = answer.moves.iter().filter(|moved| moved.answer.is_ok()).count();
            *self.by_count.entry(succeeded).or_default() += 1;
        }
    }

    /// Most moves were made, and some of every kind.
    fn verdict(&self) {
        println!("{:#?}, {} in prefill, sessions by moves {:?}", self.moves, self.in_prefill, self.by_count);
        assert!(self.failures.is_empty(), "{} failures:\n{}", self.failures.len(), self.failures.join("\n"));
        let (split, whole) = (self.count("split"), self.count("whole"));
        let asked: usize = self.moves.values().sum();
        assert!(split > 0 && whole > 0 && self.in_prefill > 0, "{self:?}");
        assert!((split + whole) * 10 >= asked * 7, "only {split} + {whole} of {asked} moves were made");
    }
}

/// What a session's state takes, by the model's configuration.
#[derive(Debug, Clone, Copy)]
struct StateSizes {
    /// States and convolution tails.
    state: u64,
    /// Latents of one position, all MLA layers.
    position: u64,
}

impl StateSizes {
    fn of(model: &str) -> Self {
        let spec: ModelSpec = model.parse().unwrap();
        let ModelSpec::Random { preset, .. } = spec else { panic!("a random model") };
        let shape = preset.config().unwrap().cache_shape(1, 1, 1);
        let head = shape.kda_head_dim * (shape.kda_head_dim + 3 * (shape.conv - 1));
        let state = 4 * shape.kda_layers * shape.kda_heads * head;
        Self { state: state as u64, position: (4 * shape.mla_layers * shape.latent_width) as u64 }
    }
}

/// What a move was, where it kept the rules: a split one takes no page, any takes the state and what fills the last page.
fn judge_move(sizes: &StateSizes, moved: &Moved) -> Result<String, String> {
    let answer = match &moved.answer {
        Ok(answer) => answer,
        Err(status) => {
            return match status.code() {
                // It ended before, or is on its way already.
                Code::NotFound | Code::Aborted | Code::FailedPrecondition => {
                    println!("not moved: {status}");
                    Ok(format!("{:?}", status.code()))
                }
                Code::ResourceExhausted => Ok("full".into()),
                _ => Err("a move failed".into()),
            };
        }
    };
    let partial = answer.state_bytes.checked_sub(sizes.state).ok_or("less than a state")?;
    if !partial.is_multiple_of(sizes.position) || partial / sizes.position >= PAGE {
        return Err(format!("{partial} bytes besides the state are no unfilled page"));
    }
    let known = moved.context as u64 * 4;
    if answer.token_bytes < known {
        return Err(format!("{} bytes of token ids of at least {known}", answer.token_bytes));
    }
    let page = PAGE * sizes.position;
    if !answer.page_bytes.is_multiple_of(page) || answer.page_bytes / page > answer.token_bytes / 4 / PAGE {
        return Err(format!("{} bytes of pages of {page} bytes", answer.page_bytes));
    }
    if answer.mode() != moved.planned.mode {
        return Err(format!("another mode than {:?}", moved.planned.mode));
    }
    match answer.mode() {
        MigrateMode::Split if answer.page_bytes != 0 => Err("a split move took pages along".into()),
        MigrateMode::Split => Ok("split".into()),
        MigrateMode::Whole => Ok("whole".into()),
        MigrateMode::Unspecified => Err("no mode".into()),
    }
}

/// Runs the schedules of a group at once.
async fn run_group(clients: Clients, group: Group, names: Vec<String>) -> (Group, Vec<Answer>) {
    let tasks: Vec<_> = group
        .schedules
        .iter()
        .map(|schedule| {
            let (clients, schedule, names) = (clients.clone(), schedule.clone(), names.clone());
            tokio::spawn(async move { run(&clients, &schedule, &names).await })
        })
        .collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.expect("a client"));
    }
    (group, answers)
}

/// Runs groups on a fleet, some at once, and judges them meanwhile.
async fn run_groups(fleet: &Fleet, model: &str, groups: Vec<Group>, (at_once, longest): (usize, usize)) {
    let began = Instant::now();
    let names: Vec<String> = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let mut connections: Vec<Clients> = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(fleet.connect().await.unwrap());
    }
    let (judge, sizes, count) = (Judge::start(model, longest), StateSizes::of(model), groups.len());
    let schedules: usize = groups.iter().map(|group| group.schedules.len()).sum();
    let mut tally = Tally::default();
    let mut open: JoinSet<(Group, Vec<Answer>)> = JoinSet::new();
    let mut waiting = groups.into_iter().enumerate();
    let mut done = 0;
    loop {
        while open.len() < at_once
            && let Some((number, group)) = waiting.next()
        {
            if at_once == 1 {
                // The judge computes the prompt meanwhile.
                let prompt = group.schedules[0].request.token_ids.clone();
                judge.door().send(Told::Begun(prompt)).expect("the judge's thread");
            }
            let (clients, names) = (connections[number % CONNECTIONS].clone(), names.clone());
            open.spawn(run_group(clients, group, names));
        }
        let Some(finished) = open.join_next().await else { break };
        let (group, answers) = finished.expect("a client");
        done += 1;
        if done % 10 == 0 {
            println!("{done} of {count} groups after {:?}", began.elapsed());
        }
        tally.take(&sizes, &group, &answers);
        judge.door().send(Told::Answered(group, answers)).expect("the judge's thread");
    }
    println!("{schedules} schedules after {:?}", began.elapsed());
    let findings = tokio::task::spawn_blocking(|| judge.findings()).await.expect("the judge");
    println!("judged after {:?}", began.elapsed());
    let took = connections[0].all_free(FREED).await;
    findings.verdict(schedules);
    tally.verdict();
    println!("all slots and pages free {:?} after the last verdict", took.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_schedules_equal_undisturbed_runs() {
    let first = setting("PERIGEE_MOVE_SEED").unwrap_or(SEED);
    let asked = setting("PERIGEE_MOVE_SCHEDULES").map_or(SCHEDULES, |count| count as usize);
    println!("PERIGEE_MOVE_SEED={first} PERIGEE_MOVE_SCHEDULES={asked}");
    let sizes = Sizes { prompt: (16, 8192), output: (40, 160), schedules: GROUP, vocab: 512, replicas: DEGREES.len() };
    let groups = (0..asked.div_ceil(GROUP) as u64).map(|number| group(first + number, sizes)).collect();
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &DEGREES)
        .worker("--token-budget=256")
        .worker("--state-slots=32")
        .worker("--latent-pages=2048")
        // Between the two of one rank; the others' states go in the stream.
        .worker("--handoff=pair")
        .start()
        .await
        .unwrap();
    run_groups(&fleet, "random:tiny", groups, (AT_ONCE, sizes.prompt.1 + sizes.output.1)).await;
    let mut by_way = Vec::new();
    for way in ["ipc", "pair", "grpc"] {
        let name = format!("perigee_migration_state_bytes_total{{way=\"{way}\"}}");
        let mut bytes = 0.0;
        for replica in &fleet.replicas {
            bytes += metric(replica.http, &name).await.unwrap();
        }
        by_way.push((way, bytes));
    }
    println!("bytes of states by way: {by_way:?}");
    assert_eq!(by_way[0].1, 0.0, "nothing is reached between CPUs");
    assert!(by_way[2].1 > 0.0, "ranks that do not match have no pairs");
    assert!(asked < SCHEDULES || by_way[1].1 > 0.0, "no state went by a pair");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_sessions_equal_undisturbed_runs() {
    let (length, choices) = LONG;
    let sizes =
        Sizes { prompt: (length, length), output: (120, 200), schedules: 0, vocab: 512, replicas: DEGREES.len() };
    let first = setting("PERIGEE_MOVE_SEED").unwrap_or(SEED) + 10_000;
    let group = group_of_choices(first, &choices, sizes);
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &DEGREES)
        // A move in the prompt waits for the step that runs: one of few tokens, at contexts as long as these.
        .worker("--token-budget=256")
        .worker("--latent-pages=2048")
        .start()
        .await
        .unwrap();
    run_groups(&fleet, "random:tiny", vec![group], (1, length + sizes.output.1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wide_heads_equal_undisturbed_runs() {
    let sizes = Sizes { prompt: (16, 400), output: (24, 48), schedules: 3, vocab: 1024, replicas: DEGREES.len() };
    let first = setting("PERIGEE_MOVE_SEED").unwrap_or(SEED) + 20_000;
    let groups = (0..4).map(|number| group(first + number, sizes)).collect();
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &DEGREES)
        .model("random:wide")
        // Prompts take many steps, so that a session that moves as soon as it is known does so before its first token.
        .worker("--token-budget=16")
        .worker("--latent-pages=256")
        .worker("--state-slots=32")
        .start()
        .await
        .unwrap();
    run_groups(&fleet, "random:wide", groups, (AT_ONCE, sizes.prompt.1 + sizes.output.1)).await;
}
