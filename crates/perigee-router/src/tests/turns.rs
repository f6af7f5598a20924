//! Batches that come together are taken in one after the other.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use perigee_proto::v1::inference_server::Inference;
use tokio_stream::{Stream, StreamExt};
use tonic::Request;

use super::fake::{Sandbox, token};
use super::streams::prompt;
use crate::RouterConfig;

#[tokio::test(start_paused = true)]
async fn the_first_of_two_batches_is_read_before_the_second_is_taken_in() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica_a, mut a) = sandbox.add("a").await;
    let (_replica_b, mut b) = sandbox.add("b").await;
    let ask = async || {
        let reply = sandbox.router.inference.generate(Request::new(prompt())).await;
        reply.expect("accepted").into_inner()
    };
    // The second goes where there are fewer sessions.
    let (mut first, mut second) = (ask().await, ask().await);
    let (submit_a, submit_b) = (a.next_submit().await, b.next_submit().await);

    let reader = tokio::spawn(async move {
        first.next().await.expect("a response").expect("no error");
        let is_there = poll_fn(|context| Poll::Ready(Pin::new(&mut second).poll_next(context).is_ready())).await;
        (is_there, first, second)
    });
    for (attached, submit) in [(&a, &submit_a), (&b, &submit_b)] {
        attached.step((0..16).map(|index| token(submit, index)).collect());
    }
    let (is_there, mut first, mut second) = reader.await.expect("no panic");
    assert!(!is_there, "the second batch was taken in before the first was read");
    for (reply, from) in [(&mut first, 1), (&mut second, 0)] {
        for index in from..16 {
            let response = reply.next().await.expect("a response").expect("no error");
            assert_eq!(response.index, index, "all of both comes");
        }
    }
}
