//! State slots that go to other processes, and come from them, by pairs over NCCL. What crosses is sent out of the slot, which
//! nobody changes meanwhile, and received into memory beside the slots.

use std::sync::Arc;

use perigee_backend::pairs::{MOST_PAIRS, PairEnd, PairOrder, PairState, Pairs, Patience};
use perigee_backend::{BackendError, Result};

use crate::backend::CudaBackend;
use crate::nccl::pair::{NcclPairs, Parcel, transport};

impl CudaBackend {
    fn pairs(&mut self) -> Result<&mut Pairs<NcclPairs>> {
        match &mut self.pairs {
            Some(pairs) => Ok(pairs),
            none => Ok(none.insert(Pairs::new(transport(self.stream.device())?, Patience::default()))),
        }
    }

    /// See [`perigee_backend::Backend::invite_pair`].
    pub(crate) fn pair_invite(&mut self) -> Result<Option<Vec<u8>>> {
        self.pairs()?.invite().map(Some).map_err(BackendError::Unsupported)
    }

    /// See [`perigee_backend::Backend::pair`].
    pub(crate) fn pair_order(&mut self, invitation: &[u8], order: PairOrder) -> Result<PairState> {
        Ok(match order {
            PairOrder::Meet { end, patience } => {
                let refusal = match end {
                    PairEnd::Source => None,
                    PairEnd::Target => transport(self.stream.device())?.refusal(invitation),
                };
                match refusal {
                    Some(why) => PairState::Broken(why),
                    None => self.pairs()?.meet(invitation, end, patience),
                }
            }
            PairOrder::Look => self.pairs()?.state(invitation),
            PairOrder::Send { slot } => {
                let parcel = self.cache()?.pieces(slot)?;
                // What was queued for the slot is done: it goes by another stream.
                self.stream.wait()?;
                self.pairs()?.send(invitation, parcel)
            }
            PairOrder::Expect => {
                let room = self.room()?;
                self.pairs()?.expect(invitation, room)
            }
            PairOrder::Take { slot } => {
                let parcel = self.pairs()?.take(invitation).map_err(BackendError::Unsupported)?;
                self.cache()?.take(&self.stream, &parcel, slot)?;
                // Before the room is used again.
                self.stream.wait()?;
                PairState::Ready
            }
            PairOrder::Close => {
                self.pairs()?.close(invitation);
                PairState::Broken("it was closed".into())
            }
        })
    }

    /// Room for a state that nothing else comes into: a pair that broke holds its own until all its work has ended.
    fn room(&mut self) -> Result<Parcel> {
        let is_free = |room: &&Parcel| room.iter().all(|piece| Arc::strong_count(&piece.buffer) == 1);
        if let Some(room) = self.rooms.iter().find(is_free) {
            return Ok(room.clone());
        }
        if self.rooms.len() >= MOST_PAIRS {
            return Err(BackendError::Unsupported(format!("more than {MOST_PAIRS} states on their way")));
        }
        let room = self.cache()?.room(self.stream.device())?;
        self.rooms.push(room.clone());
        Ok(room)
    }
}
