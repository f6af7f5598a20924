//! Moves between the wire and the engine's plain types: orders in, reports and refusals out. It is the one place that
//! knows how a failure is told, by kind, code and known epoch.

use std::time::Duration;

use perigee_engine::moves::{HandoffRefused, Prepare, Reported, Target};
use perigee_engine::request::SessionId;
use perigee_migration::epochs::{Failure, Phase};
use perigee_migration::{HandoffError, Mode};
use perigee_proto::internal::{self, MoveFailure, MoveMode, MovePhase, MoveReport};
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
    }
    wire
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
        HandoffRefused::Record(_) | HandoffRefused::Lost { .. } | HandoffRefused::NotOffered => {
            because("HANDOFF_REFUSED", ErrorKind::FailedPrecondition)
        }
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
