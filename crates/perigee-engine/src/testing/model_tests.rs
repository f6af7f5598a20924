//! The modelled executor's moves: a session that changes replicas goes on as if it had stayed, and one whose home does not
//! answer is found out if anybody uses what it wrote.

use perigee_backend::{Row, Segment, StepBatch};
use perigee_migration::AnswerStatus;

use super::{Faults, ModelExecutor, ModelSizes, RemoteAnswer};
use crate::cache::HomePages;
use crate::executor::{Executor, PageSpan, StateSource, StepOutput, StepPlan};
use crate::homes::HomeDirectory;
use crate::remote::{RemoteHome, RemotePlan, RemoteRanges, RemoteRow};

/// Positions before the move.
const CONTEXT: u64 = 100;

fn executor() -> ModelExecutor {
    ModelExecutor::new(ModelSizes::default())
}

/// One row over local pages from a position on, with its last logits.
fn step(
    executor: &mut ModelExecutor,
    slots: (u32, u32),
    (start, pages): (u64, &[u32]),
    positions: std::ops::Range<u64>,
    remote: RemotePlan,
) -> StepOutput {
    let tokens: Vec<u32> = positions.clone().map(|position| (position * 7 % 300) as u32).collect();
    let segments = vec![Segment { start, end: positions.end, pages: pages.to_vec() }];
    let count = tokens.len() as u32;
    let row = Row { tokens: count, position: positions.start, read_slot: slots.0, write_slot: slots.1, segments };
    let batch = StepBatch { tokens, rows: vec![row], logits: vec![count - 1] };
    let clear_slots = if positions.start == 0 { vec![slots.0] } else { Vec::new() };
    executor.step(&StepPlan { batch, clear_slots, remote, ..StepPlan::default() }, &[], true).unwrap()
}

fn remote() -> RemotePlan {
    let home = RemoteHome { replica: "a".into(), incarnation: "1".into(), endpoint: "a:1".into() };
    let parts = vec![RemoteRanges { home: 0, ranges: std::iter::once(0..64).collect() }];
    let row = RemoteRow { row: 0, session: "s".into(), epoch: 2, parts };
    RemotePlan { homes: vec![home], rows: vec![row], patience_ms: 1 }
}

/// A replica with the session in slot 0 and pages 3 and 5.
fn source() -> ModelExecutor {
    let mut source = executor();
    step(&mut source, (0, 0), (0, &[3, 5]), 0..CONTEXT, RemotePlan::default());
    source
}

fn bring(source: &mut ModelExecutor, target: &mut ModelExecutor) {
    let slices = source.export_slot(StateSource::Slot(0)).unwrap();
    target.import_state(1, &slices).unwrap();
    let last = [PageSpan { page: 5, first: 64, positions: 36 }];
    let pages = source.export_pages(&last).unwrap();
    target.import_pages(&[(9, pages[0].clone())]).unwrap();
    let copied = [PageSpan { page: 9, ..last[0] }];
    assert_eq!(target.digest_pages(&copied).unwrap(), source.digest_pages(&last).unwrap());
}

#[test]
fn a_moved_session_sees_what_it_would_have_seen() {
    let mut source = source();
    let homes = HomeDirectory::new();
    homes.publish("s", HomePages { pages: vec![(0, vec![3])] }, 2);
    let (pages, directory) = (source.pages(), homes.clone());
    let mut target = executor().with_homes(move |_, row, range| pages.answer(&directory, row, range));
    bring(&mut source, &mut target);
    assert_eq!(target.digest_slot(1).unwrap(), source.digest_slot(0).unwrap());
    let moved = step(&mut target, (1, 2), (64, &[9]), CONTEXT..101, remote());
    let stayed = step(&mut source, (0, 0), (0, &[3, 5]), CONTEXT..101, RemotePlan::default());
    assert_eq!((moved.logits, moved.faulty), (stayed.logits, vec![]));
    assert_eq!(homes.asked(), [("s".to_owned(), 2)]);

    homes.withdraw("s");
    let refused = step(&mut target, (2, 1), (64, &[9]), 101..102, remote());
    assert_eq!((refused.faulty, refused.refusals), (vec![0], vec![(0, AnswerStatus::Unknown)]));
    assert_eq!(target.digest_slot(2).unwrap(), source.digest_slot(0).unwrap(), "what it read is as it was");
    let stayed = step(&mut source, (0, 0), (0, &[3, 5]), 101..102, RemotePlan::default());
    assert_ne!(target.digest_slot(1).unwrap(), source.digest_slot(0).unwrap(), "what it wrote is garbage");
    assert_ne!(refused.logits, stayed.logits);
}

#[test]
fn a_missed_answer_has_no_reason() {
    let (mut source, mut target) = (source(), executor().with_homes(|_, _, _| RemoteAnswer::Missed));
    bring(&mut source, &mut target);
    let missed = step(&mut target, (1, 2), (64, &[9]), CONTEXT..101, remote());
    assert_eq!((missed.faulty, missed.refusals), (vec![0], vec![]));
}

#[test]
fn planted_faults_of_imports_show() {
    let mut source = source();
    let faults = Faults { import_every: Some(2), damage_every: Some(3), ..Faults::default() };
    let mut target = executor().with_faults(faults);
    let slices = source.export_slot(StateSource::Slot(0)).unwrap();
    let original = source.digest_slot(0).unwrap();
    target.import_state(0, &slices).unwrap();
    assert_eq!(target.digest_slot(0).unwrap(), original);
    assert!(target.import_state(0, &slices).is_err());
    target.import_state(0, &slices).unwrap();
    assert_ne!(target.digest_slot(0).unwrap(), original);
    target.poison(&[0], &[]).unwrap();
    assert!(target.digest_slot(0).is_err());
    source.park(4, 0, &[3, 5]).unwrap();
    assert_eq!(source.export_slot(StateSource::Parked(4)).unwrap(), slices);
}
