//! Three replicas, one router and the messages between them, as plain data: a state of the whole system, the steps that it
//! can take, and what must hold in each.
//!
//! Commands and handoffs arrive in any order, late, doubled or never. What a replica says to its router stays in order,
//! but reports may be lost or doubled. Timers fire whenever they like. Replicas and the router die.

use std::collections::VecDeque;

use super::super::{
    Action, Command, Coordinator, CoordinatorAction, CoordinatorEvent, CoordinatorState, Outcome, Party, PartyEvent,
    Report, Side, SourceState, TokenVerdict,
};
use super::steps::Step;

pub(super) const REPLICAS: usize = 3;

/// From a router to a replica.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ToReplica {
    Command(u8, u64, u64),
    Submit { epoch: u64, tokens: u8 },
    Abort { epoch: u64 },
}

/// From a replica to its router.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum ToRouter {
    Report(Report),
    Token { epoch: u64, index: u8 },
}

/// Between replicas.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Handoff {
    Offer { epoch: u64, next: u64 },
    Frozen { next: u64, tokens: u8, homes: u8 },
    Broken { next: u64 },
    Answer { next: u64, is_accepted: bool },
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Replica {
    pub(super) is_dead: bool,
    /// It parked by its own clock: the router's lease ran out, from its point of view.
    pub(super) lost_lease: bool,
    pub(super) party: Party,
    /// Tokens of the copy that runs or stands here.
    tokens: u8,
    /// Replicas that hold latents of the copy that runs or stands here, one bit each.
    homes: u8,
    /// Tokens and homes of the copy that arrived.
    arrived: (u8, u8),
    pub(super) has_state: bool,
    pub(super) has_pages: bool,
    pub(super) has_reserved: bool,
    pub(super) from_router: Vec<ToReplica>,
    pub(super) to_router: VecDeque<ToRouter>,
}

/// The whole system.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) replicas: [Replica; REPLICAS],
    pub(super) coordinator: Coordinator,
    pub(super) is_router_dead: bool,
    pub(super) delivered: u8,
    /// Tokens of the session: it ends with the last.
    tokens: u8,
    pub(super) owner: usize,
    pub(super) target: usize,
    /// (epoch at the target, target) of every move.
    targets: Vec<(u64, usize)>,
    /// (from, to, what), sorted, so that equal states look equal.
    pub(super) handoffs: Vec<(usize, usize, Handoff)>,
    pub(super) faults: u8,
    /// Whether something was lost, rather than late or doubled.
    is_harmed: bool,
    timeouts: u8,
    pub(super) moves: u8,
    /// How the last move went, for tests that count.
    pub(super) outcomes: Vec<Outcome>,
}

fn to_wire(command: Command) -> ToReplica {
    match command {
        Command::Prepare { epoch, next } => ToReplica::Command(0, epoch, next),
        Command::Start { epoch } => ToReplica::Command(1, epoch, 0),
        Command::Release { epoch, owner_epoch } => ToReplica::Command(2, epoch, owner_epoch),
        Command::AbortMove { next, epoch } => ToReplica::Command(3, next, epoch),
        Command::TakeOver { epoch } => ToReplica::Command(4, epoch, 0),
    }
}

pub(super) fn from_wire(kind: u8, a: u64, b: u64) -> Command {
    match kind {
        0 => Command::Prepare { epoch: a, next: b },
        1 => Command::Start { epoch: a },
        2 => Command::Release { epoch: a, owner_epoch: b },
        3 => Command::AbortMove { next: a, epoch: b },
        _ => Command::TakeOver { epoch: a },
    }
}

impl World {
    /// A session that runs on replica 0.
    pub(super) fn new(moves: u8, faults: u8, tokens: u8) -> Self {
        let mut replicas: [Replica; REPLICAS] = Default::default();
        assert!(replicas[0].party.on(PartyEvent::Submit { epoch: 1 }).is_empty());
        replicas[0].has_state = true;
        replicas[0].has_pages = true;
        Self {
            replicas,
            coordinator: Coordinator::new(1),
            is_router_dead: false,
            delivered: 0,
            tokens,
            owner: 0,
            target: 1,
            targets: Vec::new(),
            handoffs: Vec::new(),
            faults,
            is_harmed: false,
            timeouts: 0,
            moves,
            outcomes: Vec::new(),
        }
    }

    /// Takes a step.
    pub(super) fn take(&mut self, step: &Step) {
        self.faults = self.faults.saturating_sub(step.is_fault().into());
        self.is_harmed |= step.is_harm();
        match *step {
            Step::Begin(target) => {
                self.moves -= 1;
                self.target = target;
                self.coordinate(CoordinatorEvent::Begin);
                if let CoordinatorState::Preparing { next } = self.coordinator.state() {
                    self.targets.push((next, target));
                }
            }
            Step::Commit => self.coordinate(CoordinatorEvent::Commit),
            Step::Cancel => self.coordinate(CoordinatorEvent::Cancel),
            Step::Timeout => self.coordinate(CoordinatorEvent::Timeout),
            Step::NoticeLoss(side) => self.notice_loss(side),
            Step::Deliver(replica, message) => {
                let message = self.replicas[replica].from_router.remove(message);
                self.deliver(replica, &message);
            }
            Step::Lose(replica, message) => drop(self.replicas[replica].from_router.remove(message)),
            Step::Double(replica, message) => {
                let message = self.replicas[replica].from_router[message].clone();
                self.send(replica, message);
            }
            Step::Hear(replica) => {
                let message = self.replicas[replica].to_router.pop_front().unwrap();
                self.hear(replica, &message);
            }
            Step::LoseReport(replica) => drop(self.replicas[replica].to_router.pop_front()),
            Step::DoubleReport(replica) => {
                let report = self.replicas[replica].to_router[0].clone();
                self.replicas[replica].to_router.push_front(report);
            }
            Step::Hand(handoff) => {
                let (from, to, handoff) = self.handoffs.remove(handoff);
                self.hand(from, to, &handoff);
            }
            Step::LoseHandoff(handoff) => drop(self.handoffs.remove(handoff)),
            Step::Freeze(replica) => self.party(replica, PartyEvent::Frozen { keeps_home: true }),
            Step::Decode(replica) => self.decode(replica),
            Step::NoAnswer(replica) => {
                let next = self.handing(replica).unwrap();
                self.party(replica, PartyEvent::HandoffFailed { next });
            }
            Step::Kill(replica) => {
                self.handoffs.retain(|(_, to, _)| *to != replica);
                self.replicas[replica] = Replica { is_dead: true, ..Replica::default() };
            }
            Step::KillRouter => {
                self.is_router_dead = true;
                self.replicas.iter_mut().for_each(|replica| replica.to_router.clear());
            }
            Step::Silence(replica, side) => {
                self.replicas[replica].lost_lease |= self.replicas[replica].party.stepping().is_some();
                self.party(replica, PartyEvent::Silence(side));
            }
            Step::Grace(replica, side) => self.party(replica, PartyEvent::Grace(side)),
        }
        self.check();
    }

    /// What holds in every state.
    fn check(&self) {
        let accepted = self.coordinator.epoch();
        let owners = self.replicas.iter().filter(|replica| replica.party.stepping() == Some(accepted)).count();
        assert!(owners <= 1, "{owners} replicas step epoch {accepted}: {self:#?}");
        for (index, replica) in self.replicas.iter().enumerate() {
            let source = replica.party.source();
            let holds = (
                source.is_some_and(|source| source.holds_state()),
                source.is_some_and(|source| source.holds_pages()),
                replica.party.target().holding().is_some(),
            );
            let has = (replica.has_state, replica.has_pages, replica.has_reserved);
            assert_eq!(holds, has, "slots, pages, reserved on {index}: {self:#?}");
        }
    }

    /// Everything that the session ever was is delivered, and nothing is left of it.
    pub(super) fn is_settled(&self) -> bool {
        let is_free = |replica: &Replica| !(replica.has_state || replica.has_pages || replica.has_reserved);
        let is_done = self.is_router_dead || self.delivered == self.tokens;
        is_done && self.replicas.iter().all(is_free)
    }

    pub(super) fn is_anyone_alive(&self) -> bool {
        self.replicas.iter().any(|replica| !replica.is_dead)
    }

    fn decode(&mut self, index: usize) {
        let epoch = self.replicas[index].party.stepping().unwrap();
        let homes = self.replicas[index].homes;
        (0..REPLICAS).filter(|home| homes & 1 << home != 0).for_each(|home| self.ask(home, epoch));
        let replica = &mut self.replicas[index];
        let token = ToRouter::Token { epoch, index: replica.tokens };
        replica.tokens += 1;
        let is_last = replica.tokens >= self.tokens;
        if !self.is_router_dead {
            replica.to_router.push_back(token);
        }
        if is_last {
            self.party(index, PartyEvent::Ended { epoch });
        }
    }

    /// A step asks the homes of its latents. A home entry that is still there answers the owner, whether or not it was told
    /// that there is one.
    fn ask(&mut self, home: usize, epoch: u64) {
        let replica = &mut self.replicas[home];
        let is_home = match replica.party.source().map(|source| source.state()) {
            Some(SourceState::Handed { next, .. }) => epoch >= next,
            Some(SourceState::Released { home, .. }) => home,
            _ => false,
        };
        if is_home && epoch == self.coordinator.epoch() {
            let mut answer = replica.party.clone();
            assert!(answer.on(PartyEvent::Query { epoch }).contains(&Action::AllowQuery), "{self:#?}");
        }
        self.party(home, PartyEvent::Query { epoch });
    }

    fn hear(&mut self, replica: usize, message: &ToRouter) {
        match *message {
            ToRouter::Report(report) => {
                let side = [(self.owner, Side::Source), (self.target, Side::Target)];
                let side = side.into_iter().find(|(of_move, _)| *of_move == replica);
                if let Some((_, side)) = side {
                    self.coordinate(CoordinatorEvent::Report(side, report));
                }
            }
            ToRouter::Token { epoch, index } => {
                let mut actions = Vec::new();
                let verdict = self.coordinator.token(epoch, &mut actions);
                self.carry_out(actions);
                if verdict == TokenVerdict::Stray {
                    self.send(replica, ToReplica::Abort { epoch });
                    return;
                }
                assert_eq!(index, self.delivered, "tokens come without gap or repeat: {self:#?}");
                self.delivered += 1;
                if self.delivered == self.tokens {
                    self.coordinate(CoordinatorEvent::Ended);
                }
            }
        }
    }

    fn notice_loss(&mut self, side: Side) {
        let lost = if side == Side::Source { self.owner } else { self.target };
        // The stream is closed: what was on it is gone, and the replica may attach anew.
        self.replicas[lost].to_router.clear();
        self.replicas[lost].lost_lease = false;
        self.coordinate(CoordinatorEvent::Lost(side));
    }

    fn coordinate(&mut self, event: CoordinatorEvent) {
        let epoch = self.coordinator.epoch();
        self.timeouts += u8::from(event == CoordinatorEvent::Timeout);
        let actions = self.coordinator.on(event);
        if actions.iter().any(|action| matches!(action, CoordinatorAction::Replay { .. })) {
            // Only where it had to be: something was lost, and nobody goes on with the session all the same. Who is asked
            // again and again and never answers is given up even so.
            let goes_on = self.replicas.iter().any(|replica| replica.party.stepping() == Some(epoch));
            assert!(self.is_harmed && (!goes_on || self.timeouts > 3), "a needless replay: {self:#?}");
        }
        self.carry_out(actions);
    }

    fn carry_out(&mut self, actions: Vec<CoordinatorAction>) {
        for action in actions {
            match action {
                CoordinatorAction::Send(side, command) => {
                    let replica = if side == Side::Source { self.owner } else { self.target };
                    self.send(replica, to_wire(command));
                }
                CoordinatorAction::Finished(Outcome::Moved) => {
                    self.owner = self.target;
                    self.outcomes.push(Outcome::Moved);
                }
                CoordinatorAction::Finished(outcome) => self.outcomes.push(outcome),
                CoordinatorAction::Replay { epoch } => {
                    let alive = (0..REPLICAS).rev().find(|&replica| !self.replicas[replica].is_dead);
                    self.owner = alive.unwrap_or(self.owner);
                    self.send(self.owner, ToReplica::Submit { epoch, tokens: self.delivered });
                }
            }
        }
    }

    fn send(&mut self, replica: usize, message: ToReplica) {
        if !self.replicas[replica].is_dead {
            let messages = &mut self.replicas[replica].from_router;
            messages.push(message);
            messages.sort();
        }
    }

    fn deliver(&mut self, replica: usize, message: &ToReplica) {
        match *message {
            ToReplica::Command(kind, a, b) => self.party(replica, PartyEvent::Command(from_wire(kind, a, b))),
            ToReplica::Abort { epoch } => self.party(replica, PartyEvent::Ended { epoch }),
            ToReplica::Submit { epoch, tokens } => {
                if std::mem::take(&mut self.replicas[replica].lost_lease) {
                    // It attached anew; what was on the stream before is gone.
                    self.replicas[replica].to_router.clear();
                }
                self.party(replica, PartyEvent::Submit { epoch });
                let replica = &mut self.replicas[replica];
                if replica.party.stepping() == Some(epoch) && !replica.has_state {
                    (replica.has_state, replica.has_pages) = (true, true);
                    (replica.tokens, replica.homes) = (tokens, 0);
                }
            }
        }
    }

    fn hand(&mut self, from: usize, to: usize, handoff: &Handoff) {
        match *handoff {
            Handoff::Offer { epoch, next } => {
                self.party(to, PartyEvent::Offer { epoch, next, has_room: true });
                let is_taken = self.replicas[to].party.target().holding() == Some(next);
                if !is_taken {
                    self.answer(to, from, next, false);
                }
            }
            Handoff::Frozen { next, tokens, homes } => {
                let before = self.replicas[to].party.clone();
                self.party(to, PartyEvent::Part { next });
                self.party(to, PartyEvent::Verified { next });
                let party = &self.replicas[to].party;
                let is_taken = before != *party && party.target().holding() == Some(next);
                if is_taken {
                    self.replicas[to].arrived = (tokens, homes);
                }
                self.answer(to, from, next, is_taken);
            }
            Handoff::Broken { next } => self.party(to, PartyEvent::Broken { next }),
            Handoff::Answer { next, is_accepted: true } => self.party(to, PartyEvent::HandoffVerified { next }),
            Handoff::Answer { next, is_accepted: false } => self.party(to, PartyEvent::HandoffFailed { next }),
        }
    }

    fn target_of(&self, next: u64) -> usize {
        self.targets.iter().find(|(epoch, _)| *epoch == next).unwrap().1
    }

    fn answer(&mut self, from: usize, to: usize, next: u64, is_accepted: bool) {
        self.hand_over(from, to, Handoff::Answer { next, is_accepted });
    }

    fn hand_over(&mut self, from: usize, to: usize, handoff: Handoff) {
        if !self.replicas[to].is_dead {
            self.handoffs.push((from, to, handoff));
            self.handoffs.sort();
        }
    }

    /// Gives a replica an event and does what it says.
    fn party(&mut self, index: usize, event: PartyEvent) {
        if self.replicas[index].is_dead {
            return;
        }
        let epoch = self.replicas[index].party.stepping().unwrap_or_default();
        let actions = self.replicas[index].party.on(event);
        for action in actions {
            let replica = &mut self.replicas[index];
            let free = |held: &mut bool| assert!(std::mem::take(held), "{action:?} of what is not held");
            let take = |held: &mut bool| assert!(!std::mem::replace(held, true), "{action:?} of what is held");
            match action {
                Action::Report(report) if !self.is_router_dead => replica.to_router.push_back(ToRouter::Report(report)),
                Action::FreeState => free(&mut replica.has_state),
                Action::FreePages => free(&mut replica.has_pages),
                Action::FreeReserved => free(&mut replica.has_reserved),
                Action::Reserve => take(&mut replica.has_reserved),
                Action::Run { .. } => {
                    free(&mut replica.has_reserved);
                    take(&mut replica.has_state);
                    replica.has_pages = true;
                    (replica.tokens, replica.homes) = replica.arrived;
                    // What it holds itself is local again.
                    replica.homes &= !(1 << index);
                }
                Action::BeginHandoff { next } => {
                    self.hand_over(index, self.target_of(next), Handoff::Offer { epoch, next })
                }
                Action::SendFrozen { next } => {
                    let (tokens, homes) = (replica.tokens, replica.homes | 1 << index);
                    self.hand_over(index, self.target_of(next), Handoff::Frozen { next, tokens, homes });
                }
                Action::CancelHandoff => self.cancel_handoff(index),
                _ => {}
            }
        }
    }

    /// What is on its way of a replica's handoffs becomes its end.
    fn cancel_handoff(&mut self, index: usize) {
        for (_, _, handoff) in self.handoffs.iter_mut().filter(|(from, _, _)| *from == index) {
            if let Handoff::Offer { next, .. } | Handoff::Frozen { next, .. } = *handoff {
                *handoff = Handoff::Broken { next };
            }
        }
        self.handoffs.sort();
    }
}
