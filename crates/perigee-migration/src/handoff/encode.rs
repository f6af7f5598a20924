//! The source's side: parts in, chunks out. It keeps what was not yet taken as chunks and nothing else, so a source may
//! export one tensor, hand it in, send the chunks, and go on to the next.

use super::chunk::ChunkWriter;
use super::error::HandoffError;
use super::ledger::{Bounds, Ledger};
use super::part::{Announced, Head, head_bytes, mark, of_held, of_segments, of_trailer};
use super::slice::{HeldState, PageSlice, StateSlice};
use super::{Frozen, Header, Part, Summary};
use crate::codec::crc;
use crate::geometry::Geometry;
use crate::segments::SegmentTable;

/// Tokens of one part, so that a long history leaves in pieces.
const TOKEN_RUN: usize = 1 << 16;

/// Writes a handoff.
#[derive(Debug)]
pub struct HandoffEncoder {
    chunks: ChunkWriter,
    ledger: Ledger,
}

impl HandoffEncoder {
    /// Begins with the header; chunks carry at most `chunk_bytes` bytes ([`super::CHUNK_BYTES`] is usual,
    /// [`super::CHUNK_LIMIT`] the most).
    ///
    /// # Errors
    /// The header's epochs do not rise, or its sizes make no sense.
    pub fn new(header: Header, chunk_bytes: usize) -> Result<Self, HandoffError> {
        header.geometry.check()?;
        header.check_epochs(0)?;
        // A source sends what it has; only targets have bounds.
        let bounds = Bounds { context: u64::MAX, record: u64::MAX };
        let ledger = Ledger::new(&header.geometry, bounds);
        let mut encoder = Self { chunks: ChunkWriter::new(chunk_bytes), ledger };
        encoder.chunks.write(&mark());
        encoder.write(Head::Header(header), &[])?;
        Ok(encoder)
    }

    /// The next token ids of the session, from the first on. They may leave while it still steps.
    ///
    /// # Errors
    /// The session is frozen already.
    pub fn tokens(&mut self, tokens: &[u32]) -> Result<(), HandoffError> {
        for run in tokens.chunks(TOKEN_RUN) {
            let body: Vec<u8> = run.iter().flat_map(|token| token.to_le_bytes()).collect();
            let head = Head::Tokens { first: self.ledger.tokens(), count: run.len() as u32, crc: crc(&[&body]) };
            self.write(head, &body)?;
        }
        Ok(())
    }

    /// The session as it is now that it stopped, and where those of its latents are that do not come along: the table
    /// that [`SegmentTable::hand_over`] gives.
    ///
    /// # Errors
    /// Tokens are missing, or the table does not fit the context and the mode.
    pub fn freeze(&mut self, frozen: &Frozen, segments: &SegmentTable) -> Result<(), HandoffError> {
        let Frozen { context, tokens, record } = frozen;
        self.write(Head::Record { context: *context, tokens: *tokens, crc: crc(&[record]) }, record)?;
        let (head, body) = of_segments(segments);
        self.write(head, &body)?;
        self.ledger.complete(&Part::Segments(segments.clone()))
    }

    /// Some heads of a state tensor; slices may come in any order.
    ///
    /// # Errors
    /// The slice does not fit, or some of its heads were sent before.
    pub fn state(&mut self, slice: &StateSlice) -> Result<(), HandoffError> {
        let dtype = self.geometry().dtype(slice.part.kind);
        self.write(Head::State { part: slice.part, dtype, digest: slice.digest }, &slice.bytes)?;
        self.ledger.add_digest(slice.tensor(), slice.digest);
        Ok(())
    }

    /// The whole state where it lies, for a target that has said that it reaches the slot; instead of all slices.
    ///
    /// # Errors
    /// Some heads were sent before.
    pub fn held(&mut self, held: &HeldState) -> Result<(), HandoffError> {
        let (head, body) = of_held(held);
        self.write(head, &body)?;
        self.ledger.complete(&Part::Held(held.clone()))
    }

    /// A page of one MLA layer, or the filled part of the last one; in split mode only that.
    ///
    /// # Errors
    /// The page does not fit, is not due, or was sent before.
    pub fn page(&mut self, slice: &PageSlice) -> Result<(), HandoffError> {
        let PageSlice { layer, first, positions, digest, .. } = *slice;
        let dtype = self.geometry().latent_dtype;
        self.write(Head::Page { layer, first, positions, dtype, digest }, &slice.bytes)?;
        self.ledger.add_digest(slice.tensor(), digest);
        Ok(())
    }

    /// Ends the handoff with the trailer. The digests returned are those that the target must answer.
    ///
    /// # Errors
    /// Something is missing, and what.
    pub fn finish(&mut self) -> Result<Summary, HandoffError> {
        self.ledger.check_complete()?;
        let summary = self.ledger.summary().clone();
        let (head, body) = of_trailer(self.ledger.parts(), &summary);
        self.write(head, &body)?;
        self.chunks.flush();
        Ok(summary)
    }

    /// Ends the current chunk early: what was handed in so far can leave.
    pub fn flush(&mut self) {
        self.chunks.flush();
    }

    /// Whether a chunk is ready to leave.
    pub fn has_chunk(&self) -> bool {
        self.chunks.has_ready()
    }

    /// The next chunk that is ready to leave, in order.
    pub fn next_chunk(&mut self) -> Option<Vec<u8>> {
        self.chunks.pop()
    }

    /// All chunks that are ready to leave, in order.
    pub fn chunks(&mut self) -> impl Iterator<Item = Vec<u8>> + '_ {
        std::iter::from_fn(|| self.next_chunk())
    }

    /// The geometry that the header names.
    pub fn geometry(&self) -> &Geometry {
        self.ledger.geometry()
    }

    fn write(&mut self, head: Head, body: &[u8]) -> Result<(), HandoffError> {
        let length = body.len() as u64;
        let bytes = head_bytes(&head, length)?;
        self.ledger.admit(&Announced { head, body: length })?;
        self.chunks.write(&bytes);
        self.chunks.write(body);
        Ok(())
    }
}
