//! What waits for a client to read it: events of one stream, merged where they carry no token of their own, and bounded in
//! bytes. A slow reader fills its own buffer and nobody else's.

use std::collections::VecDeque;
use std::sync::Arc;

use perigee_proto::internal::{Finish, Position, SessionEvent};

/// Events in order, each with the name of the replica that it came from.
#[derive(Debug)]
pub(crate) struct EventBuffer {
    events: VecDeque<(SessionEvent, Arc<str>)>,
    bytes: usize,
    limit: usize,
}

/// The buffer would hold more bytes than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl EventBuffer {
    /// An empty buffer for at most `limit` bytes. One event always fits, however large.
    pub(crate) fn new(limit: usize) -> Self {
        Self { events: VecDeque::new(), bytes: 0, limit }
    }

    /// Adds an event; one without a token joins the last event, if that is of the same choice and epoch.
    pub(crate) fn push(&mut self, event: SessionEvent, replica: &Arc<str>) -> Result<(), Full> {
        if let Some((last, _)) = self.events.back_mut()
            && joins(last, &event)
        {
            self.bytes += event.text.len();
            last.text.push_str(&event.text);
            last.finish = event.finish;
            last.usage = event.usage;
            return Ok(());
        }
        let bytes = size(&event);
        if !self.events.is_empty() && self.bytes + bytes > self.limit {
            return Err(Full);
        }
        self.bytes += bytes;
        self.events.push_back((event, replica.clone()));
        Ok(())
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.events.clear();
        self.bytes = 0;
    }

    /// Takes the oldest event.
    pub(crate) fn pop(&mut self) -> Option<(SessionEvent, Arc<str>)> {
        let (event, replica) = self.events.pop_front()?;
        self.bytes -= size(&event);
        Some((event, replica))
    }
}

/// Whether an event adds nothing to the last one that needs a response of its own.
fn joins(last: &SessionEvent, event: &SessionEvent) -> bool {
    let same = last.choice == event.choice && last.epoch == event.epoch && last.finish() == Finish::Unspecified;
    same && event.token.is_none() && event.prompt_logprobs.is_empty()
}

/// Bytes that an event holds, near enough. Log-probabilities of the prompt come once and have a limit of their own.
fn size(event: &SessionEvent) -> usize {
    let numbers = |position: &Position| size_of::<Position>() + 8 * position.ids.len();
    size_of::<SessionEvent>() + event.session.len() + event.text.len() + event.logprobs.as_deref().map_or(0, numbers)
}

#[cfg(test)]
mod tests {
    use perigee_proto::internal::Counts;

    use super::*;

    fn push(buffer: &mut EventBuffer, event: SessionEvent) -> Result<(), Full> {
        buffer.push(event, &Arc::from("replica-0"))
    }

    fn pop(buffer: &mut EventBuffer) -> Option<SessionEvent> {
        buffer.pop().map(|(event, _)| event)
    }

    fn token(choice: u32, index: u64) -> SessionEvent {
        SessionEvent { choice, index, token: Some(7), text: "ab".to_owned(), ..SessionEvent::default() }
    }

    fn end(choice: u32, index: u64) -> SessionEvent {
        let usage = Some(Box::new(Counts { prompt: 3, completion: index, cached: 0 }));
        let mut event = SessionEvent { choice, index, text: "c".to_owned(), usage, ..SessionEvent::default() };
        event.set_finish(Finish::Stop);
        event
    }

    #[test]
    fn events_without_a_token_join_the_one_before() {
        let mut buffer = EventBuffer::new(1 << 20);
        for event in [token(0, 0), token(1, 0), end(1, 1), end(0, 1)] {
            push(&mut buffer, event).expect("room");
        }
        assert_eq!(pop(&mut buffer), Some(token(0, 0)));
        let joined = pop(&mut buffer).expect("an event");
        assert_eq!((joined.index, joined.token, joined.text.as_str()), (0, Some(7), "abc"));
        assert_eq!((joined.finish(), joined.usage), (Finish::Stop, end(1, 1).usage));
        assert_eq!(pop(&mut buffer), Some(end(0, 1)), "another choice's event does not take it");
        assert_eq!((pop(&mut buffer), buffer.bytes), (None, 0));
    }

    #[test]
    fn nothing_joins_an_end() {
        let mut buffer = EventBuffer::new(1 << 20);
        push(&mut buffer, end(0, 1)).expect("room");
        push(&mut buffer, end(0, 1)).expect("room");
        assert_eq!(buffer.events.len(), 2);
    }

    #[test]
    fn bytes_are_bounded_and_come_back() {
        let mut buffer = EventBuffer::new(3 * size(&token(0, 0)));
        for index in 0..3 {
            assert_eq!(push(&mut buffer, token(0, index)), Ok(()));
        }
        assert_eq!(push(&mut buffer, token(0, 3)), Err(Full));
        assert!(pop(&mut buffer).is_some());
        assert_eq!(push(&mut buffer, token(0, 3)), Ok(()));

        let mut small = EventBuffer::new(1);
        assert_eq!(push(&mut small, token(0, 0)), Ok(()), "one event always fits");
        assert_eq!(push(&mut small, token(0, 1)), Err(Full));
    }
}
