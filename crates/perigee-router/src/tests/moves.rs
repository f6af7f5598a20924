//! Sessions that move between replicas while their clients read: every message lost or doubled once, either side dying in
//! each phase, clients and operators that go away. Whatever happens, indices have no gap and no repeat, and in the end
//! nothing is held anywhere.

use std::time::Duration;

use perigee_proto::v1::{self, FinishReason, MigrateMode};
use tonic::Code;

use super::actor::{Fate, Said, TICK};
use super::scene::{Scene, TOKENS, told};
use crate::RouterConfig;

/// A session that has five tokens, its owner, and another replica.
async fn under_way(scene: &Scene) -> (super::scene::Client, String, String) {
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");
    let other = scene.other(&[owner.as_str()]);
    (client, owner, other)
}

#[tokio::test(start_paused = true)]
async fn a_session_goes_round_and_its_account_is_told() {
    let scene = Scene::start(RouterConfig::default()).await;
    let (mut client, first, second) = under_way(&scene).await;
    let third = scene.other(&[first.as_str(), second.as_str()]);
    let session = client.session().to_owned();

    let split = scene.migrate(&session, &second, MigrateMode::Split).await.expect("no panic").expect("moved");
    assert_eq!((split.mode(), split.epoch, split.state_bytes, split.page_bytes), (MigrateMode::Split, 2, 1000, 0));
    let phases = split.phases.expect("told");
    assert_eq!((phases.frozen_ms, phases.export_ms), (5.0, 1.0));
    // From the source's last token to the target's first: a tick for the freeze, and one for the token.
    let ticks = TICK.as_secs_f64() * 1e3;
    assert!((1.0..2.5 * ticks).contains(&split.stall_ms), "{split:?}");
    assert!((0.0..=2.0 * ticks).contains(&phases.prepare_ms) && phases.start_ms < ticks, "{phases:?}");

    client.reaches(20).await;
    let whole = scene.migrate(&session, &third, MigrateMode::Whole).await.expect("no panic").expect("moved");
    assert_eq!((whole.mode(), whole.epoch), (MigrateMode::Whole, 3));
    assert!(whole.page_bytes > 0 && whole.token_bytes > split.token_bytes, "{whole:?}");
    client.reaches(30).await;
    let back = scene.migrate(&session, &first, MigrateMode::Unspecified).await.expect("no panic").expect("moved");
    assert_eq!((back.mode(), back.epoch), (MigrateMode::Whole, 4), "a short context moves whole");

    let read = client.read().await;
    read.is_complete(1);
    assert_eq!(read.owners(0), [(first.as_str(), 1), (second.as_str(), 2), (third.as_str(), 3), (first.as_str(), 4)]);
    assert_eq!((scene.count("split", "done"), scene.count("whole", "done")), (1, 2));
    assert_eq!(scene.sandbox.router.inference.metrics.migration_stall.get_sample_count(), 3);
    let bytes = |kind| scene.sandbox.router.inference.metrics.migration_bytes.with_label_values(&[kind]).get();
    assert_eq!(bytes("state"), 3000);
    assert_eq!(bytes("page"), whole.page_bytes + back.page_bytes);
    // Former owners were told that it is over: no home entry waits for its grace time.
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn every_message_may_be_lost_or_doubled() {
    use Fate::{Doubled, Lost};
    let on_source = [Said::Prepare, Said::Ready, Said::Release, Said::Released];
    let on_target = [Said::Handoff, Said::Start, Said::Started];
    let cases = on_source.map(|said| (said, true)).into_iter().chain(on_target.map(|said| (said, false)));
    for (said, at_source) in cases {
        for fate in [Lost, Doubled] {
            let scene = Scene::start(RouterConfig::default()).await;
            let (client, owner, other) = under_way(&scene).await;
            let where_it_is = if at_source { &owner } else { &other };
            scene.actor(where_it_is).fate(said, fate);
            let moved = scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic");
            assert!(!scene.actor(where_it_is).is_fated(), "{said:?} was said");
            let read = client.read().await;
            read.is_complete(1);
            // Without the order, the handoff or the word that it is there, the session stays, in a later epoch.
            let stays = fate == Lost && [Said::Prepare, Said::Handoff, Said::Ready].contains(&said);
            if stays {
                let (code, reason, facts) = told(&moved.expect_err("it stays"));
                assert_eq!((code, reason.as_str()), (Code::Aborted, "MOVE_FAILED"), "{said:?}");
                assert_eq!((facts["owner"].as_str(), facts["cause"].as_str()), (owner.as_str(), "TIMEOUT"), "{said:?}");
                assert_eq!(facts["epoch"], "3", "{said:?}");
                assert_eq!(read.owners(0), [(owner.as_str(), 1), (owner.as_str(), 3)], "{said:?}");
                assert_eq!(scene.count("split", "aborted"), 1);
            } else {
                assert_eq!(moved.expect("it moves").epoch, 2, "{said:?} {fate:?}");
                assert_eq!(read.owners(0), [(owner.as_str(), 1), (other.as_str(), 2)], "{said:?} {fate:?}");
                assert_eq!(scene.count("split", "done"), 1);
            }
            scene.all_is_free(false).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_move_may_be_lost_or_doubled_too() {
    use Fate::{Doubled, Lost};
    // The target refuses the handoff, so that the router takes the move back.
    for said in [Said::Failed, Said::AbortMove, Said::Aborted] {
        for (fate, at_source) in [(Lost, true), (Doubled, true), (Lost, false), (Doubled, false)] {
            // Only the source says that the handoff failed, and the target, which has nothing, has nothing to take back.
            if !at_source && said != Said::AbortMove {
                continue;
            }
            let scene = Scene::start(RouterConfig::default()).await;
            let (client, owner, other) = under_way(&scene).await;
            scene.actor(&other).fate(Said::Handoff, Fate::Refused);
            scene.actor(if at_source { &owner } else { &other }).fate(said, fate);
            let moved = scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic");
            assert!(!scene.actor(if at_source { &owner } else { &other }).is_fated(), "{said:?} was said");
            let (code, _, facts) = told(&moved.expect_err("it stays"));
            let cause = if said == Said::Failed && fate == Lost { "TIMEOUT" } else { "HANDOFF_FAILED" };
            assert_eq!((code, facts["cause"].as_str(), facts["epoch"].as_str()), (Code::Aborted, cause, "3"));
            let read = client.read().await;
            read.is_complete(1);
            assert_eq!(read.owners(0), [(owner.as_str(), 1), (owner.as_str(), 3)], "{said:?} {fate:?}");
            scene.all_is_free(false).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_abort_leaves_homes_to_their_grace_time() {
    let scene = Scene::start(RouterConfig::default()).await;
    let (client, owner, other) = under_way(&scene).await;
    scene.actor(&owner).fate(Said::Abort, Fate::Lost);
    scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic").expect("moved");
    client.read().await.is_complete(1);
    assert!(!scene.actor(&owner).is_fated());
    scene.all_is_free(false).await;
}

#[tokio::test(start_paused = true)]
async fn a_ready_that_comes_too_late_is_ignored_and_the_next_move_works() {
    let scene = Scene::start(RouterConfig::default()).await;
    let (mut client, owner, other) = under_way(&scene).await;
    // Longer than the router waits: the source parks, the router takes the move back, the source goes on.
    scene.actor(&other).shared.lock().verify_after = Duration::from_secs(11);
    let late = scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic");
    let (_, _, facts) = told(&late.expect_err("too late"));
    assert_eq!((facts["cause"].as_str(), facts["owner"].as_str()), ("TIMEOUT", owner.as_str()));
    scene.actor(&other).shared.lock().verify_after = Duration::ZERO;
    client.reaches(20).await;
    let moved = scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic").expect("moved");
    assert_eq!(moved.epoch, 4);
    let read = client.read().await;
    read.is_complete(1);
    assert_eq!(read.owners(0), [(owner.as_str(), 1), (owner.as_str(), 3), (other.as_str(), 4)]);
    scene.all_is_free(false).await;
}

#[tokio::test(start_paused = true)]
async fn the_target_dies_before_the_commit() {
    let mut scene = Scene::start(RouterConfig::default()).await;
    let (client, owner, other) = under_way(&scene).await;
    scene.actor(&other).shared.lock().verify_after = Duration::from_secs(5);
    let moving = scene.migrate(client.session(), &other, MigrateMode::Split);
    tokio::time::sleep(TICK * 3).await;
    scene.kill(&other);
    let (code, _, facts) = told(&moving.await.expect("no panic").expect_err("its target died"));
    assert_eq!(
        (code, facts["cause"].as_str(), facts["owner"].as_str()),
        (Code::Aborted, "TARGET_LOST", owner.as_str())
    );
    let read = client.read().await;
    read.is_complete(1);
    assert_eq!(read.owners(0), [(owner.as_str(), 1), (owner.as_str(), 3)]);
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn the_target_dies_after_the_commit() {
    // Before it hears of it, and after it has said that it runs.
    for said in [Said::Start, Said::Started] {
        let scene = Scene::start(RouterConfig::default()).await;
        let (client, owner, other) = under_way(&scene).await;
        scene.actor(&other).fate(said, Fate::Last);
        let moved = scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic");
        let read = client.read().await;
        read.is_complete(1);
        let owners = read.owners(0);
        assert_eq!((owners[0], owners.len()), ((owner.as_str(), 1), 2), "{owners:?}");
        assert!(owners[1].0 != other && owners[1].1 > 2, "it was replayed elsewhere: {owners:?}");
        if said == Said::Start {
            let (code, _, facts) = told(&moved.expect_err("its target died"));
            assert_eq!((code, facts["cause"].as_str()), (Code::Aborted, "TARGET_LOST"));
            assert_eq!((facts["owner"].as_str(), facts["epoch"].as_str()), (owners[1].0, "3"), "its new owner is told");
            assert_eq!(scene.count("split", "failed"), 1);
        }
        assert_eq!(scene.count("replay", "done"), 1);
        scene.all_is_free(true).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_source_dies_before_ready() {
    let mut scene = Scene::start(RouterConfig::default()).await;
    let (client, owner, other) = under_way(&scene).await;
    scene.actor(&other).shared.lock().verify_after = Duration::from_secs(1);
    let moving = scene.migrate(client.session(), &other, MigrateMode::Split);
    tokio::time::sleep(TICK * 3).await;
    scene.kill(&owner);
    let (code, _, facts) = told(&moving.await.expect("no panic").expect_err("its source died"));
    // 2 was barred at the target by 3.
    assert_eq!((code, facts["cause"].as_str(), facts["epoch"].as_str()), (Code::Aborted, "SOURCE_LOST", "4"));
    let read = client.read().await;
    read.is_complete(1);
    let owners = read.owners(0);
    assert_eq!((owners[0], owners[1].1, owners.len()), ((owner.as_str(), 1), 4, 2), "{owners:?}");
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn the_source_dies_after_ready() {
    // With its word that the target is ready, and before it hears that it is released.
    for said in [Said::Ready, Said::Release] {
        let scene = Scene::start(RouterConfig::default()).await;
        let (client, owner, other) = under_way(&scene).await;
        scene.actor(&owner).fate(said, Fate::Last);
        let moved = scene.migrate(client.session(), &other, MigrateMode::Split).await.expect("no panic");
        assert_eq!(moved.expect("it moves all the same").epoch, 2, "{said:?}");
        let read = client.read().await;
        read.is_complete(1);
        assert_eq!(read.owners(0), [(owner.as_str(), 1), (other.as_str(), 2)], "{said:?}");
        assert_eq!(scene.count("replay", "done"), 0);
        scene.all_is_free(true).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_ends_the_move_too() {
    let scene = Scene::start(RouterConfig::default()).await;
    let (client, _, other) = under_way(&scene).await;
    scene.actor(&other).shared.lock().verify_after = Duration::from_secs(1);
    let moving = scene.migrate(client.session(), &other, MigrateMode::Split);
    tokio::time::sleep(TICK * 3).await;
    client.leave();
    let (code, _, facts) = told(&moving.await.expect("no panic").expect_err("nobody reads it"));
    assert_eq!((code, facts["cause"].as_str()), (Code::Aborted, "ENDED"));
    scene.all_is_free(true).await;
    assert!(scene.actor(&other).shared.lock().heard.contains(&Said::AbortMove));
}

#[tokio::test(start_paused = true)]
async fn an_abort_in_the_middle_of_a_move_ends_the_session() {
    let scene = Scene::start(RouterConfig::default()).await;
    let (client, _, other) = under_way(&scene).await;
    scene.actor(&other).shared.lock().verify_after = Duration::from_secs(1);
    let moving = scene.migrate(client.session(), &other, MigrateMode::Split);
    tokio::time::sleep(TICK * 3).await;
    let abort = v1::AbortRequest { session_id: Some(client.session().to_owned()), request_id: None };
    scene.sandbox.inference.clone().abort(abort).await.expect("it runs");
    moving.await.expect("no panic").expect_err("it ended");
    let read = client.read().await;
    assert!(read.status.is_none(), "{:?}", read.status);
    assert_eq!(read.ends[&0], FinishReason::Aborted);
    assert!(read.tokens[&0].len() < TOKENS as usize);
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn an_operator_who_goes_away_takes_the_move_back() {
    let scene = Scene::start(RouterConfig::default()).await;
    let (client, owner, other) = under_way(&scene).await;
    scene.actor(&other).shared.lock().verify_after = Duration::from_secs(1);
    let moving = scene.migrate(client.session(), &other, MigrateMode::Split);
    tokio::time::sleep(TICK * 3).await;
    moving.abort();
    let read = client.read().await;
    read.is_complete(1);
    assert_eq!(read.owners(0), [(owner.as_str(), 1), (owner.as_str(), 3)]);
    assert_eq!(scene.count("split", "aborted"), 1);
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn one_of_three_choices_moves() {
    let scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(3).await;
    client.reaches(15).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");
    let other = scene.other(&[owner.as_str()]);
    let moved = client.sessions[1].clone();
    scene.migrate(&moved, &other, MigrateMode::Split).await.expect("no panic").expect("moved");
    assert_eq!(scene.owner(&moved).as_deref(), Some(other.as_str()));
    let read = client.read().await;
    read.is_complete(3);
    assert_eq!(read.owners(1), [(owner.as_str(), 1), (other.as_str(), 2)]);
    for choice in [0, 2] {
        assert_eq!(read.owners(choice), [(owner.as_str(), 1)]);
    }
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_ends_on_the_way_has_all_its_tokens() {
    let scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(TOKENS as usize - 1).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");
    // The order comes with the last token.
    let moved = scene.migrate(client.session(), &scene.other(&[owner.as_str()]), MigrateMode::Split).await;
    let (code, _, facts) = told(&moved.expect("no panic").expect_err("it ended"));
    assert_eq!((code, facts["cause"].as_str()), (Code::Aborted, "ENDED"));
    client.read().await.is_complete(1);
    scene.all_is_free(true).await;
}
