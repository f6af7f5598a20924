//! An engine that is a task: its steps take modelled time on tokio's clock, by what is in them. All decisions are the shipped
//! engine's; only the arithmetic of the model is left out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use perigee_engine::config::Clock;
use perigee_engine::executor::StepPlan;
use perigee_engine::testing::ModelCounters;
use perigee_engine::{EngineCore, Turn};

/// How long an engine without work waits before it looks for some.
const LOOK: Duration = Duration::from_millis(2);

/// What a step costs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepCost {
    pub(crate) base: Duration,
    /// For each row.
    pub(crate) row: Duration,
    /// For each token that is fed beside the first of its row.
    pub(crate) prompt_token: Duration,
    /// For each token in the contexts of all rows.
    pub(crate) context_token: Duration,
    /// Where a row has to ask for its latents: the round trips.
    pub(crate) asking: Duration,
    /// For each session and page that was written here since the last step.
    pub(crate) import: Duration,
}

impl StepCost {
    /// A model and a card some five times as slow as the published ones: the same proportions with fewer tokens to simulate.
    pub(crate) const USUAL: Self = Self {
        base: Duration::from_millis(20),
        row: Duration::from_micros(2800),
        prompt_token: Duration::from_micros(100),
        context_token: Duration::from_nanos(1200),
        asking: Duration::from_millis(5),
        import: Duration::from_micros(500),
    };

    fn of(&self, plan: &StepPlan, imported: u64) -> Duration {
        let rows = &plan.batch.rows;
        let fed: u32 = rows.iter().map(|row| row.tokens).sum();
        let context: u64 = rows.iter().map(|row| row.position + u64::from(row.tokens)).sum();
        let asking = if plan.remote.rows.is_empty() { Duration::ZERO } else { self.asking };
        self.base
            + self.row * rows.len() as u32
            + self.prompt_token * (fed - rows.len() as u32)
            + self.context_token * u32::try_from(context).unwrap_or(u32::MAX)
            + asking
            + self.import * u32::try_from(imported).unwrap_or(u32::MAX)
    }
}

/// Tokio's clock, ahead by what the step under way has taken.
#[derive(Debug, Default)]
pub(crate) struct StepClock {
    ahead: AtomicU64,
}

impl StepClock {
    fn spend(&self, time: Duration) {
        self.ahead.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn ahead(&self) -> Duration {
        Duration::from_nanos(self.ahead.load(Ordering::Relaxed))
    }
}

impl Clock for StepClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std() + self.ahead()
    }
}

/// What an executor calls before each step.
pub(crate) fn spender(
    clock: Arc<StepClock>,
    cost: StepCost,
    counters: Arc<ModelCounters>,
) -> impl FnMut(&StepPlan) + Send + 'static {
    let mut seen = 0;
    move |plan| {
        let written = counters.imports.load(Ordering::Relaxed) + counters.pages_imported.load(Ordering::Relaxed);
        clock.spend(cost.of(plan, written - std::mem::replace(&mut seen, written)));
    }
}

/// Makes turns until the engine ends. A step's events are told when its time has passed.
pub(crate) async fn run(mut core: EngineCore, clock: Arc<StepClock>) {
    loop {
        let turn = core.work();
        tokio::time::sleep(clock.ahead()).await;
        clock.ahead.store(0, Ordering::Relaxed);
        core.tell();
        core.audit().expect("slots and pages add up");
        match turn {
            Turn::Stepped => tokio::task::yield_now().await,
            Turn::Idle => tokio::time::sleep(LOOK).await,
            Turn::Stopped => return,
        }
    }
}
