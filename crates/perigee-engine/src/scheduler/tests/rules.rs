//! One test for each rule of the README, on cases small enough to follow by hand.

use std::time::{Duration, Instant};

use super::harness::{Arrival, Harness, Mishaps};
use crate::scheduler::{Fork, Limits, NeverFits, NewTask, Plan, Status, TaskId};

pub(super) fn limits() -> Limits {
    Limits {
        slots: 8,
        pages: 100,
        step_tokens: 128,
        step_rows: 8,
        max_length: 4000,
        park_bytes: 1_000_000,
        slot_bytes: 100,
        page_bytes: 10,
        beside_tokens: u64::MAX,
        bypass_limit: 2,
    }
}

pub(super) fn tokens_of(plan: &Plan, id: TaskId) -> u64 {
    plan.rows.iter().filter(|row| row.task == id).map(|row| row.tokens).sum()
}

/// Steps until a plan is as wanted.
pub(super) fn step_until(harness: &mut Harness, wanted: impl Fn(&Harness, &Plan) -> bool) -> Plan {
    for _ in 0..500 {
        let plan = harness.step(Mishaps::default());
        if wanted(harness, &plan) {
            return plan;
        }
    }
    panic!("not in 500 steps")
}

pub(super) fn arrive(harness: &mut Harness, arrival: &Arrival) -> TaskId {
    harness.arrive(arrival).unwrap()[0]
}

#[test]
fn slots_beyond_two_for_each_session_that_may_run_are_idle() {
    assert_eq!(Limits { slots: 17, ..limits() }.idle_slots(), 1, "eight rows");
    assert_eq!(Limits { slots: 16, ..limits() }.idle_slots(), 0);
    assert_eq!(Limits { slots: 64, step_rows: 64, step_tokens: 16, ..limits() }.idle_slots(), 40, "12 of 16 tokens");
}

#[test]
fn what_never_fits_is_refused() {
    let limits = limits();
    assert_eq!(limits.check(9, 10), Err(NeverFits::Sessions { wanted: 9, limit: 8 }));
    assert_eq!(limits.check(1, 4001), Err(NeverFits::Length { wanted: 4001, limit: 4000 }));
    let small = Limits { pages: 2, ..limits };
    assert_eq!(small.check(1, 129), Err(NeverFits::Pages { wanted: 129, limit: 128 }));
    assert_eq!(small.check(8, 128), Ok(()));
}

#[test]
fn decodes_go_on_while_a_long_prompt_is_prefilled() {
    let mut harness = Harness::new(limits());
    let decoding = arrive(&mut harness, &Arrival::plain(10, 50));
    harness.step(Mishaps::default());
    let long = arrive(&mut harness, &Arrival::plain(1000, 1));
    for _ in 0..7 {
        let plan = harness.step(Mishaps::default());
        assert_eq!(tokens_of(&plan, decoding), 1);
        assert!(tokens_of(&plan, long) >= 64);
        assert!(plan.rows[0].draws, "drawing rows come first");
    }
}

#[test]
fn prompts_wait_or_get_less_only_while_as_many_sessions_decode() {
    let mut harness = Harness::new(Limits { beside_tokens: 64, ..limits() });
    let long = arrive(&mut harness, &Arrival::plain(2000, 1));
    let other = arrive(&mut harness, &Arrival::plain(2000, 1));
    let both = |plan: &Plan| tokens_of(plan, long) + tokens_of(plan, other);
    harness.scheduler.set_prompts_wait(true);
    assert_eq!(both(&harness.step(Mishaps::default())), 128);
    let first = arrive(&mut harness, &Arrival::plain(10, 6));
    harness.step(Mishaps::default());
    let plan = harness.step(Mishaps::default());
    assert_eq!(tokens_of(&plan, first), 1);
    assert!(both(&plan) > 64, "two do not wait for one");
    let second = arrive(&mut harness, &Arrival::plain(10, 3));
    harness.step(Mishaps::default());
    let plan = harness.step(Mishaps::default());
    assert_eq!((tokens_of(&plan, first), tokens_of(&plan, second), both(&plan)), (1, 1, 0));
    harness.scheduler.set_prompts_wait(false);
    let plan = harness.step(Mishaps::default());
    assert_eq!((tokens_of(&plan, first), tokens_of(&plan, second)), (1, 1));
    assert!((1..=64).contains(&both(&plan)), "{}", both(&plan));
    assert!(harness.finished.contains(&second));
    assert!(both(&harness.step(Mishaps::default())) > 64);
}

#[test]
fn prefill_goes_on_while_all_others_decode() {
    let mut harness = Harness::new(Limits { step_tokens: 8, ..limits() });
    for _ in 0..8 {
        arrive(&mut harness, &Arrival::plain(1, 100));
    }
    let plan = harness.step(Mishaps::default());
    assert_eq!(plan.rows.len(), 6, "a quarter of the step is kept for prefill");
    let mut harness = Harness::new(Limits { step_tokens: 8, ..limits() });
    for _ in 0..5 {
        arrive(&mut harness, &Arrival::plain(1, 100));
    }
    let long = arrive(&mut harness, &Arrival::plain(100, 1));
    let plan = harness.step(Mishaps::default());
    assert_eq!(tokens_of(&plan, long), 3);
}

#[test]
fn a_short_prompt_passes_a_long_one_and_the_long_one_keeps_half() {
    let mut harness = Harness::new(limits());
    let long = arrive(&mut harness, &Arrival::plain(2000, 1));
    let longer = arrive(&mut harness, &Arrival::plain(3000, 1));
    let short = arrive(&mut harness, &Arrival::plain(30, 1));
    let plan = harness.step(Mishaps::default());
    assert_eq!(tokens_of(&plan, long), 64);
    assert_eq!(tokens_of(&plan, short), 30);
    assert_eq!(tokens_of(&plan, longer), 34);
    assert!(harness.finished.contains(&short));
    // A stream of short prompts takes no more than the other half.
    for _ in 0..20 {
        arrive(&mut harness, &Arrival::plain(60, 1));
        let plan = harness.step(Mishaps::default());
        assert!(tokens_of(&plan, long) >= 64);
    }
}

#[test]
fn a_higher_priority_is_served_first() {
    let mut harness = Harness::new(Limits { slots: 1, ..limits() });
    let low = arrive(&mut harness, &Arrival::plain(10, 1));
    let high = arrive(&mut harness, &Arrival { priority: 5, ..Arrival::plain(10, 1) });
    let plan = harness.step(Mishaps::default());
    assert_eq!(plan.admitted, [high]);
    assert_eq!(harness.step(Mishaps::default()).admitted, [low]);

    let mut harness = Harness::new(limits());
    let low = arrive(&mut harness, &Arrival::plain(100, 1));
    let high = arrive(&mut harness, &Arrival { priority: 5, ..Arrival::plain(100, 1) });
    let plan = harness.step(Mishaps::default());
    assert_eq!((tokens_of(&plan, high), tokens_of(&plan, low)), (100, 28));
}

#[test]
fn chunks_end_at_page_boundaries() {
    let mut harness = Harness::new(Limits { step_tokens: 100, ..limits() });
    let id = arrive(&mut harness, &Arrival::plain(300, 1));
    let ends: Vec<u64> =
        (0..5).map(|_| harness.step(Mishaps::default()).rows.last().map_or(0, |row| row.end())).collect();
    assert_eq!(ends, [64, 128, 192, 256, 300]);
    assert!(harness.finished.contains(&id));
}

#[test]
fn the_lowest_priority_is_parked_and_comes_back() {
    // Five pages for three sessions; those with higher priority grow into three pages each.
    let mut harness = Harness::new(Limits { pages: 5, ..limits() });
    let low = arrive(&mut harness, &Arrival { priority: -1, ..Arrival::plain(60, 100) });
    let others = [(); 2].map(|()| arrive(&mut harness, &Arrival::plain(60, 100)));
    let parked = step_until(&mut harness, |_, plan| !plan.parks.is_empty()).parks;
    assert_eq!((parked.len(), parked[0].task), (1, low));
    assert_eq!(harness.status(low), Status::Parked);
    assert!(others.iter().all(|other| harness.status(*other) == Status::Decode));
    assert_eq!(harness.scheduler.occupancy().parked, 1);
    harness.finish(400);
    assert!(harness.finished.contains(&low));
}

#[test]
fn what_does_not_fit_host_memory_is_computed_again() {
    let mut harness = Harness::new(Limits { pages: 3, park_bytes: 109, ..limits() });
    arrive(&mut harness, &Arrival::plain(60, 100));
    let young = arrive(&mut harness, &Arrival::plain(60, 100));
    let plan = step_until(&mut harness, |_, plan| !plan.restarts.is_empty() || !plan.parks.is_empty());
    assert_eq!((plan.restarts, plan.parks.len()), (vec![young], 0));
    assert_eq!(harness.status(young), Status::Waiting);
    harness.finish(1000);
}

#[test]
fn a_task_that_does_not_fit_is_overtaken_a_bounded_number_of_times() {
    let mut harness = Harness::new(Limits { slots: 4, ..limits() });
    for _ in 0..2 {
        arrive(&mut harness, &Arrival::plain(10, 30));
    }
    harness.step(Mishaps::default());
    let group = harness.arrive(&Arrival { sessions: 4, ..Arrival::plain(10, 5) }).unwrap();
    let mut passed = 0;
    while harness.status(group[0]) == Status::Waiting {
        arrive(&mut harness, &Arrival::plain(5, 1));
        passed += harness.step(Mishaps::default()).admitted.iter().filter(|id| **id != group[0]).count();
    }
    assert_eq!(passed, 2);
    harness.finish(1000);
}

#[test]
fn choices_share_the_prompt() {
    let mut harness = Harness::new(limits());
    let ids = harness.arrive(&Arrival { sessions: 3, ..Arrival::plain(150, 10) }).unwrap();
    let plan = harness.step(Mishaps::default());
    assert_eq!((plan.rows.len(), plan.rows[0].end()), (1, 128), "one prefill, in chunks");
    assert_eq!(harness.scheduler.slots.used(), 3);
    let plan = harness.step(Mishaps::default());
    assert_eq!(plan.rows[0].end(), 149, "up to the last prompt token");
    let plan = harness.step(Mishaps::default());
    assert_eq!(plan.rows.len(), 3);
    assert_eq!(plan.forks, [Fork { parent: ids[0], child: ids[1] }, Fork { parent: ids[0], child: ids[2] }]);
    assert_eq!((plan.copy_slots.len(), plan.copy_pages.len()), (2, 2));
    assert_eq!(harness.scheduler.pages.used(), 2 + 3, "two full pages are shared");
    harness.finish(100);
    assert_eq!(harness.finished.len(), 3);
}

#[test]
fn a_one_token_prompt_forks_at_once() {
    let mut harness = Harness::new(limits());
    harness.arrive(&Arrival { sessions: 2, ..Arrival::plain(1, 3) }).unwrap();
    let plan = harness.step(Mishaps::default());
    assert_eq!((plan.rows.len(), plan.clear_slots.len()), (2, 2));
    assert_eq!((plan.copy_slots.len(), plan.copy_pages.len()), (0, 0));
    harness.finish(10);
}

#[test]
fn cancelling_one_choice_leaves_the_others() {
    for cancelled in 0..3 {
        let mut harness = Harness::new(limits());
        let ids = harness.arrive(&Arrival { sessions: 3, ..Arrival::plain(150, 10) }).unwrap();
        harness.step(Mishaps::default());
        harness.cancel(ids[cancelled]);
        assert_eq!(harness.scheduler.slots.used(), 2);
        harness.finish(100);
        assert_eq!(harness.finished.len(), 2);
    }
}

#[test]
fn cancelling_works_in_every_place() {
    let mut harness = Harness::new(Limits { pages: 3, ..limits() });
    let first = arrive(&mut harness, &Arrival::plain(60, 100));
    let second = arrive(&mut harness, &Arrival::plain(60, 100));
    step_until(&mut harness, |harness, _| harness.status(second) == Status::Parked);
    let removed = harness.scheduler.remove(second).unwrap().unwrap();
    assert!(removed.parked.is_some(), "the copy in host memory is named");
    harness.work.remove(&second);
    let waiting = arrive(&mut harness, &Arrival::plain(60, 100));
    harness.cancel(waiting);
    harness.cancel(first);
    assert_eq!(harness.scheduler.remove(first).unwrap(), None);
    harness.finish(1);
}

#[test]
fn prompt_logits_are_asked_for_once_and_within_the_rows() {
    let mut harness = Harness::new(limits());
    let id = arrive(&mut harness, &Arrival { prompt_logits: true, ..Arrival::plain(30, 5) });
    let mut asked = Vec::new();
    harness.step(Mishaps::default());
    assert_eq!(harness.scheduler.restart(id).unwrap().never, None);
    while harness.work.contains_key(&id) {
        for row in harness.step(Mishaps::default()).rows {
            asked.extend(row.prompt_logits_from.into_iter().flat_map(|from| from..row.end()));
        }
    }
    assert_eq!(asked, (8..29).collect::<Vec<u64>>(), "positions 0 to 7 were had before the restart");
}

#[test]
fn deadlines_are_told_with_the_time_that_is_passed_in() {
    let mut harness = Harness::new(limits());
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let task = |id, seconds| NewTask {
        id: TaskId(id),
        followers: vec![TaskId(id + 1)],
        priority: 0,
        deadline: Some(at(seconds)),
        length: 5,
        most: 9,
        prompt_logits: false,
    };
    harness.scheduler.add(task(0, 10)).unwrap();
    harness.scheduler.add(task(2, 5)).unwrap();
    assert_eq!(harness.scheduler.expired(at(4)), []);
    assert_eq!(harness.scheduler.expired(at(5)), [TaskId(2), TaskId(3)]);
    harness.scheduler.remove(TaskId(2)).unwrap().unwrap();
    assert_eq!(harness.scheduler.expired(at(20)), [TaskId(3), TaskId(0), TaskId(1)]);
}
