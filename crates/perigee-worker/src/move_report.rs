//! Moves between the wire and the engine's plain types: orders in, reports and refusals out, and what the two sides of a
//! handoff say before its session stands still. It is the one place that
//! knows how a failure is told, by kind, code and known epoch.

use std::time::Duration;

use perigee_engine::moves::{Demand, HandoffRefused, PairAnswer, PairOffer, Prepare, Reported, Room, Target, Way};
use perigee_engine::request::SessionId;
use perigee_migration::epochs::{Failure, Phase};
use perigee_migration::{HandoffError, Mode};
use perigee_proto::internal::{
    self, HandoffDemand, HandoffRoom, MoveFailure, MoveMode, MovePhase, MoveReport, StateWay,
};
use perigee_proto::status::{ErrorKind, WireError};

/// When a source may offer a session again to a replica without room for it.
const ROOM_RETRY: Duration = Duration::from_secs(1);

/// A router's order to hand a session over.
///
/// # Errors
/// A report that refuses it: no router of this version leaves out what moves.
pub(crate) fn order(prepare: internal::Prepare) -> Result<Prepare, Box<MoveReport>> {
    let mode = match prepare.mode() {
        MoveMode::Split => Mode::Split,
        MoveMode::Whole => Mode::Whole,
        MoveMode::Unspecified => {
            return Err(Box::new(MoveReport {
                session: prepare.session,
                epoch: prepare.epoch,
                phase: MovePhase::Failed.into(),
                code: ErrorKind::InvalidArgument.grpc_code() as i32,
                message: "mode: expected split or whole".to_owned(),
                ..MoveReport::default()
            }));
        }
    };
    Ok(Prepare {
        session: SessionId(prepare.session),
        epoch: prepare.epoch,
        next: prepare.next_epoch,
        target: Target {
            replica: prepare.target,
            incarnation: prepare.target_incarnation,
            endpoint: prepare.target_endpoint,
        },
        mode,
    })
}

/// How far a move is here.
pub(crate) fn report(reported: Reported) -> MoveReport {
    let (phase, failure) = match reported.report.phase {
        Phase::Ready => (MovePhase::Ready, None),
        Phase::Started => (MovePhase::Started, None),
        Phase::Released => (MovePhase::Released, None),
        Phase::Aborted => (MovePhase::Aborted, None),
        Phase::Failed(failure) => (MovePhase::Failed, Some(failure)),
    };
    let mut wire = MoveReport {
        session: reported.session.0,
        epoch: reported.report.epoch,
        phase: phase.into(),
        message: reported.message,
        ..MoveReport::default()
    };
    if let Some(failure) = failure {
        let (kind, known) = told(failure);
        wire.failure = kind.into();
        wire.known = known;
        wire.code = kind_of(failure).grpc_code() as i32;
        if wire.message.is_empty() {
            wire.message = failure.to_string();
        }
    }
    if let Some(facts) = reported.facts {
        wire.state_bytes = facts.bytes.state();
        wire.page_bytes = facts.bytes.pages;
        wire.token_bytes = facts.bytes.tokens;
        wire.frozen_us = micros(facts.frozen);
        wire.export_us = micros(facts.export);
        wire.mode = mode(facts.mode).into();
        wire.way = told_way(facts.way).into();
    }
    wire
}

/// What a session needs of its target, as it is told.
pub(crate) fn demand(demand: Demand) -> HandoffDemand {
    let Demand { pages, positions, remote, slots, pair } = demand;
    let pair_ready = pair.as_ref().is_some_and(|offer| offer.is_ready);
    let pair = pair.map(|offer| offer.invitations).unwrap_or_default();
    HandoffDemand { pages, positions, remote, slots, pair, pair_ready }
}

/// The same as the target hears it.
pub(crate) fn demanded(demand: HandoffDemand) -> Demand {
    let HandoffDemand { pages, positions, remote, slots, pair, pair_ready } = demand;
    let pair = (!pair.is_empty()).then_some(PairOffer { invitations: pair, is_ready: pair_ready });
    Demand { pages, positions, remote, slots, pair }
}

/// What a target says once it has room, as it is told.
pub(crate) fn told_room(room: Room) -> HandoffRoom {
    let pair = match room.pair {
        PairAnswer::Refused => internal::PairAnswer::Unspecified,
        PairAnswer::Meets => internal::PairAnswer::Meets,
        PairAnswer::Ready => internal::PairAnswer::Ready,
    };
    HandoffRoom { reaches_slots: room.way == Way::Slots, way: told_way(room.way).into(), pair: pair.into() }
}

/// The same as the source hears it.
pub(crate) fn room(told: &HandoffRoom) -> Room {
    let way = match told.way() {
        StateWay::Pair => Way::Pair,
        StateWay::Slots => Way::Slots,
        StateWay::Unspecified if told.reaches_slots => Way::Slots,
        StateWay::Unspecified => Way::Stream,
    };
    let pair = match told.pair() {
        internal::PairAnswer::Unspecified => PairAnswer::Refused,
        internal::PairAnswer::Meets => PairAnswer::Meets,
        internal::PairAnswer::Ready => PairAnswer::Ready,
    };
    Room { way, pair }
}

fn told_way(way: Way) -> StateWay {
    match way {
        Way::Stream => StateWay::Unspecified,
        Way::Slots => StateWay::Slots,
        Way::Pair => StateWay::Pair,
    }
}

/// Why a handoff is not taken, as the source's call ends with it.
pub(crate) fn refused(refused: &HandoffRefused) -> WireError {
    let message = refused.to_string();
    let because = |reason, kind| WireError { reason: Some(reason), ..WireError::new(kind, message.clone()) };
    match refused {
        HandoffRefused::Failure(Failure::Stale { known }) => stale(*known, message),
        HandoffRefused::Failure(Failure::Busy) => because("SESSION_BUSY", ErrorKind::Aborted),
        HandoffRefused::Failure(Failure::Full) => {
            WireError { reason: Some("NO_ROOM"), ..WireError::exhausted(message, ROOM_RETRY) }
        }
        HandoffRefused::Failure(failure) => because("HANDOFF_REFUSED", kind_of(*failure)),
        HandoffRefused::Handoff(HandoffError::Epoch { known, .. }) => stale(*known, message),
        HandoffRefused::Handoff(error) if is_mismatch(error) => {
            because("REPLICA_DIFFERS", ErrorKind::FailedPrecondition)
        }
        HandoffRefused::Handoff(_) | HandoffRefused::Digest(_) => {
            because("HANDOFF_DAMAGED", ErrorKind::InvalidArgument)
        }
        HandoffRefused::Record(_)
        | HandoffRefused::Grammar(_)
        | HandoffRefused::Lost { .. }
        | HandoffRefused::NotOffered => because("HANDOFF_REFUSED", ErrorKind::FailedPrecondition),
        HandoffRefused::Ranks(_) => because("HANDOFF_REFUSED", ErrorKind::Internal),
        HandoffRefused::Stopped => because("REPLICA_STOPPED", ErrorKind::Unavailable),
    }
}

fn stale(known: u64, message: String) -> WireError {
    let error = WireError { reason: Some("STALE_EPOCH"), ..WireError::new(ErrorKind::Aborted, message) };
    error.with_fact("epoch", known.to_string())
}

/// Whether nothing is wrong with a handoff but that this replica is another kind than its source.
fn is_mismatch(error: &HandoffError) -> bool {
    matches!(
        error,
        HandoffError::Version { .. }
            | HandoffError::Model { .. }
            | HandoffError::Geometry { .. }
            | HandoffError::Sizes(_)
            | HandoffError::Dtype { .. }
            | HandoffError::Limit { .. }
    )
}

/// A failure's kind on the wire, and the epoch that goes with it.
fn told(failure: Failure) -> (MoveFailure, u64) {
    match failure {
        Failure::Stale { known } => (MoveFailure::Stale, known),
        Failure::Busy => (MoveFailure::Busy, 0),
        Failure::NotHere => (MoveFailure::NotHere, 0),
        Failure::Parked => (MoveFailure::Parked, 0),
        Failure::Full => (MoveFailure::Full, 0),
        Failure::Handoff => (MoveFailure::Handoff, 0),
        Failure::Ended => (MoveFailure::Ended, 0),
    }
}

fn kind_of(failure: Failure) -> ErrorKind {
    match failure {
        Failure::Stale { .. } | Failure::Busy => ErrorKind::Aborted,
        Failure::NotHere | Failure::Ended => ErrorKind::NotFound,
        Failure::Parked | Failure::Handoff => ErrorKind::FailedPrecondition,
        Failure::Full => ErrorKind::ResourceExhausted,
    }
}

fn mode(mode: Mode) -> MoveMode {
    match mode {
        Mode::Split => MoveMode::Split,
        Mode::Whole => MoveMode::Whole,
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use perigee_engine::moves::{MoveFacts, RecordError};
    use perigee_migration::epochs::Report;
    use perigee_migration::handoff::Totals;
    use tonic::{Code, Status};

    use super::*;

    fn reported(phase: Phase) -> Reported {
        let session = SessionId("s".to_owned());
        Reported { before: 0, session, report: Report { epoch: 4, phase }, message: String::new(), facts: None }
    }

    #[test]
    fn an_order_keeps_every_field_and_needs_a_mode() {
        let wire = internal::Prepare {
            session: "s".to_owned(),
            epoch: 4,
            next_epoch: 5,
            target: "b".to_owned(),
            target_endpoint: "b:1".to_owned(),
            target_incarnation: "run".to_owned(),
            mode: MoveMode::Split.into(),
        };
        let target = Target { replica: "b".to_owned(), incarnation: "run".to_owned(), endpoint: "b:1".to_owned() };
        let expected = Prepare { session: SessionId("s".to_owned()), epoch: 4, next: 5, target, mode: Mode::Split };
        assert_eq!(order(wire.clone()), Ok(expected));
        let refused = order(internal::Prepare { mode: 0, ..wire }).expect_err("no mode");
        assert_eq!((refused.session.as_str(), refused.epoch, refused.phase()), ("s", 4, MovePhase::Failed));
        assert!(refused.message.starts_with("mode"), "{}", refused.message);
    }

    #[test]
    fn phases_and_failures_keep_their_names_on_the_wire() {
        for (phase, wire) in [
            (Phase::Ready, MovePhase::Ready),
            (Phase::Started, MovePhase::Started),
            (Phase::Released, MovePhase::Released),
            (Phase::Aborted, MovePhase::Aborted),
        ] {
            let report = report(reported(phase));
            assert_eq!(
                (report.phase(), report.epoch, report.failure(), report.code),
                (wire, 4, MoveFailure::Unspecified, 0)
            );
        }
        for (failure, wire, known, code) in [
            (Failure::Stale { known: 9 }, MoveFailure::Stale, 9, Code::Aborted),
            (Failure::Busy, MoveFailure::Busy, 0, Code::Aborted),
            (Failure::NotHere, MoveFailure::NotHere, 0, Code::NotFound),
            (Failure::Parked, MoveFailure::Parked, 0, Code::FailedPrecondition),
            (Failure::Full, MoveFailure::Full, 0, Code::ResourceExhausted),
            (Failure::Handoff, MoveFailure::Handoff, 0, Code::FailedPrecondition),
            (Failure::Ended, MoveFailure::Ended, 0, Code::NotFound),
        ] {
            let report = report(reported(Phase::Failed(failure)));
            assert_eq!((report.phase(), report.failure(), report.known), (MovePhase::Failed, wire, known));
            assert_eq!((report.code, report.message), (code as i32, failure.to_string()));
        }
    }

    #[test]
    fn a_ready_report_tells_bytes_and_times() {
        let bytes = Totals { recurrent: 100, tails: 20, partial_pages: 3, pages: 7, tokens: 40, record: 9 };
        let (frozen, export) = (Duration::from_micros(1500), Duration::from_micros(400));
        let facts = Some(MoveFacts { bytes, frozen, export, mode: Mode::Whole, way: Way::Pair });
        let report = report(Reported { facts, ..reported(Phase::Ready) });
        assert_eq!((report.state_bytes, report.page_bytes, report.token_bytes), (123, 7, 40));
        assert_eq!((report.frozen_us, report.export_us, report.mode()), (1500, 400, MoveMode::Whole));
        assert_eq!(report.way(), StateWay::Pair);
    }

    #[test]
    fn both_sides_mean_the_same_by_what_they_say_before_a_session_stands_still() {
        let invitations = vec![vec![1, 2], vec![3]];
        for pair in [None, Some(false), Some(true)] {
            let pair = pair.map(|is_ready| PairOffer { invitations: invitations.clone(), is_ready });
            let said = Demand { pages: 3, positions: 700, remote: 64, slots: vec![vec![9]], pair };
            assert_eq!(demanded(demand(said.clone())), said);
        }
        for way in [Way::Stream, Way::Slots, Way::Pair] {
            for pair in [PairAnswer::Refused, PairAnswer::Meets, PairAnswer::Ready] {
                assert_eq!(room(&told_room(Room { way, pair })), Room { way, pair });
            }
        }
        let former = HandoffRoom { reaches_slots: true, ..HandoffRoom::default() };
        assert_eq!(room(&former), Room { way: Way::Slots, pair: PairAnswer::Refused });
    }

    #[test]
    fn refusals_have_a_code_for_what_can_be_done() {
        let dtype = HandoffError::Dtype {
            what: "latents",
            expected: perigee_backend::DType::Bf16,
            found: perigee_backend::DType::Fp32,
        };
        let model = HandoffError::Model { expected: "m".to_owned(), found: "n".to_owned() };
        let epoch = HandoffError::Epoch { session: "s".to_owned(), epoch: 1, next: 2, known: 7 };
        for (refusal, code, word) in [
            (Failure::Stale { known: 7 }.into(), Code::Aborted, "epoch 7"),
            (Failure::Busy.into(), Code::Aborted, "in use"),
            (Failure::Full.into(), Code::ResourceExhausted, "room"),
            (epoch.into(), Code::Aborted, "epoch 7"),
            (model.into(), Code::FailedPrecondition, "digest n"),
            (dtype.into(), Code::FailedPrecondition, "latents"),
            (HandoffError::Version { expected: 1, found: 2 }.into(), Code::FailedPrecondition, "version 2"),
            (HandoffError::Trailing { bytes: 5 }.into(), Code::InvalidArgument, "trailer"),
            (RecordError::Version { found: 3 }.into(), Code::FailedPrecondition, "version 3"),
            (HandoffRefused::Lost { positions: 64 }, Code::FailedPrecondition, "64 positions"),
            (HandoffRefused::NotOffered, Code::FailedPrecondition, "does not take"),
            (HandoffRefused::Ranks("no".to_owned()), Code::Internal, "ranks"),
            (HandoffRefused::Stopped, Code::Unavailable, "stopped"),
        ] as [(HandoffRefused, Code, &str); 13]
        {
            let status = Status::from(refused(&refusal));
            assert_eq!(status.code(), code, "{refusal:?}");
            assert!(status.message().contains(word), "{word} is not in {}", status.message());
        }
        assert_eq!(refused(&Failure::Stale { known: 7 }.into()).facts.get("epoch").map(String::as_str), Some("7"));
        assert_eq!(refused(&Failure::Full.into()).retry_after, Some(ROOM_RETRY));
    }
}
