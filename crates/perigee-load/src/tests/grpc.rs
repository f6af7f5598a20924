//! The gRPC client over a connection in memory, under a virtual clock: its times are those of the server to the last
//! millisecond, its ends are the server's, and the server hears of a request that is given up.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use perigee_proto::v1::inference_server::{Inference, InferenceServer};
use perigee_proto::v1::{
    AbortRequest, AbortResponse, DetokenizeRequest, DetokenizeResponse, FinishReason, GenerateRequest,
    GenerateResponse, GetModelInfoRequest, GetModelInfoResponse, ResumeRequest, ScoreRequest, ScoreResponse,
    TokenizeRequest, TokenizeResponse, Usage,
};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};

use super::runs::assert_near;
use super::stub::scenario;
use crate::target::{Ask, Counts, Failure, GrpcTarget, Heard, Target};
use crate::{Dialogue, Message, Pace, Plan, Segment, run};

const STEP: Duration = Duration::from_millis(7);

/// Answers with first tokens after 1, 2, ... 1000 ms, in no order that matters, and the next ones a step apart.
#[derive(Default)]
struct Known {
    asked: AtomicU64,
    /// How the n-th request ends, where not as asked.
    endings: Vec<Option<Status>>,
    /// The last request.
    last: Arc<Mutex<GenerateRequest>>,
    /// Hears when a client went away.
    gone: Option<mpsc::UnboundedSender<()>>,
}

type Answer = ReceiverStream<Result<GenerateResponse, Status>>;

#[tonic::async_trait]
impl Inference for Known {
    type GenerateStream = Answer;
    type ResumeStream = Answer;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Answer>, Status> {
        let request = request.into_inner();
        *self.last.lock() = request.clone();
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let (ending, gone) = (self.endings.get(number as usize).cloned(), self.gone.clone());
        let (sender, answer) = mpsc::channel(1);
        tokio::spawn(async move {
            sleep(Duration::from_millis(1 + number * 387 % 1000)).await;
            let (prompt, count) = (request.token_ids.len() as u64, u64::from(request.max_tokens.unwrap_or(1)));
            for index in 0..count {
                let mut response = GenerateResponse { index, token_id: Some(7), ..GenerateResponse::default() };
                if index + 1 == count && ending.is_none() {
                    response.set_finish_reason(FinishReason::Length);
                    response.usage = Some(Usage { prompt, completion: count, cached: 3 });
                }
                if sender.send(Ok(response)).await.is_err() {
                    gone.into_iter().for_each(|gone| gone.send(()).expect("the test waits"));
                    return;
                }
                sleep(STEP).await;
            }
            if let Some(Some(status)) = ending {
                sender.send(Err(status)).await.expect("the client reads to the end");
            }
        });
        Ok(Response::new(ReceiverStream::new(answer)))
    }

    async fn get_model_info(&self, _: Request<GetModelInfoRequest>) -> Result<Response<GetModelInfoResponse>, Status> {
        let model = "known".to_owned();
        Ok(Response::new(GetModelInfoResponse { model, vocab_size: 50, ..GetModelInfoResponse::default() }))
    }

    async fn resume(&self, _: Request<ResumeRequest>) -> Result<Response<Answer>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn score(&self, _: Request<ScoreRequest>) -> Result<Response<ScoreResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn tokenize(&self, _: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn detokenize(&self, _: Request<DetokenizeRequest>) -> Result<Response<DetokenizeResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

async fn target(server: Known) -> GrpcTarget {
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let incoming = tokio_stream::once(Ok::<_, std::io::Error>(theirs));
    tokio::spawn(Server::builder().add_service(InferenceServer::new(server)).serve_with_incoming(incoming));
    let mut ours = Some(ours);
    let connect = tower::service_fn(move |_| {
        let ours = ours.take().map(TokioIo::new).ok_or_else(|| std::io::Error::other("one connection is all"));
        std::future::ready(ours)
    });
    let endpoint = Endpoint::from_static("http://known");
    let channel = endpoint.connect_with_connector(connect).await.expect("a connection");
    GrpcTarget::new(vec![channel]).await.expect("a target")
}

/// Asks for four tokens, and breaks after `enough` of them.
async fn ask(target: &GrpcTarget, enough: usize) -> (usize, Result<Counts, Failure>) {
    let answer = Message::Answer { text: String::new(), tokens: vec![1, 2] };
    let user = Message::User(vec![Segment { seed: 1, tokens: 3 }]);
    let dialogue = Dialogue(vec![user.clone(), answer, user]);
    let ask = Ask { name: "n", dialogue: &dialogue, max_tokens: 4, temperature: Some(0.5), ignore_eos: true };
    let mut heard = 0;
    let hear = &mut |response: Heard<'_>| {
        heard += response.ids.len();
        if heard >= enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let result = target.ask(ask, hear).await;
    (heard, result)
}

#[tokio::test(start_paused = true)]
async fn percentiles_over_grpc_are_those_of_the_server() {
    let asked = scenario("conversations = 1000\narrivals = { kind = \"closed\", concurrency = 7 }");
    let target = Arc::new(target(Known::default()).await);
    let plan = Plan::new(&asked).expect("a plan");
    let report = run(&asked, plan, target, Arc::default(), Pace::Timer).await.report("known".to_owned());
    assert_eq!((report.counted.completed, report.lost, report.counted.cached_tokens), (1000, 0, 3000));
    let latencies = &report.latencies;
    assert_near("TTFT", &latencies.ttft_ms, [500.5, 500.0, 900.0, 990.0, 1000.0]);
    assert_near("TPOT", &latencies.tpot_ms, [7.0; 5]);
    assert_near("inter-token", &latencies.itl_ms, [7.0; 5]);
    assert_near("end to end", &latencies.e2e_ms, [535.5, 535.0, 935.0, 1025.0, 1035.0]);
}

#[tokio::test(start_paused = true)]
async fn requests_are_token_ids_and_failures_have_their_codes() {
    let endings = vec![Some(Status::resource_exhausted("busy")), Some(Status::unavailable("lost")), None];
    let server = Known { endings, ..Known::default() };
    let last = server.last.clone();
    let target = target(server).await;
    for (code, message) in [("RESOURCE_EXHAUSTED", "busy"), ("UNAVAILABLE", "lost")] {
        let failure = Failure { code: code.to_owned(), message: message.to_owned() };
        assert_eq!(ask(&target, 9).await, (4, Err(failure)));
    }
    let (heard, cut) = ask(&target, 9).await;
    assert_eq!((heard, cut.map_err(|failure| failure.code)), (4, Err("CUT_OFF".to_owned())));
    assert_eq!(ask(&target, 9).await.1, Ok(Counts { prompt: Some(8), cached: Some(3), output: Some(4) }));

    let request = last.lock().clone();
    let sampling = request.sampling.expect("sampling");
    assert_eq!((sampling.temperature, sampling.ignore_eos, request.max_tokens), (Some(0.5), true, Some(4)));
    assert_eq!((request.token_ids.len(), &request.token_ids[3..5]), (8, &[1, 2][..]));
    assert!(request.token_ids.iter().all(|id| *id < 50), "{:?}", request.token_ids);
}

#[tokio::test(start_paused = true)]
async fn giving_up_reaches_the_server() {
    let (gone, mut seen) = mpsc::unbounded_channel();
    let target = target(Known { gone: Some(gone), ..Known::default() }).await;
    assert_eq!(ask(&target, 2).await, (2, Ok(Counts::default())));
    assert_eq!(seen.recv().await, Some(()));
}
