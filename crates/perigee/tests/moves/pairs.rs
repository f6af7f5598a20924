//! Moves whose states go by pairs of ranks: both ends meet beside the first handoff, which goes in the stream, digests guard what
//! comes, a pair that breaks breaks alone and its state goes in the stream, and whoever dies, the session goes on.

use std::time::Duration;

use perigee_engine::moves::{MoveFacts, Way};
use perigee_engine::request::Request;
use perigee_migration::Mode;
use perigee_testkit::reference::Undisturbed;
use perigee_testkit::world::{Fault, Order, PairTrouble, Pairing, Relay, Stage, Trouble, World, WorldSpec};

use crate::broken::{FREED, request, run_all, sampled, undisturbed, wrong};

/// Replicas of these degrees that use pairs wherever they can, and the account of that. A pair waits for half of the silence: so
/// long that it breaks of nothing but what a test does to it.
fn paired(degrees: &[usize]) -> (WorldSpec, Pairing) {
    let pairing = Pairing::default();
    let silence = Duration::from_secs(60);
    (WorldSpec { ways: vec![Way::Pair], pairing: pairing.clone(), silence, ..WorldSpec::new(degrees) }, pairing)
}

fn order(after: usize, to: usize) -> Order {
    Order { after, to, mode: Mode::Split }
}

/// A session of more tokens than it draws while it moves.
fn session(name: &str) -> Request {
    request(name, 90, 400, sampled())
}

/// Runs a session to its end, with these moves, and by which way each went, or why it was not made.
async fn ways(
    relay: &mut Relay<'_>,
    undisturbed: &mut Undisturbed,
    request: &Request,
    orders: &[Order],
) -> Vec<Result<Way, String>> {
    let course = relay.run(request, 0, orders, Trouble::default()).await.unwrap();
    assert_eq!(wrong(undisturbed, request, &course), None, "{}", request.request_id);
    let way = |result: Result<MoveFacts, String>| result.map(|facts| facts.way);
    course.moves.into_iter().map(|(_, result)| way(result)).collect()
}

/// Has a session go from the first replica to another one, beside which their pair is met.
async fn meet(relay: &mut Relay<'_>, undisturbed: &mut Undisturbed, to: usize) {
    let gone = ways(relay, undisturbed, &session(&format!("meets-{to}")), &[order(5, to)]).await;
    assert_eq!(gone, [Ok(Way::Stream)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_state_goes_in_the_stream_and_later_ones_by_the_pair_that_was_met_meanwhile() {
    let mut undisturbed = undisturbed();
    for (degrees, has_pairs) in [([1, 1], true), ([2, 2], true), ([1, 2], false)] {
        let (spec, pairing) = paired(&degrees);
        let world = World::start(&spec).unwrap();
        let mut relay = Relay::attach(&world);
        let orders = [order(5, 1), order(15, 0), order(25, 1), order(35, 0)];
        let gone = ways(&mut relay, &mut undisturbed, &session("walks"), &orders).await;
        let later = if has_pairs { Way::Pair } else { Way::Stream };
        assert_eq!(gone, [Ok(Way::Stream), Ok(Way::Stream), Ok(later), Ok(later)], "{degrees:?}");
        let counts = pairing.counts();
        // One in each direction.
        let expected = if has_pairs { (2, 2, 2) } else { (0, 0, 0) };
        assert_eq!((counts.met, counts.sent, counts.taken), expected, "{degrees:?}");
        world.all_free(FREED).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pairs_are_used_only_where_both_sides_allow_them() {
    let mut undisturbed = undisturbed();
    let (spec, pairing) = paired(&[1, 1]);
    let world = World::start(&WorldSpec { ways: vec![Way::Slots, Way::Stream, Way::Pair], ..spec }).unwrap();
    let orders = [order(5, 1), order(15, 0), order(25, 1)];
    let gone = ways(&mut Relay::attach(&world), &mut undisturbed, &session("streams"), &orders).await;
    assert_eq!(gone, [Ok(Way::Stream), Ok(Way::Stream), Ok(Way::Stream)], "the stream is preferred");
    assert_eq!(pairing.counts().sent, 0);
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_wrong_by_a_pair_is_refused_and_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    for fault in [Fault::TailDropped, Fault::LayerZero, Fault::HeadsRotated] {
        let (spec, _) = paired(&[2, 2]);
        let spec = WorldSpec { fault: Some((fault, Stage::Writing)), ..spec };
        let (faults, made, refused) = run_all(&spec, &mut undisturbed).await;
        assert_eq!((faults, made), (vec![None, None, None], 0), "{fault:?}");
        assert!(!refused.is_empty() && refused.iter().all(|why| why.contains("digest")), "{fault:?}: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_whose_pair_breaks_goes_in_the_stream() {
    let mut undisturbed = undisturbed();
    for trouble in [PairTrouble::LostAtSource, PairTrouble::LostAtTarget, PairTrouble::Silent] {
        let (mut spec, pairing) = paired(&[2, 2]);
        if trouble == PairTrouble::Silent {
            spec.silence = Duration::from_secs(1);
        }
        let world = World::start(&spec).unwrap();
        let mut relay = Relay::attach(&world);
        let meet = [order(5, 1), order(15, 0)];
        let gone = ways(&mut relay, &mut undisturbed, &session("meets"), &meet).await;
        assert_eq!(gone, [Ok(Way::Stream), Ok(Way::Stream)], "{trouble:?}");
        pairing.trouble(trouble);
        // Neither side waits for the other's pair any more, and the one that broke is left alone for a while.
        let again = [order(5, 1), order(15, 0), order(25, 1)];
        let gone = ways(&mut relay, &mut undisturbed, &session("breaks"), &again).await;
        assert_eq!(gone, [Ok(Way::Stream), Ok(Way::Stream), Ok(Way::Stream)], "{trouble:?}");
        let counts = pairing.counts();
        assert_eq!((counts.met, counts.sent, counts.taken), (2, 2, 0), "{trouble:?}: one in each direction");
        world.all_free(FREED).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_one_side_has_lost_is_made_anew() {
    let mut undisturbed = undisturbed();
    let (spec, pairing) = paired(&[1, 1]);
    let world = World::start(&spec).unwrap();
    let mut relay = Relay::attach(&world);
    meet(&mut relay, &mut undisturbed, 1).await;
    pairing.trouble(PairTrouble::NotTaken);
    let gone = ways(&mut relay, &mut undisturbed, &session("stays"), &[order(5, 1)]).await;
    assert!(matches!(&gone[..], [Err(why)] if why.contains("not to be taken")), "{gone:?}");
    pairing.trouble(PairTrouble::None);
    // The source hears that there is no pair any more, then offers a new one, then uses it.
    for (name, way) in [("hears", Way::Stream), ("offers", Way::Stream), ("goes", Way::Pair)] {
        let gone = ways(&mut relay, &mut undisturbed, &session(name), &[order(5, 1)]).await;
        assert_eq!(gone, [Ok(way)], "{name}");
    }
    assert_eq!(pairing.counts().met, 2);
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_with_a_state_on_its_way_takes_neither_the_session_nor_another_pair_with_it() {
    let mut undisturbed = undisturbed();
    let (spec, pairing) = paired(&[1, 1, 1]);
    let world = World::start(&spec).unwrap();
    let mut relay = Relay::attach(&world);
    for to in [1, 2] {
        meet(&mut relay, &mut undisturbed, to).await;
    }
    pairing.trouble(PairTrouble::Silent);
    let killed = async {
        pairing.sending().await;
        world.kill(1);
        pairing.trouble(PairTrouble::None);
    };
    let dying = session("dying");
    let orders = [order(5, 1)];
    let (gone, ()) = tokio::join!(ways(&mut relay, &mut undisturbed, &dying, &orders), killed);
    assert!(matches!(&gone[..], [Err(_)]), "{gone:?}");
    let gone = ways(&mut relay, &mut undisturbed, &session("goes"), &[order(5, 2)]).await;
    assert_eq!(gone, [Ok(Way::Pair)], "the other pair is whole");
    let counts = pairing.counts();
    assert_eq!((counts.met, counts.sent, counts.taken), (2, 2, 1));
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_dies_with_a_state_on_its_way_leaves_nothing_behind() {
    let mut undisturbed = undisturbed();
    let (spec, pairing) = paired(&[1, 1]);
    let world = World::start(&spec).unwrap();
    let mut relay = Relay::attach(&world);
    meet(&mut relay, &mut undisturbed, 1).await;
    pairing.trouble(PairTrouble::Silent);
    let killed = async {
        pairing.sending().await;
        world.kill(0);
    };
    let orphaned = session("orphaned");
    let orders = [order(5, 1)];
    let run = relay.run(&orphaned, 0, &orders, Trouble::default());
    let (course, ()) = tokio::join!(run, killed);
    // Within one process a replica that ends has time to say so.
    let broken = course.unwrap().broken;
    assert!(matches!(&broken[..], [why] if why.contains("shut down")), "{broken:?}");
    world.all_free(FREED).await.unwrap();
}
