//! Draws on the device: parameters go up in one block, ids with margins and the logprobs asked for come down, and the logits
//! stay. What the kernels do not do (rows with logits that are no numbers, thousands of equal logits at a cut, a mask that is too
//! short) is drawn on the host from that row alone, which also words its errors.

use std::collections::VecDeque;

use bytemuck::{Zeroable, cast_slice, pod_read_unaligned};
use perigee_backend::{BackendError, DType, Result};
use perigee_sampling::{Draw, Sampled, Scratch};

use crate::backend::CudaBackend;
use crate::buffer::Buffer;
use crate::params::{FeedParams, SampleChange, SampleParams, SampleResult, SampleRow};
use crate::stream::{Grid, Stream};
use crate::tensor::Tensor;
use crate::transfer::{Download, Upload};

/// Tokens of a block of the drawing kernel.
const PART_TOKENS: usize = 4096;
/// Bytes of a row's cut and of a part, which only kernels read.
const CUT_BYTES: usize = 32;
const PART_BYTES: usize = 24;
/// Vocabulary up to which the filters' bins hold what a thread may see.
pub(crate) const MOST_TOKENS: usize = 1 << 18;
/// Dynamic shared memory of a block that ranks a row: `RankShared` of rank.cuh, which asserts it.
pub(crate) const RANK_SHARED: usize = 81_920;
const RANK_THREADS: u32 = 512;
const DRAW_THREADS: u32 = 256;

const NO_MASK: u32 = u32::MAX;
const GREEDY: u32 = 1;
const FILTERED: u32 = 2;
const PENALISE: u32 = 1;
const BIAS: u32 = 2;
const BAN: u32 = 4;

/// What the draws of a step need on both sides; it grows to the largest step and is then reused.
#[derive(Debug, Default)]
pub(crate) struct Draws {
    device: Option<DeviceSide>,
    rows: Vec<SampleRow>,
    changes: Vec<SampleChange>,
    masks: Vec<u64>,
    packed: Vec<u8>,
    /// Draws that were queued and not collected, oldest first: at most two, as `Download` has it.
    queued: VecDeque<Queued>,
}

/// Draws whose results are on their way.
#[derive(Debug)]
struct Queued {
    results: Results,
    /// Whether each reports the log-probability of its token.
    reports: Vec<bool>,
}

#[derive(Debug)]
enum Results {
    /// In a copy of this number.
    Coming(usize),
    /// Read already.
    Here(Vec<SampleResult>),
}

/// Parameters on their way up, what only kernels see, results on their way down.
#[derive(Debug)]
struct DeviceSide {
    upload: Upload,
    /// Cuts of all rows, then their parts.
    work: Buffer,
    download: Download,
}

/// Bytes of each of these.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    upload: usize,
    work: usize,
    download: usize,
}

impl DeviceSide {
    fn new(stream: &Stream, sizes: Sizes) -> Result<Self> {
        // With room for steps that are a little larger, so that growing soon ends.
        let room = |bytes: usize| bytes.next_power_of_two().max(1 << 14);
        Ok(Self {
            upload: Upload::new(stream.device(), room(sizes.upload), "parameters of draws")?,
            work: Buffer::new(stream.device(), room(sizes.work), "working memory of draws")?,
            download: Download::new(stream.device(), room(sizes.download), "drawn tokens")?,
        })
    }

    fn holds(&self, sizes: Sizes) -> bool {
        self.upload.capacity() >= sizes.upload
            && self.work.bytes() >= sizes.work
            && self.download.capacity() >= sizes.download
    }
}

/// What a result says, or none where the host has to draw.
fn sampled(result: &SampleResult, reports: bool) -> Option<Sampled> {
    let alternatives = result.tokens.iter().zip(&result.logprobs).take(result.found as usize);
    (result.status == 0).then(|| Sampled {
        token: result.token,
        logprob: reports.then_some(result.logprob),
        top: if reports { alternatives.map(|(&token, &logprob)| (token, logprob)).collect() } else { Vec::new() },
        margin: result.margin,
    })
}

impl Draws {
    /// The results of queued draws; waits for them.
    fn read(&self, queued: &Queued) -> Result<Vec<SampleResult>> {
        match (&queued.results, &self.device) {
            (Results::Here(results), _) => Ok(results.clone()),
            (Results::Coming(number), Some(side)) => {
                let bytes = side.download.receive(*number, queued.reports.len() * size_of::<SampleResult>())?;
                Ok(bytes.chunks_exact(size_of::<SampleResult>()).map(pod_read_unaligned).collect())
            }
            (Results::Coming(_), None) => Err(BackendError::Batch("results of draws that nobody queued".into())),
        }
    }

    /// Reads all results that are still coming, before what they come through goes.
    fn read_all(&mut self) -> Result<()> {
        for index in 0..self.queued.len() {
            let results = self.read(&self.queued[index])?;
            self.queued[index].results = Results::Here(results);
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.rows.clear();
        self.changes.clear();
        self.masks.clear();
        self.packed.clear();
    }

    /// Appends a draw.
    fn push(&mut self, draw: &Draw<'_>, vocab: usize) {
        let params = draw.params;
        let first_change = self.changes.len();
        self.push_changes(draw, vocab);
        let mask = match draw.allowed {
            Some(words) => {
                let first = self.masks.len() as u32;
                self.masks.extend_from_slice(&words[..vocab.div_ceil(64)]);
                first
            }
            None => NO_MASK,
        };
        let filtered = params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0;
        let flags = match (params.is_greedy(), filtered) {
            (true, _) => GREEDY,
            (false, true) => FILTERED,
            (false, false) => 0,
        };
        self.rows.push(SampleRow {
            temperature: if params.is_greedy() { 1.0 } else { f64::from(params.temperature) },
            top_p: f64::from(params.top_p),
            log_min_p: f64::from(params.min_p).ln(),
            seed: draw.params.seed,
            position: draw.position,
            choice: draw.choice,
            top_k: params.top_k,
            repetition: params.repetition_penalty,
            frequency: params.frequency_penalty,
            presence: params.presence_penalty,
            first_change: first_change as u32,
            changes: (self.changes.len() - first_change) as u32,
            mask,
            alternatives: params.logprobs.map_or(0, |count| count + 1),
            flags,
        });
    }

    /// Appends the tokens whose logits change, each once. Ids outside the vocabulary are of no effect.
    fn push_changes(&mut self, draw: &Draw<'_>, vocab: usize) {
        let params = draw.params;
        let first = self.changes.len();
        let change = |token, flags| SampleChange { token, flags, ..SampleChange::zeroed() };
        if params.needs_counts() {
            let counted = draw.counts.iter();
            self.changes
                .extend(counted.map(|(token, count)| SampleChange { output: count.output, ..change(token, PENALISE) }));
        }
        let counted = self.changes.len();
        self.changes
            .extend(params.logit_bias.iter().map(|&(token, bias)| SampleChange { bias, ..change(token, BIAS) }));
        self.changes.extend(draw.banned.iter().map(|&token| change(token, BAN)));
        if self.changes.len() > counted {
            self.changes[first..].sort_by_key(|change| change.token);
        }
        let mut end = first;
        for at in first..self.changes.len() {
            let next = self.changes[at];
            if next.token as usize >= vocab {
                continue;
            }
            match self.changes[first..end].last_mut().filter(|last| last.token == next.token) {
                Some(last) => {
                    last.flags |= next.flags;
                    last.output += next.output;
                    last.bias += next.bias;
                }
                None => {
                    self.changes[end] = next;
                    end += 1;
                }
            }
        }
        self.changes.truncate(end);
    }

    /// Lays rows, changes and masks end to end, each aligned for its kernel; where the second and third begin.
    fn pack(&mut self) -> (usize, usize) {
        self.packed.extend_from_slice(cast_slice(&self.rows));
        let changes = self.packed.len();
        self.packed.extend_from_slice(cast_slice(&self.changes));
        self.packed.resize(self.packed.len().next_multiple_of(8), 0);
        let masks = self.packed.len();
        self.packed.extend_from_slice(cast_slice(&self.masks));
        (changes, masks)
    }
}

/// Whether the kernels can draw this row at all.
fn on_device(draw: &Draw<'_>, vocab: usize) -> bool {
    let covered = draw.allowed.is_none_or(|words| words.len() * 64 >= vocab);
    let reported = draw.params.logprobs.is_none_or(|count| count <= perigee_sampling::params::MAX_LOGPROBS);
    covered && reported && vocab <= MOST_TOKENS
}

impl CudaBackend {
    pub(crate) fn sample_run(
        &mut self,
        logits: &Tensor,
        draws: &[Draw<'_>],
        scratch: &mut Scratch,
    ) -> Result<Vec<Sampled>> {
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let vocab = logits.width;
        logits.expect("logits to draw from", draws.len(), vocab, DType::Fp32)?;
        if !draws.iter().all(|draw| on_device(draw, vocab)) {
            return (0..draws.len()).map(|row| self.sample_on_host(logits, row, &draws[row], scratch)).collect();
        }
        self.draws_queue(logits, draws)?;
        let Some(queued) = self.draws.queued.pop_back() else { return Ok(Vec::new()) };
        let results = self.draws.read(&queued)?;
        let rows = draws.iter().zip(results.iter().zip(&queued.reports)).enumerate();
        rows.map(|(row, (draw, (result, &reports)))| match sampled(result, reports) {
            Some(sampled) => Ok(sampled),
            None => self.sample_on_host(logits, row, draw, scratch),
        })
        .collect()
    }

    /// See [`perigee_backend::Backend::collect_draws`].
    pub(crate) fn draws_collect(&mut self) -> Result<Vec<Option<Sampled>>> {
        let Some(queued) = self.draws.queued.pop_front() else {
            return Err(BackendError::Batch("no draws are queued".into()));
        };
        let results = self.draws.read(&queued)?;
        Ok(results.iter().zip(&queued.reports).map(|(result, &reports)| sampled(result, reports)).collect())
    }

    /// Replaces the tokens of the current step, if `fed` of them are to be, by what the draws queued last gave.
    pub(crate) fn feed_run(&self, fed: usize) -> Result<()> {
        if fed == 0 {
            return Ok(());
        }
        if self.exchange.rank() == 0 {
            let Some(DeviceSide { download, .. }) = &self.draws.device else {
                return Err(BackendError::Batch("a step is fed with draws, and none were queued".into()));
            };
            let params = FeedParams {
                results: download.address(),
                from: self.step.feed.address,
                tokens: self.step.tokens.address,
                count: fed as u32,
                reserved: 0,
            };
            let blocks = fed.div_ceil(DRAW_THREADS as usize);
            self.stream.launch(&self.kernels.sample_feed, Grid::new(blocks, 1, DRAW_THREADS), &params)?;
        }
        self.share_tokens()
    }

    /// Draws every row on the device and queues the copy of the results.
    pub(crate) fn draws_queue(&mut self, logits: &Tensor, draws: &[Draw<'_>]) -> Result<()> {
        let vocab = logits.width;
        logits.expect("logits to draw from", draws.len(), vocab, DType::Fp32)?;
        if let Some(draw) = draws.iter().position(|draw| !on_device(draw, vocab)) {
            return Err(BackendError::Sampling(format!("draw {draw} cannot be made on the device")));
        }
        self.draws.clear();
        for draw in draws {
            self.draws.push(draw, vocab);
        }
        let (changes, masks) = self.draws.pack();
        let parts_per_row = vocab.div_ceil(PART_TOKENS);
        let cut_bytes = draws.len() * CUT_BYTES;
        let sizes = Sizes {
            upload: self.draws.packed.len(),
            work: cut_bytes + draws.len() * parts_per_row * PART_BYTES,
            download: draws.len() * size_of::<SampleResult>(),
        };
        if self.draws.device.as_ref().is_none_or(|side| !side.holds(sizes)) {
            // Work already queued may still use what goes.
            self.stream.wait()?;
            self.draws.read_all()?;
            self.draws.device = Some(DeviceSide::new(&self.stream, sizes)?);
        }
        let Some(DeviceSide { upload, work, download }) = &mut self.draws.device else { return Ok(()) };
        upload.send(&self.stream, &self.draws.packed)?;
        let params = SampleParams {
            logits: logits.address(),
            rows: upload.address(),
            changes: upload.address() + changes as u64,
            masks: upload.address() + masks as u64,
            cuts: work.address(),
            parts: work.address() + cut_bytes as u64,
            results: download.address(),
            vocab: vocab as u32,
            parts_per_row: parts_per_row as u32,
        };
        let ranking = Grid::new(draws.len(), 1, RANK_THREADS).shared(RANK_SHARED);
        let rows = Grid::new(draws.len(), 1, DRAW_THREADS);
        if self.draws.rows.iter().any(|row| row.alternatives > 0) {
            self.stream.launch(&self.kernels.sample_logprobs, ranking, &params)?;
        }
        self.stream.launch(&self.kernels.sample_prepare, rows, &params)?;
        if self.draws.rows.iter().any(|row| row.flags & FILTERED != 0) {
            self.stream.launch(&self.kernels.sample_filter, ranking, &params)?;
        }
        self.stream.launch(&self.kernels.sample_draw, Grid::new(parts_per_row, draws.len(), DRAW_THREADS), &params)?;
        self.stream.launch(&self.kernels.sample_finish, rows, &params)?;
        let results = Results::Coming(download.fetch(&self.stream, sizes.download)?);
        let reports = draws.iter().map(|draw| draw.params.logprobs.is_some()).collect();
        self.draws.queued.push_back(Queued { results, reports });
        Ok(())
    }

    /// One row's logits, read and drawn from by the reference.
    fn sample_on_host(&self, logits: &Tensor, row: usize, draw: &Draw<'_>, scratch: &mut Scratch) -> Result<Sampled> {
        let values = self.read_row(logits, row)?;
        perigee_sampling::sample(&values, draw, scratch).map_err(|error| BackendError::Sampling(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use perigee_sampling::{SamplingParams, TokenCounts};

    use super::*;

    #[test]
    fn each_token_changes_once_and_only_within_the_vocabulary() {
        let params = SamplingParams {
            repetition_penalty: 1.5,
            logit_bias: vec![(7, 2.0), (3, -1.0)],
            ..SamplingParams::default()
        };
        let mut counts = TokenCounts::from_prompt(&[3, 90]);
        counts.record_output(5);
        counts.record_output(5);
        let draw =
            Draw { params: &params, choice: 0, position: 0, counts: &counts, banned: &[5, 99, 8, 8], allowed: None };
        let mut draws = Draws::default();
        draws.push(&draw, 50);
        draws.push(&draw, 50);
        let found: Vec<_> = draws.changes.iter().map(|c| (c.token, c.flags, c.output, c.bias)).collect();
        let expected =
            [(3, PENALISE | BIAS, 0, -1.0), (5, PENALISE | BAN, 2, 0.0), (7, BIAS, 0, 2.0), (8, BAN, 0, 0.0)];
        assert_eq!(found, [expected, expected].concat());
        assert_eq!((draws.rows[1].first_change, draws.rows[1].changes), (4, 4));
        let (changes, masks) = draws.pack();
        assert_eq!((changes, masks), (160, 320));
    }

    #[test]
    fn a_mask_must_cover_the_vocabulary() {
        let (params, counts) = (SamplingParams::greedy(), TokenCounts::new());
        let words = [u64::MAX; 2];
        let draw =
            Draw { params: &params, choice: 0, position: 0, counts: &counts, banned: &[], allowed: Some(&words) };
        assert!(on_device(&draw, 128) && !on_device(&draw, 129));
    }
}
