//! The target's side: bytes in, parts out, each as soon as it is whole and right. It holds one unfinished chunk and one
//! unfinished part; lengths that the sender names are checked against what the target's own model needs before anything
//! is kept for them.

use super::chunk::ChunkReader;
use super::error::{HandoffError, PartName};
use super::ledger::{Bounds, Ledger};
use super::part::{Announced, Head, MARK_BYTES, PREFIX, check_mark};
use super::{Expected, Header, Part, Summary};

/// Reads a handoff.
pub struct HandoffDecoder {
    expected: Expected,
    known_epoch: Box<dyn Fn(&str) -> u64 + Send>,
    chunks: ChunkReader,
    ledger: Ledger,
    /// What came of the stream and is not read yet.
    held: Vec<u8>,
    has_mark: bool,
    /// The part whose body is on its way.
    announced: Option<Announced>,
    summary: Option<Summary>,
    has_failed: bool,
}

impl HandoffDecoder {
    /// Waits for a handoff that `expected` allows. `known_epoch` tells the highest epoch known here of a session, 0 where
    /// it is unknown; a handoff for that epoch or an earlier one is stale.
    pub fn new(expected: Expected, known_epoch: impl Fn(&str) -> u64 + Send + 'static) -> Self {
        let bounds = Bounds { context: expected.context, record: expected.record };
        Self {
            ledger: Ledger::new(&expected.geometry, bounds),
            expected,
            known_epoch: Box::new(known_epoch),
            chunks: ChunkReader::default(),
            held: Vec::new(),
            has_mark: false,
            announced: None,
            summary: None,
            has_failed: false,
        }
    }

    /// Takes the next bytes of the stream, cut anywhere, and returns the parts that are complete with them.
    ///
    /// # Errors
    /// The stream is not a handoff of what this replica expects; it stays failed from then on.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Part>, HandoffError> {
        if self.has_failed {
            return Err(HandoffError::Failed);
        }
        let parts = self.read(bytes);
        self.has_failed = parts.is_err();
        parts
    }

    /// The stream ended: what the handoff came to.
    ///
    /// # Errors
    /// It ended too early, or had failed.
    pub fn finish(self) -> Result<Summary, HandoffError> {
        if self.has_failed {
            return Err(HandoffError::Failed);
        }
        let part = self.current();
        match self.summary {
            Some(summary) if self.held.is_empty() && !self.chunks.is_within_chunk() => Ok(summary),
            Some(_) => Err(HandoffError::Trailing { bytes: self.held.len() as u64 }),
            None => Err(HandoffError::Truncated { part }),
        }
    }

    fn read(&mut self, mut bytes: &[u8]) -> Result<Vec<Part>, HandoffError> {
        let mut parts = Vec::new();
        while !bytes.is_empty() {
            if self.summary.is_some() {
                return Err(HandoffError::Trailing { bytes: bytes.len() as u64 });
            }
            let is_whole = self.chunks.read(&mut bytes, &mut self.held);
            let is_whole =
                is_whole.map_err(|error| HandoffError::Chunk { due: self.chunks.due(), part: self.current(), error });
            if !is_whole? {
                break;
            }
            self.read_parts(&mut parts)?;
        }
        Ok(parts)
    }

    fn read_parts(&mut self, parts: &mut Vec<Part>) -> Result<(), HandoffError> {
        let mut read = 0;
        while let Some((length, part)) = self.next_part(read)? {
            read += length;
            parts.extend(part);
        }
        self.held.drain(..read);
        match &self.summary {
            Some(_) if !self.held.is_empty() => Err(HandoffError::Trailing { bytes: self.held.len() as u64 }),
            _ => Ok(()),
        }
    }

    /// Reads the mark, a head, or a body with which a part is complete, from `start` on: the bytes that it took, or none
    /// where bytes are missing.
    fn next_part(&mut self, start: usize) -> Result<Option<(usize, Option<Part>)>, HandoffError> {
        let held = self.held.get(start..).unwrap_or_default();
        if !self.has_mark {
            let Some(mark) = held.first_chunk::<MARK_BYTES>() else { return Ok(None) };
            check_mark(mark)?;
            self.has_mark = true;
            return Ok(Some((MARK_BYTES, None)));
        }
        let Some(announced) = self.announced.take() else {
            if self.ledger.has_ended() {
                return Ok(None);
            }
            let Some(prefix) = held.first_chunk::<PREFIX>() else { return Ok(None) };
            let length = PREFIX + Announced::head_length(prefix);
            let Some(bytes) = held.get(..length) else { return Ok(None) };
            let announced = Announced::read(bytes)?;
            if let Head::Header(header) = &announced.head {
                self.check_header(header)?;
            }
            self.ledger.admit(&announced)?;
            self.announced = Some(announced);
            return Ok(Some((length, None)));
        };
        let length = usize::try_from(announced.body).unwrap_or(usize::MAX);
        let Some(body) = held.get(..length) else {
            self.announced = Some(announced);
            return Ok(None);
        };
        let part = announced.complete(&self.expected.geometry, body.to_vec())?;
        self.ledger.complete(&part)?;
        if let Part::End(summary) = &part {
            self.summary = Some(summary.clone());
        }
        Ok(Some((length, Some(part))))
    }

    fn check_header(&self, header: &Header) -> Result<(), HandoffError> {
        header.check_epochs((self.known_epoch)(&header.session))?;
        let (mine, theirs) = (&self.expected.geometry, &header.geometry);
        for ((what, expected), (_, found)) in mine.sizes().into_iter().zip(theirs.sizes()) {
            if expected != found {
                return Err(HandoffError::Geometry { what, expected: expected.into(), found: found.into() });
            }
        }
        let types = [
            ("recurrent states", mine.recurrent_dtype, theirs.recurrent_dtype),
            ("convolution tails", mine.tail_dtype, theirs.tail_dtype),
            ("latents", mine.latent_dtype, theirs.latent_dtype),
        ];
        if let Some(&(what, expected, found)) = types.iter().find(|(_, expected, found)| expected != found) {
            return Err(HandoffError::Dtype { what, expected, found });
        }
        // Last, because a size or a type says more than that digests differ.
        if header.model != self.expected.model {
            return Err(HandoffError::Model { expected: self.expected.model.clone(), found: header.model.clone() });
        }
        theirs.rank_heads(0, header.source.ranks)?;
        Ok(())
    }

    /// The part that is on its way or due.
    fn current(&self) -> PartName {
        match &self.announced {
            Some(announced) => announced.head.name(),
            None if !self.has_mark => PartName::Mark,
            None => self.ledger.due(),
        }
    }
}

impl std::fmt::Debug for HandoffDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandoffDecoder").field("due", &self.current()).field("has_failed", &self.has_failed).finish()
    }
}

impl Header {
    /// Refuses epochs that do not rise: that of the target must be above that of the source, and both above what is
    /// known. The epoch at the source may be the known one, where a session comes back to a home of its latents.
    pub(super) fn check_epochs(&self, known: u64) -> Result<(), HandoffError> {
        if self.next_epoch > self.epoch && self.next_epoch > known && self.epoch >= known {
            return Ok(());
        }
        let session = self.session.clone();
        Err(HandoffError::Epoch { session, epoch: self.epoch, next: self.next_epoch, known })
    }
}
