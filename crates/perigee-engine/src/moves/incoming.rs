//! The target's side of one handoff, outside the step loop: bytes come from the source, parts go to the engine as soon as
//! they are whole. What is reserved for them and whether they are taken is the engine's decision.

use std::sync::{Arc, mpsc};

use perigee_migration::handoff::{Expected, Frozen, Summary};
use perigee_migration::{HandoffDecoder, Header, Part, SegmentTable};
use perigee_text::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarSource};
use tokio::sync::oneshot;

use super::pairs::ArrivingPair;
use super::record::Record;
use super::{Demand, HandoffRefused, Room};
use crate::cache::{HomePages, SlotPair};
use crate::executor::PageSpan;
use crate::handle::Command;
use crate::request::SessionId;
use crate::scheduler::TaskId;

/// A session that arrived and is held, without being stepped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The session.
    pub session: String,
    /// Its epoch, once it is started.
    pub epoch: u64,
    /// Digests over the slot and the pages here, as numbers, in the order of the handoff.
    pub digests: Vec<u64>,
}

/// A handoff on its way in. Dropped before [`Self::finish`] it is a handoff that broke off, and nothing of it stays.
pub struct Incoming {
    commands: mpsc::Sender<Command>,
    grammars: Option<Arc<GrammarCompiler>>,
    /// What has arrived of the session's tokens.
    tokens: Vec<u32>,
    /// The session's grammar, which is made while the state arrives; none for a session without one.
    grammar: Option<oneshot::Receiver<Result<Grammar, GrammarError>>>,
    decoder: Option<HandoffDecoder>,
    demand: Demand,
    /// Session and epoch, once the header is here.
    offered: Option<(SessionId, u64)>,
    /// How the state is to come.
    room: Room,
}

impl Incoming {
    /// A handoff of which nothing has arrived; without `expected` none is taken.
    pub(crate) fn new(
        commands: mpsc::Sender<Command>,
        expected: Option<Expected>,
        grammars: Option<Arc<GrammarCompiler>>,
    ) -> Self {
        // The engine judges epochs itself, with the session's whole story.
        let decoder = expected.map(|expected| HandoffDecoder::new(expected, |_| 0));
        let demand = Demand::default();
        Self {
            commands,
            grammars,
            tokens: Vec::new(),
            grammar: None,
            decoder,
            demand,
            offered: None,
            room: Room::default(),
        }
    }

    /// What the source asks for, before the first bytes. Without it a slot is all that is kept free from the beginning.
    pub fn demands(&mut self, demand: Demand) {
        self.demand = demand;
    }

    /// Whether there is room for the session here, and it is reserved.
    pub fn has_room(&self) -> bool {
        self.offered.is_some()
    }

    /// How the state is to come, which its source must hear.
    pub fn room(&self) -> Room {
        self.room
    }

    /// Takes the next bytes, cut anywhere. Returns once they are where they belong, so that a source cannot send faster.
    ///
    /// # Errors
    /// The handoff is refused: nothing more should be sent.
    pub async fn push(&mut self, bytes: &[u8]) -> Result<(), HandoffRefused> {
        let decoder = self.decoder.as_mut().ok_or(HandoffRefused::NotOffered)?;
        let mut parts = decoder.push(bytes)?;
        if self.offered.is_none()
            && let Some(Part::Header(header)) = parts.first().cloned()
        {
            parts.remove(0);
            let (session, next) = (SessionId(header.session.clone()), header.next_epoch);
            // Noted before the answer: a source that is lost meanwhile must not leave a reservation behind.
            self.offered = Some((session, next));
            let demand = std::mem::take(&mut self.demand);
            let answer = self.ask(|reply| Command::HandoffOffer { header: Box::new(header), demand, reply }).await;
            if answer.is_err() {
                self.offered = None;
            }
            self.room = answer?;
        }
        if parts.is_empty() {
            return Ok(());
        }
        self.note(&parts)?;
        let (session, next) = self.offered.clone().ok_or(HandoffRefused::NotOffered)?;
        self.ask(|reply| Command::HandoffParts { session, next, parts, reply }).await
    }

    /// The stream ended in order: verifies what is in slot and pages now.
    ///
    /// # Errors
    /// The handoff is refused.
    pub async fn finish(mut self) -> Result<Prepared, HandoffRefused> {
        let summary = self.decoder.take().ok_or(HandoffRefused::NotOffered)?.finish()?;
        let (session, next) = self.offered.clone().ok_or(HandoffRefused::NotOffered)?;
        let name = session.0.clone();
        let (summary, grammar) = (Box::new(summary), self.followed_grammar().await?.map(Box::new));
        let digests = self.ask(|reply| Command::HandoffVerify { session, next, summary, grammar, reply }).await?;
        // From here on the router decides.
        self.offered = None;
        Ok(Prepared { session: name, epoch: next, digests })
    }

    /// Looks for tokens and a grammar in what goes to the engine.
    fn note(&mut self, parts: &[Part]) -> Result<(), HandoffRefused> {
        for part in parts {
            match part {
                Part::Tokens(tokens) => self.tokens.extend_from_slice(tokens),
                // All tokens have come before it.
                Part::Frozen(frozen) => {
                    let sequence = Record::decode(&frozen.record)?.sequence;
                    if let Some(source) = sequence.grammar {
                        let drawn = self.tokens.get(sequence.prompt_length as usize..).unwrap_or_default().to_vec();
                        self.grammar = Some(self.make(source, drawn)?);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes a grammar and has it follow what was drawn, on a thread of its own: neither the step loop nor the tasks that
    /// carry streams wait for it.
    fn make(
        &self,
        source: GrammarSource,
        drawn: Vec<u32>,
    ) -> Result<oneshot::Receiver<Result<Grammar, GrammarError>>, HandoffRefused> {
        let refused = |why: String| HandoffRefused::Grammar(why);
        let compiler = self.grammars.clone().ok_or_else(|| refused("this replica makes none".into()))?;
        let (sender, made) = oneshot::channel();
        let work = move || {
            // Nobody waits where the handoff broke off.
            let _ = sender.send(compiler.compile_after(&source, &drawn));
        };
        let thread = std::thread::Builder::new().name("perigee-grammar".into()).spawn(work);
        thread.map_err(|error| refused(error.to_string()))?;
        Ok(made)
    }

    async fn followed_grammar(&mut self) -> Result<Option<Grammar>, HandoffRefused> {
        let Some(made) = self.grammar.take() else { return Ok(None) };
        let made = made.await.map_err(|_| HandoffRefused::Grammar("its thread ended".into()))?;
        made.map(Some).map_err(|error| HandoffRefused::Grammar(error.to_string()))
    }

    async fn ask<T>(&mut self, question: impl FnOnce(Reply<T>) -> Command) -> Result<T, HandoffRefused> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(question(reply)).map_err(|_| HandoffRefused::Stopped)?;
        answer.await.unwrap_or(Err(HandoffRefused::Stopped))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some((session, next)) = self.offered.take()
            && self.commands.send(Command::HandoffBroken { session, next }).is_err()
        {
            tracing::debug!("a handoff outlived its engine");
        }
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Incoming").field("offered", &self.offered).finish_non_exhaustive()
    }
}

/// An answer to a part of a handoff.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, HandoffRefused>>;

/// What is here of a session that arrives.
#[derive(Debug)]
pub(crate) struct Arriving {
    pub(crate) task: TaskId,
    pub(crate) slots: SlotPair,
    /// Pages that were taken for it before it stood still, until it is known which positions they are for.
    pub(crate) reserved: Vec<u32>,
    pub(crate) header: Header,
    pub(crate) tokens: Vec<u32>,
    pub(crate) frozen: Option<Frozen>,
    pub(crate) record: Option<Record>,
    /// Segments that stay elsewhere.
    pub(crate) table: SegmentTable,
    /// Pages by number: position / 64. Those that came back are the home entry's.
    pub(crate) pages: HomePages,
    /// What arrived in pages.
    pub(crate) spans: Vec<PageSpan>,
    pub(crate) summary: Option<Summary>,
    /// Where it is in its grammar.
    pub(crate) grammar: Option<Box<Grammar>>,
    /// The source's slots, while they are open here.
    pub(crate) source_slots: Option<Vec<Vec<u8>>>,
    /// The pair by which the state is to come.
    pub(crate) pair: Option<ArrivingPair>,
}
