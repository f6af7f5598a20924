//! The HTTP API against scripted replicas: what its objects and events hold, that it takes gRPC's way, and what ends a
//! request.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use perigee_proto::internal::{
    Counts, Finish, Position, Refused, RefusedReason, SessionEvent, Submit, replica_message,
};
use perigee_text::{ChatTemplate, GenerationConfig, SpecialIds, Tokenizer, byte_level_tokenizer};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tower::ServiceExt;

use super::fake::{Attached, Sandbox, finished, token};
use crate::{Limits, RouterConfig};

/// Sends a request; the handler runs by itself.
fn post(sandbox: &Sandbox, path: &str, body: &Value) -> JoinHandle<Response> {
    send(sandbox, Request::post(path).body(Body::from(body.to_string())).expect("a request"))
}

fn send(sandbox: &Sandbox, request: Request<Body>) -> JoinHandle<Response> {
    let routes = crate::http::routes(sandbox.router.inference.clone());
    tokio::spawn(async move { routes.oneshot(request).await.expect("infallible") })
}

async fn read(response: JoinHandle<Response>) -> (StatusCode, Value) {
    let response = response.await.expect("no panic");
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.expect("a body");
    (status, serde_json::from_slice(&bytes).expect("JSON"))
}

/// The data of all events, without `[DONE]`, which must be the last.
async fn read_events(response: JoinHandle<Response>) -> Vec<Value> {
    let response = response.await.expect("no panic");
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.expect("a body");
    let text = String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let mut data: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"));
    data.into_iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

fn ended(submit: &Submit, index: u64, finish: Finish) -> SessionEvent {
    let mut event = finished(token(submit, index), finish);
    event.usage = Some(Box::new(Counts { prompt: submit.prompt.len() as u64, completion: index + 1, cached: 1 }));
    event
}

/// An event of another choice.
fn of_choice(mut event: SessionEvent, submit: &Submit, choice: usize) -> SessionEvent {
    event.session = submit.sessions[choice].clone();
    event
}

async fn with_text() -> Sandbox {
    let json = byte_level_tokenizer(300, SpecialIds::default()).expect("room").to_string();
    let tokenizer =
        Tokenizer::from_json(json.as_bytes(), "tokenizer.json".into(), GenerationConfig::default()).expect("valid");
    let template = "{% if tools %}{{ tools | length }} tools {% endif %}{{ messages[0].content }}".to_owned();
    let template = ChatTemplate::parse(template, PathBuf::from("t")).expect("valid");
    Sandbox::start_with(RouterConfig::default(), Some(Arc::new(tokenizer)), Some(Arc::new(template))).await
}

#[tokio::test(start_paused = true)]
async fn completions_are_gathered_over_prompts_and_choices() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let body = json!({"model": "random:tiny@0", "prompt": [[1, 2, 3], [4]], "n": 2, "max_tokens": 2, "temperature": 0.5,
                      "seed": -1, "stop": "x", "logit_bias": {"7": -3.5}, "top_k": -1, "user": "ignored",
                      "guided_json": null, "bad_words": [], "use_beam_search": false});
    let answer = post(&sandbox, "/v1/completions", &body);
    let (first, second) = (attached.next_submit().await, attached.next_submit().await);
    assert_eq!((first.prompt.as_slice(), second.prompt.as_slice()), ([1, 2, 3].as_slice(), [4].as_slice()));
    let sampling = first.sampling.as_ref().expect("set");
    assert_eq!((sampling.temperature, sampling.seed, sampling.top_k), (0.5, u64::MAX, 0));
    assert_eq!((sampling.bias_ids.as_slice(), sampling.bias_values.as_slice()), ([7].as_slice(), [-3.5].as_slice()));
    assert_eq!((first.stop.as_slice(), first.max_tokens), (["x".to_owned()].as_slice(), 2));
    for submit in [&second, &first] {
        for choice in [1, 0] {
            let events = [token(submit, 0), ended(submit, 1, Finish::Length)];
            attached.step(events.into_iter().map(|event| of_choice(event, submit, choice)).collect());
        }
    }
    let (status, object) = read(answer).await;
    assert_eq!((status, &object["object"]), (StatusCode::OK, &json!("text_completion")));
    let choices = object["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 4);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!("t0 t1 ")));
        assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("length"), &Value::Null));
    }
    let usage = json!({"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12,
                       "prompt_tokens_details": {"cached_tokens": 2}});
    assert_eq!(object["usage"], usage);
    sandbox.assert_idle().await;
}

/// What lm-eval asks for: the prompt's own log-probabilities.
#[tokio::test(start_paused = true)]
async fn a_prompt_is_scored_without_an_answer() {
    let sandbox = with_text().await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let body = json!({"prompt": "AB", "echo": true, "max_tokens": 0, "logprobs": 1});
    let answer = post(&sandbox, "/v1/completions", &body);
    let submit = attached.next_submit().await;
    assert_eq!((submit.max_tokens, submit.prompt_logprobs), (1, Some(1)));
    let mut event = ended(&submit, 0, Finish::Length);
    let known = Position { has_chosen: true, ids: vec![submit.prompt[1], 67], logprobs: vec![-1.5, -0.5] };
    event.prompt_logprobs = vec![Position::default(), known];
    event.logprobs = Some(Box::new(Position { has_chosen: true, ids: vec![100], logprobs: vec![-9.0] }));
    attached.step(vec![event]);
    let (_, object) = read(answer).await;
    let choice = &object["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("AB"), &json!("length")));
    let expected = json!({"tokens": ["A", "B"], "token_logprobs": [null, -1.5],
                          "top_logprobs": [null, {"C": -0.5, "B": -1.5}], "text_offset": [0, 1]});
    assert_eq!(choice["logprobs"], expected);
    assert_eq!(object["usage"]["completion_tokens"], 0);
}

#[tokio::test(start_paused = true)]
async fn streams_end_with_counts_and_done() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let body = json!({"prompt": [1, 2], "stream": true, "stream_options": {"include_usage": true}});
    let answer = post(&sandbox, "/v1/completions", &body);
    let submit = attached.next_submit().await;
    assert_eq!(submit.max_tokens, 16, "OpenAI's default");
    let mut without_text = token(&submit, 1);
    without_text.text.clear();
    attached.step(vec![token(&submit, 0), without_text, ended(&submit, 2, Finish::Stop)]);
    let events = read_events(answer).await;
    let told: Vec<Value> = events
        .iter()
        .map(|event| {
            json!([event["choices"][0]["text"], event["choices"][0]["finish_reason"], event["usage"]["total_tokens"]])
        })
        .collect();
    assert_eq!(told, [json!(["t0 ", null, null]), json!(["t2 ", "stop", null]), json!([null, null, 5])]);
    assert!(events.iter().all(|event| event["id"] == events[0]["id"] && event["object"] == "text_completion"));
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_goes_away_ends_its_request() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    // In the middle of a stream.
    let answer = post(&sandbox, "/v1/completions", &json!({"prompt": [1], "stream": true}));
    let submit = attached.next_submit().await;
    attached.step(vec![token(&submit, 0)]);
    let mut body = answer.await.expect("no panic").into_body().into_data_stream();
    let first: Bytes = body.next().await.expect("an event").expect("no error");
    assert!(first.starts_with(b"data: {"));
    drop(body);
    assert_eq!(attached.next_abort().await, submit.sessions);
    // While a whole answer is gathered.
    let answer = post(&sandbox, "/v1/completions", &json!({"prompt": [1]}));
    let submit = attached.next_submit().await;
    answer.abort();
    assert_eq!(attached.next_abort().await, submit.sessions);
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn an_error_has_a_status_before_the_first_token_and_is_an_event_after_it() {
    let sandbox = Sandbox::start(super::fake::impatient()).await;
    let (mut replica, mut attached) = sandbox.add("a").await;
    let answer = post(&sandbox, "/v1/completions", &json!({"prompt": [1], "stream": true}));
    let submit = attached.next_submit().await;
    let refusal = Refused {
        sessions: submit.sessions,
        reason: RefusedReason::Invalid.into(),
        field: "sampling.top_k".to_owned(),
        message: "no".to_owned(),
    };
    attached.send(replica_message::Body::Refused(refusal));
    let (status, object) = read(answer).await;
    assert_eq!((status, &object["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("top_k")));
    attached.next_abort().await;

    let answer = post(&sandbox, "/v1/completions", &json!({"prompt": [1], "stream": true}));
    let submit = attached.next_submit().await;
    attached.step(vec![token(&submit, 0)]);
    // The status is out once the first token is there.
    let response = answer.await.expect("no panic");
    assert_eq!(response.status(), StatusCode::OK);
    drop((attached, replica.kill.take()));
    let events = read_events(tokio::spawn(async { response })).await;
    assert_eq!(events[0]["choices"][0]["text"], "t0 ");
    assert_eq!((&events[1]["error"]["type"], events.len()), (&json!("server_error"), 2), "{events:?}");
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn bad_requests_are_refused_in_openais_shape() {
    let limits = Limits { message_bytes: 1000, text_bytes: 500, prompts: 2, requests: 1, ..Limits::default() };
    let sandbox = Sandbox::start(RouterConfig { limits, ..RouterConfig::default() }).await;
    let (status, object) = read(post(&sandbox, "/v1/completions", &json!({"prompt": "x"}))).await;
    assert_eq!((status, &object["error"]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("no_replica")));
    let (_replica, _attached) = sandbox.add("a").await;
    let _only_place = sandbox.router.inference.admission.enter().expect("free");
    let chat = json!([{"role": "user", "content": "x"}]);
    for (path, body, status, param) in [
        ("/v1/completions", json!({"prompt": "x", "model": "other"}), 404, json!("model")),
        ("/v1/completions", json!({"prompt": "x".repeat(2000)}), 413, Value::Null),
        ("/v1/completions", json!({"prompt": {"a": 1}}), 400, json!("prompt")),
        ("/v1/completions", json!({}), 400, json!("prompt")),
        ("/v1/completions", json!({"prompt": [1], "max_tokens": "5"}), 400, json!("max_tokens")),
        ("/v1/completions", json!({"prompt": [1], "stop": [1]}), 400, json!("stop")),
        ("/v1/completions", json!({"prompt": [1], "stream": "yes"}), 400, json!("stream")),
        ("/v1/completions", json!({"seed": 0.5, "prompt": [1]}), 400, json!("seed")),
        ("/v1/completions", json!([1]), 400, Value::Null),
        ("/v1/completions", json!({"prompt": [1], "guided_regex": "a+"}), 400, json!("guided_regex")),
        ("/v1/completions", json!({"prompt": [1], "bad_words": ["a"]}), 400, json!("bad_words")),
        ("/v1/completions", json!({"prompt": ["a", "b", "c"]}), 400, json!("prompt")),
        ("/v1/completions", json!({"prompt": []}), 400, json!("prompt")),
        ("/v1/completions", json!({"prompt": [1], "top_p": 7}), 400, json!("top_p")),
        ("/v1/completions", json!({"prompt": [1], "n": 99}), 400, json!("n")),
        ("/v1/completions", json!({"prompt": [1], "best_of": 3}), 400, json!("best_of")),
        ("/v1/completions", json!({"prompt": [1], "suffix": "x"}), 400, json!("suffix")),
        ("/v1/completions", json!({"prompt": [1], "logit_bias": {"x": 1}}), 400, json!("logit_bias")),
        ("/v1/completions", json!({"prompt": [1], "logprobs": 21}), 400, json!("logprobs")),
        ("/v1/completions", json!({"prompt": [1]}), 429, Value::Null),
        ("/v1/chat/completions", json!({"messages": []}), 400, json!("messages")),
        ("/v1/chat/completions", json!({}), 400, json!("messages")),
        ("/v1/chat/completions", json!({"messages": "x"}), 400, json!("messages")),
        ("/v1/chat/completions", json!({"messages": chat, "logprobs": 3}), 400, json!("logprobs")),
        ("/v1/chat/completions", json!({"messages": chat, "functions": [{"name": "f"}]}), 400, json!("functions")),
        ("/v1/chat/completions", json!({"messages": [{"content": "x"}]}), 400, json!("messages")),
        ("/v1/chat/completions", json!({"messages": chat, "top_logprobs": 2}), 400, json!("top_logprobs")),
        ("/v1/chat/completions", json!({"messages": chat, "tools": [{"type": "function"}]}), 400, json!("tools")),
        ("/tokenize", json!({"prompt": 1}), 400, json!("prompt")),
        ("/detokenize", json!({}), 400, json!("tokens")),
        ("/detokenize", json!({"tokens": ["a"]}), 400, json!("tokens")),
        ("/detokenize", json!({"tokens": [1]}), 429, Value::Null),
        ("/nowhere", json!({}), 404, Value::Null),
        ("/v1/models", json!({}), 405, Value::Null),
    ] {
        let (found, object) = read(post(&sandbox, path, &body)).await;
        assert_eq!((found.as_u16(), &object["error"]["param"]), (status, &param), "{path} {body}: {object}");
        assert!(object["error"]["message"].is_string() && object["error"]["type"].is_string(), "{object}");
    }
    let malformed = Request::post("/v1/completions").body(Body::from("{\"prompt\"")).expect("a request");
    assert_eq!(read(send(&sandbox, malformed)).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for_without_end() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let begun = tokio_stream::iter([Ok::<_, std::io::Error>(Bytes::from("{\"prompt\""))]);
    let body = Body::from_stream(begun.chain(tokio_stream::pending()));
    let (status, object) = read(send(&sandbox, Request::post("/v1/completions").body(body).expect("a request"))).await;
    assert_eq!(status, StatusCode::REQUEST_TIMEOUT, "{object}");
}

#[tokio::test(start_paused = true)]
async fn a_cluster_without_a_tokenizer_has_no_chat_and_no_text() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, _attached) = sandbox.add("a").await;
    for (path, body) in [
        ("/v1/completions", json!({"prompt": "x"})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}]})),
        ("/tokenize", json!({"prompt": "x"})),
        ("/detokenize", json!({"tokens": [1]})),
    ] {
        let (status, object) = read(post(&sandbox, path, &body)).await;
        assert_eq!((status, &object["error"]["code"]), (StatusCode::PRECONDITION_FAILED, &json!("no_tokenizer")));
    }
}

#[tokio::test(start_paused = true)]
async fn models_and_tokens_are_told() {
    let sandbox = with_text().await;
    let (_replica, _attached) = sandbox.add("a").await;
    let get = |path: &str| send(&sandbox, Request::get(path).body(Body::empty()).expect("a request"));
    let (_, models) = read(get("/v1/models")).await;
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("random:tiny@0"), &json!(100)));
    assert_eq!(read(get("/v1/models/random:tiny@0")).await.1["id"], "random:tiny@0");
    assert_eq!(read(get("/v1/models/a/b")).await.0, StatusCode::NOT_FOUND);
    let (_, tokens) = read(post(&sandbox, "/tokenize", &json!({"prompt": "AB"}))).await;
    assert_eq!((&tokens["tokens"], &tokens["count"]), (&json!([65, 66]), &json!(2)));
    let chat = json!({"messages": [{"role": "user", "content": "C"}]});
    assert_eq!(read(post(&sandbox, "/tokenize", &chat)).await.1["tokens"], json!([67]));
    assert_eq!(read(post(&sandbox, "/detokenize", &json!({"tokens": [65, 66]}))).await.1["prompt"], "AB");
    assert_eq!(read(post(&sandbox, "/tokenize", &json!({}))).await.0, StatusCode::BAD_REQUEST);
}

const CALL: [&str; 4] = [
    "ok <|tool_calls",
    "_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\"",
    ": 1}<|tool_ca",
    "ll_end|><|tool_calls_section_end|>",
];

async fn answer_with_a_call(attached: &mut Attached) -> Submit {
    let submit = attached.next_submit().await;
    for (index, text) in (0..).zip(CALL) {
        let event = if index == 3 { ended(&submit, index, Finish::Stop) } else { token(&submit, index) };
        attached.step(vec![SessionEvent { text: text.to_owned(), ..event }]);
    }
    submit
}

#[tokio::test(start_paused = true)]
async fn calls_of_tools_are_told_apart_from_text() {
    let sandbox = with_text().await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let mut body = json!({"messages": [{"role": "user", "content": "C"}], "tools": tools, "max_completion_tokens": 9});
    let answer = post(&sandbox, "/v1/chat/completions", &body);
    let submit = answer_with_a_call(&mut attached).await;
    assert_eq!((submit.prompt.as_slice(), submit.max_tokens), (b"1 tools C".map(u32::from).as_slice(), 9));
    let (_, object) = read(answer).await;
    let call = json!({"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}});
    let message = json!({"role": "assistant", "content": "ok ", "refusal": null, "tool_calls": [call]});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "tool_calls"});
    assert_eq!(object["choices"], json!([choice]));

    body["stream"] = true.into();
    let answer = post(&sandbox, "/v1/chat/completions", &body);
    answer_with_a_call(&mut attached).await;
    let events = read_events(answer).await;
    let deltas: Vec<Value> = events.iter().map(|event| event["choices"][0]["delta"].clone()).collect();
    let arguments = |text: &str| json!({"tool_calls": [{"index": 0, "function": {"arguments": text}}]});
    let begin = json!({"tool_calls": [{"index": 0, "id": "functions.f:0", "type": "function",
                                       "function": {"name": "f", "arguments": ""}}]});
    let expected = [
        json!({"role": "assistant", "content": ""}),
        json!({"content": "ok "}),
        begin,
        arguments("{\"a\""),
        arguments(": 1}"),
        json!({}),
    ];
    assert_eq!(deltas, expected);
    assert_eq!(events.last().expect("one")["choices"][0]["finish_reason"], "tool_calls");

    // Who wants no call gets the text as it is, and the template no tools.
    body["tool_choice"] = "none".into();
    body["stream"] = false.into();
    let answer = post(&sandbox, "/v1/chat/completions", &body);
    let submit = answer_with_a_call(&mut attached).await;
    assert_eq!(submit.prompt, [67]);
    let (_, object) = read(answer).await;
    assert_eq!(object["choices"][0]["message"]["content"], CALL.concat());
    assert_eq!(object["choices"][0]["finish_reason"], "stop");
}
