//! Homes that say why they do not answer, and plans that no step takes.

use perigee_engine::executor::{Executor, StepPlan};
use perigee_engine::homes::HomeDirectory;
use perigee_engine::remote::{RemotePlan, RemoteRow};
use perigee_migration::AnswerStatus;

use crate::group::{Fed, Group, Options, feed, spans, text};
use crate::network::{Network, kept, remote_plan, remote_row};

/// A session with three pages at `a` and a few positions here.
struct Scene {
    directory: HomeDirectory,
    owner: Group,
    _home: Group,
}

impl Scene {
    fn new(tp: usize) -> Self {
        let network = Network::default();
        let mut home = Group::new(1);
        home.begin(0, &[4, 5, 6, 7], &text(3, 0..200));
        let directory = network.join("a", &home);
        let mut owner = Group::open(&Options { tp, client: &|rank| network.client(rank), ..Options::default() });
        owner.take_state(&mut home, 0, 0);
        owner.take_pages(&mut home, &spans(&[7], 192, 200), &[0]);
        Self { directory, owner, _home: home }
    }

    fn plan(remote: RemotePlan) -> StepPlan {
        StepPlan { remote, ..feed(&[Fed { slots: (0, 1), local: (192, &[0]), position: 200, tokens: &[17] }]) }
    }

    /// What the home says of the session in an epoch.
    fn ask(&mut self, epoch: u64) -> Option<AnswerStatus> {
        let row = RemoteRow { epoch, ..remote_row(0, "s", &[(0, 0, 3)]) };
        let output = self.owner.step(&Self::plan(remote_plan(&["a"], vec![row]))).0;
        assert_eq!(output.faulty.is_empty(), output.refusals.is_empty());
        output.refusals.first().map(|(row, status)| {
            assert_eq!((*row, output.faulty.as_slice(), output.refusals.len()), (0, &[0][..], 1));
            *status
        })
    }
}

#[test]
fn a_home_says_why_it_does_not_answer() {
    for tp in [1, 4] {
        let mut scene = Scene::new(tp);
        assert_eq!(scene.ask(2), Some(AnswerStatus::Unknown), "never published");
        scene.directory.publish("s", kept(&[(0, &[4, 5])]), 2);
        assert_eq!(scene.ask(2), Some(AnswerStatus::Missing), "not all of it");
        scene.directory.publish("s", kept(&[(0, &[4, 5, 6])]), 2);
        assert_eq!(scene.ask(1), Some(AnswerStatus::Stale), "earlier than the first");
        assert_eq!(scene.ask(2), None);
        assert_eq!(scene.ask(5), None);
        assert_eq!(scene.ask(4), Some(AnswerStatus::Stale), "a later owner has asked");
        assert_eq!(scene.directory.asked(), [("s".to_owned(), 5)]);
        scene.directory.withdraw("s");
        assert_eq!(scene.ask(5), Some(AnswerStatus::Unknown), "withdrawn");
        assert!(scene.directory.is_empty());
    }
}

#[test]
fn plans_that_contradict_themselves_are_refused() {
    let mut scene = Scene::new(2);
    scene.directory.publish("s", kept(&[(0, &[4, 5, 6])]), 2);
    let one = |parts: &[(u32, u64, u64)]| remote_plan(&["a"], vec![remote_row(0, "s", parts)]);
    let mut in_place = Scene::plan(one(&[(0, 0, 3)]));
    in_place.batch.rows[0].write_slot = 0;
    let twice = RemotePlan { rows: vec![remote_row(0, "s", &[(0, 0, 3)]); 2], ..one(&[]) };
    let mut repeated = one(&[(0, 0, 3)]);
    let part = repeated.rows[0].parts[0].clone();
    repeated.rows[0].parts.push(part);
    let mut odd = one(&[(0, 0, 3)]);
    odd.rows[0].parts[0].ranges = vec![0..100, 100..192];
    for (plan, why) in [
        (in_place, "writes the slot 0 that it reads"),
        (Scene::plan(twice), "must ascend"),
        (Scene::plan(repeated), "its homes are [0, 0] of 1"),
        (Scene::plan(one(&[(1, 0, 3)])), "its homes are [1] of 1"),
        (Scene::plan(one(&[])), "its homes are [] of 1"),
        (Scene::plan(odd), "no full pages"),
        (Scene::plan(one(&[(0, 0, 4)])), "no full pages"),
        (Scene::plan(one(&[(0, 0, 2)])), "position 128 is in no place"),
        (Scene::plan(one(&[(0, 0, 2), (0, 1, 2)])), "ranges must ascend"),
        (Scene::plan(one(&[(0, 1, 2), (0, 0, 1)])), "ranges must ascend"),
        (Scene::plan(remote_plan(&["a"], vec![remote_row(1, "s", &[(0, 0, 3)])])), "out of range"),
    ] {
        let error = scene.owner.ranks.step(&plan, &[], false).unwrap_err();
        assert!(error.message.contains(why) && !error.fatal, "{error}, expected: {why}");
    }
    assert_eq!(scene.ask(2), None, "nothing broke");
}
