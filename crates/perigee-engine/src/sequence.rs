//! A session's record: its tokens, how it is sampled, and what its text and log-probabilities are so far. Everything in
//! it serialises, because it moves with the session; slots, pages and queue places are the scheduler's affair.

use perigee_sampling::{SampleError, Sampled, SamplingParams, TokenCounts};
use perigee_text::grammar::GrammarSource;
use perigee_text::{DetokenizeStream, StopError, StopMatcher, TextError, Tokenizer};
use perigee_trace::TraceContext;
use serde::{Deserialize, Serialize};

use crate::request::{FinishReason, PositionLogprobs, Request, SessionEvent, SessionId, StopRule, TokenLogprob, Usage};

/// A session as it is between steps, without what only makes sense where it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// The session.
    pub session: SessionId,
    /// Request id for log lines.
    pub request_id: String,
    /// The epoch that its events carry.
    pub epoch: u64,
    /// Choice of its request.
    pub choice: u32,
    /// Prompt and output tokens.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_length: u64,
    /// How tokens are drawn; the seed is set.
    pub sampling: SamplingParams,
    /// When generation ends.
    pub stop: StopRule,
    /// Token ids that end generation: stop tokens, and the model's end-of-sequence tokens unless those are ignored.
    pub end_tokens: Vec<u32>,
    /// Most tokens, prompt and output together.
    pub max_length: u64,
    /// Larger goes first.
    pub priority: i32,
    /// Separates prefix caches of tenants.
    pub cache_salt: String,
    /// Tokens seen, kept only where penalties need them.
    pub counts: TokenCounts,
    /// Text on its way out, where text is wanted or stop strings are looked for.
    pub text: Option<TextState>,
    /// Log-probabilities of the prompt, until the first event takes them along.
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Prompt tokens found in the prefix cache.
    pub cached: u64,
    /// What the text must be. Where it is in it follows from the tokens.
    pub grammar: Option<GrammarSource>,
    /// Whether it waits for another router where its own is lost.
    pub resumable: bool,
    /// The router's place in the request's trace, which sessions go on from on every replica.
    pub trace: Option<TraceContext>,
}

/// Text of a session: a detokeniser and a stop matcher, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextState {
    /// Tokens in, whole characters out.
    pub stream: DetokenizeStream,
    /// Characters in, text that cannot become a stop string out.
    pub matcher: StopMatcher,
    /// Whether events carry the text; if not, only stop strings are of interest.
    pub wanted: bool,
}

/// Log-probabilities of a prompt as they come in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptLogprobs {
    /// Alternatives for each token.
    pub top: u32,
    /// For every prompt token so far; none for the first.
    pub positions: Vec<Option<PositionLogprobs>>,
}

impl PromptLogprobs {
    /// Nothing but the first token, which nothing predicts.
    pub fn new(top: u32) -> Self {
        Self { top, positions: vec![None] }
    }

    /// Takes the row of logits of the next position, \[V\], which predicts `token`.
    ///
    /// # Errors
    /// The row is not what a forward pass gives.
    pub fn record(&mut self, logits: &[f32], token: u32) -> Result<(), SampleError> {
        let reported = perigee_sampling::prompt_logprobs(logits, token, self.top)?;
        self.positions.push(Some(position(token, reported.logprob, &reported.top)));
        Ok(())
    }
}

/// What a model and its tokenizer mean for every session.
#[derive(Debug, Clone, Copy)]
pub struct TextContext<'a> {
    /// Makes text of tokens.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: &'a [u32],
    /// Most tokens of a session.
    pub max_length: u64,
}

/// Why a session's text state cannot be made or moved on.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    /// The tokenizer failed.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Stop strings outside their limits.
    #[error(transparent)]
    Stop(#[from] StopError),
}

/// What a token led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Text that became final.
    pub text: String,
    /// The end, if this was the last token.
    pub finish: Option<FinishReason>,
}

impl Sequence {
    /// The session of one choice of a request, counted from the request's first. Tokens delivered before are taken in as if they had
    /// been drawn here, without their text; the second value is the end where they already reached it.
    ///
    /// # Errors
    /// [`SequenceError`] for stop strings outside their limits and tokens that have no text.
    pub fn new(
        request: &Request,
        index: u32,
        session: SessionId,
        context: &TextContext<'_>,
    ) -> Result<(Self, Option<FinishReason>), SequenceError> {
        let mut sampling = request.sampling.clone();
        let top = request.prompt_logprobs.or(sampling.prompt_logprobs);
        sampling.prompt_logprobs = top;
        let counts =
            if sampling.needs_counts() { TokenCounts::from_prompt(&request.prompt) } else { TokenCounts::new() };
        let mut sequence = Self {
            session,
            request_id: request.request_id.clone(),
            epoch: request.epoch,
            choice: request.first_choice + index,
            tokens: request.prompt.clone(),
            prompt_length: request.prompt.len() as u64,
            end_tokens: end_tokens(&request.stop, context.eos_token_ids),
            stop: request.stop.clone(),
            max_length: context.max_length,
            priority: request.priority,
            cache_salt: request.cache_salt.clone(),
            counts,
            text: TextState::new(request, context.tokenizer)?,
            // The first event took them along where tokens were delivered before.
            prompt_logprobs: top.filter(|_| request.delivered.is_empty()).map(PromptLogprobs::new),
            cached: 0,
            grammar: request.grammar.as_ref().map(|grammar| grammar.source.clone()),
            resumable: request.resumable,
            trace: request.trace,
            sampling,
        };
        let mut finish = None;
        for &token in &request.delivered {
            finish = finish.or(sequence.accept(token, false, context.tokenizer)?.finish);
        }
        Ok((sequence, finish))
    }

    /// Tokens known.
    pub fn length(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// An event of it with nothing but whose it is and where.
    pub(crate) fn event(&self) -> SessionEvent {
        SessionEvent {
            session: self.session.clone(),
            epoch: self.epoch,
            choice: self.choice,
            index: self.completion(),
            token: None,
            text: String::new(),
            logprobs: None,
            prompt_logprobs: None,
            finish: None,
            error: None,
            usage: None,
        }
    }

    /// Tokens generated.
    pub fn completion(&self) -> u64 {
        self.length() - self.prompt_length
    }

    /// Whether a token ends generation.
    pub fn is_end(&self, token: u32) -> bool {
        self.end_tokens.binary_search(&token).is_ok()
    }

    /// Tokens that may not be drawn after `completion` generated ones: the ends, before `min_tokens` are there.
    pub fn banned(&self, completion: u64) -> &[u32] {
        if completion < u64::from(self.stop.min_tokens) { &self.end_tokens } else { &[] }
    }

    /// Counts for the client.
    pub fn usage(&self) -> Usage {
        Usage { prompt: self.prompt_length, completion: self.completion(), cached: self.cached }
    }

    /// Appends a token that was drawn: moves counts and text on and applies the stop rules. Text that was held back comes
    /// out with the last token, except a stop string. With `completes` it is the last token that a grammar has.
    ///
    /// # Errors
    /// [`SequenceError::Text`] where the tokenizer has no text for the token.
    pub fn accept(
        &mut self,
        token: u32,
        completes: bool,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Accepted, SequenceError> {
        self.tokens.push(token);
        if self.sampling.needs_counts() {
            self.counts.record_output(token);
        }
        let completion = self.completion();
        let is_end_token = self.is_end(token);
        let is_full = completion >= u64::from(self.stop.max_tokens) || self.length() >= self.max_length;
        let mut accepted = Accepted::default();
        if is_end_token || completes {
            accepted.finish = Some(FinishReason::Stop);
        } else if is_full {
            accepted.finish = Some(FinishReason::Length);
        }
        let (Some(text), Some(tokenizer)) = (&mut self.text, tokenizer) else { return Ok(accepted) };
        if !is_end_token {
            let may_stop = completion >= u64::from(self.stop.min_tokens);
            text.push(tokenizer, token, may_stop, &mut accepted)?;
        }
        if accepted.finish.is_some() {
            text.finish(tokenizer, &mut accepted)?;
        }
        if !text.wanted {
            accepted.text.clear();
        }
        Ok(accepted)
    }
}

impl TextState {
    /// None where neither text nor stop strings are asked for, or there is no tokenizer (the door has refused that).
    fn new(request: &Request, tokenizer: Option<&Tokenizer>) -> Result<Option<Self>, SequenceError> {
        let Some(tokenizer) = tokenizer.filter(|_| request.text || !request.stop.stop.is_empty()) else {
            return Ok(None);
        };
        let stream = DetokenizeStream::new(tokenizer, true);
        let matcher = StopMatcher::new(request.stop.stop.clone(), false)?;
        Ok(Some(Self { stream, matcher, wanted: request.text }))
    }

    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        may_stop: bool,
        accepted: &mut Accepted,
    ) -> Result<(), SequenceError> {
        let piece = self.stream.push(tokenizer, token)?;
        if may_stop {
            self.match_stops(&piece, accepted);
        } else {
            accepted.text.push_str(&self.matcher.pass(&piece));
        }
        Ok(())
    }

    /// The last token is in: gives out what was held back, unless a stop string was found.
    fn finish(&mut self, tokenizer: &Tokenizer, accepted: &mut Accepted) -> Result<(), SequenceError> {
        if self.matcher.stopped().is_none() {
            let piece = self.stream.finish(tokenizer)?;
            self.match_stops(&piece, accepted);
            accepted.text.push_str(&self.matcher.finish());
        }
        Ok(())
    }

    fn match_stops(&mut self, piece: &str, accepted: &mut Accepted) {
        let output = self.matcher.push(piece);
        accepted.text.push_str(&output.text);
        if output.stopped.is_some() {
            accepted.finish = Some(FinishReason::Stop);
        }
    }
}

/// The log-probabilities of a drawn token, where they were asked for.
pub(crate) fn drawn_logprobs(sampled: &Sampled) -> Option<PositionLogprobs> {
    sampled.logprob.map(|logprob| position(sampled.token, logprob, &sampled.top))
}

fn position(token: u32, logprob: f32, top: &[(u32, f32)]) -> PositionLogprobs {
    let top = top.iter().map(|&(token, logprob)| TokenLogprob { token, logprob }).collect();
    PositionLogprobs { chosen: TokenLogprob { token, logprob }, top }
}

/// Sorted, each once.
fn end_tokens(stop: &StopRule, eos_token_ids: &[u32]) -> Vec<u32> {
    let eos = if stop.ignore_eos { &[] } else { eos_token_ids };
    let mut ends: Vec<u32> = stop.stop_token_ids.iter().chain(eos).copied().collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}
