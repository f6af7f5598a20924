//! The real router before real leaders: many streams at once equal their solo runs, clients that leave free everything,
//! and the streams of a replica that dies go on elsewhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use perigee_engine::executor::ExecutorLimits;
use perigee_engine::testing::{Faults, ModelSizes};
use perigee_proto::v1;

use super::sandbox::{Cluster, HandMade, Leader, LeaderOptions, PATIENCE, hello, submit};

/// The tokens of each choice, and the replicas that served them.
async fn run(cluster: &Cluster, request: v1::GenerateRequest) -> Result<BTreeMap<u32, Vec<u32>>, tonic::Status> {
    let mut stream = cluster.inference.clone().generate(request).await?.into_inner();
    let mut choices: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let mut ended: BTreeMap<u32, u32> = BTreeMap::new();
    while let Some(response) = stream.message().await? {
        let tokens = choices.entry(response.choice).or_default();
        if let Some(token) = response.token_id {
            assert_eq!(response.index, tokens.len() as u64, "indices follow each other");
            tokens.push(token);
        }
        if response.finish_reason() != v1::FinishReason::Unspecified {
            *ended.entry(response.choice).or_default() += 1;
        }
    }
    assert!(choices.keys().eq(ended.keys()) && ended.values().all(|ends| *ends == 1), "each choice ends once");
    Ok(choices)
}

/// The i-th request: prompts, lengths, sampling and choices all differ.
fn request(i: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        token_ids: (0..1 + i * 7 % 90).map(|position| (position * 13 + i) % 300).collect(),
        sampling: Some(v1::SamplingParams {
            temperature: Some(if i.is_multiple_of(3) { 0.0 } else { 1.0 }),
            top_k: Some(i % 5 * 10),
            seed: Some(u64::from(i)),
            n: Some(1 + i % 3),
            ..Default::default()
        }),
        max_tokens: Some(20 + i * 37 % 180),
        ..Default::default()
    }
}

/// A replica with room for about half of what is asked of it.
fn tight() -> LeaderOptions {
    let limits =
        ExecutorLimits { vocab: 300, slots: 12, pages: 16, step_tokens: 64, step_rows: 12, max_model_len: 512 };
    let sizes = ModelSizes { limits, ..ModelSizes::default() };
    // Slow enough that requests meet.
    LeaderOptions { sizes, step: Duration::from_millis(1), ..LeaderOptions::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_streams_equal_their_solo_runs_and_free_everything() {
    let solo_leader = Leader::start("solo", LeaderOptions::default()).await;
    let solo_cluster = Cluster::start(&[("solo", &solo_leader)]).await;
    let mut solo = Vec::new();
    for i in 0..48 {
        solo.push(run(&solo_cluster, request(i)).await.expect("served"));
    }

    let (a, b) = (Leader::start("a", tight()).await, Leader::start("b", tight()).await);
    let cluster = std::sync::Arc::new(Cluster::start(&[("a", &a), ("b", &b)]).await);
    let mut running = tokio::task::JoinSet::new();
    for i in 0..48 {
        let stays = cluster.clone();
        running.spawn(async move { (i, run(&stays, request(i)).await) });
        if i % 5 == 4 {
            // One that leaves in the middle.
            let cluster = cluster.clone();
            running.spawn(async move {
                let mut stream = cluster.inference.clone().generate(request(i)).await.expect("accepted").into_inner();
                stream.message().await.expect("no error");
                drop(stream);
                (i, run(&cluster, request(i)).await)
            });
        }
    }
    while let Some(result) = tokio::time::timeout(PATIENCE, running.join_next()).await.expect("nothing hangs") {
        let (i, choices) = result.expect("no panic");
        assert_eq!(choices.expect("served"), solo[i as usize], "request {i}");
    }
    let preemptions = a.metric("perigee_preemptions_total") + b.metric("perigee_preemptions_total");
    assert!(preemptions > 0.0, "there was room for everybody: the test is too easy");
    a.assert_free().await;
    b.assert_free().await;
    let mut cluster = cluster.operator.clone();
    let flushed = cluster.flush_cache(v1::FlushCacheRequest::default()).await.expect("flushed").into_inner();
    assert_eq!(flushed.replicas, ["a", "b"]);
}

#[tokio::test]
async fn both_replicas_get_work_and_operators_see_it() {
    let options = || LeaderOptions { step: Duration::from_millis(5), ..LeaderOptions::default() };
    let (a, b) = (Leader::start("a", options()).await, Leader::start("b", options()).await);
    let cluster = Cluster::start(&[("a", &a), ("b", &b)]).await;
    let mut streams = Vec::new();
    let mut owners = std::collections::BTreeSet::new();
    for _ in 0..6 {
        let long = v1::GenerateRequest { token_ids: vec![1, 2, 3], max_tokens: Some(4000), ..Default::default() };
        let mut stream = cluster.inference.clone().generate(long).await.expect("accepted").into_inner();
        let first = stream.message().await.expect("no error").expect("a token");
        owners.insert(first.replica.clone());
        streams.push((first.session_id, stream));
    }
    assert_eq!(owners.into_iter().collect::<Vec<_>>(), ["a", "b"]);

    let mut operator = cluster.operator.clone();
    let sessions =
        operator.list_sessions(v1::ListSessionsRequest::default()).await.expect("listed").into_inner().sessions;
    assert_eq!(sessions.len(), 6);
    let session = &sessions[0];
    assert_eq!((session.epoch, session.status.as_str()), (1, "decode"));
    let covered: u64 = session.segments.iter().map(|segment| segment.tokens).sum();
    assert!(session.segments.iter().all(|segment| segment.home == session.owner), "all local");
    assert!(covered > 0 && covered <= session.context, "{covered} of {}", session.context);
    let replicas = operator.list_replicas(v1::ListReplicasRequest {}).await.expect("listed").into_inner().replicas;
    assert_eq!(replicas.iter().map(|info| info.status.as_str()).collect::<Vec<_>>(), ["ready", "ready"]);

    let (session, stream) = &mut streams[0];
    let abort = v1::AbortRequest { session_id: Some(session.clone()), request_id: None };
    cluster.inference.clone().abort(abort).await.expect("it runs");
    let mut last = None;
    while let Some(response) = stream.message().await.expect("no error") {
        last = Some(response.finish_reason());
    }
    assert_eq!(last, Some(v1::FinishReason::Aborted));
    drop(streams);
    a.assert_free().await;
    b.assert_free().await;
}

#[tokio::test]
async fn streams_of_a_replica_that_fails_go_on_at_the_other() {
    let faults = Faults { fatal_step: Some(60), ..Faults::default() };
    let step = Duration::from_millis(5);
    let mut failing = Leader::start("a", LeaderOptions { faults, step, ..LeaderOptions::default() }).await;
    let healthy = Leader::start("b", LeaderOptions { step, ..LeaderOptions::default() }).await;
    let cluster = Arc::new(Cluster::start(&[("a", &failing), ("b", &healthy)]).await);
    let long = || v1::GenerateRequest {
        token_ids: vec![1, 2],
        sampling: Some(v1::SamplingParams { temperature: Some(1.0), seed: Some(7), ..Default::default() }),
        max_tokens: Some(200),
        ..Default::default()
    };
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let cluster = cluster.clone();
        streams.spawn(async move { run(&cluster, long()).await });
    }
    let mut outputs = Vec::new();
    while let Some(end) = tokio::time::timeout(PATIENCE, streams.join_next()).await.expect("nothing hangs") {
        outputs.push(end.expect("no panic").expect("the other one goes on"));
    }
    failing.ended().await.expect_err("it failed");
    let again = run(&cluster, long()).await.expect("the other one serves");
    assert_eq!(again[&0].len(), 200);
    assert!(outputs.iter().all(|output| *output == again), "the failure shows in an answer");
    healthy.assert_free().await;
}

#[tokio::test]
async fn scores_equal_the_prompts_logprobs_of_a_generation() {
    let leader = Leader::start("a", LeaderOptions::default()).await;
    let cluster = Cluster::start(&[("a", &leader)]).await;
    let tokens: Vec<u32> = (0..700).map(|position| position * 7 % 300).collect();
    let request = v1::ScoreRequest { token_ids: tokens.clone(), ..Default::default() };
    let scores = cluster.inference.clone().score(request).await.expect("scored").into_inner();
    assert_eq!(scores.logprobs.len(), tokens.len() - 1);
    let request = v1::GenerateRequest {
        token_ids: tokens,
        sampling: Some(v1::SamplingParams { prompt_logprobs: Some(3), ..Default::default() }),
        max_tokens: Some(1),
        ..Default::default()
    };
    let mut stream = cluster.inference.clone().generate(request).await.expect("accepted").into_inner();
    let first = stream.message().await.expect("no error").expect("a response");
    let chosen = first.prompt_logprobs.iter().filter_map(|position| position.chosen).map(|chosen| chosen.logprob);
    assert_eq!(chosen.collect::<Vec<_>>(), scores.logprobs);
    assert!(first.prompt_logprobs[1..].iter().all(|position| position.top.len() == 3));
}

#[tokio::test]
async fn routers_share_replicas() {
    let leader = Leader::start("a", LeaderOptions { step: Duration::from_millis(2), ..LeaderOptions::default() }).await;
    let cluster = Cluster::start(&[("a", &leader)]).await;
    let (other, _) = HandMade::attach(&leader, hello(Duration::from_secs(60))).await.expect("attached");
    let foreign = format!("s-{:032x}", 5);
    other.send(perigee_proto::internal::router_message::Body::Submit(submit(&foreign, vec![1], 8000)));
    let mut operator = cluster.operator.clone();
    let listed = async {
        loop {
            let sessions = operator.list_sessions(v1::ListSessionsRequest::default()).await.expect("listed");
            if sessions.into_inner().sessions.iter().any(|session| session.session == foreign) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, listed).await.expect("sessions of every router are listed");
    let abort = v1::AbortRequest { session_id: Some(foreign.clone()), request_id: None };
    let told = cluster.inference.clone().abort(abort).await.expect("it runs elsewhere").into_inner();
    assert_eq!(told.session_ids, [foreign]);
    leader.assert_free().await;
    assert!(cluster.grpc.port() != cluster.http.port() && cluster.registry.records().len() == 1);
}
