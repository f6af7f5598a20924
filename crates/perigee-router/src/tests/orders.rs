//! Orders to move a session that cannot be carried out: each is refused by kind, and says what is missing.

use perigee_proto::internal::{Load, ModelInfo, Session, Sessions, Welcome, replica_message, router_message};
use perigee_proto::v1::{self, MigrateMode};
use perigee_registry::ReplicaRecord;
use tonic::Code;
use tonic_types::StatusExt;

use super::actor::TICK;
use super::fake::{FakeReplica, Sandbox, roomy, welcome};
use super::scene::{Scene, told};
use crate::RouterConfig;

#[tokio::test(start_paused = true)]
async fn names_are_checked() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let mut cluster = sandbox.cluster.clone();
    let session = format!("s-{:032x}", 5);
    let order = |session_id: &str, to: &str| v1::MigrateRequest {
        session_id: session_id.to_owned(),
        to: to.to_owned(),
        ..Default::default()
    };
    for (bad, field) in [(order("x", "a"), "session_id"), (order("", ""), "session_id"), (order(&session, ""), "to")] {
        let status = cluster.migrate(bad).await.expect_err("bad");
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        assert_eq!(details.bad_request().expect("a field").field_violations[0].field, field);
    }

    // Nobody has it; then a replica has, for another router.
    for (listed, code, reason) in [
        (vec![], Code::NotFound, ""),
        (
            vec![Session { session: session.clone(), epoch: 4, ..Session::default() }],
            Code::FailedPrecondition,
            "OTHER_ROUTER",
        ),
    ] {
        let mut asker = cluster.clone();
        let order = order(&session, "a");
        let asked = tokio::spawn(async move { asker.migrate(order).await });
        let router_message::Body::ListSessions(question) = attached.next().await else {
            panic!("sessions are asked for")
        };
        attached.send(replica_message::Body::Sessions(Sessions { call: question.call, sessions: listed }));
        let status = asked.await.expect("no panic").expect_err("not here");
        let (found, why, facts) = told(&status);
        assert_eq!((found, why.as_str()), (code, reason), "{status}");
        if code == Code::FailedPrecondition {
            assert_eq!((facts["owner"].as_str(), facts["epoch"].as_str()), ("a", "4"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn targets_must_be_ready_and_other_than_the_owner() {
    let scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");

    let foreign = ModelInfo { digest: "zzz".to_owned(), ..welcome("d").model.unwrap_or_default() };
    let mut other_model = FakeReplica::start(&scene.sandbox.network, Welcome { model: Some(foreign), ..welcome("d") });
    scene.sandbox.registry.register(ReplicaRecord::new("d", "d:1")).expect("registered");
    let _attached = other_model.attached().await;
    scene.sandbox.until_status("d", "refused").await;
    let (_draining, attached) = scene.sandbox.add("e").await;
    let load = Load { draining: true, ..roomy() };
    attached.send(replica_message::Body::Batch(perigee_proto::internal::EventBatch {
        load: Some(load),
        ..Default::default()
    }));
    scene.sandbox.until_status("e", "draining").await;
    scene.sandbox.registry.register(ReplicaRecord::new("f", "f:1")).expect("registered");
    scene.sandbox.until_status("f", "unreachable").await;

    let cases = [
        ("nobody", Code::NotFound, "", "nobody"),
        (owner.as_str(), Code::FailedPrecondition, "ALREADY_THERE", "already"),
        ("d", Code::FailedPrecondition, "TARGET_NOT_READY", "another model"),
        ("e", Code::FailedPrecondition, "TARGET_NOT_READY", "draining"),
        ("f", Code::FailedPrecondition, "TARGET_NOT_READY", "unreachable"),
    ];
    for (to, code, reason, word) in cases {
        let status = scene.migrate(client.session(), to, MigrateMode::Split).await.expect("no panic").expect_err(to);
        let (found, why, _) = told(&status);
        assert_eq!((found, why.as_str()), (code, reason), "{to}");
        assert!(status.message().contains(word), "{status}");
    }
    client.read().await.is_complete(1);
    assert_eq!(scene.count("split", "aborted") + scene.count("split", "done"), 0, "none of these began");
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_moves_once_at_a_time() {
    let scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");
    let other = scene.other(&[owner.as_str()]);
    let third = scene.other(&[owner.as_str(), other.as_str()]);
    scene.actor(&other).shared.lock().verify_after = std::time::Duration::from_secs(1);
    let moving = scene.migrate(client.session(), &other, MigrateMode::Split);
    tokio::time::sleep(TICK).await;
    let status = scene.migrate(client.session(), &third, MigrateMode::Split).await.expect("no panic");
    let (code, reason, facts) = told(&status.expect_err("it is moving"));
    assert_eq!((code, reason.as_str()), (Code::Aborted, "MOVING"));
    assert_eq!((facts["owner"].as_str(), facts["epoch"].as_str()), (owner.as_str(), "1"));
    moving.await.expect("no panic").expect("the first move is not disturbed");
    scene.migrate(client.session(), &third, MigrateMode::Split).await.expect("no panic").expect("now it can");
    let read = client.read().await;
    read.is_complete(1);
    assert_eq!(read.owners(0), [(owner.as_str(), 1), (other.as_str(), 2), (third.as_str(), 3)]);
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_waits_for_a_replica_cannot_be_moved() {
    let mut scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    for name in ["a", "b", "c"] {
        scene.kill(name);
        scene.sandbox.until_status(name, "unreachable").await;
    }
    // A replica that refuses everything: the session goes on waiting.
    let (_full, mut attached) = scene.sandbox.add("d").await;
    let submit = attached.next_submit().await;
    assert_eq!(submit.sessions, client.sessions);
    attached.send(replica_message::Body::Refused(perigee_proto::internal::Refused {
        sessions: submit.sessions,
        reason: perigee_proto::internal::RefusedReason::Full.into(),
        ..Default::default()
    }));
    tokio::time::sleep(TICK / 2).await;
    let status =
        scene.migrate(client.session(), "d", MigrateMode::Split).await.expect("no panic").expect_err("no owner");
    let (code, reason, _) = told(&status);
    assert_eq!((code, reason.as_str()), (Code::FailedPrecondition, "NO_OWNER"), "{status}");
    client.leave();
    scene.sandbox.assert_idle().await;
}
