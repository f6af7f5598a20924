//! How long this replica's steps take, told apart by what is in them: a step of decode rows alone, and each prompt token on
//! top of that. A mean over all steps would call a replica slow because it has just read a long prompt.

use std::time::Duration;

use perigee_engine::observer::StepPhase;

/// Share of a new measurement in what is kept; the rest is the past.
const NEW: f64 = 0.1;
/// Steps without a prompt after which what prompts took is no longer told: the machine was in another state then, and who
/// is thought slow gets no prompt that could show the contrary.
const STALE: u32 = 64;

/// Smoothed times.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Pace {
    decode_ms: Option<f64>,
    /// Milliseconds and prompt tokens of past steps, older ones counting less: long chunks weigh more than short ones.
    prompt_ms: f64,
    prompt_tokens: f64,
    /// Steps since the last prompt token.
    since_prompt: u32,
    /// A step whose prompt tokens were not told yet.
    step: Option<(StepPhase, Duration)>,
}

impl Pace {
    /// A step ran; its prompt tokens are told next.
    pub(crate) fn stepped(&mut self, phase: StepPhase, time: Duration) {
        self.step = Some((phase, time));
    }

    /// The last step prefilled so many prompt tokens.
    pub(crate) fn prefilled(&mut self, prompt_tokens: u64) {
        let Some((phase, time)) = self.step.take() else { return };
        let milliseconds = time.as_secs_f64() * 1e3;
        let decode = self.decode_ms.unwrap_or_default();
        let of_prompts = match phase {
            StepPhase::Decode => {
                self.since_prompt = self.since_prompt.saturating_add(1);
                self.decode_ms = Some(self.decode_ms.map_or(milliseconds, |was| was + NEW * (milliseconds - was)));
                return;
            }
            StepPhase::Prefill => milliseconds,
            StepPhase::Mixed => (milliseconds - decode).max(0.0),
        };
        if self.since_prompt > STALE {
            (self.prompt_ms, self.prompt_tokens) = (0.0, 0.0);
        }
        self.since_prompt = 0;
        self.prompt_ms = (1.0 - NEW) * self.prompt_ms + of_prompts;
        self.prompt_tokens = (1.0 - NEW) * self.prompt_tokens + prompt_tokens as f64;
    }

    /// Milliseconds of a step of decode rows alone; 0 before the first one.
    pub(crate) fn decode_ms(&self) -> f32 {
        self.decode_ms.unwrap_or_default() as f32
    }

    /// Milliseconds that each prompt token adds; 0 before the first one, and where the last one is long ago.
    pub(crate) fn prompt_token_ms(&self) -> f32 {
        if self.prompt_tokens > 0.0 && self.since_prompt <= STALE {
            (self.prompt_ms / self.prompt_tokens) as f32
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(pace: &mut Pace, phase: StepPhase, milliseconds: u64, prompt_tokens: u64) {
        pace.stepped(phase, Duration::from_millis(milliseconds));
        pace.prefilled(prompt_tokens);
    }

    #[test]
    fn prompts_do_not_make_decoding_look_slow_nor_the_other_way_round() {
        let mut pace = Pace::default();
        assert_eq!((pace.decode_ms(), pace.prompt_token_ms()), (0.0, 0.0));
        step(&mut pace, StepPhase::Prefill, 500, 1000);
        assert_eq!((pace.decode_ms(), pace.prompt_token_ms()), (0.0, 0.5));
        for _ in 0..20 {
            step(&mut pace, StepPhase::Decode, 10, 0);
            step(&mut pace, StepPhase::Mixed, 260, 500);
        }
        assert_eq!((pace.decode_ms(), pace.prompt_token_ms()), (10.0, 0.5));
    }

    #[test]
    fn what_prompts_took_long_ago_is_not_told() {
        let mut pace = Pace::default();
        step(&mut pace, StepPhase::Prefill, 500, 10);
        (0..STALE).for_each(|_| step(&mut pace, StepPhase::Decode, 10, 0));
        assert_eq!(pace.prompt_token_ms(), 50.0);
        step(&mut pace, StepPhase::Decode, 10, 0);
        assert_eq!(pace.prompt_token_ms(), 0.0);
        step(&mut pace, StepPhase::Mixed, 20, 10);
        assert_eq!(pace.prompt_token_ms(), 1.0);
    }

    #[test]
    fn the_past_fades_and_short_prompts_weigh_little() {
        let mut pace = Pace::default();
        step(&mut pace, StepPhase::Decode, 10, 0);
        for _ in 0..100 {
            step(&mut pace, StepPhase::Decode, 20, 0);
        }
        assert!((pace.decode_ms() - 20.0).abs() < 0.01, "{}", pace.decode_ms());
        step(&mut pace, StepPhase::Prefill, 500, 1000);
        step(&mut pace, StepPhase::Prefill, 5, 1);
        assert!(pace.prompt_token_ms() < 0.52, "{}", pace.prompt_token_ms());
    }
}
