//! How the ranks of a replica meet: they join their collective at the leader, agree on what they are about to run, and open
//! the control connections over which the leader will tell them its plans. They become a group together or not at all.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use perigee_collectives::{AbortHandle, Collective, SocketCollective, SocketConfig, SocketTls, Solo};
use perigee_engine::link::{FollowerLink, LeaderLink, LinkEnds, TcpFollowerLink, TcpLeaderLink};
use perigee_engine::protocol::PROTOCOL_VERSION;
use perigee_tls::{RankTls, Tls};

use crate::addresses::resolve;
use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::events::{WorkerEvent, emit};

/// Bytes of the digest that ranks compare: 32 hexadecimal digits.
const DIGEST_BYTES: usize = 32;
/// Ranks that fit in the word of disagreements.
const MAX_RANKS: usize = 64;
/// How long a connecting rank may take to say who it is, its handshake included.
const HELLO: Duration = Duration::from_secs(2);

/// A formed group, seen by one rank.
pub struct Group {
    /// Exchange of activations.
    pub collective: Box<dyn Collective>,
    /// Breaks the exchange from another thread; none in a group of one.
    pub abort: Option<AbortHandle>,
    /// Process ids in rank order; only the leader has them all.
    pub pids: Vec<u32>,
    /// Control connections.
    pub control: Control,
}

/// A rank's end of the control connections.
pub enum Control {
    /// The leader's, to ranks 1, 2, ..., and a notice of each rank that is lost.
    Leader {
        /// Links in rank order.
        links: Vec<Box<dyn LeaderLink>>,
        /// Numbers of lost ranks.
        lost: Receiver<usize>,
    },
    /// A follower's.
    Follower(Box<dyn FollowerLink>),
}

/// Meets the other ranks, with TLS where this process has a certificate. `identity` is what all must agree on: the model digest
/// and every size that they share.
///
/// # Errors
/// A rank does not come within the join timeout, or runs something else.
pub fn form(config: &WorkerConfig, identity: &str, tls: Option<&Tls>) -> Result<Group> {
    if config.tp > MAX_RANKS {
        return Err(WorkerError::Options(format!("--tp: at most {MAX_RANKS} ranks, found {}", config.tp)));
    }
    if config.tp == 1 {
        let (_, lost) = channel();
        let control = Control::Leader { links: Vec::new(), lost };
        return Ok(Group { collective: Box::new(Solo), abort: None, pids: vec![std::process::id()], control });
    }
    let meeting = resolve(&config.leader, Instant::now() + config.join_timeout())?;
    let tls = tls.and_then(Tls::ranks);
    let socket = SocketConfig {
        rank: config.rank,
        size: config.tp,
        leader: meeting,
        bind: meeting.ip(),
        group: config.replica.clone(),
        incarnation: 0,
        join_timeout: config.join_timeout(),
        step_timeout: config.step_timeout(),
        tls: tls.clone().map(|RankTls { server, client }| SocketTls { server, client }),
    };
    if config.rank == 0 {
        let listener =
            TcpListener::bind(meeting).map_err(WorkerError::io(format!("listening for ranks at {}", config.leader)))?;
        let leader = listener.local_addr().map_err(WorkerError::io("reading the listener's address"))?;
        emit(config.supervised, &WorkerEvent::Rendezvous { leader });
        let mut collective =
            SocketCollective::join_with_listener(SocketConfig { leader, bind: leader.ip(), ..socket }, listener)?;
        agree(&mut collective, identity)?;
        let (links, lost, pids) = accept_links(config, leader, &mut collective, tls.as_ref())?;
        let abort = Some(collective.abort_handle());
        return Ok(Group { collective: Box::new(collective), abort, pids, control: Control::Leader { links, lost } });
    }
    // Connections to the leader come from whatever address this machine has.
    let bind = match meeting.ip() {
        ip if ip.is_loopback() => ip,
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut collective = SocketCollective::join(SocketConfig { bind, ..socket })?;
    agree(&mut collective, identity)?;
    let link = connect_link(config, meeting.ip(), &mut collective, tls.as_ref())?;
    let abort = Some(collective.abort_handle());
    let control = Control::Follower(Box::new(link));
    Ok(Group { collective: Box::new(collective), abort, pids: Vec::new(), control })
}

/// Compares what the ranks are about to run with the leader's; all ranks learn of a disagreement.
fn agree(collective: &mut SocketCollective, identity: &str) -> Result<()> {
    let mut digest = [0u8; DIGEST_BYTES];
    for (place, byte) in digest.iter_mut().zip(identity.bytes()) {
        *place = byte;
    }
    let mine = digest;
    collective.broadcast(0, &mut digest)?;
    let rank = collective.rank();
    let mut differs = [if digest == mine { 0 } else { 1u64 << rank }];
    collective.or(&mut differs)?;
    if differs[0] == 0 {
        return Ok(());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    Err(WorkerError::Disagreement {
        rank: differs[0].trailing_zeros() as usize,
        what: "a model and sizes with digest",
        found: if digest == mine { "another".into() } else { text(&mine) },
        expected: text(&digest),
    })
}

type Links = (Vec<Box<dyn LeaderLink>>, Receiver<usize>, Vec<u32>);

fn accept_links(
    config: &WorkerConfig,
    leader: std::net::SocketAddr,
    collective: &mut SocketCollective,
    tls: Option<&RankTls>,
) -> Result<Links> {
    let listener = TcpListener::bind((leader.ip(), 0)).map_err(WorkerError::io("listening for control connections"))?;
    let port = listener.local_addr().map_err(WorkerError::io("reading the control address"))?.port();
    collective.broadcast(0, &mut port.to_le_bytes())?;
    let deadline = Instant::now() + config.join_timeout();
    let mut met: Vec<Option<(LinkEnds, u32)>> = (1..config.tp).map(|_| None).collect();
    while met.iter().any(Option::is_none) {
        let (stream, _) = accept_until(&listener, deadline)?;
        // A stranger's bytes end its own connection, not the group.
        match greeted(stream, tls) {
            Ok((ends, rank, pid)) => {
                if let Some(place @ None) = met.get_mut(rank.wrapping_sub(1)) {
                    *place = Some((ends, pid));
                }
            }
            Err(error) => tracing::warn!(%error, "dropped a control connection that is no rank's"),
        }
    }
    let (sender, lost) = channel();
    let mut links: Vec<Box<dyn LeaderLink>> = Vec::new();
    let mut pids = vec![std::process::id()];
    for (index, (ends, pid)) in met.into_iter().flatten().enumerate() {
        let sender = sender.clone();
        let link = TcpLeaderLink::new(ends, move || {
            // Nobody listens any more when the leader itself ends.
            let _ = sender.send(index + 1);
        });
        links.push(Box::new(link.map_err(WorkerError::io("opening a control connection"))?));
        pids.push(pid);
    }
    Ok((links, lost, pids))
}

fn accept_until(listener: &TcpListener, deadline: Instant) -> Result<(TcpStream, std::net::SocketAddr)> {
    listener.set_nonblocking(true).map_err(WorkerError::io("listening for control connections"))?;
    loop {
        match listener.accept() {
            Ok((stream, address)) => {
                stream.set_nonblocking(false).map_err(WorkerError::io("accepting a rank"))?;
                return Ok((stream, address));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    let what = "waiting for the ranks' control connections".to_string();
                    return Err(WorkerError::Io { what, source: std::io::ErrorKind::TimedOut.into() });
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            Err(error) => return Err(WorkerError::Io { what: "accepting a rank".into(), source: error }),
        }
    }
}

fn connect_link(
    config: &WorkerConfig,
    leader: IpAddr,
    collective: &mut SocketCollective,
    tls: Option<&RankTls>,
) -> Result<TcpFollowerLink> {
    let mut port = [0u8; 2];
    collective.broadcast(0, &mut port)?;
    let address = (leader, u16::from_le_bytes(port));
    let stream = TcpStream::connect(address).map_err(WorkerError::io("connecting to the leader"))?;
    let ends = match tls {
        None => LinkEnds::plain(stream),
        Some(tls) => encrypted(stream, |stream| tls.dial(stream, leader, config.join_timeout())),
    };
    let mut ends = ends.map_err(WorkerError::io("opening the control connection"))?;
    let mut hello = Vec::with_capacity(12);
    hello.extend(PROTOCOL_VERSION.to_le_bytes());
    hello.extend((config.rank as u32).to_le_bytes());
    hello.extend(std::process::id().to_le_bytes());
    ends.writer.write_all(&hello).map_err(WorkerError::io("greeting the leader"))?;
    Ok(TcpFollowerLink::new(ends))
}

/// A connecting follower, its rank and process id.
fn greeted(stream: TcpStream, tls: Option<&RankTls>) -> std::io::Result<(LinkEnds, usize, u32)> {
    let mut ends = match tls {
        None => LinkEnds::plain(stream)?,
        Some(tls) => encrypted(stream, |stream| tls.accept(stream, HELLO))?,
    };
    ends.socket.set_read_timeout(Some(HELLO))?;
    let mut words = [[0u8; 4]; 3];
    for word in &mut words {
        ends.reader.read_exact(word)?;
    }
    ends.socket.set_read_timeout(None)?;
    let [version, rank, pid] = words.map(u32::from_le_bytes);
    if version != PROTOCOL_VERSION {
        return Err(std::io::Error::other(format!("rank protocol {version}, expected {PROTOCOL_VERSION}")));
    }
    Ok((ends, rank as usize, pid))
}

fn encrypted(
    socket: TcpStream,
    shake_hands: impl FnOnce(TcpStream) -> std::io::Result<(perigee_tls::Reader, perigee_tls::Writer)>,
) -> std::io::Result<LinkEnds> {
    socket.set_nodelay(true)?;
    let (reader, writer) = shake_hands(socket.try_clone()?)?;
    Ok(LinkEnds { socket, reader: Box::new(reader), writer: Box::new(writer) })
}
