//! A cluster of single processes whose replicas differ in their degree: a router and every rank started by hand. Each
//! replica and the router can be killed, stopped for a while, and started anew at the same addresses, while the others go
//! on. `up` is what a user starts instead; clusters of equal replicas have `Parts`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use perigee_proto::v1::ReplicaInfo;
use serde_json::json;
use tempfile::TempDir;

use super::parts::{free_port, router_address};
use super::{Clients, START, Started, eventually, path_text, process};
use crate::error::{Result, TestkitError};
use crate::processes;

/// What to start.
#[derive(Debug, Clone)]
pub struct FleetSpec {
    /// The binary under test.
    pub program: PathBuf,
    /// Model as `--model` takes it.
    pub model: String,
    /// Number of ranks of every replica.
    pub degrees: Vec<usize>,
    /// Further options of every worker, as `--name=value`.
    pub worker: Vec<String>,
    /// Further options of the router.
    pub router: Vec<String>,
}

impl FleetSpec {
    /// Replicas of `random:tiny` with these numbers of ranks and default options.
    pub fn new(program: impl Into<PathBuf>, degrees: &[usize]) -> Self {
        Self {
            program: program.into(),
            model: "random:tiny".into(),
            degrees: degrees.to_vec(),
            worker: Vec::new(),
            router: Vec::new(),
        }
    }

    /// Another model.
    pub fn model(self, model: impl Into<String>) -> Self {
        Self { model: model.into(), ..self }
    }

    /// One more option of every worker.
    pub fn worker(mut self, option: impl Into<String>) -> Self {
        self.worker.push(option.into());
        self
    }

    /// One more option of the router.
    pub fn router(mut self, option: impl Into<String>) -> Self {
        self.router.push(option.into());
        self
    }

    /// Starts every process and waits until every replica is ready.
    ///
    /// # Errors
    /// A process cannot be started, or a replica is not ready in time.
    pub async fn start(self) -> Result<Fleet> {
        Fleet::start(self).await
    }
}

/// One replica of a fleet.
pub struct FleetReplica {
    /// Name.
    pub name: String,
    /// Its ranks, the leader first.
    pub ranks: Vec<Started>,
    /// The leader's /metrics and /health.
    pub http: SocketAddr,
    /// The leader's Replica service.
    internal: SocketAddr,
    /// Where the ranks meet.
    leader: SocketAddr,
}

/// Running processes; all of them end when it is dropped.
pub struct Fleet {
    /// The router's gRPC address.
    pub grpc: SocketAddr,
    /// The router.
    pub router: Started,
    /// The replicas, in the order of their degrees.
    pub replicas: Vec<FleetReplica>,
    spec: FleetSpec,
    registry: String,
    folder: TempDir,
    /// Processes that were started so far, which names their files.
    started: usize,
}

impl Fleet {
    async fn start(spec: FleetSpec) -> Result<Self> {
        let folder = process::folder()?;
        let mut replicas = Vec::new();
        for index in 0..spec.degrees.len() {
            let name = format!("replica-{index}");
            let (http, internal, leader) = (free_port()?, free_port()?, free_port()?);
            replicas.push(FleetReplica { name, ranks: Vec::new(), http, internal, leader });
        }
        let listed = replicas.iter().map(|one| json!({"replica": one.name, "internal": one.internal.to_string()}));
        let listed = json!({"replicas": listed.collect::<Vec<_>>()}).to_string();
        let registry = folder.path().join("registry.json");
        std::fs::write(&registry, listed).map_err(TestkitError::file(&registry))?;
        let registry = format!("--registry=file:{}", path_text(&registry));

        let mut started = 0;
        for (replica, &degree) in replicas.iter_mut().zip(&spec.degrees) {
            replica.ranks = start_ranks(&spec, replica, degree, (&registry, folder.path()), &mut started)?;
        }
        let (grpc, router) = start_router(&spec, (&registry, folder.path()), 0, free_port()?)?;
        let fleet = Self { grpc, router, replicas, spec, registry, folder, started };
        fleet.ready(&fleet.connect().await?).await?;
        Ok(fleet)
    }

    /// A connection of its own to the router.
    ///
    /// # Errors
    /// The router cannot be reached.
    pub async fn connect(&self) -> Result<Clients> {
        Clients::connect(self.grpc).await
    }

    /// Waits until every replica is ready, as the processes that it has now.
    ///
    /// # Errors
    /// One is not.
    pub async fn ready(&self, clients: &Clients) -> Result<()> {
        let all = async || {
            let seen = clients.replicas().await?;
            // A router may not have noticed yet that those of before are gone.
            let is_ready = |one: &FleetReplica| {
                let is_it = |info: &ReplicaInfo| info.pids.iter().copied().eq(one.ranks.iter().map(Started::pid));
                seen.get(&one.name).is_some_and(|info| info.status == "ready" && is_it(info))
            };
            Ok(self.replicas.iter().all(is_ready).then_some(()))
        };
        eventually("every replica ready", START, all).await.map(|_| ())
    }

    /// Sends a signal to all ranks of a replica, named as `kill` names it.
    ///
    /// # Errors
    /// One of them has ended.
    pub fn signal(&self, replica: usize, signal: &str) -> Result<()> {
        self.replicas[replica].ranks.iter().try_for_each(|rank| processes::signal(signal, rank.pid()))
    }

    /// Kills all ranks of a replica.
    pub fn kill(&mut self, replica: usize) {
        self.replicas[replica].ranks.iter_mut().for_each(Started::kill);
    }

    /// Starts a replica anew, once its ranks have ended.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn restart(&mut self, replica: usize) -> Result<()> {
        let degree = self.spec.degrees[replica];
        let places = (self.registry.as_str(), self.folder.path());
        let one = &mut self.replicas[replica];
        one.ranks.iter_mut().for_each(Started::kill);
        one.ranks = start_ranks(&self.spec, one, degree, places, &mut self.started)?;
        Ok(())
    }

    /// One more router, at an address of its own.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn another_router(&mut self) -> Result<(SocketAddr, Started)> {
        self.started += 1;
        let places = (self.registry.as_str(), self.folder.path());
        start_router(&self.spec, places, self.started, free_port()?)
    }

    /// Kills the router and starts another one at the same address.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn restart_router(&mut self) -> Result<()> {
        self.router.kill();
        self.started += 1;
        let places = (self.registry.as_str(), self.folder.path());
        (self.grpc, self.router) = start_router(&self.spec, places, self.started, self.grpc)?;
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // A rank that a test has stopped ends by nothing else.
        for replica in 0..self.replicas.len() {
            self.kill(replica);
        }
    }
}

fn start_ranks(
    spec: &FleetSpec,
    replica: &FleetReplica,
    degree: usize,
    (registry, folder): (&str, &Path),
    started: &mut usize,
) -> Result<Vec<Started>> {
    let ranks = (0..degree).map(|rank| {
        let mut command = Command::new(&spec.program);
        command.args(["worker", "--threads=1", &format!("--model={}", spec.model), registry]);
        command.args([format!("--replica={}", replica.name), format!("--rank={rank}"), format!("--tp={degree}")]);
        command.args([format!("--leader={}", replica.leader), format!("--internal={}", replica.internal)]);
        if rank == 0 {
            command.arg(format!("--http={}", replica.http));
        }
        command.args(&spec.worker);
        *started += 1;
        Started::spawn(&format!("{} rank {rank} start {started}", replica.name), command, folder)
    });
    ranks.collect()
}

fn start_router(
    spec: &FleetSpec,
    (registry, folder): (&str, &Path),
    number: usize,
    // Its own even while it does not run, which one of the system's choice would not be.
    listen: SocketAddr,
) -> Result<(SocketAddr, Started)> {
    let mut command = Command::new(&spec.program);
    command.args(["router", "--http=127.0.0.1:0", &format!("--listen={listen}"), registry]);
    command.arg(format!("--model={}", spec.model)).args(&spec.router);
    let mut router = Started::spawn(&format!("router start {number}"), command, folder)?;
    let line = router.first_line(START)?;
    Ok((router_address(&line)?, router))
}
