//! How the ranks of a group exchange device data: by NCCL where every rank has the library and a card of its own, through host
//! memory otherwise. The choice is made once, by all ranks alike.

use perigee_backend::{BackendError, Result};
use perigee_collectives::Collective;

use crate::device::Device;
use crate::nccl::{Library, Nccl};

/// Set to 1 where ranks that share a card may use NCCL all the same; NCCL itself asks for it too.
pub(crate) const SHARED_CARDS: &str = "NCCL_MULTI_RANK_GPU_ENABLE";
pub(crate) const UUID_BYTES: usize = 16;

/// A rank's connection to the others.
pub(crate) enum Exchange {
    /// A group of one: nothing moves.
    Alone,
    /// Through host memory: right for any group, and slow.
    Host(Box<dyn Collective>),
    /// On the device, in stream order.
    Nccl(Nccl),
}

impl Exchange {
    /// Chooses with the other ranks, and forms a communicator where that was the choice.
    ///
    /// # Errors
    /// [`BackendError::Collective`] where a rank is lost, or NCCL cannot form the group.
    pub(crate) fn open(device: &Device, mut group: Box<dyn Collective>) -> Result<Self> {
        if group.size() == 1 {
            return Ok(Self::Alone);
        }
        let shared = shares_a_card(device, group.as_mut())?;
        let library = Library::get();
        let reason = match (library, shared && !allows_shared_cards()) {
            (Err(error), _) => Some(error.to_owned()),
            (_, true) => Some(format!("ranks share a card, and {SHARED_CARDS} is not 1")),
            _ => None,
        };
        let mut without = [u64::from(reason.is_some())];
        group.or(&mut without).map_err(|error| BackendError::Collective(error.to_string()))?;
        match library {
            Ok(library) if without[0] == 0 => {
                tracing::info!(version = library.version(), "ranks exchange by NCCL");
                Ok(Self::Nccl(Nccl::form(library, device, group)?))
            }
            _ => {
                let reason = reason.unwrap_or_else(|| "another rank cannot use NCCL".into());
                tracing::warn!(reason, "ranks exchange through host memory, which is slow");
                Ok(Self::Host(group))
            }
        }
    }

    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        match self {
            Self::Alone => 0,
            Self::Host(group) => group.rank(),
            Self::Nccl(nccl) => nccl.rank(),
        }
    }

    /// Ranks of the group.
    pub(crate) fn size(&self) -> usize {
        match self {
            Self::Alone => 1,
            Self::Host(group) => group.size(),
            Self::Nccl(nccl) => nccl.size(),
        }
    }

    /// Fails once the group is broken; asked after waits for the device.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Alone | Self::Host(_) => Ok(()),
            Self::Nccl(nccl) => nccl.check(),
        }
    }
}

/// Whether NCCL may be used by processes that share a card.
pub(crate) fn allows_shared_cards() -> bool {
    std::env::var(SHARED_CARDS).as_deref() == Ok("1")
}

/// Whether any two ranks have the same card.
fn shares_a_card(device: &Device, group: &mut dyn Collective) -> Result<bool> {
    let mine = device.uuid()?;
    let mut cards = Vec::with_capacity(group.size());
    for rank in 0..group.size() {
        let mut card = [0u8; UUID_BYTES];
        if rank == group.rank() {
            card = mine;
        }
        group.broadcast(rank, &mut card).map_err(|error| BackendError::Collective(error.to_string()))?;
        cards.push(card);
    }
    cards.sort_unstable();
    Ok(cards.windows(2).any(|pair| pair[0] == pair[1]))
}
