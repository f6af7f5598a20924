//! Moves between replicas that reach each other's state slots: the state is taken where it lies, digests guard it as they
//! guard what is sent, slots do not stay open, and where the ranks do not match the state is sent.

use perigee_migration::epochs::Side;
use perigee_testkit::world::{Course, Fault, Moment, Neighbours, Relay, Stage, Tamper, Trouble, World, WorldSpec};

use crate::broken::{FREED, request, run_all, sampled, there_and_back, undisturbed, wrong};

/// Replicas of these degrees whose slots are within reach, and the account of that.
fn near(degrees: &[usize]) -> (WorldSpec, Neighbours) {
    let neighbours = Neighbours::default();
    (WorldSpec { neighbours: Some(neighbours.clone()), ..WorldSpec::new(degrees) }, neighbours)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_within_reach_is_taken_where_it_lies() {
    let mut undisturbed = undisturbed();
    for (degrees, is_taken) in [([1, 1], true), ([2, 2], true), ([1, 2], false)] {
        let (spec, neighbours) = near(&degrees);
        let (faults, made, refused) = run_all(&spec, &mut undisturbed).await;
        assert_eq!(faults, vec![None, None, None], "{degrees:?}");
        assert!(made >= 6, "{degrees:?}: only {made} of 9 moves were made: {refused:?}");
        let (open, taken) = neighbours.counts();
        assert_eq!(open, 0, "{degrees:?}: slots stay open");
        assert_eq!(taken >= made, is_taken, "{degrees:?}: {taken} states of {made} moves were taken");
        assert!(is_taken || taken == 0, "{degrees:?}: {taken} states were taken");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_target_takes_wrong_is_refused_and_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    for fault in [Fault::TailDropped, Fault::LayerZero, Fault::HeadsRotated] {
        let (spec, neighbours) = near(&[2, 2]);
        let spec = WorldSpec { fault: Some((fault, Stage::Writing)), ..spec };
        let (faults, made, refused) = run_all(&spec, &mut undisturbed).await;
        assert_eq!((faults, made), (vec![None, None, None], 0), "{fault:?}");
        assert!(!refused.is_empty() && refused.iter().all(|why| why.contains("digest")), "{fault:?}: {refused:?}");
        assert_eq!(neighbours.counts().0, 0, "{fault:?}: slots stay open");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_breaks_closes_the_slots() {
    let mut undisturbed = undisturbed();
    let request = request("breaks", 90, 120, sampled());
    // Before the target has room, behind its tokens, and within what says where the state is.
    for bytes in [10, 200, 700, 1500] {
        let (spec, neighbours) = near(&[1, 1]);
        let world = World::start(&spec).unwrap();
        let mut relay = Relay::attach(&world);
        world.carriage().tamper(Tamper::Break { bytes });
        let course: Course = relay.run(&request, 0, &there_and_back(), Trouble::default()).await.unwrap();
        assert_eq!(wrong(&mut undisturbed, &request, &course), None, "after {bytes} bytes");
        world.all_free(FREED).await.unwrap();
        assert_eq!(neighbours.counts().0, 0, "after {bytes} bytes slots stay open");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_dies_before_its_target_has_the_state_is_no_source() {
    let mut undisturbed = undisturbed();
    let request = request("dies", 90, 120, sampled());
    let (spec, neighbours) = near(&[1, 1]);
    let world = World::start(&spec).unwrap();
    let mut relay = Relay::attach(&world);
    let trouble = Trouble { dies: Some((Moment::Preparing, Side::Source)), ..Trouble::default() };
    let course = relay.run(&request, 0, &there_and_back()[..1], trouble).await.unwrap();
    assert_eq!(wrong(&mut undisturbed, &request, &course), None);
    world.all_free(FREED).await.unwrap();
    assert_eq!(neighbours.counts().0, 0, "slots stay open");
}
