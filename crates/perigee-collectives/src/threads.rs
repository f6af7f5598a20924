//! A group whose ranks are threads of one process, linked by channels. It runs the same rounds as the socket group and
//! exists for tests and simulations; it has no timeouts, since a thread that lives will come, and a dropped rank is
//! noticed by its closed channels.

use std::sync::mpsc::{Receiver, Sender, channel};

use crate::frame::{HEADER_BYTES, Report};
use crate::rounds::{Links, Round, Rounds};
use crate::{Collective, CollectiveError};

/// One rank of a group of threads.
#[derive(Debug)]
pub struct ThreadCollective {
    rounds: Rounds<ThreadLinks>,
}

/// Makes a group of `size` ranks, to be moved to a thread each; entry r is rank r. A size of 0 gives no ranks.
pub fn thread_group(size: usize) -> Vec<ThreadCollective> {
    let mut group: Vec<ThreadLinks> = (0..size)
        .map(|rank| ThreadLinks {
            rank,
            senders: (0..size).map(|_| None).collect(),
            receivers: (0..size).map(|_| None).collect(),
            received: vec![Vec::new(); size],
        })
        .collect();
    for from in 0..size {
        for to in (0..size).filter(|&to| to != from) {
            let (sender, receiver) = channel();
            group[from].senders[to] = Some(sender);
            group[to].receivers[from] = Some(receiver);
        }
    }
    group.into_iter().map(|links| ThreadCollective { rounds: Rounds::new(links) }).collect()
}

impl Collective for ThreadCollective {
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
}

/// A channel in each direction to every other rank; the entries at this rank's own index are `None`.
#[derive(Debug)]
struct ThreadLinks {
    rank: usize,
    senders: Vec<Option<Sender<Vec<u8>>>>,
    receivers: Vec<Option<Receiver<Vec<u8>>>>,
    /// The last round's frames, header included, empty where none was expected.
    received: Vec<Vec<u8>>,
}

impl ThreadLinks {
    fn receive(&self, peer: usize, round: &Round, due: usize) -> Result<Vec<u8>, CollectiveError> {
        let lost = CollectiveError::PeerLost { rank: peer };
        let Some(frame) = self.receivers[peer].as_ref().and_then(|receiver| receiver.recv().ok()) else {
            return Err(lost);
        };
        let Some(header) = frame.first_chunk::<HEADER_BYTES>() else {
            return Err(lost);
        };
        round.call.check(peer, due, header)?;
        Ok(frame)
    }

    /// Why `peer` no longer takes frames: what it reported before it closed, else that it is gone.
    fn autopsy(&self, peer: usize) -> CollectiveError {
        let frames = self.receivers[peer].iter().flat_map(Receiver::try_iter);
        let report = frames.filter_map(|frame| frame.first_chunk().and_then(Report::decode)).next();
        report.map_or(CollectiveError::PeerLost { rank: peer }, |report| report.into_error(peer))
    }
}

impl Links for ThreadLinks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.senders.len()
    }

    fn exchange(&mut self, round: &Round) -> Result<(), CollectiveError> {
        for peer in (0..self.size()).filter(|&peer| peer != self.rank) {
            let frame = round.outgoing(peer);
            if frame.is_empty() {
                continue;
            }
            let sent = self.senders[peer].as_ref().is_some_and(|sender| sender.send(frame.to_vec()).is_ok());
            if !sent {
                return Err(self.autopsy(peer));
            }
        }
        for peer in 0..self.size() {
            self.received[peer] = match round.expected[peer] {
                Some(due) => self.receive(peer, round, due)?,
                None => Vec::new(),
            };
        }
        Ok(())
    }

    fn payload(&self, peer: usize) -> &[u8] {
        self.received[peer].get(HEADER_BYTES..).unwrap_or_default()
    }

    fn close(&mut self, error: &CollectiveError) {
        let report = Report::new(self.rank, error).frame();
        for sender in self.senders.iter_mut().filter_map(Option::take) {
            // A peer that is gone as well needs no report.
            let _ = sender.send(report.to_vec());
        }
        self.receivers.fill_with(|| None);
    }
}
