//! TLS over a socket that blocks, for two threads: one reads, one writes, and neither waits for the other's bytes. Ranks talk
//! without an async runtime.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};

use crate::RankTls;

/// Bytes taken from the socket at once: a record and its frame.
const RAW_BYTES: usize = 16 * 1024 + 512;

/// What is received.
#[derive(Debug)]
pub struct Reader {
    tcp: TcpStream,
    connection: Arc<Mutex<Connection>>,
    /// Read from the socket, and how much of it has been decrypted.
    raw: Box<[u8]>,
    taken: usize,
    filled: usize,
}

/// What is sent; every write leaves at once.
#[derive(Debug)]
pub struct Writer {
    tcp: TcpStream,
    connection: Arc<Mutex<Connection>>,
}

impl RankTls {
    /// The handshake of the rank that connected to `host`, which may take `limit`.
    ///
    /// # Errors
    /// The socket fails, or the peer does not prove who it is.
    pub fn dial(&self, tcp: TcpStream, host: IpAddr, limit: Duration) -> io::Result<(Reader, Writer)> {
        let name = ServerName::IpAddress(host.into());
        let connection = ClientConnection::new(self.client.clone(), name).map_err(io::Error::other)?;
        shake_hands(tcp, connection.into(), limit)
    }

    /// The handshake of the rank that listens.
    ///
    /// # Errors
    /// The socket fails, or the peer does not prove who it is.
    pub fn accept(&self, tcp: TcpStream, limit: Duration) -> io::Result<(Reader, Writer)> {
        let connection = ServerConnection::new(self.server.clone()).map_err(io::Error::other)?;
        shake_hands(tcp, connection.into(), limit)
    }
}

fn shake_hands(tcp: TcpStream, mut connection: Connection, limit: Duration) -> io::Result<(Reader, Writer)> {
    tcp.set_read_timeout(Some(limit))?;
    tcp.set_write_timeout(Some(limit))?;
    while connection.is_handshaking() {
        connection.complete_io(&mut &tcp)?;
    }
    tcp.set_read_timeout(None)?;
    tcp.set_write_timeout(None)?;
    let connection = Arc::new(Mutex::new(connection));
    let writer = Writer { tcp: tcp.try_clone()?, connection: connection.clone() };
    let raw = vec![0; RAW_BYTES].into_boxed_slice();
    Ok((Reader { tcp, connection, raw, taken: 0, filled: 0 }, writer))
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            {
                let mut connection = self.connection.lock();
                match connection.reader().read(into) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    done => return done,
                }
                if self.taken < self.filled {
                    let mut rest = &self.raw[self.taken..self.filled];
                    self.taken += connection.read_tls(&mut rest)?;
                    connection.process_new_packets().map_err(io::Error::other)?;
                    // What this calls for besides, such as new keys, leaves with the next write.
                    continue;
                }
            }
            // Without the lock: the other thread writes meanwhile.
            (self.taken, self.filled) = (0, self.tcp.read(&mut self.raw)?);
            if self.filled == 0 {
                self.connection.lock().read_tls(&mut io::empty())?;
            }
        }
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut records = Vec::new();
        let count = {
            let mut connection = self.connection.lock();
            let count = connection.writer().write(bytes)?;
            while connection.wants_write() {
                connection.write_tls(&mut records)?;
            }
            count
        };
        self.tcp.write_all(&records)?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
