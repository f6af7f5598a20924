//! Handoffs that do not come to anything: refused by the target, cut on the way, or no handoffs at all. The session goes on
//! where it was, and nothing of it stays at the target.

use std::net::SocketAddr;

use perigee_proto::internal::replica_client::ReplicaClient;
use perigee_proto::internal::{HandoffChunk, MoveFailure, MoveMode, MovePhase, Prepare, router_message};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tonic::{Code, Request, Status};

use super::replica::{Replica, ReplicaOptions, Story, abort_move, long_session, undisturbed};
use super::sandbox::bind;

/// Lets a number of bytes through to `to`, then cuts the connection.
async fn cutting_proxy(to: SocketAddr, bytes: u64) -> SocketAddr {
    let (listener, address) = bind().await;
    tokio::spawn(async move {
        while let Ok((from, _)) = listener.accept().await {
            let Ok(onward) = TcpStream::connect(to).await else { return };
            let (from_source, mut to_source) = from.into_split();
            let (mut from_target, mut to_target) = onward.into_split();
            let back = tokio::spawn(async move { tokio::io::copy(&mut from_target, &mut to_source).await });
            let mut part = from_source.take(bytes);
            // Either side may end first.
            let _ = tokio::io::copy(&mut part, &mut to_target).await;
            back.abort();
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_nobody_takes_goes_on() {
    let expected = undisturbed().await;
    let a = Replica::start("a", ReplicaOptions::default()).await;
    let b = Replica::start("b", ReplicaOptions::default()).await;
    // A split session needs two slots.
    let full = Replica::start("full", ReplicaOptions { slots: 1, ..Default::default() }).await;
    let other = Replica::start("other", ReplicaOptions { model: "random:tiny@5", ..Default::default() }).await;
    let through = async |bytes: u64| {
        let target_endpoint = cutting_proxy(b.internal, bytes).await.to_string();
        Prepare { target_endpoint, ..b.invite("s", MoveMode::Split) }
    };
    let (nobody, closed) = bind().await;
    drop(nobody);
    let cases = [
        (full.invite("s", MoveMode::Split), "no room"),
        (other.invite("s", MoveMode::Split), "model has digest"),
        (
            Prepare { target_incarnation: "an earlier run".to_owned(), ..b.invite("s", MoveMode::Split) },
            "is for an earlier run",
        ),
        (Prepare { target_endpoint: closed.to_string(), ..b.invite("s", MoveMode::Split) }, "refused"),
        (Prepare { target_endpoint: "no address".to_owned(), ..b.invite("s", MoveMode::Split) }, "no address"),
        // Within the header, the tokens and the state.
        (through(100).await, "b was lost"),
        (through(1_000).await, "b was lost"),
        (through(40_000).await, "b was lost"),
    ];
    let mut router = a.attach().await;
    let submit = long_session("s");
    router.send(router_message::Body::Submit(submit));
    let mut story = Story::default();
    story.follow_to(&mut router, 1).await;
    for (number, (prepare, reason)) in (0..).zip(cases) {
        let epoch = 1 + 2 * number;
        router.send(router_message::Body::Prepare(Prepare { epoch, next_epoch: epoch + 1, ..prepare }));
        let report = story.follow_to_report(&mut router).await;
        assert_eq!((report.phase(), report.failure()), (MovePhase::Failed, MoveFailure::Handoff), "{report:?}");
        assert_eq!((report.epoch, report.code), (epoch, Code::FailedPrecondition as i32), "{report:?}");
        assert!(report.message.contains(reason), "{reason} is not in {report:?}");
        router.send(abort_move(epoch + 1, epoch + 2));
        let report = story.follow_to_report(&mut router).await;
        assert_eq!((report.phase(), report.epoch), (MovePhase::Aborted, epoch + 2), "{report:?}");
        let so_far = story.tokens().len();
        story.follow_to(&mut router, so_far + 1).await;
    }
    story.follow_to_end(&mut router).await;
    assert_eq!(story.tokens(), expected);
    for replica in [&a, &b, &full, &other] {
        replica.assert_free().await;
    }
}

async fn hand_over(replica: &Replica, target: Option<(&str, &str)>, chunks: Vec<Vec<u8>>) -> Status {
    let mut client = ReplicaClient::connect(format!("http://{}", replica.internal)).await.expect("connected");
    let chunks = chunks.into_iter().map(|data| HandoffChunk { data, demand: None });
    let mut request = Request::new(tokio_stream::iter(chunks.collect::<Vec<_>>()));
    if let Some((name, incarnation)) = target {
        request.metadata_mut().insert("perigee-target", name.parse().expect("ASCII"));
        request.metadata_mut().insert("perigee-target-incarnation", incarnation.parse().expect("ASCII"));
    }
    match client.handoff(request).await {
        Ok(answers) => answers.into_inner().message().await.expect_err("it is no handoff"),
        Err(refused) => refused,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_handoff_is_refused_by_name() {
    let replica = Replica::start("b", ReplicaOptions::default()).await;
    let here = Some(("b", "first run of b"));
    for (target, chunks, code, reason) in [
        (here, vec![], Code::InvalidArgument, "mark and version"),
        (here, vec![b"no handoff at all, but long enough for one".to_vec()], Code::InvalidArgument, "chunk 0"),
        (None, vec![], Code::FailedPrecondition, "for nobody"),
        (Some(("c", "first run of b")), vec![], Code::FailedPrecondition, "for c"),
    ] {
        let status = hand_over(&replica, target, chunks).await;
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(reason), "{reason} is not in {}", status.message());
    }
    replica.assert_free().await;
}
