//! Any OpenAI-compatible server as a target: /v1/completions or /v1/chat/completions, streamed, over HTTP/1.1. A response
//! with text counts as one token; where the server reports usage at the end, that is the count.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Request, Response, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Deserialize;
use serde_json::{Value, json};

use super::sse::Events;
use super::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target};
use crate::{LoadError, Message};

/// Bytes of an error's text that a report keeps.
const ERROR_BYTES: usize = 500;

/// How long a connection is kept for another request.
const IDLE: Duration = Duration::from_secs(2);

/// Which of the two interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenAiApi {
    /// /v1/completions.
    Completions,
    /// /v1/chat/completions.
    Chat,
}

/// How a server is reached.
#[derive(Debug, Clone)]
pub struct OpenAiOptions {
    /// http://HOST:PORT or https://HOST:PORT, with what comes before /v1, if anything does.
    pub url: String,
    /// Name of the model.
    pub model: String,
    /// Which interface.
    pub api: OpenAiApi,
    /// Sent as a bearer token.
    pub key: Option<String>,
    /// Whom to trust over https.
    pub tls: rustls::ClientConfig,
}

/// An OpenAI-compatible server.
#[derive(Debug)]
pub struct OpenAiTarget {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    uri: Uri,
    options: OpenAiOptions,
}

/// What a streamed object may have; servers differ in the rest.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl OpenAiTarget {
    /// Prepares a client; connections are opened by requests.
    ///
    /// # Errors
    /// [`LoadError::Target`] for an address that is none.
    pub fn new(options: OpenAiOptions) -> Result<Self, LoadError> {
        let path = match options.api {
            OpenAiApi::Completions => "completions",
            OpenAiApi::Chat => "chat/completions",
        };
        let base = options.url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let uri: Uri = format!("{base}/v1/{path}").parse().map_err(|_| no_url(&options.url))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(no_url(&options.url));
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(options.tls.clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        // Sooner than servers close them (5 s is common), so that no request goes to a connection that is being closed.
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Ok(Self { client, uri, options })
    }

    fn body(&self, ask: Ask<'_>) -> Value {
        let mut body = json!({
            "model": self.options.model,
            "max_tokens": ask.max_tokens,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if let Some(temperature) = ask.temperature {
            body["temperature"] = json!(temperature);
        }
        if ask.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        match self.options.api {
            OpenAiApi::Completions => body["prompt"] = json!(ask.dialogue.text()),
            OpenAiApi::Chat => {
                let messages = ask.dialogue.0.iter().map(|message| {
                    let role = if matches!(message, Message::User(_)) { "user" } else { "assistant" };
                    json!({"role": role, "content": message.text()})
                });
                body["messages"] = messages.collect();
            }
        }
        body
    }

    async fn send(&self, ask: Ask<'_>) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::post(&self.uri).header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.options.key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let body = Full::new(Bytes::from(self.body(ask).to_string()));
        let request = request.body(body).map_err(|error| failure("REQUEST", &error))?;
        let response = self.client.request(request).await.map_err(|error| failure("CONNECT", &error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status().as_u16().to_string();
        let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let message = String::from_utf8_lossy(&body[..body.len().min(ERROR_BYTES)]).into_owned();
        Err(Failure { code, message })
    }

    async fn generate(&self, ask: Ask<'_>, hear: Hear<'_>) -> Result<Counts, Failure> {
        let mut body = self.send(ask).await?.into_body();
        let (mut events, mut counts) = (Events::default(), Counts::default());
        let (mut is_finished, mut is_given_up) = (false, false);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| failure("BROKEN", &error))?;
            let Some(bytes) = frame.data_ref() else { continue };
            events.push(bytes, |data| {
                // Some servers give no finish reason; this ends an answer too.
                is_finished |= data == "[DONE]";
                if data == "[DONE]" || is_given_up {
                    return Ok(());
                }
                let chunk: Chunk = serde_json::from_str(data).map_err(|error| failure("MALFORMED", &error))?;
                if let Some(error) = chunk.error {
                    return Err(Failure { code: "ERROR_EVENT".to_owned(), message: error.to_string() });
                }
                if let Some(usage) = chunk.usage {
                    let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
                    counts = Counts { prompt: usage.prompt_tokens, cached, output: usage.completion_tokens };
                }
                if let Some(choice) = chunk.choices.into_iter().next() {
                    is_finished |= choice.finish_reason.is_some();
                    let text = choice.into_text();
                    let heard = Heard { tokens: u32::from(!text.is_empty()), text: &text, ..Heard::default() };
                    is_given_up = hear(heard).is_break();
                }
                Ok(())
            })?;
            // Dropping the body closes the connection, which is how such servers learn of it.
            if is_given_up {
                return Ok(counts);
            }
        }
        if is_finished { Ok(counts) } else { Err(Failure::cut_off()) }
    }
}

impl Choice {
    fn into_text(self) -> String {
        let delta = self.delta.map(|delta| delta.content.or(delta.reasoning_content).unwrap_or_default());
        self.text.or(delta).unwrap_or_default()
    }
}

impl Target for OpenAiTarget {
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
        Box::pin(self.generate(ask, hear))
    }

    fn describe(&self) -> String {
        format!("{} at {}", self.options.model, self.uri)
    }
}

fn no_url(url: &str) -> LoadError {
    LoadError::Target(format!("expected an address such as http://127.0.0.1:8000, found {url:?}"))
}

/// With the causes, which HTTP clients' errors leave to whoever asks.
fn failure(code: &str, error: &dyn std::error::Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    Failure { code: code.to_owned(), message }
}
