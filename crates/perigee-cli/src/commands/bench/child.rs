//! The router as a child process of a benchmark: started with a registry file, measured by /proc, ended with its parent's
//! interest in it.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

/// How long choices of replicas take: bounds that so many of them keep, in microseconds. Means would have the time in which
/// others had the processor.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Placement {
    p50: f64,
    pub(super) p99: f64,
}

/// A running router.
pub(super) struct RouterProcess {
    /// Its gRPC address.
    pub(super) grpc: String,
    http: String,
    pid: u32,
    registry: PathBuf,
    /// Killed when dropped.
    _child: Child,
    /// Its standard input, which ends with this process where that is killed.
    _lifeline: Option<ChildStdin>,
    /// Kept open: what a process prints to a closed pipe is an error there.
    _output: BufReader<ChildStdout>,
}

impl RouterProcess {
    /// Starts this program's own router on free ports and waits until it listens.
    /// `cpus` names the processors that it may have, as taskset does.
    pub(super) async fn start(registry: &str, arguments: &[String], cpus: Option<&str>) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("perigee-bench-{}.json", std::process::id()));
        std::fs::write(&path, registry).with_context(|| format!("writing {}", path.display()))?;
        let program = std::env::current_exe().context("finding this program's file")?;
        let mut command = match cpus {
            Some(cpus) => {
                let mut command = Command::new("taskset");
                command.args(["-c", cpus]).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.arg("router").arg(format!("--registry=file:{}", path.display()));
        command.args(["--listen=127.0.0.1:0", "--http=127.0.0.1:0", "--end-with-input"]).args(arguments);
        if std::env::var_os("PERIGEE_LOG").is_none() {
            command.env("PERIGEE_LOG", "error");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().context("starting the router")?;
        let lifeline = child.stdin.take();
        let (Some(pid), Some(output)) = (child.id(), child.stdout.take()) else { bail!("the router ended at once") };
        let mut output = BufReader::new(output);
        let mut line = String::new();
        output.read_line(&mut line).await.context("reading what the router says")?;
        let told = addresses(&line).context("the router ended before it listened; its own message is above");
        let (grpc, http) = told?;
        Ok(Self { grpc, http, pid, registry: path, _child: child, _lifeline: lifeline, _output: output })
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
    /// How long its choices of replicas took so far, where its listeners are without TLS.
    pub(super) async fn placement(&self) -> anyhow::Result<Placement> {
        let exchange = async {
            let mut stream = TcpStream::connect(&self.http).await?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = exchange.await.with_context(|| format!("reading http://{}/metrics", self.http))?;
        let name = perigee_telemetry::metrics::PLACEMENT_SECONDS.name;
        let bound = |share: f64| {
            let seconds = quantile(&answer, name, share);
            seconds.map(|seconds| seconds * 1e6).with_context(|| format!("the router's metrics have no {name}"))
        };
        Ok(Placement { p50: bound(0.5)?, p99: bound(0.99)? })
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

/// The least bound of a histogram below which a share of what was observed lies, in metrics as Prometheus reads them; none
/// before anything was observed.
fn quantile(metrics: &str, name: &str, share: f64) -> Option<f64> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    let start = format!("{name}_count ");
    let count = number(metrics.lines().find_map(|line| line.strip_prefix(&start))?).filter(|count| *count > 0.0)?;
    let start = format!("{name}_bucket{{le=\"");
    metrics.lines().filter_map(|line| line.strip_prefix(&start)?.split_once("\"} ")).find_map(|(bound, below)| {
        let is_enough = number(below)? >= share * count;
        if is_enough { number(bound) } else { None }
    })
}

/// User and system time out of a stat file. The process's name comes before, and may have spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
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
    fn reads_quantiles_of_histograms() {
        let metrics =
            "# HELP a x\na_bucket{le=\"0.1\"} 3\na_bucket{le=\"0.5\"} 6\na_bucket{le=\"+Inf\"} 6\na_sum 2\na_count 6\n";
        assert_eq!((quantile(metrics, "a", 0.5), quantile(metrics, "a", 0.99)), (Some(0.1), Some(0.5)));
        assert_eq!(quantile(metrics, "b", 0.5), None);
    }

    #[test]
    fn adds_user_and_system_time() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 30 0 0 20 0 5 0 999 1 1 1";
        assert_eq!(cpu_ticks(stat), Some(280));
        assert_eq!(cpu_ticks("42 (a"), None);
    }
}
