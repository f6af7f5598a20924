//! Options of one worker process, from the command line. Faults are reported before a port opens; sizes that depend on
//! the model are checked when it is loaded.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use perigee_backend::DType;
use perigee_registry::EtcdOptions;
use perigee_telemetry::{Service, TelemetryOptions};
use perigee_tls::ServerTlsOptions;

use crate::addresses;
use crate::device::Device;
use crate::move_options::{HandoffWay, MoveOptions};

/// Most tokens in one step where nothing else is said.
const CPU_STEP_TOKENS: usize = 512;
const GPU_STEP_TOKENS: usize = 8192;
/// Sessions for which there is room where nothing else is said.
const USUAL_SESSIONS: usize = 64;
/// More positions than any prompt has.
const FILL_ALL: &str = "18446744073709551615";

/// Times as long as without them that tokens may take beside prompts on GPUs: a little below twice, for what the last step with a
/// prompt takes too long is not made up for.
const GPU_SLOWDOWN: f64 = 1.9;

/// Type of activations, caches and products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// float32 throughout, weights as stored.
    Fp32,
    /// bfloat16 with float32 sums and float32 KDA state.
    Bf16,
}

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Fp32 => Self::Fp32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// What a rank runs and how much it keeps: the same for every rank of a replica.
#[derive(Debug, Clone, clap::Args)]
pub struct EngineOptions {
    /// Model: a checkpoint directory; `demo`, a small trained one that speaks English; or `random:PRESET[@SEED]` with preset
    /// tiny, wide, 48b or 48b-e16.
    #[arg(long, default_value = perigee_demo::NAME)]
    pub model: String,
    /// Device: cpu, cuda or cuda:I,J,..; rank r takes entry r modulo the length, and replicas of
    /// `up` the entries behind each other's.
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Type of activations and caches; by default fp32 on cpu and bf16 on cuda.
    #[arg(long)]
    pub dtype: Option<Precision>,
    /// State slots: sessions that are live at once, one each.
    #[arg(long, default_value_t = USUAL_SESSIONS)]
    pub state_slots: usize,
    /// Latent pages of 64 positions; by default what the card has room for, and on CPUs enough for every slot at 1,024
    /// positions and for one longest session.
    #[arg(long)]
    pub latent_pages: Option<usize>,
    /// Longest session, prompt and output together; by default the model's, as far as there are pages, on CPUs at most
    /// 32,768.
    #[arg(long)]
    pub max_model_len: Option<usize>,
    /// Most sessions in one step; by default one for each state slot, and 64 where there are fewer slots.
    #[arg(long)]
    pub max_batch: Option<usize>,
    /// Most tokens in one step: decode rows and prefill chunks together; by default 512 on CPUs and 8,192 on GPUs, which more
    /// tokens make no faster.
    #[arg(long)]
    pub token_budget: Option<usize>,
    /// How many times as long as without them tokens may take, on average, while prompts are computed beside them: prompts wait for as
    /// many steps as that needs, and have at most a quarter of the token budget beside tokens, where at least as many sessions decode
    /// as prompts are under way. 0: prompts are in every step that has room. By default 1.9 on GPUs, 0 on CPUs.
    #[arg(long)]
    pub prompt_slowdown: Option<f64>,
    /// Most requests that wait for their first slot; more are refused with RESOURCE_EXHAUSTED. 0 refuses all.
    #[arg(long, default_value_t = 1024)]
    pub queue_limit: usize,
    /// Share of a GPU's memory to use, from 0 to 1, for all ranks of a replica on it together (under `up`, of all replicas);
    /// what does not fit is refused before it is loaded.
    #[arg(long, default_value_t = 0.9)]
    pub memory_fraction: f64,
    /// Threads of each rank on CPUs; by default the cores divided by the ranks.
    #[arg(long)]
    pub threads: Option<usize>,
    /// Seconds to wait for all ranks to join.
    #[arg(long, default_value_t = 60)]
    pub join_timeout: u64,
    /// Seconds after which a rank that is alive but silent inside a step fails the replica.
    #[arg(long, default_value_t = 30)]
    pub step_timeout: u64,
    /// Positions of prompts below this, all where no number is given, are filled in rather than computed: for measurements. What is
    /// answered means nothing.
    #[arg(long, hide = true, value_name = "POSITIONS", num_args = 0..=1, require_equals = true, default_missing_value = FILL_ALL)]
    pub fill_prompts: Option<u64>,
}

impl EngineOptions {
    /// Most tokens in one step, by the device where it is not given.
    pub fn step_tokens(&self) -> usize {
        let usual = if self.device == Device::Cpu { CPU_STEP_TOKENS } else { GPU_STEP_TOKENS };
        self.token_budget.unwrap_or(usual)
    }

    /// Most sessions in one step: slots are for sessions that run, so each has a row where no other number is given.
    pub fn step_rows(&self) -> usize {
        self.max_batch.unwrap_or(self.state_slots.max(USUAL_SESSIONS))
    }

    /// The activation type, by the device where it is not given.
    pub fn activation(&self) -> DType {
        match (self.dtype, &self.device) {
            (Some(precision), _) => precision.into(),
            (None, Device::Cpu) => DType::Fp32,
            (None, Device::Cuda(_)) => DType::Bf16,
        }
    }

    /// Most prompt tokens in a step in which sessions decode too: where these are not to wait long, fewer than fit.
    pub fn beside_tokens(&self) -> usize {
        if self.slowdown().is_some() { (self.step_tokens() / 4).max(1) } else { usize::MAX }
    }

    /// How many times as long tokens may take beside prompts; none where prompts never wait.
    pub fn slowdown(&self) -> Option<f64> {
        let usual = if self.device == Device::Cpu { 0.0 } else { GPU_SLOWDOWN };
        Some(self.prompt_slowdown.unwrap_or(usual)).filter(|times| *times > 0.0)
    }

    /// The card of a rank; none on CPUs.
    pub fn card(&self, rank: usize) -> Option<usize> {
        match &self.device {
            Device::Cuda(cards) => cards.get(rank % cards.len().max(1)).map(|&card| card as usize),
            Device::Cpu => None,
        }
    }

    /// How many of `tp` ranks are on the card of this one, itself included.
    pub fn sharers(&self, rank: usize, tp: usize) -> usize {
        (0..tp).filter(|&other| self.card(other) == self.card(rank)).count().max(1)
    }

    /// Threads of a rank out of `tp` on this machine.
    pub fn threads(&self, tp: usize) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or(cores / tp.max(1)).max(1)
    }

    /// The same options as arguments of a worker process.
    pub fn to_arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--model={}", self.model),
            format!("--device={}", self.device),
            format!("--state-slots={}", self.state_slots),
            format!("--queue-limit={}", self.queue_limit),
            format!("--memory-fraction={}", self.memory_fraction),
            format!("--join-timeout={}", self.join_timeout),
            format!("--step-timeout={}", self.step_timeout),
        ];
        let mut optional = |name: &str, value: Option<String>| {
            arguments.extend(value.map(|value| format!("--{name}={value}")));
        };
        let precision = self.dtype.map(|precision| match precision {
            Precision::Fp32 => "fp32".to_string(),
            Precision::Bf16 => "bf16".to_string(),
        });
        optional("dtype", precision);
        optional("prompt-slowdown", self.prompt_slowdown.map(|times| times.to_string()));
        optional("max-batch", self.max_batch.map(|n| n.to_string()));
        optional("latent-pages", self.latent_pages.map(|n| n.to_string()));
        optional("max-model-len", self.max_model_len.map(|n| n.to_string()));
        optional("token-budget", self.token_budget.map(|n| n.to_string()));
        optional("threads", self.threads.map(|n| n.to_string()));
        optional("fill-prompts", self.fill_prompts.map(|n| n.to_string()));
        arguments
    }

    /// Faults that do not depend on the model, all of them.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for (name, least, value) in [
            ("--state-slots", 1, Some(self.state_slots)),
            ("--max-batch", 1, self.max_batch),
            ("--token-budget", 1, self.token_budget),
            ("--latent-pages", 1, self.latent_pages),
            // One token of a prompt and one to generate.
            ("--max-model-len", 2, self.max_model_len),
            ("--threads", 1, self.threads),
        ] {
            if let Some(value) = value.filter(|value| !(least..=1 << 24).contains(value)) {
                faults.push(format!("{name}: expected {least} to {}, found {value}", 1 << 24));
            }
        }
        if !(self.memory_fraction > 0.0 && self.memory_fraction <= 1.0) {
            faults.push(format!("--memory-fraction: expected above 0 and up to 1, found {}", self.memory_fraction));
        }
        if !self.prompt_slowdown.is_none_or(|times| times == 0.0 || (1.0..=1e6).contains(&times)) {
            faults.push("--prompt-slowdown: expected 0, or 1 to 1000000".into());
        }
        if self.step_timeout == 0 || self.join_timeout == 0 {
            faults.push("--step-timeout and --join-timeout: expected at least 1 second".into());
        }
        faults
    }
}

/// Options of `perigee worker`.
#[derive(Debug, Clone, clap::Args)]
pub struct WorkerConfig {
    /// Name of the replica.
    #[arg(long, default_value = "replica-0")]
    pub replica: String,
    /// This rank, from 0; rank 0 leads.
    #[arg(long, default_value_t = 0)]
    pub rank: usize,
    /// Ranks of the replica: the tensor-parallel degree.
    #[arg(long, default_value_t = 1)]
    pub tp: usize,
    /// Where rank 0 meets the others, host:port. With --tls-cert, ranks talk over TLS; NCCL encrypts nothing.
    #[arg(long, default_value_t = loopback().to_string())]
    pub leader: String,
    /// Public address of the leader: health, reflection, model information. Open from the start.
    #[arg(long, default_value_t = loopback())]
    pub listen: SocketAddr,
    /// Internal address of the leader: the Replica service, for routers and replicas only.
    #[arg(long, default_value_t = loopback())]
    pub internal: SocketAddr,
    /// Address for /live, /health and /metrics, open from the start. /health is 200 once the replica is ready, else 503 and
    /// forming, loading, warming or draining. A rank other than 0 opens it only where a port is named.
    #[arg(long, default_value_t = loopback())]
    pub http: SocketAddr,
    /// Where to publish this replica: etcd://HOST:PORT,HOST:PORT[/PREFIX] or file:PATH; nothing when a parent process
    /// registers it.
    #[arg(long)]
    pub registry: Option<String>,
    /// How etcd is reached.
    #[command(flatten)]
    pub etcd: EtcdOptions,
    /// Host under which others reach this process, where it listens at all addresses of its machine: it is published with
    /// the ports of --listen and --internal.
    #[arg(long, value_name = "HOST")]
    pub advertise: Option<String>,
    /// Seconds that running sessions may go on after the order to end.
    #[arg(long, default_value_t = 30)]
    pub grace: u64,
    /// TLS of the three listeners, among the ranks, and towards other replicas.
    #[command(flatten)]
    pub tls: ServerTlsOptions,
    /// Logs and traces.
    #[command(flatten)]
    pub telemetry: TelemetryOptions,
    /// Report events as JSON lines on standard output and end when standard input closes: for a parent process.
    #[arg(long, hide = true)]
    pub supervised: bool,
    /// A job of `perigee score`, as JSON, to run instead of serving.
    #[arg(long, hide = true)]
    pub score_job: Option<String>,
    /// What to run.
    #[command(flatten)]
    pub engine: EngineOptions,
    /// How sessions move.
    #[command(flatten)]
    pub moves: MoveOptions,
}

fn loopback() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)
}

impl WorkerConfig {
    /// All faults that can be seen before anything starts.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.engine.faults();
        faults.extend(self.moves.faults(self.step_timeout()));
        faults.extend(self.telemetry.faults());
        if self.tp == 0 || self.rank >= self.tp {
            faults.push(format!("--rank: expected below --tp ({}), found {}", self.tp, self.rank));
        }
        match addresses::host_and_port(&self.leader) {
            None => faults.push(format!("--leader: expected host:port, found {:?}", self.leader)),
            Some((_, 0)) if self.rank > 0 => {
                faults.push("--leader: a rank other than 0 needs the leader's port".into());
            }
            Some(_) => {}
        }
        if self.tp > 1 && !self.tls.insecure && !addresses::is_loopback(&self.leader) {
            let leader = &self.leader;
            if self.tls.tls_cert.is_none() {
                faults.push(format!(
                    "--leader: {leader} is not a loopback address; give --tls-cert and --tls-key, or --insecure"
                ));
            } else if self.engine.device != Device::Cpu {
                faults.push(format!(
                    "--leader: {leader} is not a loopback address; NCCL encrypts nothing, whatever the certificates, which \
                     needs --insecure and a network of their own"
                ));
            }
        }
        let by_pairs = self.moves.handoff.contains(&HandoffWay::Pair) && self.engine.device != Device::Cpu;
        if by_pairs && !self.tls.insecure && !self.internal.ip().is_loopback() {
            faults.push(format!(
                "--handoff: pairs between GPUs are NCCL's, which encrypts nothing, whatever the certificates; with --internal {} they \
                 need --insecure and a network of their own",
                self.internal
            ));
        }
        if self.replica.is_empty() || self.replica.len() > 255 {
            faults.push(format!("--replica: expected 1 to 255 bytes, found {}", self.replica.len()));
        }
        faults.extend(self.etcd.faults());
        faults.extend(self.advertise.as_deref().and_then(addresses::host_fault));
        if self.registry.is_some() && self.advertise.is_none() && self.rank == 0 {
            for (name, address) in [("--internal", self.internal), ("--listen", self.listen)] {
                if address.ip().is_unspecified() {
                    faults.push(format!("{name}: {address} cannot be published; name a host with --advertise"));
                }
            }
        }
        let listeners = [("--listen", self.listen), ("--internal", self.internal), ("--http", self.http)];
        faults.extend(self.tls.faults(&listeners));
        faults
    }

    /// Who sends this process's traces.
    pub fn service(&self) -> Service {
        let facts = vec![("perigee.replica", self.replica.clone()), ("perigee.rank", self.rank.to_string())];
        Service { name: "perigee-worker", facts }
    }

    /// How long to wait for ranks to join.
    pub fn join_timeout(&self) -> Duration {
        Duration::from_secs(self.engine.join_timeout)
    }

    /// How long a rank may be silent inside a step.
    pub fn step_timeout(&self) -> Duration {
        Duration::from_secs(self.engine.step_timeout)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        engine: EngineOptions,
    }

    #[test]
    fn every_slot_has_a_row_where_no_other_number_is_given() {
        let rows = |flags: &[&str]| {
            let options = Line::parse_from([&["line"], flags].concat()).engine;
            let passed_on = Line::parse_from([vec!["line".to_owned()], options.to_arguments()].concat()).engine;
            assert_eq!(passed_on.step_rows(), options.step_rows(), "{flags:?} as `up` passes them on");
            options.step_rows()
        };
        assert_eq!(rows(&[]), 64);
        assert_eq!(rows(&["--state-slots=256"]), 256);
        assert_eq!(rows(&["--state-slots=2"]), 64);
        assert_eq!(rows(&["--state-slots=256", "--max-batch=8"]), 8);
    }

    #[test]
    fn sizes_with_which_nothing_could_run_are_named() {
        for (flag, fault) in [
            ("--state-slots=0", "--state-slots: expected 1 to 16777216, found 0"),
            ("--max-batch=0", "--max-batch: expected 1 to"),
            ("--max-model-len=1", "--max-model-len: expected 2 to"),
            ("--threads=99999999", "--threads: expected 1 to"),
        ] {
            let faults = Line::parse_from(["line", flag]).engine.faults();
            assert!(faults.len() == 1 && faults[0].starts_with(fault), "{faults:?}");
        }
        let good = ["line", "--state-slots=1", "--max-batch=1", "--max-model-len=2", "--token-budget=1"];
        assert_eq!(Line::parse_from(good).engine.faults(), Vec::<String>::new());
    }
}
