//! /v1/chat/completions: a conversation, with tools or without.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use perigee_proto::v1;
use perigee_text::{ChatInput, ToolCallParser, ToolEvent};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio_stream::{Stream, StreamExt};

use super::answers::{Answers, Started, finish_reason};
use super::body::Body;
use super::error::HttpError;
use super::logprobs::Shower;
use super::messages::conversation;
use super::sampling::Shared;
use super::tools::{self, Tool, ToolChoice};
use super::{events, now, response_format};
use crate::service::InferenceService;
use crate::trace::HttpTrace;
use crate::validate::Prompt;

/// The body.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a JSON object")]
pub(crate) struct ChatRequest {
    messages: Option<Vec<Map<String, Value>>>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
    response_format: Option<Value>,
    /// Whether the text ends with the beginning of the model's turn.
    add_generation_prompt: Option<bool>,
    /// Further variables of the template.
    chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(flatten)]
    shared: Shared,
}

/// Answers.
pub(crate) async fn handle(
    State(service): State<InferenceService>,
    HttpTrace(traced): HttpTrace,
    Body(body): Body<ChatRequest>,
) -> Result<Response, HttpError> {
    let model = service.model()?;
    body.shared.check_model(&model)?;
    let choice = tools::choice(body.tools.as_deref().unwrap_or_default(), body.tool_choice.as_ref())?;
    let uses_tools = choice != ToolChoice::None;
    let mut request = body.request()?;
    request.grammar = match choice {
        ToolChoice::Calls(tools) => {
            Some(tools::grammar(&tools, body.parallel_tool_calls.unwrap_or(true), service.text.tokenizer()))
        }
        ToolChoice::None | ToolChoice::Auto => response_format::grammar(body.response_format.as_ref())?,
    };
    let input = body.input(uses_tools)?;
    let prompt = Prompt::Chat(Box::new(input));
    let Started { answers, name, .. } = Answers::start(&service, &traced, &request, vec![prompt], "messages").await?;
    let object = if body.shared.streams() { "chat.completion.chunk" } else { "chat.completion" };
    let writer = Writer {
        head: json!({"id": format!("chatcmpl-{name}"), "object": object, "created": now(), "model": model.name}),
        shower: Shower(service.text.tokenizer().cloned()),
        logprobs: body.logprobs.unwrap_or(false),
        parsers: vec![uses_tools.then(ToolCallParser::new); answers.total(1)],
    };
    if body.shared.streams() {
        let with_usage = body.shared.includes_usage();
        return Ok(events::respond(writer.stream(answers, with_usage)));
    }
    Ok(Json(writer.whole(answers).await?).into_response())
}

impl ChatRequest {
    fn request(&self) -> Result<v1::GenerateRequest, HttpError> {
        if self.top_logprobs.is_some() && !self.logprobs.unwrap_or(false) {
            return Err(HttpError::invalid("top_logprobs", "it needs logprobs to be true"));
        }
        let mut request = self.shared.request()?;
        request.max_tokens = self.max_completion_tokens.or(self.max_tokens);
        if let Some(sampling) = &mut request.sampling {
            sampling.logprobs = self.logprobs.unwrap_or(false).then(|| self.top_logprobs.unwrap_or(0));
        }
        Ok(request)
    }

    fn input(&self, uses_tools: bool) -> Result<ChatInput, HttpError> {
        let tools = self.tools.iter().flatten().filter(|_| uses_tools).map(|tool| tool.object());
        let tools: Vec<Value> = tools.collect();
        Ok(ChatInput {
            messages: conversation(self.messages.clone().unwrap_or_default())?,
            tools: if tools.is_empty() { Value::Null } else { tools.into() },
            add_generation_prompt: self.add_generation_prompt.unwrap_or(true),
            variables: self.chat_template_kwargs.clone().unwrap_or_default(),
        })
    }
}

/// Makes OpenAI's objects of responses.
struct Writer {
    head: Value,
    shower: Shower,
    logprobs: bool,
    /// Of each choice, where tools may be called.
    parsers: Vec<Option<ToolCallParser>>,
}

/// What a response adds to a choice.
#[derive(Default)]
struct Piece {
    events: Vec<ToolEvent>,
    logprobs: Vec<Value>,
    finish: Option<&'static str>,
}

impl Writer {
    fn piece(&mut self, response: &v1::GenerateResponse) -> Piece {
        let logprobs = response.logprobs.as_ref().filter(|_| self.logprobs);
        let mut piece = Piece {
            logprobs: logprobs.and_then(|position| self.shower.chat(position)).into_iter().collect(),
            finish: finish_reason(response),
            ..Piece::default()
        };
        match self.parsers.get_mut(response.choice as usize) {
            Some(Some(parser)) => {
                piece.events = parser.push(&response.text);
                if piece.finish.is_some() {
                    piece.events.extend(parser.finish());
                }
                if piece.finish == Some("stop") && parser.calls() > 0 {
                    piece.finish = Some("tool_calls");
                }
            }
            _ if response.text.is_empty() => {}
            _ => piece.events.push(ToolEvent::Text(response.text.clone())),
        }
        piece
    }

    fn object(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut object = self.head.clone();
        object["choices"] = choices.into();
        if let Some(usage) = usage {
            object["usage"] = usage;
        }
        object
    }

    fn logprobs(&self, entries: &[Value]) -> Value {
        if self.logprobs { json!({"content": entries, "refusal": null}) } else { Value::Null }
    }

    async fn whole(mut self, mut answers: Answers) -> Result<Value, HttpError> {
        let mut messages: Vec<Message> = self.parsers.iter().map(|_| Message::default()).collect();
        while let Some((_, response)) = answers.try_next().await? {
            let piece = self.piece(&response);
            if let Some(message) = messages.get_mut(response.choice as usize) {
                message.take(piece);
            }
        }
        let choice = |(index, message): (usize, &Message)| {
            json!({
                "index": index,
                "message": message.object(),
                "logprobs": self.logprobs(&message.logprobs),
                "finish_reason": message.finish,
            })
        };
        let choices = messages.iter().enumerate().map(choice).collect();
        Ok(self.object(choices, Some(answers.counts().object())))
    }

    fn stream(mut self, answers: Answers, with_usage: bool) -> impl Stream<Item = Result<Value, HttpError>> {
        let mut has_begun = vec![false; self.parsers.len()];
        events::objects(answers, move |answers, item| {
            let no_usage = || with_usage.then_some(Value::Null);
            let Some((_, response)) = item else {
                let counts = answers.counts().object();
                return with_usage.then(|| self.object(Vec::new(), Some(counts))).into_iter().collect();
            };
            let index = response.choice as usize;
            let piece = self.piece(&response);
            let mut deltas: Vec<Value> = Vec::new();
            if has_begun.get_mut(index).is_some_and(|begun| !std::mem::replace(begun, true)) {
                deltas.push(json!({"role": "assistant", "content": ""}));
            }
            deltas.extend(piece.events.iter().map(delta));
            if deltas.is_empty() && (piece.finish.is_some() || !piece.logprobs.is_empty()) {
                deltas.push(json!({}));
            }
            let last = deltas.len().saturating_sub(1);
            let chunk = |(at, delta): (usize, Value)| {
                // The end and the token's log-probabilities go with the last of several.
                let (entries, finish) = if at == last { (&piece.logprobs[..], piece.finish) } else { (&[][..], None) };
                let logprobs = if entries.is_empty() { Value::Null } else { self.logprobs(entries) };
                let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
                self.object(vec![choice], no_usage())
            };
            deltas.into_iter().enumerate().map(chunk).collect()
        })
    }
}

/// What an event adds to a message.
fn delta(event: &ToolEvent) -> Value {
    match event {
        ToolEvent::Text(text) => json!({"content": text}),
        ToolEvent::Begin { call, id, name } => json!({"tool_calls": [
            {"index": call, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]}),
        ToolEvent::Arguments { call, text } => {
            json!({"tool_calls": [{"index": call, "function": {"arguments": text}}]})
        }
    }
}

/// A message as it grows.
#[derive(Default)]
struct Message {
    content: String,
    calls: Vec<(String, String, String)>,
    logprobs: Vec<Value>,
    finish: Option<&'static str>,
}

impl Message {
    fn take(&mut self, piece: Piece) {
        for event in piece.events {
            match event {
                ToolEvent::Text(text) => self.content.push_str(&text),
                ToolEvent::Begin { id, name, .. } => self.calls.push((id, name, String::new())),
                ToolEvent::Arguments { call, text } => {
                    if let Some((_, _, arguments)) = self.calls.get_mut(call) {
                        arguments.push_str(&text);
                    }
                }
            }
        }
        self.logprobs.extend(piece.logprobs);
        self.finish = piece.finish.or(self.finish);
    }

    fn object(&self) -> Value {
        let mut message = json!({"role": "assistant", "content": self.content, "refusal": null});
        if !self.calls.is_empty() {
            let call = |(id, name, arguments): &(String, String, String)| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
            message["tool_calls"] = self.calls.iter().map(call).collect();
            if self.content.is_empty() {
                message["content"] = Value::Null;
            }
        }
        message
    }
}
