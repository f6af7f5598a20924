//! A target around another one that reads the time of sending off each token.

use std::sync::Arc;

use parking_lot::Mutex;

use super::Clock;
use crate::report::Summary;
use crate::spread::Spread;
use crate::target::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target};

/// Passes everything on, and measures how long each token was on its way from a stub replica.
pub struct Probe {
    inner: Arc<dyn Target>,
    clock: Clock,
    transit: Arc<Transit>,
}

/// How long tokens were on their way.
#[derive(Debug, Default)]
pub struct Transit(Mutex<Spread>);

impl Probe {
    /// Measures what `inner` hears, by the clock that the stubs have.
    pub fn new(inner: Arc<dyn Target>, clock: Clock) -> Self {
        Self { inner, clock, transit: Arc::default() }
    }

    /// What is measured.
    pub fn transit(&self) -> Arc<Transit> {
        self.transit.clone()
    }
}

impl Transit {
    /// What was measured so far.
    pub fn summary(&self) -> Summary {
        self.0.lock().summary()
    }

    /// Forgets it.
    pub fn clear(&self) {
        *self.0.lock() = Spread::default();
    }
}

impl Target for Probe {
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
        Box::pin(async move {
            let read = &mut |heard: Heard<'_>| {
                if let Some(sent) = heard.ids.first() {
                    self.transit.0.lock().add(self.clock.since(*sent));
                }
                hear(heard)
            };
            self.inner.ask(ask, read).await
        })
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
