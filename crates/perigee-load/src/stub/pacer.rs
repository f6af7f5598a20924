//! Wakes tasks at times between the milliseconds that tokio's timer counts. By that timer, all stub replicas whose steps end
//! within a millisecond would send at its end, together, which replicas do not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

/// Alarms so close to each other ring together: a thread that ran for each of a thousand replicas' steps would take processors
/// from the router that is measured.
const TOGETHER: Duration = Duration::from_micros(100);

/// A thread that wakes whoever asks, within about 0.2 ms of the time. It ends with the last copy.
#[derive(Debug, Clone)]
pub struct Pacer(Arc<Owner>);

#[derive(Debug)]
struct Owner(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    alarms: Mutex<Alarms>,
    /// There is an alarm before the thread wakes, or nobody is left to set one.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Alarms {
    /// By time, and by number where times are equal.
    set: BTreeMap<(Instant, u64), oneshot::Sender<()>>,
    next: u64,
    /// Until when the thread sleeps; none where that is until somebody asks.
    sleeps: Option<Instant>,
    is_over: bool,
}

impl Pacer {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's, where it gives none.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let thread = shared.clone();
        std::thread::Builder::new().name("pacer".to_owned()).spawn(move || thread.ring())?;
        Ok(Self(Arc::new(Owner(shared))))
    }

    /// Is answered at `at`, or at once where that is past.
    pub fn at(&self, at: Instant) -> oneshot::Receiver<()> {
        let (ring, rings) = oneshot::channel();
        let Owner(shared) = &*self.0;
        let mut alarms = shared.alarms.lock();
        let alarm = (at, alarms.next);
        alarms.next += 1;
        alarms.set.insert(alarm, ring);
        if alarms.sleeps.is_none_or(|until| at < until) {
            shared.changed.notify_one();
        }
        rings
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.alarms.lock().is_over = true;
        self.0.changed.notify_one();
    }
}

impl Alarms {
    fn first(&self) -> Option<(Instant, u64)> {
        self.set.first_key_value().map(|(alarm, _)| *alarm)
    }
}

impl Shared {
    /// The thread: sleeps until the first alarm, and takes it from the set when it has rung. When all that are due have rung, it
    /// rests.
    fn ring(&self) {
        let mut alarms = self.alarms.lock();
        // Until then it rests, whatever is due.
        let mut rests = Instant::now();
        while !alarms.is_over {
            let now = Instant::now();
            match alarms.first() {
                None => {
                    alarms.sleeps = None;
                    self.changed.wait(&mut alarms);
                }
                Some((at, _)) if at.max(rests) > now => {
                    let until = at.max(rests);
                    alarms.sleeps = Some(until);
                    self.changed.wait_until(&mut alarms, until);
                }
                Some(_) => {
                    let rung = alarms.set.pop_first();
                    // Who asked may be gone.
                    let _ = rung.map(|(_, ring)| ring.send(()));
                    if alarms.first().is_none_or(|(at, _)| at > now) {
                        rests = now + TOGETHER;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn alarms_ring_in_order_of_time_and_never_early() {
        let pacer = Pacer::start().expect("a thread");
        let start = Instant::now();
        let (order, mut rung) = tokio::sync::mpsc::unbounded_channel();
        // Set from the last to the first, so that each is earlier than what the thread sleeps for.
        for step in (0..20_u32).rev() {
            let at = start + Duration::from_micros(300) * step;
            let (rings, order) = (pacer.at(at), order.clone());
            tokio::spawn(async move {
                rings.await.expect("it rings");
                assert!(Instant::now() >= at, "early");
                order.send(step).expect("the test waits");
            });
        }
        drop(order);
        let mut steps = Vec::new();
        while let Some(step) = rung.recv().await {
            steps.push(step);
        }
        steps.sort_unstable();
        assert_eq!(steps, (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn it_ends_with_its_last_copy() {
        let pacer = Pacer::start().expect("a thread");
        let rings = pacer.clone().at(Instant::now() + Duration::from_secs(3600));
        let shared = Arc::downgrade(&pacer.0.0);
        drop(pacer);
        // The thread lets go of the alarms that it held.
        assert!(rings.await.is_err());
        while shared.upgrade().is_some() {
            tokio::task::yield_now().await;
        }
    }
}
