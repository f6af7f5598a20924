//! Collectives among the ranks of a tensor-parallel group, behind one trait: ranks as threads of one process
//! (`threads`), as processes joined over TCP (`socket`), or one rank alone (`solo`). This crate moves numbers and knows
//! no tensor, no model and no device; README.md beside it states the protocol between ranks.
//!
//! Ranks with GPUs exchange activations on the devices, in perigee-cuda; they form and watch their group through this trait.

use std::time::Duration;

mod error;
mod frame;
mod payload;
mod rounds;
mod socket;
mod solo;
mod threads;

pub use error::{CollectiveError, Divergence, Refusal};
pub use frame::{FrameSummary, Operation};
pub use socket::{AbortHandle, SocketCollective, SocketConfig, SocketTls};
pub use solo::Solo;
pub use threads::{ThreadCollective, thread_group};

/// What the ranks of one group do together.
///
/// Every rank must make the same calls in the same order with matching lengths. A rank that does something else, dies or
/// falls silent makes the call fail on the other ranks, with an error that names it; where it had given its part of the
/// call already, the next call that needs it fails.
///
/// After any error the group is finished for this rank: every later call fails at once with
/// [`CollectiveError::Poisoned`], the other ranks learn of it, and the contents of the buffers passed to the failing call
/// are unspecified. A group of one rank moves nothing, but still checks the lengths.
pub trait Collective: Send {
    /// This rank's number, from 0 to `size - 1`; rank 0 is the leader.
    fn rank(&self) -> usize;

    /// How many ranks the group has, at least 1.
    fn size(&self) -> usize;

    /// Replaces `data` (any length, the same on every rank) by its element-wise sum over the ranks.
    ///
    /// Every element is added in rank order, `((x0 + x1) + x2) + ...`, so each rank ends up with the same bits whatever
    /// the network did: ranks choose experts and tokens from these sums and must choose alike.
    ///
    /// # Errors
    /// A lost, silent or diverged peer, or a group that has failed before.
    fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Concatenates every rank's `mine` into `out`, in rank order.
    ///
    /// `counts[r]` is the number of elements that rank `r` contributes; counts may differ and may be 0, and every rank
    /// passes the same ones. `out` has as many elements as the counts together.
    ///
    /// # Errors
    /// [`CollectiveError::WrongCounts`] or [`CollectiveError::WrongLength`] where the sizes contradict each other, a
    /// lost, silent or diverged peer, or a group that has failed before.
    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError>;

    /// Copies `root`'s `data` into every other rank's `data`, which must have the same length.
    ///
    /// The root returns once its bytes are on their way; the others wait for it no longer than for anybody else, so a
    /// leader that announces work by broadcast must also announce, within the step timeout, that there is none.
    ///
    /// # Errors
    /// [`CollectiveError::RootOutOfRange`], a lost, silent or diverged peer, or a group that has failed before.
    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// Replaces `bits` (the same length on every rank) by the bitwise OR over the ranks: a fault that one rank sees is a
    /// fault for all.
    ///
    /// # Errors
    /// A lost, silent or diverged peer, or a group that has failed before.
    fn or(&mut self, bits: &mut [u64]) -> Result<(), CollectiveError>;

    /// Sets how long calls from here on wait for a rank that is alive but silent, where the ranks are processes; every rank
    /// passes the same. Ranks that are threads of one process are waited for without limit.
    fn set_patience(&mut self, _patience: Duration) {}
}
