//! What clients get wrong, and what a cluster cannot do: each bad field is named, a full queue says when to come back, a
//! missing tokenizer is told, reserved and unknown calls are UNIMPLEMENTED. No refusal leaves anything behind.

use perigee_proto::v1::{
    DetokenizeRequest, DrainRequest, FlushCacheRequest, GenerateRequest, ListSessionsRequest, MigrateRequest,
    ResumeRequest, SamplingParams, ScoreRequest, TokenizeRequest,
};
use perigee_testkit::checkpoints;
use perigee_testkit::sandbox::{Clients, eventually};
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::answer::{Answer, ask};
use crate::work::VOCAB;
use crate::{PATIENCE, greedy, up};

const SLOTS: u32 = 4;
/// `up`'s default limit on a session, prompt and output together.
const MODEL_LEN: usize = 32_768;

/// A request with one thing wrong, and the field to be named.
type Wrong = (&'static str, Box<dyn Fn(&mut GenerateRequest)>);

fn wrong(field: &'static str, change: impl Fn(&mut GenerateRequest) + 'static) -> Wrong {
    (field, Box::new(change))
}

/// The same in the sampling parameters.
fn wrong_sampling(field: &'static str, change: impl Fn(&mut SamplingParams) + 'static) -> Wrong {
    wrong(field, move |request| change(request.sampling.get_or_insert_default()))
}

fn wrong_requests() -> Vec<Wrong> {
    let mut all = vec![
        wrong("text", |r| r.text = Some("both".into())),
        wrong("token_ids", |r| r.token_ids.clear()),
        wrong("text", |r| (r.text, r.token_ids) = (Some(String::new()), Vec::new())),
        wrong("text", |r| (r.text, r.token_ids) = (Some("a".repeat((8 << 20) + 1)), Vec::new())),
        wrong("text", |r| (r.text, r.token_ids) = (Some("a".repeat(MODEL_LEN)), Vec::new())),
        wrong("token_ids", |r| r.token_ids.push(VOCAB as u32)),
        wrong("token_ids", |r| r.token_ids = vec![9; MODEL_LEN]),
        wrong("request_id", |r| r.request_id = "r".repeat(129)),
        wrong("request_id", |r| r.request_id = "line\nbreak".into()),
        wrong("request_id", |r| r.request_id = "naïve".into()),
        wrong("stop", |r| r.stop = vec!["x".into(); 17]),
        wrong("stop", |r| r.stop = vec![String::new()]),
        wrong("stop", |r| r.stop = vec!["x".repeat(257)]),
        wrong("max_tokens", |r| r.max_tokens = Some(0)),
        wrong("max_tokens", |r| r.max_tokens = Some(MODEL_LEN as u32)),
        wrong("max_tokens", |r| r.max_tokens = Some(u32::MAX)),
        wrong("priority", |r| r.priority = 101),
        wrong("priority", |r| r.priority = -101),
        wrong("cache_salt", |r| r.cache_salt = "s".repeat(129)),
        wrong_sampling("sampling.logit_bias", |s| s.logit_bias = [(7, 100.5)].into()),
        wrong_sampling("sampling.logit_bias", |s| s.logit_bias = [(7, f32::NAN)].into()),
        wrong_sampling("sampling.logit_bias", |s| s.logit_bias = [(VOCAB as u32, 1.0)].into()),
        wrong_sampling("sampling.logit_bias", |s| s.logit_bias = (0..1025).map(|id| (id, 0.0)).collect()),
        wrong_sampling("sampling.n", |s| s.n = Some(0)),
        wrong_sampling("sampling.n", |s| s.n = Some(17)),
        // More than this replica has slots for: the replica refuses it, not the router.
        wrong_sampling("sampling.n", |s| s.n = Some(SLOTS + 1)),
        wrong_sampling("sampling.min_tokens", |s| s.min_tokens = 9),
        wrong_sampling("sampling.stop_token_ids", |s| s.stop_token_ids = vec![1; 65]),
        wrong_sampling("sampling.stop_token_ids", |s| s.stop_token_ids = vec![VOCAB as u32]),
        wrong_sampling("sampling.logprobs", |s| s.logprobs = Some(21)),
        wrong_sampling("sampling.prompt_logprobs", |s| s.prompt_logprobs = Some(21)),
        wrong("sampling.prompt_logprobs", |r| {
            r.token_ids = vec![9; 20_000];
            r.sampling.get_or_insert_default().prompt_logprobs = Some(10);
        }),
    ];
    type Field = (&'static str, fn(&mut SamplingParams) -> &mut Option<f32>, &'static [f32]);
    let numbers: [Field; 6] = [
        ("sampling.temperature", |s| &mut s.temperature, &[-0.1, 100.5]),
        ("sampling.top_p", |s| &mut s.top_p, &[0.0, -0.5, 1.1]),
        ("sampling.min_p", |s| &mut s.min_p, &[-0.1, 1.1]),
        ("sampling.repetition_penalty", |s| &mut s.repetition_penalty, &[0.0, -1.0, 10.5]),
        ("sampling.presence_penalty", |s| &mut s.presence_penalty, &[-2.1, 2.1]),
        ("sampling.frequency_penalty", |s| &mut s.frequency_penalty, &[-2.1, 2.1]),
    ];
    for (field, place, outside) in numbers {
        for &value in outside.iter().chain(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            all.push(wrong_sampling(field, move |sampling| *place(sampling) = Some(value)));
        }
    }
    all
}

/// INVALID_ARGUMENT that names a field, in its details and in its message.
fn names(status: &Status, field: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status}");
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap_or_else(|| panic!("no BadRequest in {status}")).field_violations;
    assert_eq!(violations.iter().map(|violation| violation.field.as_str()).collect::<Vec<_>>(), [field], "{status}");
    assert!(status.message().starts_with(&format!("{field}: ")), "{status}");
    assert!(violations[0].description.len() > 5, "{status}");
}

#[tokio::test]
async fn every_bad_field_is_named() {
    let sandbox = up(1, 1).option(format!("--state-slots={SLOTS}")).option("--latent-pages=512").start().unwrap();
    let clients = sandbox.connect().await.unwrap();
    for (field, change) in wrong_requests() {
        let mut request = greedy(vec![5, 6, 7], 8);
        change(&mut request);
        names(ask(&clients, &request).await.status(), field);
    }
    let mut inference = clients.inference.clone();
    let score = |token_ids| ScoreRequest { token_ids, ..ScoreRequest::default() };
    names(&inference.score(score(vec![5])).await.unwrap_err(), "token_ids");
    names(&inference.score(score(vec![5, VOCAB as u32])).await.unwrap_err(), "token_ids");
    names(&inference.score(score(vec![5; MODEL_LEN])).await.unwrap_err(), "token_ids");
    names(&inference.score(ScoreRequest { priority: 101, ..score(vec![5, 6]) }).await.unwrap_err(), "priority");
    let detokenize = |token_ids| DetokenizeRequest { token_ids };
    names(&inference.detokenize(detokenize(vec![VOCAB as u32])).await.unwrap_err(), "token_ids");
    names(&inference.detokenize(detokenize(vec![5; MODEL_LEN + 1])).await.unwrap_err(), "token_ids");
    let text = "a".repeat((8 << 20) + 1);
    names(&inference.tokenize(TokenizeRequest { text, ..TokenizeRequest::default() }).await.unwrap_err(), "text");
    let mut call = Request::new(greedy(vec![5], 1));
    call.metadata_mut().insert("grpc-timeout", MetadataValue::from_static("soon"));
    names(&inference.generate(call).await.unwrap_err(), "grpc-timeout");

    // A message beyond the limit is not read at all.
    let huge = GenerateRequest { request_id: "r".repeat(17 << 20), ..GenerateRequest::default() };
    let refused = ask(&clients, &huge).await;
    assert_eq!(refused.status().code(), Code::ResourceExhausted, "{}", refused.status());

    let answer = ask(&clients, &greedy(vec![5, 6, 7], 8)).await.finished();
    assert_eq!(answer.tokens(), 8, "after all that it serves");
    clients.all_free(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn calls_of_later_versions_are_unimplemented() {
    let sandbox = up(1, 1).start().unwrap();
    let clients = sandbox.connect().await.unwrap();
    let (mut inference, mut cluster) = (clients.inference.clone(), clients.cluster.clone());
    let code = |status: Status| {
        assert!(!status.message().is_empty(), "{status:?}");
        status.code()
    };
    assert_eq!(code(inference.resume(ResumeRequest::default()).await.unwrap_err()), Code::InvalidArgument);
    assert_eq!(code(cluster.migrate(MigrateRequest::default()).await.unwrap_err()), Code::InvalidArgument);
    let nobody = MigrateRequest { session_id: format!("s-{:032x}", 1), to: "replica-0".into(), mode: 0 };
    assert_eq!(code(cluster.migrate(nobody).await.unwrap_err()), Code::NotFound);
    assert_eq!(code(cluster.drain(DrainRequest::default()).await.unwrap_err()), Code::InvalidArgument);
    let nobody = DrainRequest { replica: "nobody".into() };
    assert_eq!(code(cluster.drain(nobody).await.unwrap_err()), Code::NotFound);
    // Nor does the router answer what replicas answer, or what nobody does.
    for path in ["/perigee.v1.Inference/Nothing", "/perigee.v1.Nothing/Generate", "/perigee.internal.v1.Replica/Attach"]
    {
        assert_eq!(unknown(sandbox.grpc, path).await.code(), Code::Unimplemented, "{path}");
    }
    // A leader's public port knows its model and sends clients to a router.
    let endpoint = clients.replicas().await.unwrap()["replica-0"].endpoint.clone();
    let leader = Clients::connect(endpoint.parse().unwrap()).await.unwrap();
    assert_eq!(ask(&leader, &greedy(vec![5], 1)).await.status().code(), Code::Unimplemented);
    let model = leader.inference.clone().get_model_info(perigee_proto::v1::GetModelInfoRequest {}).await.unwrap();
    let from_router = inference.get_model_info(perigee_proto::v1::GetModelInfoRequest {}).await.unwrap();
    assert_eq!(model.into_inner().digest, from_router.into_inner().digest);

    let nobody = ListSessionsRequest { replica: "nobody".into() };
    assert_eq!(code(cluster.list_sessions(nobody).await.unwrap_err()), Code::NotFound);
    let nobody = FlushCacheRequest { replica: "nobody".into() };
    assert_eq!(code(cluster.flush_cache(nobody).await.unwrap_err()), Code::NotFound);
    let flushed = cluster.flush_cache(FlushCacheRequest::default()).await.unwrap();
    assert_eq!(flushed.into_inner().replicas, ["replica-0"]);
}

/// Calls a path that no client is generated for.
async fn unknown(address: std::net::SocketAddr, path: &'static str) -> Status {
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<GenerateRequest, GenerateRequest>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    grpc.unary(Request::new(greedy(vec![5], 1)), path, codec).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_when_to_come_back() {
    /// The engine's limit on requests that wait.
    const QUEUE: usize = 1024;
    const TOO_MANY: usize = 40;
    let sandbox = up(1, 1).option("--state-slots=1").start().unwrap();
    let clients = [sandbox.connect().await.unwrap(), sandbox.connect().await.unwrap()];
    // It runs until all others have come.
    let request = greedy(vec![5, 6], 30_000);
    let mut first = clients[0].inference.clone().generate(request.clone()).await.unwrap().into_inner();
    assert!(first.message().await.unwrap().is_some());
    let (told, mut refusals) = tokio::sync::mpsc::unbounded_channel::<Answer>();
    let mut waiting = tokio::task::JoinSet::new();
    for number in 0..QUEUE + TOO_MANY {
        let (clients, request, told) = (clients[number % 2].clone(), request.clone(), told.clone());
        waiting.spawn(async move {
            // Only refused ones end; the others are dropped with the set.
            let _ = told.send(ask(&clients, &request).await);
        });
    }
    for _ in 0..TOO_MANY {
        let refused = tokio::time::timeout(PATIENCE, refusals.recv()).await.expect("refused at once").unwrap();
        let status = refused.status();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        let details = status.get_error_details();
        let delay = details.retry_info().and_then(|info| info.retry_delay).expect("when to come back");
        assert!(!delay.is_zero() && delay <= PATIENCE, "{delay:?}");
    }
    assert!(refusals.try_recv().is_err(), "exactly those beyond the limit are refused");
    let look = async || {
        let replicas = clients[0].replicas().await?;
        Ok((replicas["replica-0"].waiting as usize == QUEUE).then_some(()))
    };
    eventually("a full queue", PATIENCE, look).await.unwrap();
    drop((waiting, first));
    clients[0].all_free(PATIENCE).await.unwrap();
    assert_eq!(ask(&clients[0], &greedy(vec![5, 6], 3)).await.finished().tokens(), 3);
}

#[tokio::test]
async fn without_a_tokenizer_token_ids_work_and_text_is_told_why_not() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    checkpoints::write_random(&model, &checkpoints::small_config(), 7).unwrap();
    let sandbox = up(1, 1).model(model.display().to_string()).start().unwrap();
    let clients = sandbox.connect().await.unwrap();
    let lacks = |status: &Status, field: &str| {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(status.message().starts_with(field) && status.message().contains("tokenizer.json"), "{status}");
        assert_eq!(
            status.get_error_details().error_info().map(|info| info.reason.clone()),
            Some("NO_TOKENIZER".into())
        );
    };
    let text = GenerateRequest { text: Some("hello".into()), token_ids: Vec::new(), ..greedy(Vec::new(), 4) };
    lacks(ask(&clients, &text).await.status(), "text");
    let stop = GenerateRequest { stop: vec!["x".into()], ..greedy(vec![5], 4) };
    lacks(ask(&clients, &stop).await.status(), "stop");
    let mut inference = clients.inference.clone();
    lacks(
        &inference.tokenize(TokenizeRequest { text: "hello".into(), ..TokenizeRequest::default() }).await.unwrap_err(),
        "text",
    );
    lacks(&inference.detokenize(DetokenizeRequest { token_ids: vec![5] }).await.unwrap_err(), "token_ids");

    let answer = ask(&clients, &greedy(vec![5, 6], 6)).await.finished();
    assert_eq!((answer.tokens(), answer.choices[0].text.as_str()), (6, ""));
    let model = inference.get_model_info(perigee_proto::v1::GetModelInfoRequest {}).await.unwrap().into_inner();
    assert!(!model.has_tokenizer);
    assert_eq!(
        (model.model.as_str(), model.vocab_size, model.eos_token_ids.as_slice()),
        ("model", 131, [2].as_slice())
    );
}
