//! Runs a score job over ranks that are threads of this process: the same model, ranks and job as `perigee score`, with
//! channels where processes have sockets. Starting processes and meeting over TCP is what it leaves out.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use perigee_collectives::{Collective, ThreadCollective, thread_group};
use perigee_cpu::{CpuBackend, Fault};
use perigee_engine::link::{LeaderLink, channel_link};
use perigee_engine::rank::Rank;
use perigee_engine::ranks::Ranks;
use perigee_worker::WorkerConfig;
use perigee_worker::config::Precision;
use perigee_worker::load::{Opened, cpu_backend, open};
use perigee_worker::score::{Inputs, ScoreJob, ScoreRequest, run_job};

use crate::error::{Result, TestkitError};
use crate::golden::GoldenCase;
use crate::tensors::{self, Tensors};

/// Longest wait for a rank that is alive; one that ends is noticed at once.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);

/// A score job and how it is run. [`ScoreRun::golden`] and [`ScoreRun::new`] make plain ones; tests change single fields.
#[derive(Debug, Clone)]
pub struct ScoreRun {
    /// Model as `--model` takes it.
    pub model: String,
    /// Safetensors file with `prompt_<i>`.
    pub tokens: PathBuf,
    /// Ranks.
    pub tp: usize,
    /// Threads of each rank.
    pub threads: usize,
    /// Type of activations and caches.
    pub precision: Precision,
    /// Most tokens of a prompt in one step; none for whole prompts.
    pub chunk: Option<usize>,
    /// Parts that the latent cache is cut into.
    pub segments: usize,
    /// Prompts side by side; none for as many as the job plans.
    pub batch: Option<usize>,
    /// Tokens to continue greedily.
    pub greedy: Option<usize>,
    /// Safetensors file with `greedy_<i>` to feed.
    pub feed: Option<PathBuf>,
    /// Safetensors file with experts to force.
    pub experts: Option<PathBuf>,
    /// Also give hidden states and experts.
    pub trace: bool,
    /// First positions of every prompt that are filled in, not computed.
    pub filled: Option<u64>,
    /// A fault to plant in every rank.
    pub fault: Option<Fault>,
}

impl ScoreRun {
    /// One rank, float32, whole prompts, nothing besides logits and states.
    pub fn new(model: impl Into<String>, tokens: &Path) -> Self {
        Self {
            model: model.into(),
            tokens: tokens.to_owned(),
            tp: 1,
            threads: 1,
            precision: Precision::Fp32,
            chunk: None,
            segments: 1,
            batch: None,
            greedy: None,
            feed: None,
            experts: None,
            trace: false,
            filled: None,
            fault: None,
        }
    }

    /// Everything that a golden case judges: greedy and fed continuations with traces.
    pub fn golden(case: &GoldenCase) -> Self {
        let file = case.expected_file();
        Self { greedy: Some(case.greedy()), feed: Some(file.clone()), trace: true, ..Self::new(case.model(), &file) }
    }

    /// The same in bfloat16 with the expected experts forced, which is how a bfloat16 engine is judged.
    pub fn golden_bf16(case: &GoldenCase) -> Self {
        Self { precision: Precision::Bf16, experts: Some(case.expected_file()), ..Self::golden(case) }
    }

    /// Runs the job and gives what `perigee score` would write.
    ///
    /// # Errors
    /// The model or the files cannot be read, do not fit each other, or a rank failed.
    pub fn run(&self) -> Result<Tensors> {
        let mut leader = self.config(0)?;
        let request = ScoreRequest {
            tokens: &self.tokens,
            out: Path::new(""),
            chunk: self.chunk,
            segments: self.segments,
            greedy: self.greedy,
            feed: self.feed.as_deref(),
            experts: self.experts.as_deref(),
            trace: self.trace,
        };
        let mut job = ScoreJob::plan(&request, &mut leader.engine)?;
        job.batch = self.batch.unwrap_or(job.batch).min(job.batch);
        let opened = open(&leader)?;
        let inputs = Inputs::read(&job)?;
        let configs = (0..self.tp).map(|rank| WorkerConfig { rank, ..leader.clone() });
        let mut seats = configs.zip(thread_group(self.tp));
        let Some((_, leader_seat)) = seats.next() else {
            return Err(TestkitError::Options("no ranks".into()));
        };
        std::thread::scope(|scope| {
            let mut links: Vec<Box<dyn LeaderLink>> = Vec::new();
            let mut followers = Vec::new();
            for (config, seat) in seats {
                let (link, mut follower_link) = channel_link();
                links.push(Box::new(link));
                let opened = &opened;
                followers.push(scope.spawn(move || -> Result<()> {
                    let mut rank = self.rank(opened, &config, seat)?;
                    Ok(rank.follow(&mut follower_link)?)
                }));
            }
            let outputs = self.lead(&opened, &leader, leader_seat, links, (&job, &inputs));
            // By now the leader's ends are dropped, so that every follower ends.
            for (index, follower) in followers.into_iter().enumerate() {
                follower.join().map_err(|_| TestkitError::Panicked(index + 1))??;
            }
            outputs
        })
    }

    fn lead(
        &self,
        opened: &Opened,
        config: &WorkerConfig,
        seat: ThreadCollective,
        links: Vec<Box<dyn LeaderLink>>,
        (job, inputs): (&ScoreJob, &Inputs),
    ) -> Result<Tensors> {
        let rank = self.rank(opened, config, seat)?;
        let mut ranks = Ranks::new(rank, links, STEP_TIMEOUT)?;
        let outputs = run_job(&mut ranks, opened, job, inputs);
        ranks.shutdown();
        tensors::parse(&outputs?.to_bytes()?)
    }

    fn rank(&self, opened: &Opened, config: &WorkerConfig, seat: ThreadCollective) -> Result<Rank<CpuBackend>> {
        let seat: Box<dyn Collective> = Box::new(seat);
        let mut backend = cpu_backend(config, seat);
        if let Some(fault) = self.fault {
            backend.plant(fault);
        }
        Ok(opened.load(config, backend)?)
    }

    fn config(&self, rank: usize) -> Result<WorkerConfig> {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            worker: WorkerConfig,
        }
        let arguments = [
            "perigee-worker".to_owned(),
            format!("--model={}", self.model),
            format!("--rank={rank}"),
            format!("--tp={}", self.tp),
            format!("--threads={}", self.threads),
        ];
        let line = Line::try_parse_from(arguments).map_err(|error| TestkitError::Options(error.to_string()))?;
        let mut config = line.worker;
        config.engine.dtype = Some(self.precision);
        config.engine.fill_prompts = self.filled;
        Ok(config)
    }
}
