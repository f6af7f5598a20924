//! The times of a stub replica's steps. What holds up the process in which all stubs live holds up all of them, and those that
//! became due meanwhile would send together, nine batches of ten at once, which replicas on machines of their own do not. So a
//! stub that finds itself held up draws anew where in a step it is.

use std::time::{Duration, Instant};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How late a step is that something held up. The pacer's thread and the runtime take some 0.1 ms.
const HELD_UP: Duration = Duration::from_millis(1);

/// When the next step is due.
#[derive(Debug)]
pub(super) struct Beat {
    due: Instant,
    /// Whether that was drawn anew: a machine that is always late holds no step up twice.
    is_drawn_anew: bool,
}

impl Beat {
    pub(super) fn at(due: Instant) -> Self {
        Self { due, is_drawn_anew: false }
    }

    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Whether a step that is due was held up, and so is due at another time within `step` from now.
    pub(super) fn is_held_up(&mut self, now: Instant, step: Duration, random: &mut ChaCha8Rng) -> bool {
        if self.is_drawn_anew || now.saturating_duration_since(self.due) < HELD_UP {
            return false;
        }
        *self = Self { due: now + step.mul_f64(random.random_range(0.0..1.0)), is_drawn_anew: true };
        true
    }

    /// Sets the time of the step after one that was made at `now`. One that was a little late makes no later one late.
    pub(super) fn step(&mut self, now: Instant, pause: Duration) {
        *self = Self::at((self.due + pause).max(now));
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const STEP: Duration = Duration::from_millis(8);

    #[test]
    fn steps_keep_their_distance_where_they_are_a_little_late() {
        let (start, mut random) = (Instant::now(), ChaCha8Rng::seed_from_u64(0));
        let mut beat = Beat::at(start);
        let now = start + Duration::from_micros(999);
        assert!(!beat.is_held_up(now, STEP, &mut random));
        beat.step(now, STEP);
        assert_eq!(beat.due(), start + STEP);
        // Not a step in the past, where one took longer than that.
        beat.step(start + 3 * STEP, STEP);
        assert_eq!(beat.due(), start + 3 * STEP);
    }

    #[test]
    fn stubs_that_were_held_up_together_spread_over_a_step_once() {
        let (start, mut random) = (Instant::now(), ChaCha8Rng::seed_from_u64(0));
        let now = start + Duration::from_millis(5);
        let mut dues: Vec<Duration> = Vec::new();
        for _ in 0..100 {
            let mut beat = Beat::at(start);
            assert!(beat.is_held_up(now, STEP, &mut random));
            assert!(beat.due() >= now && beat.due() < now + STEP);
            dues.push(beat.due() - now);
            let late = beat.due() + 2 * STEP;
            assert!(!beat.is_held_up(late, STEP, &mut random), "it would never step");
            beat.step(late, STEP);
            assert!(beat.is_held_up(late + 2 * STEP, STEP, &mut random));
        }
        for quarter in 0..4 {
            let within = |due: &&Duration| **due >= STEP * quarter / 4 && **due < STEP * (quarter + 1) / 4;
            let count = dues.iter().filter(within).count();
            assert!((10..=40).contains(&count), "{count} in quarter {quarter}");
        }
    }
}
