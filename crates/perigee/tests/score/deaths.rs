//! Processes that die in the middle of a step: the step fails everywhere within a second or so, the message names the rank,
//! and no process stays behind, whichever of them was killed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use perigee_testkit::processes::{arguments, children, runs, ticks, wait_for};
use tempfile::TempDir;

use crate::binary::{Running, score};

const RANKS: usize = 4;
/// How long a loaded machine may take to start; nothing waits this long.
const START: Duration = Duration::from_secs(60);
/// All processes have to be gone within this after one died. On an idle machine they are within a fraction of a second,
/// which is printed; it is the load of a machine that decides how much longer it takes.
const END: Duration = Duration::from_secs(60);
/// Processor time, in hundredths of a second, that loading `tiny` cannot take: a rank that has used it is in the steps.
const BUSY_TICKS: u64 = 30;

/// A job of many thousand short steps, and the ids of its worker processes by rank.
struct Job {
    parent: Running,
    ranks: BTreeMap<usize, u32>,
    folder: TempDir,
}

impl Job {
    /// Starts it and waits until every rank is in the middle of it.
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let prompts = folder.path().join("prompts.safetensors");
        perigee_testkit::checkpoints::write_prompts(&prompts, 512, &[30_000]).unwrap();
        let mut command = score("random:tiny", &prompts, &folder.path().join("out.safetensors"));
        command.args(["--chunk=1", "--threads=1", &format!("--tp={RANKS}")]);
        let parent = Running::start(command, &folder.path().join("errors"));
        let pid = parent.child.id();
        let look = || {
            let found = children(pid).into_iter().filter_map(|pid| Some((rank_of(pid)?, pid)));
            Some(found.collect()).filter(|found: &BTreeMap<usize, u32>| found.len() == RANKS)
        };
        let (ranks, _) = wait_for("worker processes", START, look).unwrap();
        assert!(ranks.keys().copied().eq(0..RANKS), "{ranks:?}");
        for (rank, pid) in &ranks {
            let busy = || ticks(*pid).filter(|ticks| *ticks >= BUSY_TICKS);
            wait_for(&format!("steps on rank {rank}"), START, busy).unwrap();
        }
        Self { parent, ranks, folder }
    }

    fn errors(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("errors")).unwrap()
    }

    /// Waits for the end of every worker.
    fn workers_end(&self) -> Duration {
        let gone = || self.ranks.values().all(|pid| !runs(*pid)).then_some(());
        wait_for("the end of every worker", END, gone).unwrap_or_else(|error| panic!("{error}: {}", self.errors())).1
    }
}

/// The rank that a process is; none while it is still the copy of its parent that is about to become a worker.
fn rank_of(pid: u32) -> Option<usize> {
    arguments(pid).iter().find_map(|argument| argument.strip_prefix("--rank="))?.parse().ok()
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

/// Kills one rank; all processes end, the parent with exit code 1 and a message that names the rank.
fn rank_dies(rank: usize) {
    let mut job = Job::start();
    signal("KILL", job.ranks[&rank]);
    let parent = &mut job.parent.child;
    let ended = wait_for("the end of the parent", END, || parent.try_wait().unwrap());
    let (status, took) = ended.unwrap_or_else(|error| panic!("{error}: {}", job.errors()));
    job.workers_end();
    println!("ended {took:?} after the kill:\n{}", job.errors());
    assert_eq!(status.code(), Some(1), "{}", job.errors());
    assert!(job.errors().contains(&format!("rank {rank} of score ended early (signal: 9")), "{}", job.errors());
    assert!(!Path::new(&job.folder.path().join("out.safetensors")).exists(), "half a result was written");
}

#[test]
fn the_leader_dies() {
    rank_dies(0);
}

#[test]
fn a_follower_dies() {
    rank_dies(2);
}

/// The ranks notice by themselves: the parent, which would end them all, is asleep meanwhile.
#[test]
fn a_follower_dies_and_nobody_tells_the_others() {
    let mut job = Job::start();
    signal("STOP", job.parent.child.id());
    signal("KILL", job.ranks[&3]);
    let took = job.workers_end();
    signal("CONT", job.parent.child.id());
    let parent = &mut job.parent.child;
    let (status, _) = wait_for("the end of the parent", END, || parent.try_wait().unwrap()).unwrap();
    println!("ended {took:?} after the kill:\n{}", job.errors());
    assert_eq!(status.code(), Some(1), "{}", job.errors());
    assert!(job.errors().contains("rank 3: "), "no rank named the lost one: {}", job.errors());
}

#[test]
fn the_parent_dies() {
    let mut job = Job::start();
    signal("KILL", job.parent.child.id());
    job.parent.child.wait().unwrap();
    let took = job.workers_end();
    println!("ended {took:?} after the kill:\n{}", job.errors());
}
