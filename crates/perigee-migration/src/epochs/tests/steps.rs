//! The steps that the system of `world.rs` can take in a state, faults among them, and the order in which it takes them
//! when it is left in peace.

use super::super::source::{HandoffAnswer, SourceState};
use super::super::{CoordinatorState, Side, Timer};
use super::world::{Handoff, REPLICAS, Replica, ToReplica, ToRouter, World, from_wire};

/// One step of the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Begin(usize),
    Commit,
    Deliver(usize, usize),
    Hear(usize),
    Hand(usize),
    Freeze(usize),
    Decode(usize),
    NoAnswer(usize),
    NoticeLoss(Side),
    // Faults, each of which costs one of the budget.
    Lose(usize, usize),
    Double(usize, usize),
    LoseReport(usize),
    DoubleReport(usize),
    LoseHandoff(usize),
    Kill(usize),
    KillRouter,
    Timeout,
    Cancel,
    Silence(usize, Side),
    // Timers of states that wait for nobody else: free.
    Grace(usize, Side),
}

impl Step {
    pub(super) fn is_fault(&self) -> bool {
        !matches!(
            self,
            Self::Begin(_)
                | Self::Commit
                | Self::Deliver(..)
                | Self::Hear(_)
                | Self::Hand(_)
                | Self::Freeze(_)
                | Self::Decode(_)
                | Self::NoAnswer(_)
                | Self::NoticeLoss(_)
                | Self::Grace(..)
        )
    }
}

impl Step {
    /// Whether something is lost by it that a move may need.
    pub(super) fn is_harm(&self) -> bool {
        self.is_fault() && !matches!(self, Self::Double(..) | Self::DoubleReport(_) | Self::Cancel)
    }

    /// Whether it uses up what the session can still do: its tokens, or the time that others wait.
    pub(super) fn is_ending(&self) -> bool {
        matches!(self, Self::Decode(_) | Self::Grace(..) | Self::NoAnswer(_))
    }
}

impl Replica {
    fn is_attached(&self) -> bool {
        !self.is_dead && !self.lost_lease
    }

    /// Nothing said of a session overtakes the request itself.
    fn may_deliver(&self, message: usize) -> bool {
        let epoch = match self.from_router[message] {
            ToReplica::Command(kind, a, b) => from_wire(kind, a, b).epoch(),
            ToReplica::Abort { epoch } => epoch,
            ToReplica::Submit { .. } => return true,
        };
        !self.from_router.iter().any(|other| matches!(other, ToReplica::Submit { epoch: mine, .. } if *mine < epoch))
    }
}

impl World {
    /// Every step that can be taken.
    pub(super) fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        if !self.is_router_dead {
            self.router_steps(&mut steps);
        }
        for (index, replica) in self.replicas.iter().enumerate().filter(|(_, replica)| !replica.is_dead) {
            let messages = 0..replica.from_router.len();
            steps.extend(
                messages.clone().filter(|&message| replica.may_deliver(message)).map(|m| Step::Deliver(index, m)),
            );
            if replica.party.stepping().is_some() {
                steps.push(Step::Decode(index));
            }
            if self.is_freezing(index) {
                steps.push(Step::Freeze(index));
            }
            if self.waits_for_nobody(index) {
                steps.push(Step::NoAnswer(index));
            }
            for side in [Side::Source, Side::Target] {
                if replica.party.timer(side) == Some(Timer::Grace) && !self.is_forgotten(index, side) {
                    steps.push(Step::Grace(index, side));
                }
            }
            if self.faults == 0 {
                continue;
            }
            steps.push(Step::Kill(index));
            // A lost request is the relay's affair, not a move's: it is never lost here.
            let can_be_lost = |&message: &usize| !matches!(replica.from_router[message], ToReplica::Submit { .. });
            steps.extend(messages.clone().filter(can_be_lost).map(|message| Step::Lose(index, message)));
            steps.extend(messages.map(|message| Step::Double(index, message)));
            if let Some(ToRouter::Report(_)) = replica.to_router.front() {
                steps.extend([Step::LoseReport(index), Step::DoubleReport(index)]);
            }
            for side in [Side::Source, Side::Target] {
                let steps_now = side == Side::Source && replica.party.stepping().is_some();
                if steps_now || replica.party.timer(side) == Some(Timer::Silence) {
                    steps.push(Step::Silence(index, side));
                }
            }
        }
        steps.extend((0..self.handoffs.len()).filter(|&handoff| self.may_arrive(handoff)).map(Step::Hand));
        if self.faults > 0 {
            steps.extend((0..self.handoffs.len()).map(Step::LoseHandoff));
        }
        steps
    }

    fn router_steps(&self, steps: &mut Vec<Step>) {
        if self.coordinator.is_idle() && self.moves > 0 {
            let others = (0..REPLICAS).filter(|&other| other != self.owner && self.replicas[other].is_attached());
            steps.extend(others.map(Step::Begin));
        }
        if matches!(self.coordinator.state(), CoordinatorState::Ready { .. }) {
            steps.push(Step::Commit);
        }
        steps.extend((0..REPLICAS).filter(|&r| !self.replicas[r].to_router.is_empty()).map(Step::Hear));
        for (side, replica) in [(Side::Source, self.owner), (Side::Target, self.target)] {
            let is_of_move = side == Side::Source || !self.coordinator.is_idle();
            let is_lost = self.replicas[replica].is_dead || self.replicas[replica].lost_lease;
            if is_of_move && is_lost && self.is_anyone_alive() && self.coordinator.state() != CoordinatorState::Ended {
                steps.push(Step::NoticeLoss(side));
            }
        }
        if self.faults > 0 {
            steps.push(Step::KillRouter);
            steps.extend(self.coordinator.is_waiting().then_some(Step::Timeout));
            let can_cancel =
                matches!(self.coordinator.state(), CoordinatorState::Preparing { .. } | CoordinatorState::Ready { .. });
            steps.extend(can_cancel.then_some(Step::Cancel));
        }
    }

    /// Lets the system come to rest without further faults: messages first, then what the router notices, then timers.
    pub(super) fn settle(&mut self) {
        for _ in 0..400 {
            let Some(step) = self.next_in_peace() else { return };
            self.take(&step);
        }
        panic!("it does not come to rest: {self:#?}");
    }

    fn next_in_peace(&self) -> Option<Step> {
        let steps = self.steps();
        let is_work =
            |step: &&Step| !step.is_fault() && !matches!(step, Step::Begin(_) | Step::NoticeLoss(_) | Step::Grace(..));
        if let Some(step) = steps.iter().find(is_work) {
            return Some(step.clone());
        }
        let loss = steps.iter().filter(|step| matches!(step, Step::NoticeLoss(_))).find(|step| {
            let mut after = self.clone();
            after.take(step);
            after != *self
        });
        if let Some(loss) = loss {
            return Some(loss.clone());
        }
        if !self.is_router_dead && self.coordinator.is_waiting() {
            return Some(Step::Timeout);
        }
        for (index, replica) in self.replicas.iter().enumerate().filter(|(_, replica)| !replica.is_dead) {
            for side in [Side::Source, Side::Target] {
                let is_orphan = self.is_router_dead && side == Side::Source && replica.party.stepping().is_some();
                if is_orphan || replica.party.timer(side) == Some(Timer::Silence) {
                    return Some(Step::Silence(index, side));
                }
            }
        }
        steps.into_iter().find(|step| matches!(step, Step::Grace(..)))
    }

    /// Whether a timer that matters is set on a side: the grace of nothing is not.
    fn is_forgotten(&self, replica: usize, side: Side) -> bool {
        let replica = &self.replicas[replica];
        match side {
            Side::Source => replica.party.source().is_none_or(|source| !source.holds_pages() && !source.holds_state()),
            Side::Target => replica.party.target().holding().is_none(),
        }
    }

    fn is_freezing(&self, replica: usize) -> bool {
        let state = self.replicas[replica].party.source().map(|source| source.state());
        matches!(state, Some(SourceState::Freezing { .. }))
    }

    /// The epoch to which a replica is handing the session, without an answer so far.
    pub(super) fn handing(&self, replica: usize) -> Option<u64> {
        use SourceState::{Freezing, Handed};
        match self.replicas[replica].party.source()?.state() {
            Freezing { next, .. } | Handed { next, answer: HandoffAnswer::Pending, .. } => Some(next),
            _ => None,
        }
    }

    /// A handoff stands still and nothing of it is on its way: the transport's timeout will say so.
    fn waits_for_nobody(&self, replica: usize) -> bool {
        let Some(epoch) = self.handing(replica) else { return false };
        let is_of_it = |handoff: &Handoff| match handoff {
            Handoff::Offer { next, .. } | Handoff::Frozen { next, .. } | Handoff::Answer { next, .. } => *next == epoch,
            Handoff::Broken { .. } => false,
        };
        !self.is_freezing(replica) && !self.handoffs.iter().any(|(_, _, handoff)| is_of_it(handoff))
    }

    /// A handoff is one stream: its header comes first.
    fn may_arrive(&self, handoff: usize) -> bool {
        let Handoff::Frozen { next: mine, .. } = self.handoffs[handoff].2 else { return true };
        !self.handoffs.iter().any(|(_, _, other)| matches!(other, Handoff::Offer { next, .. } if *next == mine))
    }
}
