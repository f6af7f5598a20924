//! Routers that are killed in the middle of streams: every stream goes on at another router from the next index, whether or
//! not the client says again which tokens it has, and all its tokens together are those of an undisturbed run. Where its
//! sessions are still there, nothing is computed again; where they are not, everything is.

use perigee_proto::v1::grammar::Source;
use perigee_proto::v1::{
    FinishReason, GenerateRequest, GenerateResponse, Grammar, ListSessionsRequest, ReceivedTokens, ResumeRequest,
    SamplingParams,
};
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec, eventually, metric};
use tonic::{Code, Streaming};

use crate::PATIENCE;
use crate::client::{Answer, Choice};
use crate::known::Known;

/// Different requests: greedy and sampled, and one in five with two choices.
const REQUESTS: usize = 10;
/// Responses that a client has before its router dies; requests are much longer.
const BEFORE: usize = 25;
/// Of so many requests one loses its replica too.
const LOSING: usize = 3;

/// What a client has of a request.
struct Got {
    choices: Vec<Choice>,
    token: Vec<u8>,
    /// The replica of the last response.
    on: String,
}

impl Got {
    fn new(request: &GenerateRequest) -> Self {
        let count = request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1);
        Self { choices: vec![Choice::default(); count as usize], token: Vec::new(), on: String::new() }
    }

    fn take(&mut self, response: GenerateResponse) {
        let choice = &mut self.choices[response.choice as usize];
        assert_eq!(response.index, choice.tokens.len() as u64, "a gap or a repeat: {response:?}");
        assert_eq!(choice.finish, None, "a response after the end");
        choice.tokens.extend(response.token_id);
        choice.text.push_str(&response.text);
        let finish = response.finish_reason();
        choice.finish = (finish != FinishReason::Unspecified).then_some(finish);
        assert!(!response.resume_token.is_empty());
        self.token = response.resume_token;
        self.on = response.replica;
    }

    /// Reads so many responses, or all. True where the stream had its own end.
    async fn read(&mut self, stream: &mut Streaming<GenerateResponse>, most: usize) -> bool {
        for _ in 0..most {
            match tokio::time::timeout(PATIENCE, stream.message()).await.expect("no stream hangs") {
                Ok(Some(response)) => self.take(response),
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
        false
    }

    fn resume(&self, request: &GenerateRequest, tells_tokens: bool) -> ResumeRequest {
        let tokens = self.choices.iter().map(|choice| ReceivedTokens { token_ids: choice.tokens.clone() });
        let received = if tells_tokens { tokens.collect() } else { Vec::new() };
        ResumeRequest { request: Some(request.clone()), resume_token: self.token.clone(), received }
    }
}

/// A cluster of two routers, with the address of the second, that share a key.
async fn two_routers(spec: FleetSpec) -> (Fleet, Clients, impl Sized) {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, [7; 32]).unwrap();
    let mut fleet = spec.router(format!("--resume-key-file={}", key.display())).start().await.unwrap();
    let (address, process) = fleet.another_router().unwrap();
    let other = Clients::connect(address).await.unwrap();
    fleet.ready(&other).await.unwrap();
    (fleet, other, (folder, process))
}

/// Tokens of prompts that replicas have computed since their start; those of sessions that begin anew are among them.
async fn computed(fleet: &Fleet) -> u64 {
    let mut sum = 0.0;
    for replica in &fleet.replicas {
        // There is no such count before the first one.
        let count = metric(replica.http, "perigee_tokens_total{kind=\"prompt\"}").await;
        sum += count.unwrap_or_default();
    }
    sum as u64
}

/// Begins a request at the first router, which is killed while it runs; what its client has then.
async fn cut_off(fleet: &mut Fleet, request: &GenerateRequest) -> Got {
    let clients = fleet.connect().await.unwrap();
    fleet.ready(&clients).await.unwrap();
    let mut got = Got::new(request);
    let mut stream = clients.inference.clone().generate(request.clone()).await.unwrap().into_inner();
    got.read(&mut stream, BEFORE).await;
    fleet.router.kill();
    // What was on its way counts: the client has it.
    assert!(!got.read(&mut stream, usize::MAX).await, "it was to be cut: let it be longer");
    got
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_whose_router_was_killed_goes_on_at_another_one() {
    let (mut fleet, other, _kept) = two_routers(FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 2])).await;
    let known = Known::ask(&other, REQUESTS, (500, 700), 9500).await;
    for number in 0..REQUESTS {
        let request = GenerateRequest { resumable: true, ..known.request(number).clone() };
        let mut got = cut_off(&mut fleet, &request).await;
        let before: usize = got.choices.iter().map(|choice| choice.tokens.len()).sum();
        let is_lost = number % LOSING == 1;
        if is_lost {
            let lost =
                fleet.replicas.iter().position(|replica| replica.name == got.on).expect("a replica of the fleet");
            fleet.kill(lost);
            fleet.restart(lost).unwrap();
            fleet.ready(&other).await.unwrap();
        }

        let computed_before = computed(&fleet).await;
        let resume = got.resume(&request, number % 2 == 0);
        let mut rest = other.inference.clone().resume(resume.clone()).await.unwrap().into_inner();
        assert!(got.read(&mut rest, usize::MAX).await, "its own end");
        let again = computed(&fleet).await - computed_before;
        println!("{}: {before} tokens before, {again} computed again, lost: {is_lost}", request.request_id);
        // A session that is still there goes on where it was; one that is not is computed again, with its prompt.
        let prompt = request.token_ids.len() as u64;
        assert!(if is_lost { again >= prompt } else { again == 0 }, "{again} of {prompt} tokens computed again");
        // A client that has everything gets nothing more.
        let mut nothing = other.inference.clone().resume(got.resume(&request, false)).await.unwrap().into_inner();
        assert!(nothing.message().await.unwrap().is_none());

        let answer = Answer { choices: got.choices, moves: Vec::new(), failed: None, broken: Vec::new() };
        known.judge(number, &answer);
        if number == 0 {
            refused(&other, &resume).await;
        }
        fleet.restart_router().unwrap();
    }
    known.few_excuses(REQUESTS);
    other.all_free(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_client_does_not_come_back_is_free_after_the_grace_time() {
    let spec = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 1]).worker("--move-grace=2");
    let (mut fleet, other, _kept) = two_routers(spec).await;
    let known = Known::ask(&other, 1, (500, 700), 9600).await;
    let request = GenerateRequest { resumable: true, ..known.request(0).clone() };
    let mut got = cut_off(&mut fleet, &request).await;
    other.all_free(PATIENCE).await.unwrap();
    let waits = async || {
        let parked = other.cluster.clone().list_sessions(ListSessionsRequest::default()).await;
        let listed = parked.map(|answer| answer.into_inner().sessions).unwrap_or_default();
        Ok(listed.is_empty().then_some(()))
    };
    eventually("no session anywhere", PATIENCE, waits).await.unwrap();
    // One that comes later gets what it lacks all the same.
    let mut rest = other.inference.clone().resume(got.resume(&request, false)).await.unwrap().into_inner();
    assert!(got.read(&mut rest, usize::MAX).await, "its own end");
    known.judge(0, &Answer { choices: got.choices, moves: Vec::new(), failed: None, broken: Vec::new() });
}

/// The session waits with its grammar for the other router; where it is gone, a replica makes the grammar anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_text_of_a_grammar_whose_router_was_killed_goes_on_within_it() {
    let (mut fleet, other, _kept) = two_routers(FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 2])).await;
    let item = r#"{"type": "string", "pattern": "^[a-z]{5,9}$"}"#;
    let schema = format!(r#"{{"type": "array", "items": {item}, "minItems": 50, "maxItems": 60}}"#);

    for (number, source) in
        [Source::JsonSchema(schema), Source::Regex("([a-z]{3}-){150}end".to_owned())].into_iter().enumerate()
    {
        let request = GenerateRequest {
            request_id: format!("bound-{number}"),
            text: Some("List".to_owned()),
            sampling: Some(SamplingParams { temperature: Some(1.0), seed: Some(5), ..SamplingParams::default() }),
            max_tokens: Some(900),
            grammar: Some(Grammar { source: Some(source) }),
            resumable: true,
            ..GenerateRequest::default()
        };
        let clients = fleet.connect().await.unwrap();
        fleet.ready(&clients).await.unwrap();
        let mut got = Got::new(&request);
        let mut stream = clients.inference.clone().generate(request.clone()).await.unwrap().into_inner();
        got.read(&mut stream, BEFORE).await;
        fleet.router.kill();
        assert!(!got.read(&mut stream, usize::MAX).await, "it was to be cut: let it be longer");
        let before = got.choices[0].text.clone();

        let resume = got.resume(&request, number % 2 == 0);
        let mut rest = other.inference.clone().resume(resume).await.unwrap().into_inner();
        assert!(got.read(&mut rest, usize::MAX).await, "its own end");
        let Choice { text, finish, .. } = &got.choices[0];
        assert_eq!(*finish, Some(FinishReason::Stop), "{text}");
        assert!(!before.is_empty() && text.starts_with(&before) && text.len() > before.len(), "{before:?} {text:?}");
        if number == 0 {
            let words: Vec<String> = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!((50..=60).contains(&words.len()), "{words:?}");
            assert!(words.iter().all(|word| (5..=9).contains(&word.len())), "{words:?}");
        } else {
            let parts: Vec<&str> = text.split('-').collect();
            assert!(
                parts.len() == 151 && parts[150] == "end" && parts[..150].iter().all(|part| part.len() == 3),
                "{text}"
            );
        }
        fleet.restart_router().unwrap();
    }
    other.all_free(PATIENCE).await.unwrap();
}

/// What differs from the request of the token is refused, and says which field is wrong.
async fn refused(clients: &Clients, good: &ResumeRequest) {
    let mut longer = good.clone();
    longer.request.as_mut().unwrap().max_tokens = Some(9);
    let mut other_seed = good.clone();
    other_seed.request.as_mut().unwrap().sampling.as_mut().unwrap().seed = Some(1);
    let mut damaged = good.clone();
    damaged.resume_token[3] ^= 1;
    let mut fewer = good.clone();
    fewer.received[0].token_ids.pop();
    for (request, field) in
        [(longer, "request"), (other_seed, "request"), (damaged, "resume_token"), (fewer, "received")]
    {
        let status = clients.inference.clone().resume(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(field), "{field}: {status}");
    }
}
