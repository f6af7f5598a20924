//! Sums and gathers over the ranks' device memory by NCCL, queued on the compute stream. A communicator is used by the thread
//! that owns the backend and aborted by its watch, which keeps asking the other ranks for a sign of life: a kernel that waits
//! for a lost rank would wait for ever. What the ranks exchange through host memory, to form and to watch the group, goes
//! through their `Collective`. `pair` has communicators of two with other replicas, which are aborted by the thread that uses them.

mod communicator;
mod library;
pub(crate) mod pair;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use perigee_backend::{BackendError, DType, Result};
use perigee_collectives::Collective;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::needs;
use crate::stream::{Pitched, Stream};

use communicator::Communicator;
pub(crate) use library::Library;
use watch::Watch;

/// How long a communicator may take to form: the ranks load their libraries and modules at very different speeds.
const FORMING: Duration = Duration::from_secs(120);

/// One rank's seat in a group that exchanges by NCCL. Graphs that captured its calls go before it.
#[derive(Debug)]
pub(crate) struct Nccl {
    rank: usize,
    size: usize,
    watch: Watch,
    communicator: Arc<Communicator>,
    /// Parts of the vocabulary of all ranks.
    gathered: Option<Buffer>,
}

impl Nccl {
    /// Forms a communicator with the other ranks of `group`, which has rank 0's unique id from it and is then the watch's.
    ///
    /// # Errors
    /// [`BackendError::Collective`] with NCCL's words, or naming a rank that was lost meanwhile.
    pub(crate) fn form(library: &'static Library, device: &Device, mut group: Box<dyn Collective>) -> Result<Self> {
        let (rank, size) = (group.rank(), group.size());
        let mut id = if rank == 0 { library.unique_id()? } else { [0; library::ID_BYTES] };
        group.broadcast(0, &mut id).map_err(|error| BackendError::Collective(error.to_string()))?;
        let communicator = Arc::new(Communicator::form(library, device, id, (rank, size), FORMING)?);
        let watch = Watch::start(group, Arc::clone(&communicator))?;
        Ok(Self { rank, size, watch, communicator, gathered: None })
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Fails once the group is broken; asked after every wait for the device, since aborted kernels end without a result.
    pub(crate) fn check(&self) -> Result<()> {
        self.communicator.check()
    }

    /// Queues the sum of `count` elements at `address` over the ranks, in place. The same bits come out on every rank: each
    /// element is summed once and copied.
    pub(crate) fn all_reduce(&self, stream: &Stream, address: u64, count: usize, dtype: DType) -> Result<()> {
        stream.device().bind()?;
        self.communicator.all_reduce(stream, address, count, dtype)
    }

    /// Queues a copy of `count` 32-bit integers at `address` from rank 0 to all.
    pub(crate) fn broadcast(&self, stream: &Stream, address: u64, count: usize) -> Result<()> {
        stream.device().bind()?;
        self.communicator.broadcast(stream, address, count)
    }

    /// Device address of the parts of the vocabulary, 0 while there are none.
    pub(crate) fn gathered_address(&self) -> u64 {
        self.gathered.as_ref().map_or(0, Buffer::address)
    }

    /// Makes room for a gather of `count` float32 numbers from each rank.
    pub(crate) fn reserve_gather(&mut self, stream: &Stream, count: usize) -> Result<()> {
        let bytes = needs::gathered_bytes(1, count, self.size) as usize;
        if self.gathered.as_ref().is_none_or(|buffer| buffer.bytes() < bytes) {
            self.gathered = None;
            self.gathered = Some(Buffer::new(stream.device(), bytes, "logits of all ranks")?);
        }
        Ok(())
    }

    /// Memory for a gather of `count` float32 numbers from each rank: where this rank puts its own.
    pub(crate) fn gather_place(&mut self, stream: &Stream, count: usize) -> Result<u64> {
        self.reserve_gather(stream, count)?;
        let Some(buffer) = &self.gathered else { return Ok(0) };
        buffer.part(self.rank * count * 4, count * 4)
    }

    /// Queues the gather: afterwards row `r` of `out` [rows, sum of `widths`] holds the rows that the ranks put at their
    /// `gather_place`, [rows, widths[rank]] each, side by side. Each place has room for `count` numbers.
    pub(crate) fn gather_rows(
        &self,
        stream: &Stream,
        (rows, count): (usize, usize),
        widths: &[usize],
        out: &Buffer,
    ) -> Result<()> {
        let Some(gathered) = &self.gathered else { return Ok(()) };
        stream.device().bind()?;
        self.communicator.all_gather(stream, self.rank, gathered.address(), count)?;
        let pitch = widths.iter().sum::<usize>() * 4;
        let mut column = 0;
        for (rank, width) in widths.iter().map(|width| width * 4).enumerate() {
            let from = Pitched { buffer: gathered, offset: rank * count * 4, pitch: width };
            stream.copy_rows(from, Pitched { buffer: out, offset: column, pitch }, width, rows)?;
            column += width;
        }
        Ok(())
    }
}

impl Drop for Nccl {
    /// The owner has waited for its stream.
    fn drop(&mut self) {
        // Until all are here: a rank that frees its memory earlier could pull it from under the others' last kernels.
        self.watch.leave();
        self.communicator.close();
    }
}
