//! Rounds over the mesh: every frame in one write, every wait for all peers at once, so that whichever rank dies is
//! noticed while others are merely slow. All of it runs on the caller's thread; the sockets never block.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use socket2::SockRef;

use super::inbox::{Arrival, Inbox};
use super::poll::poll;
use super::wire::{Ends, Session, Wire};
use crate::CollectiveError;
use crate::frame::{CHUNK_BYTES, HEADER_BYTES, Report};
use crate::rounds::{Links, Round};

/// Asked of the system for each direction of each socket: more than two of the longest frames, so that a round's frame
/// leaves in one write although the peer still reads the last one. The system may grant less; rounds then take more
/// writes and are as correct.
const BUFFER_BYTES: usize = 4 * (HEADER_BYTES + CHUNK_BYTES);

/// The sockets of one rank, shared with its abort handles.
#[derive(Debug)]
pub(super) struct Wires {
    /// By rank; `None` at this rank's own place.
    streams: Vec<Option<TcpStream>>,
    aborted: AtomicBool,
}

impl Wires {
    /// Ends the group on behalf of an abort handle.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.shut_down();
    }

    fn shut_down(&self) {
        for stream in self.streams.iter().flatten() {
            // Fails only if the connection is gone already, which is what is wanted.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// One peer's part of the round in progress.
#[derive(Debug)]
struct Peer {
    rank: usize,
    /// None where the connection is plain.
    session: Option<Session>,
    inbox: Inbox,
    /// Bytes of the outgoing frame that have been written, and its length.
    sent: usize,
    to_send: usize,
    /// Whether all that is expected from this peer is here.
    arrived: bool,
}

impl Peer {
    fn is_sent(&self) -> bool {
        self.sent == self.to_send && self.session.as_ref().is_none_or(Session::is_flushed)
    }

    fn ends<'a>(&'a mut self, wires: &'a Wires) -> Result<Ends<'a>, CollectiveError> {
        Ok(Ends { tcp: stream(wires, self.rank)?, session: self.session.as_mut() })
    }

    /// Reads once, without waiting.
    fn receive(&mut self, wires: &Wires) -> Result<Arrival, CollectiveError> {
        let ends = Ends { tcp: stream(wires, self.rank)?, session: self.session.as_mut() };
        Ok(self.inbox.fill(ends))
    }
}

/// The links of one rank of a group of processes.
#[derive(Debug)]
pub(super) struct SocketLinks {
    rank: usize,
    wires: Arc<Wires>,
    /// Every rank but this one, in rank order.
    peers: Vec<Peer>,
    timeout: Duration,
}

impl SocketLinks {
    /// Takes one connection to every other rank; `timeout` bounds a round.
    pub(super) fn new(rank: usize, wires: Vec<Option<Wire>>, timeout: Duration) -> Result<Self, CollectiveError> {
        let (mut streams, mut peers) = (Vec::with_capacity(wires.len()), Vec::with_capacity(wires.len()));
        for (other, wire) in wires.into_iter().enumerate() {
            let (tcp, session) = wire.map_or((None, None), |wire| (Some(wire.tcp), wire.session));
            if let Some(tcp) = &tcp {
                configure(tcp).map_err(CollectiveError::socket("set up a connection between ranks"))?;
            }
            streams.push(tcp);
            if other != rank {
                peers.push(Peer { rank: other, session, inbox: Inbox::new(), sent: 0, to_send: 0, arrived: true });
            }
        }
        Ok(Self { rank, wires: Arc::new(Wires { streams, aborted: AtomicBool::new(false) }), peers, timeout })
    }

    pub(super) fn wires(&self) -> Arc<Wires> {
        Arc::clone(&self.wires)
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    fn begin(&mut self, round: &Round) -> Result<(), CollectiveError> {
        for peer in &mut self.peers {
            peer.inbox.release();
            peer.sent = 0;
            peer.to_send = round.outgoing(peer.rank).len();
            peer.arrived = round.expected[peer.rank].is_none();
            // A peer that was faster has sent this round's frame together with the last one's.
            take(peer, round)?;
        }
        Ok(())
    }

    /// Writes as much of the outgoing frames as the system takes without waiting.
    fn send(&mut self, round: &Round) -> Result<(), CollectiveError> {
        for peer in self.peers.iter_mut().filter(|peer| !peer.is_sent()) {
            while !peer.is_sent() {
                let rest = &round.outgoing(peer.rank)[peer.sent..];
                let mut ends = peer.ends(&self.wires)?;
                match if rest.is_empty() { ends.flush().map(|()| 0) } else { ends.write(rest) } {
                    Ok(count) => peer.sent += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return Err(autopsy(&self.wires, peer)),
                }
            }
        }
        Ok(())
    }

    /// Waits until a peer that the round still needs can be read or written, or has failed, then reads what is there.
    /// Peers whose part is done are not watched: one that has finished the last call may leave while others still talk.
    fn wait_and_receive(&mut self, round: &Round, started: Instant) -> Result<(), CollectiveError> {
        if self.receive_decrypted(round)? {
            return Ok(());
        }
        let busy = self.peers.iter_mut().filter(|peer| !peer.arrived || !peer.is_sent());
        let mut sockets = Vec::with_capacity(round.expected.len());
        let mut waiting = Vec::with_capacity(round.expected.len());
        for peer in busy {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, !peer.arrived);
            flags.set(PollFlags::OUT, !peer.is_sent());
            sockets.push(PollFd::new(stream(&self.wires, peer.rank)?, flags));
            waiting.push(peer);
        }
        if !poll(&mut sockets, self.timeout.saturating_sub(started.elapsed()))? {
            let silent = waiting.iter().find(|peer| !peer.arrived).or(waiting.first());
            let rank = silent.map_or(self.rank, |peer| peer.rank);
            return Err(CollectiveError::PeerSilent { rank, waited: started.elapsed() });
        }
        for (socket, peer) in sockets.iter().zip(waiting) {
            // The flags beyond OUT are data, end of stream and errors; a read tells them apart.
            if !peer.arrived && socket.revents().difference(PollFlags::OUT) != PollFlags::empty() {
                match peer.receive(&self.wires)? {
                    Arrival::Bytes => take(peer, round)?,
                    Arrival::Nothing => {}
                    Arrival::Closed => return Err(lost(&self.wires, peer.rank)),
                }
            }
        }
        Ok(())
    }

    /// Takes what came together with earlier bytes and was decrypted with them; says whether there was any.
    fn receive_decrypted(&mut self, round: &Round) -> Result<bool, CollectiveError> {
        let mut some = false;
        for peer in self.peers.iter_mut().filter(|peer| !peer.arrived) {
            while !peer.arrived
                && peer.session.as_mut().is_some_and(Session::has_bytes)
                && peer.receive(&self.wires)? == Arrival::Bytes
            {
                take(peer, round)?;
                some = true;
            }
        }
        Ok(some)
    }
}

impl Links for SocketLinks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.wires.streams.len()
    }

    fn exchange(&mut self, round: &Round) -> Result<(), CollectiveError> {
        if self.wires.aborted.load(Ordering::Acquire) {
            return Err(CollectiveError::Aborted);
        }
        self.begin(round)?;
        let started = Instant::now();
        loop {
            self.send(round)?;
            if self.peers.iter().all(|peer| peer.arrived && peer.is_sent()) {
                return Ok(());
            }
            self.wait_and_receive(round, started)?;
        }
    }

    fn payload(&self, peer: usize) -> &[u8] {
        self.peers.iter().find(|other| other.rank == peer).map_or(&[], |other| other.inbox.payload())
    }

    fn close(&mut self, error: &CollectiveError) {
        let report = Report::new(self.rank, error).frame();
        for peer in &mut self.peers {
            // In the middle of a frame a report could not be told from payload.
            let at_boundary = peer.sent == 0 || peer.is_sent();
            if let (true, Ok(mut writer)) = (at_boundary, peer.ends(&self.wires)) {
                // Best effort: without it the peer sees this rank close, only not for whose sake.
                let _ = writer.write(&report);
            }
        }
        self.wires.shut_down();
    }
}

impl Drop for SocketLinks {
    fn drop(&mut self) {
        // Abort handles may keep the sockets open; the other ranks must see the end all the same.
        self.wires.shut_down();
    }
}

fn stream(wires: &Wires, rank: usize) -> Result<&TcpStream, CollectiveError> {
    wires.streams.get(rank).and_then(Option::as_ref).ok_or(CollectiveError::PeerLost { rank })
}

/// Checks what has arrived from `peer` as soon as its header is there, and takes the frame once it is whole.
fn take(peer: &mut Peer, round: &Round) -> Result<(), CollectiveError> {
    if let (false, Some(due), Some(header)) = (peer.arrived, round.expected[peer.rank], peer.inbox.header()) {
        round.call.check(peer.rank, due, header)?;
        peer.arrived = peer.inbox.take(due);
    }
    Ok(())
}

/// Why `peer` takes no more bytes: what it reported before it closed, else that it is gone.
fn autopsy(wires: &Wires, peer: &mut Peer) -> CollectiveError {
    peer.inbox.release();
    while matches!(peer.receive(wires), Ok(Arrival::Bytes)) {}
    peer.inbox.find_report().map_or_else(|| lost(wires, peer.rank), |report| report.into_error(peer.rank))
}

/// The end of a connection: this rank's own doing if it was aborted, else the peer's.
fn lost(wires: &Wires, rank: usize) -> CollectiveError {
    if wires.aborted.load(Ordering::Acquire) { CollectiveError::Aborted } else { CollectiveError::PeerLost { rank } }
}

fn configure(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    socket.set_recv_buffer_size(BUFFER_BYTES)
}
