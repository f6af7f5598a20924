//! The same skewed arrivals with the balancer off and on, and what became of loads and streams.

use std::collections::BTreeMap;
use std::time::Duration;

use perigee_engine::request::Load;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{FinishReason, GenerateRequest, SamplingParams};
use perigee_router::Balance;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::Channel;

use super::arrivals::{Arrival, END, skewed};
use super::fleet::Fleet;

const REPLICAS: usize = 4;
/// Time between two looks at the loads.
const LOOK: Duration = Duration::from_millis(500);
/// A session that moved stays for that long.
const REST: Duration = Duration::from_secs(60);

/// What a run came to.
#[derive(Debug, Default)]
struct Outcome {
    /// How far the worst replica was above the mean, look by look: pages in use, and time of a step.
    pages: Vec<f64>,
    steps: Vec<f64>,
    /// Seconds to the first token, stream by stream.
    ttft: Vec<f64>,
    /// Tokens that clients had by the end of the last wave.
    tokens: u64,
    /// By session when it changed replicas.
    moves: BTreeMap<String, Vec<Instant>>,
}

/// What a client saw.
struct Seen {
    first: Duration,
    choices: Vec<SeenChoice>,
}

/// What it saw of a choice.
#[derive(Default)]
struct SeenChoice {
    session: String,
    owner: String,
    /// When each token came.
    times: Vec<Instant>,
    moves: Vec<Instant>,
    is_over: bool,
}

impl Outcome {
    fn line(&self) -> String {
        let moves: usize = self.moves.values().map(Vec::len).sum();
        format!(
            "pages P50 {:.3} P95 {:.3}, step time P50 {:.3} P95 {:.3}; {} tokens; TTFT P50 {:.3} s, P99 {:.3} s; {moves} moves",
            quantile(&self.pages, 0.5),
            quantile(&self.pages, 0.95),
            quantile(&self.steps, 0.5),
            quantile(&self.steps, 0.95),
            self.tokens,
            quantile(&self.ttft, 0.5),
            quantile(&self.ttft, 0.99),
        )
    }
}

fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// How far the worst is above the mean.
fn above_mean(loads: &[Load], value: fn(&Load) -> f64) -> f64 {
    let values: Vec<f64> = loads.iter().map(value).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    if mean > 0.0 { values.into_iter().fold(0.0, f64::max) / mean - 1.0 } else { 0.0 }
}

/// One client: comes, reads to the end, and checks every index.
async fn client(mut inference: InferenceClient<Channel>, arrival: Arrival, number: u32) -> Seen {
    tokio::time::sleep(arrival.at).await;
    let sampling = SamplingParams {
        temperature: Some(1.0),
        seed: Some(number.into()),
        ignore_eos: true,
        n: Some(arrival.choices as u32),
        ..SamplingParams::default()
    };
    let request = GenerateRequest {
        token_ids: (0..arrival.prompt as u32).map(|position| (position + number) % 16).collect(),
        sampling: Some(sampling),
        max_tokens: Some(arrival.output),
        ..GenerateRequest::default()
    };
    let came = Instant::now();
    let mut stream = inference.generate(request).await.expect("accepted").into_inner();
    let mut first = None;
    let mut choices: Vec<SeenChoice> = (0..arrival.choices).map(|_| SeenChoice::default()).collect();
    while let Some(response) = stream.message().await.expect("no error") {
        let now = Instant::now();
        first.get_or_insert(now - came);
        let choice = &mut choices[response.choice as usize];
        if response.token_id.is_some() {
            assert_eq!(response.index, choice.times.len() as u64, "no gap and no repeat");
            choice.times.push(now);
        }
        if !choice.owner.is_empty() && choice.owner != response.replica {
            choice.moves.push(now);
        }
        (choice.session, choice.owner) = (response.session_id, response.replica);
        choice.is_over |= response.finish_reason == FinishReason::Length as i32;
    }
    let is_complete = |choice: &SeenChoice| choice.is_over && choice.times.len() == arrival.output as usize;
    assert!(choices.iter().all(is_complete), "every choice has all its tokens");
    Seen { first: first.expect("a token"), choices }
}

async fn outcome(balance: Balance, routers: usize, seed: u64) -> Outcome {
    let fleet = Fleet::start(REPLICAS, routers, balance).await;
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for (number, arrival) in (0..).zip(skewed(seed)) {
        let inference = fleet.inference[number as usize % routers].clone();
        clients.spawn(client(inference, arrival, number));
    }
    let mut outcome = Outcome::default();
    while began.elapsed() < END {
        tokio::time::sleep(LOOK).await;
        let loads: Vec<Load> = fleet.engines.iter().map(|engine| engine.load()).collect();
        outcome.pages.push(above_mean(&loads, |load| f64::from(load.pages_total - load.pages_free)));
        // Who has nobody takes no time.
        outcome.steps.push(above_mean(&loads, |load| if load.running > 0 { load.step_ms.into() } else { 0.0 }));
    }
    while let Some(seen) = clients.join_next().await {
        let seen = seen.expect("no panic");
        outcome.ttft.push(seen.first.as_secs_f64());
        for choice in seen.choices {
            outcome.tokens += choice.times.iter().filter(|time| **time - began < END).count() as u64;
            outcome.moves.insert(choice.session, choice.moves);
        }
    }
    // What was kept for sessions that moved on is free in the end.
    let free = async {
        let is_free = |load: Load| load.pages_free == load.pages_total && load.slots_free == load.slots_total;
        while !fleet.engines.iter().all(|engine| is_free(engine.load())) {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), free).await.expect("everything is free in the end");
    fleet.stop().await;
    outcome
}

#[tokio::test(start_paused = true)]
async fn skewed_arrivals_are_evened_out_at_no_ones_cost() {
    // With three routers each has a third of the sessions, sees all loads, and knows nothing of the others' moves.
    for (routers, seed) in [(1, 1), (1, 2), (3, 1)] {
        let (off, on) = (outcome(Balance::Off, routers, seed).await, outcome(Balance::On, routers, seed).await);
        println!("{routers} routers, seed {seed}\n  off: {}\n  on:  {}", off.line(), on.line());
        assert!(off.moves.values().all(Vec::is_empty));
        for (what, off, on) in [("pages", &off.pages, &on.pages), ("step time", &off.steps, &on.steps)] {
            let (off, on) = (quantile(off, 0.95), quantile(on, 0.95));
            assert!(on <= 0.8 * off, "P95 imbalance of {what}: {on} with the balancer, {off} without");
        }
        assert!(on.tokens as f64 >= 0.98 * off.tokens as f64, "throughput: {} of {}", on.tokens, off.tokens);
        let (before, after) = (quantile(&off.ttft, 0.99), quantile(&on.ttft, 0.99));
        assert!(
            after <= 1.05 * before,
            "P99 of the time to the first token: {after} s with the balancer, {before} s without"
        );
        for (session, moves) in &on.moves {
            assert!(moves.windows(2).all(|pair| pair[1] - pair[0] >= REST), "{session} moved at {moves:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_moves_nobody() {
    let outcome = outcome(Balance::DryRun, 1, 3).await;
    assert!(outcome.moves.values().all(Vec::is_empty), "{}", outcome.line());
}
