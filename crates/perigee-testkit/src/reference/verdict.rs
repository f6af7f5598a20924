//! Holds what a session gave, wherever it ran and however often it moved, against what it gives undisturbed: tokens, text,
//! log-probabilities and its end. A token may differ only where rounding may decide it, and only tests count how often that
//! was.

use std::sync::Arc;

use perigee_engine::request::{FinishReason, PositionLogprobs, Request, SessionId};
use perigee_engine::sequence::{Sequence, TextContext};
use perigee_sampling::{Draw, Sampled, Scratch, sample};
use perigee_text::Tokenizer;
use perigee_worker::load::tokenizer;

use super::{Course, Reference};
use crate::error::{Result, TestkitError};

/// A draw closer than this (top-2 scores, or a filter's cut) may fall either way.
const MARGIN: f32 = 1e-4;
/// A choice of experts closer than this (k-th minus next score) may fall either way.
const ROUTER_GAP: f32 = 2e-5;
/// What log-probabilities of the same token may differ by.
const LOGPROB: f32 = 1e-4;

/// What a client received of one choice.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// The tokens, from index 0.
    pub tokens: Vec<u32>,
    /// All text.
    pub text: String,
    /// One a token where they were asked for, else none.
    pub logprobs: Vec<PositionLogprobs>,
    /// Of the prompt, where they were asked for; none for its first token.
    pub prompt_logprobs: Vec<Option<PositionLogprobs>>,
    /// How it ended; none where it was cut short.
    pub finish: Option<FinishReason>,
    /// The first position at which anything could have disturbed it.
    pub disturbed: usize,
}

/// Why one difference may be rounding.
#[derive(Debug, Clone)]
pub struct Excuse {
    /// What differs.
    pub what: String,
    /// How close the draw was; infinite where nothing was drawn.
    pub margin: f32,
    /// The narrowest choice of experts between the disturbance and there.
    pub router_gap: f32,
}

impl Excuse {
    fn holds(&self) -> bool {
        self.margin < MARGIN || self.router_gap < ROUTER_GAP
    }
}

/// What came of a comparison.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// Everything is equal.
    Same,
    /// Something differs, by rounding.
    Excused(Vec<Excuse>),
    /// Something differs that rounding does not explain.
    Different(String),
}

/// Undisturbed runs of one model. Comparisons of the same prompt one after the other share its computation, those of the
/// same output too.
pub struct Undisturbed {
    reference: Reference,
    tokenizer: Option<Arc<Tokenizer>>,
    eos: Vec<u32>,
    scratch: Scratch,
    longest: usize,
}

impl Undisturbed {
    /// Opens a model, named as `--model` takes it, for sequences of at most `longest` tokens.
    ///
    /// # Errors
    /// The model or its tokenizer cannot be opened.
    pub fn open(model: &str, longest: usize) -> Result<Self> {
        let tokenizer = tokenizer(&model.parse()?)?;
        let reference = Reference::open(model, longest)?;
        let eos = reference.model.config().eos.clone();
        Ok(Self { reference, tokenizer, eos, scratch: Scratch::new(), longest })
    }

    /// Computes a prompt ahead of what is judged next.
    ///
    /// # Errors
    /// The model refuses it.
    pub fn prepare(&mut self, prompt: &[u32]) -> Result<()> {
        self.reference.begin(prompt, false)
    }

    /// Judges choice `index` of a request.
    ///
    /// # Errors
    /// The model refuses what was generated, or nothing can be drawn from its logits.
    pub fn judge(&mut self, request: &Request, index: u32, seen: &Observed) -> Result<Verdict> {
        self.reference.begin(&request.prompt, !seen.prompt_logprobs.is_empty())?;
        let course = self.reference.follow(&seen.tokens)?;
        let mut excuses = Vec::new();
        let judged = self.prompt(request, seen, &course, &mut excuses).and_then(|()| {
            let drawn = self.draws(request, index, seen, &course)?;
            Self::tokens(request, seen, (&course, &drawn), &mut excuses)
        });
        match judged {
            Ok(()) if excuses.is_empty() => Ok(Verdict::Same),
            Ok(()) => Ok(Verdict::Excused(excuses)),
            Err(Fault::Different(what)) => Ok(Verdict::Different(what)),
            Err(Fault::Broken(error)) => Err(error),
        }
    }

    /// Goes through the session as the engine would, with the tokens that were seen: what is drawn at each, and that text
    /// and end are what follows from them.
    fn draws(
        &mut self,
        request: &Request,
        index: u32,
        seen: &Observed,
        course: &Course,
    ) -> std::result::Result<Vec<Sampled>, Fault> {
        let context = TextContext {
            tokenizer: self.tokenizer.as_deref(),
            eos_token_ids: &self.eos,
            max_length: self.longest as u64,
        };
        let broken = |error: &dyn std::fmt::Display| Fault::Broken(TestkitError::Options(error.to_string()));
        let session = SessionId("undisturbed".into());
        let (mut sequence, _) = Sequence::new(request, index, session, &context).map_err(|error| broken(&error))?;
        let (mut drawn, mut text, mut finish) = (Vec::new(), String::new(), None);
        for (number, &token) in seen.tokens.iter().enumerate() {
            if finish.is_some() {
                return Err(Fault::Different(format!("it goes on after {number} tokens, where it ends: {finish:?}")));
            }
            let draw = Draw {
                params: &sequence.sampling,
                choice: sequence.choice,
                position: sequence.length(),
                counts: &sequence.counts,
                banned: sequence.banned(sequence.completion()),
                allowed: None,
            };
            let sampled = sample(course.logits(number), &draw, &mut self.scratch);
            drawn.push(sampled.map_err(|error| broken(&error))?);
            let accepted = sequence.accept(token, false, context.tokenizer).map_err(|error| broken(&error))?;
            text.push_str(&accepted.text);
            finish = accepted.finish;
        }
        if seen.finish.is_some() && seen.finish != finish {
            return Err(Fault::Different(format!("it ends with {:?}, undisturbed {finish:?}", seen.finish)));
        }
        // What is held back for a stop string or a character comes with the end.
        let same = if seen.finish.is_some() { text == seen.text } else { text.starts_with(&seen.text) };
        if request.text && !same {
            return Err(Fault::Different(format!("the text is {:?}, undisturbed {text:?}", seen.text)));
        }
        Ok(drawn)
    }

    /// Compares token by token.
    fn tokens(
        request: &Request,
        seen: &Observed,
        (course, drawn): (&Course, &[Sampled]),
        excuses: &mut Vec<Excuse>,
    ) -> std::result::Result<(), Fault> {
        let asked = request.sampling.logprobs.is_some();
        if asked && seen.logprobs.len() != seen.tokens.len() {
            let count = seen.logprobs.len();
            return Err(Fault::Different(format!("{count} log-probabilities for {} tokens", seen.tokens.len())));
        }
        for (number, (&token, sampled)) in seen.tokens.iter().zip(drawn).enumerate() {
            // A token's logits come from the positions before it.
            let position = request.prompt.len() + number;
            let router_gap = course.router_gap(seen.disturbed..position);
            if token != sampled.token {
                let what = format!("token {number} is {token}, undisturbed {}", sampled.token);
                let margin = sampled.margin;
                excuse(Excuse { what, margin, router_gap }, excuses)?;
            } else if asked && !near(&seen.logprobs[number], sampled.logprob, &sampled.top) {
                let (found, right) = (&seen.logprobs[number], (sampled.logprob, &sampled.top));
                let what = format!("log-probabilities of token {number} are {found:?}, undisturbed {right:?}");
                excuse(Excuse { what, margin: f32::INFINITY, router_gap }, excuses)?;
            }
        }
        Ok(())
    }

    /// Compares the log-probabilities of the prompt.
    fn prompt(
        &self,
        request: &Request,
        seen: &Observed,
        course: &Course,
        excuses: &mut Vec<Excuse>,
    ) -> std::result::Result<(), Fault> {
        let Some(top) = request.prompt_logprobs.filter(|_| !seen.prompt_logprobs.is_empty()) else { return Ok(()) };
        let count = seen.prompt_logprobs.len();
        if count != request.prompt.len() || seen.prompt_logprobs[0].is_some() {
            let tokens = request.prompt.len();
            return Err(Fault::Different(format!("{count} log-probabilities for a prompt of {tokens} tokens")));
        }
        for (number, found) in seen.prompt_logprobs.iter().enumerate().skip(1) {
            let token = request.prompt[number];
            let right = perigee_sampling::prompt_logprobs(self.reference.prompt_logits(number - 1), token, top);
            let right = right.map_err(|error| Fault::Broken(TestkitError::Options(error.to_string())))?;
            let is_near = found
                .as_ref()
                .is_some_and(|found| found.chosen.token == token && near(found, Some(right.logprob), &right.top));
            if !is_near {
                let what = format!("log-probabilities of prompt token {number} are {found:?}, undisturbed {right:?}");
                let router_gap = course.router_gap(seen.disturbed..number);
                excuse(Excuse { what, margin: f32::INFINITY, router_gap }, excuses)?;
            }
        }
        Ok(())
    }
}

/// Why a comparison does not go on.
enum Fault {
    Different(String),
    Broken(TestkitError),
}

fn excuse(excuse: Excuse, excuses: &mut Vec<Excuse>) -> std::result::Result<(), Fault> {
    if excuse.holds() {
        excuses.push(excuse);
        return Ok(());
    }
    Err(Fault::Different(format!(
        "{}, without an excuse (margin {}, router gap {})",
        excuse.what, excuse.margin, excuse.router_gap
    )))
}

/// Alternatives that are nearly equal may change places; their values stay.
fn near(found: &PositionLogprobs, logprob: Option<f32>, top: &[(u32, f32)]) -> bool {
    let close = |a: f32, b: f32| (a - b).abs() <= LOGPROB;
    let values = found.top.len() == top.len() && found.top.iter().zip(top).all(|(a, b)| close(a.logprob, b.1));
    values && logprob.is_some_and(|logprob| close(found.chosen.logprob, logprob))
}
