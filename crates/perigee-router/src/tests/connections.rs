//! Clients that speak HTTP/2 in their own way: with small windows, or not at all.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, Request};
use h2::client::{Builder, SendRequest};
use h2::{RecvStream, client};
use perigee_proto::internal::Finish;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{DrainRequest, GenerateResponse};
use prost::Message;
use prost::bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::fake::{Sandbox, finished, token};
use super::streams::{generate, prompt};
use crate::RouterConfig;

/// A router whose replicas may say nothing for long.
fn patient() -> RouterConfig {
    RouterConfig { lease: Duration::from_secs(3600), ..RouterConfig::default() }
}

/// A client's connection, which lives as long as the second is polled.
async fn speak(sandbox: &Sandbox, window: u32) -> (SendRequest<Bytes>, client::Connection<DuplexStream>) {
    let io = sandbox.network.dial("router:1").expect("the router listens");
    let mut builder = Builder::new();
    // It would take many small pieces that nobody reads for an attack.
    builder.initial_window_size(window).data_frame_budget(1 << 30);
    builder.handshake(io).await.expect("HTTP/2")
}

/// Sends a call that has so much time.
fn call(client: &mut SendRequest<Bytes>, path: &str, time: &'static str, message: Vec<u8>) -> client::ResponseFuture {
    let mut request = Request::post(format!("http://router{path}")).body(()).expect("a request");
    request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert("grpc-timeout", HeaderValue::from_static(time));
    let (response, mut body) = client.send_request(request, false).expect("the connection lives");
    let framed = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
    body.send_data(framed.into(), true).expect("the stream is open");
    response
}

/// All messages of an answer, and how it ended.
async fn read(mut body: RecvStream) -> (Vec<GenerateResponse>, HeaderMap) {
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.expect("no error");
        bytes.extend_from_slice(&data);
        // Little by little, and only now: until then no more than the window was there.
        body.flow_control().release_capacity(data.len()).expect("it was received");
    }
    let mut messages = Vec::new();
    let mut rest = bytes.as_slice();
    while let [0, a, b, c, d, message @ ..] = rest {
        let (message, behind) = message.split_at(u32::from_be_bytes([*a, *b, *c, *d]) as usize);
        messages.push(GenerateResponse::decode(message).expect("a response"));
        rest = behind;
    }
    assert!(rest.is_empty(), "half a message");
    (messages, body.trailers().await.expect("no error").expect("trailers"))
}

#[tokio::test(start_paused = true)]
async fn tokens_wait_for_a_small_window_in_order() {
    for window in [0, 1, 100, 10_000] {
        let sandbox = Sandbox::start(RouterConfig::default()).await;
        let (_replica, mut attached) = sandbox.add("a").await;
        let (mut client, connection) = speak(&sandbox, window).await;
        tokio::spawn(connection);
        let answer = call(&mut client, "/perigee.v1.Inference/Generate", "1H", prompt().encode_to_vec());
        let submit = attached.next_submit().await;
        let body = answer.await.expect("an answer").into_body();
        let count = 1_000;
        for index in 0..count {
            attached.step(vec![token(&submit, index)]);
            if index == count / 2 {
                // The first half came before anything was read; now all is in the router.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        attached.step(vec![finished(token(&submit, count), Finish::Length)]);
        tokio::time::sleep(Duration::from_millis(100)).await;
        if window > 0 {
            let (messages, trailers) = read(body).await;
            let indices: Vec<u64> = messages.iter().map(|message| message.index).collect();
            assert_eq!(indices, (0..=count).collect::<Vec<_>>(), "window {window}");
            let texts: Vec<_> = messages.iter().map(|message| message.text.clone()).collect();
            assert_eq!(texts, (0..=count).map(|index| format!("t{index} ")).collect::<Vec<_>>());
            assert_eq!(trailers.get("grpc-status"), Some(&HeaderValue::from_static("0")));
        } else {
            // One that never takes a byte is told nothing, and can still leave.
            drop(body);
        }
        drop(client);
        sandbox.assert_idle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_reset_between_tokens_aborts_at_once() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    // Long after the stream's task ran last, since tokens pass it by.
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    for index in 0..300 {
        attached.step(vec![token(&submit, index)]);
        assert_eq!(stream.message().await.expect("no error").expect("a response").index, index);
    }
    let before = Instant::now();
    drop(stream);
    assert_eq!(attached.next_abort().await, submit.sessions);
    assert!(before.elapsed() < Duration::from_millis(100), "no token had to come first");
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_answer_pings_is_gone() {
    let sandbox = Sandbox::start(patient()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (mut client, connection) = speak(&sandbox, 1 << 20).await;
    let (hold, held) = oneshot::channel();
    let holding = tokio::spawn(async move {
        let mut connection = connection;
        // Polled until the request is on its way, and then kept without a look.
        tokio::select! {
            _ = &mut connection => None,
            _ = held => Some(connection),
        }
    });
    let _answer = call(&mut client, "/perigee.v1.Inference/Generate", "1H", prompt().encode_to_vec());
    let submit = attached.next_submit().await;
    let before = Instant::now();
    hold.send(()).expect("it waits");
    let _connection = holding.await.expect("no panic").expect("the router did not end it");
    assert_eq!(attached.next_abort().await, submit.sessions);
    let waited = before.elapsed();
    assert!((Duration::from_secs(14)..Duration::from_secs(16)).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_answers_pings_stays_for_as_long_as_it_likes() {
    let sandbox = Sandbox::start(patient()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    attached.step(vec![finished(token(&submit, 0), Finish::Length)]);
    assert_eq!(stream.message().await.expect("no error").expect("a response").index, 0);
    assert_eq!(stream.message().await.expect("no error"), None);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_sends_anything_is_there_until_it_is_silent() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut read, mut write) = tokio::io::split(sandbox.network.dial("router:1").expect("the router listens"));
    write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("written");
    let reading = tokio::spawn(async move { read.read_to_end(&mut Vec::new()).await });
    // Never an answer to a ping, as if that waited behind a long prompt: room for another byte, again and again.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_secs(4)).await;
        write.write_all(b"\0\0\x04\x08\0\0\0\0\0\0\0\0\x01").await.expect("written");
    }
    assert!(!reading.is_finished(), "it was there for 80 s");
    let before = Instant::now();
    reading.await.expect("no panic").expect("the end");
    assert_eq!(before.elapsed().as_secs(), 15);
}

#[tokio::test(start_paused = true)]
async fn connections_that_do_not_speak_http2_end() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let before = Instant::now();
    let mut silent = sandbox.network.dial("router:1").expect("the router listens");
    let mut other = sandbox.network.dial("router:1").expect("the router listens");
    other.write_all(b"GET / HTTP/1.1\r\nhost: router\r\n\r\n").await.expect("written");
    let mut read = Vec::new();
    // Ended, whether in order or not.
    let _ = other.read_to_end(&mut read).await;
    assert!(before.elapsed() < Duration::from_secs(1));
    let _ = silent.read_to_end(&mut read).await;
    assert_eq!(before.elapsed().as_secs(), 10);
}

#[tokio::test(start_paused = true)]
async fn calls_that_are_no_streams_end_at_their_deadline() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, _attached) = sandbox.add("a").await;
    let (_other, _also_attached) = sandbox.add("b").await;
    let (mut client, connection) = speak(&sandbox, 1 << 20).await;
    tokio::spawn(connection);
    // It would wait until the replica has left, which this one does not.
    let drain = DrainRequest { replica: "a".to_owned() }.encode_to_vec();
    let before = Instant::now();
    let answer = call(&mut client, "/perigee.v1.Cluster/Drain", "700m", drain);
    let answer = answer.await.expect("an answer");
    assert_eq!(answer.headers().get("grpc-status"), Some(&HeaderValue::from_static("4")), "DEADLINE_EXCEEDED");
    assert_eq!(before.elapsed().as_millis(), 700);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_does_not_come_is_waited_for_no_longer_than_its_deadline() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut client, connection) = speak(&sandbox, 1 << 20).await;
    tokio::spawn(connection);
    let request = Request::post("http://router/perigee.v1.Inference/Generate").header("grpc-timeout", "700m");
    let before = Instant::now();
    let (answer, _body) = client.send_request(request.body(()).expect("a request"), false).expect("sent");
    let answer = answer.await.expect("an answer");
    assert_eq!(answer.headers().get("grpc-status"), Some(&HeaderValue::from_static("4")), "DEADLINE_EXCEEDED");
    assert_eq!(before.elapsed().as_millis(), 700);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_told_to_stop_ends_with_its_last_call() {
    let mut sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let incoming = UnboundedReceiverStream::new(sandbox.network.listen("router:2"));
    let incoming = tokio_stream::StreamExt::map(incoming, Ok::<_, std::io::Error>);
    let (server, front) = sandbox.router.grpc().expect("services");
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(front, incoming, async move { drop(stopped.await) }));
    let channel = sandbox.network.channel("router:2").await.expect("connected");
    let sandbox = Sandbox { inference: InferenceClient::new(channel), ..sandbox };
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    attached.step(vec![token(&submit, 0)]);
    assert_eq!(stream.message().await.expect("no error").expect("a response").index, 0);
    stop.send(()).expect("it serves");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!serving.is_finished(), "a call runs");
    assert!(sandbox.network.dial("router:2").is_err(), "no more connections are taken");
    attached.step(vec![finished(token(&submit, 1), Finish::Length)]);
    assert_eq!(stream.message().await.expect("no error").expect("a response").index, 1);
    assert_eq!(stream.message().await.expect("no error"), None);
    serving.await.expect("no panic");
}
