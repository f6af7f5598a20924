//! A replica of one rank, driven step by step, and a network of one home within the process: what a question travels over does
//! not matter here.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use perigee_backend::{Backend, LatentReader, Row, Segment, StepBatch};
use perigee_engine::cache::HomePages;
use perigee_engine::executor::{ExecutorLimits, PageSpan, StepPlan};
use perigee_engine::homes::{AnswerModel, HomeDirectory};
use perigee_engine::protocol::ForcedExperts;
use perigee_engine::rank::{Rank, RankShape};
use perigee_engine::ranks::{Ranks, Trace};
use perigee_engine::remote::{AttentionClient, RemoteHome, RemotePlan, RemoteRanges, RemoteRow};
use perigee_model::{Model, StepLimits, WeightSource};

/// Positions of a page.
pub(crate) const PAGE: u64 = 64;
/// Tokens of a prompt in one step.
pub(crate) const CHUNK: u32 = 256;
/// The session's name at its home.
pub(crate) const SESSION: &str = "moved";

pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

/// Homes that answer when they are asked.
#[derive(Clone)]
pub(crate) struct Home {
    pub(crate) directory: HomeDirectory,
    pub(crate) reader: Arc<dyn LatentReader>,
    pub(crate) model: AnswerModel,
}

struct Client {
    home: Home,
    answers: Vec<Option<Vec<u8>>>,
}

impl AttentionClient for Client {
    fn ask(&mut self, _: &RemoteHome, message: Vec<u8>) {
        let Home { directory, reader, model } = &self.home;
        self.answers.push(directory.answer(&**reader, model, &message).ok());
    }

    fn collect(&mut self, _: Instant) -> Vec<Option<Vec<u8>>> {
        std::mem::take(&mut self.answers)
    }

    fn is_overdue(&self, _: &RemoteHome) -> bool {
        false
    }
}

/// Where a session lies.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    /// Slot that its next step reads, and the one that it writes.
    pub(crate) slots: (u32, u32),
    /// Position of the first page, and the pages from there.
    pub(crate) first: u64,
    pub(crate) pages: Vec<u32>,
    /// What is elsewhere.
    pub(crate) remote: RemotePlan,
}

pub(crate) struct Replica<B: Backend> {
    pub(crate) ranks: Ranks<B>,
    pub(crate) vocab: usize,
}

impl<B: Backend> Replica<B> {
    /// Loads the model; `home` answers for what is not here.
    pub(crate) fn open(
        mut backend: B,
        source: &WeightSource,
        pages: usize,
        home: Option<&Home>,
        fills: bool,
    ) -> Outcome<Self> {
        let (slots, rows, vocab) = (4, 4, source.config().vocab);
        let step_tokens = CHUNK as usize;
        let limits = StepLimits { tokens: step_tokens, logits: rows };
        let model = Model::load(&mut backend, source, (0, 1), limits, &mut |_, _| {})?;
        let max_model_len = pages * PAGE as usize;
        let limits = ExecutorLimits { vocab, slots, pages, step_tokens, step_rows: rows, max_model_len };
        let cache = source.config().cache_shape(1, slots, pages);
        let mut rank = Rank::new(backend, model, RankShape { rank: 0, cache, limits })?;
        if let Some(home) = home {
            let client = Client { home: home.clone(), answers: Vec::new() };
            rank.set_attention(Box::new(client), home.model.shape);
        }
        if fills {
            rank.fill_prompts(u64::MAX);
        }
        Ok(Self { ranks: Ranks::new(rank, Vec::new(), Duration::from_secs(60))?, vocab })
    }

    /// What answers for this replica.
    pub(crate) fn home(&self) -> Outcome<Home> {
        let reader = self.ranks.latent_reader().ok_or("this backend answers nobody")?;
        Ok(Home { directory: HomeDirectory::new(), reader, model: self.ranks.answer_model() })
    }

    /// Runs a step op by op and gives the last token's logits, with the experts that it chose, by layer.
    pub(crate) fn traced(&mut self, plan: &StepPlan, forced: &ForcedExperts) -> Outcome<(Vec<f32>, ForcedExperts)> {
        let mut trace = Trace::default();
        let logits = self.ranks.forward(plan, forced, Some(&mut trace))?;
        Ok((logits, trace.experts.into_iter().map(|(layer, chosen)| (layer as u32, chosen)).collect()))
    }

    /// Feeds a prompt in chunks with the experts of each, or its own choice, which is what comes back.
    pub(crate) fn begin(
        &mut self,
        seat: &Seat,
        prompt: &[u32],
        forced: &[ForcedExperts],
    ) -> Outcome<Vec<ForcedExperts>> {
        let mut chosen = Vec::new();
        for (number, chunk) in prompt.chunks(CHUNK as usize).enumerate() {
            let position = u64::from(CHUNK) * number as u64;
            let mut plan = fed(seat, position, chunk);
            if number == 0 {
                plan.clear_slots = vec![seat.slots.0];
            }
            let free = ForcedExperts::new();
            chosen.push(self.traced(&plan, forced.get(number).unwrap_or(&free))?.1);
        }
        Ok(chosen)
    }
}

/// A step of one row that wants the logits of its last token.
pub(crate) fn fed(seat: &Seat, position: u64, tokens: &[u32]) -> StepPlan {
    let end = position + tokens.len() as u64;
    let pages = seat.pages[..Segment::pages_for(seat.first, end)].to_vec();
    let row = Row {
        tokens: tokens.len() as u32,
        position,
        read_slot: seat.slots.0,
        write_slot: seat.slots.1,
        segments: vec![Segment { start: seat.first, end, pages }],
    };
    let batch = StepBatch { tokens: tokens.to_vec(), rows: vec![row], logits: vec![tokens.len() as u32 - 1] };
    StepPlan { batch, remote: seat.remote.clone(), ..StepPlan::default() }
}

/// A row whose first `pages` pages are at the home.
pub(crate) fn asks(pages: u64) -> RemotePlan {
    let home = RemoteHome { replica: "home".into(), incarnation: "1".into(), endpoint: "home:1".into() };
    let part = RemoteRanges { home: 0, ranges: std::iter::once(0..pages * PAGE).collect() };
    let row = RemoteRow { row: 0, session: SESSION.into(), epoch: 2, parts: vec![part] };
    RemotePlan { homes: vec![home], rows: vec![row], patience_ms: 60_000 }
}

/// The first pages of a session, to be answered for.
pub(crate) fn kept(pages: &[u32]) -> HomePages {
    HomePages { pages: vec![(0, pages.to_vec())] }
}

/// The unfilled last page.
pub(crate) fn partial(page: u32, end: u64) -> PageSpan {
    PageSpan { page, first: end / PAGE * PAGE, positions: (end % PAGE) as u32 }
}
