//! Pairs of ranks as the engine sees them: which there are with which target, when new ones are offered, and the state that
//! goes by one while its session stands still. Both ends meet in the background, from the first handoff on, which goes another
//! way; where a pair breaks its state is sent in the stream, and a new one is offered after a while. How bytes go by a pair is
//! the backend's business.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use perigee_backend::{PairEnd, PairOrder, PairState};
use perigee_migration::HeldState;

use super::source::non_fatal;
use super::{PairAnswer, PairOffer, Room, SourcePart, Target, Way};
use crate::executor::{ExecutorError, StateSource};
use crate::request::SessionId;
use crate::scheduler::StateAt;
use crate::step::{EngineCore, Fatal};

/// How long a target of which a pair broke, or which did not answer an offer, is left alone.
const RETRY: Duration = Duration::from_secs(10);
/// How long one that refused a pair: settings and devices change with another run.
const REFUSED: Duration = Duration::from_secs(300);

/// The pairs with every target, by replica and incarnation.
#[derive(Debug, Default)]
pub(crate) struct PairBook(BTreeMap<(String, String), Known>);

/// What is known of the pairs with one target.
#[derive(Debug)]
struct Known {
    invitations: Vec<Vec<u8>>,
    stage: Stage,
    /// Until when the target is left alone, unless the pairs were met.
    until: Instant,
    /// The handoff whose state goes by them, as far as it has not ended.
    user: Option<(SessionId, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Told to the target, which has not answered.
    Invited,
    /// The target meets them or has.
    Met,
    /// There are none.
    Off,
}

/// A handoff's part in pairs, at its source.
#[derive(Debug)]
pub(crate) struct OfferedPair {
    /// Which target.
    key: (String, String),
    offer: PairOffer,
    /// The state that is on its way, while it is.
    sending: Option<HeldState>,
}

/// A handoff's part in pairs, at its target.
#[derive(Debug)]
pub(crate) struct ArrivingPair {
    pub(super) invitations: Vec<Vec<u8>>,
    /// Whether the ranks wait for the state.
    pub(super) is_expected: bool,
}

/// What became of a state that is on its way by a pair.
pub(super) enum Sent {
    /// It still is.
    Underway,
    /// The target has it.
    There(HeldState),
    /// It has to go another way.
    Lost,
}

impl EngineCore {
    /// What this handoff offers its target of pairs.
    pub(super) fn offer_pair(&mut self, session: &SessionId, next: u64, target: &Target) -> Option<OfferedPair> {
        let takes_part = self.config.moves.as_ref().is_some_and(|config| config.ways.contains(&Way::Pair));
        if !takes_part {
            return None;
        }
        let key = (target.replica.clone(), target.incarnation.clone());
        let now = self.config.clock.now();
        // Those of a run that is over are of no use.
        let over: Vec<_> = self.pairs.0.keys().filter(|known| known.0 == key.0 && known.1 != key.1).cloned().collect();
        over.iter().for_each(|known| self.end_pairs(known));
        let found = self.pairs.0.get_mut(&key).map(|known| (known.stage, known.until > now, known));
        let found = match found {
            Some((Stage::Invited | Stage::Off, true, _)) => return None,
            // Whatever became of that handoff, its invitations hold.
            Some((Stage::Invited, false, known)) => {
                known.until = now + RETRY;
                let offer = PairOffer { invitations: known.invitations.clone(), is_ready: false };
                return Some(OfferedPair { key, offer, sending: None });
            }
            Some((stage, ..)) => Some(stage),
            None => None,
        };
        if found == Some(Stage::Met) {
            match self.look_at(&key) {
                PairState::Ready if !self.is_in_use(&key) => return self.use_pair(key, (session, next)),
                PairState::Broken(why) => tracing::warn!(to = key.0, why, "a pair with another replica is over"),
                PairState::Meeting | PairState::Ready | PairState::Busy => return None,
            }
        }
        self.end_pairs(&key);
        match self.executor.invite_pairs() {
            Ok(Some(invitations)) => {
                let (stage, until) = (Stage::Invited, now + RETRY);
                let known = Known { invitations: invitations.clone(), stage, until, user: None };
                self.pairs.0.insert(key.clone(), known);
                Some(OfferedPair { key, offer: PairOffer { invitations, is_ready: false }, sending: None })
            }
            Ok(None) => None,
            // An executor that is broken shows at the next step.
            Err(error) => {
                tracing::debug!(%error, "no pair is offered");
                None
            }
        }
    }

    fn use_pair(&mut self, key: (String, String), (session, next): (&SessionId, u64)) -> Option<OfferedPair> {
        let known = self.pairs.0.get_mut(&key)?;
        known.user = Some((session.clone(), next));
        let offer = PairOffer { invitations: known.invitations.clone(), is_ready: true };
        Some(OfferedPair { key, offer, sending: None })
    }

    /// The order to meet the other end. A state that takes half as long as silence may last goes another way then.
    fn meet(&self, end: PairEnd) -> PairOrder {
        let silence = self.config.moves.as_ref().map_or(Duration::ZERO, |config| config.silence);
        PairOrder::Meet { end, patience: silence / 2 }
    }

    /// Whether a handoff that has not ended uses them.
    fn is_in_use(&self, key: &(String, String)) -> bool {
        let user = self.pairs.0.get(key).and_then(|known| known.user.as_ref());
        user.is_some_and(|(session, next)| {
            let link = self.seats.get(session).and_then(|seat| seat.outgoing.as_ref());
            link.is_some_and(|link| link.next == *next)
        })
    }

    fn look_at(&mut self, key: &(String, String)) -> PairState {
        let Some(known) = self.pairs.0.get(key) else { return PairState::Broken("there is none".into()) };
        let looked = self.executor.pairs(&known.invitations, PairOrder::Look);
        looked.unwrap_or_else(|error| PairState::Broken(error.to_string()))
    }

    /// Ends the pairs with a target, if there are any.
    fn end_pairs(&mut self, key: &(String, String)) {
        if let Some(known) = self.pairs.0.remove(key)
            && let Err(error) = self.executor.pairs(&known.invitations, PairOrder::Close)
        {
            tracing::debug!(%error, "a pair was not closed");
        }
    }

    /// Ends them and leaves the target alone for a while.
    fn give_up_pairs(&mut self, key: &(String, String), retry: Duration) {
        self.end_pairs(key);
        let until = self.config.clock.now() + retry;
        let known = Known { invitations: Vec::new(), stage: Stage::Off, until, user: None };
        self.pairs.0.insert(key.clone(), known);
    }

    /// The target has room, and has answered this offer.
    pub(super) fn pair_answered(&mut self, offered: &OfferedPair, room: Room) {
        let OfferedPair { key, offer, .. } = offered;
        // It may have been answered for another handoff, or given up meanwhile.
        let is_known = |known: &&mut Known| known.invitations == offer.invitations;
        let Some(known) = self.pairs.0.get_mut(key).filter(is_known) else { return };
        match (offer.is_ready, room.pair) {
            (false, PairAnswer::Meets | PairAnswer::Ready) => {
                known.stage = Stage::Met;
                let order = self.meet(PairEnd::Source);
                match self.executor.pairs(&offer.invitations, order) {
                    Ok(PairState::Broken(why)) => {
                        tracing::warn!(to = key.0, why, "a pair cannot be met");
                        self.give_up_pairs(key, RETRY);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(to = key.0, %error, "a pair cannot be met");
                        self.give_up_pairs(key, RETRY);
                    }
                }
            }
            (false, PairAnswer::Refused) => self.give_up_pairs(key, REFUSED),
            // It has lost what this side still has: the next handoff offers new ones.
            (true, PairAnswer::Refused) => self.end_pairs(key),
            (true, _) if room.way != Way::Pair => known.user = None,
            (true, _) => {}
        }
    }

    /// Begins to send a slot by the pairs that a handoff offered; whether it is on its way.
    pub(super) fn send_by_pair(&mut self, session: &SessionId, held: HeldState) -> bool {
        let Some(offered) = self.offered_pair(session) else { return false };
        let (key, invitations) = (offered.key.clone(), offered.offer.invitations.clone());
        let why = match self.executor.pairs(&invitations, PairOrder::Send { slot: held.slot }) {
            Ok(PairState::Busy | PairState::Ready) => {
                if let Some(offered) = self.offered_pair(session) {
                    offered.sending = Some(held);
                }
                return true;
            }
            Ok(PairState::Meeting) => "it has not been met".into(),
            Ok(PairState::Broken(why)) => why,
            Err(error) => error.to_string(),
        };
        tracing::warn!(session = session.0, to = key.0, why, "a state goes in the stream, not by its pair");
        self.give_up_pairs(&key, RETRY);
        false
    }

    fn offered_pair(&mut self, session: &SessionId) -> Option<&mut OfferedPair> {
        self.seats.get_mut(session)?.outgoing.as_mut()?.pair.as_mut()
    }

    /// What became of the state that goes by a pair.
    fn look_for_sent(&mut self, session: &SessionId) -> Sent {
        let Some(offered) = self.offered_pair(session) else { return Sent::Lost };
        let (key, invitations) = (offered.key.clone(), offered.offer.invitations.clone());
        let Some(held) = offered.sending.clone() else { return Sent::Lost };
        let why = match self.executor.pairs(&invitations, PairOrder::Look) {
            Ok(PairState::Busy) => return Sent::Underway,
            Ok(PairState::Ready) => {
                if let Some(offered) = self.offered_pair(session) {
                    offered.sending = None;
                }
                return Sent::There(held);
            }
            Ok(PairState::Meeting) => "it has not been met".into(),
            Ok(PairState::Broken(why)) => why,
            Err(error) => error.to_string(),
        };
        tracing::warn!(session = session.0, to = key.0, why, "a pair broke; its state goes in the stream");
        self.give_up_pairs(&key, RETRY);
        Sent::Lost
    }

    /// A handoff whose state goes by a pair asks how far that is.
    pub(crate) fn handoff_underway(&mut self, session: &SessionId, next: u64) -> Result<(), Fatal> {
        let link = self.seats.get(session).and_then(|seat| seat.outgoing.as_ref()).filter(|link| link.next == next);
        let Some(parts) = link.map(|link| link.parts.clone()) else { return Ok(()) };
        let sent = self.look_for_sent(session);
        // Nobody takes parts any more where the target has refused meanwhile: why it did is in the inbox already.
        match sent {
            Sent::Underway => drop(parts.send(SourcePart::Underway)),
            Sent::There(held) => drop(parts.send(SourcePart::Held(held)).and_then(|()| parts.send(SourcePart::End))),
            Sent::Lost => {
                let id = self.names.get(session).copied();
                let frozen = id.and_then(|id| self.scheduler.frozen(id)).map(|frozen| frozen.state);
                let Some(StateAt::Slot(slot)) = frozen else { return Ok(()) };
                match self.executor.export_slot(StateSource::Slot(slot)) {
                    Ok(state) => {
                        self.note_way(session, Way::Stream);
                        drop(parts.send(SourcePart::State(state)).and_then(|()| parts.send(SourcePart::End)));
                    }
                    Err(error) => {
                        let message = non_fatal(error)?;
                        return self.handoff_done(session, next, Err(message));
                    }
                }
            }
        }
        Ok(())
    }

    /// A handoff is over that may have had a state on its way by a pair: the other end may never take it.
    pub(super) fn pair_left(&mut self, offered: Option<OfferedPair>) {
        if let Some(OfferedPair { key, sending: Some(_), .. }) = offered {
            self.give_up_pairs(&key, RETRY);
        }
    }

    /// What this replica, as the target, says to an offer.
    pub(super) fn answer_pair(&mut self, offer: Option<&PairOffer>) -> PairAnswer {
        let takes_part = self.config.moves.as_ref().is_some_and(|config| config.ways.contains(&Way::Pair));
        let Some(offer) = offer.filter(|_| takes_part) else { return PairAnswer::Refused };
        let order = if offer.is_ready { PairOrder::Look } else { self.meet(PairEnd::Target) };
        match self.executor.pairs(&offer.invitations, order) {
            Ok(PairState::Meeting | PairState::Busy) => PairAnswer::Meets,
            Ok(PairState::Ready) => PairAnswer::Ready,
            Ok(PairState::Broken(why)) => {
                tracing::debug!(why, "a pair is refused");
                self.close_pairs(&offer.invitations);
                PairAnswer::Refused
            }
            Err(error) => {
                tracing::debug!(%error, "a pair is refused");
                PairAnswer::Refused
            }
        }
    }

    /// The ranks wait for the state from here on. Where they cannot, the source finds out and sends it.
    pub(super) fn expect_pair(&mut self, session: &SessionId, next: u64) -> Result<(), Fatal> {
        let Ok(arriving) = self.arriving(session, next) else { return Ok(()) };
        let Some(pair) = arriving.pair.as_mut().filter(|pair| !pair.is_expected) else { return Ok(()) };
        pair.is_expected = true;
        let invitations = pair.invitations.clone();
        self.told(PairOrder::Expect, &invitations)
    }

    /// Ends what waits for a state that comes another way, or not at all.
    pub(super) fn drop_expected(&mut self, pair: Option<ArrivingPair>) -> Result<(), Fatal> {
        match pair {
            Some(pair) if pair.is_expected => self.told(PairOrder::Close, &pair.invitations),
            _ => Ok(()),
        }
    }

    fn close_pairs(&mut self, invitations: &[Vec<u8>]) {
        if let Err(error) = self.executor.pairs(invitations, PairOrder::Close) {
            tracing::debug!(%error, "a pair was not closed");
        }
    }

    fn told(&mut self, order: PairOrder, invitations: &[Vec<u8>]) -> Result<(), Fatal> {
        match self.executor.pairs(invitations, order) {
            Ok(state) => tracing::trace!(?order, ?state, "pairs were told"),
            Err(error) => {
                let why = non_fatal(error)?;
                tracing::debug!(?order, why, "pairs could not be told");
            }
        }
        Ok(())
    }
}

impl OfferedPair {
    /// What the target is told.
    pub(super) fn offer(&self) -> PairOffer {
        self.offer.clone()
    }
}

/// Writes what came by a pair to a slot.
pub(super) fn take(
    executor: &mut dyn crate::executor::Executor,
    invitations: &[Vec<u8>],
    slot: u32,
) -> Result<(), ExecutorError> {
    match executor.pairs(invitations, PairOrder::Take { slot })? {
        PairState::Broken(why) => Err(ExecutorError { rank: 0, message: why, fatal: false }),
        PairState::Meeting | PairState::Ready | PairState::Busy => Ok(()),
    }
}
