//! The router as a child process of a benchmark: started with a registry file, measured by /proc, ended with its parent's
//! interest in it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

/// A running router.
pub(super) struct RouterProcess {
    /// Its gRPC address.
    pub(super) grpc: String,
    pid: u32,
    registry: PathBuf,
    /// Killed when dropped.
    _child: Child,
    /// Kept open: what a process prints to a closed pipe is an error there.
    _output: BufReader<ChildStdout>,
}

impl RouterProcess {
    /// Starts this program's own router on free ports and waits until it listens.
    pub(super) async fn start(registry: &str, arguments: &[String], threads: Option<usize>) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("perigee-bench-{}.json", std::process::id()));
        std::fs::write(&path, registry).with_context(|| format!("writing {}", path.display()))?;
        let mut command = Command::new(std::env::current_exe().context("finding this program's file")?);
        command.arg("router").arg(format!("--registry=file:{}", path.display()));
        command.args(["--listen=127.0.0.1:0", "--http=127.0.0.1:0"]).args(arguments);
        if let Some(threads) = threads {
            command.env("TOKIO_WORKER_THREADS", threads.to_string());
        }
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().context("starting the router")?;
        let (Some(pid), Some(output)) = (child.id(), child.stdout.take()) else { bail!("the router ended at once") };
        let mut output = BufReader::new(output);
        let mut line = String::new();
        output.read_line(&mut line).await.context("reading what the router says")?;
        let grpc = grpc_address(&line).context("the router ended before it listened; its own message is above")?;
        Ok(Self { grpc, pid, registry: path, _child: child, _output: output })
    }

    /// Processor time that it has used, in steps of the kernel's clock (10 ms mostly).
    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let ticks = cpu_ticks(&stat).with_context(|| format!("{path} has no processor times"))?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        // A file left in the temporary directory harms nobody.
        let _ = std::fs::remove_file(&self.registry);
    }
}

/// The address in `perigee router: gRPC ADDRESS, HTTP ADDRESS`.
fn grpc_address(line: &str) -> Option<String> {
    Some(line.split_once("gRPC ")?.1.split_once(',')?.0.to_owned())
}

/// User and system time out of a stat file. The process's name comes before, and may have spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
}

/// Lets this process and its children open as many files as they may: a connection is one on each side.
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Where it cannot be raised, too many replicas fail by a message of their own.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_address_that_the_router_prints() {
        let line = "perigee router: gRPC 127.0.0.1:4711, HTTP 127.0.0.1:4712\n";
        assert_eq!(grpc_address(line).as_deref(), Some("127.0.0.1:4711"));
        assert_eq!(grpc_address(""), None);
    }

    #[test]
    fn adds_user_and_system_time() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 30 0 0 20 0 5 0 999 1 1 1";
        assert_eq!(cpu_ticks(stat), Some(280));
        assert_eq!(cpu_ticks("42 (a"), None);
    }
}
