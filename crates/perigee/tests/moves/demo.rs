//! The demo model, moved: streams change replicas again and again, to other degrees and back, with their latents and without.
//! Known texts begin as the training framework goes on with them, and a page that is read on several replicas has the log
//! probabilities that the framework gives it. A state that arrives wrong shows as broken text.

use perigee_proto::v1::{GenerateRequest, MigrateMode, SamplingParams, TokenizeRequest};
use perigee_testkit::demo::{continuations, page};
use perigee_testkit::reference::{Undisturbed, Verdict};
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec};
use tokio::task::JoinSet;

use crate::client::{Answer, run};
use crate::greedy;
use crate::judge::{engine_request, observed};
use crate::plan::{Move, Schedule};

/// Ranks of the replicas.
const DEGREES: [usize; 2] = [1, 2];
/// Tokens of a stream: more than are known, so that there is time to move.
const TOKENS: u32 = 400;
/// After which tokens of an answer its session moves, and how.
const MOVES: [(Option<usize>, MigrateMode); 5] = [
    (None, MigrateMode::Split),
    (Some(10), MigrateMode::Split),
    (Some(70), MigrateMode::Whole),
    (Some(140), MigrateMode::Split),
    (Some(210), MigrateMode::Split),
];
/// Moves of a stream that must have come about: those that are asked for while another is under way wait for it.
const LEAST: usize = 3;
/// Largest difference of a log probability, in nats.
const NEAR: f64 = 1e-3;

async fn fleet() -> (Fleet, Vec<String>, Clients) {
    let spec = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &DEGREES).model("demo");
    // Prompts take many steps, so that a session that moves as soon as it is known does so before its first token.
    let fleet = spec.worker("--token-budget=16").worker("--max-batch=16").start().await.unwrap();
    let names = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let clients = fleet.connect().await.unwrap();
    (fleet, names, clients)
}

fn schedule(request: GenerateRequest) -> Schedule {
    let moves = MOVES.map(|(after, mode)| Move { choice: 0, after, further: 1, mode });
    Schedule { request, moves: moves.to_vec() }
}

/// How often a stream moved; panics where it broke a rule or did not move.
fn moved(answer: &Answer) -> usize {
    assert_eq!((answer.failed.is_none(), &answer.broken), (true, &Vec::new()), "{:?}", answer.failed);
    let moved = answer.moves.iter().filter(|moved| moved.answer.is_ok()).count();
    println!("{moved} moves, epochs {:?}", answer.choices[0].epochs);
    assert!(moved >= LEAST, "{:?}", answer.moves);
    moved
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_texts_stay_the_same_across_moves() {
    let (_fleet, names, clients) = fleet().await;
    let mut running = JoinSet::new();
    for known in continuations().unwrap() {
        let request = TokenizeRequest { text: known.prompt.clone(), ..TokenizeRequest::default() };
        let prompt = clients.inference.clone().tokenize(request).await.unwrap().into_inner().token_ids;
        let request = GenerateRequest { request_id: known.prompt.clone(), ..greedy(prompt, TOKENS) };
        let (clients, names) = (clients.clone(), names.clone());
        running.spawn(async move {
            let answer = run(&clients, &schedule(request.clone()), &names).await;
            (known, request, answer)
        });
    }
    let mut undisturbed = Undisturbed::open("demo", 512).unwrap();
    for (known, request, answer) in running.join_all().await {
        moved(&answer);
        let choice = &answer.choices[0];
        assert!(choice.text.starts_with(&known.text), "{:?} was gone on with as {:?}", known.prompt, choice.text);
        assert_eq!(choice.tokens[..known.tokens.len()], known.tokens, "{:?}", known.prompt);
        match undisturbed.judge(&engine_request(&request), 0, &observed(&request, choice)).unwrap() {
            Verdict::Same => {}
            Verdict::Excused(excuses) => println!("{:?} excused beyond the known text: {excuses:?}", known.prompt),
            Verdict::Different(what) => panic!("{:?}: {what}; epochs {:?}", known.prompt, choice.epochs),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_moves_while_it_is_read_has_the_training_frameworks_log_probabilities() {
    let (_fleet, names, clients) = fleet().await;
    let page = page().unwrap();
    let request = GenerateRequest { request_id: "page".into(), ..greedy(page.tokens.clone(), TOKENS) };
    let sampling = request.sampling.map(|sampling| SamplingParams { prompt_logprobs: Some(0), ..sampling });
    let answer = run(&clients, &schedule(GenerateRequest { sampling, ..request }), &names).await;
    moved(&answer);
    let positions = &answer.choices[0].prompt_logprobs;
    assert_eq!(positions.len(), page.tokens.len());
    let chosen: Vec<f64> =
        positions.iter().filter_map(|position| position.chosen).map(|chosen| f64::from(chosen.logprob)).collect();
    assert_eq!(chosen.len(), page.logprobs.len());
    let worst = chosen.iter().zip(&page.logprobs).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
    println!("worst difference {worst:.1e} nats");
    assert!(worst < NEAR, "off by {worst} nats");
}
