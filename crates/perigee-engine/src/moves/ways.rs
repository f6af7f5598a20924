//! The ways by which a session's state goes from its source to its target, and what the two say of them before the session
//! stands still: the source offers, the target chooses.

/// A way by which a state goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    /// In the stream of the handoff itself, through host memory.
    #[default]
    Stream,
    /// The target copies it out of the source's slots, which it reaches.
    Slots,
    /// By pairs of ranks: see [`perigee_backend::pairs`].
    Pair,
}

/// What a source offers of pairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairOffer {
    /// Invitations, by rank.
    pub invitations: Vec<Vec<u8>>,
    /// Whether both were met, as far as the source knows: this state can go by them. Else they are to be met, for later ones.
    pub is_ready: bool,
}

/// What a target says to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PairAnswer {
    /// It has no such pairs and will have none; also where nothing was offered.
    #[default]
    Refused,
    /// It meets them, or still does.
    Meets,
    /// They were met.
    Ready,
}

/// What a target says once it has room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// How the state is to come. By the stream it may come in any case.
    pub way: Way,
    /// What becomes of the pairs.
    pub pair: PairAnswer,
}
