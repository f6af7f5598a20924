//! One rank's weights, bundled the way a backend loads them. Which part of a tensor a rank holds is the inventory's
//! knowledge and where the bytes come from the source's; here are only the names that make up a layer.

use perigee_backend::TensorSlice;
use perigee_backend::weights::{KdaWeights, MlaWeights, MlpWeights, MoeWeights, QueryWeights};

use crate::error::Result;
use crate::inventory::{self, layer_name};
use crate::source::WeightSource;

/// The share of `rank` out of `tp` in a model's weights.
#[derive(Debug, Clone, Copy)]
pub struct Shard<'a> {
    source: &'a WeightSource,
    rank: usize,
    tp: usize,
}

impl<'a> Shard<'a> {
    /// The share of a rank.
    ///
    /// # Errors
    /// `tp` is 0 or does not divide a head count or a width, or the rank is not below it.
    pub fn new(source: &'a WeightSource, rank: usize, tp: usize) -> Result<Self> {
        source.config().check_rank(rank, tp)?;
        Ok(Self { source, rank, tp })
    }

    /// Bytes of all weights of this share, as stored.
    pub fn weight_bytes(&self) -> u64 {
        inventory::weight_bytes(self.source.config(), self.rank, self.tp)
    }

    /// This rank's rows of the embedding table, and the first row's token id.
    ///
    /// # Errors
    /// None for an open source, as for everything below.
    pub fn embedding(&self) -> Result<(TensorSlice<'a>, usize)> {
        let first = self.source.config().vocab_shard(self.rank, self.tp).start;
        Ok((self.part("model.embed_tokens.weight")?, first))
    }

    /// This rank's rows of the output head, and the number of rows of every rank in rank order.
    ///
    /// # Errors
    /// As above.
    pub fn head(&self) -> Result<(TensorSlice<'a>, Vec<usize>)> {
        let config = self.source.config();
        let counts = (0..self.tp).map(|rank| config.vocab_shard(rank, self.tp).len()).collect();
        Ok((self.part("lm_head.weight")?, counts))
    }

    /// The norm before the head.
    ///
    /// # Errors
    /// As above.
    pub fn final_norm(&self) -> Result<TensorSlice<'a>> {
        self.part("model.norm.weight")
    }

    /// The norm before the mixer of a layer (0-based).
    ///
    /// # Errors
    /// There is no such layer.
    pub fn mixer_norm(&self, layer: usize) -> Result<TensorSlice<'a>> {
        self.layer_part(layer, "input_layernorm.weight")
    }

    /// The norm before the feed-forward part of a layer.
    ///
    /// # Errors
    /// There is no such layer.
    pub fn feed_forward_norm(&self, layer: usize) -> Result<TensorSlice<'a>> {
        self.layer_part(layer, "post_attention_layernorm.weight")
    }

    /// The mixer of a KDA layer.
    ///
    /// # Errors
    /// The layer is no KDA layer.
    pub fn kda(&self, layer: usize) -> Result<KdaWeights<'a>> {
        let part = |name: &str| self.layer_part(layer, &format!("self_attn.{name}"));
        Ok(KdaWeights {
            qkv_proj: [part("q_proj.weight")?, part("k_proj.weight")?, part("v_proj.weight")?],
            qkv_conv: [part("q_conv1d.weight")?, part("k_conv1d.weight")?, part("v_conv1d.weight")?],
            f_a_proj: part("f_a_proj.weight")?,
            f_b_proj: part("f_b_proj.weight")?,
            dt_bias: part("dt_bias")?,
            a_log: part("A_log")?,
            b_proj: part("b_proj.weight")?,
            g_a_proj: part("g_a_proj.weight")?,
            g_b_proj: part("g_b_proj.weight")?,
            o_norm: part("o_norm.weight")?,
            o_proj: part("o_proj.weight")?,
        })
    }

    /// The mixer of an MLA layer.
    ///
    /// # Errors
    /// The layer is no MLA layer.
    pub fn mla(&self, layer: usize) -> Result<MlaWeights<'a>> {
        let part = |name: &str| self.layer_part(layer, &format!("self_attn.{name}"));
        let query = match self.source.config().mla.query_rank {
            None => QueryWeights::Full(part("q_proj.weight")?),
            Some(_) => QueryWeights::LowRank {
                down: part("q_a_proj.weight")?,
                norm: part("q_a_layernorm.weight")?,
                up: part("q_b_proj.weight")?,
            },
        };
        Ok(MlaWeights {
            query,
            kv_a_proj: part("kv_a_proj_with_mqa.weight")?,
            kv_a_norm: part("kv_a_layernorm.weight")?,
            kv_b_proj: part("kv_b_proj.weight")?,
            o_proj: part("o_proj.weight")?,
        })
    }

    /// The MLP of a dense layer.
    ///
    /// # Errors
    /// The layer is no dense layer.
    pub fn mlp(&self, layer: usize) -> Result<MlpWeights<'a>> {
        self.gated(layer, "mlp", ["gate_proj", "up_proj", "down_proj"])
    }

    /// The experts of a mixture-of-experts layer: this rank's part of every expert.
    ///
    /// # Errors
    /// The layer is a dense layer.
    pub fn moe(&self, layer: usize) -> Result<MoeWeights<'a>> {
        let moe = self.source.config().moe;
        let expert = |number| self.gated(layer, &format!("block_sparse_moe.experts.{number}"), ["w1", "w3", "w2"]);
        let shared = match moe.shared {
            0 => None,
            _ => Some(self.gated(layer, "block_sparse_moe.shared_experts", ["gate_proj", "up_proj", "down_proj"])?),
        };
        Ok(MoeWeights {
            router: self.layer_part(layer, "block_sparse_moe.gate.weight")?,
            bias: self.layer_part(layer, "block_sparse_moe.gate.e_score_correction_bias")?,
            experts: (0..moe.experts).map(expert).collect::<Result<_>>()?,
            shared,
        })
    }

    fn gated(&self, layer: usize, prefix: &str, [gate, up, down]: [&str; 3]) -> Result<MlpWeights<'a>> {
        let part = |name| self.layer_part(layer, &format!("{prefix}.{name}.weight"));
        Ok(MlpWeights { gate: part(gate)?, up: part(up)?, down: part(down)? })
    }

    fn layer_part(&self, layer: usize, suffix: &str) -> Result<TensorSlice<'a>> {
        self.part(&layer_name(layer, suffix))
    }

    fn part(&self, name: &str) -> Result<TensorSlice<'a>> {
        self.source.part(name, self.rank, self.tp)
    }
}

#[cfg(test)]
mod tests;
