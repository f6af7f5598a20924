//! What a leader sends, as the router takes it in. Most of it are tokens with their text, a hundred in a message; those are read
//! where they lie in it, without a value of their own to allocate and to free.

use perigee_proto::codec::{self, buffers};
use perigee_proto::ids::SessionId;
use perigee_proto::internal::{EventBatch, Load, ReplicaMessage, RouterMessage, SessionEvent, replica_message};
use prost::bytes::{Buf, Bytes};
use prost::encoding::{WireType, decode_key, decode_varint};
use prost::{DecodeError, Message};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};

/// Field numbers of `ReplicaMessage`, `EventBatch` and `SessionEvent`.
const BATCH: u32 = 2;
const EVENTS: u32 = 1;
const LOAD: u32 = 2;
const CLOCK: u32 = 3;
const SESSION: u32 = 1;
const EPOCH: u32 = 2;
const CHOICE: u32 = 3;
const INDEX: u32 = 4;
const TOKEN: u32 = 5;
const TEXT: u32 = 6;

/// Bytes of a token's event, about.
const EVENT_BYTES: usize = 64;

/// A message of a leader.
#[derive(Debug)]
pub(crate) enum Inbound {
    /// What one step did.
    Batch(Batch),
    /// Any other.
    Other(Box<ReplicaMessage>),
}

/// A batch of events, not read yet.
#[derive(Debug, Clone)]
pub(crate) struct Batch(Bytes);

/// What one step of a replica did, and its load.
#[derive(Debug, Default)]
pub(crate) struct Contents<'a> {
    pub(crate) events: Vec<Event<'a>>,
    pub(crate) load: Option<Load>,
    /// The leader's clock when it sent the batch.
    pub(crate) clock: u64,
}

/// Something that happened to a session.
#[derive(Debug, PartialEq)]
pub(crate) enum Event<'a> {
    /// A token, its text, and nothing else.
    Token(Token<'a>),
    /// All else.
    Other(Box<SessionEvent>),
}

/// A token of a session and its text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Token<'a> {
    pub(crate) session: &'a str,
    pub(crate) epoch: u64,
    pub(crate) index: u64,
    pub(crate) token: u32,
    pub(crate) text: &'a str,
}

impl Inbound {
    /// Reads a `ReplicaMessage`.
    fn decode(mut message: Bytes) -> Result<Self, DecodeError> {
        let mut rest = &message[..];
        // A batch and nothing else is what leaders send, unless they know fields that this router does not.
        if let Ok((BATCH, WireType::LengthDelimited)) = decode_key(&mut rest)
            && decode_varint(&mut rest)? == rest.len() as u64
        {
            message.advance(message.len() - rest.len());
            return Ok(Self::Batch(Batch(message)));
        }
        let message = ReplicaMessage::decode(message)?;
        Ok(match &message.body {
            Some(replica_message::Body::Batch(batch)) => Self::Batch(Batch(batch.encode_to_vec().into())),
            _ => Self::Other(Box::new(message)),
        })
    }
}

impl Batch {
    /// Bytes that it has.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Reads it.
    ///
    /// # Errors
    /// Bytes that are no `EventBatch`.
    pub(crate) fn read(&self) -> Result<Contents<'_>, DecodeError> {
        if let Some(contents) = Contents::read(&self.0) {
            return Ok(contents);
        }
        // Broken, or of a newer version; prost tells which.
        let EventBatch { events, load, clock } = EventBatch::decode(&self.0[..])?;
        let events = events.into_iter().map(|event| Event::Other(Box::new(event))).collect();
        Ok(Contents { events, load, clock })
    }
}

impl<'a> Contents<'a> {
    fn read(mut batch: &'a [u8]) -> Option<Self> {
        let mut read = Self { events: Vec::with_capacity(batch.len() / EVENT_BYTES), ..Self::default() };
        while !batch.is_empty() {
            match decode_key(&mut batch).ok()? {
                (EVENTS, WireType::LengthDelimited) => read.events.push(Event::read(take(&mut batch)?)?),
                // A second one would add to the first.
                (LOAD, WireType::LengthDelimited) if read.load.is_none() => {
                    read.load = Some(Load::decode(take(&mut batch)?).ok()?)
                }
                (CLOCK, WireType::Varint) => read.clock = decode_varint(&mut batch).ok()?,
                _ => return None,
            }
        }
        Some(read)
    }
}

impl<'a> Event<'a> {
    fn read(event: &'a [u8]) -> Option<Self> {
        match Token::read(event) {
            Some(token) => Some(Self::Token(token)),
            None => Some(Self::Other(Box::new(SessionEvent::decode(event).ok()?))),
        }
    }

    /// The session's number; none where it has another name than routers give.
    pub(crate) fn session(&self) -> Option<u128> {
        SessionId::number(match self {
            Self::Token(token) => token.session,
            Self::Other(event) => &event.session,
        })
    }
}

impl<'a> Token<'a> {
    /// The token that a `SessionEvent` is, if that is all it is.
    fn read(mut event: &'a [u8]) -> Option<Self> {
        let mut token = None;
        let mut read = Self { session: "", epoch: 0, index: 0, token: 0, text: "" };
        while !event.is_empty() {
            match decode_key(&mut event).ok()? {
                (SESSION, WireType::LengthDelimited) => read.session = text(&mut event)?,
                (EPOCH, WireType::Varint) => read.epoch = decode_varint(&mut event).ok()?,
                // Which choice it is, this router knows by the session.
                (CHOICE, WireType::Varint) => drop(decode_varint(&mut event).ok()?),
                (INDEX, WireType::Varint) => read.index = decode_varint(&mut event).ok()?,
                (TOKEN, WireType::Varint) => token = Some(decode_varint(&mut event).ok()? as u32),
                (TEXT, WireType::LengthDelimited) => read.text = text(&mut event)?,
                _ => return None,
            }
        }
        Some(Self { token: token?, ..read })
    }

    /// The same as a value of its own.
    pub(crate) fn to_event(self) -> SessionEvent {
        SessionEvent {
            session: self.session.to_owned(),
            epoch: self.epoch,
            index: self.index,
            token: Some(self.token),
            text: self.text.to_owned(),
            ..SessionEvent::default()
        }
    }
}

/// Takes a field with its length in front.
fn take<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(decode_varint(from).ok()?).ok()?;
    let (field, rest) = from.split_at_checked(length)?;
    *from = rest;
    Some(field)
}

fn text<'a>(from: &mut &'a [u8]) -> Option<&'a str> {
    std::str::from_utf8(take(from)?).ok()
}

/// The codec that this would be if it read nothing itself.
type Plain = codec::Codec<RouterMessage, ReplicaMessage>;

/// The codec of the stream to a leader.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AttachCodec;

impl Codec for AttachCodec {
    type Encode = RouterMessage;
    type Decode = Inbound;
    type Encoder = <Plain as Codec>::Encoder;
    type Decoder = InboundDecoder;

    fn encoder(&mut self) -> Self::Encoder {
        Plain::default().encoder()
    }

    fn decoder(&mut self) -> InboundDecoder {
        InboundDecoder
    }
}

/// Reads messages of leaders.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InboundDecoder;

impl Decoder for InboundDecoder {
    type Item = Inbound;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Inbound>, Status> {
        let message = from.copy_to_bytes(from.remaining());
        Inbound::decode(message).map(Some).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        buffers()
    }
}

#[cfg(test)]
mod tests {
    use perigee_proto::internal::{Counts, Finish, Position};
    use proptest::prelude::*;

    use super::*;

    fn inbound(message: &ReplicaMessage) -> Inbound {
        Inbound::decode(message.encode_to_vec().into()).expect("a message")
    }

    fn batch(events: Vec<SessionEvent>) -> ReplicaMessage {
        let load = Some(Load { running: 3, step_ms: 1.5, ..Load::default() });
        ReplicaMessage { body: Some(replica_message::Body::Batch(EventBatch { events, load, clock: 77 })) }
    }

    fn event() -> impl Strategy<Value = SessionEvent> {
        let numbers = (any::<u64>(), 0..3u32, any::<u64>(), proptest::option::of(any::<u32>()));
        let rest = (proptest::bool::weighted(0.1), proptest::bool::weighted(0.1), proptest::bool::weighted(0.1));
        (any::<u128>(), numbers, "\\PC{0,20}", rest).prop_map(|(bits, (epoch, choice, index, token), text, rest)| {
            let session = SessionId::from_random((bits >> 64) as u64, bits as u64).to_string();
            let mut event = SessionEvent { session, epoch, choice, index, token, text, ..SessionEvent::default() };
            let (ends, has_logprobs, fails) = rest;
            if ends {
                event.set_finish(Finish::Stop);
                event.usage = Some(Box::new(Counts { prompt: 1, completion: 2, cached: 0 }));
            }
            if has_logprobs {
                event.logprobs = Some(Box::new(Position { has_chosen: true, ids: vec![1], logprobs: vec![-1.0] }));
            }
            if fails {
                event.error = "why".to_owned();
            }
            event
        })
    }

    proptest! {
        #[test]
        fn a_batch_is_read_as_protobuf_has_it(events in proptest::collection::vec(event(), 0..20)) {
            let message = batch(events.clone());
            let Inbound::Batch(read) = inbound(&message) else { panic!("a batch") };
            let Contents { events: read, load, clock } = read.read().expect("a batch");
            prop_assert_eq!((load.map(|load| load.running), clock), (Some(3), 77));
            prop_assert_eq!(read.len(), events.len());
            for (read, expected) in read.into_iter().zip(events) {
                prop_assert_eq!(read.session(), SessionId::number(&expected.session));
                let is_token = expected.token.is_some()
                    && expected.finish == 0
                    && expected.logprobs.is_none()
                    && expected.error.is_empty();
                let read = match read {
                    Event::Token(token) => {
                        prop_assert!(is_token);
                        SessionEvent { choice: expected.choice, ..token.to_event() }
                    }
                    Event::Other(event) => {
                        prop_assert!(!is_token);
                        *event
                    }
                };
                prop_assert_eq!(read, expected);
            }
        }

        #[test]
        fn no_bytes_are_read_otherwise_than_by_prost(
            mut bytes in proptest::collection::vec(event(), 1..4).prop_map(|events| {
                let Some(replica_message::Body::Batch(batch)) = batch(events).body else { panic!("a batch") };
                batch.encode_to_vec()
            }),
            at in any::<proptest::sample::Index>(),
            with in any::<u8>(),
            cut in proptest::bool::ANY,
        ) {
            let at = at.index(bytes.len());
            bytes[at] = with;
            if cut {
                bytes.truncate(at);
            }
            let expected = EventBatch::decode(&bytes[..]);
            match (Batch(bytes.clone().into()).read(), expected) {
                (Ok(read), Ok(expected)) => {
                    prop_assert_eq!((read.load, read.clock), (expected.load, expected.clock));
                    let events = read.events.into_iter().zip(&expected.events).map(|(event, expected)| match event {
                        Event::Token(token) => SessionEvent { choice: expected.choice, ..token.to_event() },
                        Event::Other(event) => *event,
                    });
                    prop_assert_eq!(events.collect::<Vec<_>>(), expected.events.clone());
                }
                (Err(_), Err(_)) => {}
                (read, expected) => panic!("{read:?} where prost has {expected:?}"),
            }
        }
    }

    #[test]
    fn what_a_newer_version_adds_is_passed_over() {
        let mut bytes =
            batch(vec![SessionEvent { session: "s".to_owned(), token: Some(1), ..SessionEvent::default() }])
                .encode_to_vec();
        let unknown = [31 << 3, 5];
        // In the message, beside the batch.
        bytes.extend([31 << 3 | 0x80, 1, 5]);
        let Ok(Inbound::Batch(read)) = Inbound::decode(bytes.into()) else { panic!("a batch") };
        assert_eq!(read.read().expect("a batch").events.len(), 1);
        // In the batch itself.
        let batch = Batch([read.0.as_ref(), &[31 << 3 & 0x7f | 0x80, 1, 5]].concat().into());
        assert_eq!(batch.read().expect("a batch").events.len(), 1);
        let _ = unknown;
    }

    #[test]
    fn other_messages_are_as_they_are_and_broken_ones_are_errors() {
        let refused = replica_message::Body::Refused(perigee_proto::internal::Refused::default());
        let message = ReplicaMessage { body: Some(refused) };
        assert!(matches!(inbound(&message), Inbound::Other(other) if *other == message));
        assert!(matches!(inbound(&ReplicaMessage { body: None }), Inbound::Other(other) if other.body.is_none()));
        assert!(Inbound::decode(Bytes::from_static(&[0xff])).is_err());
        // A batch longer than its message.
        assert!(Inbound::decode(Bytes::from_static(&[2 << 3 | 2, 9, 0])).is_err());
        assert!(Batch(Bytes::from_static(&[1 << 3 | 2, 9])).read().is_err());
    }
}
