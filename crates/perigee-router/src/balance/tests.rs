//! The policy over clusters on paper: it evens them out, begins and stops as it should, keeps its budget, and never makes
//! things worse, whatever the loads are.

use std::sync::Arc;

use perigee_migration::Mode;
use proptest::prelude::*;

use super::policy::Policy;
use super::steps::StepTimes;
use super::view::{Move, MoveCosts, ReplicaView, SessionView, View, Way, pages};

/// The 48B model, bf16.
const COSTS: MoveCosts = MoveCosts { state_bytes: 43_417_600, token_bytes: 8064, ask_bytes: 717_696, ask_rounds: 7 };

/// A network of 10 GB/s.
const WAY: Way = Way { round_trip_ms: Some(0.1), bytes_per_ms: Some(10e6) };

/// A replica with nobody on it.
fn idle(name: &str) -> ReplicaView {
    ReplicaView {
        name: Arc::from(name),
        steps: StepTimes { base_ms: 5.0, row_ms: 0.5, token_ms: 0.0005 },
        running: 0,
        context: 0,
        waiting: 0,
        backlog_ms: 0.0,
        slots_free: 64,
        slots_total: 64,
        pages_free: 4096,
        pages_total: 4096,
        own: 0,
        moving: 0,
        costs: Some(COSTS),
    }
}

/// A cluster whose replicas run sessions of these contexts, all of one router.
fn cluster(contexts: &[Vec<u64>], further: u64) -> View {
    let names = ["a", "b", "c", "d", "e", "f"];
    let mut view =
        View { replicas: contexts.iter().zip(names).map(|(_, name)| idle(name)).collect(), ..View::default() };
    for (at, own) in contexts.iter().enumerate() {
        for &context in own {
            let session = SessionView { at, context, further };
            view.sessions.push(session);
            view.replicas[at] =
                ReplicaView { own: view.replicas[at].own + 1, ..view.replicas[at].with(&session, Mode::Whole) };
        }
    }
    view.ways = vec![vec![WAY; contexts.len()]; contexts.len()];
    view
}

/// Carries moves out at once.
fn apply(view: &mut View, moves: &[Move]) {
    for found in moves {
        let session = view.sessions[found.session];
        let (source, target) = (&view.replicas[found.from], &view.replicas[found.to]);
        let source = ReplicaView { own: source.own - 1, ..source.without(&session, found.mode) };
        let target = ReplicaView { own: target.own + 1, ..target.with(&session, found.mode) };
        (view.replicas[found.from], view.replicas[found.to]) = (source, target);
        view.sessions[found.session].at = found.to;
    }
}

/// Looks until nothing moves in three looks in a row, and counts the moves of each session.
fn settle(view: &mut View) -> Vec<u32> {
    let mut policy = Policy::default();
    let mut counts = vec![0; view.sessions.len()];
    let mut still = 0;
    for _ in 0..10_000 {
        let moves = policy.look(view);
        apply(view, &moves);
        moves.iter().for_each(|found| counts[found.session] += 1);
        still = if moves.is_empty() { still + 1 } else { 0 };
        if still == 3 {
            return counts;
        }
    }
    panic!("it never stops");
}

/// How far the slowest replica is above the mean.
fn unevenness(view: &View, value: fn(&ReplicaView) -> f64) -> f64 {
    let values: Vec<f64> = view.replicas.iter().map(value).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    values.into_iter().fold(0.0, f64::max) / mean.max(f64::MIN_POSITIVE) - 1.0
}

/// As the engine reserves them for an arrival.
#[test]
fn a_session_that_leaves_its_latents_behind_takes_two_slots() {
    let session = SessionView { at: 0, context: 6400, further: 100 };
    let left = |replica: &ReplicaView| (replica.slots_free, replica.pages_free, replica.running);
    assert_eq!(left(&idle("b").with(&session, Mode::Split)), (62, 4096, 1));
    assert_eq!(left(&idle("b").with(&session, Mode::Whole)), (63, 3996, 1));
    let full = ReplicaView { slots_free: 1, ..idle("b") };
    assert_eq!(full.with(&session, Mode::Split).slots_free, 0);
}

#[test]
fn an_uneven_cluster_becomes_even_and_each_session_moves_once() {
    let mut view = cluster(&[vec![1000; 30], vec![1000; 10], vec![1000; 2], vec![]], 2000);
    let before = unevenness(&view, ReplicaView::step_ms);
    let counts = settle(&mut view);
    let after = unevenness(&view, ReplicaView::step_ms);
    assert!(before > 0.7 && after < 0.12, "{before} {after}");
    assert!(unevenness(&view, ReplicaView::pages_used) < 0.25);
    assert!(counts.iter().all(|count| *count <= 1), "{counts:?}");
}

#[test]
fn long_contexts_move_where_they_make_the_difference() {
    let mut view = cluster(&[vec![20_000; 8], vec![500; 8], vec![500; 8]], 4000);
    settle(&mut view);
    assert!(unevenness(&view, ReplicaView::step_ms) < 0.2, "{:?}", view.replicas);
    assert!(unevenness(&view, ReplicaView::pages_used) < 0.6, "{:?}", view.replicas);
}

#[test]
fn what_is_nearly_even_is_left_alone_and_noise_does_not_start_it() {
    let mut policy = Policy::default();
    assert_eq!(policy.look(&cluster(&[vec![1000; 12], vec![1000; 10], vec![1000; 10]], 2000)), []);
    assert_eq!(policy.look(&View::default()), []);
    assert_eq!(policy.look(&cluster(&[vec![1000; 40]], 2000)), [], "there is nowhere to go");
    let uneven = cluster(&[vec![1000; 30], vec![1000; 4]], 2000);
    let even = cluster(&[vec![1000; 17], vec![1000; 17]], 2000);
    for _ in 0..5 {
        assert_eq!(policy.look(&uneven), [], "once may be noise");
        assert_eq!(policy.look(&even), []);
    }
    assert_eq!(policy.look(&uneven), []);
    let found = policy.look(&uneven);
    assert_eq!((found.len(), found[0].from, found[0].to), (1, 0, 1));
    assert_eq!(found[0].why.uneven, "step time");
    // Between the two thresholds it goes on once it has begun, and does not begin.
    let between = cluster(&[vec![1000; 22], vec![1000; 12]], 2000);
    assert!((0.10..0.25).contains(&unevenness(&between, ReplicaView::step_ms)));
    assert_eq!(policy.look(&between).len(), 1);
    let mut fresh = Policy::default();
    assert_eq!((fresh.look(&between), fresh.look(&between)), (vec![], vec![]));
}

/// Looks twice, since once may be noise.
fn look(view: &View) -> Vec<Move> {
    let mut policy = Policy::default();
    policy.look(view);
    policy.look(view)
}

#[test]
fn a_move_must_be_worth_its_cost() {
    let contexts = [vec![1000; 30], vec![1000; 4]];
    assert_eq!(look(&cluster(&contexts, 2000)).len(), 1);
    assert_eq!(look(&cluster(&contexts, 1)), [], "sessions that are about to end stay");
    let mut far = cluster(&contexts, 2000);
    far.ways = vec![vec![Way { round_trip_ms: Some(100.0), bytes_per_ms: Some(1000.0) }; 2]; 2];
    assert_eq!(look(&far), [], "43 seconds over a slow way");
    let mut still = cluster(&contexts, 2000);
    still.replicas[0].costs = None;
    assert_eq!(look(&still), [], "none leaves a replica that hands none over");
}

#[test]
fn queues_and_pages_make_room_even_where_no_time_is_gained() {
    let mut view = cluster(&[vec![1000; 10], vec![1000; 10]], 2000);
    (view.replicas[0].slots_free, view.replicas[0].slots_total, view.replicas[0].waiting) = (0, 10, 6);
    let found = look(&view);
    assert_eq!((found.len(), found[0].from, found[0].why.uneven), (1, 0, "slots"));
    let mut view = cluster(&[vec![1000; 10], vec![1000; 10]], 2000);
    view.replicas[0].pages_free = 100;
    let found = look(&view);
    assert_eq!((found.len(), found[0].from, found[0].mode, found[0].why.uneven), (1, 0, Mode::Whole, "pages"));
}

#[test]
fn the_budget_holds_with_moves_under_way() {
    let contexts = [vec![1000; 40], vec![1000; 38], vec![1000; 36], vec![], vec![], vec![]];
    let mut view = cluster(&contexts, 2000);
    let found = look(&view);
    assert_eq!(found.len(), 3, "one from and to each at once");
    view.under_way = 3;
    assert_eq!(look(&view).len(), 1);
    view.under_way = 4;
    assert_eq!(look(&view).len(), 0);
    view.under_way = 1;
    (view.replicas[0].moving, view.replicas[3].moving) = (1, 1);
    assert!(look(&view).iter().all(|found| ![found.from, found.to].iter().any(|side| [0, 3].contains(side))));
}

#[test]
fn routers_share_a_replica_by_their_sessions() {
    let mut view = cluster(&[vec![1000; 30], vec![1000; 4]], 2000);
    // A fifth of them are this router's.
    view.sessions.retain(|session| session.at == 1);
    view.sessions.extend([SessionView { at: 0, context: 1000, further: 2000 }; 6]);
    view.replicas[0].own = 6;
    let hundred = (0..100).filter(|chance| {
        view.chance = f64::from(*chance) / 100.0;
        !look(&view).is_empty()
    });
    assert!((18..=22).contains(&hundred.count()));
}

fn any_replica() -> impl Strategy<Value = ReplicaView> {
    ((0.1..50.0, 0.0..2.0, 0.0..0.01), (0u64..40, 0u64..200_000, 0u64..5, 0.0..500.0), (0u64..64, 0u64..5000, 0u64..3))
        .prop_map(
            |(
                (base_ms, row_ms, token_ms),
                (running, context, waiting, backlog_ms),
                (slots_free, pages_free, moving),
            )| {
                let steps = StepTimes { base_ms, row_ms, token_ms };
                let (slots_total, pages_total, own) = (slots_free + running, pages_free + pages(context) + 10, running);
                let load = idle("x");
                ReplicaView {
                    steps,
                    running,
                    context,
                    waiting,
                    backlog_ms,
                    slots_free,
                    slots_total,
                    pages_free,
                    pages_total,
                    own,
                    moving,
                    ..load
                }
            },
        )
}

fn any_view() -> impl Strategy<Value = View> {
    let way = (prop::option::of(0.001..50.0), prop::option::of(1e3..1e8))
        .prop_map(|(round_trip_ms, bytes_per_ms)| Way { round_trip_ms, bytes_per_ms });
    let sessions = prop::collection::vec((0usize..5, 1u64..30_000, 0u64..5000), 0..40);
    let replicas = prop::collection::vec(any_replica(), 0..5);
    (replicas, sessions, prop::collection::vec(way, 25), 0usize..5, 0.0..1.0).prop_map(
        |(replicas, sessions, ways, under_way, chance)| {
            let here = sessions.into_iter().filter(|(at, _, _)| *at < replicas.len());
            let sessions = here.map(|(at, context, further)| SessionView { at, context, further }).collect();
            View { replicas, sessions, ways: ways.chunks(5).map(<[Way]>::to_vec).collect(), under_way, chance }
        },
    )
}

proptest! {
    #[test]
    fn every_move_is_allowed_and_makes_the_worst_no_worse(view in any_view()) {
        let found = look(&view);
        prop_assert_eq!(&found, &look(&view), "the same view gives the same moves");
        prop_assert!(found.is_empty() || view.under_way + found.len() <= 4);
        let mut sides = std::collections::BTreeSet::new();
        for one in &found {
            let (session, target) = (view.sessions[one.session], &view.replicas[one.to]);
            prop_assert!(one.from == session.at && one.from != one.to);
            prop_assert!(sides.insert(one.from) && sides.insert(one.to), "one move from or to each");
            prop_assert!(view.replicas[one.from].moving == 0 && target.moving == 0);
            prop_assert!(target.waiting == 0 && target.slots_free >= 3);
            let brought = if one.mode == Mode::Whole { pages(session.context) } else { 0 };
            prop_assert!(target.pages_free >= brought);
            let why = one.why;
            prop_assert!(why.from_ms.1 <= why.from_ms.0 && why.to_ms.0 <= why.to_ms.1 && why.stall_ms.is_finite());
        }
    }

    #[test]
    fn it_comes_to_rest_even_if_sessions_may_move_again_at_once(
        contexts in prop::collection::vec(prop::collection::vec(1u64..8000, 0..12), 2..6),
        further in 0u64..5000,
    ) {
        let mut view = cluster(&contexts, further);
        let before = unevenness(&view, ReplicaView::step_ms);
        let counts = settle(&mut view);
        let after = unevenness(&view, ReplicaView::step_ms);
        prop_assert!(after <= before.max(0.25) + 1e-9, "{before} became {after}");
        // Of a few large sessions one may go on to a third replica once others have moved.
        prop_assert!(counts.iter().all(|count| *count <= 3), "{counts:?}");
    }
}
