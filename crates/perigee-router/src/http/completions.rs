//! /v1/completions: one or several prompts, as text or token ids, each with its choices.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use perigee_proto::v1;
use perigee_text::SpecialTokens;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_stream::{Stream, StreamExt};

use super::answers::{Answers, Started, finish_reason};
use super::body::Body;
use super::error::HttpError;
use super::logprobs::{Lists, Shower};
use super::sampling::Shared;
use super::{events, now, response_format};
use crate::service::InferenceService;
use crate::trace::HttpTrace;
use crate::validate::{self, Prompt};

/// Tokens to generate where a client does not say, as with OpenAI.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// The body.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a JSON object")]
pub(crate) struct CompletionRequest {
    prompt: Option<Prompts>,
    max_tokens: Option<u32>,
    logprobs: Option<u32>,
    echo: Option<bool>,
    best_of: Option<u32>,
    suffix: Option<String>,
    response_format: Option<Value>,
    #[serde(flatten)]
    shared: Shared,
}

/// The forms of a prompt.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, texts, token ids or lists of token ids")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// Answers.
pub(crate) async fn handle(
    State(service): State<InferenceService>,
    HttpTrace(traced): HttpTrace,
    Body(body): Body<CompletionRequest>,
) -> Result<Response, HttpError> {
    let model = service.model()?;
    body.shared.check_model(&model)?;
    let (request, prompts) = (body.request()?, body.prompts(&service)?);
    let echoed: Vec<Option<String>> = prompts.iter().map(|prompt| body.echoed(prompt)).collect();
    let Started { answers, prompts, name } = Answers::start(&service, &traced, &request, prompts, "prompt").await?;
    let mut writer = Writer {
        head: json!({"id": format!("cmpl-{name}"), "object": "text_completion", "created": now(), "model": model.name}),
        shower: Shower(service.text.tokenizer().cloned()),
        echo: body.echo.unwrap_or(false),
        // The one token that had to be drawn is no part of the answer.
        only_prompt: body.max_tokens == Some(0),
        logprobs: body.logprobs.is_some(),
        choices: vec![Progress::default(); answers.total(prompts.len())],
        prompts: Vec::with_capacity(prompts.len()),
    };
    for (tokens, text) in prompts.into_iter().zip(echoed) {
        let text = match text {
            None if writer.echo => service.text.decode("prompt", tokens.clone()).await?,
            text => text.unwrap_or_default(),
        };
        writer.prompts.push((tokens, text));
    }
    if body.shared.streams() {
        let with_usage = body.shared.includes_usage();
        return Ok(events::respond(writer.stream(answers, with_usage)));
    }
    Ok(Json(writer.whole(answers).await?).into_response())
}

impl CompletionRequest {
    fn request(&self) -> Result<v1::GenerateRequest, HttpError> {
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(HttpError::invalid("suffix", "text between a prompt and a suffix is not offered"));
        }
        if self.best_of.is_some_and(|best_of| best_of != self.shared.n.unwrap_or(1)) {
            return Err(HttpError::invalid("best_of", "it is not offered, except with the value of n"));
        }
        let mut request = self.shared.request()?;
        let max_tokens = self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        request.max_tokens = Some(max_tokens.max(1));
        request.grammar = response_format::grammar(self.response_format.as_ref())?;
        if let Some(sampling) = &mut request.sampling {
            sampling.logprobs = self.logprobs;
            sampling.prompt_logprobs = self.logprobs.filter(|_| self.echo.unwrap_or(false));
        }
        Ok(request)
    }

    fn prompts(&self, service: &InferenceService) -> Result<Vec<Prompt>, HttpError> {
        let text = |text: &String| {
            validate::text_length("prompt", text, &service.limits)?;
            Ok(Prompt::Text(text.clone(), SpecialTokens::AsText))
        };
        let Some(prompts) = &self.prompt else { return Err(HttpError::invalid("prompt", "it is missing")) };
        let prompts = match prompts {
            Prompts::Text(one) => vec![text(one)?],
            Prompts::Texts(several) => several.iter().map(text).collect::<Result<_, HttpError>>()?,
            Prompts::Tokens(one) => vec![Prompt::Tokens(one.clone())],
            Prompts::TokenLists(several) => several.iter().cloned().map(Prompt::Tokens).collect(),
        };
        let most = service.limits.prompts;
        if prompts.is_empty() || prompts.len() > most {
            let message = format!("there are {} prompts, but 1 to {most} are taken", prompts.len());
            return Err(HttpError::invalid("prompt", message));
        }
        Ok(prompts)
    }

    /// A prompt's text where it is to come back as it was sent.
    fn echoed(&self, prompt: &Prompt) -> Option<String> {
        match prompt {
            Prompt::Text(text, _) if self.echo.unwrap_or(false) => Some(text.clone()),
            _ => None,
        }
    }
}

/// Makes OpenAI's objects of responses.
struct Writer {
    head: Value,
    shower: Shower,
    echo: bool,
    only_prompt: bool,
    logprobs: bool,
    /// Tokens and text of each.
    prompts: Vec<(Vec<u32>, String)>,
    choices: Vec<Progress>,
}

/// How far a choice is.
#[derive(Clone, Default)]
struct Progress {
    has_begun: bool,
    /// Characters given out.
    offset: usize,
}

/// What a response adds to a choice.
#[derive(Default)]
struct Piece {
    text: String,
    lists: Lists,
    finish: Option<&'static str>,
}

impl Writer {
    fn piece(&mut self, index: usize, prompt: usize, response: &v1::GenerateResponse) -> Piece {
        let mut piece = Piece { finish: finish_reason(response), ..Piece::default() };
        let (Some(choice), Some((tokens, text))) = (self.choices.get_mut(index), self.prompts.get(prompt)) else {
            return piece;
        };
        if self.echo && !choice.has_begun {
            piece.text.push_str(text);
            if self.logprobs {
                piece.lists.push_prompt(&self.shower, tokens, &response.prompt_logprobs);
            }
            choice.offset = text.chars().count();
        }
        choice.has_begun = true;
        if self.only_prompt {
            piece.finish = piece.finish.map(|_| "length");
            return piece;
        }
        if let Some(position) = response.logprobs.as_ref().filter(|_| self.logprobs)
            && let Some(token) = response.token_id
        {
            piece.lists.push(&self.shower, token, Some(position), choice.offset);
        }
        choice.offset += response.text.chars().count();
        piece.text.push_str(&response.text);
        piece
    }

    fn choice(&self, index: usize, piece: &Piece) -> Value {
        let logprobs = if self.logprobs { piece.lists.object() } else { Value::Null };
        json!({"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish})
    }

    fn usage(&self, answers: &Answers) -> Value {
        let counts = answers.counts();
        if self.only_prompt { counts.without_completion().object() } else { counts.object() }
    }

    fn object(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut object = self.head.clone();
        object["choices"] = choices.into();
        if let Some(usage) = usage {
            object["usage"] = usage;
        }
        object
    }

    async fn whole(mut self, mut answers: Answers) -> Result<Value, HttpError> {
        let mut pieces: Vec<Piece> = self.choices.iter().map(|_| Piece::default()).collect();
        while let Some((prompt, response)) = answers.try_next().await? {
            let index = answers.index(prompt, &response);
            let piece = self.piece(index, prompt, &response);
            let Some(whole) = pieces.get_mut(index) else { continue };
            whole.text.push_str(&piece.text);
            whole.lists.extend(piece.lists);
            whole.finish = piece.finish.or(whole.finish);
        }
        let choices = pieces.iter().enumerate().map(|(index, piece)| self.choice(index, piece)).collect();
        Ok(self.object(choices, Some(self.usage(&answers))))
    }

    fn stream(mut self, answers: Answers, with_usage: bool) -> impl Stream<Item = Result<Value, HttpError>> {
        events::objects(answers, move |answers, item| {
            let no_usage = || with_usage.then_some(Value::Null);
            let Some((prompt, response)) = item else {
                return with_usage.then(|| self.object(Vec::new(), Some(self.usage(answers)))).into_iter().collect();
            };
            let index = answers.index(prompt, &response);
            let piece = self.piece(index, prompt, &response);
            let is_empty = piece.text.is_empty() && piece.lists == Lists::default() && piece.finish.is_none();
            if is_empty { Vec::new() } else { vec![self.object(vec![self.choice(index, &piece)], no_usage())] }
        })
    }
}
