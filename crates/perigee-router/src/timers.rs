//! When to look at a session again: alarms in order of time, and whoever sleeps until the next one. They run on tokio's
//! clock, which a test can stop and move.

use std::collections::BTreeMap;
use std::sync::Weak;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::flight::Flight;

/// An alarm that is set; no two are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Alarm {
    at: Instant,
    number: u64,
}

/// Whom an alarm is for.
#[derive(Debug, Clone)]
pub(crate) struct Due {
    pub(crate) alarm: Alarm,
    pub(crate) flight: Weak<Flight>,
    pub(crate) choice: usize,
}

/// All alarms of a router.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    inner: Mutex<Inner>,
    /// The first alarm may have changed.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    alarms: BTreeMap<Alarm, (Weak<Flight>, usize)>,
    next: u64,
}

impl Timers {
    /// Sets an alarm for a choice.
    pub(crate) fn set(&self, at: Instant, flight: Weak<Flight>, choice: usize) -> Alarm {
        let mut inner = self.inner.lock();
        let alarm = Alarm { at, number: inner.next };
        inner.next += 1;
        inner.alarms.insert(alarm, (flight, choice));
        let is_first = inner.alarms.first_key_value().is_some_and(|(first, _)| *first == alarm);
        drop(inner);
        if is_first {
            self.changed.notify_one();
        }
        alarm
    }

    /// Takes an alarm back; one that went off is no more.
    pub(crate) fn cancel(&self, alarm: Alarm) {
        self.inner.lock().alarms.remove(&alarm);
    }

    /// Takes the alarms whose time has come.
    pub(crate) fn due(&self, now: Instant) -> Vec<Due> {
        let mut inner = self.inner.lock();
        let later = inner.alarms.split_off(&Alarm { at: now + std::time::Duration::from_nanos(1), number: 0 });
        let due = std::mem::replace(&mut inner.alarms, later);
        due.into_iter().map(|(alarm, (flight, choice))| Due { alarm, flight, choice }).collect()
    }

    /// Waits until an alarm may have gone off.
    pub(crate) async fn wait(&self) {
        let next = self.inner.lock().alarms.first_key_value().map(|(alarm, _)| alarm.at);
        let sleep = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep => {}
            () = self.changed.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn alarms_go_off_in_order_and_once() {
        let timers = Timers::default();
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        timers.set(at(20), Weak::new(), 2);
        timers.set(at(10), Weak::new(), 1);
        let taken_back = timers.set(at(5), Weak::new(), 0);
        timers.set(at(20), Weak::new(), 3);
        timers.cancel(taken_back);
        let choices = |due: Vec<Due>| due.into_iter().map(|due| due.choice).collect::<Vec<_>>();
        let mut rang = Vec::new();
        while rang.len() < 3 {
            timers.wait().await;
            rang.extend(choices(timers.due(Instant::now())));
        }
        assert_eq!((rang, Instant::now()), (vec![1, 2, 3], at(20)));
        assert_eq!(choices(timers.due(at(1000))), Vec::<usize>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_alarm_shortens_the_sleep() {
        let timers = std::sync::Arc::new(Timers::default());
        let start = Instant::now();
        timers.set(start + Duration::from_secs(60), Weak::new(), 0);
        let setter = timers.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            setter.set(start + Duration::from_millis(5), Weak::new(), 1);
        });
        while timers.due(Instant::now()).is_empty() {
            timers.wait().await;
        }
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }
}
