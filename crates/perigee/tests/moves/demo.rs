//! The demo model's known texts, moved: their streams change replicas again and again, to other degrees and back, with their
//! latents and without, and say what they say undisturbed. A state that arrives wrong shows as broken text.

use perigee_proto::v1::{GenerateRequest, MigrateMode, SamplingParams};
use perigee_testkit::demo::{Continuation, continuations};
use perigee_testkit::sandbox::FleetSpec;

use crate::client::run;
use crate::plan::{Move, Schedule};

/// Ranks of the replicas.
const DEGREES: [usize; 2] = [1, 2];
/// After which tokens of an answer its session moves, and how.
const MOVES: [(Option<usize>, MigrateMode); 5] = [
    (None, MigrateMode::Split),
    (Some(9), MigrateMode::Split),
    (Some(18), MigrateMode::Whole),
    (Some(27), MigrateMode::Split),
    (Some(36), MigrateMode::Split),
];

fn schedule(known: &Continuation) -> Schedule {
    let request = GenerateRequest {
        text: Some(known.prompt.clone()),
        max_tokens: Some(known.tokens.len() as u32),
        sampling: Some(SamplingParams { temperature: Some(0.0), ..SamplingParams::default() }),
        ..GenerateRequest::default()
    };
    let moves = MOVES.map(|(after, mode)| Move { choice: 0, after, further: 1, mode });
    Schedule { request, moves: moves.to_vec() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn known_texts_stay_the_same_across_moves() {
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &DEGREES)
        .model("demo")
        // Prompts of some tokens take some steps, so that a session moves before its first token.
        .worker("--token-budget=2")
        .worker("--max-batch=2")
        .start()
        .await
        .unwrap();
    let names: Vec<String> = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let clients = fleet.connect().await.unwrap();
    for known in continuations().unwrap() {
        let answer = run(&clients, &schedule(&known), &names).await;
        assert_eq!((answer.failed.is_none(), answer.broken), (true, Vec::new()), "{:?}", answer.failed);
        let choice = &answer.choices[0];
        assert_eq!((&choice.text, &choice.tokens), (&known.text, &known.tokens), "{:?}", known.prompt);
        let moved = answer.moves.iter().filter(|moved| moved.answer.is_ok()).count();
        println!("{:?}: {moved} moves, epochs {:?}", known.prompt, choice.epochs);
        assert!(moved >= 4 && choice.epochs.len() > 3, "{:?}", answer.moves);
    }
}
