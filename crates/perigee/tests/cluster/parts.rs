//! Processes of one cluster, started one by one, and what a router says of the replicas.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;

use perigee_testkit::etcd::Etcd;
use perigee_testkit::processes::signal;
use perigee_testkit::sandbox::{Clients, START, Started, eventually, free_port, router_address};
use perigee_tls::Dialer;
use tempfile::TempDir;

use crate::PATIENCE;

pub(crate) const MODEL: &str = "random:tiny@7";

/// The binary under test.
pub(crate) fn perigee() -> Command {
    Command::new(env!("CARGO_BIN_EXE_perigee"))
}

pub(crate) struct Cluster {
    pub(crate) etcd: Etcd,
    folder: TempDir,
    /// Who every process is.
    identity: Identity,
    /// How every process reaches etcd.
    etcd_options: Vec<String>,
    /// Processes so far, which names their files.
    started: usize,
}

/// What a process shows to others, and how a test reaches a router that shows it.
#[derive(Clone, Default)]
pub(crate) struct Identity {
    pub(crate) options: Vec<String>,
    pub(crate) dialer: Dialer,
}

/// Options of every worker: small, one thread each.
const WORKER: [&str; 4] = ["--threads=1", "--state-slots=16", "--token-budget=64", "--max-model-len=16384"];

/// The ranks of a replica, the leader first.
pub(crate) struct Replica {
    pub(crate) ranks: Vec<Started>,
}

pub(crate) struct Router {
    pub(crate) process: Started,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) clients: Clients,
}

impl Cluster {
    /// Only etcd so far; none where that is not installed.
    pub(crate) fn start() -> Option<Self> {
        Etcd::start().map(|etcd| Self::over(etcd, Identity::default(), Vec::new()))
    }

    pub(crate) fn over(etcd: Etcd, identity: Identity, etcd_options: Vec<String>) -> Self {
        Self { etcd, folder: tempfile::tempdir().unwrap(), identity, etcd_options, started: 0 }
    }

    fn spawn(&mut self, what: &str, identity: &Identity, mut command: Command) -> Started {
        self.started += 1;
        command.arg(self.etcd.registry()).args(&self.etcd_options).args(&identity.options);
        Started::spawn(&format!("{what} start {}", self.started), command, self.folder.path()).unwrap()
    }

    /// One rank.
    pub(crate) fn rank(&mut self, name: &str, rank: usize, tp: usize, meeting: SocketAddr, more: &[&str]) -> Started {
        let mut command = perigee();
        command.args(["worker", &format!("--replica={name}"), &format!("--rank={rank}"), &format!("--tp={tp}")]);
        command.arg(format!("--leader={meeting}")).args(WORKER);
        if !more.iter().any(|option| option.starts_with("--model")) {
            command.arg(format!("--model={MODEL}"));
        }
        command.args(more);
        let identity = self.identity.clone();
        self.spawn(&format!("{name} rank {rank}"), &identity, command)
    }

    /// All ranks of a replica.
    pub(crate) fn replica(&mut self, name: &str, tp: usize, more: &[&str]) -> Replica {
        let meeting = free_port().unwrap();
        let ranks = (0..tp).map(|rank| self.rank(name, rank, tp, meeting, more)).collect();
        Replica { ranks }
    }

    /// A router that already says where it listens.
    pub(crate) async fn router(&mut self) -> Router {
        let identity = self.identity.clone();
        self.router_as(&identity).await
    }

    /// The same as somebody else.
    pub(crate) async fn router_as(&mut self, identity: &Identity) -> Router {
        let mut command = perigee();
        command.args(["router", "--listen=127.0.0.1:0", "--http=127.0.0.1:0", &format!("--model={MODEL}")]);
        let mut process = self.spawn("router", identity, command);
        let line = process.first_line(START).unwrap();
        let grpc = router_address(&line).unwrap();
        let http = line.split([' ', ',']).filter_map(|word| word.parse().ok()).nth(1).expect("its HTTP address");
        let clients = Clients::connect_by(&identity.dialer, grpc).await.unwrap();
        Router { process, grpc, http, clients }
    }
}

impl Replica {
    /// SIGTERM to its leader, which ends the others.
    pub(crate) fn end(&self) {
        signal("TERM", self.ranks[0].pid()).unwrap();
    }

    /// Waits for the end of every rank: good, or bad.
    pub(crate) fn ended(&mut self, code: i32) {
        for rank in &mut self.ranks {
            assert_eq!(rank.wait(PATIENCE).unwrap().code(), Some(code), "{}", rank.errors());
        }
    }
}

impl Router {
    pub(crate) async fn statuses(&self) -> BTreeMap<String, String> {
        let replicas = self.clients.replicas().await.unwrap();
        replicas.into_iter().map(|(name, replica)| (name, replica.status)).collect()
    }

    /// Waits until the router says of its replicas what is wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&BTreeMap<String, String>) -> bool) {
        let mut last = BTreeMap::new();
        let look = async || {
            last = self.statuses().await;
            Ok(wanted(&last).then_some(()))
        };
        if let Err(error) = eventually(what, PATIENCE, look).await {
            panic!("{error}: {last:?}\n{}", self.process.errors());
        }
    }

    /// Waits until exactly these are ready, and no other is known.
    pub(crate) async fn until_ready(&self, names: &[&str]) {
        let all = |seen: &BTreeMap<String, String>| seen.keys().eq(names) && seen.values().all(|s| s == "ready");
        self.until(&format!("{names:?} ready"), all).await;
    }
}
