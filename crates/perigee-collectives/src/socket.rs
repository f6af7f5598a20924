//! A group whose ranks are processes, on one machine or several, linked by a full mesh of TCP connections. This file has
//! the configuration and the public face; `socket/rendezvous.rs` forms the mesh and `socket/links.rs` carries the rounds
//! over it, plain or with TLS (`socket/wire.rs`).

mod gate;
mod hello;
mod inbox;
mod links;
mod poll;
mod rendezvous;
mod wire;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use links::{SocketLinks, Wires};
use rustls::{ClientConfig, ServerConfig};

use crate::rounds::Rounds;
use crate::{Collective, CollectiveError};

/// The most ranks that a group may have; a full mesh of more would be a mistake.
const MAX_RANKS: usize = 1024;

/// The longest group name in bytes.
const MAX_GROUP_BYTES: usize = 255;

/// How one rank finds and joins its group.
#[derive(Debug, Clone)]
pub struct SocketConfig {
    /// This rank, from 0 to `size - 1`.
    pub rank: usize,
    /// Ranks in the group, at most 1024.
    pub size: usize,
    /// Where rank 0 listens; the other ranks connect there.
    pub leader: SocketAddr,
    /// The address on which the other ranks listen for each other, on a free port. An unspecified address (`0.0.0.0`)
    /// listens everywhere, and the others are told the address from which this rank reached the leader.
    pub bind: IpAddr,
    /// The group's name, the same on every rank (the replica's name), at most 255 bytes.
    pub group: String,
    /// Tells starts of one group apart, the same on every rank; 0 where nobody needs it.
    pub incarnation: u64,
    /// How long to wait until all ranks have joined.
    pub join_timeout: Duration,
    /// How long a round waits for a rank that is alive but silent.
    pub step_timeout: Duration,
    /// TLS of all connections of the group, on every rank or on none.
    pub tls: Option<SocketTls>,
}

/// How the ranks of a group prove to each other who they are: of two ranks the lower one is the server.
#[derive(Debug, Clone)]
pub struct SocketTls {
    /// Towards higher ranks.
    pub server: Arc<ServerConfig>,
    /// Towards lower ranks, which are dialled by their IP addresses.
    pub client: Arc<ClientConfig>,
}

impl SocketConfig {
    fn check(&self) -> Result<(), CollectiveError> {
        let problem = if self.size == 0 || self.size > MAX_RANKS {
            format!("size is {}, it must be from 1 to {MAX_RANKS}", self.size)
        } else if self.rank >= self.size {
            format!("rank is {}, it must be below the size, {}", self.rank, self.size)
        } else if self.group.len() > MAX_GROUP_BYTES {
            format!("group has {} bytes, at most {MAX_GROUP_BYTES} are allowed", self.group.len())
        } else if self.step_timeout.is_zero() {
            "step_timeout is zero".to_owned()
        } else {
            return Ok(());
        };
        Err(CollectiveError::InvalidConfig { problem })
    }
}

/// One rank of a group of processes.
///
/// Dropping it closes its connections, which the other ranks see as [`CollectiveError::PeerLost`] in their next call
/// that needs this rank.
#[derive(Debug)]
pub struct SocketCollective {
    rounds: Rounds<SocketLinks>,
}

impl SocketCollective {
    /// Joins the group: returns when all ranks are connected to each other. Rank 0 listens on `config.leader`; ranks may
    /// start in any order within the join timeout.
    ///
    /// # Errors
    /// A contradictory configuration, an address that cannot be bound, ranks that do not come in time, or a refusal by
    /// the leader, which says why.
    pub fn join(config: SocketConfig) -> Result<Self, CollectiveError> {
        config.check()?;
        if config.rank != 0 {
            return Self::form(&config, None);
        }
        let listener = TcpListener::bind(config.leader)
            .map_err(CollectiveError::socket(format!("listen on {}, the leader's address", config.leader)))?;
        Self::form(&config, Some(listener))
    }

    /// Joins the group as rank 0 on a listener that is bound already, for instance to a free port; `config.leader` is
    /// not used.
    ///
    /// # Errors
    /// As [`join`](Self::join), and [`CollectiveError::InvalidConfig`] for another rank than 0.
    pub fn join_with_listener(config: SocketConfig, listener: TcpListener) -> Result<Self, CollectiveError> {
        config.check()?;
        if config.rank != 0 {
            let problem = format!("rank {} was given a listener, only rank 0 takes one", config.rank);
            return Err(CollectiveError::InvalidConfig { problem });
        }
        Self::form(&config, Some(listener))
    }

    fn form(config: &SocketConfig, listener: Option<TcpListener>) -> Result<Self, CollectiveError> {
        let Some(deadline) = Instant::now().checked_add(config.join_timeout) else {
            return Err(CollectiveError::InvalidConfig {
                problem: "join_timeout is longer than time lasts".to_owned(),
            });
        };
        let wires = rendezvous::form_mesh(config, listener, deadline)?;
        // The last wait of the rendezvous is bounded by what is left for it, not by the step timeout.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let mut rounds = Rounds::new(SocketLinks::new(config.rank, wires, left)?);
        rounds.meet()?;
        rounds.links_mut().set_timeout(config.step_timeout);
        tracing::debug!(rank = config.rank, size = config.size, group = config.group, "collective group formed");
        Ok(Self { rounds })
    }

    /// A handle by which another thread, such as a watchdog, can end the group while a call is waiting.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle { wires: self.rounds.links().wires() }
    }
}

impl Collective for SocketCollective {
    fn rank(&self) -> usize {
        self.rounds.rank()
    }

    fn size(&self) -> usize {
        self.rounds.size()
    }

    fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.rounds.all_reduce(data)
    }

    fn all_gather(&mut self, mine: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.rounds.all_gather(mine, counts, out)
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.rounds.broadcast(root, data)
    }

    fn or(&mut self, bits: &mut [u64]) -> Result<(), CollectiveError> {
        self.rounds.or(bits)
    }

    fn set_patience(&mut self, patience: Duration) {
        self.rounds.links_mut().set_timeout(patience);
    }
}

/// Ends a [`SocketCollective`] from another thread.
#[derive(Debug, Clone)]
pub struct AbortHandle {
    wires: Arc<Wires>,
}

impl AbortHandle {
    /// Shuts all connections down: a waiting or later call of this rank fails with [`CollectiveError::Aborted`], the
    /// other ranks see this one as lost. Doing it again changes nothing.
    pub fn abort(&self) {
        self.wires.abort();
    }
}
