//! The parameters of one request's draws and their allowed ranges. Only what decides a token or its logprobs is here;
//! lengths, stop conditions and the number of choices belong to the engine.

use serde::{Deserialize, Serialize};

/// The most entries that `logit_bias` may have.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// The most alternatives that `logprobs` and `prompt_logprobs` may ask for.
pub const MAX_LOGPROBS: u32 = 20;

/// How tokens are drawn. The default draws from the model's own distribution with seed 0: temperature 1, nothing
/// filtered, nothing penalised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Divides the logits before sampling; finite, at least 0. 0 means greedy: the largest logit, filters and seed
    /// unused.
    pub temperature: f32,
    /// Keeps the k largest logits; 0 keeps all.
    pub top_k: u32,
    /// Keeps the smallest set of most likely tokens whose probability reaches this; in (0, 1], 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the most likely one; in \[0, 1\], 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits and multiplies the others of tokens in prompt or output; above 0, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output; in \[-2, 2\], 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it is in the output; in \[-2, 2\], 0 is off.
    pub frequency_penalty: f32,
    /// (token, value) pairs added to the logits; at most [`MAX_LOGIT_BIAS`], each token once, values finite.
    pub logit_bias: Vec<(u32, f32)>,
    /// The seed of the noise. Any value; requests without one get one drawn before they reach this crate.
    pub seed: u64,
    /// Report the logprob of each drawn token and of this many most likely ones; at most [`MAX_LOGPROBS`].
    pub logprobs: Option<u32>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// A parameter outside its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {found}, but it must be {allowed}")]
pub struct ParamError {
    /// The field's name, as in [`SamplingParams`].
    pub field: &'static str,
    /// What was given.
    pub found: String,
    /// What is allowed.
    pub allowed: String,
}

impl SamplingParams {
    /// Greedy decoding with everything else off.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// True where the largest logit is taken and no noise is drawn.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// True where a draw depends on the tokens seen before, so that somebody must keep [`crate::TokenCounts`].
    pub fn needs_counts(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every field against its range, for a model of `vocab` tokens.
    ///
    /// # Errors
    /// [`ParamError`] names the first field that is out of range, what was found and what is allowed.
    pub fn validate(&self, vocab: usize) -> Result<(), ParamError> {
        check_number("temperature", self.temperature, |value| value >= 0.0, "finite and at least 0")?;
        check_number("top_p", self.top_p, |value| value > 0.0 && value <= 1.0, "above 0 and at most 1")?;
        check_number("min_p", self.min_p, |value| (0.0..=1.0).contains(&value), "between 0 and 1")?;
        check_number("repetition_penalty", self.repetition_penalty, |value| value > 0.0, "finite and above 0")?;
        check_number("presence_penalty", self.presence_penalty, |value| value.abs() <= 2.0, "between -2 and 2")?;
        check_number("frequency_penalty", self.frequency_penalty, |value| value.abs() <= 2.0, "between -2 and 2")?;
        check_logprobs("logprobs", self.logprobs)?;
        check_logprobs("prompt_logprobs", self.prompt_logprobs)?;
        self.validate_logit_bias(vocab)
    }

    fn validate_logit_bias(&self, vocab: usize) -> Result<(), ParamError> {
        let refuse = |found: String, allowed: String| Err(ParamError { field: "logit_bias", found, allowed });
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            return refuse(
                format!("a list of {} entries", self.logit_bias.len()),
                format!("a list of at most {MAX_LOGIT_BIAS} entries"),
            );
        }
        for &(token, value) in &self.logit_bias {
            if token as usize >= vocab {
                return refuse(format!("set for token {token}"), format!("set only for tokens below {vocab}"));
            }
            if !value.is_finite() {
                return refuse(format!("{value} for token {token}"), "finite".to_owned());
            }
        }
        let mut tokens: Vec<u32> = self.logit_bias.iter().map(|&(token, _)| token).collect();
        tokens.sort_unstable();
        match tokens.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => refuse(format!("set twice for token {}", pair[0]), "set at most once for a token".to_owned()),
            None => Ok(()),
        }
    }
}

fn check_number(field: &'static str, value: f32, allowed: fn(f32) -> bool, range: &str) -> Result<(), ParamError> {
    if value.is_finite() && allowed(value) {
        return Ok(());
    }
    Err(ParamError { field, found: value.to_string(), allowed: range.to_owned() })
}

fn check_logprobs(field: &'static str, count: Option<u32>) -> Result<(), ParamError> {
    match count {
        Some(count) if count > MAX_LOGPROBS => {
            Err(ParamError { field, found: count.to_string(), allowed: format!("at most {MAX_LOGPROBS}") })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 100;

    fn refused(change: impl FnOnce(&mut SamplingParams)) -> ParamError {
        let mut params = SamplingParams::default();
        change(&mut params);
        params.validate(VOCAB).unwrap_err()
    }

    #[test]
    fn defaults_and_extremes_are_accepted() {
        SamplingParams::default().validate(VOCAB).unwrap();
        SamplingParams::greedy().validate(VOCAB).unwrap();
        let extreme = SamplingParams {
            temperature: f32::MAX,
            top_k: u32::MAX,
            top_p: f32::MIN_POSITIVE,
            min_p: 1.0,
            repetition_penalty: f32::MIN_POSITIVE,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logit_bias: (0..VOCAB as u32).map(|token| (token, -100.0)).collect(),
            seed: u64::MAX,
            logprobs: Some(MAX_LOGPROBS),
            prompt_logprobs: Some(0),
        };
        extreme.validate(VOCAB).unwrap();
        let bytes = postcard::to_stdvec(&extreme).unwrap();
        assert_eq!(postcard::from_bytes::<SamplingParams>(&bytes).unwrap(), extreme);
    }

    #[test]
    fn every_field_out_of_range_is_named() {
        for bad in [-0.1, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(|p| p.temperature = bad).field, "temperature");
            assert_eq!(refused(|p| p.repetition_penalty = bad).field, "repetition_penalty");
            assert_eq!(refused(|p| p.min_p = bad).field, "min_p");
            assert_eq!(refused(|p| p.top_p = bad).field, "top_p");
        }
        assert_eq!(refused(|p| p.top_p = 0.0).field, "top_p");
        assert_eq!(refused(|p| p.top_p = 1.5).field, "top_p");
        assert_eq!(refused(|p| p.min_p = 1.5).field, "min_p");
        assert_eq!(refused(|p| p.repetition_penalty = 0.0).field, "repetition_penalty");
        for bad in [-2.1, 2.1, f32::NAN] {
            assert_eq!(refused(|p| p.presence_penalty = bad).field, "presence_penalty");
            assert_eq!(refused(|p| p.frequency_penalty = bad).field, "frequency_penalty");
        }
        assert_eq!(refused(|p| p.logprobs = Some(21)).field, "logprobs");
        assert_eq!(refused(|p| p.prompt_logprobs = Some(21)).field, "prompt_logprobs");
        let text = refused(|p| p.top_p = 1.5).to_string();
        assert_eq!(text, "top_p is 1.5, but it must be above 0 and at most 1");
    }

    #[test]
    fn logit_bias_is_checked_entry_by_entry() {
        let too_large = refused(|p| p.logit_bias = vec![(1, 0.0), (100, 1.0)]);
        assert_eq!(
            too_large.to_string(),
            "logit_bias is set for token 100, but it must be set only for tokens below 100"
        );
        assert!(refused(|p| p.logit_bias = vec![(1, f32::NEG_INFINITY)]).found.contains("token 1"));
        assert!(refused(|p| p.logit_bias = vec![(7, 1.0), (3, 1.0), (7, 2.0)]).found.contains("twice for token 7"));
        let with_entries = |entries: u32| SamplingParams {
            logit_bias: (0..entries).map(|token| (token, 1.0)).collect(),
            ..SamplingParams::default()
        };
        assert!(with_entries(1025).validate(2000).unwrap_err().found.contains("1025"));
        with_entries(1024).validate(2000).unwrap();
    }
}
