//! Replicas that compute nothing: they speak `perigee.internal.v1.Replica` as leaders do, and their steps take a modelled
//! time. Each token's id is the time at which it was sent, so that whoever receives it knows how long it was on its way.

mod attached;
mod clock;
mod direct;
mod flow;
mod pacer;
mod relayed;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use perigee_proto::PROTOCOL_VERSION;
use perigee_proto::internal::replica_server::{Replica, ReplicaServer};
use perigee_proto::internal::{
    AttendAnswer, AttendQuery, FetchPagesRequest, HandoffAnswer, HandoffChunk, KeepHomesAnswer, KeepHomesRequest,
    ModelInfo, PageChunk, ReplicaMessage, RouterMessage, Welcome, router_message,
};
use perigee_tls::{Listening, Purpose, Tls};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use attached::Attached;
pub use clock::Clock;
pub use direct::DirectTarget;
pub use flow::{Flow, Flowed};
pub use pacer::Pacer;
pub use relayed::RelayedTarget;

/// Number of token ids that a stub says it has: prompts are drawn below it. What it generates are times.
const VOCABULARY: u32 = 100_000;
/// Longest sequence that a stub takes.
const MAX_LEN: u32 = 1 << 20;

/// How long a stub's steps take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Steps {
    /// Any step.
    pub base: Duration,
    /// More for each session in it.
    pub per_session: Duration,
    /// More for each prompt token that it reads.
    pub per_prompt_token: Duration,
    /// By which share of its time a step may be longer or shorter, evenly drawn: replicas do not step at one beat.
    pub jitter: f64,
}

impl Steps {
    /// A step's time on the whole.
    pub fn time(&self, sessions: usize, prompt_tokens: u64) -> Duration {
        let count = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        self.base
            + self.per_session.saturating_mul(count(sessions as u64))
            + self.per_prompt_token.saturating_mul(count(prompt_tokens))
    }

    /// One step's time, of `time` on the whole.
    fn draw(&self, time: Duration, random: &mut ChaCha8Rng) -> Duration {
        time.mul_f64((1.0 + self.jitter * random.random_range(-1.0..1.0)).max(0.0))
    }
}

/// A stub replica.
#[derive(Debug, Clone)]
pub struct StubReplica {
    /// Its name.
    pub name: String,
    /// Sessions at once; further ones wait.
    pub slots: u32,
    /// How long its steps take.
    pub steps: Steps,
    /// How much later than otherwise it begins to step when it has been idle: replicas do not step at the same moments.
    pub phase: Duration,
    /// Draws the times of its steps.
    pub seed: u64,
    /// The clock of the ids.
    pub clock: Clock,
    /// Wakes it for its steps.
    pub pacer: Pacer,
}

impl StubReplica {
    /// Answers routers until the future is dropped.
    ///
    /// # Errors
    /// The transport's.
    pub async fn serve(self, listener: TcpListener, tls: Option<Arc<Tls>>) -> Result<(), tonic::transport::Error> {
        let incoming = Listening::new(listener, tls, Purpose::Internal).incoming();
        Server::builder().add_service(ReplicaServer::new(self)).serve_with_incoming(incoming).await
    }

    fn welcome(&self) -> Welcome {
        Welcome {
            protocol_version: PROTOCOL_VERSION,
            replica: self.name.clone(),
            incarnation: "stub".to_owned(),
            model: Some(ModelInfo {
                name: "stub".to_owned(),
                digest: "stub".to_owned(),
                vocab_size: VOCABULARY,
                max_model_len: MAX_LEN,
                ..ModelInfo::default()
            }),
            tp: 1,
            pids: vec![std::process::id()],
            weight_bytes: vec![0],
            device: "stub".to_owned(),
            step_tokens: 8192,
            move_costs: None,
        }
    }
}

type Answers<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Replica for StubReplica {
    type AttachStream = UnboundedReceiverStream<Result<ReplicaMessage, Status>>;
    type HandoffStream = Answers<HandoffAnswer>;
    type AttendStream = Answers<AttendAnswer>;
    type FetchPagesStream = Answers<PageChunk>;

    async fn attach(&self, request: Request<Streaming<RouterMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut from_router = request.into_inner();
        let first = from_router.message().await?.and_then(|message| message.body);
        if !matches!(first, Some(router_message::Body::Hello(_))) {
            return Err(Status::invalid_argument("the first message is not hello"));
        }
        let (to_router, out) = mpsc::unbounded_channel();
        let attached = Attached::new(self.clone(), to_router);
        tokio::spawn(attached.run(from_router));
        Ok(Response::new(UnboundedReceiverStream::new(out)))
    }

    async fn handoff(&self, _: Request<Streaming<HandoffChunk>>) -> Result<Response<Self::HandoffStream>, Status> {
        Err(Status::unimplemented("a stub has no state to move"))
    }

    async fn attend(&self, _: Request<Streaming<AttendQuery>>) -> Result<Response<Self::AttendStream>, Status> {
        Err(Status::unimplemented("a stub has no latents"))
    }

    async fn fetch_pages(&self, _: Request<FetchPagesRequest>) -> Result<Response<Self::FetchPagesStream>, Status> {
        Err(Status::unimplemented("a stub has no latents"))
    }

    async fn keep_homes(&self, _: Request<KeepHomesRequest>) -> Result<Response<KeepHomesAnswer>, Status> {
        Err(Status::unimplemented("a stub has no latents"))
    }
}
