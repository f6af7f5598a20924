//! Every field at and beyond its limits.

use perigee_proto::status::ErrorKind;

use super::*;
use crate::model::Defaults;

fn model() -> Model {
    Model {
        name: "random:tiny".to_owned(),
        digest: "d".to_owned(),
        vocab: 300,
        max_len: 1000,
        eos: vec![2],
        has_tokenizer: true,
        defaults: Defaults { temperature: 0.6, top_p: 0.9, ..Defaults::NEUTRAL },
    }
}

fn request() -> v1::GenerateRequest {
    v1::GenerateRequest { token_ids: vec![1, 2, 3], ..v1::GenerateRequest::default() }
}

fn sampled(change: impl FnOnce(&mut v1::SamplingParams)) -> v1::GenerateRequest {
    let mut sampling = v1::SamplingParams::default();
    change(&mut sampling);
    v1::GenerateRequest { sampling: Some(sampling), ..request() }
}

fn with(change: impl FnOnce(&mut v1::GenerateRequest)) -> v1::GenerateRequest {
    let mut request = request();
    change(&mut request);
    request
}

/// The whole check, as for a router whose tokenizer gives one token a byte.
fn check(request: v1::GenerateRequest) -> Result<internal::Submit> {
    let limits = Limits::default();
    let plan = generate(request, &model(), &limits)?;
    let prompt = match &plan.prompt {
        Prompt::Text(text, _) => text.bytes().map(u32::from).collect(),
        Prompt::Chat(_) => panic!("no conversation is given"),
        Prompt::Tokens(tokens) => tokens.clone(),
    };
    plan.submission(prompt, 7, &model(), Some(limits.prompt_logprobs))
}

#[test]
fn each_field_beyond_its_limit_is_named() {
    let long = |bytes: usize| "x".repeat(bytes);
    let cases = [
        ("request_id", with(|r| r.request_id = long(129))),
        ("request_id", with(|r| r.request_id = "a\nb".to_owned())),
        ("text", with(|r| r.text = Some("both".to_owned()))),
        ("token_ids", with(|r| r.token_ids.clear())),
        ("token_ids", with(|r| r.token_ids.push(300))),
        ("token_ids", with(|r| r.token_ids = vec![1; 1000])),
        ("text", v1::GenerateRequest { text: Some(String::new()), ..Default::default() }),
        ("text", v1::GenerateRequest { text: Some(long(1000)), ..Default::default() }),
        ("text", v1::GenerateRequest { text: Some(long((8 << 20) + 1)), ..Default::default() }),
        ("stop", with(|r| r.stop = vec!["a".to_owned(); 17])),
        ("stop", with(|r| r.stop = vec![String::new()])),
        ("stop", with(|r| r.stop = vec![long(257)])),
        ("max_tokens", with(|r| r.max_tokens = Some(0))),
        ("max_tokens", with(|r| r.max_tokens = Some(998))),
        ("max_tokens", with(|r| r.max_tokens = Some(u32::MAX))),
        ("priority", with(|r| r.priority = 101)),
        ("priority", with(|r| r.priority = i32::MIN)),
        ("cache_salt", with(|r| r.cache_salt = long(129))),
        ("sampling.temperature", sampled(|s| s.temperature = Some(-0.1))),
        ("sampling.temperature", sampled(|s| s.temperature = Some(f32::NAN))),
        ("sampling.temperature", sampled(|s| s.temperature = Some(f32::INFINITY))),
        ("sampling.top_p", sampled(|s| s.top_p = Some(0.0))),
        ("sampling.top_p", sampled(|s| s.top_p = Some(1.01))),
        ("sampling.min_p", sampled(|s| s.min_p = Some(-0.1))),
        ("sampling.min_p", sampled(|s| s.min_p = Some(1.1))),
        ("sampling.repetition_penalty", sampled(|s| s.repetition_penalty = Some(0.0))),
        ("sampling.repetition_penalty", sampled(|s| s.repetition_penalty = Some(10.1))),
        ("sampling.presence_penalty", sampled(|s| s.presence_penalty = Some(2.1))),
        ("sampling.presence_penalty", sampled(|s| s.presence_penalty = Some(f32::NAN))),
        ("sampling.frequency_penalty", sampled(|s| s.frequency_penalty = Some(-2.1))),
        ("sampling.logit_bias", sampled(|s| s.logit_bias = [(300, 1.0)].into())),
        ("sampling.logit_bias", sampled(|s| s.logit_bias = [(1, 100.1)].into())),
        ("sampling.logit_bias", sampled(|s| s.logit_bias = [(1, f32::NAN)].into())),
        ("sampling.logit_bias", sampled(|s| s.logit_bias = (0..1025).map(|id| (id, 0.0)).collect())),
        ("sampling.n", sampled(|s| s.n = Some(0))),
        ("sampling.n", sampled(|s| s.n = Some(17))),
        ("sampling.n", sampled(|s| s.n = Some(u32::MAX))),
        ("sampling.min_tokens", sampled(|s| s.min_tokens = 998)),
        ("sampling.min_tokens", sampled(|s| s.min_tokens = u32::MAX)),
        ("sampling.stop_token_ids", sampled(|s| s.stop_token_ids = vec![300])),
        ("sampling.stop_token_ids", sampled(|s| s.stop_token_ids = vec![1; 65])),
        ("sampling.logprobs", sampled(|s| s.logprobs = Some(21))),
        ("sampling.prompt_logprobs", sampled(|s| s.prompt_logprobs = Some(u32::MAX))),
    ];
    for (field, request) in cases {
        let refused = check(request.clone()).expect_err(field);
        assert_eq!(refused.kind, ErrorKind::InvalidArgument, "{field}: {refused}");
        assert_eq!(refused.field.as_deref(), Some(field), "{refused}");
        assert!(!refused.message.is_empty());
    }
}

#[test]
fn each_field_at_its_limit_passes() {
    let cases = [
        with(|r| r.request_id = "r".repeat(128)),
        with(|r| r.token_ids = vec![299; 999]),
        with(|r| r.stop = vec!["s".repeat(256); 16]),
        with(|r| r.max_tokens = Some(997)),
        with(|r| r.max_tokens = Some(1)),
        with(|r| r.priority = -100),
        with(|r| r.cache_salt = "s".repeat(128)),
        sampled(|s| s.temperature = Some(0.0)),
        sampled(|s| s.temperature = Some(100.0)),
        sampled(|s| s.top_p = Some(1.0)),
        sampled(|s| s.top_k = Some(u32::MAX)),
        sampled(|s| s.min_p = Some(1.0)),
        sampled(|s| s.repetition_penalty = Some(10.0)),
        sampled(|s| s.presence_penalty = Some(-2.0)),
        sampled(|s| s.frequency_penalty = Some(2.0)),
        sampled(|s| s.logit_bias = (0..300).map(|id| (id, -100.0)).collect()),
        sampled(|s| s.n = Some(16)),
        sampled(|s| s.min_tokens = 997),
        sampled(|s| s.stop_token_ids = vec![299; 64]),
        sampled(|s| (s.logprobs, s.prompt_logprobs) = (Some(20), Some(20))),
        v1::GenerateRequest { text: Some("hello".to_owned()), ..Default::default() },
    ];
    for request in cases {
        if let Err(refused) = check(request.clone()) {
            panic!("{refused}: {request:?}");
        }
    }
}

#[test]
fn prompt_logprobs_are_bounded_by_their_number() {
    let mut request = sampled(|s| (s.prompt_logprobs, s.n) = (Some(20), Some(16)));
    request.token_ids = vec![1; 595];
    assert!(check(request.clone()).is_ok(), "595 x 21 x 16 = 199,920");
    request.token_ids.push(1);
    let refused = check(request).expect_err("596 x 21 x 16 = 200,256");
    assert_eq!(refused.field.as_deref(), Some("sampling.prompt_logprobs"));
}

#[test]
fn absent_fields_take_the_models_values_and_present_ones_stay() {
    let submit = check(request()).expect("valid");
    let sampling = submit.sampling.expect("set");
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 0.9, 0));
    assert_eq!((sampling.min_p, sampling.repetition_penalty, sampling.seed), (0.0, 1.0, 7));
    assert_eq!((submit.max_tokens, submit.text), (997, true));

    let given = sampled(|s| {
        (s.temperature, s.top_p, s.top_k) = (Some(0.0), Some(1.0), Some(5));
        s.logit_bias = [(9, 1.0), (3, -1.0), (7, 0.5)].into();
    });
    let sampling = check(given).expect("valid").sampling.expect("set");
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.0, 1.0, 5));
    assert_eq!((sampling.bias_ids, sampling.bias_values), (vec![3, 7, 9], vec![-1.0, 0.5, 1.0]));
}

#[test]
fn stop_strings_need_a_tokenizer() {
    let without = Model { has_tokenizer: false, ..model() };
    let request = with(|r| r.stop = vec!["a".to_owned()]);
    let refused = generate(request, &without, &Limits::default()).expect_err("no tokenizer");
    assert_eq!((refused.kind, refused.reason), (ErrorKind::FailedPrecondition, Some("NO_TOKENIZER")));
}

#[test]
fn scores_need_two_tokens_and_ask_for_the_prompts_logprobs() {
    let score_of = |tokens: Vec<u32>| {
        let request = v1::ScoreRequest { token_ids: tokens.clone(), ..v1::ScoreRequest::default() };
        score(request, &model(), &Limits::default())?.submission(tokens, 0, &model(), None)
    };
    assert_eq!(score_of(vec![1]).expect_err("one token").field.as_deref(), Some("token_ids"));
    assert_eq!(score_of(vec![1, 300]).expect_err("no such token").field.as_deref(), Some("token_ids"));
    let submit = score_of(vec![1, 2]).expect("valid");
    assert_eq!((submit.prompt_logprobs, submit.max_tokens, submit.text), (Some(0), 1, false));
    assert_eq!(submit.sampling.expect("set").temperature, 0.0);
}
