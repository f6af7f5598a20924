//! Bodies that are refused, over real sockets: a client that writes all of its request before it reads gets its answer, and
//! its connection goes on.

use axum::http::StatusCode;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::fake::Sandbox;
use crate::RouterConfig;

/// Beyond the limit of 16 MiB by more than the buffers of any connection.
const BYTES: usize = 40 << 20;

/// A connection to the HTTP port of a router with default limits, for as long as both are held.
async fn connected(servers: &mut JoinSet<()>) -> BufReader<TcpStream> {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    servers.spawn(async move {
        let routes = crate::http::routes(sandbox.router.inference.clone());
        axum::serve(listener, routes).await.expect("served");
    });
    BufReader::new(TcpStream::connect(address).await.expect("connected"))
}

/// Reads a response whose body is JSON.
async fn read(connection: &mut BufReader<TcpStream>) -> (StatusCode, Value) {
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        assert!(connection.read_line(&mut line).await.expect("a line") > 0, "the end instead of a response: {head:?}");
        if line == "\r\n" {
            break;
        }
        head.push(line.trim_end().to_lowercase());
    }
    let status = head[0].split(' ').nth(1).expect("a status").parse().expect("a status");
    let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let mut body = vec![0; length.parse().expect("a number")];
    connection.read_exact(&mut body).await.expect("a body");
    (status, serde_json::from_slice(&body).expect("JSON"))
}

/// All of a request with a body of [`BYTES`], in chunks of a mebibyte where it is `chunked`.
async fn write(connection: &mut BufReader<TcpStream>, path: &str, chunked: bool) {
    let framing = if chunked { "transfer-encoding: chunked".to_owned() } else { format!("content-length: {BYTES}") };
    let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n");
    connection.write_all(head.as_bytes()).await.expect("the head");
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..BYTES / piece.len() {
        if chunked {
            connection.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await.expect("a chunk's length");
        }
        connection.write_all(&piece).await.expect("a piece of the body");
        if chunked {
            connection.write_all(b"\r\n").await.expect("a chunk's end");
        }
    }
    if chunked {
        connection.write_all(b"0\r\n\r\n").await.expect("the end");
    }
}

#[tokio::test]
async fn a_client_that_writes_before_it_reads_is_told_that_its_body_is_too_large() {
    let mut servers = JoinSet::new();
    let mut connection = connected(&mut servers).await;
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize"] {
        for chunked in [false, true] {
            write(&mut connection, path, chunked).await;
            let (status, object) = read(&mut connection).await;
            assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{path} {object}");
            let expected = serde_json::json!({"error": {
                "message": "the body has more than 16777216 bytes", "type": "invalid_request_error", "param": null, "code": null,
            }});
            assert_eq!(object, expected, "{path}");
        }
    }
}

#[tokio::test]
async fn what_is_refused_for_another_reason_is_read_to_its_end_too() {
    let mut servers = JoinSet::new();
    let mut connection = connected(&mut servers).await;
    for (path, expected) in [("/nowhere", StatusCode::NOT_FOUND), ("/v1/models", StatusCode::METHOD_NOT_ALLOWED)] {
        for chunked in [false, true] {
            write(&mut connection, path, chunked).await;
            let (status, object) = read(&mut connection).await;
            assert_eq!(status, expected, "{object}");
            assert!(object["error"]["message"].is_string(), "{object}");
        }
    }
}

#[tokio::test]
async fn a_client_that_asks_first_is_refused_before_it_sends() {
    let mut servers = JoinSet::new();
    let mut connection = connected(&mut servers).await;
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: {BYTES}\r\n\r\n");
    connection.write_all(head.as_bytes()).await.expect("the head");
    assert_eq!(read(&mut connection).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    // What it would write next could be that body or another request: nothing is read any more.
    assert_eq!(connection.read(&mut [0; 1]).await.expect("an end"), 0);
}
