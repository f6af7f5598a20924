//! A clock that fits into a token id: microseconds since its start, which wrap after 71 minutes.

use std::time::{Duration, Instant};

/// The clock; copies are the same clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Its reading.
    pub fn read(&self) -> u32 {
        self.start.elapsed().as_micros() as u32
    }

    /// Time since it read `then`, which was less than 71 minutes ago.
    pub fn since(&self, then: u32) -> Duration {
        Duration::from_micros(u64::from(self.read().wrapping_sub(then)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_right_across_the_wrap() {
        let clock = Clock::start();
        let before = clock.read().wrapping_sub(1_000_000);
        let since = clock.since(before);
        assert!(since >= Duration::from_secs(1) && since < Duration::from_secs(30), "{since:?}");
    }
}
