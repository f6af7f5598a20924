//! Streams that go on for long, watched from beside: indices without gap or repeat whatever happens, and an end that says
//! why.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use perigee_proto::v1::{GenerateRequest, SamplingParams};
use perigee_testkit::sandbox::{Clients, eventually};
use tokio::task::JoinHandle;
use tonic::{Code, Status};

use crate::PATIENCE;

/// Tokens of one answer; a stream without an end asks for the next one behind it.
const LONG: u32 = 16_000;

/// A greedy request that goes on to its last token.
pub(crate) fn greedy(token_ids: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    let sampling = SamplingParams { temperature: Some(0.0), ignore_eos: true, ..SamplingParams::default() };
    GenerateRequest { token_ids, max_tokens: Some(max_tokens), sampling: Some(sampling), ..GenerateRequest::default() }
}

/// A short answer, and the replica that it came from.
pub(crate) async fn ask(clients: &Clients) -> (Vec<u32>, String) {
    let (tokens, replica) = read(clients.clone(), greedy(vec![5, 6, 7], 8), &AtomicUsize::new(0)).await.unwrap();
    assert_eq!(tokens.len(), 8);
    (tokens, replica)
}

async fn read(clients: Clients, request: GenerateRequest, seen: &AtomicUsize) -> Result<(Vec<u32>, String), Status> {
    let mut stream = clients.inference.clone().generate(request).await?.into_inner();
    let (mut tokens, mut replica, mut epoch) = (Vec::new(), String::new(), 0);
    while let Some(response) = stream.message().await? {
        assert_eq!(response.index, tokens.len() as u64, "a gap or a repeat");
        assert!(response.epoch >= epoch, "an epoch that is over");
        epoch = response.epoch;
        tokens.extend(response.token_id);
        replica = response.replica;
        seen.fetch_add(usize::from(response.token_id.is_some()), Ordering::Relaxed);
    }
    Ok((tokens, replica))
}

/// A stream without an end of its own, however long a scene takes and however fast the machine is.
pub(crate) struct Open {
    seen: Arc<AtomicUsize>,
    task: JoinHandle<Status>,
}

impl Open {
    pub(crate) fn start(clients: &Clients, first: u32) -> Self {
        let (seen, clients) = (Arc::<AtomicUsize>::default(), clients.clone());
        let counter = seen.clone();
        let task = tokio::spawn(async move {
            loop {
                if let Err(status) = read(clients.clone(), greedy(vec![first, 9], LONG), &counter).await {
                    return status;
                }
            }
        });
        Self { seen, task }
    }

    /// Waits until it is `more` tokens further. False where it ended instead.
    pub(crate) async fn goes_on(&self, more: usize) -> bool {
        let wanted = self.seen.load(Ordering::Relaxed) + more;
        let look = async || {
            let arrived = self.seen.load(Ordering::Relaxed) >= wanted;
            Ok((arrived || self.task.is_finished()).then_some(arrived))
        };
        eventually(&format!("{more} more tokens"), PATIENCE, look).await.unwrap().0
    }

    /// It ended with its connection, which each client library tells in its own way.
    pub(crate) async fn was_cut(mut self) {
        let status = tokio::time::timeout(PATIENCE, &mut self.task).await.expect("no stream hangs").unwrap();
        assert!([Code::Unavailable, Code::Unknown].contains(&status.code()), "{status}");
    }

    /// How it ended; it must be something that a client repeats its request for.
    pub(crate) async fn was_lost(mut self) {
        let status = tokio::time::timeout(PATIENCE, &mut self.task).await.expect("no stream hangs").unwrap();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// All of them go on.
pub(crate) async fn all_go_on(streams: &[Open], more: usize) {
    for (number, stream) in streams.iter().enumerate() {
        assert!(stream.goes_on(more).await, "stream {number} ended");
    }
}

/// Each goes on, elsewhere perhaps, or is lost and says so; those that go on stay.
pub(crate) async fn go_on_or_are_lost(streams: &mut Vec<Open>, more: usize) {
    let mut going = Vec::new();
    for stream in streams.drain(..) {
        if stream.goes_on(more).await {
            going.push(stream);
        } else {
            stream.was_lost().await;
        }
    }
    *streams = going;
}
