//! The balancer at work: looks once a second at loads, ways and this router's sessions, and has the policy's moves made as
//! an operator's would be; or says what it would have done.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Balance;
use super::policy::Policy;
use super::steps::{StepFit, StepTimes};
use super::view::{Move, MoveCosts, ReplicaView, SessionView, View, Way};
use crate::attachment::Attachment;
use crate::driver::Seat;
use crate::flight::Flight;
use crate::random::Random;
use crate::relay::Relay;

/// Time between two looks, on average: routers that started together do not stay in step.
const LOOK: Duration = Duration::from_secs(1);
/// A session that moved, or was to move, stays for that long.
const REST: Duration = Duration::from_secs(60);
/// Fewest tokens that a session is expected to go on for which may end at any time.
const LEAST_EXPECTED: u64 = 64;

/// What is kept between two looks.
#[derive(Debug, Default)]
struct Balancer {
    policy: Policy,
    /// By replica: which run of it, its steps so far when it was last looked at, and how long they take.
    fits: BTreeMap<Arc<str>, (String, u64, StepFit)>,
    /// Sessions that would have been moved, and when.
    pretended: HashMap<String, Instant>,
}

/// A session of a view.
struct Candidate {
    flight: Arc<Flight>,
    index: usize,
    session: String,
}

impl Relay {
    /// Evens out loads, or says how it would, as long as the router lives.
    pub(crate) async fn balance(self: Arc<Self>, how: Balance, random: Random) {
        let mut balancer = Balancer::default();
        loop {
            tokio::time::sleep(LOOK.mul_f64(0.75 + 0.5 * chance(&random))).await;
            self.look(&mut balancer, how, chance(&random));
        }
    }

    fn look(&self, balancer: &mut Balancer, how: Balance, chance: f64) {
        let now = Instant::now();
        balancer.pretended.retain(|_, since| now - *since < REST);
        let members = self.replicas.members();
        let (mut view, candidates) = self.view(balancer, &members, now);
        view.chance = chance;
        for decided in balancer.policy.look(&view) {
            let Some(candidate) = candidates.get(decided.session) else { continue };
            tell(how, candidate, &decided, &view);
            match how {
                Balance::On => self.carry_out(candidate, &decided, &view, now),
                Balance::DryRun | Balance::Off => drop(balancer.pretended.insert(candidate.session.clone(), now)),
            }
        }
    }

    /// What the policy decides over, and which session is which.
    fn view(&self, balancer: &mut Balancer, members: &[Arc<Attachment>], now: Instant) -> (View, Vec<Candidate>) {
        let mut view = View { replicas: balancer.replicas(members), ways: ways(members), ..View::default() };
        let mut found: Vec<(SessionView, Candidate)> = Vec::new();
        for flight in self.flights() {
            let state = flight.state.lock();
            if state.end.is_some() {
                continue;
            }
            for (index, choice) in state.choices.iter().enumerate().filter(|(_, choice)| !choice.is_finished) {
                let at = |attachment: &Arc<Attachment>| members.iter().position(|member| member.id == attachment.id);
                let context = flight.submit.prompt.len() as u64 + choice.due();
                let Some(owner) = choice.owner.as_ref().and_then(at) else { continue };
                view.replicas[owner].own += 1;
                if !choice.coordinator.is_idle() {
                    view.under_way += 1;
                    let transit = choice.transit.as_ref().filter(|transit| transit.outcome.is_none());
                    let Some(transit) = transit else { continue };
                    for end in [&transit.source, &transit.target] {
                        at(end).into_iter().for_each(|end| view.replicas[end].moving += 1);
                    }
                    // Until it is done the loads have it at the source.
                    if let Some(target) = at(&transit.target).filter(|_| !transit.is_committed()) {
                        view.replicas[owner].leaves(context);
                        view.replicas[target].joins(context);
                    }
                    continue;
                }
                let has_rested = choice.last_move.is_none_or(|moved| now - moved >= REST);
                let is_pretended = balancer.pretended.contains_key(&choice.session);
                if choice.due() > 0 && has_rested && !is_pretended && !choice.is_aborted {
                    let further = further_tokens(&flight, choice.due());
                    let candidate = Candidate { flight: flight.clone(), index, session: choice.session.clone() };
                    found.push((SessionView { at: owner, context, further }, candidate));
                }
            }
        }
        // Tables have no order of their own.
        found.sort_by(|(_, a), (_, b)| a.session.cmp(&b.session));
        let (sessions, candidates) = found.into_iter().unzip();
        view.sessions = sessions;
        (view, candidates)
    }

    fn carry_out(&self, candidate: &Candidate, decided: &Move, view: &View, now: Instant) {
        let Candidate { flight, index, session } = candidate;
        let begun = self.replicas.target(&view.replicas[decided.to].name).and_then(|target| {
            let mut state = flight.state.lock();
            let mut seat = Seat { flight, state: &mut state, index: *index, now };
            // Nobody waits for the answer: the move's own account tells what became of it.
            let (answer, _) = oneshot::channel();
            self.begin_move(&mut seat, target, Some(decided.mode), answer)
        });
        if let Err(error) = begun {
            tracing::debug!(session, why = error.message, "a session cannot move for now");
        }
    }
}

impl Balancer {
    /// Replicas as their last loads have them; those that have not shown how long their steps take yet count as the others.
    fn replicas(&mut self, members: &[Arc<Attachment>]) -> Vec<ReplicaView> {
        self.fits.retain(|name, _| members.iter().any(|member| member.identity.replica == *name));
        let times: Vec<Option<StepTimes>> = members.iter().map(|member| self.step_times(member)).collect();
        let mean = StepTimes::mean(times.iter().copied().flatten()).unwrap_or_default();
        let view = |(member, times): (&Arc<Attachment>, Option<StepTimes>)| {
            let (load, costs) = (member.load(), member.identity.move_costs);
            let decode_ms = f64::from(load.decode_ms);
            let steps_of_prompts = load.queued_tokens as f64 / f64::from(member.identity.step_tokens.max(1));
            ReplicaView {
                name: member.identity.replica.clone(),
                steps: times.unwrap_or(mean),
                running: load.running.into(),
                context: load.context_tokens,
                waiting: load.waiting.into(),
                backlog_ms: load.queued_tokens as f64 * f64::from(load.prompt_token_ms) + steps_of_prompts * decode_ms,
                slots_free: load.slots_free.into(),
                slots_total: load.slots_total.into(),
                pages_free: load.pages_free.into(),
                pages_total: load.pages_total.into(),
                own: 0,
                moving: 0,
                costs: costs.map(|costs| MoveCosts {
                    state_bytes: costs.state_bytes,
                    token_bytes: costs.token_bytes,
                    ask_bytes: costs.ask_bytes,
                    ask_rounds: costs.ask_rounds,
                }),
            }
        };
        members.iter().zip(times).map(view).collect()
    }

    fn step_times(&mut self, member: &Attachment) -> Option<StepTimes> {
        let (load, identity) = (member.load(), &member.identity);
        let (run, steps, fit) = self.fits.entry(identity.replica.clone()).or_default();
        if *run != identity.incarnation {
            (*run, *steps, *fit) = (identity.incarnation.clone(), 0, StepFit::default());
        }
        // Without steps since, the load says again what it said before.
        if load.steps > *steps {
            *steps = load.steps;
            fit.add(load.running.into(), load.context_tokens, load.decode_ms.into());
        }
        fit.times()
    }
}

impl ReplicaView {
    fn leaves(&mut self, context: u64) {
        (self.running, self.context) = (self.running.saturating_sub(1), self.context.saturating_sub(context));
    }

    fn joins(&mut self, context: u64) {
        (self.running, self.context) = (self.running + 1, self.context + context);
    }
}

/// A number from 0 up to 1. Without random numbers, which no system refuses for long, all looks are alike.
fn chance(random: &Random) -> f64 {
    random.next().map_or(0.5, |number| (number >> 11) as f64 / (1u64 << 53) as f64)
}

/// The ways between replicas, as either end measured them.
fn ways(members: &[Arc<Attachment>]) -> Vec<Vec<Way>> {
    let between = |from: &Arc<Attachment>, to: &Arc<Attachment>| {
        let (there, back) = (from.way_to(&to.identity.replica), to.way_to(&from.identity.replica));
        Way {
            round_trip_ms: there.round_trip_ms.or(back.round_trip_ms),
            bytes_per_ms: there.bytes_per_ms.or(back.bytes_per_ms),
        }
    };
    members.iter().map(|from| members.iter().map(|to| between(from, to)).collect()).collect()
}

/// Tokens that a session is expected to go on for: all that it may where nothing else ends it, else about as many as it has.
fn further_tokens(flight: &Flight, due: u64) -> u64 {
    let submit = &flight.submit;
    let left = u64::from(submit.max_tokens).saturating_sub(due);
    let has_other_ends = !submit.ignore_eos || !submit.stop_token_ids.is_empty() || !submit.stop.is_empty();
    if has_other_ends { left.min(due.max(LEAST_EXPECTED)) } else { left }
}

/// Says what is done, or would be, and why.
fn tell(how: Balance, candidate: &Candidate, decided: &Move, view: &View) {
    let (why, session) = (&decided.why, &view.sessions[decided.session]);
    let what = match how {
        Balance::On => "the balancer moves a session",
        Balance::DryRun | Balance::Off => "the balancer would move a session",
    };
    tracing::info!(
        session = candidate.session,
        request_id = candidate.flight.request_id(),
        from = &*view.replicas[decided.from].name,
        to = &*view.replicas[decided.to].name,
        mode = crate::wire::mode_word(decided.mode),
        context = session.context,
        further = session.further,
        uneven = why.uneven,
        above_mean = format!("{:.0} %", why.spread * 100.0),
        from_step_ms = format!("{:.2} -> {:.2}", why.from_ms.0, why.from_ms.1),
        to_step_ms = format!("{:.2} -> {:.2}", why.to_ms.0, why.to_ms.1),
        gain_ms = why.gain_ms.round(),
        cost_ms = why.cost_ms.round(),
        stall_ms = why.stall_ms.round(),
        "{what}"
    );
}
