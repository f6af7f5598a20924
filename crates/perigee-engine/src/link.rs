//! Connections between a replica's leader and its other ranks: frames of a length and a `postcard` message, over TCP
//! between processes or over channels between threads of one process. A reader thread of each connection notices a lost
//! rank even while nothing runs.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::protocol::{RankCommand, RankReply};

/// Largest frame: a step plan of a million-token session is under 1 MB. A state that moves crosses as a whole, tens of MB;
/// pages cross in pieces.
const MAX_FRAME: usize = 256 << 20;

/// A broken connection between ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The other side closed or reset it: the process ended.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// No answer within the time allowed.
    #[error("no answer for {0:?}")]
    Silent(Duration),
    /// Bytes that are no message of this protocol.
    #[error("not understood: {0}")]
    Malformed(String),
}

/// The leader's end of a connection to another rank.
pub trait LeaderLink: Send {
    /// Sends a command.
    fn send(&mut self, command: &RankCommand) -> Result<(), LinkError>;
    /// Waits for the next answer.
    fn receive(&mut self, timeout: Duration) -> Result<RankReply, LinkError>;
    /// An answer or a loss that has already arrived, without waiting.
    fn poll(&mut self) -> Option<Result<RankReply, LinkError>>;
}

/// A follower's end.
pub trait FollowerLink: Send {
    /// Waits for the next command; none when a leader of this process has dropped its end. A leader of another process
    /// says goodbye by [`RankCommand::Shutdown`]; one that is gone without it is lost.
    fn next(&mut self) -> Result<Option<RankCommand>, LinkError>;
    /// Sends an answer.
    fn reply(&mut self, reply: &RankReply) -> Result<(), LinkError>;
}

/// A connection between two ranks, both ways apart, so that one thread may read while another writes.
pub struct LinkEnds {
    /// For closing both ways.
    pub socket: TcpStream,
    /// What is received.
    pub reader: Box<dyn Read + Send>,
    /// What is sent; a write leaves at once.
    pub writer: Box<dyn Write + Send>,
}

impl LinkEnds {
    /// Plain TCP.
    ///
    /// # Errors
    /// The system refuses an option or further handles on the socket.
    pub fn plain(socket: TcpStream) -> std::io::Result<Self> {
        socket.set_nodelay(true)?;
        let (reader, writer) = (socket.try_clone()?, socket.try_clone()?);
        Ok(Self { socket, reader: Box::new(reader), writer: Box::new(writer) })
    }
}

/// The leader's end over TCP.
pub struct TcpLeaderLink {
    socket: TcpStream,
    writer: Box<dyn Write + Send>,
    replies: Receiver<Result<RankReply, LinkError>>,
}

impl TcpLeaderLink {
    /// Takes a connection; `on_lost` is called once from the reader thread when the other side is gone.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(ends: LinkEnds, on_lost: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let LinkEnds { socket, mut reader, writer } = ends;
        let (sender, replies) = channel();
        std::thread::Builder::new().name("perigee-rank-link".into()).spawn(move || {
            loop {
                let reply = read_frame(&mut reader);
                let ended = reply.is_err();
                if sender.send(reply).is_err() || ended {
                    break;
                }
            }
            on_lost();
        })?;
        Ok(Self { socket, writer, replies })
    }
}

impl Drop for TcpLeaderLink {
    fn drop(&mut self) {
        // Ends the reader thread; a socket already closed is as good.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl LeaderLink for TcpLeaderLink {
    fn send(&mut self, command: &RankCommand) -> Result<(), LinkError> {
        write_frame(&mut self.writer, command)
    }

    fn receive(&mut self, timeout: Duration) -> Result<RankReply, LinkError> {
        receive(&self.replies, timeout)
    }

    fn poll(&mut self) -> Option<Result<RankReply, LinkError>> {
        self.replies.try_recv().ok()
    }
}

/// A follower's end over TCP.
pub struct TcpFollowerLink {
    reader: Box<dyn Read + Send>,
    writer: Box<dyn Write + Send>,
}

impl TcpFollowerLink {
    /// Takes a connection.
    pub fn new(ends: LinkEnds) -> Self {
        Self { reader: ends.reader, writer: ends.writer }
    }
}

impl FollowerLink for TcpFollowerLink {
    fn next(&mut self) -> Result<Option<RankCommand>, LinkError> {
        match read_frame(&mut self.reader) {
            Err(LinkError::Lost(why)) => Err(LinkError::Lost(format!("rank 0 is gone without a goodbye: {why}"))),
            command => command.map(Some),
        }
    }

    fn reply(&mut self, reply: &RankReply) -> Result<(), LinkError> {
        write_frame(&mut self.writer, reply)
    }
}

/// Both ends over channels, for ranks that are threads of one process.
pub fn channel_link() -> (ChannelLeaderLink, ChannelFollowerLink) {
    let (command_sender, commands) = channel();
    let (reply_sender, replies) = channel();
    (ChannelLeaderLink { commands: command_sender, replies }, ChannelFollowerLink { commands, replies: reply_sender })
}

/// The leader's end of [`channel_link`].
pub struct ChannelLeaderLink {
    commands: Sender<RankCommand>,
    replies: Receiver<Result<RankReply, LinkError>>,
}

impl LeaderLink for ChannelLeaderLink {
    fn send(&mut self, command: &RankCommand) -> Result<(), LinkError> {
        self.commands.send(command.clone()).map_err(|_| LinkError::Lost("the rank's thread ended".into()))
    }

    fn receive(&mut self, timeout: Duration) -> Result<RankReply, LinkError> {
        receive(&self.replies, timeout)
    }

    fn poll(&mut self) -> Option<Result<RankReply, LinkError>> {
        self.replies.try_recv().ok()
    }
}

/// A follower's end of [`channel_link`].
pub struct ChannelFollowerLink {
    commands: Receiver<RankCommand>,
    replies: Sender<Result<RankReply, LinkError>>,
}

impl FollowerLink for ChannelFollowerLink {
    fn next(&mut self) -> Result<Option<RankCommand>, LinkError> {
        Ok(self.commands.recv().ok())
    }

    fn reply(&mut self, reply: &RankReply) -> Result<(), LinkError> {
        self.replies.send(Ok(reply.clone())).map_err(|_| LinkError::Lost("the leader's thread ended".into()))
    }
}

fn receive(replies: &Receiver<Result<RankReply, LinkError>>, timeout: Duration) -> Result<RankReply, LinkError> {
    match replies.recv_timeout(timeout) {
        Ok(reply) => reply,
        Err(RecvTimeoutError::Timeout) => Err(LinkError::Silent(timeout)),
        Err(RecvTimeoutError::Disconnected) => Err(LinkError::Lost("the rank ended".into())),
    }
}

fn write_frame(stream: &mut impl Write, message: &impl Serialize) -> Result<(), LinkError> {
    let malformed = |error: postcard::Error| LinkError::Malformed(error.to_string());
    let mut frame = postcard::to_extend(message, vec![0u8; 4]).map_err(malformed)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(LinkError::Malformed(format!("a message of {length} bytes; the limit is {MAX_FRAME}")));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    stream.write_all(&frame).map_err(lost)
}

fn read_frame<M: DeserializeOwned>(stream: &mut impl Read) -> Result<M, LinkError> {
    let mut length = [0u8; 4];
    stream.read_exact(&mut length).map_err(lost)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(LinkError::Malformed(format!("a frame of {length} bytes; the limit is {MAX_FRAME}")));
    }
    // Grows with the bytes that really arrive, so that a lying length allocates nothing.
    let mut frame = Vec::new();
    stream.take(length as u64).read_to_end(&mut frame).map_err(lost)?;
    if frame.len() < length {
        return Err(LinkError::Lost("the connection ended inside a message".into()));
    }
    postcard::from_bytes(&frame).map_err(|error| LinkError::Malformed(error.to_string()))
}

fn lost(error: std::io::Error) -> LinkError {
    LinkError::Lost(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn connected() -> (TcpLeaderLink, TcpFollowerLink) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let leader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (follower, _) = listener.accept().unwrap();
        let leader = TcpLeaderLink::new(LinkEnds::plain(leader).unwrap(), || {}).unwrap();
        (leader, TcpFollowerLink::new(LinkEnds::plain(follower).unwrap()))
    }

    #[test]
    fn a_leader_that_says_goodbye_ended_in_order() {
        let (mut leader, mut follower) = connected();
        leader.send(&RankCommand::Shutdown).unwrap();
        drop(leader);
        assert_eq!(follower.next(), Ok(Some(RankCommand::Shutdown)));
    }

    #[test]
    fn a_leader_gone_without_a_goodbye_is_lost_even_between_commands() {
        let (mut leader, mut follower) = connected();
        leader.send(&RankCommand::WeightBytes).unwrap();
        drop(leader);
        assert_eq!(follower.next(), Ok(Some(RankCommand::WeightBytes)));
        let lost = follower.next().unwrap_err();
        assert!(lost.to_string().contains("rank 0 is gone without a goodbye"), "{lost}");
    }
}
