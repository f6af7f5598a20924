//! Letting the ranks that belong here in and everybody else out, on one listener and without letting a silent stranger
//! hold up the group. The gate only collects connections; what they are answered is decided by `rendezvous`.

use std::borrow::Cow;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::SocketConfig;
use super::hello::{Answer, HELLO_MAX_BYTES, Hello, Parsed, Purpose, VERSION};
use super::poll::poll;
use super::wire::Wire;
use crate::{CollectiveError, Refusal};

/// How long a connection may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

/// Connections that have not said hello yet; the oldest makes room for a newcomer.
const MAX_PENDING: usize = 64;

/// Who is let in.
pub(super) struct Gate<'a> {
    pub(super) listener: &'a TcpListener,
    pub(super) config: &'a SocketConfig,
    pub(super) purpose: Purpose,
    /// Ranks from this one up to the group's size are waited for.
    pub(super) first: usize,
    pub(super) deadline: Instant,
}

/// A rank that was let in; its connection does not block.
pub(super) struct Admitted {
    pub(super) wire: Wire,
    /// Where it listens for higher ranks.
    pub(super) listens_at: SocketAddr,
}

/// A connection that has not said hello yet.
struct Pending {
    wire: Wire,
    from: SocketAddr,
    since: Instant,
    bytes: Vec<u8>,
}

enum Step {
    Wait,
    Drop(Cow<'static, str>),
    Refuse(Refusal),
    Admit(Hello),
}

impl Gate<'_> {
    /// Waits until every rank from `first` on is connected; entry r of the result is rank r's connection.
    ///
    /// # Errors
    /// [`CollectiveError::JoinTimeout`] naming the ranks that are missing at the deadline, or a listener that fails.
    /// Strangers, however they behave, are no error.
    pub(super) fn admit_all(&self) -> Result<Vec<Option<Admitted>>, CollectiveError> {
        let started = Instant::now();
        self.listener.set_nonblocking(true).map_err(CollectiveError::socket("set up the listener for other ranks"))?;
        let mut admitted: Vec<Option<Admitted>> = (0..self.config.size).map(|_| None).collect();
        let mut pending = Vec::new();
        loop {
            // A rank that died, or spoke out of turn, makes room for its successor.
            for entry in &mut admitted {
                if entry.as_ref().is_some_and(|rank| !is_quiet(&rank.wire.tcp)) {
                    *entry = None;
                }
            }
            let missing: Vec<usize> = (self.first..self.config.size).filter(|&rank| admitted[rank].is_none()).collect();
            if missing.is_empty() {
                return Ok(admitted);
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CollectiveError::JoinTimeout { waited: started.elapsed(), missing });
            }
            self.wait(&pending, &admitted, left)?;
            self.accept(&mut pending)?;
            pending.retain_mut(|connection| self.advance(connection, &mut admitted));
        }
    }

    fn wait(&self, pending: &[Pending], admitted: &[Option<Admitted>], left: Duration) -> Result<(), CollectiveError> {
        let mut sockets = vec![PollFd::new(self.listener, PollFlags::IN)];
        sockets.extend(pending.iter().map(|connection| PollFd::new(&connection.wire.tcp, PollFlags::IN)));
        sockets.extend(admitted.iter().flatten().map(|rank| PollFd::new(&rank.wire.tcp, PollFlags::IN)));
        let oldest = pending.iter().map(|connection| HELLO_TIMEOUT.saturating_sub(connection.since.elapsed())).min();
        poll(&mut sockets, oldest.map_or(left, |oldest| oldest.min(left)))?;
        Ok(())
    }

    fn accept(&self, pending: &mut Vec<Pending>) -> Result<(), CollectiveError> {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    if stream.set_nonblocking(true).is_err() {
                        continue;
                    }
                    if pending.len() == MAX_PENDING {
                        pending.remove(0);
                    }
                    match Wire::accepted(stream, self.config.tls.as_ref()) {
                        Ok(wire) => pending.push(Pending { wire, from, since: Instant::now(), bytes: Vec::new() }),
                        Err(error) => tracing::warn!(%from, %error, "could not begin TLS with a rank"),
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => return Err(CollectiveError::socket("accept connections of other ranks")(error)),
            }
        }
    }

    /// Reads on in `connection` and decides; false once it is pending no more.
    fn advance(&self, connection: &mut Pending, admitted: &mut [Option<Admitted>]) -> bool {
        let from = connection.from;
        match self.judge(connection, admitted) {
            Step::Wait => return true,
            Step::Drop(reason) => {
                tracing::warn!(%from, group = self.config.group, %reason, "dropped a stranger at the rendezvous");
            }
            Step::Refuse(refusal) => {
                tracing::warn!(%from, group = self.config.group, %refusal, "refused a rank at the rendezvous");
                // Best effort: the connection closes in any case.
                let _ = connection.wire.write(&Answer::Refused(refusal).encode());
            }
            Step::Admit(hello) => match connection.wire.take_over() {
                Ok(wire) => {
                    let mut listens_at = hello.listens_at;
                    if listens_at.ip().is_unspecified() {
                        listens_at.set_ip(from.ip());
                    }
                    admitted[hello.rank] = Some(Admitted { wire, listens_at });
                }
                Err(error) => tracing::warn!(%from, %error, "could not keep the connection of a rank"),
            },
        }
        false
    }

    fn judge(&self, connection: &mut Pending, admitted: &[Option<Admitted>]) -> Step {
        let mut buffer = [0; HELLO_MAX_BYTES + 1];
        match connection.wire.read(&mut buffer) {
            Ok(0) => return Step::Drop("it closed the connection before its hello was complete".into()),
            Ok(count) => connection.bytes.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return Step::Drop(format!("TLS with it failed: {error}").into());
            }
            Err(_) => return Step::Drop("its connection broke before its hello was complete".into()),
        }
        match Hello::parse(&connection.bytes) {
            Parsed::Incomplete if connection.since.elapsed() < HELLO_TIMEOUT => Step::Wait,
            Parsed::Incomplete => Step::Drop("it did not say hello in time".into()),
            Parsed::Garbage => Step::Drop("it does not speak the rank protocol".into()),
            Parsed::OtherVersion(found) => Step::Refuse(Refusal::Version { expected: VERSION, found }),
            Parsed::Hello(hello) if hello.purpose != self.purpose => {
                Step::Drop("it mistook this rank for another".into())
            }
            Parsed::Hello(hello) => match self.refusal(&hello, admitted) {
                Some(refusal) => Step::Refuse(refusal),
                None => Step::Admit(hello),
            },
        }
    }

    fn refusal(&self, hello: &Hello, admitted: &[Option<Admitted>]) -> Option<Refusal> {
        let SocketConfig { size, group, incarnation, .. } = self.config;
        if hello.group != *group {
            Some(Refusal::Group { found: hello.group.clone() })
        } else if hello.incarnation != *incarnation {
            Some(Refusal::Incarnation)
        } else if hello.size != *size {
            Some(Refusal::Size { expected: *size, found: hello.size })
        } else if !(self.first..*size).contains(&hello.rank) {
            Some(Refusal::RankOutOfRange { rank: hello.rank, size: *size })
        } else if admitted[hello.rank].as_ref().is_some_and(|rank| is_quiet(&rank.wire.tcp)) {
            Some(Refusal::DuplicateRank { rank: hello.rank })
        } else {
            None
        }
    }
}

/// Whether the other side is connected and waits for its answer, as it should.
fn is_quiet(stream: &TcpStream) -> bool {
    stream.peek(&mut [0]).is_err_and(|error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted))
}
