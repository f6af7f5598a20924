//! The frame that ranks exchange: a 24-byte header that says which call it belongs to, then at most `CHUNK_BYTES` of
//! payload. Headers exist so that ranks that diverge get an error naming rank and call instead of each other's numbers;
//! this file moves no bytes.

use std::fmt;
use std::time::Duration;

use crate::error::{CollectiveError, Divergence};

/// Bytes of a frame's header.
pub(crate) const HEADER_BYTES: usize = 24;

/// The longest payload of one frame. A round holds one frame for every peer in memory and in the socket's buffers.
pub(crate) const CHUNK_BYTES: usize = 64 * 1024;

/// Operation code of the frame by which a rank tells the others that it gives up.
const ABORT_CODE: u8 = 255;

/// A kind of collective call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The exchange that ends the rendezvous.
    Join,
    /// [`Collective::all_reduce`](crate::Collective::all_reduce).
    AllReduce,
    /// [`Collective::all_gather`](crate::Collective::all_gather).
    AllGather,
    /// [`Collective::broadcast`](crate::Collective::broadcast).
    Broadcast,
    /// [`Collective::or`](crate::Collective::or).
    Or,
}

impl Operation {
    fn code(self) -> u8 {
        match self {
            Self::Join => 1,
            Self::AllReduce => 2,
            Self::AllGather => 3,
            Self::Broadcast => 4,
            Self::Or => 5,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Join, Self::AllReduce, Self::AllGather, Self::Broadcast, Self::Or]
            .into_iter()
            .find(|op| op.code() == code)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Join => "join",
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::Broadcast => "broadcast",
            Self::Or => "or",
        })
    }
}

/// One collective call as every rank must see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    /// What is done.
    pub(crate) operation: Operation,
    /// The root of a broadcast, else 0.
    pub(crate) root: u16,
    /// How many calls the group made before.
    pub(crate) number: u64,
    /// Bytes that the call concerns in all, over all its frames.
    pub(crate) total_bytes: u64,
}

/// What a frame's header says, for error messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameSummary {
    /// The call's kind.
    pub operation: Operation,
    /// How many calls the group made before this one.
    pub call: u64,
    /// The root of a broadcast, else 0.
    pub root: usize,
    /// Bytes that the whole call concerns.
    pub total_bytes: u64,
    /// Payload bytes of this frame.
    pub frame_bytes: usize,
}

impl fmt::Display for FrameSummary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operation, call, root, total_bytes, frame_bytes } = self;
        write!(formatter, "{operation} (call {call}, root {root}, {total_bytes} bytes in all, {frame_bytes} here)")
    }
}

impl Call {
    /// What a frame of this call with a payload of `frame_bytes` says in its header.
    pub(crate) fn summary(&self, frame_bytes: usize) -> FrameSummary {
        FrameSummary {
            operation: self.operation,
            call: self.number,
            root: usize::from(self.root),
            total_bytes: self.total_bytes,
            frame_bytes,
        }
    }

    /// The header of a frame of this call.
    pub(crate) fn header(&self, frame_bytes: usize) -> [u8; HEADER_BYTES] {
        encode(frame_bytes, self.operation.code(), self.root, self.number, self.total_bytes)
    }

    /// Checks that `header`, received from rank `peer`, opens the frame of this call that is due.
    ///
    /// # Errors
    /// What the peer reports if it gave up; a length, operation or call that is not the one due.
    pub(crate) fn check(
        &self,
        peer: usize,
        frame_bytes: usize,
        header: &[u8; HEADER_BYTES],
    ) -> Result<(), CollectiveError> {
        if *header == self.header(frame_bytes) {
            return Ok(());
        }
        if let Some(report) = Report::decode(header) {
            return Err(report.into_error(peer));
        }
        let fields = decode(header);
        if fields.length > CHUNK_BYTES {
            return Err(CollectiveError::FrameTooLong { rank: peer, length: fields.length, limit: CHUNK_BYTES });
        }
        let Some(operation) = Operation::from_code(fields.code) else {
            return Err(CollectiveError::UnknownOperation { rank: peer, code: fields.code });
        };
        let found = Self { operation, root: fields.root, number: fields.number, total_bytes: fields.total_bytes };
        Err(CollectiveError::Diverged(Box::new(Divergence {
            rank: peer,
            expected: self.summary(frame_bytes),
            found: found.summary(fields.length),
        })))
    }
}

/// What a rank that gives up tells the others, so that all of them name the rank that is to blame and not the one that
/// noticed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Report {
    culprit: u16,
    waited_ms: u64,
    fault: u64,
}

const FAULT_LOST: u64 = 1;
const FAULT_SILENT: u64 = 2;
const FAULT_OTHER: u64 = 3;

impl Report {
    /// What rank `reporter` says about `error`.
    pub(crate) fn new(reporter: usize, error: &CollectiveError) -> Self {
        let culprit = error.culprit().unwrap_or(reporter);
        let (fault, waited) = match error {
            CollectiveError::PeerLost { .. } => (FAULT_LOST, Duration::ZERO),
            CollectiveError::PeerSilent { waited, .. } => (FAULT_SILENT, *waited),
            _ => (FAULT_OTHER, Duration::ZERO),
        };
        // Group sizes are far below u16::MAX; a number that does not fit would only blur a message.
        let culprit = u16::try_from(culprit).unwrap_or(u16::MAX);
        Self { culprit, waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX), fault }
    }

    /// The frame that carries the report: a header alone.
    pub(crate) fn frame(self) -> [u8; HEADER_BYTES] {
        encode(0, ABORT_CODE, self.culprit, self.waited_ms, self.fault)
    }

    /// The report that `header` carries, if it is one.
    pub(crate) fn decode(header: &[u8; HEADER_BYTES]) -> Option<Self> {
        let fields = decode(header);
        (fields.code == ABORT_CODE && fields.length == 0).then_some(Self {
            culprit: fields.root,
            waited_ms: fields.number,
            fault: fields.total_bytes,
        })
    }

    /// The error of the rank that receives this report from rank `reporter`.
    pub(crate) fn into_error(self, reporter: usize) -> CollectiveError {
        let rank = usize::from(self.culprit);
        match self.fault {
            FAULT_LOST => CollectiveError::PeerLost { rank },
            FAULT_SILENT => CollectiveError::PeerSilent { rank, waited: Duration::from_millis(self.waited_ms) },
            _ => CollectiveError::GaveUp { reporter, rank },
        }
    }
}

/// The payload length that a header announces.
pub(crate) fn payload_bytes(header: &[u8; HEADER_BYTES]) -> usize {
    decode(header).length
}

struct Fields {
    length: usize,
    code: u8,
    root: u16,
    number: u64,
    total_bytes: u64,
}

/// Layout, little-endian: length u32, operation u8, zero u8, root u16, call number u64, total bytes u64.
fn encode(length: usize, code: u8, root: u16, number: u64, total_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    // Payloads are at most CHUNK_BYTES, so the length always fits.
    header[0..4].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    header[4] = code;
    header[6..8].copy_from_slice(&root.to_le_bytes());
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16..24].copy_from_slice(&total_bytes.to_le_bytes());
    header
}

fn decode(header: &[u8; HEADER_BYTES]) -> Fields {
    let [l0, l1, l2, l3, code, _, r0, r1, n0, n1, n2, n3, n4, n5, n6, n7, t0, t1, t2, t3, t4, t5, t6, t7] = *header;
    Fields {
        length: usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX),
        code,
        root: u16::from_le_bytes([r0, r1]),
        number: u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]),
        total_bytes: u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CALL: Call = Call { operation: Operation::AllReduce, root: 0, number: 7, total_bytes: 4000 };

    #[test]
    fn the_frame_that_is_due_passes() {
        assert!(CALL.check(1, 4000, &CALL.header(4000)).is_ok());
    }

    #[test]
    fn every_field_that_differs_is_a_divergence() {
        let others = [
            Call { operation: Operation::Or, ..CALL }.header(4000),
            Call { root: 1, ..CALL }.header(4000),
            Call { number: 8, ..CALL }.header(4000),
            Call { total_bytes: 4004, ..CALL }.header(4000),
            CALL.header(3996),
        ];
        for header in others {
            let error = CALL.check(3, 4000, &header).unwrap_err();
            assert!(matches!(&error, CollectiveError::Diverged(d) if d.rank == 3 && d.expected != d.found), "{error}");
        }
    }

    #[test]
    fn unknown_operations_and_long_frames_are_named() {
        let mut header = CALL.header(4000);
        header[4] = 77;
        let error = CALL.check(2, 4000, &header).unwrap_err();
        assert!(matches!(error, CollectiveError::UnknownOperation { rank: 2, code: 77 }), "{error}");
        header[3] = 0xff;
        let error = CALL.check(2, 4000, &header).unwrap_err();
        assert!(matches!(error, CollectiveError::FrameTooLong { rank: 2, .. }), "{error}");
    }

    #[test]
    fn a_report_carries_the_culprit_to_every_rank() {
        let waited = Duration::from_millis(1500);
        for (sent, rank) in [
            (CollectiveError::PeerLost { rank: 3 }, 3),
            (CollectiveError::PeerSilent { rank: 2, waited }, 2),
            (CollectiveError::UnknownOperation { rank: 1, code: 9 }, 1),
            (CollectiveError::RootOutOfRange { root: 9, size: 4 }, 0),
        ] {
            let received = CALL.check(0, 4000, &Report::new(0, &sent).frame()).unwrap_err();
            assert_eq!(received.culprit(), Some(rank));
        }
        let silent = Report::new(0, &CollectiveError::PeerSilent { rank: 2, waited }).into_error(0);
        assert!(matches!(silent, CollectiveError::PeerSilent { waited: w, .. } if w == waited), "{silent}");
    }
}
