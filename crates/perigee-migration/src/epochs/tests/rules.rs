//! The rules one by one, for a reader and against each being dropped.

use super::super::{
    Action, Command, Coordinator, CoordinatorAction, CoordinatorEvent, CoordinatorState, Failure, Outcome, Party,
    PartyEvent, Phase, Report, Side, SourceState, TargetState, Timer, TokenVerdict, first_after, last_beside,
};

fn command(command: Command) -> PartyEvent {
    PartyEvent::Command(command)
}

fn prepare(epoch: u64, next: u64) -> PartyEvent {
    command(Command::Prepare { epoch, next })
}

fn release(epoch: u64, owner_epoch: u64) -> PartyEvent {
    command(Command::Release { epoch, owner_epoch })
}

fn abort(next: u64, epoch: u64) -> PartyEvent {
    command(Command::AbortMove { next, epoch })
}

fn start(epoch: u64) -> PartyEvent {
    command(Command::Start { epoch })
}

fn report(epoch: u64, phase: Phase) -> Action {
    Action::Report(Report { epoch, phase })
}

fn refused(epoch: u64, failure: Failure) -> Vec<Action> {
    vec![report(epoch, Phase::Failed(failure))]
}

/// A replica that runs a session in epoch 5.
fn running() -> Party {
    let mut party = Party::new();
    assert_eq!(party.on(PartyEvent::Submit { epoch: 5 }), []);
    party
}

/// The same, frozen and handed to epoch 6.
fn handed() -> Party {
    let mut party = running();
    assert_eq!(party.on(prepare(5, 6)), [Action::BeginHandoff { next: 6 }]);
    assert_eq!(party.stepping(), Some(5), "it steps while token ids are on their way");
    assert_eq!(party.on(PartyEvent::Frozen { keeps_home: true }), [Action::SendFrozen { next: 6 }]);
    assert_eq!(party.stepping(), None);
    party
}

fn take_over(epoch: u64) -> PartyEvent {
    command(Command::TakeOver { epoch })
}

/// A replica that holds the session for epoch 6.
fn prepared() -> Party {
    let mut party = Party::new();
    assert_eq!(party.on(PartyEvent::Offer { epoch: 5, next: 6, has_room: true }), [Action::Reserve]);
    assert_eq!(party.on(PartyEvent::Part { next: 6 }), []);
    assert_eq!(party.target().state(), TargetState::Receiving { next: 6 });
    assert_eq!(party.on(PartyEvent::Verified { next: 6 }), [Action::Accept]);
    assert_eq!((party.stepping(), party.timer(Side::Target)), (None, Some(Timer::Silence)));
    party
}

#[test]
fn a_source_hands_over_and_lets_go() {
    let mut party = handed();
    assert_eq!(party.on(prepare(5, 6)), [], "the same again changes nothing");
    assert_eq!(party.on(PartyEvent::HandoffVerified { next: 7 }), [], "that was another handoff");
    assert_eq!(party.on(PartyEvent::HandoffVerified { next: 6 }), [report(5, Phase::Ready)]);
    assert_eq!(party.on(prepare(5, 6)), [report(5, Phase::Ready)], "and says again what it said");
    assert_eq!(party.on(prepare(5, 7)), refused(5, Failure::Busy));
    let released = [Action::KeepHome, Action::FreeState, report(5, Phase::Released)];
    assert_eq!(party.on(release(5, 6)), released);
    assert_eq!(party.on(release(5, 6)), [report(5, Phase::Released)]);
    assert_eq!(party.source().unwrap().state(), SourceState::Released { owner_epoch: 6, home: true });
    assert_eq!(party.on(PartyEvent::Query { epoch: 5 }), [Action::RefuseQuery { known: 6 }]);
    assert_eq!(party.on(PartyEvent::Query { epoch: 6 }), [Action::AllowQuery]);
    assert_eq!(party.on(PartyEvent::Query { epoch: 8 }), [Action::AllowQuery], "it moved on");
    assert_eq!(party.on(PartyEvent::Query { epoch: 6 }), [Action::RefuseQuery { known: 8 }]);
    assert_eq!(party.on(PartyEvent::Grace(Side::Source)), [Action::FreePages]);
    assert!(party.is_over());
    assert_eq!(party.on(PartyEvent::Query { epoch: 9 }), [Action::RefuseQuery { known: 8 }]);
}

#[test]
fn a_move_without_pages_left_behind_has_no_home() {
    let mut party = running();
    party.on(prepare(5, 6));
    party.on(PartyEvent::Frozen { keeps_home: false });
    party.on(PartyEvent::HandoffVerified { next: 6 });
    assert_eq!(party.on(release(5, 6)), [Action::FreePages, Action::FreeState, report(5, Phase::Released)]);
    assert_eq!(party.on(PartyEvent::Query { epoch: 6 }), [Action::RefuseQuery { known: 6 }]);
    assert!(party.is_over());
}

#[test]
fn stale_commands_change_nothing_at_a_source() {
    let stale = |known| Failure::Stale { known };
    let mut party = running();
    for (event, answer) in [
        (prepare(4, 6), refused(4, stale(5))),
        (prepare(5, 5), refused(5, stale(5))),
        (release(5, 6), refused(5, stale(5))),
        (abort(4, 6), refused(6, stale(5))),
        (abort(3, 4), refused(4, stale(5))),
        (abort(6, 5), vec![report(5, Phase::Aborted)]),
        (start(5), vec![report(5, Phase::Started)]),
        (start(4), refused(4, stale(5))),
        (PartyEvent::Submit { epoch: 5 }, refused(5, stale(5))),
        (PartyEvent::Ended { epoch: 4 }, vec![]),
    ] {
        assert_eq!(party.on(event), answer, "{event:?}");
        assert_eq!(party.stepping(), Some(5), "{event:?}");
    }
    let mut party = handed();
    let state = party.source().unwrap().state();
    for (event, answer) in [
        (release(5, 7), refused(5, stale(6))),
        (release(5, 5), refused(5, stale(6))),
        (abort(7, 8), refused(8, stale(6))),
        (abort(6, 6), refused(6, stale(6))),
        (PartyEvent::HandoffFailed { next: 5 }, vec![]),
        (PartyEvent::Query { epoch: 5 }, vec![Action::RefuseQuery { known: 6 }]),
    ] {
        assert_eq!(party.on(event), answer, "{event:?}");
        assert_eq!(party.source().unwrap().state(), state, "{event:?}");
    }
}

#[test]
fn an_aborted_move_goes_on_above_the_targets_epoch() {
    let mut party = handed();
    let goes_on = [Action::CancelHandoff, report(7, Phase::Aborted), Action::Resume { epoch: 7 }];
    assert_eq!(party.on(abort(6, 7)), goes_on);
    assert_eq!(party.stepping(), Some(7));
    assert_eq!(party.on(abort(6, 7)), [report(7, Phase::Aborted)], "once is enough");
    assert_eq!(party.on(prepare(5, 6)), refused(5, Failure::Stale { known: 7 }), "late");
    // The command to prepare never came.
    let mut party = running();
    assert_eq!(party.on(abort(6, 7)), [report(7, Phase::Aborted), Action::Resume { epoch: 7 }]);
    // The target refused before anything stood still.
    let mut party = running();
    party.on(prepare(5, 6));
    assert_eq!(party.on(PartyEvent::HandoffFailed { next: 6 }), refused(5, Failure::Handoff));
    assert_eq!(party.stepping(), Some(5));
    // It refused when everything stood still: that is for the router to decide.
    let mut party = handed();
    assert_eq!(party.on(PartyEvent::HandoffFailed { next: 6 }), refused(5, Failure::Handoff));
    assert_eq!(party.stepping(), None);
    assert_eq!(party.on(abort(6, 7)), [report(7, Phase::Aborted), Action::Resume { epoch: 7 }]);
}

#[test]
fn a_session_that_ends_on_the_way_does_not_move() {
    let mut party = running();
    party.on(prepare(5, 6));
    let ended = [Action::CancelHandoff, report(5, Phase::Failed(Failure::Ended)), Action::FreeState, Action::FreePages];
    assert_eq!(party.on(PartyEvent::Ended { epoch: 5 }), ended);
    assert_eq!(party.on(abort(6, 7)), refused(7, Failure::NotHere));
    assert!(party.is_over());
}

#[test]
fn a_target_runs_by_the_routers_word_only() {
    let mut party = prepared();
    assert_eq!(party.on(start(5)), refused(5, Failure::Stale { known: 6 }));
    assert_eq!(party.on(start(7)), refused(7, Failure::NotHere));
    assert_eq!(party.stepping(), None);
    assert_eq!(party.on(start(6)), [report(6, Phase::Started), Action::Run { epoch: 6 }]);
    assert_eq!(party.stepping(), Some(6));
    assert_eq!(party.on(start(6)), [report(6, Phase::Started)]);
    assert_eq!(party.on(abort(6, 7)), refused(7, Failure::Stale { known: 6 }), "it is past that");
}

#[test]
fn a_target_forgets_an_aborted_move() {
    let mut party = prepared();
    assert_eq!(party.on(abort(6, 7)), [Action::FreeReserved, report(7, Phase::Aborted)]);
    assert_eq!(party.on(start(6)), refused(6, Failure::Stale { known: 7 }));
    let offer = |epoch, next| PartyEvent::Offer { epoch, next, has_room: true };
    assert_eq!(party.on(offer(5, 6)), [Action::Refuse(Failure::Stale { known: 7 })]);
    assert_eq!(party.on(offer(7, 8)), [Action::Reserve], "the next attempt is another thing");
    // The word that it is off comes before the handoff does.
    let mut party = Party::new();
    assert_eq!(party.on(abort(6, 7)), refused(7, Failure::NotHere));
    assert_eq!(party.on(offer(5, 6)), [Action::Refuse(Failure::Stale { known: 7 })]);
    // It never comes, and another attempt takes the place.
    let mut party = prepared();
    assert_eq!(party.on(offer(5, 6)), [Action::Refuse(Failure::Stale { known: 6 })]);
    assert_eq!(
        party.on(PartyEvent::Offer { epoch: 7, next: 8, has_room: false }),
        [Action::FreeReserved, Action::Reserve]
    );
    assert_eq!(party.on(PartyEvent::Verified { next: 6 }), [Action::Refuse(Failure::Stale { known: 8 })]);
    assert_eq!(party.on(PartyEvent::Broken { next: 8 }), [Action::FreeReserved, Action::Refuse(Failure::Handoff)]);
    assert!(party.is_over());
}

#[test]
fn a_target_without_room_refuses() {
    let mut party = Party::new();
    let full = PartyEvent::Offer { epoch: 5, next: 6, has_room: false };
    assert_eq!(party.on(full), [Action::Refuse(Failure::Full)]);
    assert!(party.is_over());
    let mut party = running();
    let busy = PartyEvent::Offer { epoch: 5, next: 6, has_room: true };
    assert_eq!(party.on(busy), [Action::Refuse(Failure::Busy)], "it runs here");
}

/// The router dies between ready and commit: both sides park, neither runs, both free everything.
#[test]
fn a_silent_router_parks_both_sides() {
    let (mut source, mut target) = (handed(), prepared());
    source.on(PartyEvent::HandoffVerified { next: 6 });
    assert_eq!(source.on(PartyEvent::Silence(Side::Source)), [Action::Park]);
    assert_eq!(target.on(PartyEvent::Silence(Side::Target)), [Action::Park]);
    assert_eq!((source.stepping(), target.stepping()), (None, None));
    let (mut late_source, mut late_target) = (source.clone(), target.clone());
    assert_eq!(source.on(PartyEvent::Grace(Side::Source)), [Action::FreeState, Action::FreePages]);
    assert_eq!(target.on(PartyEvent::Grace(Side::Target)), [Action::FreeReserved]);
    assert!(source.is_over() && target.is_over());
    assert_eq!(target.on(start(6)), refused(6, Failure::NotHere));
    // It was only slow: its commit still holds, and so does its abort.
    let mut aborted = late_source.clone();
    assert_eq!(late_target.on(start(6)), [report(6, Phase::Started), Action::Run { epoch: 6 }]);
    assert_eq!(late_source.on(release(5, 6)), [Action::KeepHome, Action::FreeState, report(5, Phase::Released)]);
    assert_eq!(aborted.on(abort(5, 7)), refused(7, Failure::NotHere), "that was about another move");
    assert_eq!(aborted.on(abort(6, 7)), [report(7, Phase::Aborted), Action::Resume { epoch: 7 }]);
}

/// A replica parked a session, the router replayed it elsewhere, and chose this replica as the target of a move whose
/// handoff never came. That the move is off does not wake the parked copy.
#[test]
fn an_abort_wakes_no_copy_of_another_move() {
    let mut party = running();
    assert_eq!(party.on(PartyEvent::Silence(Side::Source)), [Action::Park]);
    assert_eq!(party.on(abort(8, 9)), refused(9, Failure::NotHere));
    assert_eq!(party.stepping(), None);
    assert_eq!(
        party.on(PartyEvent::Offer { epoch: 7, next: 8, has_room: true }),
        [Action::FreePages, Action::FreeState, Action::Refuse(Failure::Stale { known: 9 })]
    );
}

/// The release got lost; the owner's first query stands for it.
#[test]
fn a_query_of_the_owner_releases() {
    let mut party = handed();
    party.on(PartyEvent::HandoffVerified { next: 6 });
    assert_eq!(party.on(PartyEvent::Query { epoch: 6 }), [Action::KeepHome, Action::FreeState, Action::AllowQuery]);
    let mut party = running();
    assert_eq!(party.on(PartyEvent::Query { epoch: 9 }), [Action::RefuseQuery { known: 5 }]);
    assert_eq!(party.stepping(), Some(5));
}

#[test]
fn a_home_waits_for_a_session_on_its_way_back() {
    let mut party = handed();
    party.on(PartyEvent::HandoffVerified { next: 6 });
    party.on(release(5, 6));
    assert_eq!(party.timer(Side::Source), Some(Timer::Grace));
    assert_eq!(party.on(PartyEvent::Offer { epoch: 6, next: 7, has_room: true }), [Action::Reserve]);
    assert_eq!(party.timer(Side::Source), None);
    assert_eq!(party.on(PartyEvent::Grace(Side::Source)), []);
    party.on(PartyEvent::Verified { next: 7 });
    assert_eq!(party.on(start(7)), [report(7, Phase::Started), Action::Run { epoch: 7 }]);
    assert!(party.source().unwrap().holds_pages());
    assert_eq!(party.on(PartyEvent::Query { epoch: 6 }), [Action::RefuseQuery { known: 7 }], "it owns the session now");
}

fn send(side: Side, command: Command) -> CoordinatorAction {
    CoordinatorAction::Send(side, command)
}

fn says(coordinator: &mut Coordinator, side: Side, epoch: u64, phase: Phase) -> Vec<CoordinatorAction> {
    coordinator.on(CoordinatorEvent::Report(side, Report { epoch, phase }))
}

fn verdict(coordinator: &mut Coordinator, epoch: u64) -> TokenVerdict {
    coordinator.token(epoch, &mut Vec::new())
}

fn preparing() -> Coordinator {
    let mut coordinator = Coordinator::new(5);
    let prepare = send(Side::Source, Command::Prepare { epoch: 5, next: 6 });
    assert_eq!(coordinator.on(CoordinatorEvent::Begin), [prepare]);
    assert_eq!(coordinator.on(CoordinatorEvent::Begin), [], "one move at a time");
    coordinator
}

#[test]
fn the_router_commits() {
    let mut coordinator = preparing();
    assert_eq!(says(&mut coordinator, Side::Target, 5, Phase::Ready), [], "only the source says so");
    assert_eq!(says(&mut coordinator, Side::Source, 4, Phase::Ready), [], "that was another move");
    assert_eq!(coordinator.on(CoordinatorEvent::Commit), [], "not yet");
    assert_eq!(says(&mut coordinator, Side::Source, 5, Phase::Ready), []);
    assert_eq!(coordinator.state(), CoordinatorState::Ready { next: 6, is_source_lost: false });
    let committed = [
        send(Side::Target, Command::Start { epoch: 6 }),
        send(Side::Source, Command::Release { epoch: 5, owner_epoch: 6 }),
    ];
    assert_eq!(verdict(&mut coordinator, 6), TokenVerdict::Stray, "not before the commit");
    assert_eq!(coordinator.on(CoordinatorEvent::Commit), committed);
    assert_eq!(verdict(&mut coordinator, 5), TokenVerdict::Stray, "not after it");
    assert_eq!(coordinator.on(CoordinatorEvent::Cancel), [], "there is no way back");
    assert_eq!(coordinator.on(CoordinatorEvent::Timeout), committed, "nobody answered");
    assert_eq!(says(&mut coordinator, Side::Source, 5, Phase::Released), []);
    assert_eq!(coordinator.on(CoordinatorEvent::Timeout), committed[..1]);
    let mut actions = Vec::new();
    assert_eq!(coordinator.token(6, &mut actions), TokenVerdict::Accepted);
    assert_eq!(actions, [CoordinatorAction::Finished(Outcome::Moved)], "a token says that it started");
    assert_eq!((coordinator.epoch(), coordinator.is_idle()), (6, true));
}

#[test]
fn the_router_aborts() {
    let off = |side| send(side, Command::AbortMove { next: 6, epoch: 7 });
    for event in [
        CoordinatorEvent::Timeout,
        CoordinatorEvent::Cancel,
        CoordinatorEvent::Report(Side::Source, Report { epoch: 5, phase: Phase::Failed(Failure::Handoff) }),
    ] {
        let mut coordinator = preparing();
        assert_eq!(coordinator.on(event), [off(Side::Source), off(Side::Target)], "{event:?}");
        assert_eq!(verdict(&mut coordinator, 5), TokenVerdict::Accepted, "the source may not have heard of it");
        assert_eq!(verdict(&mut coordinator, 6), TokenVerdict::Stray);
        assert_eq!(says(&mut coordinator, Side::Source, 5, Phase::Ready), [], "too late");
        assert_eq!(says(&mut coordinator, Side::Target, 7, Phase::Aborted), []);
        let finished = [CoordinatorAction::Finished(Outcome::Aborted)];
        assert_eq!(says(&mut coordinator, Side::Source, 7, Phase::Aborted), finished);
        assert_eq!(verdict(&mut coordinator, 5), TokenVerdict::Stray);
        assert_eq!(verdict(&mut coordinator, 7), TokenVerdict::Accepted);
    }
    let mut coordinator = preparing();
    assert_eq!(coordinator.on(CoordinatorEvent::Lost(Side::Target)), [off(Side::Source)], "the source goes on");
}

#[test]
fn the_router_replays_what_neither_side_has() {
    let replay = |epoch| [CoordinatorAction::Replay { epoch }, CoordinatorAction::Finished(Outcome::Replayed)];
    // The owner is lost and nothing is under way.
    let mut coordinator = Coordinator::new(5);
    assert_eq!(coordinator.on(CoordinatorEvent::Lost(Side::Source)), [CoordinatorAction::Replay { epoch: 6 }]);
    // The source is lost before it said that the target is ready: the target's epoch is barred, below the replay's.
    let mut coordinator = preparing();
    let off = send(Side::Target, Command::AbortMove { next: 6, epoch: 7 });
    assert_eq!(coordinator.on(CoordinatorEvent::Lost(Side::Source)), [&[off][..], &replay(8)].concat());
    assert_eq!(verdict(&mut coordinator, 5), TokenVerdict::Stray);
    // After that: commit all the same.
    let mut coordinator = preparing();
    says(&mut coordinator, Side::Source, 5, Phase::Ready);
    assert_eq!(coordinator.on(CoordinatorEvent::Lost(Side::Source)), []);
    let mut both_lost = coordinator.clone();
    assert_eq!(coordinator.on(CoordinatorEvent::Commit), [send(Side::Target, Command::Start { epoch: 6 })]);
    assert_eq!(both_lost.on(CoordinatorEvent::Lost(Side::Target)), [&[off][..], &replay(8)].concat());
    // The target does not have it after all.
    let lost = says(&mut coordinator, Side::Target, 6, Phase::Failed(Failure::NotHere));
    assert_eq!(lost, replay(7));
    // The source lost it while the router aborted.
    let mut coordinator = preparing();
    coordinator.on(CoordinatorEvent::Lost(Side::Target));
    assert_eq!(says(&mut coordinator, Side::Source, 7, Phase::Failed(Failure::NotHere)), replay(8));
    // Nobody ever answers.
    let mut coordinator = preparing();
    coordinator.on(CoordinatorEvent::Lost(Side::Target));
    for _ in 0..3 {
        assert_eq!(coordinator.on(CoordinatorEvent::Timeout).len(), 1);
    }
    assert_eq!(coordinator.on(CoordinatorEvent::Timeout), replay(8));
}

#[test]
fn the_end_of_a_session_ends_its_move() {
    let off = send(Side::Target, Command::AbortMove { next: 6, epoch: 7 });
    let finished = CoordinatorAction::Finished(Outcome::Ended);
    let mut coordinator = preparing();
    assert_eq!(coordinator.on(CoordinatorEvent::Ended), [off, finished]);
    assert_eq!(coordinator.on(CoordinatorEvent::Ended), []);
    assert_eq!(verdict(&mut coordinator, 5), TokenVerdict::Stray);
    let mut coordinator = Coordinator::new(5);
    assert_eq!(coordinator.on(CoordinatorEvent::Ended), [], "nothing was under way");
    assert_eq!(coordinator.on(CoordinatorEvent::Lost(Side::Source)), [], "and nothing will be");
}

#[test]
fn another_router_takes_a_session_over_that_stands_still_or_runs() {
    let mut parked = running();
    assert_eq!(parked.on(PartyEvent::Silence(Side::Source)), [Action::Park]);
    assert_eq!((parked.stepping(), parked.timer(Side::Source)), (None, Some(Timer::Grace)));
    for mut party in [parked, running()] {
        let epoch = first_after(5);
        let taken = [report(epoch, Phase::Started), Action::Resume { epoch }];
        assert_eq!(party.on(take_over(epoch)), taken);
        assert_eq!(party.stepping(), Some(epoch));
        assert_eq!(party.on(take_over(epoch)), [report(epoch, Phase::Started)], "the same once more");
        // Whatever the first router still says is of the past, up to the last epoch that it can make.
        assert_eq!(party.on(prepare(5, 6)), refused(5, Failure::Stale { known: epoch }));
        assert_eq!(party.on(PartyEvent::Ended { epoch: last_beside(5) }), []);
        assert_eq!(party.on(PartyEvent::Submit { epoch: 7 }), refused(7, Failure::Stale { known: epoch }));
        assert_eq!(party.on(take_over(5)), refused(5, Failure::Stale { known: epoch }));
        assert_eq!(party.stepping(), Some(epoch));
    }
}

#[test]
fn nobody_takes_over_what_is_between_two_replicas_or_gone() {
    let epoch = first_after(6);
    assert_eq!(handed().on(take_over(epoch)), refused(epoch, Failure::Busy));
    let mut parked = handed();
    parked.on(PartyEvent::Silence(Side::Source));
    assert_eq!(parked.on(take_over(epoch)), refused(epoch, Failure::Parked));
    let mut over = running();
    over.on(PartyEvent::Silence(Side::Source));
    assert_eq!(over.on(PartyEvent::Grace(Side::Source)), [Action::FreeState, Action::FreePages]);
    assert_eq!(over.on(take_over(epoch)), refused(epoch, Failure::NotHere));
    assert_eq!(Party::new().on(take_over(epoch)), refused(epoch, Failure::NotHere));
    assert_eq!(prepared().on(take_over(epoch)), refused(epoch, Failure::NotHere), "not the owner yet");
}

#[test]
fn a_router_that_takes_over_accepts_its_own_epoch_alone_and_replays_where_nobody_has_the_session() {
    let began = |known| {
        let mut coordinator = Coordinator::new(1);
        let epoch = first_after(known);
        let actions = coordinator.on(CoordinatorEvent::TakeOver { known });
        assert_eq!(actions, [CoordinatorAction::Send(Side::Source, Command::TakeOver { epoch })]);
        assert!(coordinator.is_waiting() && !coordinator.is_idle());
        (coordinator, epoch)
    };
    let (mut taken, epoch) = began(5);
    assert_eq!(taken.token(5, &mut Vec::new()), TokenVerdict::Stray);
    let started = CoordinatorEvent::Report(Side::Source, Report { epoch, phase: Phase::Started });
    assert_eq!(taken.on(started), []);
    assert!(taken.is_idle() && taken.token(epoch, &mut Vec::new()) == TokenVerdict::Accepted);
    // Its first token says the same.
    let (mut heard, epoch) = began(first_after(5));
    assert_eq!(heard.token(epoch, &mut Vec::new()), TokenVerdict::Accepted);
    assert!(heard.is_idle());

    let replay = CoordinatorAction::Replay { epoch: first_after(5) + 1 };
    let refused = Report { epoch: first_after(5), phase: Phase::Failed(Failure::NotHere) };
    for event in [CoordinatorEvent::Report(Side::Source, refused), CoordinatorEvent::Lost(Side::Source)] {
        let (mut coordinator, _) = began(5);
        assert_eq!(coordinator.on(event), [replay, CoordinatorAction::Finished(Outcome::Replayed)]);
        assert!(coordinator.is_idle());
    }
    let (mut silent, epoch) = began(5);
    for _ in 0..3 {
        let again = CoordinatorAction::Send(Side::Source, Command::TakeOver { epoch });
        assert_eq!(silent.on(CoordinatorEvent::Timeout), [again]);
    }
    assert_eq!(silent.on(CoordinatorEvent::Timeout)[0], replay);
}
