//! One test for each rule of latents that come after their session, and of those that are computed again beside it.

use super::harness::Harness;
use super::moves::come_with_remote;
use super::rules::limits;
use crate::scheduler::{Limits, NewTask, Plan, Scheduler, TaskId};

/// A step in which everything counts; every row that draws, draws.
fn turn(scheduler: &mut Scheduler) -> Plan {
    let plan = scheduler.plan().unwrap();
    for row in &plan.rows {
        scheduler.advance(row.task, row.tokens);
        if row.draws {
            scheduler.append(row.task);
        }
    }
    scheduler.audit().unwrap();
    plan
}

/// A scheduler with a session of 150 tokens whose first two pages are elsewhere.
fn with_remote(limits: Limits) -> (Scheduler, TaskId) {
    let mut harness = Harness::new(limits);
    let id = come_with_remote(&mut harness, 2, 150, 40);
    (harness.scheduler, id)
}

fn another(id: u64, length: u64) -> NewTask {
    NewTask {
        id: TaskId(id),
        followers: Vec::new(),
        priority: 0,
        deadline: None,
        length,
        most: length + 100,
        prompt_logits: false,
    }
}

fn rows_of(plan: &Plan, id: TaskId) -> Vec<(u64, u64, bool)> {
    plan.rows.iter().filter(|row| row.task == id).map(|row| (row.position, row.tokens, row.remote)).collect()
}

#[test]
fn a_segment_turns_local_at_once_and_as_a_whole() {
    let (mut scheduler, id) = with_remote(limits());
    let free = scheduler.occupancy();
    assert_eq!(scheduler.follow(id, 2).map(|pages| pages.len()), Some(2));
    assert_eq!(scheduler.follow(id, 2), None, "one at a time");
    assert!(turn(&mut scheduler).rows[0].remote, "it asks until all is here");
    assert!(scheduler.localise(id, 1).is_err(), "no segment begins there");
    let (mut scheduler, id) = with_remote(limits());
    scheduler.follow(id, 2).unwrap();
    assert!(scheduler.localise(id, 0).unwrap().is_some(), "the shadow slot is free");
    let row = turn(&mut scheduler).rows.remove(0);
    assert!(!row.remote && row.read_slot == row.write_slot && row.segments.len() == 1, "{row:?}");
    assert_eq!(scheduler.occupancy().slots_free, free.slots_free + 1);
    assert_eq!(scheduler.occupancy().pages_free, free.pages_free - 2);
}

#[test]
fn pages_follow_only_into_spare_ones() {
    let (mut scheduler, id) = with_remote(limits());
    scheduler.add(another(900, 10)).unwrap();
    assert_eq!(scheduler.follow(id, 2), None, "somebody queues");
    turn(&mut scheduler);
    assert!(scheduler.follow(id, 2).is_some());
    // Whoever stands still, or goes, has nothing on its way.
    let held = scheduler.occupancy().pages_free;
    scheduler.freeze(id).unwrap().unwrap();
    assert_eq!((scheduler.following(id), scheduler.occupancy().pages_free), (None, held + 2));
    scheduler.audit().unwrap();
    let (mut scheduler, id) = with_remote(Limits { pages: 3, ..limits() });
    assert_eq!(scheduler.follow(id, 2), None, "there are not so many");
}

#[test]
fn latents_are_computed_again_beside_their_session() {
    let (mut scheduler, id) = with_remote(limits());
    turn(&mut scheduler);
    let (scratch, before) = (TaskId(901), scheduler.session(id).unwrap().computed);
    scheduler.add(another(900, 10)).unwrap();
    turn(&mut scheduler);
    assert!(scheduler.begin_rebuild(id, scratch).unwrap());
    assert!(!scheduler.begin_rebuild(id, TaskId(902)).unwrap(), "once is enough");
    assert_eq!((scheduler.session_of(scratch), scheduler.session_of(id)), (id, id));
    let mut fed = 0;
    while !scheduler.end_rebuild(id).unwrap() {
        let plan = turn(&mut scheduler);
        assert_eq!(rows_of(&plan, id), [], "it stands still");
        assert_eq!(rows_of(&plan, TaskId(900)).len(), 1, "others do not");
        assert!(plan.rows.iter().all(|row| row.task != scratch || !row.draws));
        fed += rows_of(&plan, scratch).iter().map(|(_, tokens, _)| tokens).sum::<u64>();
    }
    assert_eq!(fed, 128, "what was elsewhere and nothing more");
    scheduler.audit().unwrap();
    let plan = turn(&mut scheduler);
    assert_eq!(rows_of(&plan, id), [(before + 1, 1, false)], "it goes on where it was, and asks nobody");
    for task in [id, TaskId(900)] {
        scheduler.remove(task).unwrap();
    }
    scheduler.audit().unwrap();
    assert_eq!((scheduler.slots.used(), scheduler.pages.used()), (0, 0));
}

#[test]
fn a_session_that_ends_or_leaves_takes_its_scratch_along() {
    let (mut scheduler, id) = with_remote(limits());
    assert!(scheduler.begin_rebuild(id, TaskId(901)).unwrap());
    turn(&mut scheduler);
    scheduler.freeze(id).unwrap().unwrap();
    scheduler.audit().unwrap();
    assert!(!scheduler.is_rebuilding(id) && turn(&mut scheduler).is_empty());
    scheduler.thaw(id);
    assert!(turn(&mut scheduler).rows[0].remote, "nothing of it is left");
    assert!(scheduler.begin_rebuild(id, TaskId(902)).unwrap());
    scheduler.remove(id).unwrap();
    scheduler.audit().unwrap();
    assert_eq!((scheduler.slots.used(), scheduler.pages.used()), (0, 0));
    let (mut scheduler, id) = with_remote(Limits { pages: 3, ..limits() });
    assert!(!scheduler.begin_rebuild(id, TaskId(901)).unwrap(), "there is no room beside it");
}

#[test]
fn a_better_session_that_needs_the_pages_has_the_other_start_over() {
    let (mut scheduler, id) = with_remote(Limits { pages: 8, ..limits() });
    assert!(scheduler.begin_rebuild(id, TaskId(901)).unwrap());
    turn(&mut scheduler);
    scheduler.add(NewTask { priority: 1, ..another(900, 300) }).unwrap();
    let mut restarted = false;
    for _ in 0..400 {
        restarted |= turn(&mut scheduler).restarts.contains(&id);
        if scheduler.end_rebuild(id).unwrap() || restarted {
            break;
        }
    }
    scheduler.audit().unwrap();
    assert!(!scheduler.is_rebuilding(id), "neither waits for the other");
}
