//! The shape of a Kimi Linear model, as config.json states it: plain validated fields, so that no later code has to ask
//! whether a count is zero, a layer is named twice or a product overflows. It knows no tensor names and no ranks' data.

mod keys;
mod shapes;
#[cfg(test)]
mod tests;
mod validate;

use std::path::Path;

use crate::error::{ModelError, Result};

/// Epsilon of the latent norm and the low-rank query norm: transformers uses 1e-6 there, whatever rms_norm_eps says.
pub const LATENT_EPS: f32 = 1e-6;

/// The mixer of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Kimi delta attention: a recurrent state of fixed size.
    Kda,
    /// Multi-head latent attention without positions: a cache that grows with the context.
    Mla,
}

/// One layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// The mixer.
    pub kind: LayerKind,
    /// Whether the feed-forward part is one dense MLP; else it is a mixture of experts.
    pub dense: bool,
}

/// Sizes of the KDA layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KdaConfig {
    /// Heads, Hk.
    pub heads: usize,
    /// Key and value channels of a head, D.
    pub head_dim: usize,
    /// Taps of the short convolutions, W, at least 2.
    pub conv: usize,
}

/// Sizes of the MLA layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlaConfig {
    /// Query heads, H.
    pub heads: usize,
    /// Query channels matched against the expanded latent, n.
    pub nope: usize,
    /// Query channels matched against the shared key, r.
    pub rope: usize,
    /// Value channels of a head, m.
    pub value: usize,
    /// Width of the latent, R.
    pub latent: usize,
    /// Rank of the low-rank query, or none for one q_proj.
    pub query_rank: Option<usize>,
}

/// The mixture of experts; all sizes are 0 in a model without experts, whose layers are all dense.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeConfig {
    /// Routed experts, E.
    pub experts: usize,
    /// Experts chosen for a token, k.
    pub top_k: usize,
    /// Inner width of a routed expert, f.
    pub intermediate: usize,
    /// Shared experts, ns (0 for none).
    pub shared: usize,
    /// Consecutive blocks of experts, Ng.
    pub groups: usize,
    /// Groups kept for a token, Kg.
    pub top_groups: usize,
    /// Whether the chosen weights are divided by their sum.
    pub renormalize: bool,
    /// Factor on the weights after that.
    pub scale: f32,
}

/// A validated configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding table and of the head, V.
    pub vocab: usize,
    /// Width of the residual stream, d.
    pub hidden: usize,
    /// The layers in order, L of them.
    pub layers: Vec<LayerConfig>,
    /// The KDA layers' sizes.
    pub kda: KdaConfig,
    /// The MLA layers' sizes.
    pub mla: MlaConfig,
    /// Inner width of the dense MLPs, F.
    pub intermediate: usize,
    /// The mixture of experts.
    pub moe: MoeConfig,
    /// Epsilon of the layer norms and of the gated output norm of KDA (rms_norm_eps).
    pub eps: f32,
    /// Token that begins a text, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Token that pads, if the model has one.
    pub pad: Option<u32>,
    /// Longest context that the model was made for.
    pub max_length: usize,
}

impl ModelConfig {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// The file cannot be read, is not JSON, or has a key whose value is missing, malformed or not supported.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(ModelError::io("read", path))?;
        Self::parse(&text)
    }

    /// Parses and validates the text of a config.json. Keys that say nothing about the computation are ignored.
    ///
    /// # Errors
    /// The text is not JSON, or has a key whose value is missing, malformed or not supported.
    pub fn parse(text: &str) -> Result<Self> {
        validate::parse(text)
    }

    /// The number of layers with this mixer.
    pub fn count(&self, kind: LayerKind) -> usize {
        self.layers.iter().filter(|layer| layer.kind == kind).count()
    }

    /// Whether some layer has a dense MLP.
    pub fn has_dense(&self) -> bool {
        self.layers.iter().any(|layer| layer.dense)
    }

    /// Whether some layer has a mixture of experts.
    pub fn has_experts(&self) -> bool {
        self.layers.iter().any(|layer| !layer.dense)
    }
}
