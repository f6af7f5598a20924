//! Sessions whose older latents are at one home or two: what they compute is what an undisturbed run computes, for any
//! number of ranks on either side, token by token and in chunks.

use std::sync::{Arc, Barrier};

use perigee_engine::executor::StepPlan;
use perigee_engine::remote::RemotePlan;

use crate::group::{Fed, Group, Options, distance, feed, spans, text};
use crate::network::{Network, kept, remote_plan, remote_row};

/// Positions of the session before it moved; three pages of them are full.
const CONTEXT: u32 = 200;

/// The undisturbed run: logits of positions `CONTEXT..300`.
fn undisturbed() -> Vec<Vec<f32>> {
    let mut group = Group::new(1);
    group.begin(0, &[0, 1, 2, 3, 4], &text(3, 0..CONTEXT));
    group.step(&feed(&[Fed::local(0, &[0, 1, 2, 3, 4], CONTEXT.into(), &text(3, CONTEXT..300))])).1
}

/// A replica that computed the session's context into slot 0 and these pages.
fn home(tp: usize, pages: &[u32]) -> Group {
    let mut group = Group::new(tp);
    group.begin(0, pages, &text(3, 0..CONTEXT));
    group
}

/// Brings the session from `home` (pages 5, 6, 7, 8) to slot 1 and page 2 of `owner`, full pages left out.
fn arrive(owner: &mut Group, home: &mut Group) {
    owner.take_state(home, 0, 1);
    owner.take_pages(home, &spans(&[8], 192, CONTEXT.into()), &[2]);
}

/// Feeds tokens from `position` on, reading one slot and writing the other.
fn fed(slots: (u32, u32), position: u32, tokens: &[u32], remote: &RemotePlan) -> StepPlan {
    let fed = Fed { slots, local: (192, &[2, 9, 4]), position: position.into(), tokens };
    StepPlan { remote: remote.clone(), ..feed(&[fed]) }
}

#[test]
fn a_moved_session_decodes_as_if_it_had_stayed() {
    let expected = undisturbed();
    let network = Network::default();
    let client = |rank| network.client(rank);
    let mut homes = [1, 2, 4].map(|tp| home(tp, &[5, 6, 7, 8]));
    let mut owners = [1, 2, 4].map(|tp| Group::open(&Options { tp, client: &client, ..Options::default() }));
    for home in &mut homes {
        let name = home.ranks.size().to_string();
        network.join(&name, home).publish("s", kept(&[(0, &[5, 6, 7])]), 2);
        let plan = remote_plan(&[&name], vec![remote_row(0, "s", &[(0, 0, 3)])]);
        for owner in &mut owners {
            arrive(owner, home);
            let mut slots = (1, 3);
            for (position, expected) in (CONTEXT..206).zip(&expected) {
                let token = text(3, position..position + 1);
                let (output, logits) = owner.step(&fed(slots, position, &token, &plan));
                assert_eq!((output.faulty, output.refusals), (vec![], vec![]));
                let off = distance(&logits[0], expected);
                assert!(off < 1e-5, "position {position} of {} ranks at {name}: {off}", owner.ranks.size());
                slots = (slots.1, slots.0);
            }
        }
    }
}

#[test]
fn latents_may_lie_on_two_homes_in_pieces() {
    let expected = undisturbed();
    let network = Network::default();
    let client = |rank| network.client(rank);
    let (mut a, b) = (home(2, &[5, 6, 7, 8]), home(1, &[3, 2, 1, 0]));
    network.join("a", &a).publish("s", kept(&[(0, &[5]), (2, &[7])]), 1);
    network.join("b", &b).publish("s", kept(&[(1, &[2])]), 1);
    let plan = remote_plan(&["a", "b"], vec![remote_row(0, "s", &[(0, 0, 1), (1, 1, 1), (0, 2, 1)])]);
    for tp in [1, 2, 4] {
        let mut owner = Group::open(&Options { tp, client: &client, ..Options::default() });
        arrive(&mut owner, &mut a);
        let (output, logits) = owner.step(&fed((1, 3), CONTEXT, &text(3, CONTEXT..201), &plan));
        assert!(output.faulty.is_empty());
        assert!(distance(&logits[0], &expected[0]) < 1e-5);
        // Ranks times layers times homes.
        assert_eq!(network.traffic().questions.len(), tp * 2 * 2);
    }
}

/// A chunk of 92 positions asks in two blocks; its later queries also see its earlier keys.
#[test]
fn a_chunk_asks_in_blocks() {
    let expected = undisturbed();
    let network = Network::default();
    let client = |rank| network.client(rank);
    let mut a = home(1, &[5, 6, 7, 8]);
    network.join("a", &a).publish("s", kept(&[(0, &[5, 6, 7])]), 2);
    let plan = remote_plan(&["a"], vec![remote_row(0, "s", &[(0, 0, 3)])]);
    for tp in [1, 2] {
        let mut owner = Group::open(&Options { tp, client: &client, ..Options::default() });
        arrive(&mut owner, &mut a);
        let (output, logits) = owner.step(&fed((1, 3), CONTEXT, &text(3, CONTEXT..292), &plan));
        assert!(output.faulty.is_empty());
        assert_eq!(network.traffic().questions.len(), tp * 2 * 2, "two blocks in each layer");
        for (found, expected) in logits.iter().zip(&expected) {
            assert!(distance(found, expected) < 1e-5, "{}", distance(found, expected));
        }
    }
}

/// Many sessions of one home share a question, beside a session that asks nobody.
#[test]
fn sessions_of_a_home_share_its_questions() {
    let expected = undisturbed();
    let network = Network::default();
    let client = |rank| network.client(rank);
    let mut a = home(1, &[5, 6, 7, 8]);
    let directory = network.join("a", &a);
    directory.publish("s", kept(&[(0, &[5, 6, 7])]), 2);
    directory.publish("t", kept(&[(0, &[5, 6, 7])]), 2);
    let mut owner = Group::open(&Options { tp: 2, client: &client, ..Options::default() });
    owner.begin(0, &[0], &text(8, 0..10));
    let local = Group::new(1).begin(0, &[0], &text(8, 0..11)).pop().unwrap();
    arrive(&mut owner, &mut a);
    owner.take_pages(&mut a, &spans(&[8], 192, CONTEXT.into()), &[3]);
    let token = text(3, CONTEXT..201);
    let row = |page: &'static [u32], write| Fed {
        slots: (1, write),
        local: (192, page),
        position: CONTEXT.into(),
        tokens: &token,
    };
    let last = text(8, 10..11);
    let rows = [row(&[2], 3), Fed::local(0, &[0], 10, &last), row(&[3], 4)];
    let remote = vec![remote_row(0, "s", &[(0, 0, 3)]), remote_row(2, "t", &[(0, 0, 3)])];
    let (output, logits) = owner.step(&StepPlan { remote: remote_plan(&["a"], remote), ..feed(&rows) });
    assert!(output.faulty.is_empty());
    assert_eq!(network.traffic().questions.len(), 2 * 2, "one for each rank and layer");
    for (found, expected) in logits.iter().zip([&expected[0], &local, &expected[0]]) {
        assert!(distance(found, expected) < 1e-5, "{}", distance(found, expected));
    }
    let mut asked = directory.asked();
    asked.sort();
    assert_eq!(asked, [("s".to_owned(), 2), ("t".to_owned(), 2)]);
    assert_eq!(directory.asked(), []);
}

/// Two replicas that hold latents for each other, both in the middle of a step: neither waits for the other's step.
#[test]
fn replicas_in_a_step_answer_each_other() {
    let expected = undisturbed();
    let network = Network::default();
    let both = Arc::new(Barrier::new(2));
    let meeting: Arc<dyn Fn(usize) + Send + Sync> = Arc::new(move |_| {
        both.wait();
    });
    let client = |rank| network.meeting_client(rank, Some(Arc::clone(&meeting)));
    let make = |name: &str| {
        let mut group = Group::open(&Options { client: &client, ..Options::default() });
        group.begin(0, &[5, 6, 7, 8], &text(3, 0..CONTEXT));
        network.join(name, &group).publish("s", kept(&[(0, &[5, 6, 7])]), 2);
        group
    };
    let (mut a, mut b) = (make("a"), make("b"));
    let mut origin = home(1, &[5, 6, 7, 8]);
    arrive(&mut a, &mut origin);
    arrive(&mut b, &mut origin);
    let step = |group: &mut Group, home: &str| {
        let plan = remote_plan(&[home], vec![remote_row(0, "s", &[(0, 0, 3)])]);
        group.step(&fed((1, 3), CONTEXT, &text(3, CONTEXT..201), &plan))
    };
    let results = std::thread::scope(|scope| {
        let at_a = scope.spawn(|| step(&mut a, "b"));
        let at_b = scope.spawn(|| step(&mut b, "a"));
        [at_a.join().unwrap(), at_b.join().unwrap()]
    });
    for (output, logits) in results {
        assert!(output.faulty.is_empty());
        assert!(distance(&logits[0], &expected[0]) < 1e-5);
    }
}
