//! The one list of a model's tensors: published name, shape, stored type, how tensor parallelism cuts it, and how it is
//! drawn when weights are random. Checkpoint validation, loading, random models and size counts all read this list.

use std::ops::Range;

use perigee_backend::DType;
use perigee_backend::random::Distribution;

use crate::config::{LayerKind, ModelConfig};

/// How a tensor is shared out among the ranks of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Every rank has all of it.
    Replicated,
    /// Equal blocks of rows: heads or inner channels that a rank computes ("column parallel").
    Rows,
    /// Equal blocks of columns: partial sums follow ("row parallel").
    Columns,
    /// Rows of the vocabulary, ceil(V / N) a rank, the last ranks fewer or none.
    Vocabulary,
}

/// A tensor as the published checkpoint holds it.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Stored type.
    pub dtype: DType,
    /// How ranks share it.
    pub split: Split,
    /// How its elements are drawn in a random model.
    pub distribution: Distribution,
}

impl TensorSpec {
    /// The shape without axes that are always 1: `[n]` or `[rows, columns]`. A_log, `[1, 1, Hk, 1]`, becomes
    /// `[Hk]`; a convolution, `[P, 1, W]`, becomes `[P, W]`.
    pub fn view(&self) -> Vec<usize> {
        match *self.shape.as_slice() {
            [1, 1, heads, 1] => vec![heads],
            [channels, 1, taps] => vec![channels, taps],
            _ => self.shape.clone(),
        }
    }

    /// Rows and columns of the view; a vector has one column.
    pub fn extent(&self) -> (usize, usize) {
        match *self.view().as_slice() {
            [rows, columns] => (rows, columns),
            [rows] => (rows, 1),
            _ => (self.elements(), 1),
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in bytes as stored.
    pub fn bytes(&self) -> u64 {
        self.elements() as u64 * self.dtype.bytes() as u64
    }

    /// Rows and columns of the view that belong to `rank` of `tp`; a possible degree is assumed.
    pub fn part(&self, config: &ModelConfig, rank: usize, tp: usize) -> (Range<usize>, Range<usize>) {
        let (rows, columns) = self.extent();
        let block = |count: usize| rank * (count / tp)..(rank + 1) * (count / tp);
        match self.split {
            Split::Replicated => (0..rows, 0..columns),
            Split::Rows => (block(rows), 0..columns),
            Split::Columns => (0..rows, block(columns)),
            Split::Vocabulary => (config.vocab_shard(rank, tp), 0..columns),
        }
    }
}

/// The tensors outside of layers, then those of each layer.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut list = Vec::new();
    visit(config, &mut |spec| list.push(spec));
    list
}

/// Number of parameters, of all types.
pub fn total_parameters(config: &ModelConfig) -> u128 {
    let mut total = 0;
    visit(config, &mut |spec| total += spec.elements() as u128);
    total
}

/// Bytes of weights on `rank` of `tp`, a possible degree.
pub fn weight_bytes(config: &ModelConfig, rank: usize, tp: usize) -> u64 {
    let mut total = 0;
    visit(config, &mut |spec| {
        let (rows, columns) = spec.part(config, rank, tp);
        total += rows.len() as u64 * columns.len() as u64 * spec.dtype.bytes() as u64;
    });
    total
}

/// Elements of a rank's weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightElements {
    /// All of them.
    pub total: u64,
    /// Those that select experts, which backends keep in float32 whatever the activations are.
    pub routers: u64,
    /// Those of routed experts, which a device keeps as they are stored.
    pub experts: u64,
}

/// Elements of weights on `rank` of `tp`, a possible degree.
pub fn weight_elements(config: &ModelConfig, rank: usize, tp: usize) -> WeightElements {
    let mut counted = WeightElements::default();
    visit(config, &mut |spec| {
        let (rows, columns) = spec.part(config, rank, tp);
        let elements = rows.len() as u64 * columns.len() as u64;
        counted.total += elements;
        if spec.name.ends_with("block_sparse_moe.gate.weight") {
            counted.routers += elements;
        }
        if spec.name.contains("block_sparse_moe.experts.") {
            counted.experts += elements;
        }
    });
    counted
}

const NORMAL: Distribution = Distribution::Normal { deviation: 0.02 };
const ONES: Distribution = Distribution::Constant(1.0);

/// Name of a tensor of layer `layer`, 0-based.
pub(crate) fn layer_name(layer: usize, suffix: &str) -> String {
    format!("model.layers.{layer}.{suffix}")
}

fn visit(config: &ModelConfig, sink: &mut dyn FnMut(TensorSpec)) {
    let (vocab, hidden) = (config.vocab, config.hidden);
    let mut list = Lister { prefix: String::new(), sink };
    list.matrix("model.embed_tokens", [vocab, hidden], Split::Vocabulary);
    list.matrix("lm_head", [vocab, hidden], Split::Vocabulary);
    list.norm("model.norm", hidden);
    for (index, layer) in config.layers.iter().enumerate() {
        list.prefix = layer_name(index, "");
        list.norm("input_layernorm", hidden);
        list.norm("post_attention_layernorm", hidden);
        list.prefix = layer_name(index, "self_attn.");
        match layer.kind {
            LayerKind::Kda => list.kda(config),
            LayerKind::Mla => list.mla(config),
        }
        if layer.dense {
            list.prefix = layer_name(index, "mlp.");
            list.mlp(["gate_proj", "up_proj", "down_proj"], hidden, config.intermediate);
        } else {
            list.prefix = layer_name(index, "block_sparse_moe.");
            list.experts(config, index);
        }
    }
}

/// Hands tensors to a sink, each named by a prefix and its own name.
struct Lister<'a> {
    prefix: String,
    sink: &'a mut dyn FnMut(TensorSpec),
}

impl Lister<'_> {
    fn add(&mut self, name: &str, shape: &[usize], dtype: DType, split: Split, distribution: Distribution) {
        let name = format!("{}{name}", self.prefix);
        (self.sink)(TensorSpec { name, shape: shape.to_vec(), dtype, split, distribution });
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2], split: Split) {
        self.add(&format!("{name}.weight"), &shape, DType::Bf16, split, NORMAL);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width], DType::Bf16, Split::Replicated, ONES);
    }

    fn kda(&mut self, config: &ModelConfig) {
        let (hidden, heads, head_dim) = (config.hidden, config.kda.heads, config.kda.head_dim);
        let channels = heads * head_dim;
        for name in ["q", "k", "v"] {
            self.matrix(&format!("{name}_proj"), [channels, hidden], Split::Rows);
            let taps = Distribution::Normal { deviation: 0.5 };
            let shape = [channels, 1, config.kda.conv];
            self.add(&format!("{name}_conv1d.weight"), &shape, DType::Bf16, Split::Rows, taps);
        }
        self.matrix("f_a_proj", [head_dim, hidden], Split::Replicated);
        self.matrix("f_b_proj", [channels, head_dim], Split::Rows);
        let decay = Distribution::Uniform { low: -6.9, high: -2.3 };
        self.add("dt_bias", &[channels], DType::Fp32, Split::Rows, decay);
        let rate = Distribution::Uniform { low: 0.0, high: 2.77 };
        self.add("A_log", &[1, 1, heads, 1], DType::Fp32, Split::Rows, rate);
        self.matrix("b_proj", [heads, hidden], Split::Rows);
        self.matrix("g_a_proj", [head_dim, hidden], Split::Replicated);
        self.matrix("g_b_proj", [channels, head_dim], Split::Rows);
        self.norm("o_norm", head_dim);
        self.matrix("o_proj", [hidden, channels], Split::Columns);
    }

    fn mla(&mut self, config: &ModelConfig) {
        let (hidden, mla) = (config.hidden, &config.mla);
        let queries = mla.heads * (mla.nope + mla.rope);
        match mla.query_rank {
            None => self.matrix("q_proj", [queries, hidden], Split::Rows),
            Some(rank) => {
                self.matrix("q_a_proj", [rank, hidden], Split::Replicated);
                self.norm("q_a_layernorm", rank);
                self.matrix("q_b_proj", [queries, rank], Split::Rows);
            }
        }
        self.matrix("kv_a_proj_with_mqa", [mla.latent + mla.rope, hidden], Split::Replicated);
        self.norm("kv_a_layernorm", mla.latent);
        self.matrix("kv_b_proj", [mla.heads * (mla.nope + mla.value), mla.latent], Split::Rows);
        self.matrix("o_proj", [hidden, mla.heads * mla.value], Split::Columns);
    }

    fn mlp(&mut self, [gate, up, down]: [&str; 3], hidden: usize, width: usize) {
        self.matrix(gate, [width, hidden], Split::Rows);
        self.matrix(up, [width, hidden], Split::Rows);
        self.matrix(down, [hidden, width], Split::Columns);
    }

    fn experts(&mut self, config: &ModelConfig, layer: usize) {
        let (hidden, moe) = (config.hidden, &config.moe);
        self.matrix("gate", [moe.experts, hidden], Split::Replicated);
        let zero = Distribution::Constant(0.0);
        self.add("gate.e_score_correction_bias", &[moe.experts], DType::Fp32, Split::Replicated, zero);
        for expert in 0..moe.experts {
            self.prefix = layer_name(layer, &format!("block_sparse_moe.experts.{expert}."));
            self.mlp(["w1", "w3", "w2"], hidden, moe.intermediate);
        }
        if moe.shared > 0 {
            self.prefix = layer_name(layer, "block_sparse_moe.shared_experts.");
            self.mlp(["gate_proj", "up_proj", "down_proj"], hidden, config.shared_width());
        }
    }
}
