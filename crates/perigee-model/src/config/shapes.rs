//! What a tensor-parallel degree N makes of the sizes: which degrees are possible, and the shapes that one rank of N sees.
//! How single tensors are cut is the inventory's business.

use std::ops::Range;

use perigee_backend::{CacheShape, KdaShape, MlaShape, MlpShape, MoeShape};

use super::{LATENT_EPS, LayerKind, ModelConfig};
use crate::error::{ModelError, Result};

impl ModelConfig {
    /// Checks that `tp` ranks can share the model: heads and widths are cut into equal parts, in so far as some layer has
    /// them. The vocabulary need not divide.
    ///
    /// # Errors
    /// `tp` is 0, or names the first count that it does not divide.
    pub fn check_tp(&self, tp: usize) -> Result<()> {
        if tp == 0 {
            return Err(ModelError::Rank { rank: 0, tp });
        }
        let has = |kind| self.count(kind) > 0;
        let counts = [
            (has(LayerKind::Kda), "KDA heads (linear_attn_config.num_heads)", self.kda.heads),
            (has(LayerKind::Mla), "MLA heads (num_attention_heads)", self.mla.heads),
            (self.has_dense(), "the dense MLP's width (intermediate_size)", self.intermediate),
            (self.has_experts(), "an expert's width (moe_intermediate_size)", self.moe.intermediate),
            // A divisor of f divides the shared experts' width ns f as well.
        ];
        for (needed, what, count) in counts {
            if needed && count % tp != 0 {
                return Err(ModelError::Indivisible { tp, what, count });
            }
        }
        Ok(())
    }

    /// Checks `tp` as [`Self::check_tp`] does, and that `rank` is one of its ranks.
    ///
    /// # Errors
    /// As there; or the rank is not below `tp`.
    pub fn check_rank(&self, rank: usize, tp: usize) -> Result<()> {
        self.check_tp(tp)?;
        if rank >= tp { Err(ModelError::Rank { rank, tp }) } else { Ok(()) }
    }

    /// Rows of the embedding and of the head on `rank`: ceil(V / tp) each, the last ranks fewer or none.
    pub fn vocab_shard(&self, rank: usize, tp: usize) -> Range<usize> {
        let rows = self.vocab.div_ceil(tp.max(1));
        let start = rank.saturating_mul(rows).min(self.vocab);
        start..start.saturating_add(rows).min(self.vocab)
    }

    /// Inner width of all shared experts together, ns f.
    pub fn shared_width(&self) -> usize {
        self.moe.shared * self.moe.intermediate
    }

    // The shapes below divide by `tp`, which `check_tp` has accepted.

    /// A KDA layer on one rank of `tp`.
    pub fn kda_shape(&self, tp: usize) -> KdaShape {
        let kda = &self.kda;
        KdaShape { hidden: self.hidden, heads: kda.heads / tp, head_dim: kda.head_dim, conv: kda.conv, eps: self.eps }
    }

    /// An MLA layer on one rank of `tp`.
    pub fn mla_shape(&self, tp: usize) -> MlaShape {
        let mla = &self.mla;
        MlaShape {
            hidden: self.hidden,
            heads: mla.heads / tp,
            nope: mla.nope,
            rope: mla.rope,
            value: mla.value,
            latent: mla.latent,
            query_rank: mla.query_rank,
            eps: LATENT_EPS,
        }
    }

    /// A dense layer's MLP on one rank of `tp`.
    pub fn mlp_shape(&self, tp: usize) -> MlpShape {
        MlpShape { hidden: self.hidden, width: self.intermediate / tp }
    }

    /// A mixture-of-experts layer on one rank of `tp`; every rank has a part of every expert.
    pub fn moe_shape(&self, tp: usize) -> MoeShape {
        let moe = &self.moe;
        MoeShape {
            hidden: self.hidden,
            experts: moe.experts,
            top_k: moe.top_k,
            groups: moe.groups,
            top_groups: moe.top_groups,
            renormalize: moe.renormalize,
            scale: moe.scale,
            width: moe.intermediate / tp,
            shared_width: self.shared_width() / tp,
        }
    }

    /// The caches of one rank of `tp`, for a number of sessions' slots and of latent pages.
    pub fn cache_shape(&self, tp: usize, slots: usize, pages: usize) -> CacheShape {
        CacheShape {
            kda_layers: self.count(LayerKind::Kda),
            kda_heads: self.kda.heads / tp,
            kda_head_dim: self.kda.head_dim,
            conv: self.kda.conv,
            mla_layers: self.count(LayerKind::Mla),
            latent_width: self.mla.latent + self.mla.rope,
            slots,
            pages,
        }
    }
}
