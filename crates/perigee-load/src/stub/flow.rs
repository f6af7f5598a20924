//! A steady load: clients that each ask again as soon as they are answered, evenly spread over the time that an answer takes,
//! so that requests begin and end one by one; and how long their tokens were on their way from a stub replica.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Clock;
use crate::report::Summary;
use crate::spread::Spread;
use crate::target::{Ask, Failure, Heard, Target};
use crate::{Dialogue, Message, Segment};

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    /// Requests at once.
    pub clients: usize,
    /// Requests that are measured. As many as there are clients go before them, and after them until they have ended, so that
    /// all clients are busy all the time.
    pub requests: usize,
    /// Prompt tokens of each.
    pub prompt: u32,
    /// Tokens that each generates.
    pub output: u32,
    /// Time in which the clients begin, one after the other: about that of an answer.
    pub rise: Duration,
    /// The clock of the token ids.
    pub clock: Clock,
}

/// What came of it.
#[derive(Debug)]
pub struct Flowed<T> {
    /// Of the measured requests, those that completed.
    pub completed: usize,
    /// Those that did not.
    pub failed: usize,
    /// Why the first of them did not.
    pub why: Option<Failure>,
    /// From a stub's send to the client's receipt, of each token of measured requests.
    pub transit: Summary,
    /// Time from the first measured request's beginning to the last one's end.
    pub seconds: f64,
    /// Tokens of all requests within it.
    pub tokens: u64,
    /// What the meter showed at its two ends.
    pub meter: (T, T),
}

/// What the clients of a run share.
struct Run<M, T> {
    flow: Flow,
    target: Arc<dyn Target>,
    meter: M,
    next: AtomicUsize,
    heard: AtomicU64,
    tally: Mutex<Tally<T>>,
    over: Notify,
}

struct Tally<T> {
    spread: Spread,
    completed: usize,
    failed: usize,
    why: Option<Failure>,
    begin: Option<Mark<T>>,
    end: Option<Mark<T>>,
}

/// An end of the time that is measured.
struct Mark<T> {
    at: Instant,
    heard: u64,
    meter: T,
}

impl Flow {
    /// Runs it, and reads `meter` when the first measured request begins and when the last one has ended. None where there
    /// is nothing to measure.
    pub async fn run<T, M>(self, target: Arc<dyn Target>, meter: M) -> Option<Flowed<T>>
    where
        T: Send + 'static,
        M: Fn() -> T + Send + Sync + 'static,
    {
        let tally = Tally { spread: Spread::default(), completed: 0, failed: 0, why: None, begin: None, end: None };
        let (next, heard, over) = Default::default();
        let run = Arc::new(Run { flow: self, target, meter, next, heard, tally: Mutex::new(tally), over });
        let mut clients = JoinSet::new();
        for number in 0..self.clients {
            let begin = self.rise.mul_f64(number as f64 / self.clients as f64);
            clients.spawn(client(run.clone(), begin));
        }
        tokio::select! {
            () = run.over.notified() => {}
            // Only where nothing was to be measured, or a client panicked.
            () = async { while clients.join_next().await.is_some() {} } => {}
        }
        drop(clients);
        let mut tally = run.tally.lock();
        let (begin, end) = (tally.begin.take()?, tally.end.take()?);
        Some(Flowed {
            completed: tally.completed,
            failed: tally.failed,
            why: tally.why.take(),
            transit: tally.spread.summary(),
            seconds: (end.at - begin.at).as_secs_f64(),
            tokens: end.heard - begin.heard,
            meter: (begin.meter, end.meter),
        })
    }
}

/// Asks again and again until there is nothing more to ask.
async fn client<T: Send, M: Fn() -> T + Sync>(run: Arc<Run<M, T>>, begin: Duration) {
    let Flow { clients, requests, .. } = run.flow;
    tokio::time::sleep(begin).await;
    loop {
        let number = run.next.fetch_add(1, Ordering::Relaxed);
        if number >= clients + requests + clients {
            return;
        }
        if number == clients {
            run.tally.lock().begin = Some(run.mark());
        }
        let is_measured = (clients..clients + requests).contains(&number);
        let ended = run.ask(number, is_measured).await;
        if !is_measured {
            continue;
        }
        let mut tally = run.tally.lock();
        match ended {
            Ok(()) => tally.completed += 1,
            Err(failure) => {
                tally.failed += 1;
                tally.why.get_or_insert(failure);
            }
        }
        if tally.completed + tally.failed == requests {
            tally.end = Some(run.mark());
            run.over.notify_one();
        }
    }
}

impl<T: Send, M: Fn() -> T + Sync> Run<M, T> {
    fn mark(&self) -> Mark<T> {
        Mark { at: Instant::now(), heard: self.heard.load(Ordering::Relaxed), meter: (self.meter)() }
    }

    async fn ask(&self, number: usize, is_measured: bool) -> Result<(), Failure> {
        let Flow { prompt, output, clock, .. } = self.flow;
        let name = format!("load-{number}");
        let dialogue = Dialogue(vec![Message::User(vec![Segment { seed: number as u64, tokens: prompt }])]);
        let (name, dialogue) = (name.as_str(), &dialogue);
        let ask = Ask { name, dialogue, max_tokens: output, temperature: Some(0.0), ignore_eos: true };
        let hear = &mut |heard: Heard<'_>| {
            if let Some(sent) = heard.ids.first() {
                self.heard.fetch_add(1, Ordering::Relaxed);
                if is_measured {
                    self.tally.lock().spread.add(clock.since(*sent));
                }
            }
            ControlFlow::Continue(())
        };
        self.target.ask(ask, hear).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::target::{BoxFuture, Counts, Hear};

    const OUTPUT: u32 = 10;
    const STEP: Duration = Duration::from_millis(20);

    /// Answers a token a step, and counts who is answered.
    struct Steady {
        start: Instant,
        /// The request that fails.
        fails: Option<&'static str>,
        now: Mutex<Now>,
    }

    #[derive(Default)]
    struct Now {
        running: usize,
        /// How many began when.
        begun: BTreeMap<Duration, usize>,
    }

    impl Target for Steady {
        fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
            Box::pin(async move {
                *self.now.lock().begun.entry(self.start.elapsed()).or_default() += 1;
                if self.fails == Some(ask.name) {
                    return Err(Failure::cut_off());
                }
                self.now.lock().running += 1;
                for _ in 0..ask.max_tokens {
                    tokio::time::sleep(STEP).await;
                    let _ = hear(Heard { tokens: 1, ids: &[0], ..Heard::default() });
                }
                self.now.lock().running -= 1;
                Ok(Counts::default())
            })
        }

        fn describe(&self) -> String {
            String::new()
        }
    }

    async fn flow(fails: Option<&'static str>) -> (Flowed<usize>, Arc<Steady>) {
        let steady = Arc::new(Steady { start: Instant::now(), fails, now: Mutex::default() });
        let flow =
            Flow { clients: 20, requests: 100, prompt: 3, output: OUTPUT, rise: STEP * OUTPUT, clock: Clock::start() };
        let meter = steady.clone();
        let flowed = flow.run(steady.clone(), move || meter.now.lock().running).await.expect("something is measured");
        (flowed, steady)
    }

    #[tokio::test(start_paused = true)]
    async fn all_clients_are_busy_while_it_measures_and_begin_one_by_one() {
        let (flowed, steady) = flow(None).await;
        assert_eq!((flowed.completed, flowed.failed, flowed.why), (100, 0, None));
        assert_eq!(flowed.transit.count, 1000, "each token of what is measured");
        // Others than the one that begins or ends at that moment.
        assert_eq!(flowed.meter, (19, 19));
        // 20 clients, each of which has a token a step.
        let expected = flowed.seconds / STEP.as_secs_f64() * 20.0;
        assert!((flowed.tokens as f64 / expected - 1.0).abs() < 0.05, "{} of {expected}", flowed.tokens);
        assert_eq!(steady.now.lock().begun.values().max(), Some(&1));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_are_told_and_end_nothing() {
        let (flowed, _) = flow(Some("load-50")).await;
        assert_eq!((flowed.completed, flowed.failed, flowed.why), (99, 1, Some(Failure::cut_off())));
        assert_eq!(flowed.transit.count, 990);
        let (unmeasured, _) = flow(Some("load-5")).await;
        assert_eq!((unmeasured.completed, unmeasured.failed), (100, 0));
    }
}
