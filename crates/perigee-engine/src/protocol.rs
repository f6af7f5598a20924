//! What the leader tells the other ranks of its replica and what they answer. Every command goes to every rank, every rank
//! answers every command but the goodbye, and one that cannot is a failed rank. The frames that carry these are `link`'s.

use perigee_backend::{PairOrder, PairState, StatePart};
use serde::{Deserialize, Serialize};

use crate::executor::{PageSpan, StateSource, StepPlan};
use crate::remote::StepReport;
use crate::traces::TraceNotes;

/// Version of this protocol; ranks of different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 5;

/// Experts that the mixture-of-experts layers use in a step instead of their own selection.
pub type ForcedExperts = Vec<(u32, Vec<u32>)>;

/// Bytes of a part of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBytes {
    /// Which; whether heads are counted on the rank or over the model is said where this is used.
    pub part: StatePart,
    /// [heads, D, D] or [heads, D, W - 1], little-endian.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Bytes of the first positions of a page in one MLA layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageBytes {
    /// Number of the page.
    pub page: u32,
    /// Index among the MLA layers.
    pub layer: u32,
    /// [positions, R + r], little-endian.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// How a rank's slots are reached, as its backend says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedSlots(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// One command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RankCommand {
    /// Run a step.
    Step {
        /// The plan.
        plan: Box<StepPlan>,
        /// (layer, top_k experts for each token); layers not listed route freely.
        forced: ForcedExperts,
    },
    /// Copy a session's slot and pages to host memory.
    Park {
        /// Name of the copy.
        key: u64,
        /// Slot to copy.
        slot: u32,
        /// Pages to copy, in order of position.
        pages: Vec<u32>,
    },
    /// Write a parked session back.
    Unpark {
        /// Name of the copy.
        key: u64,
        /// Slot to write.
        slot: u32,
        /// As many pages as were parked.
        pages: Vec<u32>,
    },
    /// Forget a parked session.
    DropParked {
        /// Name of the copy.
        key: u64,
    },
    /// Answer with the bytes of a part of a slot, if this rank holds those heads (counted over the whole model).
    ExportState {
        /// The slot.
        slot: u32,
        /// The part.
        part: StatePart,
    },
    /// Answer with this rank's part of a session's state, heads counted over the whole model, and the digest of each.
    ExportSlot {
        /// A slot or a parked session; what has not begun has nothing to export.
        from: StateSource,
    },
    /// Overwrite parts of a slot.
    ImportState {
        /// The slot.
        slot: u32,
        /// Heads counted on this rank.
        parts: Vec<StateBytes>,
    },
    /// Answer with the digests of this rank's part of a slot.
    DigestSlot {
        /// The slot.
        slot: u32,
    },
    /// Answer with how a process on the same machine reaches this rank's slots; nothing where it cannot.
    ShareSlots,
    /// Open slots of another replica's ranks, until they are closed.
    OpenSlots {
        /// By rank.
        shared: Vec<SharedSlots>,
    },
    /// Copy a slot of another replica, from the rank of this rank's number.
    TakeSlot {
        /// By rank.
        shared: Vec<SharedSlots>,
        /// Slot there.
        from: u32,
        /// Slot here.
        slot: u32,
    },
    /// Close slots of another replica's ranks.
    CloseSlots {
        /// By rank.
        shared: Vec<SharedSlots>,
    },
    /// Answer with an invitation to a pair; nothing where this rank has none.
    InvitePair,
    /// Carry out an order about the pair of this rank's invitation, and answer with its state.
    Pair {
        /// By rank.
        invitations: Vec<SharedSlots>,
        /// What to do.
        order: PairOrder,
    },
    /// Overwrite the beginnings of pages.
    ImportPages {
        /// What goes where.
        pages: Vec<PageBytes>,
    },
    /// Answer with the digests of pages, one for every MLA layer.
    DigestPages {
        /// The pages.
        pages: Vec<PageSpan>,
    },
    /// Fill slots and pages with not-a-number.
    Poison {
        /// Slots.
        slots: Vec<u32>,
        /// Pages.
        pages: Vec<u32>,
    },
    /// Note which traced sessions step here, while no step says so.
    Note {
        /// Which.
        notes: TraceNotes,
    },
    /// Answer with the bytes of weights that this rank holds, as a little-endian u64.
    WeightBytes,
    /// End cleanly, without an answer: the leader does not wait for one.
    Shutdown,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RankReply {
    /// Done, nothing to say.
    Done,
    /// Done, with bytes.
    Bytes(#[serde(with = "serde_bytes")] Vec<u8>),
    /// A step is done.
    Stepped(StepReport),
    /// Parts of a slot, each with its digest.
    State(Vec<(StateBytes, u64)>),
    /// Digests, in the order of the tensors.
    Digests(Vec<u64>),
    /// How far a pair is.
    Pair(PairState),
    /// Not done.
    Failed {
        /// Why.
        message: String,
        /// Whether this rank can go on.
        fatal: bool,
    },
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use perigee_backend::StateKind;
    use perigee_migration::AnswerStatus;

    use super::*;
    use crate::remote::{Refusal, RemoteCounts, RemoteHome, RemotePlan, RemoteRanges, RemoteRow};

    fn state() -> StateBytes {
        let part = StatePart { layer: 2, kind: StateKind::ConvK, first_head: 1, heads: 3 };
        StateBytes { part, bytes: vec![0, 255, 7] }
    }

    fn remote() -> RemotePlan {
        let home = RemoteHome { replica: "a".into(), incarnation: "1".into(), endpoint: "h:1".into() };
        let parts = vec![RemoteRanges { home: 0, ranges: vec![0..64, 128..192] }];
        let row = RemoteRow { row: 4, session: "s".into(), epoch: u64::MAX, parts };
        RemotePlan { homes: vec![home], rows: vec![row], patience_ms: 250 }
    }

    #[test]
    fn commands_arrive_as_they_were_sent() {
        let pages = vec![PageSpan { page: 3, first: 64, positions: 9 }];
        let context = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap();
        for command in [
            RankCommand::Step {
                plan: StepPlan { remote: remote(), feed: vec![1, 0], ..StepPlan::default() }.into(),
                forced: vec![(1, vec![2])],
            },
            RankCommand::ExportSlot { from: StateSource::Parked(5) },
            RankCommand::ImportState { slot: 1, parts: vec![state(), state()] },
            RankCommand::DigestSlot { slot: 2 },
            RankCommand::ShareSlots,
            RankCommand::OpenSlots { shared: vec![SharedSlots(vec![9; 200]), SharedSlots(Vec::new())] },
            RankCommand::TakeSlot { shared: vec![SharedSlots(vec![0, 255])], from: 3, slot: 4 },
            RankCommand::CloseSlots { shared: Vec::new() },
            RankCommand::Pair { invitations: vec![SharedSlots(vec![7])], order: PairOrder::Take { slot: 3 } },
            RankCommand::Note { notes: TraceNotes { begun: vec![(u64::MAX, context)], ended: vec![7] } },
            RankCommand::ImportPages { pages: vec![PageBytes { page: 1, layer: 2, bytes: vec![1; 300] }] },
            RankCommand::DigestPages { pages },
            RankCommand::Poison { slots: vec![1], pages: vec![2, 3] },
        ] {
            let bytes = postcard::to_stdvec(&command).unwrap();
            assert_eq!(postcard::from_bytes::<RankCommand>(&bytes).unwrap(), command);
        }
    }

    #[test]
    fn answers_arrive_as_they_were_sent() {
        let statuses = [AnswerStatus::Unknown, AnswerStatus::Stale, AnswerStatus::Missing, AnswerStatus::Busy];
        let refusals = (0..).zip(statuses).map(|(row, status)| Refusal { row, status }).collect();
        let wait = Duration::from_micros(1500);
        let counts = RemoteCounts { query_bytes: 1, answer_bytes: 2, tokens: 3, wait };
        for reply in [
            RankReply::Stepped(StepReport { faulty: vec![0, 1, 2, 3], refusals, counts }),
            RankReply::State(vec![(state(), u64::MAX)]),
            RankReply::Digests(vec![0, u64::MAX]),
            RankReply::Pair(PairState::Broken("it is gone".into())),
            RankReply::Bytes(vec![9; 200]),
        ] {
            let bytes = postcard::to_stdvec(&reply).unwrap();
            assert_eq!(postcard::from_bytes::<RankReply>(&bytes).unwrap(), reply);
        }
    }
}
