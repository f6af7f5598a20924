//! The times of a stub replica's steps. What holds up the process in which all stubs live holds up all of them, and those that
//! became due meanwhile would send together, nine batches of ten at once, which replicas on machines of their own do not. So a
//! stub that finds itself held up steps at a time drawn from the next twice as long, and then at its own times again. Where one
//! step after another is late, the machine is too slow for so many stubs, and waiting would only make them later.

use std::time::{Duration, Instant};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How late a step is that something held up. The pacer's thread and the runtime take some 0.1 ms.
const HELD_UP: Duration = Duration::from_millis(1);

/// When the next step is due.
#[derive(Debug)]
pub(super) struct Beat {
    due: Instant,
    /// Another time for it, drawn because it was held up.
    drawn: Option<Instant>,
    /// Whether the step before came late.
    was_late: bool,
}

impl Beat {
    pub(super) fn at(due: Instant) -> Self {
        Self { due, drawn: None, was_late: false }
    }

    /// When to wake for it.
    pub(super) fn rings(&self) -> Instant {
        self.drawn.unwrap_or(self.due)
    }

    /// Whether a step that is due was held up, and so is to wait for another time.
    pub(super) fn is_held_up(&mut self, now: Instant, step: Duration, random: &mut ChaCha8Rng) -> bool {
        let late = now.saturating_duration_since(self.due);
        if self.drawn.is_some() || self.was_late || late < HELD_UP {
            return false;
        }
        self.drawn = Some(now + late.min(step).mul_f64(random.random_range(0.0..2.0)));
        true
    }

    /// Sets the time of the step after one that was made at `now`. One that was late makes no later one late.
    pub(super) fn step(&mut self, now: Instant, pause: Duration) {
        let was_late = now.saturating_duration_since(self.due) >= HELD_UP;
        *self = Self { was_late, ..Self::at((self.due + pause).max(now)) };
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
        assert_eq!(beat.rings(), start + STEP);
        // Not a step in the past, where one took longer than that.
        beat.step(start + 3 * STEP, STEP);
        assert_eq!(beat.rings(), start + 3 * STEP);
    }

    #[test]
    fn stubs_that_were_held_up_together_spread_once_and_keep_their_times() {
        let (start, mut random) = (Instant::now(), ChaCha8Rng::seed_from_u64(0));
        let now = start + STEP / 2;
        let mut waits: Vec<Duration> = Vec::new();
        for _ in 0..100 {
            let mut beat = Beat::at(start);
            assert!(beat.is_held_up(now, STEP, &mut random));
            assert!(beat.rings() >= now && beat.rings() < now + STEP, "{:?}", beat.rings() - now);
            waits.push(beat.rings() - now);
            let late = beat.rings() + STEP;
            assert!(!beat.is_held_up(late, STEP, &mut random), "it would never step");
            beat.step(beat.rings().max(start + HELD_UP), 2 * STEP);
            assert_eq!(beat.rings(), start + 2 * STEP);
            assert!(
                !beat.is_held_up(start + 3 * STEP, STEP, &mut random),
                "it is late again: there are too many stubs"
            );
            beat.step(start + 3 * STEP, STEP);
            beat.step(start + 3 * STEP, STEP);
            assert!(beat.is_held_up(start + 30 * STEP, STEP, &mut random), "the step before was in time");
            assert!(beat.rings() < start + 32 * STEP, "a long stall is no reason for a long wait");
        }
        for quarter in 0..4 {
            let within = |wait: &&Duration| **wait >= STEP * quarter / 4 && **wait < STEP * (quarter + 1) / 4;
            let count = waits.iter().filter(within).count();
            assert!((10..=40).contains(&count), "{count} in quarter {quarter}");
        }
    }
}
