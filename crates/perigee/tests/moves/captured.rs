//! A handoff as an engine wrote it once, kept with the tokens that its session has: this build must take it and go on with
//! exactly those, or say that it reads another version. PERIGEE_CAPTURE=1 writes it anew, which a change of format or of
//! the record's version asks for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use perigee_engine::moves::HandoffRefused;
use perigee_engine::request::{FinishReason, Request, RouterId, SessionId, StopRule};
use perigee_migration::Mode;
use perigee_sampling::SamplingParams;
use perigee_testkit::Numbers;
use perigee_testkit::reference::{Undisturbed, Verdict};
use perigee_testkit::world::{Order, Relay, Trouble, World, WorldSpec};

use crate::plan::prompt;

const SESSION: &str = "captured";
/// Its epoch at the target.
const EPOCH: u64 = 2;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn request() -> Request {
    let sampling = SamplingParams {
        temperature: 0.8,
        top_p: 0.9,
        repetition_penalty: 1.2,
        seed: 5,
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    Request {
        grammar: None,
        trace: None,
        request_id: "a captured request".into(),
        sessions: vec![SessionId(SESSION.into())],
        first_choice: 0,
        epoch: 1,
        prompt: prompt(&mut Numbers::new(4), 512, 70),
        delivered: Vec::new(),
        sampling,
        stop: StopRule { max_tokens: 30, ignore_eos: true, stop: vec!["never".into()], ..StopRule::default() },
        prompt_logprobs: None,
        priority: 0,
        deadline: None,
        cache_salt: "salt".into(),
        text: true,
    }
}

/// The tokens, one a line.
fn written(tokens: &[u32]) -> String {
    tokens.iter().map(|token| format!("{token}\n")).collect()
}

async fn capture() {
    let world = World::start(&WorldSpec::new(&[2, 1])).unwrap();
    let order = Order { after: 9, to: 1, mode: Mode::Whole };
    let course = Relay::attach(&world).run(&request(), 0, &[order], Trouble::default()).await.unwrap();
    let mut undisturbed = Undisturbed::open("random:tiny", 128).unwrap();
    assert!(matches!(undisturbed.judge(&request(), 0, &course.observed).unwrap(), Verdict::Same));
    std::fs::write(data("handoff-v1.bin"), &world.carriage().carried().remove(0).bytes).unwrap();
    std::fs::write(data("handoff-v1.tokens"), written(&course.observed.tokens)).unwrap();
}

/// Brings a handoff to an engine of its own, and lets it run to its end: the index of its first token, and its tokens.
async fn go_on(bytes: &[u8]) -> Result<(u64, Vec<u32>, Option<FinishReason>), HandoffRefused> {
    let world = World::start(&WorldSpec::new(&[2])).unwrap();
    let engine = &world.members[0].engine;
    let router = RouterId(1);
    let mut events = engine.attach(router);
    let mut incoming = engine.incoming();
    for piece in bytes.chunks(1000) {
        incoming.push(piece).await?;
    }
    let prepared = incoming.finish().await?;
    assert_eq!((prepared.session.as_str(), prepared.epoch), (SESSION, EPOCH));
    engine.start(router, SessionId(SESSION.into()), EPOCH);
    let (mut first, mut tokens, mut finish) = (None, Vec::new(), None);
    while finish.is_none() {
        let batch = tokio::time::timeout(Duration::from_secs(30), events.recv()).await.expect("in time");
        for event in batch.expect("a running engine").events {
            first.get_or_insert(event.index);
            tokens.extend(event.token);
            finish = event.finish;
        }
    }
    world.all_free(Duration::from_secs(10)).await.unwrap();
    Ok((first.unwrap_or_default(), tokens, finish))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_captured_handoff_goes_on_with_the_tokens_that_it_had() {
    if std::env::var_os("PERIGEE_CAPTURE").is_some() {
        capture().await;
    }
    let bytes = std::fs::read(data("handoff-v1.bin")).unwrap();
    let known = std::fs::read_to_string(data("handoff-v1.tokens")).unwrap();
    let known: Vec<u32> = known.lines().map(|line| line.parse().unwrap()).collect();
    let (first, tokens, finish) = go_on(&bytes).await.unwrap();
    assert!(first >= 9, "from token {first} on");
    assert_eq!((tokens.as_slice(), finish), (&known[first as usize..], Some(FinishReason::Length)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_captured_handoff_that_is_not_whole_is_refused() {
    let bytes = std::fs::read(data("handoff-v1.bin")).unwrap();
    let mut numbers = Numbers::new(1);
    for _ in 0..20 {
        let mut damaged = bytes.clone();
        let at = numbers.between(0, damaged.len() - 1);
        damaged[at] ^= 1 << numbers.between(0, 7);
        let refused = go_on(&damaged).await.expect_err("a flipped bit");
        assert!(matches!(refused, HandoffRefused::Handoff(_)), "byte {at}: {refused:?}");
    }
    for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
        let refused = go_on(&bytes[..length]).await.expect_err("a part");
        assert!(matches!(refused, HandoffRefused::Handoff(_)), "{length} bytes: {refused:?}");
    }
}
