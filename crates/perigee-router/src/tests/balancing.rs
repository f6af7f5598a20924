//! The balancer in a router: what replicas report makes it order a move, or only say so, and a session that moved rests.

use std::time::Duration;

use perigee_proto::internal::{
    EventBatch, Load, MoveCosts, MoveMode, MovePhase, MoveReport, Prepare, Submit, Welcome, replica_message,
    router_message::Body,
};
use perigee_proto::v1;
use perigee_registry::ReplicaRecord;
use tokio::time::Instant;
use tonic::Streaming;

use super::fake::{Attached, FakeReplica, Sandbox, roomy, token, welcome};
use super::streams::generate;
use crate::{Balance, RouterConfig};

const COSTS: MoveCosts = MoveCosts { state_bytes: 1000, token_bytes: 8, ask_bytes: 700, ask_rounds: 7 };

fn sandbox(balance: Balance) -> impl Future<Output = Sandbox> {
    Sandbox::start(RouterConfig { balance, ..RouterConfig::default() })
}

async fn add(sandbox: &Sandbox, name: &str) -> (FakeReplica, Attached) {
    let welcome = Welcome { move_costs: Some(COSTS), ..welcome(name) };
    let mut replica = FakeReplica::start(&sandbox.network, welcome);
    sandbox.registry.register(ReplicaRecord::new(name, format!("{name}:1"))).expect("registered");
    let attached = replica.attached().await;
    sandbox.until_status(name, "ready").await;
    (replica, attached)
}

/// Says that a replica runs so many sessions, and took a hundred steps more.
fn tell_load(attached: &Attached, running: u32, steps: &mut u64) {
    *steps += 100;
    let decode_ms = 5.0 + running as f32;
    let context_tokens = 50 * u64::from(running);
    let slots_free = 30 - running;
    let load = Load { running, slots_free, slots_total: 30, steps: *steps, decode_ms, context_tokens, ..roomy() };
    let batch = EventBatch { load: Some(load), clock: 1, ..EventBatch::default() };
    attached.send(replica_message::Body::Batch(batch));
}

type Stream = Streaming<v1::GenerateResponse>;

/// Sessions on a replica that have begun, and more to go.
async fn begin(sandbox: &Sandbox, attached: &mut Attached, count: usize) -> Vec<(Submit, Stream)> {
    let mut begun = Vec::new();
    for _ in 0..count {
        let sampling = Some(v1::SamplingParams { ignore_eos: true, ..Default::default() });
        let request = v1::GenerateRequest {
            token_ids: vec![1, 2, 3],
            max_tokens: Some(90),
            sampling,
            ..v1::GenerateRequest::default()
        };
        let (submit, mut stream) = generate(sandbox, attached, request).await;
        attached.step(vec![token(&submit, 0)]);
        assert!(stream.message().await.expect("no error").is_some());
        begun.push((submit, stream));
    }
    begun
}

/// The next order to hand a session over, if there is one for so long, while both replicas report the same loads.
async fn next_prepare(on_a: &mut Attached, on_b: &Attached, loads: (u32, u32), within: Duration) -> Option<Prepare> {
    let (mut steps, deadline) = (1000, Instant::now() + within);
    while Instant::now() < deadline {
        tell_load(on_a, loads.0, &mut steps);
        tell_load(on_b, loads.1, &mut steps);
        if let Ok(body) = tokio::time::timeout(Duration::from_millis(300), on_a.next()).await {
            match body {
                Body::Prepare(prepare) => return Some(prepare),
                other => panic!("expected an order to hand over, got {other:?}"),
            }
        }
    }
    None
}

/// Plays a move to its end.
async fn carry_out(on_a: &mut Attached, on_b: &mut Attached, prepare: &Prepare) {
    let report = |epoch, phase: MovePhase| {
        replica_message::Body::MoveReport(MoveReport {
            session: prepare.session.clone(),
            epoch,
            phase: phase.into(),
            mode: prepare.mode,
            ..MoveReport::default()
        })
    };
    on_a.send(report(prepare.epoch, MovePhase::Ready));
    assert!(matches!(on_b.next().await, Body::Start(_)));
    on_b.send(report(prepare.next_epoch, MovePhase::Started));
    assert!(matches!(on_a.next().await, Body::Release(_)));
    on_a.send(report(prepare.epoch, MovePhase::Released));
}

#[tokio::test(start_paused = true)]
async fn sessions_leave_the_busy_replica_one_by_one_and_rest_where_they_came() {
    let sandbox = sandbox(Balance::On).await;
    let (_a, mut on_a) = add(&sandbox, "a").await;
    let begun = begin(&sandbox, &mut on_a, 2).await;
    let (_b, mut on_b) = add(&sandbox, "b").await;
    let mut moved = Vec::new();
    for _ in 0..2 {
        let prepare = next_prepare(&mut on_a, &on_b, (2, 0), Duration::from_secs(10)).await.expect("an order");
        assert_eq!((prepare.target.as_str(), prepare.mode()), ("b", MoveMode::Whole));
        carry_out(&mut on_a, &mut on_b, &prepare).await;
        moved.push(prepare.session);
    }
    moved.sort();
    let mut sessions: Vec<String> = begun.iter().map(|(submit, _)| submit.sessions[0].clone()).collect();
    sessions.sort();
    assert_eq!(moved, sessions, "each once");

    // Now it is b that looks busy. Its sessions have just come.
    let began = Instant::now();
    assert_eq!(next_prepare(&mut on_b, &on_a, (2, 0), Duration::from_secs(50)).await, None);
    let back = next_prepare(&mut on_b, &on_a, (2, 0), Duration::from_secs(20)).await.expect("an order");
    assert_eq!(back.target, "a");
    assert!(began.elapsed() > Duration::from_secs(50));
}

#[tokio::test(start_paused = true)]
async fn nothing_moves_where_it_is_off_or_dry() {
    for balance in [Balance::Off, Balance::DryRun] {
        let sandbox = sandbox(balance).await;
        let (_a, mut on_a) = add(&sandbox, "a").await;
        let _begun = begin(&sandbox, &mut on_a, 2).await;
        let (_b, on_b) = add(&sandbox, "b").await;
        assert_eq!(next_prepare(&mut on_a, &on_b, (2, 0), Duration::from_secs(90)).await, None, "{balance:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn even_loads_and_draining_replicas_are_left_alone() {
    let sandbox = sandbox(Balance::On).await;
    let (_a, mut on_a) = add(&sandbox, "a").await;
    let _begun = begin(&sandbox, &mut on_a, 2).await;
    let (_b, on_b) = add(&sandbox, "b").await;
    assert_eq!(next_prepare(&mut on_a, &on_b, (3, 3), Duration::from_secs(30)).await, None);
}
