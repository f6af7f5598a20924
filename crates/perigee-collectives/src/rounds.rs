//! The collectives as rounds, written once for every way of linking ranks: in a round each rank sends at most one
//! bounded frame to every peer and then receives at most one from each. How frames travel is the business of `Links`;
//! README.md in this crate argues why rounds cannot deadlock.

use std::ops::Range;

use crate::CollectiveError;
use crate::frame::{CHUNK_BYTES, Call, Operation};
use crate::payload::{add_floats, append_floats, append_words, or_words, read_floats};

/// Up to this many bytes every rank sends its whole vector to every other and adds all of them up itself: one hop, at
/// the price of `size - 1` copies on the wire. Longer vectors go the two hops of reduce-scatter and all-gather.
const DIRECT_BYTES: usize = 32 * 1024;

const CHUNK_FLOATS: usize = CHUNK_BYTES / size_of::<f32>();
const CHUNK_WORDS: usize = CHUNK_BYTES / size_of::<u64>();

/// A way of carrying frames between the ranks of one group.
pub(crate) trait Links {
    /// This rank.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Sends every outgoing frame of `round` and receives every expected one.
    fn exchange(&mut self, round: &Round) -> Result<(), CollectiveError>;

    /// The payload received from `peer` in the last exchange; empty if none was expected.
    fn payload(&self, peer: usize) -> &[u8];

    /// Tells the other ranks of `error` where that is possible without waiting, and closes the links.
    fn close(&mut self, error: &CollectiveError);
}

/// The frames of one round, in buffers that are kept from round to round.
#[derive(Debug)]
pub(crate) struct Round {
    /// The call that the round belongs to.
    pub(crate) call: Call,
    /// The payload length due from each rank, `None` where nothing is.
    pub(crate) expected: Vec<Option<usize>>,
    /// Frames back to back; several peers may be sent the same one.
    outbox: Vec<u8>,
    /// Where in `outbox` each rank's frame lies; empty where nothing is sent.
    outgoing: Vec<Range<usize>>,
}

impl Round {
    fn new(size: usize) -> Self {
        let call = Call { operation: Operation::Join, root: 0, number: 0, total_bytes: 0 };
        Self { call, expected: vec![None; size], outbox: Vec::new(), outgoing: vec![0..0; size] }
    }

    /// The frame for `peer`, header included; empty where nothing is sent.
    pub(crate) fn outgoing(&self, peer: usize) -> &[u8] {
        &self.outbox[self.outgoing[peer].clone()]
    }

    fn begin(&mut self) {
        self.outbox.clear();
        self.outgoing.fill(0..0);
        self.expected.fill(None);
    }

    /// Appends a frame of `payload_bytes`, which `write` must append to the buffer, and says where it lies.
    fn frame(&mut self, payload_bytes: usize, write: impl FnOnce(&mut Vec<u8>)) -> Range<usize> {
        let start = self.outbox.len();
        self.outbox.extend_from_slice(&self.call.header(payload_bytes));
        write(&mut self.outbox);
        start..self.outbox.len()
    }

    /// One frame for everybody but `rank`. Where it lies is also recorded as `rank`'s own, so that a rank reads its own
    /// contribution back exactly as the others do.
    fn frame_for_all(&mut self, payload_bytes: usize, write: impl FnOnce(&mut Vec<u8>)) {
        let range = self.frame(payload_bytes, write);
        self.outgoing.fill(range);
    }
}

/// The collectives of one rank over its links.
#[derive(Debug)]
pub(crate) struct Rounds<L: Links> {
    links: L,
    round: Round,
    calls: u64,
    /// The first failure's message; once set, every call fails.
    failure: Option<String>,
}

impl<L: Links> Rounds<L> {
    pub(crate) fn new(links: L) -> Self {
        let round = Round::new(links.size());
        Self { links, round, calls: 0, failure: None }
    }

    pub(crate) fn rank(&self) -> usize {
        self.links.rank()
    }

    pub(crate) fn size(&self) -> usize {
        self.links.size()
    }

    pub(crate) fn links(&self) -> &L {
        &self.links
    }

    pub(crate) fn links_mut(&mut self) -> &mut L {
        &mut self.links
    }

    /// An exchange of empty frames: returns once every other rank has entered it as well.
    pub(crate) fn meet(&mut self) -> Result<(), CollectiveError> {
        self.run(Operation::Join, 0, 0, |group| group.exchange_with_all(0, |_| (), |_| 0))
    }

    pub(crate) fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.run(Operation::AllReduce, 0, size_of_val(data), |group| {
            let mut rest = data;
            loop {
                let (segment, after) = rest.split_at_mut(rest.len().min(group.size() * CHUNK_FLOATS));
                if size_of_val(segment) <= DIRECT_BYTES {
                    group.reduce_directly(segment)?;
                } else {
                    group.reduce_by_blocks(segment)?;
                }
                if after.is_empty() {
                    return Ok(());
                }
                rest = after;
            }
        })
    }

    pub(crate) fn all_gather(
        &mut self,
        mine: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let (rank, size) = (self.rank(), self.size());
        self.run(Operation::AllGather, 0, size_of_val(out), |group| {
            check_gather(rank, size, mine, counts, out)?;
            let longest = counts.iter().copied().max().unwrap_or(0);
            for round in 0..rounds_for(longest, CHUNK_FLOATS) {
                let piece = |count: usize| (round * CHUNK_FLOATS).min(count)..((round + 1) * CHUNK_FLOATS).min(count);
                let sent = &mine[piece(mine.len())];
                group.exchange_with_all(
                    size_of_val(sent),
                    |bytes| append_floats(bytes, sent),
                    |peer| piece(counts[peer]).len() * size_of::<f32>(),
                )?;
                let mut first = 0;
                for (peer, &count) in counts.iter().enumerate() {
                    let target = &mut out[first..first + count][piece(count)];
                    read_floats(target, group.contribution(peer));
                    first += count;
                }
            }
            Ok(())
        })
    }

    pub(crate) fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        let (rank, size) = (self.rank(), self.size());
        self.run(Operation::Broadcast, root, data.len(), |group| {
            if root >= size {
                return Err(CollectiveError::RootOutOfRange { root, size });
            }
            for index in 0..rounds_for(data.len(), CHUNK_BYTES) {
                let end = data.len().min((index + 1) * CHUNK_BYTES);
                let piece = &mut data[index * CHUNK_BYTES..end];
                group.round.begin();
                if rank == root {
                    group.round.frame_for_all(piece.len(), |bytes| bytes.extend_from_slice(piece));
                    group.links.exchange(&group.round)?;
                } else {
                    group.round.expected[root] = Some(piece.len());
                    group.links.exchange(&group.round)?;
                    piece.copy_from_slice(group.links.payload(root));
                }
            }
            Ok(())
        })
    }

    pub(crate) fn or(&mut self, bits: &mut [u64]) -> Result<(), CollectiveError> {
        self.run(Operation::Or, 0, size_of_val(bits), |group| {
            for index in 0..rounds_for(bits.len(), CHUNK_WORDS) {
                let end = bits.len().min((index + 1) * CHUNK_WORDS);
                let piece = &mut bits[index * CHUNK_WORDS..end];
                let bytes = size_of_val(piece);
                group.exchange_with_all(bytes, |buffer| append_words(buffer, piece), |_| bytes)?;
                for peer in 0..group.size() {
                    or_words(piece, group.contribution(peer));
                }
            }
            Ok(())
        })
    }

    /// Runs one call: nothing after a failure, and a failure of any kind ends the group for everybody.
    fn run(
        &mut self,
        operation: Operation,
        root: usize,
        total_bytes: usize,
        body: impl FnOnce(&mut Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(cause) = &self.failure {
            return Err(CollectiveError::Poisoned { cause: cause.clone() });
        }
        // A root that does not fit is out of range as well, and `broadcast` refuses it before anything is sent.
        let root = u16::try_from(root).unwrap_or(u16::MAX);
        self.round.call = Call { operation, root, number: self.calls, total_bytes: total_bytes as u64 };
        self.calls += 1;
        body(self).inspect_err(|error| {
            self.failure = Some(error.to_string());
            self.links.close(error);
        })
    }

    /// Sends one payload to every peer and receives `expected(peer)` bytes from each.
    fn exchange_with_all(
        &mut self,
        payload_bytes: usize,
        write: impl FnOnce(&mut Vec<u8>),
        expected: impl Fn(usize) -> usize,
    ) -> Result<(), CollectiveError> {
        self.round.begin();
        self.round.frame_for_all(payload_bytes, write);
        self.expect_from_peers(expected);
        self.links.exchange(&self.round)
    }

    fn expect_from_peers(&mut self, expected: impl Fn(usize) -> usize) {
        let rank = self.rank();
        for (peer, due) in self.round.expected.iter_mut().enumerate() {
            *due = (peer != rank).then(|| expected(peer));
        }
    }

    /// What `rank` contributed to the last round: received, or this rank's own frame read back.
    fn contribution(&self, rank: usize) -> &[u8] {
        if rank == self.links.rank() {
            self.round.outgoing(rank).get(crate::frame::HEADER_BYTES..).unwrap_or_default()
        } else {
            self.links.payload(rank)
        }
    }

    /// `values` := the sum of all contributions to the last round, in rank order.
    fn sum_contributions(&self, values: &mut [f32]) {
        read_floats(values, self.contribution(0));
        for rank in 1..self.size() {
            add_floats(values, self.contribution(rank));
        }
    }

    /// One hop: everybody sends all of `segment` and adds all of them up.
    fn reduce_directly(&mut self, segment: &mut [f32]) -> Result<(), CollectiveError> {
        let bytes = size_of_val(segment);
        self.exchange_with_all(bytes, |buffer| append_floats(buffer, segment), |_| bytes)?;
        self.sum_contributions(segment);
        Ok(())
    }

    /// Two hops: rank r adds up block r of `segment` for everybody, then hands the sum round. `segment` has at most one
    /// chunk of elements for every rank.
    fn reduce_by_blocks(&mut self, segment: &mut [f32]) -> Result<(), CollectiveError> {
        let (rank, size, length) = (self.rank(), self.size(), segment.len());
        let block = |r: usize| r * length / size..(r + 1) * length / size;
        let mine = block(rank);

        self.round.begin();
        for peer in 0..size {
            let part = &segment[block(peer)];
            self.round.outgoing[peer] = self.round.frame(size_of_val(part), |buffer| append_floats(buffer, part));
        }
        self.expect_from_peers(|_| mine.len() * size_of::<f32>());
        self.links.exchange(&self.round)?;
        self.sum_contributions(&mut segment[mine.clone()]);

        let sum = &segment[mine];
        self.exchange_with_all(
            size_of_val(sum),
            |buffer| append_floats(buffer, sum),
            |peer| block(peer).len() * size_of::<f32>(),
        )?;
        for peer in 0..size {
            read_floats(&mut segment[block(peer)], self.contribution(peer));
        }
        Ok(())
    }
}

/// Rounds that `items` take at `per_round` each. Even nothing takes one, so that every call meets every peer and a rank
/// that diverged or died is noticed.
fn rounds_for(items: usize, per_round: usize) -> usize {
    items.div_ceil(per_round).max(1)
}

/// Checks the arguments of an all-gather on `rank` of `size` against each other.
pub(crate) fn check_gather(
    rank: usize,
    size: usize,
    mine: &[f32],
    counts: &[usize],
    out: &[f32],
) -> Result<(), CollectiveError> {
    let wrong_counts = CollectiveError::WrongCounts { size, found: counts.len() };
    if counts.len() != size {
        return Err(wrong_counts);
    }
    let Some(total) = counts.iter().try_fold(0_usize, |sum, &count| sum.checked_add(count)) else {
        return Err(wrong_counts);
    };
    if mine.len() != counts[rank] {
        return Err(CollectiveError::WrongLength { buffer: "mine", expected: counts[rank], found: mine.len() });
    }
    if out.len() != total {
        return Err(CollectiveError::WrongLength { buffer: "out", expected: total, found: out.len() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gather_arguments_that_contradict_each_other_are_named() {
        let check =
            |mine: usize, counts: &[usize], out: usize| check_gather(1, 2, &vec![0.0; mine], counts, &vec![0.0; out]);
        assert!(check(2, &[3, 2], 5).is_ok());
        assert!(matches!(check(2, &[3], 5), Err(CollectiveError::WrongCounts { size: 2, found: 1 })));
        assert!(matches!(check(2, &[usize::MAX, 2], 5), Err(CollectiveError::WrongCounts { .. })));
        let wrong = |buffer, expected, found| move |error| matches!(error, CollectiveError::WrongLength { buffer: b, expected: e, found: f } if (b, e, f) == (buffer, expected, found));
        assert!(check(1, &[3, 2], 5).is_err_and(wrong("mine", 2, 1)));
        assert!(check(2, &[3, 2], 6).is_err_and(wrong("out", 5, 6)));
    }
}
