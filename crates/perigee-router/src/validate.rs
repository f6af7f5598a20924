//! What a client may ask for: every field against its limits, before any work is done for it. Pure functions from wire
//! messages to a submission without its prompt; each refusal names the field as the proto does.

use perigee_proto::{ids::RequestId, internal, status::WireError, v1};
use perigee_text::grammar::MAX_SOURCE_BYTES;
use perigee_text::{ChatInput, SpecialTokens};

use crate::config::Limits;
use crate::error;
use crate::model::Model;

type Result<T> = std::result::Result<T, WireError>;

/// Priorities go from minus to plus this.
const MAX_PRIORITY: i32 = 100;

/// What a request's prompt is given as.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    /// Text to encode.
    Text(String, SpecialTokens),
    /// A conversation to render.
    Chat(Box<ChatInput>),
    /// Token ids, not yet checked against the vocabulary.
    Tokens(Vec<u32>),
}

/// A request whose fields are all within limits. Its prompt is to be encoded, and then checked by [`Plan::submission`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub(crate) request_id: Option<RequestId>,
    pub(crate) prompt: Prompt,
    pub(crate) choices: u32,
    pub(crate) seed: Option<u64>,
    max_tokens: Option<u32>,
    /// Everything else, as it goes to a replica.
    submission: internal::Submit,
}

/// Checks a request for generation.
///
/// # Errors
/// INVALID_ARGUMENT with the field, or FAILED_PRECONDITION where stop strings need a tokenizer that is not there.
pub(crate) fn generate(mut request: v1::GenerateRequest, model: &Model, limits: &Limits) -> Result<Plan> {
    let prompt = Prompt::of(&mut request, limits)?;
    generate_from(prompt, request, model, limits)
}

/// The same with a prompt that is not in the request.
///
/// # Errors
/// As [`generate`].
pub(crate) fn generate_from(
    prompt: Prompt,
    request: v1::GenerateRequest,
    model: &Model,
    limits: &Limits,
) -> Result<Plan> {
    let request_id = request_id(&request.request_id)?;
    stop_strings(&request.stop, model, limits)?;
    priority(request.priority)?;
    cache_salt(&request.cache_salt, limits)?;

    let sampling = request.sampling.unwrap_or_default();
    let choices = sampling.n.unwrap_or(1);
    in_range("sampling.n", choices, 1, limits.choices)?;
    if request.max_tokens == Some(0) {
        return Err(WireError::invalid("max_tokens", "it must be at least 1"));
    }
    if request.max_tokens.is_some_and(|most| sampling.min_tokens > most) || sampling.min_tokens > model.max_len {
        return Err(WireError::invalid("sampling.min_tokens", "it must not exceed max_tokens"));
    }
    stop_tokens(&sampling.stop_token_ids, model, limits)?;
    let grammar = request.grammar.map(|grammar| self::grammar(grammar, model)).transpose()?;
    for (field, asked) in [("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)] {
        in_range(&format!("sampling.{field}"), asked.unwrap_or(0), 0, limits.logprobs)?;
    }
    Ok(Plan {
        request_id,
        prompt,
        choices,
        seed: sampling.seed,
        max_tokens: request.max_tokens,
        submission: internal::Submit {
            min_tokens: sampling.min_tokens,
            ignore_eos: sampling.ignore_eos,
            stop_token_ids: sampling.stop_token_ids.clone(),
            stop: request.stop,
            prompt_logprobs: sampling.prompt_logprobs,
            priority: request.priority,
            cache_salt: request.cache_salt,
            text: model.has_tokenizer,
            grammar,
            sampling: Some(numbers(&sampling, model, limits)?),
            ..internal::Submit::default()
        },
    })
}

/// Checks a request for scores. It runs as a generation of one token whose prompt's log-probabilities are the answer.
///
/// # Errors
/// INVALID_ARGUMENT with the field.
pub(crate) fn score(request: v1::ScoreRequest, model: &Model, limits: &Limits) -> Result<Plan> {
    let request_id = request_id(&request.request_id)?;
    priority(request.priority)?;
    cache_salt(&request.cache_salt, limits)?;
    if request.token_ids.len() < 2 {
        return Err(WireError::invalid("token_ids", "at least 2 are needed: the first has no score"));
    }
    let greedy = v1::SamplingParams { temperature: Some(0.0), ..v1::SamplingParams::default() };
    Ok(Plan {
        request_id,
        prompt: Prompt::Tokens(request.token_ids),
        choices: 1,
        seed: Some(0),
        max_tokens: Some(1),
        submission: internal::Submit {
            prompt_logprobs: Some(0),
            priority: request.priority,
            cache_salt: request.cache_salt,
            sampling: Some(numbers(&greedy, model, limits)?),
            ..internal::Submit::default()
        },
    })
}

impl Prompt {
    /// The prompt of a request, checked for what can be said before it is encoded.
    fn of(request: &mut v1::GenerateRequest, limits: &Limits) -> Result<Self> {
        let given =
            (request.text.take(), std::mem::take(&mut request.token_ids), std::mem::take(&mut request.messages));
        let special = special_tokens(request.parse_special);
        match given {
            (Some(text), tokens, messages) if tokens.is_empty() && messages.is_empty() => {
                text_length("text", &text, limits)?;
                Ok(Self::Text(text, special))
            }
            (Some(_), ..) => {
                Err(WireError::invalid("text", "give exactly one of text, token_ids and messages, not more"))
            }
            (None, tokens, messages) if tokens.is_empty() && !messages.is_empty() => {
                let message =
                    |message: v1::ChatMessage| serde_json::json!({"role": message.role, "content": message.content});
                let messages = messages.into_iter().map(message).collect();
                Ok(Self::Chat(Box::new(ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() })))
            }
            (None, tokens, messages) if !tokens.is_empty() && messages.is_empty() => Ok(Self::Tokens(tokens)),
            (None, tokens, _) => {
                let found = if tokens.is_empty() { "none is there" } else { "not more" };
                let message = format!("give exactly one of text, token_ids and messages, {found}");
                Err(WireError::invalid("token_ids", message))
            }
        }
    }

    /// The field that it came in.
    fn field(&self) -> &'static str {
        match self {
            Self::Text(..) => "text",
            Self::Chat(_) => "messages",
            Self::Tokens(_) => "token_ids",
        }
    }
}

impl Plan {
    /// What goes to a replica, once the prompt is encoded; the names of request and sessions, epoch and deadline are the
    /// caller's. `limit_logprobs` is off where a caller has its own answer to long prompts.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for a prompt that is empty, too long, or holds ids beyond the vocabulary, and for what is only
    /// wrong together with the prompt's length.
    pub(crate) fn submission(
        self,
        prompt: Vec<u32>,
        seed: u64,
        model: &Model,
        limit_logprobs: Option<u64>,
    ) -> Result<internal::Submit> {
        let field = self.prompt.field();
        let length = prompt.len() as u64;
        if length == 0 {
            return Err(WireError::invalid(field, "the prompt has no tokens, but at least 1 is needed"));
        }
        if length >= u64::from(model.max_len) {
            let most = model.max_len.saturating_sub(1);
            return Err(WireError::invalid(field, format!("the prompt has {length} tokens, but at most {most} fit")));
        }
        token_ids(field, &prompt, model)?;
        let room = model.max_len - length as u32;
        let max_tokens = self.max_tokens.unwrap_or(room);
        if max_tokens > room {
            let message = format!("it is {max_tokens}, but after a prompt of {length} tokens only {room} fit");
            return Err(WireError::invalid("max_tokens", message));
        }
        if self.submission.min_tokens > max_tokens {
            let message = format!("it is {}, but at most {max_tokens} are generated", self.submission.min_tokens);
            return Err(WireError::invalid("sampling.min_tokens", message));
        }
        if let (Some(limit), Some(top)) = (limit_logprobs, self.submission.prompt_logprobs) {
            let numbers = length * (1 + u64::from(top)) * u64::from(self.choices);
            if numbers > limit {
                let message = format!("prompt tokens x (1 + prompt_logprobs) x n is {numbers}, but at most {limit}");
                return Err(WireError::invalid("sampling.prompt_logprobs", message));
            }
        }
        let mut submission = self.submission;
        if let Some(sampling) = &mut submission.sampling {
            sampling.seed = seed;
        }
        Ok(internal::Submit { prompt, max_tokens, ..submission })
    }
}

/// What becomes of control tokens' names in a client's text.
pub(crate) fn special_tokens(parse: bool) -> SpecialTokens {
    if parse { SpecialTokens::Parse } else { SpecialTokens::AsText }
}

/// Checks the length of a text.
pub(crate) fn text_length(field: &str, text: &str, limits: &Limits) -> Result<()> {
    if text.len() <= limits.text_bytes {
        return Ok(());
    }
    let message = format!("it has {} bytes, but at most {} are taken", text.len(), limits.text_bytes);
    Err(WireError::invalid(field, message))
}

/// Checks token ids against the vocabulary.
pub(crate) fn token_ids(field: &str, tokens: &[u32], model: &Model) -> Result<()> {
    match tokens.iter().find(|&&token| token >= model.vocab) {
        None => Ok(()),
        Some(token) => {
            let message = format!("token {token} is not in the vocabulary of {} tokens", model.vocab);
            Err(WireError::invalid(field, message))
        }
    }
}

fn request_id(text: &str) -> Result<Option<RequestId>> {
    if text.is_empty() {
        return Ok(None);
    }
    RequestId::parse(text).map(Some).map_err(|error| WireError::invalid("request_id", error.to_string()))
}

fn priority(priority: i32) -> Result<()> {
    in_range("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
}

fn cache_salt(salt: &str, limits: &Limits) -> Result<()> {
    if salt.len() <= limits.cache_salt_bytes {
        return Ok(());
    }
    let message = format!("it has {} bytes, but at most {} are taken", salt.len(), limits.cache_salt_bytes);
    Err(WireError::invalid("cache_salt", message))
}

fn stop_strings(stop: &[String], model: &Model, limits: &Limits) -> Result<()> {
    if stop.len() > limits.stop_strings {
        let message = format!("there are {}, but at most {} are taken", stop.len(), limits.stop_strings);
        return Err(WireError::invalid("stop", message));
    }
    if let Some(bad) = stop.iter().find(|text| text.is_empty() || text.len() > limits.stop_bytes) {
        let message = format!("each must have 1 to {} bytes, one has {}", limits.stop_bytes, bad.len());
        return Err(WireError::invalid("stop", message));
    }
    if !stop.is_empty() && !model.has_tokenizer {
        return Err(error::no_tokenizer("stop"));
    }
    Ok(())
}

/// Checks a grammar's length; whether it is one is found out where it is compiled.
fn grammar(grammar: v1::Grammar, model: &Model) -> Result<internal::Grammar> {
    use internal::grammar::Source;
    use v1::grammar::Source as Given;
    if !model.has_tokenizer {
        return Err(error::no_tokenizer("grammar"));
    }
    let source = match grammar.source {
        Some(Given::JsonSchema(schema)) => Source::JsonSchema(schema),
        Some(Given::Regex(expression)) => Source::Regex(expression),
        Some(Given::Lark(grammar)) => Source::Lark(grammar),
        None => return Err(WireError::invalid("grammar", "give exactly one of json_schema, regex and lark")),
    };
    let (Source::JsonSchema(text) | Source::Regex(text) | Source::Lark(text)) = &source;
    if text.len() > MAX_SOURCE_BYTES {
        let message = format!("it has {} bytes, but at most {MAX_SOURCE_BYTES} are taken", text.len());
        return Err(WireError::invalid("grammar", message));
    }
    Ok(internal::Grammar { source: Some(source) })
}

fn stop_tokens(tokens: &[u32], model: &Model, limits: &Limits) -> Result<()> {
    if tokens.len() > limits.stop_token_ids {
        let message = format!("there are {}, but at most {} are taken", tokens.len(), limits.stop_token_ids);
        return Err(WireError::invalid("sampling.stop_token_ids", message));
    }
    token_ids("sampling.stop_token_ids", tokens, model)
}

/// The numbers of sampling, with the model's defaults where they are absent.
fn numbers(sampling: &v1::SamplingParams, model: &Model, limits: &Limits) -> Result<internal::Sampling> {
    let defaults = model.defaults;
    let temperature = sampling.temperature.unwrap_or(defaults.temperature);
    let top_p = sampling.top_p.unwrap_or(defaults.top_p);
    let min_p = sampling.min_p.unwrap_or(defaults.min_p);
    let repetition_penalty = sampling.repetition_penalty.unwrap_or(defaults.repetition_penalty);
    let presence_penalty = sampling.presence_penalty.unwrap_or(0.0);
    let frequency_penalty = sampling.frequency_penalty.unwrap_or(0.0);
    in_range("sampling.temperature", temperature, 0.0, 100.0)?;
    above_zero("sampling.top_p", top_p, 1.0)?;
    in_range("sampling.min_p", min_p, 0.0, 1.0)?;
    above_zero("sampling.repetition_penalty", repetition_penalty, 10.0)?;
    in_range("sampling.presence_penalty", presence_penalty, -2.0, 2.0)?;
    in_range("sampling.frequency_penalty", frequency_penalty, -2.0, 2.0)?;

    if sampling.logit_bias.len() > limits.logit_bias {
        let message =
            format!("it has {} entries, but at most {} are taken", sampling.logit_bias.len(), limits.logit_bias);
        return Err(WireError::invalid("sampling.logit_bias", message));
    }
    let mut biases: Vec<(u32, f32)> = sampling.logit_bias.iter().map(|(&token, &value)| (token, value)).collect();
    // The wire has no order; equal requests are equal messages.
    biases.sort_unstable_by_key(|&(token, _)| token);
    for &(token, value) in &biases {
        token_ids("sampling.logit_bias", &[token], model)?;
        in_range("sampling.logit_bias", value, -100.0, 100.0)?;
    }
    let (bias_ids, bias_values) = biases.into_iter().unzip();
    Ok(internal::Sampling {
        temperature,
        top_k: sampling.top_k.unwrap_or(defaults.top_k),
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        bias_ids,
        bias_values,
        seed: 0,
        logprobs: sampling.logprobs,
    })
}

/// Refuses what is outside, which NaN is of every range.
fn in_range<T: PartialOrd + std::fmt::Display>(field: &str, value: T, least: T, most: T) -> Result<()> {
    if value >= least && value <= most {
        return Ok(());
    }
    Err(WireError::invalid(field, format!("it is {value}, but it must be from {least} to {most}")))
}

/// The same for what divides, or must leave something.
fn above_zero(field: &str, value: f32, most: f32) -> Result<()> {
    if value >= f32::MIN_POSITIVE && value <= most {
        return Ok(());
    }
    Err(WireError::invalid(field, format!("it is {value}, but it must be above 0 and at most {most}")))
}

#[cfg(test)]
mod tests;
