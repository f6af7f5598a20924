//! Connections of HTTP: those that ask for nothing end, those that wait for an answer do not, and the end of a server waits
//! for answers. The clock is virtual and goes on whenever nobody has anything to do.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use perigee_tls::{Listening, Purpose, serve_http};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// What an answer takes: longer than any connection is left alone.
const THOUGHT: Duration = Duration::from_secs(3600);

async fn server() -> (SocketAddr, oneshot::Sender<()>, JoinHandle<()>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let slowly = || async {
        tokio::time::sleep(THOUGHT).await;
        "here"
    };
    let (stop, stopped) = oneshot::channel();
    let listening = Listening::new(listener, None, Purpose::Http);
    let serving = serve_http(listening, Router::new().route("/", get(slowly)), async {
        let _ = stopped.await;
    });
    (address, stop, tokio::spawn(serving))
}

/// Writes, and reads to the end of the connection.
async fn told(address: SocketAddr, request: &str) -> (String, Duration) {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let began = Instant::now();
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    (answer, began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_asks_for_nothing_ends_and_one_that_waits_does_not() {
    let (address, _stop, _server) = server().await;
    for begun in ["", "GET / HTTP/1.1\r\nhost: a\r\n"] {
        let (answer, time) = told(address, begun).await;
        assert!(answer.is_empty() && time < 2 * Duration::from_secs(75), "{answer} after {time:?}");
    }
    let (answer, time) = told(address, "GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
    assert!(time > THOUGHT && time < THOUGHT + 2 * Duration::from_secs(75), "kept, and not for ever: {time:?}");
}

#[tokio::test(start_paused = true)]
async fn the_end_waits_for_answers_and_takes_no_more_connections() {
    let (address, stop, server) = server().await;
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.send(()).unwrap();
    server.await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    TcpStream::connect(address).await.unwrap_err();
}
