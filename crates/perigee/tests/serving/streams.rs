//! The two heavy runs: 64 streams at once over two replicas of two ranks each, with room for all of them and with pages
//! for half. Every stream equals its solo run, and afterwards nothing is held.

use std::collections::BTreeMap;

use perigee_proto::v1::FinishReason;

use crate::answer::End;
use crate::cluster::{Arrivals, Outcome, equals_solo_runs, run};
use crate::judge::Judge;
use crate::up;
use crate::work::{Sizes, requests};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_streams_equal_their_solo_runs() {
    let sandbox = up(2, 2).start().unwrap();
    let sizes = Sizes { prompt: (1, 300), output: (1, 60), choices_one_in: 6, leaves_one_in: 6 };
    let work = requests(20, 112, sizes);
    let outcome = run(&sandbox, &work, Arrivals { first: 48, spread: 4, at_once: 64 }, 21).await;
    assert_eq!(outcome.peak, 64, "streams at once");
    let seen = summary(&outcome);
    for (what, least) in
        [("replica-0", 1), ("replica-1", 1), ("dropped", 5), ("finished", 50), ("Stop", 5), ("Length", 5)]
    {
        assert!(seen.get(what).is_some_and(|count| *count >= least), "too few {what}: {seen:?}");
    }
    let mut judge = Judge::new("random:tiny");
    equals_solo_runs(&sandbox, &work, &outcome, &mut judge).await;
    judge.verdict(112);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_were_preempted_equal_their_solo_runs() {
    const SLOTS: usize = 12;
    // A session ends with 300 + 200 positions at most and 6 pages in the mean; half of that for each slot.
    let sandbox = up(2, 2).option(format!("--state-slots={SLOTS}")).option("--latent-pages=24").start().unwrap();
    let sizes = Sizes { prompt: (1, 250), output: (120, 250), choices_one_in: 8, leaves_one_in: 8 };
    let work = requests(30, 48, sizes);
    let outcome = run(&sandbox, &work, Arrivals { first: 32, spread: 16, at_once: 40 }, 31).await;
    println!("{:?}", summary(&outcome));
    let mut preemptions = Vec::new();
    for replica in ["replica-0", "replica-1"] {
        preemptions.push(sandbox.replica_metric(replica, "perigee_preemptions_total").await.unwrap());
    }
    println!("{preemptions:?} preemptions");
    // How many there are on which replica depends on what went where.
    assert!(preemptions.iter().sum::<f64>() >= 4.0, "{preemptions:?}");
    let mut judge = Judge::new("random:tiny");
    equals_solo_runs(&sandbox, &work, &outcome, &mut judge).await;
    judge.verdict(48);
}

/// How many streams went where and ended how.
fn summary(outcome: &Outcome) -> BTreeMap<String, usize> {
    let mut seen = BTreeMap::new();
    for answer in &outcome.answers {
        let ended = match answer.end {
            End::Finished => "finished",
            End::Dropped => "dropped",
            End::Failed(_) => "failed",
        };
        let finishes = answer.choices.iter().filter_map(|choice| choice.finish);
        let finishes = finishes.map(|finish: FinishReason| format!("{finish:?}"));
        for what in [answer.replica.clone(), ended.to_owned()].into_iter().chain(finishes) {
            *seen.entry(what).or_default() += 1;
        }
    }
    seen
}
