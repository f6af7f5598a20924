//! The cluster of a benchmark: `perigee up` as a child process, its clients, its leaders' counters, and the end of a replica.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use perigee_proto::v1::{MigrateMode, MigrateRequest, MigrateResponse};
use perigee_tls::ClientTlsOptions;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::client::{ClientArgs, refused};

/// How long a leader may take to show its counters.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running cluster; it ends when this is dropped.
pub(super) struct Cluster {
    pub(super) client: ClientArgs,
    replicas: Vec<Member>,
    _child: Child,
    /// Its standard input, which ends with this process where that is killed.
    _lifeline: Option<ChildStdin>,
    /// Kept open: what a process prints to a closed pipe is an error there.
    _output: BufReader<ChildStdout>,
}

/// What `up --json` says of a replica.
#[derive(Debug, Clone, Deserialize)]
struct Member {
    replica: String,
    pids: Vec<i32>,
    /// Where its counters are.
    http: String,
}

#[derive(Debug, Deserialize)]
struct Ready {
    grpc: String,
    replicas: Vec<Member>,
}

/// Counters of a leader, as far as they tell where time goes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Counters {
    /// Seconds and number of steps.
    pub(super) steps: (f64, f64),
    /// Of waits for answers.
    pub(super) waits: (f64, f64),
}

impl Cluster {
    /// Starts two replicas with these arguments of `up` and waits until they are ready.
    pub(super) async fn start(arguments: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe().context("finding this program's file")?);
        command.args(["up", "--json", "--port=0", "--http-port=0", "--replicas=2", "--end-with-input"]).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().context("starting the cluster")?;
        let lifeline = child.stdin.take();
        let Some(output) = child.stdout.take() else { bail!("the cluster has no output") };
        let mut output = BufReader::new(output);
        let mut line = String::new();
        output.read_line(&mut line).await.context("reading what the cluster says")?;
        let ready: Ready =
            serde_json::from_str(&line).context("the cluster ended before it was ready; its own message is above")?;
        let client = ClientArgs { router: ready.grpc, json: false, tls: ClientTlsOptions::default() };
        Ok(Self { client, replicas: ready.replicas, _child: child, _lifeline: lifeline, _output: output })
    }

    /// The replica that is not this one.
    pub(super) fn other(&self, than: &str) -> anyhow::Result<String> {
        let other = self.replicas.iter().find(|member| member.replica != than);
        other.map(|member| member.replica.clone()).context("there is no other replica")
    }

    /// Moves a session.
    pub(super) async fn migrate(&self, session: &str, to: &str, mode: MigrateMode) -> anyhow::Result<MigrateResponse> {
        let request = MigrateRequest { session_id: session.to_owned(), to: to.to_owned(), mode: mode.into() };
        Ok(self.client.cluster().await?.migrate(request).await.map_err(refused)?.into_inner())
    }

    /// Ends all ranks of a replica at once.
    pub(super) fn kill(&self, replica: &str) -> anyhow::Result<()> {
        for pid in self.member(replica)?.pids.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            kill_process(pid, Signal::KILL).with_context(|| format!("ending a rank of {replica}"))?;
        }
        Ok(())
    }

    /// What a leader has counted so far.
    pub(super) async fn counters(&self, replica: &str) -> anyhow::Result<Counters> {
        let address = &self.member(replica)?.http;
        let read = async {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
            let mut text = String::new();
            stream.read_to_string(&mut text).await?;
            Ok::<_, std::io::Error>(text)
        };
        let text = tokio::time::timeout(PATIENCE, read).await.map_err(|_| anyhow!("{address} does not answer"))?;
        Ok(counters(&text.with_context(|| format!("reading the counters of {replica} at {address}"))?))
    }

    fn member(&self, replica: &str) -> anyhow::Result<&Member> {
        self.replicas.iter().find(|member| member.replica == replica).with_context(|| format!("no replica {replica}"))
    }
}

fn counters(text: &str) -> Counters {
    let sum = |name: &str| {
        let values = text.lines().filter(|line| line.split([' ', '{']).next() == Some(name));
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    Counters {
        steps: (sum("perigee_step_seconds_sum"), sum("perigee_step_seconds_count")),
        waits: (sum("perigee_remote_attention_seconds_sum"), sum("perigee_remote_attention_seconds_count")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_over_labels() {
        let text = "# TYPE perigee_step_seconds histogram\nperigee_step_seconds_sum{phase=\"decode\"} 1.5\n\
                    perigee_step_seconds_sum{phase=\"mixed\"} 0.5\nperigee_step_seconds_count{phase=\"decode\"} 30\n\
                    perigee_remote_attention_seconds_sum 0.25\nperigee_remote_attention_seconds_count 5\n";
        assert_eq!(counters(text), Counters { steps: (2.0, 30.0), waits: (0.25, 5.0) });
        assert_eq!(counters(""), Counters::default());
    }
}
