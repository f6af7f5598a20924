//! Sizes of what a session owns, counted over the whole model rather than one rank, so that two replicas of different
//! tensor-parallel degree mean the same by a head or a layer. It allocates nothing and touches no device.

use std::fmt;
use std::ops::Range;

use perigee_backend::{CacheShape, DType, PAGE_TOKENS, StateKind};

/// The four tensors of a KDA layer's state, in the order in which handoffs number them.
pub const STATE_KINDS: [StateKind; 4] = [StateKind::Recurrent, StateKind::ConvQ, StateKind::ConvK, StateKind::ConvV];

/// [`PAGE_TOKENS`] as positions are counted.
pub const PAGE_POSITIONS: u64 = PAGE_TOKENS as u64;

/// Largest value of any field of a [`Geometry`]. It keeps every product below 2^63 and every tensor of the published
/// models far below the 2^33 elements up to which a digest sees every bit.
const MOST: u32 = 1 << 15;

/// Shape and element types of a session's state and latents, over all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// KDA layers.
    pub kda_layers: u32,
    /// KDA heads of the whole model.
    pub kda_heads: u32,
    /// Channels of a KDA head, D.
    pub kda_head_dim: u32,
    /// Taps of the short convolutions, W; W - 1 inputs are kept.
    pub conv: u32,
    /// MLA layers.
    pub mla_layers: u32,
    /// Numbers cached for a position in one MLA layer, R + r.
    pub latent_width: u32,
    /// Element type of the recurrent state.
    pub recurrent_dtype: DType,
    /// Element type of the convolution tails.
    pub tail_dtype: DType,
    /// Element type of the latents.
    pub latent_dtype: DType,
}

/// Sizes that cannot belong to a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// A count is zero or absurd.
    #[error("{what} is {found}, expected 1 to {MOST}")]
    Field {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// The heads do not divide among the ranks.
    #[error("{heads} KDA heads do not divide among {ranks} ranks")]
    Ranks {
        /// Heads of the model.
        heads: u32,
        /// Ranks.
        ranks: u32,
    },
    /// There is no such rank.
    #[error("there is no rank {rank} among {ranks}")]
    Rank {
        /// The rank.
        rank: u32,
        /// Ranks.
        ranks: u32,
    },
}

impl Geometry {
    /// The geometry of a replica whose ranks each have caches of shape `rank`; `activation` is the element type of
    /// convolution tails and latents. The recurrent state is float32.
    ///
    /// # Errors
    /// [`GeometryError::Field`] where a size is out of range.
    pub fn of_replica(rank: &CacheShape, ranks: u32, activation: DType) -> Result<Self, GeometryError> {
        let field = |what: &'static str, value: usize| {
            u32::try_from(value).map_err(|_| GeometryError::Field { what, found: value as u64 })
        };
        let heads = rank.kda_heads.saturating_mul(ranks as usize);
        let geometry = Self {
            kda_layers: field("KDA layers", rank.kda_layers)?,
            kda_heads: field("KDA heads", heads)?,
            kda_head_dim: field("channels of a KDA head", rank.kda_head_dim)?,
            conv: field("convolution taps", rank.conv)?,
            mla_layers: field("MLA layers", rank.mla_layers)?,
            latent_width: field("latent width", rank.latent_width)?,
            recurrent_dtype: DType::Fp32,
            tail_dtype: activation,
            latent_dtype: activation,
        };
        geometry.check()?;
        Ok(geometry)
    }

    /// Refuses counts of zero and absurd ones.
    ///
    /// # Errors
    /// [`GeometryError::Field`] names the first.
    pub fn check(&self) -> Result<(), GeometryError> {
        for (what, value) in self.sizes() {
            if value == 0 || value > MOST {
                return Err(GeometryError::Field { what, found: value.into() });
            }
        }
        Ok(())
    }

    /// The counts by name, in the order of the handoff's header.
    pub(crate) fn sizes(&self) -> [(&'static str, u32); 6] {
        [
            ("KDA layers", self.kda_layers),
            ("KDA heads", self.kda_heads),
            ("channels of a KDA head", self.kda_head_dim),
            ("convolution taps", self.conv),
            ("MLA layers", self.mla_layers),
            ("latent width", self.latent_width),
        ]
    }

    /// Element type of one of a layer's state tensors.
    pub fn dtype(&self, kind: StateKind) -> DType {
        if kind == StateKind::Recurrent { self.recurrent_dtype } else { self.tail_dtype }
    }

    /// Elements of one head of a state tensor: [D, D] or [D, W - 1].
    pub fn head_elements(&self, kind: StateKind) -> u64 {
        let dim = u64::from(self.kda_head_dim);
        match kind {
            StateKind::Recurrent => dim * dim,
            StateKind::ConvQ | StateKind::ConvK | StateKind::ConvV => dim * u64::from(self.conv.saturating_sub(1)),
        }
    }

    /// Bytes of one head of a state tensor.
    pub fn head_bytes(&self, kind: StateKind) -> u64 {
        self.head_elements(kind) * self.dtype(kind).bytes() as u64
    }

    /// Bytes of the recurrent states of a session.
    pub fn recurrent_bytes(&self) -> u64 {
        self.layers_bytes(StateKind::Recurrent)
    }

    /// Bytes of the convolution tails of a session.
    pub fn tail_bytes(&self) -> u64 {
        self.layers_bytes(StateKind::ConvQ) + self.layers_bytes(StateKind::ConvK) + self.layers_bytes(StateKind::ConvV)
    }

    /// Bytes of one position's latents in one MLA layer.
    pub fn position_bytes(&self) -> u64 {
        u64::from(self.latent_width) * self.latent_dtype.bytes() as u64
    }

    /// Bytes of one position's latents in all MLA layers.
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.mla_layers) * self.position_bytes()
    }

    /// Heads of one rank of a replica.
    ///
    /// # Errors
    /// The heads do not divide among the ranks, or there is no such rank.
    pub fn rank_heads(&self, rank: u32, ranks: u32) -> Result<Range<u32>, GeometryError> {
        if ranks == 0 || !self.kda_heads.is_multiple_of(ranks) {
            return Err(GeometryError::Ranks { heads: self.kda_heads, ranks });
        }
        if rank >= ranks {
            return Err(GeometryError::Rank { rank, ranks });
        }
        let each = self.kda_heads / ranks;
        Ok(rank * each..(rank + 1) * each)
    }

    fn layers_bytes(&self, kind: StateKind) -> u64 {
        u64::from(self.kda_layers) * u64::from(self.kda_heads) * self.head_bytes(kind)
    }
}

/// How the ranks of a replica share latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layout {
    /// Every rank has all positions.
    Replicated,
    /// Positions are divided among the ranks.
    ByPosition,
}

impl Layout {
    /// Its number in every format.
    pub fn number(self) -> u8 {
        match self {
            Self::Replicated => 0,
            Self::ByPosition => 1,
        }
    }

    /// The layout with a number, if this version knows it.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Replicated, Self::ByPosition].into_iter().find(|layout| layout.number() == number)
    }
}

/// A name for logs and errors, e.g. `conv_q of KDA layer 3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tensor {
    /// One of the four state tensors of a KDA layer.
    State {
        /// Index among the KDA layers.
        layer: u32,
        /// Which tensor.
        kind: StateKind,
    },
    /// The latents of one MLA layer.
    Latents {
        /// Index among the MLA layers.
        layer: u32,
    },
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State { layer, kind } => {
                let kind = match kind {
                    StateKind::Recurrent => "recurrent state",
                    StateKind::ConvQ => "tail of the q convolution",
                    StateKind::ConvK => "tail of the k convolution",
                    StateKind::ConvV => "tail of the v convolution",
                };
                write!(f, "{kind} of KDA layer {layer}")
            }
            Self::Latents { layer } => write!(f, "latents of MLA layer {layer}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::published_geometry as published;

    #[test]
    fn sizes_of_the_48b_model() {
        let geometry = published();
        assert_eq!(geometry.recurrent_bytes(), 41_943_040);
        assert_eq!(geometry.tail_bytes(), 1_474_560);
        assert_eq!(geometry.token_bytes(), 8_064);
    }

    #[test]
    fn heads_divide_among_ranks_or_not() {
        let geometry = published();
        assert_eq!(geometry.rank_heads(1, 4), Ok(8..16));
        assert_eq!(geometry.rank_heads(0, 1), Ok(0..32));
        assert_eq!(geometry.rank_heads(0, 3), Err(GeometryError::Ranks { heads: 32, ranks: 3 }));
        assert_eq!(geometry.rank_heads(0, 0), Err(GeometryError::Ranks { heads: 32, ranks: 0 }));
        assert_eq!(geometry.rank_heads(4, 4), Err(GeometryError::Rank { rank: 4, ranks: 4 }));
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        let zero = Geometry { conv: 0, ..published() };
        assert_eq!(zero.check(), Err(GeometryError::Field { what: "convolution taps", found: 0 }));
        let huge = Geometry { latent_width: MOST + 1, ..published() };
        assert!(huge.check().is_err());
    }
}
