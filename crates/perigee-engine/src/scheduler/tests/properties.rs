//! Random workloads over random replicas: every plan is checked, every session ends within a bound, nothing leaks.

use std::cell::RefCell;

use perigee_migration::segments::Mode;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

use super::harness::{Arrival, Harness, Mishaps, Seen};
use super::moving::{Away, Return};
use crate::scheduler::{Limits, Status, TaskId};

fn limits() -> impl Strategy<Value = Limits> {
    (1_u32..9, 1_u32..24, 1_u64..200, 1_u64..12, 0_u64..20, 0_u32..4).prop_map(
        |(slots, pages, step_tokens, step_rows, park_pages, bypass_limit)| Limits {
            beside_tokens: step_tokens / 2 + 1,
            slots,
            pages,
            step_tokens,
            step_rows,
            max_length: 1000,
            park_bytes: park_pages * 10,
            slot_bytes: 5,
            page_bytes: 10,
            bypass_limit,
        },
    )
}

/// Replicas on which several sessions meet and pages are short.
fn tight_limits() -> impl Strategy<Value = Limits> {
    let base = limits().prop_map(|limits| Limits { step_tokens: limits.step_tokens + 8, ..limits });
    (base, 3_u32..12, 3_u32..14, 3_u64..12, 0_u64..60).prop_map(|(base, slots, pages, step_rows, park_pages)| Limits {
        slots,
        pages,
        step_rows,
        park_bytes: park_pages * 10,
        ..base
    })
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let prompt = prop_oneof![1_u64..20, 60_u64..70, 1_u64..250];
    (1_u64..5, -1_i32..2, prompt, 1_u64..40, 0_u8..8).prop_map(|(sessions, priority, prompt, output, kind)| {
        let score = kind == 0 && prompt > 1;
        Arrival {
            sessions: if kind < 5 { 1 } else { sessions },
            priority,
            prompt,
            output,
            prompt_logits: kind == 1 || kind == 7,
            score,
        }
    })
}

/// What happens before a step.
#[derive(Debug, Clone)]
enum Happening {
    Arrive(Arrival),
    Cancel(usize),
    Move(Movement, usize),
    /// So many steps.
    Steps(u8),
    Nothing,
}

/// What happens to the session, home or reservation of a number.
#[derive(Debug, Clone)]
enum Movement {
    Freeze,
    Thaw,
    Leave {
        keep: bool,
    },
    Hold,
    Unhold,
    Rebuild,
    FreeHome,
    /// One that is away, or one that was never here, of this length and output.
    Come(Return, u64, u64),
    /// A reservation that nobody uses yet.
    Reserve {
        shadow: bool,
        pages: usize,
    },
    CancelReserve,
}

fn movement() -> impl Strategy<Value = Movement> {
    let progress = prop_oneof![Just(0_u64), 1_u64..200];
    let mode = prop_oneof![3 => Just(Mode::Split), 1 => Just(Mode::Whole)];
    let how = (progress, mode, any::<bool>(), prop::bool::weighted(0.8))
        .prop_map(|(progress, mode, shadow, thaw)| Return { progress, mode, shadow, thaw });
    prop_oneof![
        6 => Just(Movement::Freeze),
        2 => Just(Movement::Thaw),
        6 => prop::bool::weighted(0.8).prop_map(|keep| Movement::Leave { keep }),
        1 => Just(Movement::Hold),
        1 => Just(Movement::Unhold),
        1 => Just(Movement::Rebuild),
        1 => Just(Movement::FreeHome),
        8 => (how, prop_oneof![2_u64..300, 300_u64..900], 1_u64..90).prop_map(|(how, length, output)| Movement::Come(how, length, output)),
        1 => (any::<bool>(), 0_usize..3).prop_map(|(shadow, pages)| Movement::Reserve { shadow, pages }),
        1 => Just(Movement::CancelReserve),
    ]
}

fn mishaps() -> impl Strategy<Value = Mishaps> {
    let rarely = || prop::bool::weighted(0.1);
    (rarely(), rarely(), prop::bool::weighted(0.2), prop::bool::weighted(0.2))
        .prop_map(|(park, unpark, odd, even)| Mishaps { park, unpark, faults: [even, odd] })
}

fn happenings() -> impl Strategy<Value = Vec<(Happening, Mishaps)>> {
    let one = prop_oneof![
        3 => arrival().prop_map(Happening::Arrive),
        1 => any::<usize>().prop_map(Happening::Cancel),
        4 => Just(Happening::Nothing),
    ];
    prop::collection::vec((one, mishaps()), 1..30)
}

fn happenings_with_moves() -> impl Strategy<Value = Vec<(Happening, Mishaps)>> {
    let one = prop_oneof![
        3 => (arrival(), 1_u64..5).prop_map(|(arrival, times)| {
            Happening::Arrive(Arrival { output: arrival.output * times, ..arrival })
        }),
        1 => any::<usize>().prop_map(Happening::Cancel),
        2 => (1_u8..40).prop_map(Happening::Steps),
        8 => (movement(), any::<usize>()).prop_map(|(movement, which)| Happening::Move(movement, which)),
        3 => Just(Happening::Nothing),
    ];
    prop::collection::vec((one, mishaps()), 20..80)
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 1500,
        max_shrink_iters: 3000,
        rng_seed: RngSeed::Fixed(7),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Lets it happen; returned are the tokens that there are to feed because of it.
fn happen(harness: &mut Harness, happening: Happening) -> u64 {
    match happening {
        Happening::Arrive(arrival) => {
            let fits = harness.scheduler.limits().check(arrival.sessions, arrival.prompt + arrival.output - 1).is_ok();
            let ids = harness.arrive(&arrival);
            assert_eq!(ids.is_some(), fits);
            return if fits { arrival.sessions * (arrival.prompt + arrival.output) } else { 0 };
        }
        Happening::Cancel(which) => {
            if let Some(id) = pick(harness.work.keys().copied(), which) {
                harness.cancel(id);
            }
        }
        Happening::Move(movement, which) => return happen_to_move(harness, movement, which),
        Happening::Steps(count) => (0..count).for_each(|_| drop(harness.step(Mishaps::default()))),
        Happening::Nothing => {}
    }
    0
}

fn happen_to_move(harness: &mut Harness, movement: Movement, which: usize) -> u64 {
    let session = pick(harness.work.keys().copied(), which);
    match (movement, session) {
        (Movement::Freeze, Some(id)) => {
            let parked = harness.work.keys().copied().filter(|id| harness.status(*id) == Status::Parked);
            let id = pick(parked, which).filter(|_| which.is_multiple_of(3)).unwrap_or(id);
            harness.freeze(id);
        }
        (Movement::Thaw, Some(id)) => harness.scheduler.thaw(id),
        (Movement::Leave { keep }, _) => {
            let frozen = harness.work.keys().copied().filter(|id| harness.scheduler.frozen(*id).is_some());
            if let Some(id) = pick(frozen, which) {
                harness.leave(id, keep);
            }
        }
        (Movement::Hold, Some(id)) => harness.scheduler.hold(id),
        (Movement::Unhold, Some(id)) => harness.scheduler.unhold(id),
        (Movement::Rebuild, Some(id)) => harness.rebuild(id),
        (Movement::FreeHome, _) => {
            if let Some(key) = pick(harness.homes.keys().copied(), which) {
                harness.free_home(key);
            }
        }
        (Movement::Come(how, length, output), _) => {
            let away = match pick(0..harness.away.len(), which) {
                Some(index) if !which.is_multiple_of(4) => harness.away.swap_remove(index),
                // Some come in the middle of their prompt.
                _ => Away {
                    computed: if which.is_multiple_of(3) { length / 2 } else { length - 1 },
                    ..Away::foreign(1_000_000 + harness.next_id, length, output)
                },
            };
            let home = away.home;
            let tokens = away.work.length + away.work.output;
            if harness.come(away, how).is_some() {
                return tokens;
            }
            // It runs elsewhere and does not come again.
            if let Some(key) = home.filter(|key| harness.homes.contains_key(key)) {
                harness.free_home(key);
            }
        }
        (Movement::Reserve { shadow, pages }, _) => {
            let id = TaskId(harness.next_id);
            harness.next_id += 1;
            if harness.scheduler.reserve(id, shadow).is_some() {
                harness.reserved.insert(id);
                assert!(harness.scheduler.reserve(id, shadow).is_none(), "it is reserved already");
                let reserved = harness.scheduler.reserve_pages(id, pages);
                assert!(reserved.is_none_or(|reserved| reserved.len() == pages));
            }
        }
        (Movement::CancelReserve, _) => {
            if let Some(id) = pick(harness.reserved.iter().copied(), which) {
                harness.cancel_reserve(id);
            }
        }
        (_, None) => {}
    }
    harness.check();
    0
}

fn pick<T>(from: impl Iterator<Item = T>, which: usize) -> Option<T> {
    let mut all: Vec<T> = from.collect();
    (!all.is_empty()).then(|| all.swap_remove(which % all.len()))
}

fn walk(limits: Limits, happenings: Vec<(Happening, Mishaps)>) -> Harness {
    let mut harness = Harness::new(limits);
    let mut tokens = 0;
    for (happening, mishaps) in happenings {
        tokens += happen(&mut harness, happening);
        harness.step(mishaps);
    }
    harness.settle();
    // Each step moves the best task by a token, and only a better one that was admitted can set it back.
    harness.finish(4 * tokens + 10);
    harness
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_session_ends_and_every_plan_holds(limits in limits(), happenings in happenings()) {
        walk(limits, happenings);
    }
}

#[test]
fn sessions_that_come_and_go_leave_nothing_behind() {
    let seen = RefCell::new(Vec::new());
    let walked = TestRunner::new(config()).run(&(tight_limits(), happenings_with_moves()), |(limits, happenings)| {
        seen.borrow_mut().push(walk(limits, happenings).seen);
        Ok(())
    });
    walked.unwrap();
    // The walks went where they should.
    let often = |count: fn(&Seen) -> u64| seen.borrow().iter().map(count).sum::<u64>() >= 5;
    assert!(often(|seen| seen.remote_rows) && often(|seen| seen.faults) && often(|seen| seen.remote_parks));
    assert!(often(|seen| seen.evicted) && often(|seen| seen.waits));
    assert!(often(|seen| seen.splits) && often(|seen| seen.left_parked));
    assert!(often(|seen| seen.homes) && often(|seen| seen.returns));
}

#[test]
fn scarce_pages_cause_preemptions() {
    let limits = Limits {
        slots: 8,
        pages: 9,
        step_tokens: 64,
        step_rows: 8,
        max_length: 1000,
        park_bytes: 40,
        slot_bytes: 5,
        page_bytes: 10,
        beside_tokens: u64::MAX,
        bypass_limit: 4,
    };
    let mut harness = Harness::new(limits);
    for _ in 0..8 {
        harness.arrive(&Arrival::plain(40, 300)).unwrap();
    }
    harness.finish(8 * 340);
    assert!(harness.preemptions > 0, "sessions are parked");
    assert_eq!(harness.finished.len(), 8);
}
