//! The policy: a view in, moves out. It keeps nothing but whether it is at work, so that it neither begins over noise nor
//! stops at once; see the module's page for the rule.

use perigee_migration::Mode;

use super::cost::{self, Price};
use super::view::{Move, ReplicaView, SessionView, View, Why};

/// The worst replica is so far above the mean where it begins, and where it stops.
const START: f64 = 0.25;
const STOP: f64 = 0.10;
/// Looks in a row that must say so before it begins.
const LOOKS: u32 = 2;
/// Moves of this router at once.
const AT_ONCE: usize = 4;
/// Moves of this router from or to one replica at once.
const AT_ONCE_EACH: u64 = 1;
/// Least that a move must take from the sum of squares.
const LEAST_DROP: f64 = 0.002;
/// How many times its cost a move must be worth.
const WORTH: f64 = 2.0;
/// Nobody knows what is there after so many further tokens.
const HORIZON: u64 = 1024;
/// Longest that a session may stand still to make room where sessions suffer, in steps of its replica.
const RELIEF_STEPS: f64 = 50.0;

/// The policy between two looks.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Policy {
    is_at_work: bool,
    looks: u32,
}

/// What is uneven, most of all, and by how much.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) what: &'static str,
    pub(super) much: f64,
}

/// Means over all replicas, and how much each of the three counts; they stand while a look lasts.
#[derive(Debug, Clone, Copy)]
struct Scale {
    step_ms: f64,
    pages: f64,
    crowding: f64,
    pages_weight: f64,
    crowding_weight: f64,
}

impl Policy {
    /// The moves to be made now, best first.
    pub(super) fn look(&mut self, view: &View) -> Vec<Move> {
        let Some(scale) = Scale::of(&view.replicas) else {
            *self = Self::default();
            return Vec::new();
        };
        let spread = scale.spread(&view.replicas);
        self.looks = if spread.much > START { self.looks.saturating_add(1) } else { 0 };
        self.is_at_work = if self.is_at_work { spread.much > STOP } else { self.looks >= LOOKS };
        if !self.is_at_work {
            return Vec::new();
        }
        moves(view, &scale)
    }
}

/// Takes the best move until none is left that is worth it, or enough go on.
fn moves(view: &View, scale: &Scale) -> Vec<Move> {
    let mut replicas = view.replicas.clone();
    let mut moves: Vec<Move> = Vec::new();
    while view.under_way + moves.len() < AT_ONCE {
        let spread = scale.spread(&replicas);
        if spread.much <= STOP {
            break;
        }
        let free = |index: &usize| moves.iter().all(|taken| taken.session != *index);
        let mut best: Option<(f64, Move)> = None;
        for index in (0..view.sessions.len()).filter(free) {
            for to in 0..replicas.len() {
                let Some((drop, found)) = weigh(view, &replicas, (index, to), scale, spread) else { continue };
                if best.as_ref().is_none_or(|(most, _)| drop > *most) {
                    best = Some((drop, found));
                }
            }
        }
        let Some((_, found)) = best else { break };
        let session = &view.sessions[found.session];
        for (index, next) in [
            (found.from, replicas[found.from].without(session, found.mode)),
            (found.to, replicas[found.to].with(session, found.mode)),
        ] {
            replicas[index] = ReplicaView { moving: next.moving + 1, ..next };
        }
        moves.push(found);
    }
    moves
}

/// What moving a session takes from the sum of squares, if it may be moved there and is worth it.
fn weigh(
    view: &View,
    replicas: &[ReplicaView],
    (index, to): (usize, usize),
    scale: &Scale,
    spread: Spread,
) -> Option<(f64, Move)> {
    let session = &view.sessions[index];
    let from = session.at;
    let (source, target) = (replicas.get(from)?, replicas.get(to)?);
    let is_busy = |replica: &ReplicaView| replica.moving >= AT_ONCE_EACH;
    // Other routers that see the same take theirs.
    let is_mine = view.chance * source.running as f64 <= source.own as f64;
    if from == to || is_busy(source) || is_busy(target) || !is_mine {
        return None;
    }
    let way = view.ways.get(from).and_then(|ways| ways.get(to)).copied().unwrap_or_default();
    let price = cost::price(session, source.costs.as_ref()?, way, target)?;
    let (left, joined) = (source.without(session, price.mode), target.with(session, price.mode));
    let drop = scale.square(source) + scale.square(target) - scale.square(&left) - scale.square(&joined);
    if drop < LEAST_DROP {
        return None;
    }
    let (from_ms, to_ms) = ((source.step_ms(), left.step_ms()), (target.step_ms(), joined.step_ms()));
    let gain_ms = gain(session, source, from_ms, to_ms.1);
    let cost_ms = toll(&price, (source, target));
    let relieves = source.is_short() && (price.mode == Mode::Whole || source.waiting > 0);
    let is_relief = relieves && price.stall_ms < RELIEF_STEPS * from_ms.0;
    if gain_ms < WORTH * cost_ms && !is_relief {
        return None;
    }
    let (uneven, much, stall_ms) = (spread.what, spread.much, price.stall_ms);
    let why = Why { uneven, spread: much, from_ms, to_ms, gain_ms, cost_ms, stall_ms };
    Some((drop, Move { session: index, from, to, mode: price.mode, why }))
}

/// What the sessions of the source gain together while this one goes on, itself among them. Those of the target lose what
/// they had before others: a replica of few sessions with long contexts would keep them all if that counted against it.
fn gain(session: &SessionView, source: &ReplicaView, (now, then): (f64, f64), there: f64) -> f64 {
    let stay = source.running.saturating_sub(1) as f64 * (now - then);
    session.further.min(HORIZON) as f64 * (stay + now - there)
}

/// What a move costs them: the session stands still, and everybody at the target waits for what it asks.
fn toll(price: &Price, (source, target): (&ReplicaView, &ReplicaView)) -> f64 {
    let ends_of_steps = source.step_ms() + target.step_ms();
    let backlog = (target.backlog_ms - source.backlog_ms).max(0.0);
    price.stall_ms
        + ends_of_steps
        + backlog
        + price.distance_ms * price.far_tokens.min(HORIZON as f64) * (target.running + 1) as f64
}

impl Scale {
    /// None where there is nothing to compare.
    fn of(replicas: &[ReplicaView]) -> Option<Self> {
        if replicas.len() < 2 {
            return None;
        }
        let mean = |value: fn(&ReplicaView) -> f64| replicas.iter().map(value).sum::<f64>() / replicas.len() as f64;
        let most = |value: fn(&ReplicaView) -> f64| replicas.iter().map(value).fold(0.0, f64::max);
        let step_ms = mean(ReplicaView::step_ms);
        (step_ms > 0.0).then(|| Self {
            step_ms,
            pages: mean(ReplicaView::pages_used),
            crowding: mean(ReplicaView::crowding),
            pages_weight: most(ReplicaView::pages_used),
            crowding_weight: ((most(ReplicaView::crowding) - 0.8) / 0.2).clamp(0.0, 1.0),
        })
    }

    /// Step time, pages and slots of a replica as multiples of the means, with their weights.
    fn parts(&self, replica: &ReplicaView) -> [(&'static str, f64, f64); 3] {
        let over = |value: f64, mean: f64| if mean > 0.0 { value / mean } else { 1.0 };
        [
            ("step time", over(replica.step_ms(), self.step_ms), 1.0),
            ("pages", over(replica.pages_used(), self.pages), self.pages_weight),
            ("slots", over(replica.crowding(), self.crowding), self.crowding_weight),
        ]
    }

    fn square(&self, replica: &ReplicaView) -> f64 {
        self.parts(replica).iter().map(|(_, value, weight)| weight * value * value).sum()
    }

    fn spread(&self, replicas: &[ReplicaView]) -> Spread {
        let parts = replicas.iter().flat_map(|replica| self.parts(replica));
        let spreads = parts.map(|(what, value, weight)| Spread { what, much: weight * (value - 1.0) });
        spreads.max_by(|a, b| a.much.total_cmp(&b.much)).unwrap_or(Spread { what: "nothing", much: 0.0 })
    }
}
