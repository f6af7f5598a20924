//! Sizes of layers as one rank sees them: head counts and widths are already divided by the tensor-parallel degree.
//! Symbols are those of the model description: d hidden, D head_dim, W conv width, R latent rank, r rope, n nope, m value.

use serde::{Deserialize, Serialize};

use crate::weights::DType;

/// Absolute positions held by one latent page.
pub const PAGE_TOKENS: usize = 64;

/// A KDA (gated delta rule) layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct KdaShape {
    /// Width of the residual stream, d.
    pub hidden: usize,
    /// Heads of this rank.
    pub heads: usize,
    /// Key and value channels of a head, D.
    pub head_dim: usize,
    /// Taps of the short convolutions, W.
    pub conv: usize,
    /// Epsilon of the gated output norm.
    pub eps: f32,
}

/// An MLA layer without positional encoding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MlaShape {
    /// Width of the residual stream, d.
    pub hidden: usize,
    /// Query heads of this rank.
    pub heads: usize,
    /// Query channels matched against the expanded latent, n.
    pub nope: usize,
    /// Query channels matched against the shared key, r (not rotated).
    pub rope: usize,
    /// Value channels of a head, m.
    pub value: usize,
    /// Width of the latent, R.
    pub latent: usize,
    /// Rank of the low-rank query, or none for one q_proj.
    pub query_rank: Option<usize>,
    /// Epsilon of the latent and low-rank query norms (1e-6, not rms_norm_eps).
    pub eps: f32,
}

impl MlaShape {
    /// Numbers cached for one token in one layer: the latent and the shared key.
    pub fn cache_width(&self) -> usize {
        self.latent + self.rope
    }

    /// Softmax scale, (n + r)^-1/2.
    pub fn scale(&self) -> f32 {
        (1.0 / ((self.nope + self.rope) as f64).sqrt()) as f32
    }
}

/// A dense gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MlpShape {
    /// Width of the residual stream, d.
    pub hidden: usize,
    /// Inner width of this rank.
    pub width: usize,
}

/// A mixture-of-experts layer with shared experts; the tensor-parallel form, so every rank has a slice of every expert.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MoeShape {
    /// Width of the residual stream, d.
    pub hidden: usize,
    /// Routed experts, E.
    pub experts: usize,
    /// Experts chosen for a token, k.
    pub top_k: usize,
    /// Consecutive blocks of experts, Ng.
    pub groups: usize,
    /// Groups kept for a token, Kg.
    pub top_groups: usize,
    /// Whether chosen weights are divided by their sum.
    pub renormalize: bool,
    /// Factor on the weights after renormalisation.
    pub scale: f32,
    /// Inner width of a routed expert on this rank, f / N.
    pub width: usize,
    /// Inner width of the shared experts on this rank, ns f / N (0 where there are none).
    pub shared_width: usize,
}

/// What a rank keeps for sessions: fixed-size state slots and pages of latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheShape {
    /// KDA layers.
    pub kda_layers: usize,
    /// KDA heads of this rank.
    pub kda_heads: usize,
    /// Channels of a KDA head, D.
    pub kda_head_dim: usize,
    /// Taps of the short convolutions, W; W - 1 inputs are kept.
    pub conv: usize,
    /// MLA layers.
    pub mla_layers: usize,
    /// Numbers cached for a token in one MLA layer, R + r.
    pub latent_width: usize,
    /// State slots.
    pub slots: usize,
    /// Latent pages; a page covers [`PAGE_TOKENS`] positions in every MLA layer.
    pub pages: usize,
}

impl CacheShape {
    /// Bytes of a state slot with tails of this type; recurrent states are float32.
    pub fn slot_bytes(&self, tails: DType) -> u64 {
        let channels = self.kda_layers * self.kda_heads * self.kda_head_dim;
        (channels * (self.kda_head_dim * 4 + 3 * self.conv.saturating_sub(1) * tails.bytes())) as u64
    }

    /// Bytes of a latent page of this type in all layers.
    pub fn page_bytes(&self, latents: DType) -> u64 {
        (self.mla_layers * PAGE_TOKENS * self.latent_width * latents.bytes()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_of_the_48b_model_has_the_published_sizes() {
        let shape = CacheShape {
            kda_layers: 20,
            kda_heads: 32,
            kda_head_dim: 128,
            conv: 4,
            mla_layers: 7,
            latent_width: 576,
            slots: 1,
            pages: 1,
        };
        assert_eq!(shape.slot_bytes(DType::Bf16), 41_943_040 + 1_474_560);
        assert_eq!(shape.page_bytes(DType::Bf16), 64 * 8_064);
    }
}
