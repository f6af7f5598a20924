//! Replicas that drain: their sessions are asked to come away, as they are first, and from their tokens where that fails.

use perigee_proto::internal::{
    AbortMove, EventBatch, Finish, Load, MoveFailure, MoveMode, MovePhase, MoveReport, Prepare, replica_message,
    router_message::Body,
};
use perigee_proto::v1;
use tonic::Code;

use super::fake::{Attached, Sandbox, finished, roomy, token};
use super::streams::{generate, prompt};
use crate::RouterConfig;

/// A load that says whether the replica drains.
fn tell_load(attached: &Attached, draining: bool) {
    let load = Some(Load { draining, ..roomy() });
    attached.send(replica_message::Body::Batch(EventBatch { load, clock: 1, ..EventBatch::default() }));
}

async fn next_prepare(attached: &mut Attached) -> Prepare {
    match attached.next().await {
        Body::Prepare(prepare) => prepare,
        other => panic!("expected an order to hand over, got {other:?}"),
    }
}

/// Says of a move that was taken back that it is over on this side.
async fn end_move(attached: &mut Attached) {
    let Body::AbortMove(AbortMove { session, epoch, .. }) = attached.next().await else { panic!("it is taken back") };
    let phase = MovePhase::Aborted.into();
    attached.send(replica_message::Body::MoveReport(MoveReport { session, epoch, phase, ..MoveReport::default() }));
}

#[tokio::test(start_paused = true)]
async fn a_session_that_does_not_come_away_as_it_is_goes_on_from_its_tokens() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_a, mut on_a) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut on_a, prompt()).await;
    on_a.step(vec![token(&submit, 0)]);
    assert!(stream.message().await.expect("no error").is_some());
    let (_b, mut on_b) = sandbox.add("b").await;
    for attempt in 0..4 {
        tell_load(&on_a, true);
        tell_load(&on_b, false);
        let prepare = next_prepare(&mut on_a).await;
        assert_eq!(
            (prepare.session.as_str(), prepare.target.as_str()),
            (submit.sessions[0].as_str(), "b"),
            "{attempt}"
        );
        assert_eq!(prepare.mode(), MoveMode::Whole, "its pages must leave too");
        on_a.send(replica_message::Body::MoveReport(MoveReport {
            session: prepare.session,
            epoch: prepare.epoch,
            phase: MovePhase::Failed.into(),
            failure: MoveFailure::Handoff.into(),
            message: "it is preempted to host memory".to_owned(),
            ..MoveReport::default()
        }));
        end_move(&mut on_a).await;
        end_move(&mut on_b).await;
    }
    let Body::Abort(abort) = on_a.next().await else { panic!("it is over there") };
    assert_eq!(abort.sessions, submit.sessions);
    assert_eq!(on_b.next_abort().await, submit.sessions, "nor is anything of it left where it was to go");
    let again = on_b.next_submit().await;
    assert_eq!(again.delivered, [100]);
    assert!(again.epoch > abort.epoch && abort.epoch > 0);
    on_b.step(vec![finished(token(&again, 1), Finish::Stop)]);
    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!((response.index, response.replica.as_str()), (1, "b"));
    assert!(stream.message().await.expect("no error").is_none());
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_replica_is_told_to_drain_and_watched_until_it_has_left() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut a, mut on_a) = sandbox.add("a").await;
    let mut cluster = sandbox.cluster.clone();
    let drain = v1::DrainRequest { replica: "a".to_owned() };
    let refused = cluster.drain(drain.clone()).await.expect_err("there is no other");
    assert_eq!(refused.code(), Code::FailedPrecondition);

    let (_b, on_b) = sandbox.add("b").await;
    tell_load(&on_b, false);
    let draining = tokio::spawn(async move { cluster.drain(drain).await });
    assert!(matches!(on_a.next().await, Body::Drain(_)));
    assert!(matches!(on_a.next().await, Body::ListSessions(_)));
    a.kill.take();
    drop(on_a);
    drop(on_b);
    let left = draining.await.expect("no panic").expect("it left").into_inner();
    assert_eq!((left.moved, left.ended), (0, 0));
}
