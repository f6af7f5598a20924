//! `perigee bench engine`: the shipped engine, scheduler and backend in this process, on a grid of batches and contexts.
//! Prompts are random tokens, decoding is greedy and goes on whatever is drawn. A time is given beside the least time that the
//! bytes of a step take; those are counted from the experts that the run touched.

mod cell;
mod floor;
mod shared;

use std::time::Instant;

use perigee_backend::{Backend, PAGE_TOKENS};
use perigee_collectives::Solo;
use perigee_engine::ranks::Ranks;
use perigee_engine::{Engine, EngineConfig};
use serde::Serialize;

use crate::config::EngineOptions;
use crate::device::Device;
use crate::error::{Result, WorkerError};
use crate::load::{Opened, Seat, open_engine};
use crate::warm::warm;

use cell::Driver;
use floor::step_bytes;
use shared::SharedRanks;

/// Positions of a cell from which its prompts are computed once only, and the time of that is taken from the same run.
const HEAVY: usize = 70_000;
/// A cell that is run first and thrown away.
const FIRST: Cell = Cell { batch: 1, context: 64 };
/// Its decode steps.
const FIRST_STEPS: usize = 2;

/// A batch of sessions and the prompt that each has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Sessions.
    pub batch: usize,
    /// Tokens of each prompt.
    pub context: usize,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchRequest {
    /// What to run; slots, pages, batch and lengths are set to what the cells need.
    pub engine: EngineOptions,
    /// The cells, in order.
    pub cells: Vec<Cell>,
    /// Decode steps of the whole batch in each cell.
    pub steps: usize,
    /// Bytes a second to hold steps against; measured by a copy on the device where none are given.
    pub bandwidth: Option<f64>,
    /// Tokens of a prompt that is computed while a cell's sessions decode, after the cell.
    pub beside: Option<usize>,
}

/// A cell's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CellResult {
    /// Name of the device.
    pub device: String,
    /// The model.
    pub model: String,
    /// Sessions.
    pub batch: usize,
    /// Tokens of each prompt.
    pub context: usize,
    /// Seconds from handing in the whole batch to the last session's first token.
    pub ttft_s: f64,
    /// Prompt tokens a second over that time.
    pub prefill_tok_s: f64,
    /// Milliseconds of a step in which the whole batch decodes, the mean over the steps between the last first token and the
    /// first end.
    pub tpot_ms: f64,
    /// Tokens a second in these steps.
    pub decode_tok_s: f64,
    /// Distinct experts that a mixture layer computed with in such a step, the mean.
    pub experts_touched: f64,
    /// Milliseconds that the bytes of such a step take.
    pub floor_ms: f64,
    /// `tpot_ms` over `floor_ms`.
    pub floor_ratio: f64,
    /// Steps counted.
    pub steps: u64,
    /// Terabytes a second that the floor assumes: what a copy reads and writes.
    pub bandwidth_tb_s: f64,
    /// What a prompt beside the cell's sessions does to their tokens, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<BesideResult>,
}

/// Sessions that decode while a prompt is computed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BesideResult {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Milliseconds of a session's token before the prompt came, the mean.
    pub alone_ms: f64,
    /// The same from the prompt's coming to its first token.
    pub beside_ms: f64,
    /// The longest time between two tokens of a session then.
    pub longest_ms: f64,
    /// Tokens a second of the prompt.
    pub prompt_tok_s: f64,
}

/// Runs the cells; each result is also handed to `done` as it comes.
///
/// # Errors
/// The model does not load, a cell has no room, or a step failed.
pub fn run(request: &BenchRequest, done: &mut dyn FnMut(&CellResult)) -> Result<Vec<CellResult>> {
    let options = sized(request)?;
    let faults = options.faults();
    if !faults.is_empty() {
        return Err(WorkerError::Options(faults.join("\n")));
    }
    let opened = open_engine(&options, Seat { rank: 0, tp: 1 })?;
    let bench = Bench { options: &options, opened: &opened, request };
    match options.device {
        Device::Cpu => bench.on_cpu(done),
        Device::Cuda(_) => bench.on_cuda(done),
    }
}

/// The options with the sizes that the cells need.
fn sized(request: &BenchRequest) -> Result<EngineOptions> {
    let mut options = request.engine.clone();
    let all = || request.cells.iter().copied().chain([FIRST]);
    let guests = usize::from(request.beside.is_some());
    let Some(batch) = all().map(|cell| cell.batch).max().filter(|_| !request.cells.is_empty()) else {
        return Err(WorkerError::Options("no cells: expected at least one batch and one context".into()));
    };
    if request.steps == 0 || all().any(|cell| cell.batch == 0 || cell.context == 0) {
        return Err(WorkerError::Options("steps, batches and contexts: expected at least 1 each".into()));
    }
    let batch = batch + guests;
    // A quarter of the tokens of a step is kept for prefill.
    let budget = options.step_tokens().max(2 * batch);
    options.token_budget = Some(budget);
    options.max_batch = Some(batch);
    options.state_slots = batch;
    options.queue_limit = options.queue_limit.max(batch);
    let steps = request.steps.max(FIRST_STEPS);
    let more = if guests > 0 { cell::BESIDE_TOKENS } else { 0 };
    let most = |cell: Cell| cell.context + max_tokens(cell, steps, budget).max(more);
    let guest = request.beside.map_or(0, |prompt| prompt.div_ceil(PAGE_TOKENS) + 1);
    let pages = |cell: Cell| cell.batch * (most(cell).div_ceil(PAGE_TOKENS) + 1) + guest;
    options.max_model_len = all().map(most).chain(request.beside.map(|prompt| prompt + 1)).max();
    // The scheduler keeps a part of the pages free for those that grow.
    options.latent_pages = all().map(pages).max().map(|pages| pages + pages / 16 + 2 * batch + 1);
    Ok(options)
}

/// Tokens that each session generates: sessions whose prompt is done decode while the others' are computed.
fn max_tokens(cell: Cell, steps: usize, budget: usize) -> usize {
    1 + steps + 2 * (cell.batch * cell.context).div_ceil(budget.max(1)) + cell.batch * cell.batch / budget.max(1)
}

/// Lets the thresholds of the cell's place apply, where several are measured against each other.
#[cfg(feature = "tuning")]
fn apply_variant(cell: usize) {
    let variants = perigee_cuda::variants();
    perigee_cuda::choose_variant(cell % variants.len());
    println!("-- {}", variants[cell % variants.len()]);
}

/// Lets the thresholds of the cell's place apply, where several are measured against each other.
#[cfg(not(feature = "tuning"))]
fn apply_variant(_cell: usize) {}

struct Bench<'a> {
    options: &'a EngineOptions,
    opened: &'a Opened,
    request: &'a BenchRequest,
}

impl Bench<'_> {
    fn on_cpu(&self, done: &mut dyn FnMut(&CellResult)) -> Result<Vec<CellResult>> {
        let options =
            perigee_cpu::CpuOptions { activation: self.options.activation(), threads: self.options.threads(1) };
        let backend = perigee_cpu::CpuBackend::new(options, Box::new(Solo));
        let bandwidth = self.request.bandwidth.unwrap_or_else(host_copy_rate);
        self.on(backend, "cpu".into(), bandwidth, done)
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self, done: &mut dyn FnMut(&CellResult)) -> Result<Vec<CellResult>> {
        let device = self.options.card(0).unwrap_or(0);
        let options = perigee_cuda::Options { device, precision: self.options.activation() };
        let mut backend = perigee_cuda::CudaBackend::open(options, Box::new(Solo))?;
        let name = backend.device()?.name;
        let bandwidth = self.request.bandwidth.map_or_else(|| backend.copy_rate(), Ok)?;
        self.on(backend, name, bandwidth, done)
    }

    #[cfg(not(feature = "cuda"))]
    fn on_cuda(&self, _: &mut dyn FnMut(&CellResult)) -> Result<Vec<CellResult>> {
        // Opening has said already why not.
        Ok(perigee_cuda::check(self.options.card(0).unwrap_or(0)).map(|()| Vec::new())?)
    }

    fn on<B: Backend + 'static>(
        &self,
        backend: B,
        device: String,
        bandwidth: f64,
        done: &mut dyn FnMut(&CellResult),
    ) -> Result<Vec<CellResult>> {
        let rank = self.opened.load_at(Seat { rank: 0, tp: 1 }, backend, &mut |_, _| {})?;
        let mut ranks = Ranks::new(rank, Vec::new(), std::time::Duration::from_secs(self.options.step_timeout))?;
        warm(&mut ranks, &self.options.device)?;
        let shared = SharedRanks::new(ranks);
        let config = EngineConfig {
            token_budget: self.options.step_tokens(),
            max_batch: self.options.step_rows(),
            queue_limit: self.options.queue_limit,
            ..EngineConfig::default()
        };
        // Cells are told of as fast as their prompts can be computed; what is decoded beside them then is not looked at.
        let config = match self.request.beside {
            Some(_) => EngineConfig {
                beside_tokens: self.options.beside_tokens(),
                prompt_slowdown: self.options.slowdown(),
                ..config
            },
            None => config,
        };
        let (core, handle) =
            Engine::by_hand(Box::new(shared.clone()), config).map_err(|error| WorkerError::Bench(error.to_string()))?;
        let mut driver = Driver::new(core, handle, shared, self.opened.limits.vocab);
        driver.cell(FIRST, max_tokens(FIRST, FIRST_STEPS, self.options.step_tokens()))?;
        let mut results = Vec::new();
        for (index, &cell) in self.request.cells.iter().enumerate() {
            apply_variant(index);
            let result = self.measure(&mut driver, cell, &device, bandwidth)?;
            done(&result);
            results.push(result);
        }
        Ok(results)
    }

    fn measure<B: Backend + 'static>(
        &self,
        driver: &mut Driver<B>,
        cell: Cell,
        device: &str,
        bandwidth: f64,
    ) -> Result<CellResult> {
        let tokens = max_tokens(cell, self.request.steps, self.options.step_tokens());
        let heavy = cell.batch * cell.context > HEAVY;
        let alone = if heavy { None } else { Some(driver.cell(cell, 1)?.ttft.min(driver.cell(cell, 1)?.ttft)) };
        let mut best = driver.cell(cell, tokens)?;
        if !heavy {
            let again = driver.cell(cell, tokens)?;
            best = if again.tpot() < best.tpot() { again } else { best };
        }
        let ttft = alone.unwrap_or(best.ttft).as_secs_f64();
        let model = self.opened.source.config();
        let layers = model.layers.iter().filter(|layer| !layer.dense).count();
        let experts = if layers == 0 { 0.0 } else { best.experts / layers as f64 };
        let floor_ms = step_bytes(model, cell, experts, self.options.activation()) / bandwidth * 1e3;
        let tpot = best.tpot();
        let beside = self.request.beside.map(|prompt| driver.beside(cell, prompt)).transpose()?;
        Ok(CellResult {
            device: device.to_owned(),
            model: self.opened.spec.to_string(),
            batch: cell.batch,
            context: cell.context,
            ttft_s: ttft,
            prefill_tok_s: (cell.batch * cell.context) as f64 / ttft,
            tpot_ms: tpot * 1e3,
            decode_tok_s: cell.batch as f64 / tpot,
            experts_touched: experts,
            floor_ms,
            floor_ratio: tpot * 1e3 / floor_ms,
            steps: best.steps,
            bandwidth_tb_s: bandwidth / 1e12,
            beside,
        })
    }
}

/// Bytes a second that one thread reads and writes in a copy, the best of several.
fn host_copy_rate() -> f64 {
    let from = vec![1u8; 32 << 20];
    let mut to = vec![0u8; from.len()];
    let once = || {
        let begun = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
        begun.elapsed().as_secs_f64()
    };
    let best = std::iter::repeat_with(once).take(5).fold(f64::INFINITY, f64::min);
    2.0 * from.len() as f64 / best
}

#[cfg(test)]
mod tests;
