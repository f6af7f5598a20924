//! The router as a child process of a benchmark: started with a registry file, measured by /proc, ended with its parent's
//! interest in it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};

/// A running router.
pub(super) struct RouterProcess {
    /// Its gRPC address.
    pub(super) grpc: String,
    http: String,
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
        let told = addresses(&line).context("the router ended before it listened; its own message is above");
        let (grpc, http) = told?;
        Ok(Self { grpc, http, pid, registry: path, _child: child, _output: output })
    }

    /// Processor time that it has used, in steps of the kernel's clock (10 ms mostly).
    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid);
        let stat = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let ticks = cpu_ticks(&stat).with_context(|| format!("{path} has no processor times"))?;
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

impl RouterProcess {
    /// Mean time of its choices of replicas so far, in microseconds, where its listeners are without TLS.
    pub(super) async fn placement_us(&self) -> anyhow::Result<f64> {
        let exchange = async {
            let mut stream = TcpStream::connect(&self.http).await?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = exchange.await.with_context(|| format!("reading http://{}/metrics", self.http))?;
        let name = perigee_telemetry::metrics::PLACEMENT_SECONDS.name;
        let seconds = mean(&answer, name).with_context(|| format!("the router's metrics have no {name}"))?;
        Ok(seconds * 1e6)
    }
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        // A file left in the temporary directory harms nobody.
        let _ = std::fs::remove_file(&self.registry);
    }
}

/// Both addresses in `perigee router: gRPC ADDRESS, HTTP ADDRESS`.
fn addresses(line: &str) -> Option<(String, String)> {
    let (grpc, http) = line.trim_end().split_once("gRPC ")?.1.split_once(", HTTP ")?;
    Some((grpc.to_owned(), http.to_owned()))
}

/// The mean of a histogram in metrics as Prometheus reads them; none before anything was observed.
fn mean(metrics: &str, name: &str) -> Option<f64> {
    let value = |suffix: &str| {
        let start = format!("{name}_{suffix} ");
        metrics.lines().find_map(|line| line.strip_prefix(&start))?.trim().parse::<f64>().ok()
    };
    value("count").filter(|count| *count > 0.0).and_then(|count| Some(value("sum")? / count))
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
    fn reads_the_addresses_that_the_router_prints() {
        let line = "perigee router: gRPC 127.0.0.1:4711, HTTP 127.0.0.1:4712\n";
        assert_eq!(addresses(line), Some(("127.0.0.1:4711".to_owned(), "127.0.0.1:4712".to_owned())));
        assert_eq!(addresses(""), None);
    }

    #[test]
    fn reads_means_of_histograms() {
        let metrics = "# HELP a_seconds x\na_seconds_bucket{le=\"1\"} 4\na_seconds_sum 2\na_seconds_count 4\n";
        assert_eq!((mean(metrics, "a_seconds"), mean(metrics, "b_seconds")), (Some(0.5), None));
    }

    #[test]
    fn adds_user_and_system_time() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 30 0 0 20 0 5 0 999 1 1 1";
        assert_eq!(cpu_ticks(stat), Some(280));
        assert_eq!(cpu_ticks("42 (a"), None);
    }
}
