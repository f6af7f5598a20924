//! What a session's move takes over the way between two replicas, and what goes along: the cost rule. Latents that add less
//! than a step of the target to the time in which the session stands still go along at once; else they stay, every further
//! token asks for them, and they follow where the session goes on for longer than they are dear to bring.

use perigee_migration::Mode;

use super::view::{MoveCosts, ReplicaView, SessionView, Way, pages};

/// Of a way that nobody has measured yet: that of a fast network, so that it is tried.
const UNKNOWN_BYTES_PER_MS: f64 = 1e6;
/// See [`UNKNOWN_BYTES_PER_MS`].
const UNKNOWN_ROUND_TRIP_MS: f64 = 0.2;
/// Share of a target's pages that a move leaves free.
const PAGES_KEPT: f64 = 0.05;
/// Tokens for which there must be pages beside those of the context.
const GROWTH: u64 = 512;

/// What a move takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Price {
    pub(super) mode: Mode,
    /// For how long the session stands still, beside the rest of a step on each side.
    pub(super) stall_ms: f64,
    /// What asking adds to each step of the target while latents are elsewhere.
    pub(super) distance_ms: f64,
    /// For how many tokens they are.
    pub(super) far_tokens: f64,
}

/// The price of a session's move; none where the target has no room for it.
pub(super) fn price(session: &SessionView, costs: &MoveCosts, way: Way, target: &ReplicaView) -> Option<Price> {
    let kept = (target.pages_total as f64 * PAGES_KEPT) as u64;
    let room = |tokens: u64| target.pages_free >= pages(tokens) + kept;
    let growth = session.further.min(GROWTH);
    // A row that asks reads one slot and writes another.
    if target.waiting > 0 || target.slots_free < 3 || !room(growth) {
        return None;
    }
    let rate = way.bytes_per_ms.unwrap_or(UNKNOWN_BYTES_PER_MS).max(1.0);
    let round_trip = way.round_trip_ms.unwrap_or(UNKNOWN_ROUND_TRIP_MS);
    let state_ms = costs.state_bytes as f64 / rate + round_trip;
    let pages_ms = (session.context * costs.token_bytes) as f64 / rate;
    let step_ms = target.step_ms();
    let fits = room(session.context + growth);
    if fits && pages_ms <= step_ms {
        return Some(Price { mode: Mode::Whole, stall_ms: state_ms + pages_ms, distance_ms: 0.0, far_tokens: 0.0 });
    }
    let distance_ms = f64::from(costs.ask_rounds) * round_trip + costs.ask_bytes as f64 / rate;
    let break_even = (session.context * costs.token_bytes).div_ceil(costs.ask_bytes.max(1));
    let follows = fits && session.further > break_even;
    let further = session.further as f64;
    let far_tokens = if follows { (pages_ms / step_ms.max(0.01)).min(further) } else { further };
    Some(Price { mode: Mode::Split, stall_ms: state_ms, distance_ms, far_tokens })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::steps::StepTimes;
    use super::*;

    /// The 48B model, bf16.
    const COSTS: MoveCosts =
        MoveCosts { state_bytes: 43_417_600, token_bytes: 8064, ask_bytes: 717_696, ask_rounds: 7 };

    fn target() -> ReplicaView {
        ReplicaView {
            name: Arc::from("b"),
            steps: StepTimes { base_ms: 10.0, row_ms: 0.5, token_ms: 0.0 },
            running: 20,
            context: 0,
            waiting: 0,
            backlog_ms: 0.0,
            slots_free: 40,
            slots_total: 60,
            pages_free: 10_000,
            pages_total: 20_000,
            own: 20,
            moving: 0,
            costs: Some(COSTS),
        }
    }

    const WAY: Way = Way { round_trip_ms: Some(0.1), bytes_per_ms: Some(10e6) };

    fn session(context: u64, further: u64) -> SessionView {
        SessionView { at: 0, context, further }
    }

    #[test]
    fn pages_go_along_where_they_add_less_than_a_step() {
        // A step of 20 ms brings 200 MB: 24,801 tokens.
        let short = price(&session(24_000, 100), &COSTS, WAY, &target()).unwrap();
        assert_eq!((short.mode, short.far_tokens), (Mode::Whole, 0.0));
        assert!((short.stall_ms - (4.34 + 0.1 + 19.35)).abs() < 0.1, "{short:?}");
        let long = price(&session(26_000, 100), &COSTS, WAY, &target()).unwrap();
        assert_eq!((long.mode, long.far_tokens), (Mode::Split, 100.0), "too few tokens to bring it");
        assert!((long.stall_ms - 4.44).abs() < 0.1 && (long.distance_ms - 0.77).abs() < 0.01, "{long:?}");
        let follows = price(&session(26_000, 10_000), &COSTS, WAY, &target()).unwrap();
        assert!(follows.mode == Mode::Split && follows.far_tokens < 2.0, "{follows:?}");
    }

    #[test]
    fn a_slower_way_makes_distance_dearer_and_fewer_pages_go_along() {
        let slow = Way { round_trip_ms: Some(5.0), bytes_per_ms: Some(1e5) };
        let there = price(&session(2000, 100), &COSTS, slow, &target()).unwrap();
        assert_eq!(there.mode, Mode::Split);
        assert!(there.distance_ms > 35.0 && there.stall_ms > 400.0, "{there:?}");
        let unknown = price(&session(2000, 100), &COSTS, Way::default(), &target()).unwrap();
        assert_eq!(unknown.mode, Mode::Whole);
    }

    #[test]
    fn without_room_there_is_no_price() {
        let refused = |change: fn(&mut ReplicaView)| {
            let mut target = target();
            change(&mut target);
            price(&session(2000, 1000), &COSTS, WAY, &target)
        };
        assert!(refused(|target| target.waiting = 1).is_none());
        assert!(refused(|target| target.slots_free = 2).is_none());
        assert!(refused(|target| target.pages_free = 1000).is_none());
        let split = refused(|target| target.pages_free = 1010).unwrap();
        assert_eq!((split.mode, split.far_tokens), (Mode::Split, 1000.0), "nor do its pages follow");
    }
}
