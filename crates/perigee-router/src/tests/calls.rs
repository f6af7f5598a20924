//! The other calls: scores, aborts, model information, operators' questions, health and reflection, and limits that hold
//! before a request is read.

use perigee_proto::internal::{Finish, Flushed, Position, Segment, Session, Sessions, replica_message, router_message};
use perigee_proto::v1;
use tonic::Code;
use tonic_types::StatusExt;

use super::fake::{Sandbox, finished, token};
use super::streams::{generate, prompt};
use crate::{Limits, RouterConfig};

#[tokio::test(start_paused = true)]
async fn scores_are_the_prompts_logprobs() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let request = v1::ScoreRequest { token_ids: vec![4, 5, 6], ..Default::default() };
    let mut client = sandbox.inference.clone();
    let answer = tokio::spawn(async move { client.score(request).await });
    let submit = attached.next_submit().await;
    assert_eq!((submit.max_tokens, submit.prompt_logprobs), (1, Some(0)));
    let mut event = finished(token(&submit, 0), Finish::Length);
    let position = |id, logprob| Position { has_chosen: true, ids: vec![id], logprobs: vec![logprob] };
    event.prompt_logprobs = vec![Position::default(), position(5, -1.0), position(6, -2.0)];
    event.usage = Some(Box::new(perigee_proto::internal::Counts { prompt: 3, completion: 1, cached: 0 }));
    attached.step(vec![event]);
    let answer = answer.await.expect("no panic").expect("scored").into_inner();
    assert_eq!((answer.logprobs.as_slice(), answer.replica.as_str()), ([-1.0, -2.0].as_slice(), "a"));
    assert_eq!(answer.usage, Some(v1::Usage { prompt: 3, completion: 0, cached: 0 }));
}

#[tokio::test(start_paused = true)]
async fn aborts_reach_own_and_foreign_sessions() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    let mut client = sandbox.inference.clone();
    let by_request = v1::AbortRequest { request_id: Some("mine".to_owned()), session_id: None };
    let told = client.abort(by_request.clone()).await.expect("it runs").into_inner();
    assert_eq!(told.session_ids, submit.sessions);
    assert_eq!(attached.next_abort().await, submit.sessions);
    let mut end = finished(token(&submit, 0), Finish::Aborted);
    (end.token, end.text) = (None, String::new());
    attached.step(vec![end]);
    let response = stream.message().await.expect("no error").expect("an end");
    assert_eq!((response.token_id, response.finish_reason()), (None, v1::FinishReason::Aborted));
    assert!(stream.message().await.expect("no error").is_none());

    // A session of another router: the replica is asked.
    let foreign = format!("s-{:032x}", 77);
    let by_session = v1::AbortRequest { session_id: Some(foreign.clone()), request_id: None };
    let mut other = client.clone();
    let told = tokio::spawn(async move { other.abort(by_session).await });
    let router_message::Body::ListSessions(question) = attached.next().await else { panic!("sessions are asked for") };
    let session = Session { session: foreign.clone(), request_id: "theirs".to_owned(), ..Session::default() };
    attached.send(replica_message::Body::Sessions(Sessions { call: question.call, sessions: vec![session] }));
    assert_eq!(attached.next_abort().await, std::slice::from_ref(&foreign));
    assert_eq!(told.await.expect("no panic").expect("it runs").into_inner().session_ids, [foreign]);

    for (bad, code) in [
        (v1::AbortRequest::default(), Code::InvalidArgument),
        (v1::AbortRequest { session_id: Some("x".to_owned()), ..by_request.clone() }, Code::InvalidArgument),
        (v1::AbortRequest { session_id: Some("x".to_owned()), request_id: None }, Code::InvalidArgument),
    ] {
        assert_eq!(client.abort(bad).await.expect_err("bad").code(), code);
    }
}

#[tokio::test(start_paused = true)]
async fn operators_see_replicas_and_sessions() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let mut cluster = sandbox.cluster.clone();
    let replicas = cluster.list_replicas(v1::ListReplicasRequest {}).await.expect("listed").into_inner().replicas;
    assert_eq!(replicas.len(), 1);
    assert_eq!((replicas[0].replica.as_str(), replicas[0].status.as_str(), replicas[0].tp), ("a", "ready", 2));
    assert_eq!((replicas[0].slots_total, replicas[0].pids.as_slice()), (8, [11, 12].as_slice()));

    let mut asker = cluster.clone();
    let answer = tokio::spawn(async move { asker.list_sessions(v1::ListSessionsRequest::default()).await });
    let router_message::Body::ListSessions(question) = attached.next().await else { panic!("sessions are asked for") };
    let segments = vec![
        Segment { home: "b".to_owned(), first: 0, tokens: 64, ..Segment::default() },
        Segment { first: 64, tokens: 10, ..Segment::default() },
    ];
    let session = Session {
        session: "s".to_owned(),
        epoch: 3,
        context: 74,
        status: "decode".to_owned(),
        segments,
        ..Session::default()
    };
    attached.send(replica_message::Body::Sessions(Sessions { call: question.call, sessions: vec![session] }));
    let sessions = answer.await.expect("no panic").expect("listed").into_inner().sessions;
    let homes: Vec<&str> = sessions[0].segments.iter().map(|segment| segment.home.as_str()).collect();
    assert_eq!((sessions[0].owner.as_str(), sessions[0].epoch, homes), ("a", 3, vec!["b", "a"]));

    let mut flusher = cluster.clone();
    let flushed = tokio::spawn(async move { flusher.flush_cache(v1::FlushCacheRequest::default()).await });
    let router_message::Body::Flush(question) = attached.next().await else { panic!("a flush is asked for") };
    attached.send(replica_message::Body::Flushed(Flushed { call: question.call }));
    assert_eq!(flushed.await.expect("no panic").expect("flushed").into_inner().replicas, ["a"]);

    let unknown = v1::ListSessionsRequest { replica: "nobody".to_owned() };
    assert_eq!(cluster.list_sessions(unknown).await.expect_err("unknown").code(), Code::NotFound);
    let silent = cluster.list_sessions(v1::ListSessionsRequest::default()).await.expect_err("no answer");
    assert_eq!(silent.code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn calls_without_what_they_need_say_so() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let mut cluster = sandbox.cluster.clone();
    let mut inference = sandbox.inference.clone();
    let nothing = inference.resume(v1::ResumeRequest::default()).await.expect_err("no request");
    assert_eq!(nothing.code(), Code::InvalidArgument);
    for (replica, code) in [("", Code::InvalidArgument), ("nobody", Code::NotFound)] {
        let refused = cluster.drain(v1::DrainRequest { replica: replica.to_owned() }).await.expect_err("nobody's name");
        assert_eq!(refused.code(), code, "{replica:?}");
    }
    let info = inference.get_model_info(v1::GetModelInfoRequest {}).await.expect_err("no replica yet");
    assert_eq!(info.code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn without_a_tokenizer_text_fails_and_token_ids_work() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, _attached) = sandbox.add("a").await;
    let mut client = sandbox.inference.clone();
    let info = client.get_model_info(v1::GetModelInfoRequest {}).await.expect("known").into_inner();
    assert_eq!((info.vocab_size, info.max_model_len, info.has_tokenizer), (300, 100, false));
    let text = v1::GenerateRequest { text: Some("hello".to_owned()), ..Default::default() };
    let status = client.generate(text).await.expect_err("no tokenizer");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("tokenizer"), "{}", status.message());
    let status = client
        .tokenize(v1::TokenizeRequest { text: "hello".to_owned(), ..Default::default() })
        .await
        .expect_err("no tokenizer");
    assert_eq!(status.code(), Code::FailedPrecondition);
    let status = client.detokenize(v1::DetokenizeRequest { token_ids: vec![1] }).await.expect_err("no tokenizer");
    assert_eq!(status.code(), Code::FailedPrecondition);
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_limits_are_refused_at_the_door() {
    let limits = Limits { requests: 1, message_bytes: 4096, text_bytes: 1024, ..Limits::default() };
    let sandbox = Sandbox::start(RouterConfig { limits, ..RouterConfig::default() }).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (_submit, stream) = generate(&sandbox, &mut attached, prompt()).await;
    let mut client = sandbox.inference.clone();
    let status = client.generate(prompt()).await.expect_err("one is the limit");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.get_error_details().retry_info().is_some_and(|info| info.retry_delay.is_some()));
    drop(stream);
    attached.next_abort().await;
    sandbox.assert_idle().await;

    let large = v1::GenerateRequest { token_ids: vec![1; 5000], ..Default::default() };
    let status = client.generate(large).await.expect_err("too large a message");
    // The table's code for too large a message; the library's own would be OUT_OF_RANGE, which clients are not promised.
    assert_eq!(status.code(), Code::ResourceExhausted);
    let bad = v1::GenerateRequest { max_tokens: Some(0), ..prompt() };
    let status = client.generate(bad).await.expect_err("invalid");
    let details = status.get_error_details();
    assert_eq!(details.bad_request().expect("a field").field_violations[0].field, "max_tokens");
}
