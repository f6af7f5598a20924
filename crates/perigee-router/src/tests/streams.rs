//! What a client sees of its tokens: order, epochs, choices, ends, and what happens when it stops reading.

use std::time::Duration;

use perigee_proto::internal::{
    Counts, Finish, Position, Refused, RefusedReason, Submit, replica_message, router_message,
};
use perigee_proto::v1::{self, inference_client::InferenceClient};
use tonic::{Code, Streaming};
use tonic_types::StatusExt;

use super::fake::{Attached, Sandbox, finished, token};
use crate::{Limits, RouterConfig};

pub(super) fn prompt() -> v1::GenerateRequest {
    v1::GenerateRequest { token_ids: vec![1, 2, 3], request_id: "mine".to_owned(), ..Default::default() }
}

pub(super) async fn generate(
    sandbox: &Sandbox,
    attached: &mut Attached,
    request: v1::GenerateRequest,
) -> (Submit, Streaming<v1::GenerateResponse>) {
    let mut client = sandbox.inference.clone();
    let (stream, submit) = tokio::join!(client.generate(request), attached.next_submit());
    (submit, stream.expect("accepted").into_inner())
}

/// Indices of the tokens up to the end of the stream.
async fn indices(stream: &mut Streaming<v1::GenerateResponse>) -> (Vec<u64>, Result<(), tonic::Status>) {
    let mut indices = Vec::new();
    loop {
        match stream.message().await {
            Ok(Some(response)) => indices.extend(response.token_id.map(|_| response.index)),
            Ok(None) => return (indices, Ok(())),
            Err(status) => return (indices, Err(status)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_carries_what_the_replica_sends() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    assert_eq!((submit.request_id.as_str(), submit.prompt.as_slice(), submit.epoch), ("mine", [1, 2, 3].as_slice(), 1));

    let mut first = token(&submit, 0);
    first.logprobs = Some(Box::new(Position { has_chosen: true, ids: vec![100, 7], logprobs: vec![-0.5, -1.5] }));
    first.prompt_logprobs =
        vec![Position::default(), Position { has_chosen: true, ids: vec![2], logprobs: vec![-2.0] }];
    let mut last = finished(token(&submit, 1), Finish::Length);
    last.usage = Some(Box::new(Counts { prompt: 3, completion: 2, cached: 1 }));
    attached.step(vec![first, last]);

    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!((response.index, response.token_id, response.text.as_str()), (0, Some(100), "t0 "));
    assert_eq!((response.replica.as_str(), response.epoch, response.request_id.as_str()), ("a", 1, "mine"));
    assert_eq!(response.session_id, submit.sessions[0]);
    assert_eq!(response.seed, Some(submit.sampling.expect("set").seed), "the drawn seed is told");
    let logprobs = response.logprobs.expect("asked for");
    assert_eq!(logprobs.chosen, Some(v1::TokenLogprob { token_id: 100, logprob: -0.5 }));
    assert_eq!(logprobs.top, [v1::TokenLogprob { token_id: 7, logprob: -1.5 }]);
    assert_eq!(response.prompt_logprobs.len(), 2);
    assert_eq!(response.prompt_logprobs[0].chosen, None);

    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!((response.index, response.seed, response.finish_reason()), (1, None, v1::FinishReason::Length));
    assert_eq!(response.usage, Some(v1::Usage { prompt: 3, completion: 2, cached: 1 }));
    assert!(stream.message().await.expect("no error").is_none());
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_first_token_counts_as_one_though_something_came_before_it() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    let scores = vec![Position::default(), Position { has_chosen: true, ids: vec![2], logprobs: vec![-2.0] }];
    let before = perigee_proto::internal::SessionEvent {
        token: None,
        text: String::new(),
        prompt_logprobs: scores,
        ..token(&submit, 0)
    };
    attached.step(vec![before]);
    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!((response.token_id, response.prompt_logprobs.len()), (None, 2));
    let metrics = &sandbox.router.inference.metrics;
    assert_eq!((metrics.waiting.get(), metrics.running.get()), (1, 0));
    for index in 0..3 {
        attached.step(vec![token(&submit, index)]);
        assert_eq!(stream.message().await.expect("no error").expect("a response").index, index);
        assert_eq!((metrics.waiting.get(), metrics.running.get()), (0, 1));
    }
    assert_eq!((metrics.ttft.get_sample_count(), metrics.completion_tokens.get()), (1, 3));
}

/// A stream whose client has read its first two tokens, so that the next ones pass at once.
async fn under_way(
    sandbox: &Sandbox,
    attached: &mut Attached,
    request: v1::GenerateRequest,
) -> (Submit, Streaming<v1::GenerateResponse>) {
    let (submit, mut stream) = generate(sandbox, attached, request).await;
    for index in 0..2 {
        attached.step(vec![token(&submit, index)]);
        read(&mut stream, index).await;
    }
    (submit, stream)
}

/// Reads a response, which must be the token of that index.
async fn read(stream: &mut Streaming<v1::GenerateResponse>, index: u64) -> v1::GenerateResponse {
    let response = stream.message().await.expect("no error").expect("a response");
    let expected = (index, Some(100 + index as u32), format!("t{index} "));
    assert_eq!((response.index, response.token_id, response.text.clone()), expected);
    response
}

#[tokio::test(start_paused = true)]
async fn under_way_too_only_the_current_epoch_and_the_next_index_pass() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = under_way(&sandbox, &mut attached, prompt()).await;
    // Fluent all of them: what another owner of the session would say, before and after this one.
    for epoch in [submit.epoch - 1, submit.epoch + 1] {
        let other = perigee_proto::internal::SessionEvent { epoch, token: Some(9), ..token(&submit, 2) };
        attached.step(vec![other]);
    }
    attached.step(vec![token(&submit, 1), token(&submit, 0)]);
    attached.step(vec![token(&submit, 2)]);
    read(&mut stream, 2).await;
    attached.step(vec![token(&submit, 4)]);
    let status = stream.message().await.expect_err("a gap");
    assert_eq!(status.get_error_details().error_info().expect("info").reason, "EVENT_GAP");
}

#[tokio::test(start_paused = true)]
async fn a_token_does_not_overtake_what_came_before_it() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = under_way(&sandbox, &mut attached, prompt()).await;
    let mut second = token(&submit, 2);
    second.logprobs = Some(Box::new(Position { has_chosen: true, ids: vec![102], logprobs: vec![-0.5] }));
    attached.step(vec![second, token(&submit, 3), token(&submit, 4)]);
    assert!(read(&mut stream, 2).await.logprobs.is_some());
    read(&mut stream, 3).await;
    read(&mut stream, 4).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_follows_the_end_of_one_of_two_choices() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = under_way(
        &sandbox,
        &mut attached,
        v1::GenerateRequest { sampling: Some(v1::SamplingParams { n: Some(2), ..Default::default() }), ..prompt() },
    )
    .await;
    attached.step(vec![finished(token(&submit, 2), Finish::Length)]);
    read(&mut stream, 2).await;
    attached.step(vec![token(&submit, 3)]);
    let other =
        |index| perigee_proto::internal::SessionEvent { session: submit.sessions[1].clone(), ..token(&submit, index) };
    attached.step(vec![finished(other(0), Finish::Length)]);
    assert_eq!(read(&mut stream, 0).await.choice, 1);
    assert_eq!(stream.message().await.expect("no error"), None);
}

#[tokio::test(start_paused = true)]
async fn each_token_of_a_resumable_request_can_be_gone_on_from() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let request = v1::GenerateRequest { resumable: true, ..prompt() };
    let (submit, mut stream) = under_way(&sandbox, &mut attached, request).await;
    for index in 2..5 {
        attached.step(vec![token(&submit, index)]);
        assert!(!read(&mut stream, index).await.resume_token.is_empty(), "token {index}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_replay_is_over_with_its_first_token() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = under_way(&sandbox, &mut attached, prompt()).await;
    let (_other, mut other) = sandbox.add("b").await;
    replica.kill.take();
    drop(attached);
    let again = other.next_submit().await;
    assert_eq!((again.sessions.clone(), again.delivered.clone()), (submit.sessions, vec![100, 101]));
    other.step(vec![token(&again, 2)]);
    assert_eq!(read(&mut stream, 2).await.replica, "b");
    let done = sandbox.router.inference.metrics.migrations.with_label_values(&["replay", "done"]);
    assert_eq!(done.get(), 1);
    other.step(vec![token(&again, 3)]);
    read(&mut stream, 3).await;
    assert_eq!(done.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_of_more_than_a_window_comes_in() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, _attached) = sandbox.add("a").await;
    let mut client = sandbox.inference.clone();
    let request = v1::GenerateRequest { request_id: "x".repeat(3 << 20), ..prompt() };
    let answer = tokio::time::timeout(Duration::from_secs(60), client.generate(request)).await;
    // It was read to its end: what is wrong with it is known.
    assert_eq!(answer.expect("an answer").expect_err("a bad name").code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn only_the_current_epoch_and_the_next_index_pass() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    let of_epoch = |epoch, index| perigee_proto::internal::SessionEvent { epoch, ..token(&submit, index) };
    attached.step(vec![of_epoch(0, 0), token(&submit, 0), of_epoch(2, 1), token(&submit, 0)]);
    attached.step(vec![token(&submit, 1), token(&submit, 1), finished(token(&submit, 2), Finish::Stop)]);
    attached.step(vec![token(&submit, 3), finished(token(&submit, 3), Finish::Stop)]);
    let (seen, end) = indices(&mut stream).await;
    assert_eq!(seen, [0, 1, 2]);
    assert!(end.is_ok());
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_gap_fails_the_request_and_aborts_it() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    attached.step(vec![token(&submit, 0), token(&submit, 2)]);
    let (seen, end) = indices(&mut stream).await;
    assert_eq!(seen, [0]);
    let status = end.expect_err("a gap");
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(status.get_error_details().error_info().expect("info").reason, "EVENT_GAP");
    assert_eq!(attached.next_abort().await, submit.sessions);
}

#[tokio::test(start_paused = true)]
async fn choices_interleave_and_the_stream_ends_with_the_last() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let sampling = Some(v1::SamplingParams { n: Some(3), seed: Some(5), ..Default::default() });
    let (submit, mut stream) = generate(&sandbox, &mut attached, v1::GenerateRequest { sampling, ..prompt() }).await;
    assert_eq!(submit.sessions.len(), 3);
    let of_choice = |choice: u32, index| perigee_proto::internal::SessionEvent {
        session: submit.sessions[choice as usize].clone(),
        choice,
        ..token(&submit, index)
    };
    attached.step(vec![of_choice(0, 0), of_choice(2, 0), of_choice(1, 0)]);
    attached.step(vec![finished(of_choice(1, 1), Finish::Stop), of_choice(0, 1)]);
    attached.step(vec![finished(of_choice(0, 2), Finish::Length), finished(of_choice(2, 1), Finish::Stop)]);
    let mut next = [0; 3];
    let mut ends = [0; 3];
    while let Some(response) = stream.message().await.expect("no error") {
        let choice = response.choice as usize;
        assert_eq!(response.index, next[choice]);
        assert_eq!(response.seed, (next[choice] == 0).then_some(5), "each choice's first response has the seed");
        next[choice] += 1;
        ends[choice] += i32::from(response.finish_reason() != v1::FinishReason::Unspecified);
    }
    assert_eq!((next, ends), ([3, 2, 2], [1, 1, 1]));
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_aborts_what_still_runs() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let sampling = Some(v1::SamplingParams { n: Some(2), ..Default::default() });
    let (submit, mut stream) = generate(&sandbox, &mut attached, v1::GenerateRequest { sampling, ..prompt() }).await;
    attached.step(vec![finished(token(&submit, 0), Finish::Stop)]);
    stream.message().await.expect("no error").expect("a response");
    drop(stream);
    assert_eq!(attached.next_abort().await, submit.sessions[1..], "choice 0 ended by itself");
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_fills_only_its_own_buffer() {
    let limits = Limits { buffered_bytes: 20_000, ..Limits::default() };
    let sandbox = Sandbox::start(RouterConfig { limits, ..RouterConfig::default() }).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (slow, mut slow_stream) = generate(&sandbox, &mut attached, prompt()).await;
    // On a connection of its own: streams of one connection share the window that the client itself keeps open.
    let channel = sandbox.network.channel("router:1").await.expect("connected");
    let sandbox = Sandbox { inference: InferenceClient::new(channel), ..sandbox };
    let (quick, mut quick_stream) = generate(&sandbox, &mut attached, prompt()).await;
    let count = 2_000;
    let padded = |submit: &Submit, index| perigee_proto::internal::SessionEvent {
        text: "x".repeat(2000),
        ..token(submit, index)
    };
    for index in 0..count {
        attached.step(vec![padded(&slow, index), padded(&quick, index)]);
        let response = quick_stream.message().await.expect("no error").expect("a response");
        assert_eq!(response.index, index);
    }
    assert_eq!(attached.next_abort().await, slow.sessions);
    let (seen, end) = indices(&mut slow_stream).await;
    let expected: Vec<u64> = (0..seen.len() as u64).collect();
    assert_eq!(seen, expected, "what was sent before is in order");
    assert!(seen.len() < count as usize);
    let status = end.expect_err("too slow");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(status.get_error_details().error_info().expect("info").reason, "SLOW_READER");
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_the_stream_and_aborts() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let mut request = tonic::Request::new(prompt());
    request.set_timeout(Duration::from_millis(500));
    let mut client = sandbox.inference.clone();
    let (stream, submit) = tokio::join!(client.generate(request), attached.next_submit());
    let mut stream = stream.expect("accepted").into_inner();
    assert!(submit.deadline_ms.is_some_and(|left| (450..=500).contains(&left)), "{:?}", submit.deadline_ms);
    attached.step(vec![token(&submit, 0)]);
    let (seen, end) = indices(&mut stream).await;
    assert_eq!(seen, [0]);
    assert_eq!(end.expect_err("too late").code(), Code::DeadlineExceeded);
    assert_eq!(attached.next_abort().await, submit.sessions);
}

#[tokio::test(start_paused = true)]
async fn a_full_replica_passes_the_request_on_with_a_new_epoch() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_a, mut a) = sandbox.add("a").await;
    let (_b, mut b) = sandbox.add("b").await;
    let (first, mut stream) = generate(&sandbox, &mut a, prompt()).await;
    let refuse = |submit: &Submit, reason: RefusedReason| {
        replica_message::Body::Refused(Refused {
            sessions: submit.sessions.clone(),
            reason: reason.into(),
            field: "max_tokens".to_owned(),
            message: "no".to_owned(),
        })
    };
    a.send(refuse(&first, RefusedReason::Full));
    let second = b.next_submit().await;
    assert_eq!((second.epoch, &second.sessions), (2, &first.sessions));
    a.step(vec![token(&first, 0)]);
    b.step(vec![finished(token(&second, 0), Finish::Stop)]);
    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!((response.replica.as_str(), response.epoch), ("b", 2));
    assert!(stream.message().await.expect("no error").is_none());
    // Who sends tokens of a session that it does not own is told to end it, up to that epoch.
    let router_message::Body::Abort(abort) = a.next().await else { panic!("an abort is due") };
    assert_eq!((abort.sessions, abort.epoch), (first.sessions.clone(), 1));

    let (third, mut stream) = generate(&sandbox, &mut a, prompt()).await;
    a.send(refuse(&third, RefusedReason::Full));
    let fourth = b.next_submit().await;
    b.send(refuse(&fourth, RefusedReason::Full));
    let status = stream.message().await.expect_err("both are full");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_error_details().retry_info().is_some());

    let (fifth, mut stream) = generate(&sandbox, &mut a, prompt()).await;
    a.send(refuse(&fifth, RefusedReason::Invalid));
    let status = stream.message().await.expect_err("invalid");
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_error_details();
    assert_eq!(details.bad_request().expect("a field").field_violations[0].field, "max_tokens");
    sandbox.assert_idle().await;
}
