//! Requests that another router began: their sessions go on where they are, and are computed anew where they are not.

use perigee_migration::epochs::first_after;
use perigee_proto::internal::{
    Finish, MoveFailure, MovePhase, MoveReport, Session, SessionEvent, Sessions, Submit, TakeOver, replica_message,
    router_message,
};
use perigee_proto::v1;
use tonic::Streaming;

use super::fake::{Attached, FakeReplica, Sandbox, finished, token};
use super::streams::{generate, prompt};
use crate::RouterConfig;

/// The epoch of whoever takes a session over that was in its first one.
const EPOCH: u64 = 1 << 32;

/// A request that a router gave up after its client had two tokens of it. Here it is the same router, which has forgotten it.
struct Scene {
    sandbox: Sandbox,
    _replica: FakeReplica,
    on: Attached,
    first: Submit,
    resume: v1::ResumeRequest,
}

impl Scene {
    async fn new() -> Self {
        assert_eq!(EPOCH, first_after(1));
        let sandbox = Sandbox::start(RouterConfig::default()).await;
        let (replica, mut on) = sandbox.add("a").await;
        let request = v1::GenerateRequest { resumable: true, ..prompt() };
        let (first, mut stream) = generate(&sandbox, &mut on, request.clone()).await;
        assert!(first.resumable);
        on.step(vec![token(&first, 0), token(&first, 1)]);
        let mut resume_token = Vec::new();
        for _ in 0..2 {
            resume_token = stream.message().await.expect("no error").expect("a response").resume_token;
        }
        drop(stream);
        match on.next().await {
            // Only what this router can have made: the client may have turned to another one.
            router_message::Body::Abort(abort) => assert_eq!(abort.epoch, EPOCH - 1),
            other => panic!("expected an abort, got {other:?}"),
        }
        sandbox.assert_idle().await;
        let resume = v1::ResumeRequest { request: Some(request), resume_token, received: Vec::new() };
        Self { sandbox, _replica: replica, on, first, resume }
    }

    /// Resumes it, where replica a says that it has these sessions.
    async fn resume(&mut self, sessions: Vec<Session>) -> (Streaming<v1::GenerateResponse>, router_message::Body) {
        let mut client = self.sandbox.inference.clone();
        let on = &mut self.on;
        let answers = async move {
            match on.next().await {
                router_message::Body::ListSessions(question) => {
                    on.send(replica_message::Body::Sessions(Sessions { call: question.call, sessions }));
                }
                other => panic!("expected a question, got {other:?}"),
            }
            on.next().await
        };
        let (stream, body) = tokio::join!(client.resume(self.resume.clone()), answers);
        (stream.expect("accepted").into_inner(), body)
    }

    async fn take_over(&mut self) -> (Streaming<v1::GenerateResponse>, TakeOver) {
        let there = Session { session: self.first.sessions[0].clone(), epoch: 1, ..Session::default() };
        match self.resume(vec![there]).await {
            (stream, router_message::Body::TakeOver(order)) => (stream, order),
            (_, other) => panic!("expected to take it over, got {other:?}"),
        }
    }

    fn report(&self, epoch: u64, phase: MovePhase) {
        let session = self.first.sessions[0].clone();
        let mut report = MoveReport { session, epoch, phase: phase.into(), ..MoveReport::default() };
        if phase == MovePhase::Failed {
            report.set_failure(MoveFailure::NotHere);
        }
        self.on.send(replica_message::Body::MoveReport(report));
    }

    fn counted(&self, result: &str) -> u64 {
        self.sandbox.router.inference.metrics.migrations.with_label_values(&["takeover", result]).get()
    }
}

async fn read(stream: &mut Streaming<v1::GenerateResponse>) -> Vec<(u64, u32, String)> {
    let mut all = Vec::new();
    while let Some(response) = stream.message().await.expect("no error") {
        all.extend(response.token_id.map(|token| (response.index, token, response.session_id)));
    }
    all
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_still_there_goes_on() {
    for tells_tokens in [false, true] {
        let mut scene = Scene::new().await;
        if tells_tokens {
            scene.resume.received = vec![v1::ReceivedTokens { token_ids: vec![100, 101] }];
        }
        let (mut stream, order) = scene.take_over().await;
        let first = if tells_tokens { 2 } else { 0 };
        assert_eq!((order.epoch, order.first, order.next), (EPOCH, first, 2));
        scene.report(EPOCH, MovePhase::Started);
        let of_epoch = |index| SessionEvent { epoch: EPOCH, ..token(&scene.first, index) };
        let mut events: Vec<SessionEvent> = (first..4).map(of_epoch).collect();
        // What the first router's session still says is of the past.
        events.insert(0, token(&scene.first, 2));
        events.push(finished(of_epoch(4), Finish::Stop));
        scene.on.step(events);
        let session = scene.first.sessions[0].clone();
        let expected: Vec<_> = (2..5).map(|index| (index, 100 + index as u32, session.clone())).collect();
        assert_eq!(read(&mut stream).await, expected);
        assert_eq!((scene.counted("done"), scene.counted("failed")), (1, 0));
        scene.sandbox.assert_idle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_gone_meanwhile_is_computed_anew() {
    let mut scene = Scene::new().await;
    scene.resume.received = vec![v1::ReceivedTokens { token_ids: vec![100, 101] }];
    let (mut stream, _) = scene.take_over().await;
    scene.report(EPOCH, MovePhase::Failed);
    // Whatever of it is there after all ends before that.
    match scene.on.next().await {
        router_message::Body::Abort(abort) => assert_eq!(abort.epoch, EPOCH),
        other => panic!("expected an abort, got {other:?}"),
    }
    let again = scene.on.next_submit().await;
    assert_eq!((again.epoch, again.delivered.as_slice()), (EPOCH + 1, [100, 101].as_slice()));
    scene.on.step(vec![finished(token(&again, 2), Finish::Stop)]);
    assert_eq!(read(&mut stream).await, [(2, 102, scene.first.sessions[0].clone())]);
    assert_eq!((scene.counted("done"), scene.counted("failed")), (0, 1));
    scene.sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_nobody_has_is_computed_anew_under_another_name() {
    let mut scene = Scene::new().await;
    let (mut stream, body) = scene.resume(Vec::new()).await;
    let router_message::Body::Submit(again) = body else { panic!("expected a request, got {body:?}") };
    assert_ne!(again.sessions, scene.first.sessions);
    assert_eq!((again.epoch, again.delivered.len()), (1, 0));
    let mut events: Vec<SessionEvent> = (0..3).map(|index| token(&again, index)).collect();
    events.push(finished(token(&again, 3), Finish::Stop));
    scene.on.step(events);
    let expected: Vec<_> = (2..4).map(|index| (index, 100 + index as u32, again.sessions[0].clone())).collect();
    assert_eq!(read(&mut stream).await, expected);
    scene.sandbox.assert_idle().await;
}
