//! What else clients ask: the model and its limits, text and tokens, scores, health. Scores are held against those that
//! `perigee score` writes for the same tokens.

use std::process::Command;

use perigee_proto::v1::{
    DetokenizeRequest, FinishReason, GenerateRequest, GetModelInfoRequest, SamplingParams, ScoreRequest,
    TokenizeRequest,
};
use perigee_testkit::sandbox::{Clients, HealthCheckRequest};
use perigee_testkit::tensors::{self, Tensor, Tensors, Values};
use perigee_testkit::{Numbers, Sandbox};
use tonic::Code;

use crate::answer::ask;
use crate::work::{VOCAB, byte, prompt};
use crate::{greedy, up};

/// Characters of one to four bytes, and a name that would be a special token.
const TEXT: &str = "Grüße aus 北京, κόσμε!\n\t🦀 <|eos|> fin";

async fn cluster(tp: usize) -> (Sandbox, Clients) {
    let sandbox = up(1, tp).start().unwrap();
    let clients = sandbox.connect().await.unwrap();
    (sandbox, clients)
}

async fn tokenize(clients: &Clients, text: &str) -> Vec<u32> {
    let request = TokenizeRequest { text: text.to_owned(), ..TokenizeRequest::default() };
    clients.inference.clone().tokenize(request).await.unwrap().into_inner().token_ids
}

async fn detokenize(clients: &Clients, token_ids: &[u32]) -> String {
    let request = DetokenizeRequest { token_ids: token_ids.to_vec() };
    clients.inference.clone().detokenize(request).await.unwrap().into_inner().text
}

#[tokio::test]
async fn text_and_tokens_go_both_ways() {
    let (_sandbox, clients) = cluster(1).await;
    let tokens = tokenize(&clients, TEXT).await;
    assert_eq!(tokens.len(), TEXT.len(), "one token a byte, none of them special");
    assert_eq!(detokenize(&clients, &tokens).await, TEXT);
    assert_eq!(
        detokenize(&clients, &[&[1], tokens.as_slice(), &[2]].concat()).await,
        TEXT,
        "special tokens are left out"
    );
    assert_eq!((tokenize(&clients, "").await, detokenize(&clients, &[]).await), (Vec::new(), String::new()));

    // Text and its tokens are the same prompt; the streamed text is that of the streamed tokens.
    let from_tokens = ask(&clients, &greedy(tokens, 40)).await.finished();
    let text = GenerateRequest { text: Some(TEXT.to_owned()), ..greedy(Vec::new(), 40) };
    let from_text = ask(&clients, &text).await.finished();
    assert_eq!(from_text.choices[0].tokens, from_tokens.choices[0].tokens);
    assert_eq!(from_text.choices[0].text, detokenize(&clients, &from_text.choices[0].tokens).await);
    assert_eq!(from_text.choices[0].usage.map(|usage| usage.prompt), Some(TEXT.len() as u64));
}

#[tokio::test]
async fn stops_end_a_choice_where_they_should() {
    let (_sandbox, clients) = cluster(1).await;
    // Two letters, equally biased, in an order that the seed decides.
    let likes = |seed: u64| SamplingParams {
        logit_bias: [(byte('a'), 60.0), (byte('b'), 60.0)].into(),
        seed: Some(seed),
        ..SamplingParams::default()
    };
    let free = GenerateRequest { sampling: Some(likes(3)), ..greedy(vec![9, 10], 60) };
    let free = ask(&clients, &free).await.finished().choices.remove(0);
    assert_eq!(
        (free.tokens.len(), free.text.len(), free.finish),
        (60, 60, Some(FinishReason::Length)),
        "{}",
        free.text
    );
    let at = free.text.find("abb").expect("60 letters of two kinds hold it");

    // A stop string ends it and is left out; the token that completed it is the last.
    let stopped = GenerateRequest { stop: vec!["abb".into()], sampling: Some(likes(3)), ..greedy(vec![9, 10], 60) };
    let stopped = ask(&clients, &stopped).await.finished().choices.remove(0);
    assert_eq!((stopped.text.as_str(), stopped.finish), (&free.text[..at], Some(FinishReason::Stop)));
    assert_eq!(stopped.tokens, free.tokens[..at + 3]);

    // A stop token ends it, not before min_tokens: until then it is not drawn at all.
    let sampling = SamplingParams { stop_token_ids: vec![byte('b')], min_tokens: 10, ..likes(3) };
    let held = GenerateRequest { sampling: Some(sampling), ..greedy(vec![9, 10], 60) };
    let held = ask(&clients, &held).await.finished().choices.remove(0);
    assert_eq!(&held.text[..10], "aaaaaaaaaa");
    assert_eq!(held.finish, Some(FinishReason::Stop));
    assert_eq!(held.tokens.iter().position(|&token| token == byte('b')), Some(held.tokens.len() - 1));

    // The model's own end of sequence, unless it is ignored.
    let eos = SamplingParams { logit_bias: [(2, 100.0)].into(), temperature: Some(0.0), ..SamplingParams::default() };
    let ends = GenerateRequest { sampling: Some(eos.clone()), ..greedy(vec![9, 10], 5) };
    let ends = ask(&clients, &ends).await.finished().choices.remove(0);
    assert_eq!((ends.tokens.as_slice(), ends.finish), ([2].as_slice(), Some(FinishReason::Stop)));
    let ignores = SamplingParams { ignore_eos: true, ..eos };
    let ignores = GenerateRequest { sampling: Some(ignores), ..greedy(vec![9, 10], 5) };
    let ignores = ask(&clients, &ignores).await.finished().choices.remove(0);
    assert_eq!((ignores.tokens.as_slice(), ignores.finish), ([2; 5].as_slice(), Some(FinishReason::Length)));
}

#[tokio::test]
async fn choices_are_draws_of_their_own_and_repeat_with_their_seed() {
    let (_sandbox, clients) = cluster(2).await;
    let asked = |seed| GenerateRequest {
        sampling: Some(SamplingParams { n: Some(3), seed, ignore_eos: true, ..SamplingParams::default() }),
        ..greedy(vec![9, 10, 11], 12)
    };
    let first = ask(&clients, &asked(None)).await.finished();
    let tokens = |number: usize| &first.choices[number].tokens;
    assert!(tokens(0) != tokens(1) && tokens(1) != tokens(2) && tokens(0) != tokens(2), "{:?}", first.choices);
    let seed = first.seed.expect("the router reports the seed that it drew");
    let again = ask(&clients, &asked(Some(seed))).await.finished();
    let both = first.choices.iter().zip(&again.choices);
    assert!(both.into_iter().all(|(one, other)| one.tokens == other.tokens), "the same seed draws the same");
    let other = ask(&clients, &asked(Some(seed.wrapping_add(1)))).await.finished();
    assert_ne!(&other.choices[0].tokens, tokens(0));
}

#[tokio::test]
async fn the_model_and_its_limits_are_told() {
    let (sandbox, clients) = cluster(1).await;
    let model = clients.inference.clone().get_model_info(GetModelInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((model.vocab_size as usize, model.has_tokenizer), (VOCAB, true));
    assert_eq!((model.eos_token_ids.as_slice(), model.max_model_len), ([2].as_slice(), 32_768));
    assert_eq!(model.model, "random:tiny@0");
    assert_eq!((model.max_n, model.max_logprobs), (16, 20));
    assert_eq!((model.max_text_bytes, model.max_message_bytes), (8 << 20, 16 << 20));
    let defaults = model.default_sampling.unwrap();
    assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(1.0), Some(1.0), Some(0)));
    assert!(
        model.digest.len() >= 16 && model.digest.chars().all(|digit| digit.is_ascii_hexdigit()),
        "{}",
        model.digest
    );

    let replica = clients.replicas().await.unwrap().remove("replica-0").unwrap();
    assert_eq!((replica.status.as_str(), replica.tp, replica.device.as_str()), ("ready", 1, "cpu"));
    assert_eq!(replica.pids, sandbox.replicas[0].pids);
    assert!(!replica.incarnation.is_empty() && replica.weight_bytes[0] > 100_000, "{replica:?}");
    for service in ["", "perigee.v1.Inference", "perigee.v1.Cluster"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let health = clients.health.clone().check(request).await.unwrap().into_inner();
        assert_eq!(health.status, 1, "{service:?} serves");
    }
    let request = HealthCheckRequest { service: "perigee.v1.Nothing".to_owned() };
    assert_eq!(clients.health.clone().check(request).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn scores_are_those_that_perigee_score_writes() {
    const LENGTHS: [usize; 4] = [2, 65, 130, 400];
    let mut numbers = Numbers::new(50);
    let prompts: Vec<Vec<u32>> = LENGTHS.iter().map(|&length| prompt(&mut numbers, length)).collect();
    let folder = tempfile::tempdir().unwrap();
    let (tokens, out) = (folder.path().join("tokens.safetensors"), folder.path().join("out.safetensors"));
    let named = prompts.iter().enumerate().map(|(number, prompt)| {
        let ids = prompt.iter().map(|&token| token.into()).collect();
        (format!("prompt_{number}"), Tensor::integers(&[prompt.len()], ids))
    });
    tensors::write(&tokens, &named.collect::<Tensors>()).unwrap();
    let mut score = Command::new(env!("CARGO_BIN_EXE_perigee"));
    score.args(["score", "--model=random:tiny", "--tp=1", "--tokens"]).arg(&tokens).arg("--out").arg(&out);
    let output = score.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let scored = tensors::read(&out).unwrap();

    let (_sandbox, clients) = cluster(2).await;
    for (number, prompt) in prompts.iter().enumerate() {
        let request = ScoreRequest { token_ids: prompt.clone(), ..ScoreRequest::default() };
        let answer = clients.inference.clone().score(request).await.unwrap().into_inner();
        assert_eq!(answer.logprobs.len(), prompt.len() - 1);
        let usage = answer.usage.unwrap();
        assert_eq!((usage.prompt, usage.completion, answer.replica.as_str()), (prompt.len() as u64, 0, "replica-0"));
        let logits = &scored[&format!("logits_{number}")];
        let Values::Floats(values) = &logits.values else { panic!("logits are floats") };
        let rows = values.chunks_exact(logits.width());
        for (position, ((row, &token), logprob)) in rows.zip(&prompt[1..]).zip(&answer.logprobs).enumerate() {
            let expected = log_softmax(row, token as usize);
            let difference = (f64::from(*logprob) - expected).abs();
            assert!(difference < 1e-4, "prompt {number}, position {position}: {logprob}, expected {expected}");
        }
        // The same numbers come with a prompt that is generated from.
        let sampling = SamplingParams { prompt_logprobs: Some(1), ..SamplingParams::default() };
        let request = GenerateRequest { sampling: Some(sampling), ..greedy(prompt.clone(), 1) };
        let generated = ask(&clients, &request).await.finished();
        let positions = &generated.choices[0].prompt_logprobs;
        assert_eq!((positions.len(), positions[0].chosen), (prompt.len(), None));
        let chosen = positions.iter().filter_map(|position| position.chosen).map(|chosen| chosen.logprob);
        let near = chosen.zip(&answer.logprobs).all(|(one, other)| (one - other).abs() < 1e-5);
        assert!(near, "prompt {number}");
    }
}

fn log_softmax(row: &[f32], token: usize) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(row[token] - max) - sum.ln()
}
