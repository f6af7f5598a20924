//! Homes that do not answer: exactly their rows are faulty, everybody else's numbers are the same bits, and the step waits
//! once.

use std::time::{Duration, Instant};

use perigee_engine::executor::{Executor, StateSource, StepPlan};
use perigee_engine::remote::RemotePlan;

use crate::group::{Fed, Group, Options, feed, spans, text};
use crate::network::{Conduct, Network, kept, remote_plan, remote_row};

/// An owner of three sessions: row 0 is local, row 1 asks `a`, row 2 asks `b`, each with one page there.
struct Scene {
    network: Network,
    owner: Group,
    // They answer as long as they live.
    _homes: [Group; 2],
}

impl Scene {
    fn new(tp: usize) -> Self {
        let network = Network::default();
        let mut homes = [1, 2].map(Group::new);
        let mut owner = Group::open(&Options { tp, client: &|rank| network.client(rank), ..Options::default() });
        owner.begin(0, &[0], &text(8, 0..10));
        for ((home, name), (slot, page)) in homes.iter_mut().zip(["a", "b"]).zip([(1, 1), (2, 2)]) {
            home.begin(0, &[4, 9], &text(3, 0..70));
            network.join(name, home).publish("s", kept(&[(0, &[4])]), 2);
            owner.take_state(home, 0, slot);
            owner.take_pages(home, &spans(&[9], 64, 70), &[page]);
        }
        Self { network, owner, _homes: homes }
    }

    fn remote() -> RemotePlan {
        remote_plan(&["a", "b"], vec![remote_row(1, "s", &[(0, 0, 1)]), remote_row(2, "s", &[(1, 0, 1)])])
    }

    /// One token of every session; all rows write to other slots, so the step can be repeated.
    fn plan(remote: RemotePlan) -> StepPlan {
        let row = |slot: u32, local, position| Fed { slots: (slot, slot + 3), local, position, tokens: &[17] };
        let rows = [row(0, (0, &[0][..]), 10), row(1, (64, &[1]), 70), row(2, (64, &[2]), 70)];
        StepPlan { remote, ..feed(&rows) }
    }
}

#[test]
fn a_home_that_is_gone_faults_its_rows_only() {
    for tp in [1, 2, 4] {
        let mut scene = Scene::new(tp);
        let (whole, expected) = scene.owner.step(&Scene::plan(Scene::remote()));
        assert_eq!((whole.faulty, whole.refusals), (vec![], vec![]));
        let before = scene.owner.ranks.digest_slot(1).unwrap();
        let written = scene.owner.ranks.export_slot(StateSource::Slot(3)).unwrap();
        for conduct in [Conduct::Gone, Conduct::Overdue, Conduct::Damages] {
            scene.network.set("a", conduct);
            let (output, logits) = scene.owner.step(&Scene::plan(Scene::remote()));
            assert_eq!((output.faulty, output.refusals), (vec![1], vec![]), "{conduct:?} for {tp} ranks");
            assert_eq!((&logits[0], &logits[2]), (&expected[0], &expected[2]), "the same bits without {conduct:?}");
            assert_ne!(logits[1], expected[1]);
            assert_eq!(scene.owner.ranks.export_slot(StateSource::Slot(3)).unwrap(), written);
        }
        assert_eq!(scene.owner.ranks.digest_slot(1).unwrap(), before, "what the row read is as it was");
        scene.network.set("a", Conduct::Answers);
        let (output, logits) = scene.owner.step(&Scene::plan(Scene::remote()));
        assert_eq!((output.faulty, logits), (vec![], expected), "the step can be repeated");
    }
}

#[test]
fn an_overdue_home_is_not_asked() {
    let mut scene = Scene::new(2);
    scene.network.set("b", Conduct::Overdue);
    assert_eq!(scene.owner.step(&Scene::plan(Scene::remote())).0.faulty, [2]);
    let traffic = scene.network.traffic();
    assert_eq!(traffic.questions.len(), 4, "two ranks, two layers");
    assert!(traffic.questions.iter().all(|(_, home)| home == "a"));
}

#[test]
fn a_home_that_was_missed_is_not_asked_again_in_the_step() {
    let mut scene = Scene::new(1);
    scene.network.set("a", Conduct::Gone);
    scene.owner.step(&Scene::plan(Scene::remote()));
    let homes: Vec<String> = scene.network.traffic().questions.into_iter().map(|(_, home)| home).collect();
    assert_eq!(homes, ["a", "b", "b"]);
    scene.network.set("b", Conduct::Gone);
    let output = scene.owner.step(&Scene::plan(Scene::remote())).0;
    assert_eq!(output.faulty, [1, 2]);
    assert_eq!(scene.network.traffic().patience.len(), 1, "nothing is left to ask in the second layer");
}

#[test]
fn a_step_waits_for_one_deadline() {
    // Longer than a busy machine lets this thread stand still before the first wait.
    const PATIENCE: Duration = Duration::from_millis(1000);
    let mut scene = Scene::new(1);
    let plan = RemotePlan { patience_ms: PATIENCE.as_millis() as u32, ..Scene::remote() };
    // `a` falls silent in the first layer; `b` answers in the first and not in the second.
    scene.network.set("a", Conduct::SilentAfter(0));
    scene.network.set("b", Conduct::SilentAfter(1));
    let began = Instant::now();
    let (output, logits) = scene.owner.step(&Scene::plan(plan));
    assert!(began.elapsed() >= PATIENCE);
    assert_eq!((output.faulty, output.refusals), (vec![1, 2], vec![]));
    assert!(output.remote.wait >= PATIENCE);
    let patience: Vec<Duration> = scene.network.traffic().patience.into_iter().map(|(_, patience)| patience).collect();
    assert_eq!(patience.len(), 2);
    assert!(patience[0] > Duration::ZERO && patience[0] <= PATIENCE);
    assert_eq!(patience[1], Duration::ZERO, "the wait of the first layer was all there is");
    assert!(logits.iter().flatten().all(|value| value.is_finite()));
}

#[test]
fn without_a_client_every_remote_row_is_faulty() {
    let mut group = Group::new(2);
    group.begin(0, &[0], &text(3, 0..64));
    let row = Fed { slots: (0, 1), local: (64, &[1]), position: 64, tokens: &[5] };
    let plan = remote_plan(&["a"], vec![remote_row(0, "s", &[(0, 0, 1)])]);
    assert_eq!(group.step(&StepPlan { remote: plan, ..feed(&[row]) }).0.faulty, [0]);
}
