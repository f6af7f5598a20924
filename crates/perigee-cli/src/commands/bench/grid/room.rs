//! Whether the replicas run a batch as a whole. No session of it ends before all have drawn, so one that waits for a slot or for pages
//! while all that run draw already waits for as long as these can go on: hours, where sessions may be long.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use perigee_proto::v1::cluster_client::ClusterClient;
use perigee_proto::v1::{ListReplicasRequest, ListReplicasResponse, ReplicaInfo};
use tonic::Status;
use tonic::transport::Channel;

/// Time between two sights; a replica tells its load a little more often.
const EVERY: Duration = Duration::from_millis(500);
/// Sights in a row in which nothing but tokens came, after which nothing else is going to: the loads of the last one are those of a
/// later time than the first one's tokens.
const SIGHTS: usize = 6;

/// How far the sessions of a batch are, told by their streams.
#[derive(Debug)]
pub(super) struct Progress {
    batch: usize,
    waiting: AtomicUsize,
    tokens: AtomicUsize,
}

impl Progress {
    /// Of a batch of which no session has drawn.
    pub(super) fn new(batch: usize) -> Self {
        Self { batch, waiting: AtomicUsize::new(batch), tokens: AtomicUsize::new(0) }
    }

    /// A session's token came, its first or another; how many sessions had none before it.
    pub(super) fn drew(&self, is_first: bool) -> usize {
        self.tokens.fetch_add(1, Ordering::Relaxed);
        if is_first { self.waiting.fetch_sub(1, Ordering::Relaxed) } else { self.waiting.load(Ordering::Relaxed) }
    }
}

/// A batch and the replicas at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sight {
    /// Sessions of the batch, those that have drawn, and the tokens of all.
    batch: usize,
    drawing: usize,
    tokens: usize,
    /// Sessions that have slots and those that wait for one, by the replicas' loads.
    running: u64,
    waiting: u64,
}

impl Sight {
    fn new(progress: &Progress, replicas: &ListReplicasResponse) -> Self {
        let sum = |count: fn(&ReplicaInfo) -> u32| {
            replicas.replicas.iter().filter(|replica| replica.status == "ready").map(count).map(u64::from).sum()
        };
        Self {
            batch: progress.batch,
            drawing: progress.batch - progress.waiting.load(Ordering::Relaxed).min(progress.batch),
            tokens: progress.tokens.load(Ordering::Relaxed),
            running: sum(|replica| replica.running),
            waiting: sum(|replica| replica.waiting),
        }
    }

    /// Whether sessions wait though no prompt is under way.
    fn lacks_room(&self) -> bool {
        self.waiting > 0 && self.drawing < self.batch && self.running <= self.drawing as u64
    }

    /// Whether steps were done since an earlier sight, and changed nothing else.
    fn goes_on(&self, earlier: &Self) -> bool {
        self.tokens > earlier.tokens && Self { tokens: earlier.tokens, ..*self } == *earlier
    }
}

/// Sights that all lack room, one going on from another.
#[derive(Debug, Default)]
struct Sights {
    last: Option<Sight>,
    count: usize,
}

impl Sights {
    /// One more; whether it is certain that the rest of the batch gets no room.
    fn see(&mut self, sight: Sight) -> bool {
        let goes_on = self.last.is_some_and(|last| sight.goes_on(&last));
        self.count = if !sight.lacks_room() {
            0
        } else if goes_on {
            self.count + 1
        } else {
            1
        };
        self.last = Some(sight);
        self.count >= SIGHTS
    }
}

/// Ends once it is certain that the batch never runs as a whole, and says what would do; otherwise it does not end. That needs the
/// right to list replicas; without it, a line on standard error says that nothing is watched.
pub(super) async fn lacking(mut cluster: ClusterClient<Channel>, progress: &Progress) -> anyhow::Error {
    let mut sights = Sights::default();
    loop {
        tokio::time::sleep(EVERY).await;
        let replicas = match cluster.list_replicas(ListReplicasRequest {}).await {
            Ok(replicas) => replicas.into_inner(),
            Err(status) => return unwatched(&status).await,
        };
        let sight = Sight::new(progress, &replicas);
        if sights.see(sight) {
            return anyhow!(told(&sight, &replicas));
        }
    }
}

async fn unwatched(status: &Status) -> anyhow::Error {
    eprintln!(
        "whether the replicas run each batch as a whole is not watched: {:?}: {}",
        status.code(),
        status.message()
    );
    std::future::pending().await
}

fn told(sight: &Sight, replicas: &ListReplicasResponse) -> String {
    let Sight { batch, running, waiting, .. } = sight;
    let free: Vec<String> = replicas.replicas.iter().map(|replica| {
        let ReplicaInfo { replica, slots_free, slots_total, pages_free, pages_total, .. } = replica;
        format!("{replica} has {slots_free} of {slots_total} state slots and {pages_free} of {pages_total} latent pages free")
    }).collect();
    format!(
        "of {batch} sessions {running} run and {waiting} wait for room, which none of the others leaves; to run them at once, one replica \
         needs --max-batch {batch}, --state-slots {batch}, --token-budget {} and enough --latent-pages; {}",
        (4 * batch).div_ceil(3),
        free.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a batch of 256: 64 draw, the others wait.
    const STUCK: Sight = Sight { batch: 256, drawing: 64, tokens: 0, running: 64, waiting: 192 };

    /// How many sights it takes until one is final, at most ten; `at` gives the next by its number.
    fn final_after(at: impl Fn(usize) -> Sight) -> Option<usize> {
        let mut sights = Sights::default();
        (1..=10).find(|&number| sights.see(at(number)))
    }

    #[test]
    fn sessions_that_wait_while_all_that_run_draw_are_told() {
        assert_eq!(final_after(|number| Sight { tokens: number, ..STUCK }), Some(SIGHTS));
        let one_was_preempted = |number| Sight { tokens: number, running: 63, waiting: 193, ..STUCK };
        assert_eq!(final_after(one_was_preempted), Some(SIGHTS));
        let after_a_prompt = |number| Sight { tokens: number, drawing: 63 + usize::from(number > 2), ..STUCK };
        assert_eq!(final_after(after_a_prompt), Some(2 + SIGHTS));
    }

    #[test]
    fn a_batch_that_gets_on_is_left_alone() {
        for (what, sight) in [
            ("prompts are under way", Sight { running: 80, waiting: 176, ..STUCK }),
            ("nothing waits: requests are on their way", Sight { waiting: 0, ..STUCK }),
            ("all have drawn, one was preempted", Sight { drawing: 256, running: 255, waiting: 1, ..STUCK }),
        ] {
            assert_eq!(final_after(|number| Sight { tokens: number, ..sight }), None, "{what}");
        }
        assert_eq!(final_after(|_| STUCK), None, "no step is done");
        let first_tokens = |number| {
            let drawing = 64 + number;
            Sight { tokens: number, drawing, running: drawing as u64, waiting: 192 - number as u64, ..STUCK }
        };
        assert_eq!(final_after(first_tokens), None, "first tokens come");
    }

    #[test]
    fn loads_of_ready_replicas_are_added_up() {
        let replica = |name: &str, status: &str| ReplicaInfo {
            replica: name.into(),
            status: status.into(),
            running: 2,
            waiting: 3,
            slots_free: 5,
            slots_total: 7,
            pages_free: 11,
            pages_total: 13,
            ..ReplicaInfo::default()
        };
        let replicas =
            ListReplicasResponse { replicas: vec![replica("a", "ready"), replica("b", "ready"), replica("c", "gone")] };
        let progress = Progress::new(10);
        assert_eq!([progress.drew(true), progress.drew(false), progress.drew(true)], [10, 9, 9]);
        let sight = Sight::new(&progress, &replicas);
        assert_eq!(sight, Sight { batch: 10, drawing: 2, tokens: 3, running: 4, waiting: 6 });
        let told = told(&sight, &replicas);
        for part in
            ["of 10 sessions 4 run and 6 wait", "--token-budget 14", "a has 5 of 7 state slots and 11 of 13 latent"]
        {
            assert!(told.contains(part), "{part}: {told}");
        }
    }
}
