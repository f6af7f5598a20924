//! What the engine keeps of a session's moves: its party, timers, the handoffs under way and the home entry. Plain data;
//! what happens with it is `party`'s business.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use perigee_migration::epochs::{Side, Timer};
use perigee_migration::handoff::Totals;
use perigee_migration::{Mode, Party};
use tokio::sync::mpsc::UnboundedSender;

use super::pairs::OfferedPair;
use super::{Arriving, MoveConfig, MoveFacts, SourcePart, Target, Way};
use crate::request::{RouterId, SessionId};

/// All sessions that are, were or may come here.
pub(crate) type Seats = BTreeMap<SessionId, Seat>;

/// One session's moves at this replica.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    pub(crate) party: Party,
    /// Who hears of it.
    pub(crate) router: Option<RouterId>,
    /// Of the source's side and the target's.
    timers: [Option<(Timer, Instant)>; 2],
    /// When something last happened.
    touched: Option<Instant>,
    /// Whether it was ever more than a session that runs here.
    pub(crate) has_moved: bool,
    /// Where it shall go.
    pub(crate) order: Option<(Target, Mode)>,
    pub(crate) outgoing: Option<Link>,
    pub(crate) arriving: Option<Box<Arriving>>,
    /// Key of its home entry in the scheduler.
    pub(crate) home: Option<u64>,
    pub(crate) course: Course,
    /// What failed last, for the next report.
    pub(crate) error: String,
}

/// A handoff on its way out.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) next: u64,
    pub(crate) parts: UnboundedSender<SourcePart>,
    /// Tokens handed in.
    pub(crate) tokens: usize,
    pub(crate) mode: Mode,
    /// How the state goes, once the target has said it.
    pub(crate) way: Way,
    /// The pair that was offered.
    pub(crate) pair: Option<OfferedPair>,
}

/// What a move came to so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Course {
    /// Set while a move is under way.
    pub(crate) mode: Option<Mode>,
    pub(crate) frozen_at: Option<Instant>,
    pub(crate) export: Duration,
    pub(crate) facts: Option<MoveFacts>,
}

impl Course {
    /// The target has verified everything.
    pub(crate) fn verified(&mut self, bytes: Totals, (mode, way): (Mode, Way), now: Instant) {
        let frozen = self.frozen_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.facts = Some(MoveFacts { bytes, frozen, export: self.export, mode, way });
    }
}

const SIDES: [Side; 2] = [Side::Source, Side::Target];

impl Seat {
    /// Something happened: the timers of `side` begin anew, or both sides'. Others begin where they are new.
    pub(crate) fn touch(&mut self, side: Option<Side>, now: Instant, config: &MoveConfig) {
        self.touched = Some(now);
        for (index, this) in SIDES.into_iter().enumerate() {
            let timer = self.party.timer(this);
            let is_new = self.timers[index].map(|(old, _)| old) != timer;
            if is_new || side.is_none_or(|side| side == this) {
                self.timers[index] = timer.map(|timer| (timer, now + duration(timer, config)));
            }
        }
    }

    /// A timer that ran out, if there is one; it will not be told again before it began anew.
    pub(crate) fn expired(&mut self, now: Instant) -> Option<(Side, Timer)> {
        for (index, side) in SIDES.into_iter().enumerate() {
            if let Some((timer, due)) = self.timers[index]
                && due <= now
            {
                self.timers[index] = None;
                return Some((side, timer));
            }
        }
        None
    }

    /// Whether a timer ran out.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.timers.iter().flatten().any(|(_, due)| *due <= now)
    }

    /// The router is there after all: the silence begins anew.
    pub(crate) fn wait_on(&mut self, side: Side, timer: Timer, now: Instant, config: &MoveConfig) {
        let index = usize::from(side == Side::Target);
        self.timers[index] = Some((timer, now + duration(timer, config)));
    }

    /// Whether nothing is held and nobody can still ask: late messages were told what they missed for long enough.
    pub(crate) fn is_over(&self, now: Instant, config: &MoveConfig) -> bool {
        let is_quiet = self.touched.is_none_or(|touched| now.saturating_duration_since(touched) > config.grace);
        is_quiet && self.party.is_over() && self.outgoing.is_none() && self.arriving.is_none() && self.home.is_none()
    }
}

fn duration(timer: Timer, config: &MoveConfig) -> Duration {
    match timer {
        Timer::Silence => config.silence,
        Timer::Grace => config.grace,
    }
}
