//! The source's side of one handoff, outside the step loop: parts come from the engine, chunks leave for the target. It
//! encodes, and holds the target's answer against the digests of what was sent.

use std::sync::mpsc;
use std::time::Duration;

use perigee_migration::handoff::{CHUNK_BYTES, Frozen, Summary, Totals};
use perigee_migration::{
    HandoffEncoder, HandoffError, Header, HeldState, PageSlice, SegmentTable, StateSlice, TensorDigests,
};
use perigee_trace::{TraceContext, Traced};
use tokio::sync::{mpsc as async_mpsc, oneshot};

use super::{Demand, Room};
use crate::handle::Command;
use crate::request::SessionId;

/// How often the engine is asked how far a state is that goes by a pair.
const UNDERWAY: Duration = Duration::from_millis(1);

/// What the engine hands in, in this order.
#[derive(Debug)]
pub(crate) enum SourcePart {
    /// Token ids, in one run before the freeze and another after it.
    Tokens(Vec<u32>),
    /// The record, and where latents are that do not come along.
    Frozen(Frozen, SegmentTable),
    /// State.
    State(Vec<StateSlice>),
    /// State that the target takes out of its slot.
    Held(HeldState),
    /// State is on its way by a pair; the engine is to be asked again how far it is.
    Underway,
    /// Pages.
    Pages(Vec<PageSlice>),
    /// That was all.
    End,
}

/// A handoff on its way out. Whoever carries it takes chunks until there are none and then says what the target answered;
/// one that is dropped before is a handoff that failed.
#[derive(Debug)]
pub struct Outgoing {
    session: SessionId,
    next: u64,
    commands: mpsc::Sender<Command>,
    parts: async_mpsc::UnboundedReceiver<SourcePart>,
    demand: Demand,
    /// The target's word that it has room, and the way for whoever carries it.
    room: oneshot::Receiver<Room>,
    tell_room: Option<oneshot::Sender<Room>>,
    /// Whether the engine is to be asked how far a state is.
    asks: bool,
    encoder: HandoffEncoder,
    summary: Option<Summary>,
    stage: Stage,
    failure: Option<String>,
    /// Its span, where the session is in a trace.
    traced: Option<Traced>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Header and first tokens are to be sent.
    Opening,
    /// They are out; the target is still to say that it has room.
    Asking,
    /// The engine was told that the session may be frozen.
    Opened,
    /// The engine knows how it ended.
    Answered,
}

impl Outgoing {
    /// A handoff with this header of a session that needs so much, and the way to hand parts in. Dropping that way cancels
    /// it.
    ///
    /// # Errors
    /// The header contradicts itself.
    pub(crate) fn new(
        header: Header,
        demand: Demand,
        commands: mpsc::Sender<Command>,
        traced: Option<Traced>,
    ) -> Result<(Self, async_mpsc::UnboundedSender<SourcePart>), HandoffError> {
        let (sender, parts) = async_mpsc::unbounded_channel();
        let (session, next) = (SessionId(header.session.clone()), header.next_epoch);
        let encoder = HandoffEncoder::new(header, CHUNK_BYTES)?;
        let (tell_room, room) = oneshot::channel();
        let outgoing = Self {
            session,
            next,
            commands,
            parts,
            demand,
            room,
            tell_room: Some(tell_room),
            asks: false,
            encoder,
            summary: None,
            stage: Stage::Opening,
            failure: None,
            traced,
        };
        Ok((outgoing, sender))
    }

    /// The session that is handed over.
    pub fn session(&self) -> &SessionId {
        &self.session
    }

    /// What the target is asked to keep free for it, to be said before the first bytes.
    pub fn demand(&self) -> Demand {
        self.demand.clone()
    }

    /// The way to say that the target has room, and how the state is to come: the session stands still only then. It is given
    /// out once.
    pub fn on_room(&mut self) -> Option<oneshot::Sender<Room>> {
        self.tell_room.take()
    }

    /// The place in the request's trace that the target goes on from.
    pub fn trace(&self) -> Option<&TraceContext> {
        self.traced.as_ref().and_then(Traced::parent)
    }

    /// The next bytes for the target. None when that was all, or when the handoff is off: see [`Self::is_cancelled`].
    pub async fn next_chunk(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(chunk) = self.encoder.next_chunk() {
                return Some(chunk);
            }
            if self.summary.is_some() || self.failure.is_some() {
                return None;
            }
            if self.gather() {
                continue;
            }
            tokio::select! {
                told = &mut self.room, if self.stage == Stage::Asking => match told {
                    Ok(room) => {
                        self.stage = Stage::Opened;
                        let (session, next) = (self.session.clone(), self.next);
                        self.send(Command::HandoffOpened { session, next, room });
                    }
                    Err(_) => self.failure = Some("the target did not say that it has room".into()),
                },
                () = tokio::time::sleep(UNDERWAY), if self.asks => {
                    self.asks = false;
                    let (session, next) = (self.session.clone(), self.next);
                    self.send(Command::HandoffUnderway { session, next });
                }
                part = self.parts.recv() => match part {
                    Some(part) => self.take(part),
                    None => self.failure = Some("it was called off".into()),
                },
            }
        }
    }

    /// Encodes what was handed in until there is a chunk of it; whether there is one, or the end. Parts that are there together
    /// leave together: each chunk is a turn of the target's engine, and the session stands still meanwhile.
    fn gather(&mut self) -> bool {
        while self.failure.is_none() && !self.encoder.has_chunk() {
            match self.parts.try_recv() {
                Ok(part) => self.take(part),
                Err(_) => {
                    // The header waits for the first tokens.
                    if self.stage != Stage::Opening {
                        self.encoder.flush();
                    }
                    break;
                }
            }
        }
        self.encoder.has_chunk() || self.failure.is_some()
    }

    fn take(&mut self, part: SourcePart) {
        if let Err(error) = self.encode(part) {
            self.failure = Some(error.to_string());
        }
    }

    /// Whether the handoff is off. The call to the target must then break, not end: what arrived is no session.
    pub fn is_cancelled(&self) -> bool {
        self.summary.is_none() && (self.failure.is_some() || self.parts.is_closed())
    }

    /// What the target answered: the digests over its slot and pages, or why it refused.
    pub fn answer(mut self, answer: Result<Vec<u64>, String>) {
        let result = answer.and_then(|numbers| self.compare(&numbers));
        self.tell(result);
    }

    fn encode(&mut self, part: SourcePart) -> Result<(), HandoffError> {
        match part {
            SourcePart::Tokens(tokens) => {
                self.encoder.tokens(&tokens)?;
                if self.stage == Stage::Opening {
                    self.stage = Stage::Asking;
                }
            }
            SourcePart::Frozen(frozen, table) => self.encoder.freeze(&frozen, &table)?,
            SourcePart::State(slices) => slices.iter().try_for_each(|slice| self.encoder.state(slice))?,
            SourcePart::Held(held) => self.encoder.held(&held)?,
            SourcePart::Underway => self.asks = true,
            SourcePart::Pages(slices) => slices.iter().try_for_each(|slice| self.encoder.page(slice))?,
            SourcePart::End => self.summary = Some(self.encoder.finish()?),
        }
        Ok(())
    }

    fn compare(&self, numbers: &[u64]) -> Result<Totals, String> {
        let Some(summary) = &self.summary else {
            let reason = self.failure.as_deref().unwrap_or("it ended early");
            return Err(format!("the handoff was not complete: {reason}"));
        };
        let found = TensorDigests::from_numbers(self.encoder.geometry(), numbers).map_err(|error| error.to_string())?;
        summary.digests.compare(&found).map_err(|error| error.to_string())?;
        Ok(summary.totals)
    }

    fn tell(&mut self, result: Result<Totals, String>) {
        if self.stage == Stage::Answered {
            return;
        }
        self.stage = Stage::Answered;
        // Why it could not be sent says more than what the target makes of half a handoff.
        let result = result.map_err(|message| self.failure.take().unwrap_or(message));
        if let (Some(traced), Err(message)) = (&self.traced, &result) {
            traced.fail(message);
        }
        let (session, next) = (self.session.clone(), self.next);
        self.send(Command::HandoffDone { session, next, result });
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::debug!("a handoff outlived its engine");
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.tell(Err("the connection to the target broke".into()));
    }
}
