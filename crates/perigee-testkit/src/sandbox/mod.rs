//! A cluster for tests: `perigee up` of the binary under test on free ports, with its worker processes, clients and
//! metrics. Everything ends when the sandbox is dropped; what the processes wrote to standard error is shown where the
//! test failed.

mod clients;
mod fleet;
mod parts;
mod process;

use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

pub use clients::{Clients, HealthCheckRequest, eventually, http_get, metric};
pub use fleet::{Fleet, FleetReplica, FleetSpec};
pub use parts::{Parts, PartsSpec, free_port, router_address};
pub use process::Started;

use crate::error::{Result, TestkitError};
use crate::processes;

/// How long a loaded machine may take to start a cluster; nothing waits this long.
pub const START: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// The binary under test.
    pub program: PathBuf,
    /// Model as `--model` takes it.
    pub model: String,
    /// Replicas.
    pub replicas: usize,
    /// Ranks of each.
    pub tp: usize,
    /// Further options of `up`.
    pub options: Vec<String>,
    /// Whether `up` leads a process group, as a command does that was typed into a terminal.
    pub own_group: bool,
}

impl SandboxSpec {
    /// Replicas of `random:tiny` with default options.
    pub fn new(program: impl Into<PathBuf>, replicas: usize, tp: usize) -> Self {
        Self {
            program: program.into(),
            model: "random:tiny".into(),
            replicas,
            tp,
            options: Vec::new(),
            own_group: false,
        }
    }

    /// Another model.
    pub fn model(self, model: impl Into<String>) -> Self {
        Self { model: model.into(), ..self }
    }

    /// One more option of `up`, as `--name=value`.
    pub fn option(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }

    /// In a process group of its own.
    pub fn own_group(self) -> Self {
        Self { own_group: true, ..self }
    }

    /// Starts it and waits until it serves.
    ///
    /// # Errors
    /// It ends or says something else than that it serves.
    pub fn start(&self) -> Result<Sandbox> {
        Sandbox::start(self)
    }
}

/// A replica of a running cluster.
#[derive(Debug, Clone)]
pub struct SandboxReplica {
    /// Name.
    pub replica: String,
    /// Process ids in rank order.
    pub pids: Vec<u32>,
    /// The leader's /metrics and /health.
    pub http: SocketAddr,
}

/// A running `perigee up`.
pub struct Sandbox {
    /// The router's gRPC address.
    pub grpc: SocketAddr,
    /// The router's /metrics and /health.
    pub http: SocketAddr,
    /// The replicas, by name.
    pub replicas: Vec<SandboxReplica>,
    /// The process itself.
    pub up: Started,
    _folder: TempDir,
}

impl Sandbox {
    fn start(spec: &SandboxSpec) -> Result<Self> {
        let folder = process::folder()?;
        let mut command = Command::new(&spec.program);
        command.args(["up", "--json", "--port=0", "--http-port=0"]);
        command.args([format!("--replicas={}", spec.replicas), format!("--tp={}", spec.tp)]);
        command.arg(format!("--model={}", spec.model)).args(&spec.options);
        if spec.own_group {
            command.process_group(0);
        }
        let mut up = Started::spawn("perigee up", command, folder.path())?;
        let line = up.first_line(START)?;
        let told: Value = serde_json::from_str(&line)?;
        let wrong = |name: &str| TestkitError::Process {
            what: "perigee up".into(),
            message: format!("no good {name} in its line {line}"),
        };
        let address = |from: &Value, name: &str| {
            from[name].as_str().and_then(|text| text.parse().ok()).ok_or_else(|| wrong(name))
        };
        let replicas = told["replicas"].as_array().ok_or_else(|| wrong("replicas"))?;
        let replicas = replicas.iter().map(|replica| {
            let pids = replica["pids"].as_array().ok_or_else(|| wrong("pids"))?;
            let pids = pids.iter().map(|pid| pid.as_u64().and_then(|pid| u32::try_from(pid).ok()));
            Ok(SandboxReplica {
                replica: replica["replica"].as_str().ok_or_else(|| wrong("replica"))?.to_owned(),
                pids: pids.collect::<Option<_>>().ok_or_else(|| wrong("pids"))?,
                http: address(replica, "http")?,
            })
        });
        let replicas = replicas.collect::<Result<_>>()?;
        Ok(Self { grpc: address(&told, "grpc")?, http: address(&told, "http")?, replicas, up, _folder: folder })
    }

    /// A connection of its own to the router.
    ///
    /// # Errors
    /// The router cannot be reached.
    pub async fn connect(&self) -> Result<Clients> {
        Clients::connect(self.grpc).await
    }

    /// The replica of that name.
    ///
    /// # Panics
    /// There is none: the test is wrong.
    pub fn replica(&self, name: &str) -> &SandboxReplica {
        let found = self.replicas.iter().find(|replica| replica.replica == name);
        found.unwrap_or_else(|| panic!("no replica {name} among {:?}", self.replicas))
    }

    /// Process ids of all workers.
    pub fn worker_pids(&self) -> Vec<u32> {
        self.replicas.iter().flat_map(|replica| replica.pids.clone()).collect()
    }

    /// A counter or gauge of a replica's leader; a metric with labels is named with them.
    ///
    /// # Errors
    /// The leader cannot be reached, or has no such metric.
    pub async fn replica_metric(&self, replica: &str, name: &str) -> Result<f64> {
        metric(self.replica(replica).http, name).await
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The workers end with their parent, but one that a test has stopped cannot notice.
        self.up.kill();
        for pid in self.worker_pids() {
            if processes::arguments(pid).iter().any(|argument| argument == "worker") {
                // One that has ended meanwhile needs no signal.
                let _ = processes::signal("KILL", pid);
            }
        }
    }
}

/// The path of a file as text.
pub(crate) fn path_text(path: &Path) -> String {
    path.display().to_string()
}
