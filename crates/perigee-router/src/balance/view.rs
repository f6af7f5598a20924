//! What the policy decides over: replicas, this router's sessions and the ways between replicas, as plain numbers.

use std::sync::Arc;

use perigee_migration::Mode;
use perigee_proto::internal::Link;

use super::steps::StepTimes;

/// Positions of a latent page.
pub(super) const PAGE_TOKENS: u64 = 64;

/// A replica that takes sessions.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ReplicaView {
    pub(super) name: Arc<str>,
    /// How long its steps take.
    pub(super) steps: StepTimes,
    /// Sessions in its batch, moves under way counted as done.
    pub(super) running: u64,
    /// Tokens of their contexts.
    pub(super) context: u64,
    /// Sessions that wait for a slot or pages.
    pub(super) waiting: u64,
    /// Time for which its queued prompts share its steps, in milliseconds.
    pub(super) backlog_ms: f64,
    pub(super) slots_free: u64,
    pub(super) slots_total: u64,
    pub(super) pages_free: u64,
    pub(super) pages_total: u64,
    /// Of its sessions those of this router.
    pub(super) own: u64,
    /// This router's moves under way from or to it.
    pub(super) moving: u64,
    /// What a session's move takes; none where none leaves it.
    pub(super) costs: Option<MoveCosts>,
}

/// What a session's move takes, by the shapes of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MoveCosts {
    /// Bytes of state and tails.
    pub(super) state_bytes: u64,
    /// Bytes of the latents of one token.
    pub(super) token_bytes: u64,
    /// Bytes of asking for one token.
    pub(super) ask_bytes: u64,
    /// Questions in a row for one token.
    pub(super) ask_rounds: u32,
}

/// The way from one replica to another.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Way {
    /// Of a short question; none where nobody has measured it.
    pub(crate) round_trip_ms: Option<f64>,
    /// Of state and pages; none where nobody has measured it.
    pub(crate) bytes_per_ms: Option<f64>,
}

impl Way {
    /// A way as a leader tells it.
    pub(crate) fn measured(link: &Link) -> Self {
        let round_trip_ms = (link.round_trip_us > 0).then(|| f64::from(link.round_trip_us) / 1e3);
        let bytes_per_ms = (link.bytes_per_second > 0).then(|| link.bytes_per_second as f64 / 1e3);
        Self { round_trip_ms, bytes_per_ms }
    }
}

/// A session of this router that may move now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SessionView {
    /// Index of its replica.
    pub(super) at: usize,
    /// Tokens of its context.
    pub(super) context: u64,
    /// Tokens that it is expected to go on for.
    pub(super) further: u64,
}

/// Everything at one look.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct View {
    pub(super) replicas: Vec<ReplicaView>,
    pub(super) sessions: Vec<SessionView>,
    /// By source and target.
    pub(super) ways: Vec<Vec<Way>>,
    /// This router's moves under way.
    pub(super) under_way: usize,
    /// A number from 0 up to 1, drawn anew for each look.
    pub(super) chance: f64,
}

/// A move that should be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Move {
    /// Index of the session.
    pub(super) session: usize,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) mode: Mode,
    pub(super) why: Why,
}

/// What speaks for a move.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Why {
    /// What is uneven: step time, pages or slots.
    pub(super) uneven: &'static str,
    /// How far the worst replica is above the mean in it, by its weight.
    pub(super) spread: f64,
    /// Predicted time of a step at source and target, before and after, in milliseconds.
    pub(super) from_ms: (f64, f64),
    /// See `from_ms`.
    pub(super) to_ms: (f64, f64),
    /// What the sessions of the source gain together while this one goes on, in milliseconds.
    pub(super) gain_ms: f64,
    /// What the move and distance cost those of both.
    pub(super) cost_ms: f64,
    /// Of that, for how long the session stands still.
    pub(super) stall_ms: f64,
}

impl ReplicaView {
    /// Predicted time of a step.
    pub(super) fn step_ms(&self) -> f64 {
        self.steps.of(self.running, self.context)
    }

    /// Share of its pages in use, whoever's they are.
    pub(super) fn pages_used(&self) -> f64 {
        share(self.pages_total.saturating_sub(self.pages_free), self.pages_total)
    }

    /// Sessions, waiting ones too, for each slot.
    pub(super) fn crowding(&self) -> f64 {
        share(self.running + self.waiting, self.slots_total)
    }

    /// Whether sessions suffer from there being too few slots or pages.
    pub(super) fn is_short(&self) -> bool {
        self.waiting > 0 || self.pages_used() > 0.9
    }

    /// The same with a session taken away. Whether it has latents elsewhere, and so a second slot here, no router is told:
    /// only the one that every session has is counted as free, until the replica's next load.
    pub(super) fn without(&self, session: &SessionView, mode: Mode) -> Self {
        let mut next = self.clone();
        next.running = self.running.saturating_sub(1);
        next.context = self.context.saturating_sub(session.context);
        next.slots_free = (self.slots_free + 1).min(self.slots_total);
        if mode == Mode::Whole {
            next.pages_free = (self.pages_free + pages(session.context)).min(self.pages_total);
        }
        next
    }

    /// The same with a session added. One that leaves its latents behind takes two slots: its row reads one and writes the
    /// other, so that a step without their answer does not count.
    pub(super) fn with(&self, session: &SessionView, mode: Mode) -> Self {
        let mut next = self.clone();
        next.running = self.running + 1;
        next.context = self.context + session.context;
        next.slots_free = self.slots_free.saturating_sub(if mode == Mode::Split { 2 } else { 1 });
        if mode == Mode::Whole {
            next.pages_free = self.pages_free.saturating_sub(pages(session.context));
        }
        next
    }
}

/// Pages of so many tokens.
pub(super) fn pages(tokens: u64) -> u64 {
    tokens.div_ceil(PAGE_TOKENS)
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}
