//! One test for each rule of sessions that leave and stand still, on cases small enough to follow by hand.

use std::time::{Duration, Instant};

use perigee_migration::segments::Mode;

use super::harness::{Arrival, Harness, Mishaps};
use super::moving::{Away, Return, place};
use super::rules::{arrive, limits, step_until, tokens_of};
use crate::scheduler::{FreezeCopies, FreezeRefused, Limits, NewTask, StateAt, Status, TaskId};

const FAULT: Mishaps = Mishaps { park: false, unpark: false, faults: [true; 2] };

fn step(harness: &mut Harness) -> crate::scheduler::Plan {
    harness.step(Mishaps::default())
}

/// A session with its first `pages` pages elsewhere, `length` tokens and `output` to draw.
pub(super) fn come_with_remote(harness: &mut Harness, pages: u64, length: u64, output: u64) -> TaskId {
    let mut away = Away::foreign(900 + harness.next_id, length, output);
    away.table = away.table.hand_over(&place("there"), pages * 64, Mode::Split);
    let how = Return { progress: 0, mode: Mode::Whole, shadow: true, thaw: true };
    harness.come(away, how).expect("there is room")
}

#[test]
fn a_frozen_session_keeps_everything_and_gets_no_row() {
    let mut harness = Harness::new(limits());
    let frozen = arrive(&mut harness, &Arrival::plain(100, 5));
    let other = arrive(&mut harness, &Arrival::plain(10, 50));
    step(&mut harness);
    assert!(harness.freeze(frozen));
    let view = harness.scheduler.frozen(frozen).unwrap();
    assert_eq!((view.state, view.computed, view.length), (StateAt::Slot(0), 100, 101));
    assert_eq!((view.scored, view.prompt_logits, view.latents.local_page_count()), (0, false, 2));
    assert_eq!(harness.scheduler.freeze(frozen).unwrap(), Ok(FreezeCopies::default()), "again is as good");
    for _ in 0..3 {
        let plan = step(&mut harness);
        assert_eq!((tokens_of(&plan, frozen), tokens_of(&plan, other)), (0, 1));
    }
    assert_eq!(harness.status(frozen), Status::Parked);
    let occupancy = harness.scheduler.occupancy();
    assert_eq!((occupancy.running, occupancy.parked, occupancy.slots_free), (1, 1, 6));
    harness.scheduler.thaw(frozen);
    assert_eq!(tokens_of(&step(&mut harness), frozen), 1);
    assert_eq!(harness.scheduler.frozen(other).map(|view| view.computed), None);
    assert_eq!(harness.scheduler.release(other, true).unwrap(), None, "one that runs is not given up");
    assert_eq!(harness.scheduler.freeze(TaskId(77)).unwrap(), Err(FreezeRefused::NotHere));
    harness.finish(100);
}

#[test]
fn what_stands_still_is_never_preempted() {
    // Three sessions of two pages each want a third: the worst would park, but it is frozen or held.
    for is_frozen in [true, false] {
        let mut harness = Harness::new(Limits { pages: 6, ..limits() });
        let still = arrive(&mut harness, &Arrival { priority: -1, ..Arrival::plain(60, 100) });
        let others = [(); 2].map(|()| arrive(&mut harness, &Arrival::plain(60, 100)));
        step_until(&mut harness, |harness, _| harness.scheduler.tasks[&still].computed == 65);
        match is_frozen {
            true => assert!(harness.freeze(still)),
            false => harness.scheduler.hold(still),
        }
        let parked = step_until(&mut harness, |_, plan| !plan.parks.is_empty()).parks;
        assert_eq!(parked[0].task, others[1]);
        assert_eq!(harness.scheduler.tasks[&still].latents.local_page_count(), 2);
        step_until(&mut harness, |harness, _| harness.finished.len() == 2);
        harness.settle();
        harness.finish(100);
    }
}

#[test]
fn deadlines_of_frozen_sessions_expire() {
    let mut harness = Harness::new(limits());
    let start = Instant::now();
    let task = NewTask {
        id: TaskId(0),
        followers: vec![TaskId(1)],
        priority: 0,
        deadline: Some(start),
        length: 5,
        most: 9,
        prompt_logits: false,
    };
    harness.scheduler.add(task).unwrap();
    harness.scheduler.freeze(TaskId(0)).unwrap().unwrap();
    assert_eq!(harness.scheduler.expired(start + Duration::from_secs(1)), [TaskId(0), TaskId(1)]);
    harness.scheduler.release(TaskId(0), false).unwrap().unwrap();
    assert_eq!(harness.scheduler.expired(start), [TaskId(1)]);
}

#[test]
fn a_queued_session_freezes_with_nothing() {
    let mut harness = Harness::new(Limits { slots: 1, ..limits() });
    let first = arrive(&mut harness, &Arrival::plain(10, 3));
    let queued = arrive(&mut harness, &Arrival::plain(10, 3));
    step(&mut harness);
    assert!(harness.freeze(queued));
    assert_eq!(harness.scheduler.frozen(queued).unwrap().state, StateAt::Empty);
    step_until(&mut harness, |harness, _| harness.finished.contains(&first));
    assert!(step(&mut harness).is_empty(), "a frozen session is not admitted");
    harness.leave(queued, true);
    assert!(harness.homes.is_empty());
    harness.finish(1);
}

#[test]
fn a_parked_session_freezes_with_its_copy() {
    let mut harness = Harness::new(Limits { pages: 3, ..limits() });
    arrive(&mut harness, &Arrival::plain(60, 100));
    let parked = arrive(&mut harness, &Arrival::plain(60, 100));
    let key = step_until(&mut harness, |_, plan| !plan.parks.is_empty()).parks[0].key;
    assert!(harness.freeze(parked));
    let view = harness.scheduler.frozen(parked).unwrap();
    assert_eq!((view.state, view.latents.local_page_count()), (StateAt::Parked(key), 1), "it says how many pages");
    let released = harness.scheduler.release(parked, true).unwrap().unwrap();
    assert_eq!((released.parked, released.home.is_empty(), released.slots.len()), (Some(key), true, 0));
    harness.device.drop_parked(key);
    harness.work.remove(&parked);
    harness.finish(200);
}

#[test]
fn a_leader_that_freezes_leaves_the_prefill_to_an_heir() {
    let mut harness = Harness::new(Limits { step_tokens: 70, ..limits() });
    let arrival = Arrival { sessions: 3, prompt_logits: true, ..Arrival::plain(150, 4) };
    let ids = harness.arrive(&arrival).unwrap();
    step_until(&mut harness, |harness, _| harness.scheduler.tasks[&ids[0]].computed == 70);
    let copies = harness.scheduler.freeze(ids[0]).unwrap().unwrap();
    assert_eq!((copies.shared_with, copies.is_heir), (Some(ids[1]), true));
    assert_eq!((copies.slots.len(), copies.pages.len()), (1, 1), "the full page is shared, the other one copied");
    harness.device.copy(&copies.slots, &copies.pages);
    harness.check();
    let view = harness.scheduler.frozen(ids[0]).unwrap();
    assert_eq!((view.computed, view.prompt_logits), (70, true));
    assert!(view.scored > 0);
    assert_eq!(harness.scheduler.slots.used(), 3);
    harness.leave(ids[0], true);
    assert_eq!(harness.scheduler.pages.used(), 2, "its full page is the group's, too");
    let forks = step_until(&mut harness, |_, plan| !plan.forks.is_empty()).forks;
    assert_eq!((forks.len(), forks[0].parent, forks[0].child), (1, ids[1], ids[2]));
    harness.settle();
    harness.finish(20);
    assert_eq!(harness.finished.len(), 2);
}

#[test]
fn a_follower_that_freezes_goes_on_by_itself() {
    let mut harness = Harness::new(limits());
    let ids = harness.arrive(&Arrival { sessions: 3, ..Arrival::plain(150, 4) }).unwrap();
    step(&mut harness);
    let copies = harness.scheduler.freeze(ids[2]).unwrap().unwrap();
    assert_eq!((copies.shared_with, copies.is_heir), (Some(ids[0]), false));
    assert_eq!((copies.slots.len(), copies.pages.len()), (1, 0), "chunks end between pages");
    harness.device.copy(&copies.slots, &copies.pages);
    let forks = step_until(&mut harness, |_, plan| !plan.forks.is_empty()).forks;
    assert_eq!(forks.len(), 1);
    harness.scheduler.thaw(ids[2]);
    assert_eq!(tokens_of(&step(&mut harness), ids[2]), 22, "no barrier is left for it");
    harness.finish(20);
    assert_eq!(harness.finished.len(), 3);
}

#[test]
fn who_leaves_a_group_before_it_ran_or_while_it_is_parked_has_nothing() {
    let mut harness = Harness::new(limits());
    let ids = harness.arrive(&Arrival { sessions: 2, ..Arrival::plain(150, 4) }).unwrap();
    assert!(harness.freeze(ids[1]));
    assert_eq!(harness.scheduler.frozen(ids[1]).unwrap().state, StateAt::Empty);
    harness.settle();
    harness.finish(50);

    // A better session takes the pages of a group in the middle of its prompt.
    let mut harness = Harness::new(Limits { pages: 4, step_tokens: 70, ..limits() });
    let ids = harness.arrive(&Arrival { sessions: 2, priority: -1, ..Arrival::plain(200, 4) }).unwrap();
    step_until(&mut harness, |harness, _| harness.scheduler.tasks[&ids[0]].computed >= 128);
    let key = {
        harness.scheduler.hold(ids[0]);
        arrive(&mut harness, &Arrival::plain(100, 30));
        step(&mut harness);
        harness.scheduler.unhold(ids[0]);
        step_until(&mut harness, |_, plan| !plan.parks.is_empty()).parks[0].key
    };
    for frozen in ids {
        assert!(harness.freeze(frozen));
        harness.scheduler.thaw(frozen);
    }
    let waiting: Vec<StateAt> = harness
        .scheduler
        .tasks
        .values()
        .filter_map(|task| match task.place {
            crate::scheduler::task::Place::Parked { key, .. } => Some(StateAt::Parked(key)),
            crate::scheduler::task::Place::Queued => Some(StateAt::Empty),
            _ => None,
        })
        .collect();
    assert!(waiting.contains(&StateAt::Parked(key)) && waiting.contains(&StateAt::Empty), "{waiting:?}");
    harness.finish(300);
    assert_eq!(harness.finished.len(), 3);
}

#[test]
fn a_session_without_a_page_for_its_copy_is_refused() {
    let mut harness = Harness::new(Limits { pages: 2, step_tokens: 16, ..limits() });
    let ids = harness.arrive(&Arrival { sessions: 2, ..Arrival::plain(120, 4) }).unwrap();
    step_until(&mut harness, |harness, _| harness.scheduler.tasks[&ids[0]].computed == 80);
    for id in &ids {
        assert_eq!(harness.scheduler.freeze(*id).unwrap(), Err(FreezeRefused::NoPage));
        harness.check();
    }
    assert_eq!(tokens_of(&step(&mut harness), ids[0]), 16, "nothing has changed");
    harness.finish(300);
}

#[test]
fn a_held_session_holds_its_group() {
    let mut harness = Harness::new(Limits { step_tokens: 16, ..limits() });
    let ids = harness.arrive(&Arrival { sessions: 3, ..Arrival::plain(40, 3) }).unwrap();
    step(&mut harness);
    harness.scheduler.hold(ids[1]);
    harness.scheduler.hold(ids[2]);
    assert!(step(&mut harness).is_empty());
    assert_eq!(harness.status(ids[0]), Status::Prefill);
    harness.scheduler.unhold(ids[1]);
    assert!(step(&mut harness).is_empty());
    harness.cancel(ids[2]);
    assert!(tokens_of(&step(&mut harness), ids[0]) > 0, "the one that was held is gone");
    harness.scheduler.hold(ids[0]);
    harness.cancel(ids[0]);
    assert!(tokens_of(&step(&mut harness), ids[1]) > 0, "the heir is not held");
    harness.scheduler.hold(TaskId(50));
    harness.finish(20);
}

#[test]
fn a_step_with_latents_elsewhere_counts_only_if_it_is_advanced() {
    let mut harness = Harness::new(limits());
    let id = come_with_remote(&mut harness, 2, 150, 4);
    assert_eq!(harness.scheduler.slots.used(), 2);
    let first = harness.step(FAULT).rows.remove(0);
    assert!(first.remote && first.read_slot != first.write_slot);
    assert_eq!((first.position, first.segments[0].start), (149, 128), "the gap is another's");
    let again = step(&mut harness).rows.remove(0);
    assert_eq!(again, first, "the old state is still good");
    let next = step(&mut harness).rows.remove(0);
    assert_eq!((next.read_slot, next.write_slot, next.position), (first.write_slot, first.read_slot, 150));
    harness.finish(10);
    assert!(harness.finished.contains(&id));
}

#[test]
fn rows_with_latents_elsewhere_are_short() {
    let mut harness = Harness::new(limits());
    let mut away = Away::foreign(900, 500, 1);
    away.computed = 128;
    away.table = away.table.hand_over(&place("there"), 128, Mode::Split);
    let how = Return { progress: 0, mode: Mode::Whole, shadow: true, thaw: true };
    let id = harness.come(away, how).unwrap();
    assert_eq!(tokens_of(&step(&mut harness), id), 64, "though it is alone");
    let long = arrive(&mut harness, &Arrival::plain(500, 1));
    let plan = step(&mut harness);
    assert_eq!((tokens_of(&plan, id), tokens_of(&plan, long)), (64, 64));
    harness.finish(20);
}

#[test]
fn a_parked_session_with_latents_elsewhere_comes_back_with_two_slots() {
    let mut harness = Harness::new(Limits { pages: 3, ..limits() });
    let low = come_with_remote(&mut harness, 2, 190, 70);
    let high = arrive(&mut harness, &Arrival { priority: 5, ..Arrival::plain(60, 100) });
    step_until(&mut harness, |_, plan| plan.parks.iter().any(|park| park.task == low));
    assert_eq!((harness.status(low), harness.scheduler.slots.used()), (Status::Parked, 1));
    step_until(&mut harness, |_, plan| plan.unparks.iter().any(|unpark| unpark.task == low));
    assert!(harness.finished.contains(&high) || harness.scheduler.slots.used() == 3);
    harness.finish(300);
    assert!(harness.finished.contains(&low));
}

#[test]
fn a_rebuild_needs_one_slot_and_all_pages() {
    let mut harness = Harness::new(limits());
    let id = come_with_remote(&mut harness, 2, 150, 4);
    harness.rebuild(id);
    let rows = step(&mut harness).rows;
    assert_eq!((rows[0].position, rows[0].remote, harness.scheduler.slots.used()), (0, false, 1));
    harness.finish(20);
    assert!(harness.finished.contains(&id));

    // With its first pages elsewhere it fits; alone it does not.
    let mut harness = Harness::new(Limits { pages: 2, ..limits() });
    let id = come_with_remote(&mut harness, 2, 150, 4);
    step(&mut harness);
    let never = harness.scheduler.restart(id).unwrap().never.unwrap();
    assert_eq!(never, crate::scheduler::NeverFits::Pages { wanted: 153, limit: 128 });
    harness.check();
    assert!(step(&mut harness).is_empty());
    harness.evict(id);
    harness.finish(1);
}

#[test]
fn a_session_that_can_neither_park_nor_be_computed_again_is_evicted() {
    let mut harness = Harness::new(Limits { pages: 3, park_bytes: 0, ..limits() });
    let low = come_with_remote(&mut harness, 3, 250, 60);
    arrive(&mut harness, &Arrival { priority: 5, ..Arrival::plain(60, 100) });
    let evicted = step_until(&mut harness, |_, plan| !plan.evicted.is_empty()).evicted;
    assert_eq!(evicted[0].0, low);
    harness.finish(200);
}
