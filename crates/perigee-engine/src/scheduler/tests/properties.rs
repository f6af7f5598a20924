//! Random workloads over random replicas: every plan is checked, every session ends within a bound, nothing leaks.

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::harness::{Arrival, Harness};
use crate::scheduler::{Limits, TaskId};

fn limits() -> impl Strategy<Value = Limits> {
    (1_u32..9, 1_u32..24, 1_u64..200, 1_u64..12, 0_u64..20, 0_u32..4).prop_map(
        |(slots, pages, step_tokens, step_rows, park_pages, bypass_limit)| Limits {
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
    Nothing,
}

fn happenings() -> impl Strategy<Value = Vec<(Happening, bool, bool)>> {
    let one = prop_oneof![
        3 => arrival().prop_map(Happening::Arrive),
        1 => any::<usize>().prop_map(Happening::Cancel),
        4 => Just(Happening::Nothing),
    ];
    prop::collection::vec((one, prop::bool::weighted(0.1), prop::bool::weighted(0.1)), 1..30)
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

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_session_ends_and_every_plan_holds(limits in limits(), happenings in happenings()) {
        let mut harness = Harness::new(limits);
        let mut tokens = 0;
        for (happening, lost_park, lost_unpark) in happenings {
            match happening {
                Happening::Arrive(arrival) => {
                    let fits = limits.check(arrival.sessions, arrival.prompt + arrival.output - 1).is_ok();
                    let ids = harness.arrive(&arrival);
                    prop_assert_eq!(ids.is_some(), fits);
                    tokens += if fits { arrival.sessions * (arrival.prompt + arrival.output) } else { 0 };
                }
                Happening::Cancel(which) => {
                    let known: Vec<TaskId> = harness.work.keys().copied().collect();
                    if !known.is_empty() {
                        harness.cancel(known[which % known.len()]);
                    }
                }
                Happening::Nothing => {}
            }
            harness.step(lost_park, lost_unpark);
        }
        // Each step moves the best task by a token, and only a better one that was admitted can set it back.
        harness.finish(4 * tokens + 10);
    }
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
