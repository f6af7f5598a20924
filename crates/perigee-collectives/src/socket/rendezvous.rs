//! How the ranks of a group find each other: everybody registers with rank 0, rank 0 tells everybody where the others
//! listen, then every rank links itself to each lower one. README.md in this crate draws it; the connections that result
//! are carried on by `links`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::gate::{Admitted, Gate};
use super::hello::{ANSWER_FIXED_BYTES, Answer, Hello, Purpose};
use super::wire::Wire;
use super::{SocketConfig, SocketTls};
use crate::CollectiveError;

/// The longest single attempt to connect; an address that swallows packets must not use up the join timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Pauses between attempts grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));

/// Connects this rank with all others until `deadline`; entry r of the result is the connection to rank r. `listener` is
/// the leader's, and `None` on every other rank.
pub(super) fn form_mesh(
    config: &SocketConfig,
    listener: Option<TcpListener>,
    deadline: Instant,
) -> Result<Vec<Option<Wire>>, CollectiveError> {
    match listener {
        Some(listener) => lead(config, &listener, deadline),
        None => follow(config, deadline),
    }
}

fn lead(
    config: &SocketConfig,
    listener: &TcpListener,
    deadline: Instant,
) -> Result<Vec<Option<Wire>>, CollectiveError> {
    let gate = Gate { listener, config, purpose: Purpose::Register, first: 1, deadline };
    let admitted = gate.admit_all()?;
    let table = admitted.iter().flatten().map(|rank| rank.listens_at).collect();
    welcome(admitted, &Answer::Welcome(table))
}

fn follow(config: &SocketConfig, deadline: Instant) -> Result<Vec<Option<Wire>>, CollectiveError> {
    let action = || format!("listen for other ranks on {}", config.bind);
    let listener = TcpListener::bind((config.bind, 0)).map_err(CollectiveError::socket(action()))?;
    let listens_at = listener.local_addr().map_err(CollectiveError::socket(action()))?;

    let register = Hello::new(config, Purpose::Register, listens_at);
    let (leader, table) =
        Caller { rank: 0, address: config.leader, hello: &register, tls: config.tls.as_ref(), deadline }.call()?;
    let mut wires = vec![Some(leader)];
    let link = Hello::new(config, Purpose::Link, listens_at);
    for (rank, &address) in (1..config.rank).zip(&table) {
        let (wire, _) = Caller { rank, address, hello: &link, tls: config.tls.as_ref(), deadline }.call()?;
        wires.push(Some(wire));
    }
    // Rank r answers the ranks above it only after it was answered by all below, so nobody waits in a circle.
    let gate = Gate { listener: &listener, config, purpose: Purpose::Link, first: config.rank + 1, deadline };
    let higher = welcome(gate.admit_all()?, &Answer::Welcome(Vec::new()))?;
    wires.extend(higher.into_iter().skip(config.rank));
    Ok(wires)
}

/// Answers everybody who was let in.
fn welcome(admitted: Vec<Option<Admitted>>, answer: &Answer) -> Result<Vec<Option<Wire>>, CollectiveError> {
    let bytes = answer.encode();
    let mut wires = Vec::with_capacity(admitted.len());
    for (rank, entry) in admitted.into_iter().enumerate() {
        let mut wire = entry.map(|entry| entry.wire);
        if let Some(wire) = &mut wire {
            // The answer is the first thing sent, so it fits into the socket's buffer unless the peer is gone.
            wire.write_all(&bytes).and_then(|()| wire.flush()).map_err(|_| CollectiveError::PeerLost { rank })?;
        }
        wires.push(wire);
    }
    Ok(wires)
}

/// One rank calling at another's listener.
struct Caller<'a> {
    /// The rank that is called.
    rank: usize,
    address: SocketAddr,
    hello: &'a Hello,
    tls: Option<&'a SocketTls>,
    deadline: Instant,
}

impl Caller<'_> {
    /// Tries until the other rank answers or the deadline has come. Returns the connection and the answer's table.
    fn call(&self) -> Result<(Wire, Vec<SocketAddr>), CollectiveError> {
        let (rank, address, started) = (self.rank, self.address, Instant::now());
        let (mut pause, longest) = PAUSES;
        loop {
            let last = match self.attempt() {
                Ok((wire, Answer::Welcome(table))) => return Ok((wire, table)),
                Ok((_, Answer::Refused(refusal))) => {
                    return Err(CollectiveError::Refused { by: address, rank: self.hello.rank, refusal });
                }
                Err(error) => error.to_string(),
            };
            if self.left() <= pause {
                return Err(CollectiveError::Unreachable { rank, address, waited: started.elapsed(), last });
            }
            sleep(pause);
            pause = (2 * pause).min(longest);
        }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn attempt(&self) -> std::io::Result<(Wire, Answer)> {
        // The system's calls refuse a timeout of zero.
        let wait = self.left().min(CONNECT_TIMEOUT).max(Duration::from_millis(1));
        let stream = TcpStream::connect_timeout(&self.address, wait)?;
        if stream.local_addr()? == stream.peer_addr()? {
            // TCP lets a connection to a free local port meet itself when the system picks that port for it.
            return Err(std::io::Error::other("nobody listens there yet"));
        }
        stream.set_nodelay(true)?;
        let mut wire = Wire::dialled(stream, self.address, self.tls)?;
        wire.write_all(&self.hello.encode())?;

        let mut fixed = [0; ANSWER_FIXED_BYTES];
        self.read_exact(&mut wire, &mut fixed)?;
        let no_rank = || std::io::Error::other("what listens there is no rank of this group");
        let (answer, table_bytes) = Answer::parse(&fixed, self.hello).ok_or_else(no_rank)?;
        let mut table = vec![0; table_bytes];
        self.read_exact(&mut wire, &mut table)?;
        match answer {
            Answer::Welcome(_) => Ok((wire, Answer::Welcome(Answer::parse_table(&table).ok_or_else(no_rank)?))),
            refused => Ok((wire, refused)),
        }
    }

    fn read_exact(&self, wire: &mut Wire, mut buffer: &mut [u8]) -> std::io::Result<()> {
        while !buffer.is_empty() {
            wire.tcp.set_read_timeout(Some(self.left().max(Duration::from_millis(1))))?;
            match wire.read(buffer) {
                Ok(0) => return Err(std::io::Error::other("it closed the connection without an answer")),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
