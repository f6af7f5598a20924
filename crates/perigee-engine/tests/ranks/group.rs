//! A replica of a small model whose ranks are threads, and what tests do with one: feed tokens, move slots, look at logits.

use std::ops::Range;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use perigee_backend::{DType, Row, Segment, StepBatch};
use perigee_collectives::{ThreadCollective, thread_group};
use perigee_cpu::{CpuBackend, CpuOptions};
use perigee_engine::executor::{Executor, ExecutorLimits, PageSpan, StepOutput, StepPlan};
use perigee_engine::link::{LeaderLink, channel_link};
use perigee_engine::rank::{Rank, RankShape};
use perigee_engine::ranks::Ranks;
use perigee_engine::remote::{AttentionClient, RemotePlan};
use perigee_model::presets::Preset;
use perigee_model::{Model, StepLimits, WeightSource};
use serde_json::json;

pub(crate) const LIMITS: ExecutorLimits =
    ExecutorLimits { vocab: 512, slots: 6, pages: 16, step_tokens: 256, step_rows: 8, max_model_len: 1024 };

/// A replica.
pub(crate) struct Group {
    pub(crate) ranks: Ranks<CpuBackend>,
    threads: Vec<JoinHandle<()>>,
}

/// How a replica is made.
pub(crate) struct Options<'a> {
    pub(crate) tp: usize,
    pub(crate) dtype: DType,
    /// A rank's way to ask; none for one that has none.
    pub(crate) client: &'a dyn Fn(usize) -> Option<Box<dyn AttentionClient>>,
    /// What lies between leader and followers.
    pub(crate) link: &'a dyn Fn(Box<dyn LeaderLink>) -> Box<dyn LeaderLink>,
    /// Whether prompts are filled in.
    pub(crate) fills: Option<u64>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { tp: 1, dtype: DType::Fp32, client: &|_| None, link: &|link| link, fills: None }
    }
}

/// The tiny preset with two MLA layers, so that answers of one matter to the questions of the next.
fn weights() -> &'static WeightSource {
    static WEIGHTS: OnceLock<WeightSource> = OnceLock::new();
    WEIGHTS.get_or_init(|| {
        let mut config: serde_json::Value = serde_json::from_str(&Preset::Tiny.config_json().unwrap()).unwrap();
        config["linear_attn_config"]["kda_layers"] = json!([1, 3, 5]);
        config["linear_attn_config"]["full_attn_layers"] = json!([2, 4]);
        WeightSource::random(config.to_string(), 3).unwrap()
    })
}

/// One of `tp` ranks.
pub(crate) fn load((rank, tp): (usize, usize), seat: ThreadCollective, dtype: DType) -> Rank<CpuBackend> {
    let mut backend = CpuBackend::new(CpuOptions { activation: dtype, threads: 1 }, Box::new(seat)).running_ahead();
    let limits = StepLimits { tokens: LIMITS.step_tokens, logits: LIMITS.step_tokens };
    let model = Model::load(&mut backend, weights(), (rank, tp), limits, &mut |_, _| {}).unwrap();
    let cache = weights().config().cache_shape(tp, LIMITS.slots, LIMITS.pages);
    Rank::new(backend, model, RankShape { rank, cache, limits: LIMITS }).unwrap()
}

impl Group {
    pub(crate) fn new(tp: usize) -> Self {
        Self::open(&Options { tp, ..Options::default() })
    }

    pub(crate) fn open(options: &Options<'_>) -> Self {
        let (tp, fills) = (options.tp, options.fills);
        let open = move |rank: usize, seat, dtype, client: Option<Box<dyn AttentionClient>>| {
            let mut rank = load((rank, tp), seat, dtype);
            if let Some(client) = client {
                let shape = rank.answer_model().shape;
                rank.set_attention(client, shape);
            }
            if let Some(fills) = fills {
                rank.fill_prompts(fills);
            }
            rank
        };
        let mut seats = thread_group(tp).into_iter().enumerate();
        let (_, leader) = seats.next().unwrap();
        let (mut links, mut threads) = (Vec::new(), Vec::new());
        for (rank, seat) in seats {
            let (link, mut follower) = channel_link();
            links.push((options.link)(Box::new(link)));
            let (dtype, client) = (options.dtype, (options.client)(rank));
            threads.push(std::thread::spawn(move || open(rank, seat, dtype, client).follow(&mut follower).unwrap()));
        }
        let own = open(0, leader, options.dtype, (options.client)(0));
        Self { ranks: Ranks::new(own, links, Duration::from_secs(60)).unwrap(), threads }
    }

    /// Feeds tokens to a row of a fresh slot and gives the logits of all of them.
    pub(crate) fn begin(&mut self, slot: u32, pages: &[u32], tokens: &[u32]) -> Vec<Vec<f32>> {
        self.step(&StepPlan { clear_slots: vec![slot], ..feed(&[Fed::local(slot, pages, 0, tokens)]) }).1
    }

    /// Runs a step; its output and the logits of every position asked for.
    pub(crate) fn step(&mut self, plan: &StepPlan) -> (StepOutput, Vec<Vec<f32>>) {
        let output = self.ranks.step(plan, &[], true).unwrap();
        let logits = output.logits.as_deref().unwrap().chunks(LIMITS.vocab).map(<[f32]>::to_vec).collect();
        (output, logits)
    }

    /// Copies a state from another replica.
    pub(crate) fn take_state(&mut self, from: &mut Self, source: u32, target: u32) {
        let slices = from.ranks.export_slot(perigee_engine::executor::StateSource::Slot(source)).unwrap();
        self.ranks.import_state(target, &slices).unwrap();
    }

    /// Copies pages from another replica.
    pub(crate) fn take_pages(&mut self, from: &mut Self, spans: &[PageSpan], targets: &[u32]) {
        let slices = from.ranks.export_pages(spans).unwrap();
        let layers = self.ranks.geometry().unwrap().mla_layers as usize;
        let targets = targets.iter().flat_map(|&page| std::iter::repeat_n(page, layers));
        self.ranks.import_pages(&targets.zip(slices).collect::<Vec<_>>()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.ranks.shutdown();
        for thread in self.threads.drain(..) {
            assert!(thread.join().is_ok() || std::thread::panicking(), "a rank panicked");
        }
    }
}

/// A row of a step by its parts.
#[derive(Debug, Clone)]
pub(crate) struct Fed<'a> {
    pub(crate) slots: (u32, u32),
    /// First local position and the pages from there.
    pub(crate) local: (u64, &'a [u32]),
    pub(crate) position: u64,
    pub(crate) tokens: &'a [u32],
}

impl<'a> Fed<'a> {
    /// A row with all its keys here.
    pub(crate) fn local(slot: u32, pages: &'a [u32], position: u64, tokens: &'a [u32]) -> Self {
        Self { slots: (slot, slot), local: (0, pages), position, tokens }
    }
}

/// A step of rows that asks for all logits.
pub(crate) fn feed(rows: &[Fed<'_>]) -> StepPlan {
    let mut batch = StepBatch::default();
    for fed in rows {
        let end = fed.position + fed.tokens.len() as u64;
        let (start, pages) = fed.local;
        let pages = pages[..Segment::pages_for(start, end)].to_vec();
        let (read_slot, write_slot) = fed.slots;
        let segments = vec![Segment { start, end, pages }];
        let tokens = fed.tokens.len() as u32;
        batch.rows.push(Row { tokens, position: fed.position, read_slot, write_slot, segments });
        batch.tokens.extend(fed.tokens);
    }
    batch.logits = (0..batch.tokens.len() as u32).collect();
    StepPlan { batch, remote: RemotePlan::default(), ..StepPlan::default() }
}

/// The tokens of a text that everybody feeds.
pub(crate) fn text(seed: u32, range: Range<u32>) -> Vec<u32> {
    range.map(|place| (place + 1).wrapping_mul(seed.wrapping_mul(2_654_435_761) | 1) % LIMITS.vocab as u32).collect()
}

/// Spans of the pages of a session with so many positions, the first page at position `first`.
pub(crate) fn spans(pages: &[u32], first: u64, end: u64) -> Vec<PageSpan> {
    let starts = (first..end).step_by(64);
    let span = |(first, &page): (u64, &u32)| PageSpan { page, first, positions: (end - first).min(64) as u32 };
    starts.zip(pages).map(span).collect()
}

/// The largest difference of two rows of logits.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() })
        .fold(0.0, f32::max)
}
