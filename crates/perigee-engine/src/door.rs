//! Checks at the engine's door: what a request may ask for here. A request that passes can always be served to its end,
//! so nothing behind the door refuses one.

use std::collections::BTreeSet;

use perigee_sampling::params::MAX_LOGPROBS;
use perigee_text::StopMatcher;

use crate::handle::ScoreRequest;
use crate::request::{RefusedRequest, Request};
use crate::scheduler::{Limits, NeverFits};

/// The most stop tokens of a request.
pub(crate) const MAX_STOP_TOKENS: usize = 256;

#[derive(Debug, Clone)]
pub(crate) struct Door {
    pub(crate) limits: Limits,
    pub(crate) vocab: usize,
    pub(crate) has_tokenizer: bool,
}

impl Door {
    /// Whether a request can be served here.
    pub(crate) fn check(&self, request: &Request) -> Result<(), RefusedRequest> {
        self.check_tokens(&request.prompt)?;
        self.check_sessions(request)?;
        request
            .sampling
            .validate(self.vocab)
            .map_err(|error| invalid(error.field, format!("is {}, but must be {}", error.found, error.allowed)))?;
        check_logprobs("prompt_logprobs", request.prompt_logprobs)?;
        self.check_stop(request)?;
        self.check_size(request)
    }

    /// Whether tokens can be scored here.
    pub(crate) fn check_score(&self, request: &ScoreRequest) -> Result<(), RefusedRequest> {
        self.check_tokens(&request.tokens)?;
        check_logprobs("prompt_logprobs", Some(request.top))?;
        let most = request.tokens.len() as u64;
        self.limits.check(1, most).map_err(|error| never_fits(error, "token_ids"))
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), RefusedRequest> {
        if tokens.is_empty() {
            return Err(invalid("token_ids", "is empty, but there must be at least one token".into()));
        }
        match tokens.iter().find(|token| **token as usize >= self.vocab) {
            Some(token) => Err(invalid("token_ids", self.beyond_vocabulary(*token))),
            None => Ok(()),
        }
    }

    fn check_sessions(&self, request: &Request) -> Result<(), RefusedRequest> {
        let names: BTreeSet<_> = request.sessions.iter().collect();
        if names.is_empty() || names.len() < request.sessions.len() {
            return Err(invalid("n", "must be at least 1, with a session of its own for every choice".into()));
        }
        if !request.delivered.is_empty() && request.sessions.len() > 1 {
            return Err(invalid("n", "must be 1 where tokens were delivered before; replay each choice alone".into()));
        }
        match request.delivered.iter().find(|token| **token as usize >= self.vocab) {
            Some(token) => Err(invalid("delivered", self.beyond_vocabulary(*token))),
            None => Ok(()),
        }
    }

    fn check_stop(&self, request: &Request) -> Result<(), RefusedRequest> {
        let stop = &request.stop;
        if stop.max_tokens == 0 {
            return Err(invalid("max_tokens", "is 0, but must be at least 1".into()));
        }
        if stop.min_tokens > stop.max_tokens {
            let message = format!("is {}, but must be at most max_tokens, {}", stop.min_tokens, stop.max_tokens);
            return Err(invalid("min_tokens", message));
        }
        if stop.stop_token_ids.len() > MAX_STOP_TOKENS {
            let message =
                format!("has {} tokens, but at most {MAX_STOP_TOKENS} are allowed", stop.stop_token_ids.len());
            return Err(invalid("stop_token_ids", message));
        }
        if let Some(token) = stop.stop_token_ids.iter().find(|token| **token as usize >= self.vocab) {
            return Err(invalid("stop_token_ids", self.beyond_vocabulary(*token)));
        }
        StopMatcher::new(stop.stop.clone(), false).map_err(|error| invalid("stop", error.to_string()))?;
        let needs_text = if request.text { Some("text") } else { (!stop.stop.is_empty()).then_some("stop") };
        match needs_text {
            Some(field) if !self.has_tokenizer => {
                Err(invalid(field, "needs a tokenizer, and this model has none; use token ids".into()))
            }
            _ => Ok(()),
        }
    }

    fn check_size(&self, request: &Request) -> Result<(), RefusedRequest> {
        let prompt = request.prompt.len() as u64;
        let limit = self.limits.max_length;
        if prompt >= limit {
            let message = format!("has {prompt} tokens, but prompt and output together are limited to {limit}");
            return Err(invalid("token_ids", message));
        }
        let max_tokens = u64::from(request.stop.max_tokens);
        if prompt + max_tokens > limit {
            let message =
                format!("is {max_tokens}, but a prompt of {prompt} tokens leaves {} of {limit}", limit - prompt);
            return Err(invalid("max_tokens", message));
        }
        // The last token is drawn but not fed.
        let most = prompt + max_tokens - 1;
        let field = if self.limits.check(1, prompt).is_err() { "token_ids" } else { "max_tokens" };
        self.limits.check(request.sessions.len() as u64, most).map_err(|error| never_fits(error, field))
    }

    fn beyond_vocabulary(&self, token: u32) -> String {
        format!("has token {token}, but the vocabulary has {} tokens, numbered from 0", self.vocab)
    }
}

fn check_logprobs(field: &'static str, top: Option<u32>) -> Result<(), RefusedRequest> {
    match top {
        Some(top) if top > MAX_LOGPROBS => Err(invalid(field, format!("is {top}, but must be at most {MAX_LOGPROBS}"))),
        _ => Ok(()),
    }
}

fn never_fits(error: NeverFits, field: &'static str) -> RefusedRequest {
    match error {
        NeverFits::Sessions { wanted, limit } => {
            invalid("n", format!("is {wanted}, but this replica runs at most {limit} sessions at once"))
        }
        NeverFits::Length { wanted, limit } => {
            invalid(field, format!("leads to {wanted} positions, but a session has at most {limit}"))
        }
        NeverFits::Pages { wanted, limit } => invalid(
            field,
            format!("leads to {wanted} positions, but this replica's latent pages hold {limit}; use a larger cache"),
        ),
    }
}

fn invalid(field: &'static str, message: String) -> RefusedRequest {
    RefusedRequest::Invalid { field, message }
}
