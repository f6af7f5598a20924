//! Data that crosses between host and device with every step, through page-locked memory, so that neither side waits for the
//! copy of the step at hand.

use perigee_backend::{BackendError, Result};

use crate::buffer::{Buffer, Pinned};
use crate::device::Device;
use crate::stream::{Event, Stream};

/// Host data on its way to one device buffer, step after step: two page-locked buffers in turn, so that filling one does not
/// wait for the copy of the other.
#[derive(Debug)]
pub(crate) struct Upload {
    device: Device,
    target: Buffer,
    turns: [(Pinned, Event); 2],
    turn: usize,
}

impl Upload {
    pub(crate) fn new(device: &Device, bytes: usize, what: &str) -> Result<Self> {
        let side = || Ok::<_, BackendError>((Pinned::new(device, bytes)?, Event::new(device, false)?));
        Ok(Self {
            target: Buffer::new(device, bytes, what)?,
            turns: [side()?, side()?],
            turn: 0,
            device: device.clone(),
        })
    }

    /// Bytes that fit.
    pub(crate) fn capacity(&self) -> usize {
        self.target.bytes()
    }

    /// Where the data lies on the device.
    pub(crate) fn address(&self) -> u64 {
        self.target.address()
    }

    /// Sends `bytes`, at most `capacity`, in stream order.
    pub(crate) fn send(&mut self, stream: &Stream, bytes: &[u8]) -> Result<()> {
        self.turn = 1 - self.turn;
        let (pinned, sent) = &mut self.turns[self.turn];
        sent.wait()?;
        let room = pinned.as_mut_slice().get_mut(..bytes.len()).ok_or(BackendError::Range {
            what: "upload byte",
            index: bytes.len() as u64,
            limit: self.target.bytes() as u64,
        })?;
        room.copy_from_slice(bytes);
        stream.write_pinned(&self.target, 0, pinned, 0..bytes.len())?;
        sent.record(stream)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for (_, sent) in &self.turns {
                // A failed wait means a broken context, in which no copy runs any more.
                let _ = sent.wait();
            }
        }
    }
}

/// Device results on their way to the host, step after step: a device buffer that kernels fill, and two page-locked buffers in
/// turn, so that one copy can be read while the next is on its way.
#[derive(Debug)]
pub(crate) struct Download {
    device: Device,
    source: Buffer,
    turns: [(Pinned, Event); 2],
    turn: usize,
}

impl Download {
    pub(crate) fn new(device: &Device, bytes: usize, what: &str) -> Result<Self> {
        let side = || Ok::<_, BackendError>((Pinned::new(device, bytes)?, Event::new(device, false)?));
        Ok(Self {
            source: Buffer::new(device, bytes, what)?,
            turns: [side()?, side()?],
            turn: 0,
            device: device.clone(),
        })
    }

    /// Bytes that fit.
    pub(crate) fn capacity(&self) -> usize {
        self.source.bytes()
    }

    /// Where kernels write on the device.
    pub(crate) fn address(&self) -> u64 {
        self.source.address()
    }

    /// Makes everything there zero, in stream order.
    pub(crate) fn clear(&self, stream: &Stream) -> Result<()> {
        stream.fill(&self.source, 0, self.source.bytes(), 0)
    }

    /// Queues the copy of the first `bytes`, as work queued before leaves them. It is read by the number that is returned,
    /// before the copy after the next one is queued.
    pub(crate) fn fetch(&mut self, stream: &Stream, bytes: usize) -> Result<usize> {
        self.turn = 1 - self.turn;
        let (pinned, done) = &mut self.turns[self.turn];
        done.wait()?;
        stream.read_pinned(&self.source, 0, pinned, 0..bytes)?;
        done.record(stream)?;
        Ok(self.turn)
    }

    /// What a copy brought; waits for it.
    pub(crate) fn receive(&self, number: usize, bytes: usize) -> Result<&[u8]> {
        let (pinned, done) = &self.turns[number % 2];
        done.wait()?;
        pinned.as_slice().get(..bytes).ok_or(BackendError::Range {
            what: "download byte",
            index: bytes as u64,
            limit: self.source.bytes() as u64,
        })
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            for (_, done) in &self.turns {
                // As for `Upload`.
                let _ = done.wait();
            }
        }
    }
}
