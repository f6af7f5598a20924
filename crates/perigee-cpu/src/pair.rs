//! Pairs between processes of one machine over TCP's loopback: the CPUs' place holder for NCCL, so that everything around a pair
//! can be used and tested without a GPU. A connection is encrypted by nobody and never leaves the machine; who connects shows a
//! secret that travelled in the invitation.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use parking_lot::Mutex;
use perigee_backend::pairs::{PairEnd, PairLink, PairTransport, Watch};

/// How soon what waits hears that there is no more time.
const LOOK: Duration = Duration::from_millis(10);
/// The port, then the secret.
const PORT: usize = 2;
const INVITATION: usize = PORT + 16;
/// What a target answers when it has a parcel.
const HAS_IT: u8 = 1;

/// Loopback connections, of which some may not have been met.
#[derive(Debug, Default)]
pub struct Loopback {
    invited: Mutex<HashMap<Vec<u8>, TcpListener>>,
}

/// A connection.
pub struct Connection(TcpStream);

impl PairTransport for Loopback {
    type Parcel = Vec<u8>;
    type Link = Connection;

    fn invite(&self) -> Result<Vec<u8>, String> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(told)?;
        listener.set_nonblocking(true).map_err(told)?;
        let port = listener.local_addr().map_err(told)?.port();
        // The standard library draws the keys of its hashes from the system's random numbers.
        let secret = [0, 1].map(|half: u64| RandomState::new().hash_one(half).to_le_bytes());
        let invitation = [port.to_le_bytes().as_slice(), secret.as_flattened()].concat();
        self.invited.lock().insert(invitation.clone(), listener);
        Ok(invitation)
    }

    fn meet(&self, invitation: &[u8], end: PairEnd, watch: &Watch) -> Result<Connection, String> {
        let (port, secret) = invitation.split_first_chunk::<PORT>().ok_or("an invitation of another version")?;
        if invitation.len() != INVITATION {
            return Err("an invitation of another version".into());
        }
        match end {
            PairEnd::Source => {
                let listener = self.invited.lock().remove(invitation).ok_or("nobody was invited like that")?;
                accept(&listener, secret, watch)
            }
            PairEnd::Target => connect(u16::from_le_bytes(*port), secret, watch),
        }
    }

    fn forget(&self, invitation: &[u8]) {
        self.invited.lock().remove(invitation);
    }
}

fn accept(listener: &TcpListener, secret: &[u8], watch: &Watch) -> Result<Connection, String> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let mut connection = Connection::new(stream)?;
                let mut shown = vec![0; secret.len()];
                // Others may try the port.
                if connection.fill(&mut shown, watch).is_ok() && shown == secret {
                    return Ok(connection);
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(LOOK),
            Err(error) => return Err(told(error)),
        }
        watch.check()?;
    }
}

fn connect(port: u16, secret: &[u8], watch: &Watch) -> Result<Connection, String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).map_err(told)?;
    let mut connection = Connection::new(stream)?;
    connection.put(secret, watch)?;
    Ok(connection)
}

impl Connection {
    fn new(stream: TcpStream) -> Result<Self, String> {
        let settled = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.set_read_timeout(Some(LOOK)))
            .and_then(|()| stream.set_write_timeout(Some(LOOK)));
        settled.map_err(told).map(|()| Self(stream))
    }

    fn put(&mut self, mut bytes: &[u8], watch: &Watch) -> Result<(), String> {
        while !bytes.is_empty() {
            match self.0.write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if is_early(&error) => {}
                Err(error) => return Err(told(error)),
            }
            watch.check()?;
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8], watch: &Watch) -> Result<(), String> {
        let mut count = 0;
        while let Some(rest) = bytes.get_mut(count..).filter(|rest| !rest.is_empty()) {
            match self.0.read(rest) {
                Ok(0) => return Err("the other end is gone".into()),
                Ok(read) => count += read,
                Err(error) if is_early(&error) => {}
                Err(error) => return Err(told(error)),
            }
            watch.check()?;
        }
        Ok(())
    }
}

impl PairLink for Connection {
    type Parcel = Vec<u8>;

    fn send(&mut self, parcel: &mut Vec<u8>, watch: &Watch) -> Result<(), String> {
        self.put(parcel, watch)?;
        let mut answer = [0];
        self.fill(&mut answer, watch)?;
        if answer == [HAS_IT] { Ok(()) } else { Err("the other end took something else".into()) }
    }

    fn receive(&mut self, parcel: &mut Vec<u8>, watch: &Watch) -> Result<(), String> {
        self.fill(parcel, watch)?;
        self.put(&[HAS_IT], watch)
    }
}

/// Whether nothing but time ran out, of which the watch may have more.
fn is_early(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn told(error: std::io::Error) -> String {
    format!("the way within this machine: {error}")
}
