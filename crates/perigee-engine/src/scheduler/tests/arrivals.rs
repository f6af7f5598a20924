//! One test for each rule of room for sessions that come, and of pages that stay of those that went.

use perigee_migration::segments::{Mode, SegmentTable};

use super::harness::{Arrival, Harness, Mishaps};
use super::moves::come_with_remote;
use super::moving::{Away, Return, place};
use super::rules::{arrive, limits, step_until, tokens_of};
use crate::cache::{CacheError, HomePages, Latents, SlotPair};
use crate::scheduler::{Adopted, Limits, NeverFits, Plan, Status, TaskId};

const BACK: Return = Return { progress: 0, mode: Mode::Split, shadow: true, thaw: true };

fn step(harness: &mut Harness) -> Plan {
    harness.step(Mishaps::default())
}

/// A session whose latents are all here, in these pages.
fn adopted(computed: u64, pages: &[u32]) -> Adopted {
    let mut latents = Latents::new();
    pages.iter().for_each(|page| latents.append(*page));
    Adopted {
        priority: 0,
        deadline: None,
        length: computed + 1,
        most: computed + 10,
        computed,
        scored: 0,
        prompt_logits: false,
        latents,
        home: None,
    }
}

#[test]
fn reservations_keep_to_what_may_run() {
    let mut harness = Harness::new(Limits { slots: 4, step_rows: 3, ..limits() });
    assert_eq!(harness.scheduler.reserve(TaskId(10), true), Some(SlotPair { read: 0, write: 1 }));
    assert_eq!(harness.scheduler.reserve(TaskId(10), false), None, "it has one");
    assert_eq!(harness.scheduler.reserve(TaskId(11), false), Some(SlotPair::in_place(2)));
    assert_eq!(harness.scheduler.reserve(TaskId(12), true), None, "two slots are not free");
    assert_eq!(harness.scheduler.reserve(TaskId(12), false), Some(SlotPair::in_place(3)));
    harness.scheduler.audit().unwrap();
    let queued = arrive(&mut harness, &Arrival::plain(10, 2));
    assert!(step(&mut harness).is_empty(), "no slot is left");
    let released = harness.scheduler.cancel_reserve(TaskId(10)).unwrap();
    assert_eq!(released.slots, [0, 1]);
    assert_eq!(harness.scheduler.cancel_reserve(TaskId(10)).unwrap(), Default::default());
    assert_eq!(step(&mut harness).admitted, [queued]);
    assert_eq!(harness.scheduler.reserve(TaskId(13), false), None, "three may run, and a slot is free");
    [11, 12].into_iter().for_each(|id| drop(harness.scheduler.cancel_reserve(TaskId(id)).unwrap()));
    harness.finish(10);
}

#[test]
fn arrivals_pass_the_queue_a_bounded_number_of_times() {
    let mut harness = Harness::new(Limits { slots: 4, ..limits() });
    for _ in 0..2 {
        arrive(&mut harness, &Arrival::plain(10, 30));
    }
    step(&mut harness);
    let group = harness.arrive(&Arrival { sessions: 4, ..Arrival::plain(10, 5) }).unwrap();
    step(&mut harness);
    for _ in 0..2 {
        let id = harness.come(Away::foreign(900, 20, 1), BACK).expect("it may pass");
        step_until(&mut harness, |harness, _| harness.finished.contains(&id));
    }
    assert_eq!(harness.come(Away::foreign(900, 20, 1), BACK), None, "the group's turn has come");
    step_until(&mut harness, |harness, _| harness.status(group[0]) != Status::Waiting);
    harness.finish(100);
}

#[test]
fn pages_for_arrivals_leave_running_tasks_theirs() {
    let mut harness = Harness::new(Limits { pages: 10, step_tokens: 64, ..limits() });
    let long = arrive(&mut harness, &Arrival::plain(400, 5));
    step(&mut harness);
    let id = TaskId(harness.next_id);
    harness.next_id += 1;
    harness.scheduler.reserve(id, false).unwrap();
    harness.reserved.insert(id);
    // Seven pages are the prompt's, one is for growth.
    assert_eq!(harness.scheduler.reserve_pages(id, 3), None);
    assert_eq!(harness.scheduler.reserve_pages(id, 2).map(|pages| pages.len()), Some(2));
    assert_eq!(harness.scheduler.reserve_pages(id, 1), None);
    assert_eq!(harness.scheduler.reserve_pages(TaskId(99), 0), None, "no reservation");
    step_until(&mut harness, |harness, _| harness.finished.contains(&long));
    assert_eq!(harness.scheduler.reserve_pages(id, 9), None, "all or none");
    assert_eq!(harness.scheduler.reserve_pages(id, 8).map(|pages| pages.len()), Some(8));
    harness.settle();
    harness.finish(1);
}

#[test]
fn an_adopted_session_holds_what_it_needs_and_no_more() {
    let mut harness = Harness::new(limits());
    let id = TaskId(5);
    let slots = harness.scheduler.reserve(id, true).unwrap();
    let pages = harness.scheduler.reserve_pages(id, 4).unwrap();
    harness.scheduler.adopt(id, adopted(100, &pages[1..3])).unwrap().unwrap();
    harness.scheduler.audit().unwrap();
    assert_eq!((harness.scheduler.slots.used(), harness.scheduler.pages.used()), (1, 2));
    let view = harness.scheduler.frozen(id).unwrap();
    assert_eq!((view.state, view.computed), (crate::scheduler::StateAt::Slot(slots.read), 100));
    assert!(harness.scheduler.plan().unwrap().rows.is_empty(), "it is frozen at first");
    harness.scheduler.thaw(id);
    let row = harness.scheduler.plan().unwrap().rows.remove(0);
    assert_eq!((row.read_slot, row.write_slot, row.position, row.draws), (slots.read, slots.read, 100, true));
}

#[test]
fn an_adoption_that_does_not_add_up_is_an_error() {
    let reserved = || {
        let mut harness = Harness::new(Limits { slots: 1, ..limits() });
        harness.scheduler.reserve(TaskId(5), false).unwrap();
        let pages = harness.scheduler.reserve_pages(TaskId(5), 2).unwrap();
        (harness.scheduler, pages)
    };
    let is_refused = |id: u64, session: &dyn Fn(&[u32]) -> Adopted| {
        let (mut scheduler, pages) = reserved();
        matches!(scheduler.adopt(TaskId(id), session(&pages)), Err(CacheError::Unbalanced(_)))
    };
    assert!(!is_refused(5, &|pages| adopted(100, pages)));
    assert!(is_refused(6, &|pages| adopted(100, pages)), "not reserved");
    assert!(is_refused(5, &|pages| adopted(100, &[pages[0], 50])), "not its page");
    assert!(is_refused(5, &|pages| adopted(100, &[pages[0], pages[0]])), "a page twice");
    assert!(is_refused(5, &|pages| adopted(129, pages)), "more computed than there is a place for");
    assert!(is_refused(5, &|pages| Adopted { length: 100, ..adopted(100, pages) }), "nothing to feed");
    let remote = |pages: &[u32]| {
        let table = SegmentTable::new().hand_over(&place("there"), 64, Mode::Split);
        let local = [(1, pages[0])].into_iter().collect();
        let latents = Latents::assemble(&table, |_| "there:1".into(), &local, 100).unwrap();
        Adopted { latents, ..adopted(100, &[]) }
    };
    assert!(is_refused(5, &remote), "there is no second slot");
}

#[test]
fn a_session_that_never_fits_stays_a_reservation() {
    let mut harness = Harness::new(Limits { pages: 4, ..limits() });
    let id = TaskId(5);
    harness.scheduler.reserve(id, false).unwrap();
    let pages = harness.scheduler.reserve_pages(id, 3).unwrap();
    let home = HomePages { pages: vec![(0, vec![pages[0]])] };
    // The first page is a home entry's: whoever reserved it is another.
    let first = TaskId(6);
    harness.scheduler.adopt(id, adopted(192, &pages)).unwrap().unwrap();
    let released = harness.scheduler.release(id, true).unwrap().unwrap();
    assert_eq!(released.home.pages, [(0, pages.clone())]);
    harness.scheduler.keep_home(5, released.home);
    harness.scheduler.reserve(first, false).unwrap();
    let taken = harness.scheduler.take_home(5);
    let session = Adopted { most: 300, home: taken, ..adopted(64, &home.iter().collect::<Vec<_>>()) };
    let never = harness.scheduler.adopt(first, session).unwrap().unwrap_err();
    assert_eq!(never, NeverFits::Pages { wanted: 300, limit: 256 });
    harness.scheduler.audit().unwrap();
    let mut freed = harness.scheduler.cancel_reserve(first).unwrap().pages;
    freed.sort_unstable();
    assert_eq!(freed, pages);
}

#[test]
fn only_full_pages_stay_and_they_serve_whoever_returns() {
    let mut harness = Harness::new(limits());
    let id = arrive(&mut harness, &Arrival::plain(150, 200));
    step_until(&mut harness, |harness, _| harness.scheduler.tasks[&id].computed >= 150);
    let pages: Vec<u32> = harness.scheduler.tasks[&id].latents.local_pages().collect();
    assert!(harness.freeze(id));
    harness.leave(id, true);
    assert_eq!((harness.scheduler.slots.used(), harness.scheduler.pages.used()), (0, 2));
    assert_eq!(harness.scheduler.occupancy().homes, 1);
    // It drew 100 tokens elsewhere; the page that it filled there stays there.
    let away = harness.away.remove(0);
    let id = harness.come(away, Return { progress: 100, ..BACK }).unwrap();
    let view = harness.scheduler.session(id).unwrap();
    assert_eq!(view.latents.local_pages().take(2).collect::<Vec<_>>(), pages[..2], "no copy was needed");
    assert_eq!((view.latents.remote_positions(), view.latents.local_page_count()), (64, 3));
    assert_eq!(harness.scheduler.occupancy().homes, 0);
    let row = step(&mut harness).rows.remove(0);
    assert_eq!(row.segments.iter().map(|segment| segment.start..segment.end).collect::<Vec<_>>(), [0..128, 192..251]);
    harness.finish(200);
}

#[test]
fn a_session_that_cannot_get_in_for_homes_waits_and_lets_others_pass() {
    let mut harness = Harness::new(Limits { pages: 4, bypass_limit: 0, ..limits() });
    let id = arrive(&mut harness, &Arrival::plain(130, 5));
    step_until(&mut harness, |harness, _| harness.scheduler.tasks[&id].computed >= 130);
    assert!(harness.freeze(id));
    harness.leave(id, true);
    let large = arrive(&mut harness, &Arrival::plain(200, 5));
    let small = arrive(&mut harness, &Arrival::plain(20, 5));
    assert_eq!(step(&mut harness).admitted, [small], "though nobody may pass one that could run");
    step_until(&mut harness, |harness, _| harness.finished.contains(&small));
    assert_eq!(harness.status(large), Status::Waiting);
    for _ in 0..3 {
        assert!(step(&mut harness).is_empty(), "there is nothing to do, and the plan says so");
    }
    harness.free_home(id.0);
    assert_eq!(step(&mut harness).admitted, [large]);
    harness.finish(50);
}

#[test]
fn a_session_that_grows_into_pages_of_homes_waits() {
    let mut harness = Harness::new(Limits { pages: 3, ..limits() });
    let id = arrive(&mut harness, &Arrival::plain(130, 5));
    step_until(&mut harness, |harness, _| harness.scheduler.tasks[&id].computed >= 130);
    assert!(harness.freeze(id));
    harness.leave(id, true);
    let growing = arrive(&mut harness, &Arrival::plain(60, 20));
    step_until(&mut harness, |_, plan| plan.is_empty());
    assert_eq!((harness.status(growing), harness.scheduler.tasks[&growing].computed), (Status::Decode, 64));
    harness.free_home(id.0);
    assert_eq!(tokens_of(&step(&mut harness), growing), 1);
    harness.finish(50);
}

#[test]
fn prompt_logits_go_on_where_they_were() {
    let mut harness = Harness::new(Limits { step_tokens: 20, ..limits() });
    let arrival = Arrival { prompt_logits: true, ..Arrival::plain(60, 5) };
    let mut id = arrive(&mut harness, &arrival);
    let mut asked = Vec::new();
    for round in 0..40 {
        if !harness.work.contains_key(&id) {
            break;
        }
        let plan = step(&mut harness);
        for row in plan.rows {
            asked.extend(row.prompt_logits_from.into_iter().flat_map(|from| from..row.end()));
        }
        if harness.work.contains_key(&id) {
            if round == 1 {
                // What was had stays had, though it is computed again elsewhere.
                harness.rebuild(id);
            }
            assert!(harness.freeze(id));
            harness.leave(id, true);
            let away = harness.away.remove(0);
            id = harness.come(away, BACK).unwrap();
        }
    }
    assert_eq!(asked, (0..59).collect::<Vec<u64>>(), "each once, though the session moved after every step");
    assert!(harness.finished.contains(&id));
}

#[test]
fn arrivals_with_latents_elsewhere_fit_by_what_is_here() {
    let limits = Limits { pages: 2, ..limits() };
    assert_eq!(limits.check_arrival(1000, 896), Ok(()));
    assert_eq!(limits.check_arrival(1000, 832), Err(NeverFits::Pages { wanted: 168, limit: 128 }));
    assert_eq!(limits.check_arrival(5000, 4992), Err(NeverFits::Length { wanted: 5000, limit: 4000 }));
    let mut harness = Harness::new(limits);
    let id = come_with_remote(&mut harness, 14, 920, 50);
    harness.finish(60);
    assert!(harness.finished.contains(&id));
}
