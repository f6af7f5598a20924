//! One connection between two ranks, plain or with TLS, read and written without helper threads. A handshake has no step of
//! its own: it happens inside the first reads and writes, whether the socket blocks or not.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};

use super::SocketTls;

/// A connection and, where it is not plain, its TLS.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) tcp: TcpStream,
    pub(super) session: Option<Session>,
}

impl Wire {
    /// The end of the rank that connected to `address`.
    pub(super) fn dialled(tcp: TcpStream, address: SocketAddr, tls: Option<&SocketTls>) -> io::Result<Self> {
        let session = tls.map(|tls| {
            let name = ServerName::IpAddress(address.ip().into());
            ClientConnection::new(tls.client.clone(), name).map(|connection| Session::new(connection.into()))
        });
        Ok(Self { tcp, session: session.transpose().map_err(io::Error::other)? })
    }

    /// The end of the rank that listens.
    pub(super) fn accepted(tcp: TcpStream, tls: Option<&SocketTls>) -> io::Result<Self> {
        let session =
            tls.map(|tls| ServerConnection::new(tls.server.clone()).map(|connection| Session::new(connection.into())));
        Ok(Self { tcp, session: session.transpose().map_err(io::Error::other)? })
    }

    /// Leaves an end behind that nothing more can be said through.
    pub(super) fn take_over(&mut self) -> io::Result<Self> {
        Ok(Self { tcp: self.tcp.try_clone()?, session: self.session.take() })
    }

    fn ends(&mut self) -> Ends<'_> {
        Ends { tcp: &self.tcp, session: self.session.as_mut() }
    }
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.ends().read(into)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ends().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.ends().flush()
    }
}

/// A connection whose socket and TLS have different owners.
pub(super) struct Ends<'a> {
    pub(super) tcp: &'a TcpStream,
    pub(super) session: Option<&'a mut Session>,
}

impl Read for Ends<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session.read(self.tcp, into),
            None => self.tcp.read(into),
        }
    }
}

impl Write for Ends<'_> {
    /// Takes bytes; with TLS they may wait for a [`Write::flush`], as [`Session::is_flushed`] tells.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session.write(self.tcp, bytes),
            None => self.tcp.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.session.as_mut().map_or(Ok(()), |session| session.flush(self.tcp))
    }
}

/// The TLS of one connection.
#[derive(Debug)]
pub(super) struct Session {
    connection: Box<Connection>,
}

impl Session {
    fn new(connection: Connection) -> Self {
        Self { connection: Box::new(connection) }
    }

    /// Whether everything that was written has been given to the system.
    pub(super) fn is_flushed(&self) -> bool {
        !self.connection.wants_write()
    }

    /// Whether bytes of the peer are here already, which the socket therefore does not announce.
    pub(super) fn has_bytes(&mut self) -> bool {
        self.connection.process_new_packets().is_ok_and(|state| state.plaintext_bytes_to_read() > 0)
    }

    fn read(&mut self, tcp: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                done => return done,
            }
            self.connection.read_tls(&mut &*tcp)?;
            let processed = self.connection.process_new_packets();
            // Answers of a handshake, or the alert that tells the peer what was wrong; what does not fit leaves later.
            match self.flush(tcp) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?,
            };
        }
    }

    fn write(&mut self, tcp: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        // What was taken before leaves first, so that no more than one write's bytes ever wait here.
        self.flush(tcp)?;
        let count = self.connection.writer().write(bytes)?;
        match self.flush(tcp) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(count),
        }
    }

    fn flush(&mut self, tcp: &TcpStream) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut &*tcp) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
