//! Moving sessions over all ranks: parts of a slot gathered and dealt out by heads, pages read from the leader and written
//! to everybody, digests added up or held against each other.

use perigee_backend::{Backend, PairOrder, PairState, StatePart};
use perigee_migration::{Digest, Geometry, PageSlice, STATE_KINDS, StateSlice, TensorDigests};

use super::{Ranks, local, lost, unexpected};
use crate::executor::{ExecutorError, PageSpan, StateSource};
use crate::protocol::{PageBytes, RankCommand, RankReply, SharedSlots, StateBytes};

/// Bytes of pages in one command to another rank, about; far below a frame.
const COMMAND_BYTES: usize = 32 << 20;

impl<B: Backend> Ranks<B> {
    /// A session's state, from every rank its heads.
    pub(super) fn slices(&mut self, from: StateSource) -> Result<Vec<StateSlice>, ExecutorError> {
        if from == StateSource::Empty {
            return self.zeros();
        }
        let mut slices = Vec::new();
        for (rank, reply) in self.tell(&RankCommand::ExportSlot { from })?.into_iter().enumerate() {
            let RankReply::State(parts) = reply else { return Err(unexpected(rank, &reply)) };
            slices.extend(parts.into_iter().map(|(StateBytes { part, bytes }, digest)| StateSlice {
                part,
                digest: Digest(digest),
                bytes,
            }));
        }
        Ok(slices)
    }

    /// The state of a session that has not begun.
    fn zeros(&self) -> Result<Vec<StateSlice>, ExecutorError> {
        let geometry = self.known_geometry()?;
        let parts = (0..geometry.kda_layers).flat_map(|layer| STATE_KINDS.map(|kind| (layer, kind)));
        let slices = parts.map(|(layer, kind)| {
            let part = StatePart { layer, kind, first_head: 0, heads: geometry.kda_heads };
            let bytes = vec![0; (u64::from(part.heads) * geometry.head_bytes(kind)) as usize];
            // A sum over zeros.
            StateSlice { part, digest: Digest::default(), bytes }
        });
        Ok(slices.collect())
    }

    /// Writes slices to a slot, to every rank the part in its heads.
    pub(super) fn write_slot(&mut self, slot: u32, slices: &[StateSlice]) -> Result<(), ExecutorError> {
        let geometry = self.known_geometry()?;
        let ranks = self.size() as u32;
        if let Some(slice) = slices.iter().find(|slice| !is_whole(&geometry, slice)) {
            let StateSlice { part, bytes, .. } = slice;
            return Err(refused(format!("a slice of {part:?} with {} bytes fits no slot", bytes.len())));
        }
        let mut commands = Vec::with_capacity(self.size());
        for rank in 0..ranks {
            let mut parts = Vec::new();
            for slice in slices {
                let mine = slice.for_rank(&geometry, rank, ranks).map_err(|error| refused(error.to_string()))?;
                parts.extend(mine.map(|mine| StateBytes { part: mine.part, bytes: mine.bytes }));
            }
            commands.push(RankCommand::ImportState { slot, parts });
        }
        for (index, (link, command)) in self.others.iter_mut().zip(&commands[1..]).enumerate() {
            link.send(command).map_err(|error| lost(index + 1, &error))?;
        }
        let own = self.own.execute(&commands[0]);
        self.gather(own).map(drop)
    }

    pub(super) fn slot_digests(&mut self, slot: u32) -> Result<TensorDigests, ExecutorError> {
        let geometry = self.known_geometry()?;
        let mut whole = TensorDigests::new(&geometry);
        for (rank, reply) in self.tell(&RankCommand::DigestSlot { slot })?.into_iter().enumerate() {
            let RankReply::Digests(numbers) = reply else { return Err(unexpected(rank, &reply)) };
            let part = TensorDigests::from_numbers(&geometry, &numbers);
            part.and_then(|part| whole.add_all(&part)).map_err(|error| ExecutorError {
                rank,
                message: error.to_string(),
                fatal: false,
            })?;
        }
        Ok(whole)
    }

    /// How each rank's slots are reached; none where one has no way.
    pub(super) fn shared_slots(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        let replies = self.tell(&RankCommand::ShareSlots)?;
        self.all_bytes(replies)
    }

    /// Opens slots on every rank, or on none.
    pub(super) fn open_peer(&mut self, shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        if shared.len() != self.size() {
            return Err(refused(format!("slots of {} ranks, this replica has {}", shared.len(), self.size())));
        }
        let shared = by_rank(shared);
        let opened = self.tell(&RankCommand::OpenSlots { shared: shared.clone() });
        if opened.as_ref().is_err_and(|error| !error.fatal) {
            // Those that did open them; closing what is not open is nothing.
            self.tell(&RankCommand::CloseSlots { shared })?;
        }
        opened.map(drop)
    }

    /// Invitations of all ranks to pairs; none where one has none.
    pub(super) fn pair_invitations(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        let replies = self.tell(&RankCommand::InvitePair)?;
        self.all_bytes(replies)
    }

    /// An order about the pairs of all ranks, and how far they are together.
    pub(super) fn order_pairs(
        &mut self,
        invitations: &[Vec<u8>],
        order: PairOrder,
    ) -> Result<PairState, ExecutorError> {
        if invitations.len() != self.size() {
            let (found, expected) = (invitations.len(), self.size());
            return Err(refused(format!("pairs of {found} ranks, this replica has {expected}")));
        }
        let mut state = PairState::Ready;
        let command = RankCommand::Pair { invitations: by_rank(invitations), order };
        for (rank, reply) in self.tell(&command)?.into_iter().enumerate() {
            let RankReply::Pair(of_rank) = reply else { return Err(unexpected(rank, &reply)) };
            state = state.join(of_rank);
        }
        Ok(state)
    }

    /// What every rank answered; none where one had nothing to answer.
    fn all_bytes(&self, replies: Vec<RankReply>) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        let mut told = Vec::with_capacity(self.size());
        for (rank, reply) in replies.into_iter().enumerate() {
            let RankReply::Bytes(bytes) = reply else { return Err(unexpected(rank, &reply)) };
            told.push(bytes);
        }
        Ok(Some(told).filter(|told| told.iter().all(|bytes| !bytes.is_empty())))
    }

    pub(super) fn page_slices(&mut self, pages: &[PageSpan]) -> Result<Vec<PageSlice>, ExecutorError> {
        let geometry = self.known_geometry()?;
        let mut slices = Vec::new();
        for span in pages {
            for (layer, bytes) in (0..).zip(self.own.export_page(span).map_err(|error| local(&error))?) {
                let slice = PageSlice::new(&geometry, layer, span.first, bytes);
                slices.push(slice.map_err(|error| refused(error.to_string()))?);
            }
        }
        Ok(slices)
    }

    pub(super) fn write_pages(&mut self, pages: &[(u32, PageSlice)]) -> Result<(), ExecutorError> {
        let mut command = Vec::new();
        let mut bytes = 0;
        for (page, slice) in pages {
            if bytes > 0 && bytes + slice.bytes.len() > COMMAND_BYTES {
                bytes = 0;
                self.tell(&RankCommand::ImportPages { pages: std::mem::take(&mut command) })?;
            }
            bytes += slice.bytes.len();
            command.push(PageBytes { page: *page, layer: slice.layer, bytes: slice.bytes.clone() });
        }
        self.tell(&RankCommand::ImportPages { pages: command }).map(drop)
    }

    pub(super) fn page_digests(&mut self, pages: &[PageSpan]) -> Result<Vec<Digest>, ExecutorError> {
        let mut first: Option<Vec<u64>> = None;
        for (rank, reply) in self.tell(&RankCommand::DigestPages { pages: pages.to_vec() })?.into_iter().enumerate() {
            let RankReply::Digests(found) = reply else { return Err(unexpected(rank, &reply)) };
            let expected = first.get_or_insert_with(|| found.clone());
            if let Some(layer) =
                (0..expected.len().max(found.len())).find(|&layer| expected.get(layer) != found.get(layer))
            {
                let message = format!("its latents of MLA layer {layer} differ from rank 0's; restart the replica");
                return Err(ExecutorError { rank, message, fatal: false });
            }
        }
        Ok(first.unwrap_or_default().into_iter().map(Digest).collect())
    }

    fn known_geometry(&self) -> Result<Geometry, ExecutorError> {
        self.own.geometry().ok_or_else(|| refused("a replica without latent pages moves no sessions".into()))
    }
}

pub(super) fn by_rank(shared: &[Vec<u8>]) -> Vec<SharedSlots> {
    shared.iter().cloned().map(SharedSlots).collect()
}

/// Whether a slice has the bytes of its heads, and those are heads of the model.
fn is_whole(geometry: &Geometry, slice: &StateSlice) -> bool {
    let StateSlice { part, bytes, .. } = slice;
    slice.heads().end <= geometry.kda_heads
        && bytes.len() as u64 == u64::from(part.heads) * geometry.head_bytes(part.kind)
}

/// Refused by the leader, before any rank was told.
fn refused(message: String) -> ExecutorError {
    ExecutorError { rank: 0, message, fatal: false }
}
