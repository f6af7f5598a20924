//! The HTTP client against a real socket: what servers may send, and that a request which is given up ends there.

use std::convert::Infallible;
use std::ops::ControlFlow;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::target::{Ask, Counts, Failure, OpenAiApi, OpenAiOptions, OpenAiTarget, Target};
use crate::{Dialogue, Message, Segment};

fn tls() -> rustls::ClientConfig {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    builder.expect("versions").with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
}

pub(super) async fn target(routes: Router, api: OpenAiApi) -> OpenAiTarget {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/v1/", listener.local_addr().expect("an address"));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let options = OpenAiOptions { url, model: "m".to_owned(), api, key: Some("secret".to_owned()), tls: tls() };
    OpenAiTarget::new(options).expect("a target")
}

/// Asks for three tokens; returns texts, and breaks after `enough` of them.
async fn ask(target: &OpenAiTarget, enough: usize) -> (Vec<String>, Result<Counts, Failure>) {
    let user = |seed| Message::User(vec![Segment { seed, tokens: 3 }]);
    let answer = Message::Answer { text: "sure".to_owned(), tokens: vec![] };
    let dialogue = Dialogue(vec![user(1), answer, user(2)]);
    let ask = Ask { name: "n", dialogue: &dialogue, max_tokens: 3, temperature: Some(0.0), ignore_eos: true };
    let mut texts = Vec::new();
    let hear = &mut |heard: crate::target::Heard<'_>| {
        if heard.tokens > 0 {
            texts.push(heard.text.to_owned());
        }
        if texts.len() >= enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let result = target.ask(ask, hear).await;
    (texts, result)
}

fn stream(parts: &[&str]) -> Response {
    let parts: Vec<_> = parts.iter().map(|part| Ok::<_, Infallible>(Bytes::from(part.to_string()))).collect();
    Body::from_stream(tokio_stream::iter(parts)).into_response()
}

#[tokio::test]
async fn chat_sends_the_dialogue_and_reads_what_servers_stream() {
    async fn handle(headers: axum::http::HeaderMap, Json(body): Json<Value>) -> Response {
        assert_eq!(headers["authorization"], "Bearer secret");
        let roles: Vec<&str> =
            body["messages"].as_array().expect("messages").iter().filter_map(|m| m["role"].as_str()).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        assert_eq!(
            (&body["max_tokens"], &body["stream"], &body["ignore_eos"]),
            (&json!(3), &json!(true), &json!(true))
        );
        stream(&[
            "data: {\"choices\": [{\"delta\": {\"role\": \"assistant\", \"content\": \"\"}, \"finish_reason\": null}]}\n\n",
            "data: {\"choices\": [{\"delta\": {\"content\": \"a\"}}]}\n\ndata: {\"choices\": [{\"delta\": {\"conte",
            "nt\": \"b\"}}], \"usage\": null}\n\n",
            "data: {\"choices\": [{\"delta\": {}, \"finish_reason\": \"length\"}]}\n\n",
            "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 9, \"completion_tokens\": 3, \
             \"prompt_tokens_details\": {\"cached_tokens\": 4}}}\n\ndata: [DONE]\n\n",
        ])
    }
    let target = target(Router::new().route("/v1/chat/completions", post(handle)), OpenAiApi::Chat).await;
    let (texts, result) = ask(&target, usize::MAX).await;
    assert_eq!(texts, ["a", "b"]);
    assert_eq!(result, Ok(Counts { prompt: Some(9), cached: Some(4), output: Some(3) }));
}

#[tokio::test]
async fn every_way_to_fail_has_a_code() {
    async fn handle(Json(body): Json<Value>) -> Response {
        assert!(body["prompt"].as_str().is_some_and(|text| text.contains(" sure ")), "{body}");
        static CALLS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        match CALLS.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => (StatusCode::TOO_MANY_REQUESTS, "busy").into_response(),
            1 => stream(&[
                "data: {\"choices\": [{\"text\": \"a\"}]}\n\n",
                "data: {\"error\": {\"message\": \"oh\"}}\n\n",
            ]),
            2 => stream(&["data: {\"choices\": [{\"text\": \"a\"}]}\n\n"]),
            _ => stream(&["data: nonsense\n\n"]),
        }
    }
    let target = target(Router::new().route("/v1/completions", post(handle)), OpenAiApi::Completions).await;
    for (code, tokens) in [("429", 0), ("ERROR_EVENT", 1), ("CUT_OFF", 1), ("MALFORMED", 0)] {
        let (texts, result) = ask(&target, usize::MAX).await;
        assert_eq!((result.map_err(|failure| failure.code), texts.len()), (Err(code.to_owned()), tokens));
    }
    let nobody = OpenAiOptions { url: "http://127.0.0.1:1".to_owned(), ..target_options() };
    let (_, result) = ask(&OpenAiTarget::new(nobody).expect("a target"), 1).await;
    assert_eq!(result.map_err(|failure| failure.code), Err("CONNECT".to_owned()));
    for url in ["127.0.0.1:8000", "ftp://x", "http://"] {
        assert!(OpenAiTarget::new(OpenAiOptions { url: url.to_owned(), ..target_options() }).is_err(), "{url}");
    }
}

fn target_options() -> OpenAiOptions {
    OpenAiOptions { url: String::new(), model: "m".to_owned(), api: OpenAiApi::Chat, key: None, tls: tls() }
}

#[tokio::test]
async fn giving_up_closes_the_connection() {
    let (gone, mut seen) = mpsc::unbounded_channel::<()>();
    let handle = move || {
        let gone = gone.clone();
        async move {
            let (parts, body) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                // Tokens without end, until nobody reads them.
                while parts.send(Bytes::from_static(b"data: {\"choices\": [{\"text\": \"x\"}]}\n\n")).is_ok() {
                    tokio::task::yield_now().await;
                }
                let _ = gone.send(());
            });
            Body::from_stream(UnboundedReceiverStream::new(body).map(Ok::<_, Infallible>)).into_response()
        }
    };
    let target = target(Router::new().route("/v1/completions", post(handle)), OpenAiApi::Completions).await;
    let (texts, result) = ask(&target, 2).await;
    assert_eq!((texts.len(), result), (2, Ok(Counts::default())));
    assert_eq!(seen.recv().await, Some(()), "the server noticed");
}
