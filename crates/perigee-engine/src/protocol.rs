//! What the leader tells the other ranks of its replica and what they answer. Every command goes to every rank, every rank
//! answers every command but the goodbye, and one that cannot is a failed rank. The frames that carry these are `link`'s.

use perigee_backend::StatePart;
use serde::{Deserialize, Serialize};

use crate::executor::StepPlan;

/// Version of this protocol; ranks of different versions refuse each other.
pub const PROTOCOL_VERSION: u32 = 1;

/// Experts that the mixture-of-experts layers use in a step instead of their own selection.
pub type ForcedExperts = Vec<(u32, Vec<u32>)>;

/// One command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RankCommand {
    /// Run a step.
    Step {
        /// The plan.
        plan: StepPlan,
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
    Bytes(Vec<u8>),
    /// Not done.
    Failed {
        /// Why.
        message: String,
        /// Whether this rank can go on.
        fatal: bool,
    },
}
