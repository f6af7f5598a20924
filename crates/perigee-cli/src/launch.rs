//! Starts the worker processes of one replica as children of this process and listens to what the leader reports. The
//! children end when this process does, and all end when one fails.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use perigee_worker::EngineOptions;
use perigee_worker::events::WorkerEvent;

use crate::settings;

/// How long the ranks of a failed replica are given to end, to see which one began.
const FOLLOWING_ENDS: Duration = Duration::from_millis(100);

/// A replica to start.
pub(crate) struct ReplicaLaunch {
    /// Its name.
    pub(crate) replica: String,
    /// Ranks.
    pub(crate) tp: usize,
    /// What they run.
    pub(crate) engine: EngineOptions,
    /// Further arguments of every rank.
    pub(crate) arguments: Vec<String>,
    /// Further arguments of rank 0.
    pub(crate) leader_arguments: Vec<String>,
}

/// What a child did.
enum Notice {
    Event(WorkerEvent),
    /// Standard output ended: the process of this rank is going.
    Ended(usize),
}

/// The running processes of a replica.
pub(crate) struct ReplicaProcesses {
    replica: String,
    children: Vec<Child>,
    /// Standard inputs of the children, which take their end for the parent's. Kept apart, because waiting for a child
    /// closes the one that it has, and would cut off what it still has to do.
    lifelines: Vec<ChildStdin>,
    notices: Receiver<Notice>,
}

impl ReplicaProcesses {
    /// Starts the leader, learns where it listens, then starts the other ranks.
    pub(crate) fn start(launch: &ReplicaLaunch) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's file")?;
        let (sender, notices) = channel();
        let mut processes =
            Self { replica: launch.replica.clone(), children: Vec::new(), lifelines: Vec::new(), notices };
        let spawn = |rank: usize, more: &[String]| -> anyhow::Result<Child> {
            let mut command = Command::new(&program);
            // Children are told all by their arguments: what is set for workers that are started by hand is not for them.
            for (name, _) in settings::variables() {
                if name == settings::CONFIG_VARIABLE || name.starts_with(&settings::environment::variable("worker", ""))
                {
                    command.env_remove(name);
                }
            }
            let mut child = command
                .arg("worker")
                .arg("--supervised")
                .arg(format!("--replica={}", launch.replica))
                .arg(format!("--rank={rank}"))
                .arg(format!("--tp={}", launch.tp))
                .args(launch.engine.to_arguments())
                .args(&launch.arguments)
                .args(more)
                // Ctrl-C in a terminal goes to the whole group. It is for the parent, which lets what runs end first.
                .process_group(0)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| format!("starting rank {rank} of {}", launch.replica))?;
            if let Some(output) = child.stdout.take() {
                listen(rank, output, sender.clone())?;
            }
            Ok(child)
        };
        processes.take(spawn(0, &launch.leader_arguments)?);
        if launch.tp > 1 {
            let event = processes.next_event()?;
            let WorkerEvent::Rendezvous { leader } = event else {
                bail!("{} reported {event:?} before it had ranks", launch.replica);
            };
            for rank in 1..launch.tp {
                processes.take(spawn(rank, &[format!("--leader={leader}")])?);
            }
        }
        Ok(processes)
    }

    fn take(&mut self, mut child: Child) {
        self.lifelines.extend(child.stdin.take());
        self.children.push(child);
    }

    /// The next report of a worker; an error when a worker ends instead.
    pub(crate) fn next_event(&mut self) -> anyhow::Result<WorkerEvent> {
        loop {
            let rank = match self.notices.recv() {
                Ok(Notice::Event(event)) => return Ok(event),
                Ok(Notice::Ended(rank)) => rank,
                Err(_) => bail!("{} has no running rank", self.replica),
            };
            // A rank that the leader told to end may be seen before the leader's last report, which is on its way.
            if rank > 0 && self.status(rank)?.is_some_and(|status| status.success()) {
                continue;
            }
            let rank = self.culprit(rank)?;
            let status = self.status(rank)?;
            // One that was killed has said nothing.
            let above = status.and_then(|status| status.code()).map_or("", |_| "; its own message is above");
            let status = status.map_or_else(|| "never started".to_string(), |status| status.to_string());
            bail!("rank {rank} of {} ended early ({status}){above}", self.replica)
        }
    }

    /// Waits for a rank that is ending; none where it never started.
    fn status(&mut self, rank: usize) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.children.get_mut(rank).map(Child::wait).transpose()?)
    }

    /// The rank to name when `first` was seen to end: a rank that was killed takes the others with it, and these may be
    /// seen before it.
    fn culprit(&mut self, first: usize) -> anyhow::Result<usize> {
        let deadline = Instant::now() + FOLLOWING_ENDS;
        loop {
            let mut running = false;
            for (rank, child) in self.children.iter_mut().enumerate() {
                match child.try_wait()? {
                    // No exit code: a signal ended it.
                    Some(status) if status.code().is_none() => return Ok(rank),
                    Some(_) => {}
                    None => running = true,
                }
            }
            if !running || Instant::now() > deadline {
                return Ok(first);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until all ranks have ended well.
    pub(crate) fn wait(&mut self) -> anyhow::Result<()> {
        for (rank, child) in self.children.iter_mut().enumerate() {
            let status = child.wait().with_context(|| format!("waiting for rank {rank} of {}", self.replica))?;
            if !status.success() {
                bail!("rank {rank} of {} failed ({status}); its own message is above", self.replica);
            }
        }
        Ok(())
    }
}

impl Drop for ReplicaProcesses {
    fn drop(&mut self) {
        for child in &mut self.children {
            // One that has ended already needs neither.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Turns a child's output lines into notices, on a thread that ends with the child.
fn listen(rank: usize, output: std::process::ChildStdout, sender: Sender<Notice>) -> anyhow::Result<()> {
    let work = move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(event) => {
                    if sender.send(Notice::Event(event)).is_err() {
                        return;
                    }
                }
                // Not ours: pass it on to the person.
                Err(_) => eprintln!("{line}"),
            }
        }
        // Nobody listens once the parent has what it wanted.
        let _ = sender.send(Notice::Ended(rank));
    };
    std::thread::Builder::new().name(format!("perigee-rank-{rank}")).spawn(work).context("starting a reader")?;
    Ok(())
}
