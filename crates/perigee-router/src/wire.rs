//! Between the machines of moves and the messages that carry them: commands to replicas out, their reports in, and the names
//! of modes. Values only; who sends what is decided elsewhere.

use perigee_migration::Mode;
use perigee_migration::epochs::{Command, Failure, Phase, Report};
use perigee_proto::internal::{
    AbortMove, MoveFailure, MoveMode, MovePhase, MoveReport, Prepare, Release, Start, TakeOver, router_message::Body,
};
use perigee_proto::v1::MigrateMode;

use crate::transit::Transit;

/// A command of a session's move as its replica gets it.
pub(crate) fn command(session: &str, command: Command, transit: &Transit) -> Body {
    let session = session.to_owned();
    let target = &transit.target.identity;
    match command {
        Command::Prepare { epoch, next } => Body::Prepare(Prepare {
            session,
            epoch,
            next_epoch: next,
            target: target.replica.to_string(),
            target_endpoint: transit.endpoint.clone(),
            target_incarnation: target.incarnation.clone(),
            mode: match transit.mode {
                Mode::Split => MoveMode::Split.into(),
                Mode::Whole => MoveMode::Whole.into(),
            },
        }),
        Command::Start { epoch } => Body::Start(Start { session, epoch }),
        Command::Release { epoch, owner_epoch } => {
            Body::Release(Release { session, epoch, owner: target.replica.to_string(), owner_epoch })
        }
        Command::AbortMove { next, epoch } => Body::AbortMove(AbortMove { session, next_epoch: next, epoch }),
        // Outside moves more is said with it.
        Command::TakeOver { epoch } => Body::TakeOver(TakeOver { session, epoch, ..TakeOver::default() }),
    }
}

/// What a replica said of a move; none where it says nothing.
pub(crate) fn report(message: &MoveReport) -> Option<Report> {
    let phase = match message.phase() {
        MovePhase::Unspecified => return None,
        MovePhase::Ready => Phase::Ready,
        MovePhase::Started => Phase::Started,
        MovePhase::Released => Phase::Released,
        MovePhase::Aborted => Phase::Aborted,
        MovePhase::Failed => Phase::Failed(match message.failure() {
            MoveFailure::Stale => Failure::Stale { known: message.known },
            MoveFailure::Busy => Failure::Busy,
            MoveFailure::NotHere => Failure::NotHere,
            MoveFailure::Parked => Failure::Parked,
            MoveFailure::Full => Failure::Full,
            MoveFailure::Ended => Failure::Ended,
            // A failure without a kind is one of carrying it out.
            MoveFailure::Handoff | MoveFailure::Unspecified => Failure::Handoff,
        }),
    };
    Some(Report { epoch: message.epoch, phase })
}

/// A failure in a word, for programs.
pub(crate) fn failure_word(failure: Failure) -> &'static str {
    match failure {
        Failure::Stale { .. } => "STALE_EPOCH",
        Failure::Busy => "BUSY",
        Failure::NotHere => "NOT_HERE",
        Failure::Parked => "PARKED",
        Failure::Full => "FULL",
        Failure::Handoff => "HANDOFF_FAILED",
        Failure::Ended => "ENDED",
    }
}

/// What moved, as a replica tells it; none where it does not.
pub(crate) fn mode(mode: MoveMode) -> Option<Mode> {
    match mode {
        MoveMode::Unspecified => None,
        MoveMode::Split => Some(Mode::Split),
        MoveMode::Whole => Some(Mode::Whole),
    }
}

/// A mode in the metrics and the log.
pub(crate) fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Split => "split",
        Mode::Whole => "whole",
    }
}

/// A mode as operators see it.
pub(crate) fn public_mode(mode: Mode) -> MigrateMode {
    match mode {
        Mode::Split => MigrateMode::Split,
        Mode::Whole => MigrateMode::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_reads_as_what_it_says() {
        let plain = |phase: MovePhase| MoveReport { epoch: 7, phase: phase.into(), ..MoveReport::default() };
        let phases = [
            (MovePhase::Ready, Phase::Ready),
            (MovePhase::Started, Phase::Started),
            (MovePhase::Released, Phase::Released),
            (MovePhase::Aborted, Phase::Aborted),
            (MovePhase::Failed, Phase::Failed(Failure::Handoff)),
        ];
        for (sent, read) in phases {
            assert_eq!(report(&plain(sent)), Some(Report { epoch: 7, phase: read }));
        }
        assert_eq!(report(&plain(MovePhase::Unspecified)), None);
        let failures = [
            (MoveFailure::Stale, Failure::Stale { known: 9 }),
            (MoveFailure::Busy, Failure::Busy),
            (MoveFailure::NotHere, Failure::NotHere),
            (MoveFailure::Parked, Failure::Parked),
            (MoveFailure::Full, Failure::Full),
            (MoveFailure::Handoff, Failure::Handoff),
            (MoveFailure::Ended, Failure::Ended),
        ];
        let mut words = std::collections::BTreeSet::new();
        for (sent, read) in failures {
            let message = MoveReport { failure: sent.into(), known: 9, ..plain(MovePhase::Failed) };
            assert_eq!(report(&message), Some(Report { epoch: 7, phase: Phase::Failed(read) }));
            words.insert(failure_word(read));
        }
        assert_eq!(words.len(), failures.len());
    }
}
