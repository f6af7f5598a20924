//! What a test sees of pairs between the replicas of a world, and what it has go wrong with them. The pairs themselves are the
//! shipped ones; orders pass through here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use perigee_backend::{PairEnd, PairOrder, PairState};
use perigee_engine::executor::{Executor, ExecutorError};
use tokio::sync::Notify;

/// How long the ends of a pair may take to meet.
const MEETING: Duration = Duration::from_secs(30);

/// What goes wrong with every state that goes by a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PairTrouble {
    /// Nothing.
    #[default]
    None,
    /// Its source loses the pair as soon as it is on its way.
    LostAtSource,
    /// Its target loses the pair just when it is to come.
    LostAtTarget,
    /// It comes, and cannot be taken.
    NotTaken,
    /// Its target does not listen, and says nothing.
    Silent,
}

/// What became of pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PairCounts {
    /// Pairs that sources began to meet; each counts once, whatever its ranks.
    pub met: usize,
    /// States that were to go by one.
    pub sent: usize,
    /// States that were taken from one.
    pub taken: usize,
}

/// The pairs of a world. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Pairing(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<(PairTrouble, PairCounts)>,
    sent: Notify,
}

impl Pairing {
    /// What goes wrong from now on.
    pub fn trouble(&self, trouble: PairTrouble) {
        self.lock().0 = trouble;
    }

    /// What became of them so far.
    pub fn counts(&self) -> PairCounts {
        self.lock().1
    }

    /// Completes once another state has begun to go by a pair.
    pub async fn sending(&self) {
        self.0.sent.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, (PairTrouble, PairCounts)> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes an order on, or has it go wrong. Waits until both ends have met where that is under way, so that a test knows by
    /// which way a state goes.
    pub(super) fn order(
        &self,
        executor: &mut impl Executor,
        invitations: &[Vec<u8>],
        order: PairOrder,
    ) -> Result<PairState, ExecutorError> {
        let trouble = self.lock().0;
        match (order, trouble) {
            (PairOrder::Expect, PairTrouble::LostAtTarget) => return executor.pairs(invitations, PairOrder::Close),
            (PairOrder::Expect, PairTrouble::Silent) => return Ok(PairState::Busy),
            (PairOrder::Take { .. }, PairTrouble::NotTaken) => {
                return Err(ExecutorError { rank: 0, message: "this state was not to be taken".into(), fatal: false });
            }
            _ => {}
        }
        let mut state = executor.pairs(invitations, order)?;
        match order {
            PairOrder::Meet { end: PairEnd::Source, .. } | PairOrder::Look => {
                let began = Instant::now();
                while state == PairState::Meeting && began.elapsed() < MEETING {
                    std::thread::yield_now();
                    state = executor.pairs(invitations, PairOrder::Look)?;
                }
                if order != PairOrder::Look {
                    self.lock().1.met += 1;
                }
            }
            PairOrder::Send { .. } => {
                if trouble == PairTrouble::LostAtSource {
                    executor.pairs(invitations, PairOrder::Close)?;
                }
                self.lock().1.sent += 1;
                self.0.sent.notify_one();
            }
            PairOrder::Take { .. } => self.lock().1.taken += 1,
            PairOrder::Meet { .. } | PairOrder::Expect | PairOrder::Close => {}
        }
        Ok(state)
    }
}
