//! Prompts and tokens in turns. A step with prompt tokens takes much longer than one of decode rows alone, where a mixture of experts
//! then reads all of them: whoever decodes in it waits that long for a token. So prompts are left out of the steps behind it until
//! the tokens since have come, on average, in no more than a given multiple of the time of a step of decode rows alone.

use std::time::Duration;

use crate::observer::StepPhase;

/// Share of a new measurement in what is kept.
const NEW: f64 = 0.5;

/// The times of steps, and how far those with prompts are over what they may take.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// Times of a step of decode rows alone that a token may take on average; without it prompts never wait.
    slowdown: Option<f64>,
    /// Seconds of a step of decode rows alone; none before the first.
    decode: Option<f64>,
    /// Seconds by which tokens are late.
    late: f64,
}

impl Turns {
    pub(crate) fn new(slowdown: Option<f64>) -> Self {
        Self { slowdown: slowdown.map(|slowdown| slowdown.max(1.0)), ..Self::default() }
    }

    /// A step took so long.
    pub(crate) fn stepped(&mut self, phase: StepPhase, time: Duration) {
        let Some(slowdown) = self.slowdown else { return };
        let seconds = time.as_secs_f64();
        match phase {
            StepPhase::Prefill => return self.forget(),
            StepPhase::Decode => self.decode = Some(self.decode.map_or(seconds, |was| was + NEW * (seconds - was))),
            StepPhase::Mixed => {}
        }
        // Before the first step of decode rows alone nothing is known, and one such step is waited for.
        self.late = (self.late + seconds - slowdown * self.decode.unwrap_or_default()).max(0.0);
    }

    /// Whether prompts are left out of the next step if somebody decodes.
    pub(crate) fn prompts_wait(&self) -> bool {
        self.late > 0.0
    }

    /// Nobody waits for a token: whoever does later is not late yet.
    pub(crate) fn forget(&mut self) {
        self.late = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(turns: &mut Turns, decode_ms: u64, mixed_ms: u64, steps: usize) -> (u64, u64) {
        let (mut time, mut mixed) = (0, 0);
        for _ in 0..steps {
            let (phase, took) = if turns.prompts_wait() {
                (StepPhase::Decode, decode_ms)
            } else {
                mixed += 1;
                (StepPhase::Mixed, mixed_ms)
            };
            turns.stepped(phase, Duration::from_millis(took));
            time += took;
        }
        (time, mixed)
    }

    #[test]
    fn tokens_beside_prompts_take_the_allowed_time_on_average() {
        for (decode, mixed) in [(6, 45), (3, 130), (29, 50), (10, 10)] {
            let mut turns = Turns::new(Some(2.0));
            turns.stepped(StepPhase::Decode, Duration::from_millis(decode));
            let (time, prompts) = run(&mut turns, decode, mixed, 1000);
            assert!(time <= 2 * decode * 1000 + mixed, "{time} ms with steps of {decode} and {mixed}");
            assert!(prompts >= 1000 * decode / (decode + mixed), "{prompts} steps with prompts");
        }
    }

    #[test]
    fn one_step_without_prompts_is_measured_first() {
        let mut turns = Turns::new(Some(2.0));
        turns.stepped(StepPhase::Mixed, Duration::from_millis(15));
        assert!(turns.prompts_wait());
        turns.stepped(StepPhase::Decode, Duration::from_millis(10));
        assert!(turns.prompts_wait());
        turns.stepped(StepPhase::Decode, Duration::from_millis(10));
        assert!(!turns.prompts_wait());
    }

    #[test]
    fn without_a_bound_prompts_never_wait() {
        let mut turns = Turns::new(None);
        turns.stepped(StepPhase::Mixed, Duration::from_secs(9));
        assert!(!turns.prompts_wait());
    }
}
