//! Working memory of the ops, one block for all of them: an op takes what it needs from the start, since ops run one after
//! the other on one stream. Layers state their needs when they load, and the block is sized before a step, never in it.

use perigee_backend::{BackendError, Result};

use crate::buffer::Buffer;
use crate::device::Device;
use crate::needs::Need;
use crate::stream::Stream;

const ALIGNMENT: usize = 256;

/// The block.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    buffer: Option<Buffer>,
    needs: Vec<Need>,
    taken: usize,
    tokens: usize,
}

impl Scratch {
    /// States a need; parts taken are rounded up, so state a few hundred bytes more for each of them in `fixed`.
    pub(crate) fn require(&mut self, need: Need) {
        self.needs.push(need);
    }

    /// Makes room for a step of `tokens` tokens that needs at least `besides` bytes in some op.
    pub(crate) fn reserve(&mut self, device: &Device, tokens: usize, besides: usize) -> Result<()> {
        let bytes = self.needs.iter().map(|need| need.bytes(tokens)).max().unwrap_or(0).max(besides);
        self.tokens = self.tokens.max(tokens);
        if self.buffer.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
            self.buffer = None;
            self.buffer = Some(Buffer::new(device, bytes, &format!("working memory of a step of {tokens} tokens"))?);
        }
        Ok(())
    }

    /// Device address of the block, 0 while there is none.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.as_ref().map_or(0, Buffer::address)
    }

    /// Size of the block.
    pub(crate) fn bytes(&self) -> usize {
        self.buffer.as_ref().map_or(0, Buffer::bytes)
    }

    /// Tokens that it has room for.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Takes room for host bytes and copies them there.
    pub(crate) fn send(&mut self, stream: &Stream, bytes: &[u8]) -> Result<u64> {
        let address = self.take(bytes.len())?;
        if let Some(buffer) = &self.buffer {
            stream.write(buffer, (address - buffer.address()) as usize, bytes)?;
        }
        Ok(address)
    }

    /// Bytes at an address taken before, copied to the host.
    pub(crate) fn read(&self, stream: &Stream, address: u64, bytes: usize) -> Result<Vec<u8>> {
        let Some(buffer) = &self.buffer else { return Ok(Vec::new()) };
        let mut out = vec![0; bytes];
        stream.read(buffer, address.saturating_sub(buffer.address()) as usize, &mut out)?;
        Ok(out)
    }

    /// Forgets what the op before took.
    pub(crate) fn reset(&mut self) {
        self.taken = 0;
    }

    /// Address of the next `bytes`, aligned to 256.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<u64> {
        let offset = self.taken;
        self.taken = (offset + bytes).next_multiple_of(ALIGNMENT);
        match &self.buffer {
            Some(buffer) => buffer.part(offset, bytes),
            None => Err(BackendError::Device("an op ran before the first step began".into())),
        }
    }
}
