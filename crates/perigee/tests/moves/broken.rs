//! Moves that go wrong on purpose, within one process: mistakes of a target in what it writes or runs, which the checks must
//! notice; handoffs that are damaged on the way, which a target must refuse with the session still right; messages that get
//! lost or come twice; and a router that dies in the middle.

use std::time::Duration;

use perigee_engine::request::{Request, SessionId, StopRule};
use perigee_migration::epochs::Side;
use perigee_migration::{Mode, attention_bytes};
use perigee_sampling::SamplingParams;
use perigee_testkit::reference::{Undisturbed, Verdict};
use perigee_testkit::world::{Course, Fault, Message, Moment, Order, Relay, Stage, Tamper, Trouble, World, WorldSpec};
use perigee_testkit::{DType, Numbers};

use crate::plan::prompt;

const MODEL: &str = "random:tiny";
const VOCAB: usize = 512;
/// Longest session of these tests.
const LONGEST: usize = 1024;
/// Tokens of a session that is to move: far more than it draws while its target is asked for room, on a machine that does
/// other things too.
const MANY: u32 = 400;
/// How long slots and pages may take to come back, where no grace time has to run out.
pub(crate) const FREED: Duration = Duration::from_secs(10);

/// A request of one session that goes on to its last token.
pub(crate) fn request(name: &str, length: usize, tokens: u32, sampling: SamplingParams) -> Request {
    let seed = name.bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    Request {
        grammar: None,
        resumable: false,
        trace: None,
        request_id: name.to_owned(),
        sessions: vec![SessionId(name.to_owned())],
        first_choice: 0,
        epoch: 1,
        prompt: prompt(&mut Numbers::new(seed), VOCAB, length),
        delivered: Vec::new(),
        sampling,
        stop: StopRule { max_tokens: tokens, ignore_eos: true, ..StopRule::default() },
        prompt_logprobs: None,
        priority: 0,
        deadline: None,
        cache_salt: String::new(),
        text: true,
    }
}

pub(crate) fn sampled() -> SamplingParams {
    SamplingParams { temperature: 0.9, top_p: 0.95, seed: 11, ..SamplingParams::default() }
}

fn penalised() -> SamplingParams {
    SamplingParams { repetition_penalty: 1.5, frequency_penalty: 0.5, ..SamplingParams::greedy() }
}

fn order(after: usize, to: usize, mode: Mode) -> Order {
    Order { after, to, mode }
}

/// There and back, split and whole.
pub(crate) fn there_and_back() -> Vec<Order> {
    vec![order(5, 1, Mode::Split), order(15, 0, Mode::Whole), order(25, 1, Mode::Split)]
}

/// What is wrong with a course, if anything is.
pub(crate) fn wrong(undisturbed: &mut Undisturbed, request: &Request, course: &Course) -> Option<String> {
    if let Some(broken) = course.broken.first() {
        return Some(broken.clone());
    }
    match undisturbed.judge(request, 0, &course.observed).unwrap() {
        Verdict::Same | Verdict::Excused(_) => None,
        Verdict::Different(what) => Some(what),
    }
}

/// Sessions whose prompt ends within a page, greedy, drawn and penalised.
fn sessions() -> Vec<Request> {
    [("greedy", 40, SamplingParams::greedy()), ("sampled", 100, sampled()), ("penalised", 90, penalised())]
        .map(|(name, length, sampling)| request(name, length, MANY, sampling))
        .to_vec()
}

/// Runs the sessions one after the other, and what is wrong with each; how many moves were made, and why others were not.
pub(crate) async fn run_all(
    spec: &WorldSpec,
    undisturbed: &mut Undisturbed,
) -> (Vec<Option<String>>, usize, Vec<String>) {
    let world = World::start(spec).unwrap();
    let mut relay = Relay::attach(&world);
    let (mut faults, mut made, mut refused) = (Vec::new(), 0, Vec::new());
    for request in sessions() {
        let course = relay.run(&request, 0, &there_and_back(), Trouble::default()).await.unwrap();
        faults.push(wrong(undisturbed, &request, &course));
        for (_, result) in course.moves {
            match result {
                Ok(_) => made += 1,
                Err(why) => refused.push(why),
            }
        }
    }
    world.all_free(FREED).await.unwrap();
    (faults, made, refused)
}

pub(crate) fn undisturbed() -> Undisturbed {
    Undisturbed::open(MODEL, LONGEST).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planted_faults_fail_the_check() {
    let mut undisturbed = undisturbed();
    let spec = WorldSpec::new(&[2, 2]);
    let (faults, made, refused) = run_all(&spec, &mut undisturbed).await;
    assert_eq!(faults, vec![None, None, None], "without a fault nothing is wrong");
    assert!(made >= 6, "only {made} of 9 moves were made: {refused:?}");
    for fault in Fault::ALL {
        let spec = WorldSpec { fault: Some((fault, Stage::Running)), ..spec.clone() };
        let (faults, made, refused) = run_all(&spec, &mut undisturbed).await;
        assert!(made > 0, "{fault:?}: {refused:?}");
        println!("{fault:?}: {faults:?}");
        assert!(faults.iter().any(Option::is_some), "nothing shows that {fault:?} was planted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_target_writes_wrong_is_refused_and_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    for fault in Fault::ALL.into_iter().filter(|fault| fault.is_of_tensors()) {
        let spec = WorldSpec { fault: Some((fault, Stage::Writing)), ..WorldSpec::new(&[2, 2]) };
        let (faults, made, refused) = run_all(&spec, &mut undisturbed).await;
        assert_eq!(faults, vec![None, None, None], "{fault:?}");
        // A session may stand still just where its last page is full: then there is nothing stale about it.
        let full = if fault == Fault::StalePage { 2 } else { 0 };
        assert!(made <= full, "{fault:?}: {made} moves were made");
        assert!(!refused.is_empty() && refused.iter().all(|why| why.contains("digest")), "{fault:?}: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_skips_the_epoch_check_fails_the_check() {
    let mut undisturbed = undisturbed();
    let world = World::start(&WorldSpec::new(&[1, 2])).unwrap();
    let mut relay = Relay::attach(&world);
    let lost = Trouble { presumed_lost: Some(10), ..Trouble::default() };
    let request = request("replayed", 60, 300, sampled());
    let course = relay.run(&request, 0, &[], lost).await.unwrap();
    assert_eq!(wrong(&mut undisturbed, &request, &course), None);
    assert!(course.strays > 0, "the owner that counted as lost ran on");
    world.all_free(FREED).await.unwrap();

    let skipped = Trouble { accepts_all_epochs: true, ..lost };
    let request = Request { sessions: vec![SessionId("unchecked".into())], ..request };
    let course = relay.run(&request, 0, &[], skipped).await.unwrap();
    let what = wrong(&mut undisturbed, &request, &course);
    assert!(what.as_ref().is_some_and(|what| what.contains("a gap or a repeat")), "{what:?}");
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_handoffs_are_refused_and_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    let world = World::start(&WorldSpec::new(&[1, 2])).unwrap();
    let mut relay = Relay::attach(&world);
    let mut numbers = Numbers::new(77);
    let first = [order(5, 1, Mode::Whole)];
    let plain = request("plain", 150, 100, sampled());
    let course = relay.run(&plain, 0, &first, Trouble::default()).await.unwrap();
    assert_eq!((wrong(&mut undisturbed, &plain, &course), course.moves.len()), (None, 1));
    let length = world.carriage().carried().remove(0).bytes.len();
    println!("a handoff of {length} bytes");

    // Everywhere, and closely at the beginning, where header and tokens are.
    let mut places: Vec<usize> = (0..400).step_by(9).collect();
    places.extend((0..60).map(|_| numbers.between(0, length - 1)));
    let mut tampers: Vec<Tamper> =
        places.iter().map(|&byte| Tamper::Flip { byte, bit: numbers.between(0, 7) as u8 }).collect();
    tampers.extend((0..12).map(|_| Tamper::Cut { bytes: numbers.between(0, length - 1) }));
    tampers.extend((0..12).map(|_| Tamper::Break { bytes: numbers.between(0, length - 1) }));
    let (mut failed, count) = (0, tampers.len());
    for (number, tamper) in tampers.into_iter().enumerate() {
        world.carriage().tamper(tamper.clone());
        let request = Request { sessions: vec![SessionId(format!("damaged-{number}"))], ..plain.clone() };
        let course = relay.run(&request, 0, &first, Trouble::default()).await.unwrap();
        let told = format!("{tamper:?}: {:?}", course.moves);
        assert_eq!(wrong(&mut undisturbed, &request, &course), None, "{told}");
        let carried = world.carriage().carried();
        let (Tamper::Flip { byte: place, .. } | Tamper::Cut { bytes: place } | Tamper::Break { bytes: place }) = tamper
        else {
            continue;
        };
        if carried.iter().all(|handoff| handoff.bytes.len() <= place) {
            // This one stood still sooner and is shorter.
            continue;
        }
        let [(_, Err(why))] = &course.moves[..] else { panic!("it was taken: {told}") };
        // The session may end before anything of the damage is known.
        failed += usize::from(why.contains("the handoff failed: "));
        assert!(carried.iter().all(|handoff| handoff.refused.is_some()), "{told}");
    }
    assert!(failed * 10 >= count * 9, "only {failed} of {count} handoffs were refused");
    world.carriage().tamper(Tamper::Nothing);
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_belong_to_a_target_is_refused_and_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    let spec = WorldSpec::new(&[1, 1]);
    let plain = request("plain", 150, MANY, sampled());
    let first = [order(5, 1, Mode::Whole)];

    // A handoff of another model, of another session's past, and of a full target.
    let other = World::start(&WorldSpec { model: "random:tiny@1".into(), ..spec.clone() }).unwrap();
    Relay::attach(&other).run(&plain, 0, &first, Trouble::default()).await.unwrap();
    let foreign = other.carriage().carried().remove(0).bytes;
    let wide = World::start(&WorldSpec { model: "random:wide".into(), ..spec.clone() }).unwrap();
    let short = request("wide", 20, 100, sampled());
    Relay::attach(&wide).run(&short, 0, &[order(2, 1, Mode::Split)], Trouble::default()).await.unwrap();
    let larger = wide.carriage().carried().remove(0).bytes;

    let world = World::start(&spec).unwrap();
    let mut relay = Relay::attach(&world);
    relay.run(&plain, 0, &first, Trouble::default()).await.unwrap();
    let past = world.carriage().carried().remove(0).bytes;
    let mut newer = past.clone();
    // The chunk's head has 12 bytes, the mark 4; then the version. Its checksum is not what is looked at first.
    newer[16] = newer[16].wrapping_add(1);
    for (name, bytes, says) in [
        ("another-model", foreign, "model"),
        ("other-shapes", larger, "model"),
        ("past", past, "epoch"),
        ("newer", newer, "checksum"),
    ] {
        world.carriage().tamper(Tamper::Replace(bytes));
        let request = Request { sessions: vec![SessionId(name.into())], ..plain.clone() };
        let course = relay.run(&request, 0, &first, Trouble::default()).await.unwrap();
        assert_eq!(wrong(&mut undisturbed, &request, &course), None, "{name}");
        println!("{name}: {:?}", course.moves);
        let [(_, Err(why))] = &course.moves[..] else { panic!("{name} was taken: {:?}", course.moves) };
        assert!(why.contains(says), "{name}: {why}");
    }
    world.carriage().tamper(Tamper::Nothing);
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_target_refuses_and_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    // A session with latents elsewhere needs two slots: one to read, one to write.
    let world = World::start(&WorldSpec { last_slots: 1, ..WorldSpec::new(&[1, 1]) }).unwrap();
    let request = request("mover", 200, MANY, sampled());
    let orders = [order(5, 1, Mode::Split)];
    let course = Relay::attach(&world).run(&request, 0, &orders, Trouble::default()).await.unwrap();
    assert_eq!(wrong(&mut undisturbed, &request, &course), None);
    let [(_, Err(why))] = &course.moves[..] else { panic!("it was taken: {:?}", course.moves) };
    assert!(why.contains("there is no room for the session"), "{why}");
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_and_doubled_messages_change_nothing() {
    let world = World::start(&WorldSpec::new(&[1, 2])).unwrap();
    let messages = [
        Message::Prepare,
        Message::Ready,
        Message::Start,
        Message::Started,
        Message::Release,
        Message::Released,
        Message::AbortMove,
        Message::Aborted,
    ];
    let mut cases = Vec::new();
    for message in messages {
        let cancels = matches!(message, Message::AbortMove | Message::Aborted);
        let plain = Trouble { cancels, ..Trouble::default() };
        cases.push((format!("lost-{message:?}"), Trouble { lost: Some(message), ..plain }));
        cases.push((format!("doubled-{message:?}"), Trouble { doubled: Some(message), ..plain }));
    }
    // Side by side: each waits for a message that never comes.
    let runs = cases.into_iter().map(|(name, trouble)| {
        let world = &world;
        async move {
            let request = request(&name, 100, 500, sampled());
            let orders = [order(5, 1, Mode::Split), order(12, 0, Mode::Whole)];
            let mut relay = Relay::attach(world).patience(Duration::from_millis(300));
            let course = relay.run(&request, 0, &orders, trouble).await.unwrap();
            (request, course)
        }
    });
    let mut undisturbed = undisturbed();
    for (request, course) in all(runs).await {
        println!("{}: {:?}", request.request_id, course.moves);
        assert_eq!(wrong(&mut undisturbed, &request, &course), None, "{}", request.request_id);
        assert!(!course.moves.is_empty(), "{}", request.request_id);
    }
    world.all_free(FREED).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_side_dies_in_whichever_phase_the_session_goes_on() {
    let mut undisturbed = undisturbed();
    for moment in [Moment::Preparing, Moment::Ready, Moment::Committed, Moment::Moved] {
        for side in [Side::Source, Side::Target] {
            let world = World::start(&WorldSpec::new(&[1, 2, 1])).unwrap();
            let name = format!("{side:?}-dies-{moment:?}");
            let request = request(&name, 150, 300, sampled());
            let mut trouble = Trouble { dies: Some((moment, side)), ..Trouble::default() };
            if (moment, side) == (Moment::Moved, Side::Target) {
                // Then it is the owner of an idle session, which is replayed.
                trouble = Trouble { presumed_lost: Some(100), ..Trouble::default() };
            }
            let orders = [order(5, 1, Mode::Split)];
            let course = Relay::attach(&world).run(&request, 0, &orders, trouble).await.unwrap();
            println!("{name}: {:?}, {} strays", course.moves, course.strays);
            assert_eq!(wrong(&mut undisturbed, &request, &course), None, "{name}");
            let is_moved = course.moves.iter().any(|(_, result)| result.is_ok());
            // Before the target is ready nothing can be saved but by going on or beginning anew; after it, the source is
            // needed no more, and its latents are computed again.
            let expected = match (moment, side) {
                (Moment::Preparing, _) | (Moment::Ready | Moment::Committed, Side::Target) => false,
                (Moment::Ready | Moment::Committed, Side::Source) | (Moment::Moved, _) => true,
            };
            assert_eq!(is_moved, expected, "{name}: {:?}", course.moves);
            world.all_free(FREED).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_released_slot_is_poison() {
    let world = World::start(&WorldSpec::new(&[1, 2])).unwrap();
    let request = request("poison", 100, 300, sampled());
    let course = Relay::attach(&world).run(&request, 0, &there_and_back(), Trouble::default()).await.unwrap();
    assert_eq!(wrong(&mut undisturbed(), &request, &course), None);
    let made = course.moves.iter().filter(|(_, result)| result.is_ok()).count();
    assert_eq!(made, 3, "{:?}", course.moves);
    world.all_free(FREED).await.unwrap();
    let counts: Vec<(usize, usize)> = world.members.iter().map(|member| member.poisoned.counts()).collect();
    // Two sessions left the first replica and one the second, each of them with a slot at least.
    assert!(counts[0].0 >= 2 && counts[1].0 >= 1, "{counts:?}");
    assert!(counts.iter().all(|(_, readable)| *readable == 0), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_router_dies_between_ready_and_start_both_sides_park_and_let_go() {
    let spec = WorldSpec {
        silence: Duration::from_millis(500),
        grace: Duration::from_millis(1500),
        ..WorldSpec::new(&[1, 2])
    };
    let world = World::start(&spec).unwrap();
    let request = request("orphan", 150, 200, sampled());
    let dies = Trouble { dies_when_ready: true, ..Trouble::default() };
    let course = Relay::attach(&world).run(&request, 0, &[order(5, 1, Mode::Split)], dies).await.unwrap();
    assert_eq!(course.broken, Vec::<String>::new());
    let completion = |member: usize| world.members[member].engine.load().steps;
    let before = (completion(0), completion(1));
    // Held on both sides, stepped on neither.
    for member in &world.members {
        let load = member.engine.load();
        assert!(load.slots_free < load.slots_total, "{}: {load:?}", member.name);
    }
    world.all_free(FREED).await.unwrap();
    assert_eq!((completion(0), completion(1)), before, "nobody ran it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asking_costs_what_the_formula_says() {
    let mut undisturbed = undisturbed();
    for degrees in [[1, 1], [1, 2], [2, 4]] {
        let world = World::start(&WorldSpec::new(&degrees)).unwrap();
        let mut relay = Relay::attach(&world);
        for length in [130, 600] {
            let before = world.members[1].asked.totals();
            let request = request(&format!("asks-{length}"), length, 300, sampled());
            let course = relay.run(&request, 0, &[order(5, 1, Mode::Split)], Trouble::default()).await.unwrap();
            assert_eq!(wrong(&mut undisturbed, &request, &course), None);
            let after = world.members[1].asked.totals();
            let (queries, answers, tokens) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
            // Each token of the second epoch is drawn in a step that asks.
            let there = course.epochs.iter().filter(|epoch| **epoch > 1).count() as u64;
            assert_eq!(tokens, there, "{degrees:?}, {length} positions");
            assert!(tokens > 10, "{degrees:?}, {length} positions: {tokens} tokens");
            let each = attention_bytes(&world.shape, DType::Fp32, 1);
            assert_eq!(queries + answers, tokens * each, "{degrees:?}, {length} positions");
        }
    }
}

/// All of them at once, in order.
async fn all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut open: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in open.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(context) {
                *output = Some(value);
            }
        }
        if open.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    open.into_iter().filter_map(|(_, output)| output).collect()
}
