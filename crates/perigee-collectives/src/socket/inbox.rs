//! The receive buffer of one connection: it takes whatever has arrived in one read, which may be part of a frame or the
//! beginning of the next one, and hands frames out whole. Its size is fixed, so no announced length can make it grow.

use std::io::{ErrorKind, Read};

use crate::frame::{CHUNK_BYTES, HEADER_BYTES, Report, payload_bytes};

/// Room for the longest frame, and a header behind it.
const CAPACITY: usize = HEADER_BYTES + CHUNK_BYTES + HEADER_BYTES;

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Some bytes.
    Bytes,
    /// Nothing so far, or no room.
    Nothing,
    /// The other side has closed the connection, or it broke.
    Closed,
}

/// Bytes received and not yet released.
#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    filled: usize,
    /// Length of the frame that has been taken; it lies at the start.
    taken: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; CAPACITY].into_boxed_slice(), filled: 0, taken: 0 }
    }

    /// Reads once from `stream`, which must not block.
    pub(super) fn fill(&mut self, mut stream: impl Read) -> Arrival {
        let room = &mut self.bytes[self.filled..];
        if room.is_empty() {
            return Arrival::Nothing;
        }
        match stream.read(room) {
            Ok(0) => Arrival::Closed,
            Ok(count) => {
                self.filled += count;
                Arrival::Bytes
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Arrival::Nothing,
            Err(_) => Arrival::Closed,
        }
    }

    /// The header of the frame at the start, once all of it is here.
    pub(super) fn header(&self) -> Option<&[u8; HEADER_BYTES]> {
        self.bytes[..self.filled].first_chunk()
    }

    /// Takes the frame at the start, whose payload has `payload` bytes; false while part of it is missing.
    pub(super) fn take(&mut self, payload: usize) -> bool {
        let frame = HEADER_BYTES + payload;
        let complete = self.filled >= frame;
        if complete {
            self.taken = frame;
        }
        complete
    }

    /// The payload of the frame that has been taken.
    pub(super) fn payload(&self) -> &[u8] {
        self.bytes[..self.taken].get(HEADER_BYTES..).unwrap_or_default()
    }

    /// Gives the taken frame's room back; what came behind it moves to the start.
    pub(super) fn release(&mut self) {
        self.bytes.copy_within(self.taken..self.filled, 0);
        self.filled -= self.taken;
        self.taken = 0;
    }

    /// The first report among the frames received, behind frames that nobody will read any more.
    pub(super) fn find_report(&self) -> Option<Report> {
        let mut rest = &self.bytes[..self.filled];
        while let Some(header) = rest.first_chunk() {
            if let Some(report) = Report::decode(header) {
                return Some(report);
            }
            rest = rest.get(HEADER_BYTES + payload_bytes(header)..)?;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CollectiveError;
    use crate::frame::{Call, Operation};

    const CALL: Call = Call { operation: Operation::Or, root: 0, number: 1, total_bytes: 5 };

    #[test]
    fn frames_come_out_whole_however_they_arrive() {
        let mut stream = CALL.header(5).to_vec();
        stream.extend([1, 2, 3, 4, 5]);
        stream.extend(CALL.header(0));
        for piece in 1..=stream.len() {
            let mut inbox = Inbox::new();
            let mut pieces = stream.chunks(piece);
            while !(inbox.header().is_some() && inbox.take(5)) {
                let mut next = pieces.next().unwrap();
                assert_eq!(inbox.fill(&mut next), Arrival::Bytes);
            }
            assert_eq!(inbox.payload(), [1, 2, 3, 4, 5]);
            inbox.release();
            for mut next in pieces {
                inbox.fill(&mut next);
            }
            assert_eq!(inbox.header(), Some(&CALL.header(0)));
            assert!(inbox.take(0) && inbox.payload().is_empty());
        }
    }

    #[test]
    fn a_report_is_found_behind_unread_frames() {
        let report = Report::new(0, &CollectiveError::PeerLost { rank: 3 });
        let mut stream = CALL.header(5).to_vec();
        stream.extend([0; 5]);
        stream.extend(report.frame());
        let mut inbox = Inbox::new();
        inbox.fill(stream.as_slice());
        assert_eq!(inbox.find_report(), Some(report));
    }

    #[test]
    fn the_buffer_never_grows() {
        let flood = vec![0xff; 4 * CAPACITY];
        let mut flood = flood.as_slice();
        let mut inbox = Inbox::new();
        assert_eq!(inbox.fill(&mut flood), Arrival::Bytes);
        assert_eq!(inbox.fill(&mut flood), Arrival::Nothing);
        assert_eq!(inbox.filled, CAPACITY);
        assert_eq!(inbox.find_report(), None);
    }
}
