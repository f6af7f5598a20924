//! The stream as chunks: number, length, CRC-32 and payload. Chunks know nothing of parts; a cut may fall anywhere. They
//! are what a transport loses, doubles, reorders or damages, so this is where that shows first.

use std::collections::VecDeque;

use super::error::ChunkError;
use crate::codec::{Crc, Put, Reader, crc};

/// Payload of a chunk as this build writes it. Each is a turn of the target's engine while the session stands still: the last
/// page of all MLA layers at the published shape, 508 KB in bfloat16 at most, goes in one with everything else that is sent then.
pub const CHUNK_BYTES: usize = 640 * 1024;

/// Largest payload that a reader takes.
pub const CHUNK_LIMIT: usize = 1024 * 1024;

/// Number, length and checksum, 4 bytes each.
const HEAD: usize = 12;

/// Cuts a stream into chunks.
#[derive(Debug)]
pub(super) struct ChunkWriter {
    size: usize,
    next: u32,
    /// The current chunk from its first byte, with room for its head; empty while it has no payload.
    pending: Vec<u8>,
    ready: VecDeque<Vec<u8>>,
}

impl ChunkWriter {
    /// Chunks of at most `size` bytes of payload, within 1 and [`CHUNK_LIMIT`].
    pub(super) fn new(size: usize) -> Self {
        Self { size: size.clamp(1, CHUNK_LIMIT), next: 0, pending: Vec::new(), ready: VecDeque::new() }
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.pending.is_empty() {
                self.pending.put(&[0; HEAD]);
            }
            let (now, later) = bytes.split_at(bytes.len().min(HEAD + self.size - self.pending.len()));
            self.pending.put(now);
            bytes = later;
            if self.pending.len() == HEAD + self.size {
                self.flush();
            }
        }
    }

    /// Ends the current chunk, if it has any bytes.
    pub(super) fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let mut chunk = std::mem::take(&mut self.pending);
        let (room, payload) = chunk.split_at_mut(HEAD);
        let mut head = Vec::with_capacity(HEAD);
        head.u32(self.next);
        head.u32(payload.len() as u32);
        let checksum = crc(&[&head, payload]);
        head.u32(checksum);
        room.copy_from_slice(&head);
        self.ready.push_back(chunk);
        self.next = self.next.wrapping_add(1);
    }

    /// Whether a chunk is finished.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The next finished chunk.
    pub(super) fn pop(&mut self) -> Option<Vec<u8>> {
        self.ready.pop_front()
    }
}

/// Puts a stream together from chunks. It keeps at most one unfinished chunk.
#[derive(Debug, Default)]
pub(super) struct ChunkReader {
    next: u32,
    /// The current chunk from its first byte.
    held: Vec<u8>,
}

impl ChunkReader {
    /// Takes the bytes of the current chunk from the front of `bytes`, and appends its payload to `payloads` once it is whole;
    /// whether it is. Number and length are judged as soon as they are there, before anything else is kept.
    pub(super) fn read(&mut self, bytes: &mut &[u8], payloads: &mut Vec<u8>) -> Result<bool, ChunkError> {
        if !self.fill(bytes, HEAD) {
            return Ok(false);
        }
        let (sequence, length, checksum) = head_of(&self.held);
        if sequence != self.next {
            return Err(ChunkError::Sequence { expected: self.next, found: sequence });
        }
        if length == 0 || length as usize > CHUNK_LIMIT {
            return Err(ChunkError::Length { limit: CHUNK_LIMIT as u32, found: length });
        }
        if !self.fill(bytes, HEAD + length as usize) {
            return Ok(false);
        }
        let found = crc(&[&self.held[..8], &self.held[HEAD..]]);
        if found != checksum {
            return Err(ChunkError::Crc { expected: Crc(checksum), found: Crc(found) });
        }
        self.next = self.next.wrapping_add(1);
        payloads.put(&self.held[HEAD..]);
        self.held.clear();
        Ok(true)
    }

    /// The number that is due.
    pub(super) fn due(&self) -> u32 {
        self.next
    }

    /// Whether a chunk is incomplete.
    pub(super) fn is_within_chunk(&self) -> bool {
        !self.held.is_empty()
    }

    /// Moves bytes until `length` are held; whether they are.
    fn fill(&mut self, bytes: &mut &[u8], length: usize) -> bool {
        let missing = length.saturating_sub(self.held.len());
        let (now, later) = bytes.split_at(bytes.len().min(missing));
        self.held.put(now);
        *bytes = later;
        self.held.len() >= length
    }
}

/// Number, length and checksum; zeros where bytes are missing, which no caller has.
fn head_of(held: &[u8]) -> (u32, u32, u32) {
    let mut reader = Reader::new(held);
    let mut field = || reader.u32("chunk head").unwrap_or_default();
    (field(), field(), field())
}
