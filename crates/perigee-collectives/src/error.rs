//! Everything that can go wrong among the ranks of a group, as typed errors that name the rank and the operation. What
//! to do about a failure (end the replica, try again) is decided by the caller, by variant and never by message.

use std::net::SocketAddr;
use std::time::Duration;

use crate::frame::FrameSummary;

/// Why a collective call, or joining a group, failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A rank closed its connections or its process ended.
    #[error("rank {rank} is gone: its process ended or it left the group; restart the replica")]
    PeerLost {
        /// The rank that is gone.
        rank: usize,
    },
    /// A rank said nothing for longer than the step timeout.
    #[error("rank {rank} was silent for {waited:?}, longer than the step timeout; restart the replica")]
    PeerSilent {
        /// The rank that did not answer.
        rank: usize,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A rank made another call than this one.
    #[error(transparent)]
    Diverged(Box<Divergence>),
    /// A rank sent an operation code that this protocol version does not have.
    #[error("rank {rank} sent a frame of unknown operation {code}; all ranks must run the same build")]
    UnknownOperation {
        /// The sender.
        rank: usize,
        /// The code found.
        code: u8,
    },
    /// A rank announced a frame longer than any rank may send.
    #[error("rank {rank} announced a frame of {length} bytes, the limit is {limit}; its stream is corrupt")]
    FrameTooLong {
        /// The sender.
        rank: usize,
        /// The announced payload length in bytes.
        length: usize,
        /// The longest payload allowed in bytes.
        limit: usize,
    },
    /// Another rank gave up on the group for a reason that only it saw.
    #[error("rank {reporter} gave up on the group because of rank {rank}; see the log of rank {reporter}")]
    GaveUp {
        /// The rank that gave up.
        reporter: usize,
        /// The rank it blames, possibly itself.
        rank: usize,
    },
    /// This rank's own abort handle was used.
    #[error("the group was aborted on this rank")]
    Aborted,
    /// The group failed in an earlier call.
    #[error("the group has failed before and must be formed anew; the first failure was: {cause}")]
    Poisoned {
        /// The message of the first failure.
        cause: String,
    },
    /// `counts` of an all-gather has not one entry for every rank, or its sum overflows.
    #[error(
        "all_gather got {found} counts for {size} ranks, or counts whose sum overflows; pass one count for every rank"
    )]
    WrongCounts {
        /// Ranks in the group.
        size: usize,
        /// Counts passed.
        found: usize,
    },
    /// A buffer does not have the length that the counts imply.
    #[error("all_gather: `{buffer}` has {found} elements, the counts say {expected}")]
    WrongLength {
        /// Which argument.
        buffer: &'static str,
        /// Elements implied by the counts.
        expected: usize,
        /// Elements passed.
        found: usize,
    },
    /// The root of a broadcast is not a rank of this group.
    #[error("broadcast: root {root} is not a rank of a group of {size}")]
    RootOutOfRange {
        /// The root passed.
        root: usize,
        /// Ranks in the group.
        size: usize,
    },
    /// The configuration of a socket group contradicts itself.
    #[error("cannot join a group: {problem}")]
    InvalidConfig {
        /// What is wrong, naming the field.
        problem: String,
    },
    /// The operating system refused something about a socket.
    #[error("cannot {action}: {source}")]
    Socket {
        /// What was tried, with the address where one is known.
        action: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Another rank refused this one during the rendezvous.
    #[error("{by} refused rank {rank}: {refusal}")]
    Refused {
        /// The address that answered.
        by: SocketAddr,
        /// This rank.
        rank: usize,
        /// Why.
        refusal: Refusal,
    },
    /// Ranks did not arrive in time.
    #[error("ranks {missing:?} did not join within {waited:?}; check that they run and reach this machine")]
    JoinTimeout {
        /// How long they were waited for.
        waited: Duration,
        /// The ranks that did not arrive.
        missing: Vec<usize>,
    },
    /// A rank that listens could not be reached, or did not answer, in time.
    #[error("rank {rank} at {address} did not let this rank in within {waited:?} (last: {last})")]
    Unreachable {
        /// The rank that was called.
        rank: usize,
        /// Its address.
        address: SocketAddr,
        /// How long it was tried.
        waited: Duration,
        /// The last thing that went wrong.
        last: String,
    },
}

impl CollectiveError {
    /// The rank that is to blame, where one is known.
    pub fn culprit(&self) -> Option<usize> {
        match self {
            Self::PeerLost { rank }
            | Self::PeerSilent { rank, .. }
            | Self::UnknownOperation { rank, .. }
            | Self::FrameTooLong { rank, .. }
            | Self::GaveUp { rank, .. }
            | Self::Unreachable { rank, .. } => Some(*rank),
            Self::Diverged(divergence) => Some(divergence.rank),
            _ => None,
        }
    }

    /// Names what was tried when the operating system refused it.
    pub(crate) fn socket(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Socket { action: action.into(), source }
    }
}

/// Two ranks of one group made different calls.
#[derive(Debug, thiserror::Error)]
#[error(
    "rank {rank} diverged: this rank runs {expected}, rank {rank} sent {found}; every rank must make the same calls"
)]
pub struct Divergence {
    /// The other rank.
    pub rank: usize,
    /// What this rank waited for.
    pub expected: FrameSummary,
    /// What the other rank sent.
    pub found: FrameSummary,
}

/// Why a rank is not let into a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another protocol version.
    #[error("its protocol version is {found}, this group speaks {expected}; run the same build on every rank")]
    Version {
        /// The group's version.
        expected: u16,
        /// The newcomer's version.
        found: u16,
    },
    /// Another group's name.
    #[error("it belongs to group `{found}`, another one than this; check the leader's address")]
    Group {
        /// The newcomer's group.
        found: String,
    },
    /// Another start of the group.
    #[error("it belongs to another incarnation of this group; it was started before or after the others")]
    Incarnation,
    /// Another number of ranks.
    #[error("it expects {found} ranks, this group has {expected}")]
    Size {
        /// The group's size.
        expected: usize,
        /// The newcomer's.
        found: usize,
    },
    /// A rank number that nobody waits for here: outside the group, or one that does not connect in this direction.
    #[error("rank {rank} is not expected in a group of {size}")]
    RankOutOfRange {
        /// The newcomer's rank.
        rank: usize,
        /// The group's size.
        size: usize,
    },
    /// The rank has joined already and is alive.
    #[error("rank {rank} has joined already")]
    DuplicateRank {
        /// The rank taken.
        rank: usize,
    },
}
