//! What the engine's tests share: an engine driven by hand with its events collected per session, a tokenizer, and a
//! seeded source of numbers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use perigee_engine::executor::Executor;
use perigee_engine::request::{EventBatch, PositionLogprobs, Request, RouterId, SessionEvent, SessionId};
use perigee_engine::testing::{ModelCounters, ModelExecutor};
use perigee_engine::{Engine, EngineConfig, EngineCore, EngineHandle, Turn};
use perigee_text::{GenerationConfig, SpecialIds, Tokenizer, byte_level_tokenizer};
use tokio::sync::mpsc::UnboundedReceiver;

pub(crate) const ROUTER: RouterId = RouterId(1);
/// The end-of-sequence token of the modelled vocabulary.
pub(crate) const EOS: u32 = 257;

/// What became of a session, as a client would put it together.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<Option<PositionLogprobs>>,
    pub(crate) prompt_logprobs: Option<Vec<Option<PositionLogprobs>>>,
    /// The last event.
    pub(crate) end: Option<SessionEvent>,
}

impl Answer {
    pub(crate) fn reason(&self) -> perigee_engine::request::FinishReason {
        self.end.as_ref().expect("the session ended").finish.unwrap()
    }
}

/// An engine driven by hand, and every event that it sent.
pub(crate) struct Driver {
    pub(crate) core: EngineCore,
    pub(crate) handle: EngineHandle,
    pub(crate) counters: Arc<ModelCounters>,
    pub(crate) answers: BTreeMap<SessionId, Answer>,
    /// Output tokens that a session had before: its first index.
    pub(crate) delivered: BTreeMap<SessionId, u64>,
    events: UnboundedReceiver<EventBatch>,
}

impl Driver {
    pub(crate) fn new(executor: ModelExecutor, config: EngineConfig) -> Self {
        let counters = executor.counters();
        Self::over(Box::new(executor), counters, config)
    }

    pub(crate) fn over(executor: Box<dyn Executor>, counters: Arc<ModelCounters>, config: EngineConfig) -> Self {
        let (core, handle) = Engine::by_hand(executor, config).unwrap();
        let events = handle.attach(ROUTER);
        Self { core, handle, counters, answers: BTreeMap::new(), delivered: BTreeMap::new(), events }
    }

    pub(crate) fn submit(&mut self, request: &Request) {
        for session in &request.sessions {
            self.delivered.insert(session.clone(), request.delivered.len() as u64);
        }
        self.handle.submit(ROUTER, request.clone()).unwrap();
    }

    /// One turn; its events are checked for order and added to the answers.
    pub(crate) fn turn(&mut self) -> Turn {
        let turn = self.core.turn();
        if turn != Turn::Stopped {
            self.core.audit().unwrap();
        }
        while let Ok(batch) = self.events.try_recv() {
            for event in batch.events {
                self.take(event);
            }
        }
        turn
    }

    /// Turns until nothing is left to do.
    pub(crate) fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.turn() != Turn::Stepped {
                return;
            }
        }
        panic!("the engine is not done after 100000 turns: {:?}", self.core.load());
    }

    pub(crate) fn answer(&self, session: &str) -> &Answer {
        &self.answers[&SessionId(session.to_owned())]
    }

    /// Slots, pages and host memory are as before the first request.
    pub(crate) fn assert_nothing_is_held(&self) {
        let load = self.core.load();
        assert_eq!((load.running, load.waiting, load.parked, load.queued_tokens), (0, 0, 0, 0));
        assert_eq!((load.slots_free, load.pages_free), (load.slots_total, load.pages_total));
        assert_eq!(self.counters.parked_now.load(std::sync::atomic::Ordering::Relaxed), 0);
    }

    fn take(&mut self, event: SessionEvent) {
        let first = self.delivered.get(&event.session).copied().unwrap_or(0);
        let answer = self.answers.entry(event.session.clone()).or_default();
        assert!(answer.end.is_none(), "an event after the end: {event:?}");
        assert_eq!(event.index, first + answer.tokens.len() as u64, "a gap or a repeat");
        if let Some(token) = event.token {
            answer.tokens.push(token);
            answer.logprobs.push(event.logprobs.clone());
        }
        answer.text.push_str(&event.text);
        if event.prompt_logprobs.is_some() {
            assert!(answer.tokens.len() <= 1, "prompt logprobs come with the first event");
            answer.prompt_logprobs.clone_from(&event.prompt_logprobs);
        }
        if event.finish.is_some() {
            answer.end = Some(event);
        }
    }
}

/// Bytes are tokens 0 to 255; [`EOS`] is special.
pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let make = || {
        let special = SpecialIds { bos: Some(256), eos: Some(EOS), pad: None };
        let json = serde_json::to_vec(&byte_level_tokenizer(300, special).unwrap()).unwrap();
        let path = PathBuf::from("tokenizer.json");
        Arc::new(Tokenizer::from_json(&json, path, GenerationConfig::default()).unwrap())
    };
    Arc::clone(TOKENIZER.get_or_init(make))
}

pub(crate) fn config() -> EngineConfig {
    EngineConfig { eos_token_ids: vec![EOS], tokenizer: Some(tokenizer()), ..EngineConfig::default() }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}
