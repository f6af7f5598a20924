//! The launchers: one file for each op, with the names of the kernel folders. Each checks shapes, takes working memory and
//! queues kernels and dense products; what the kernels compute stands beside them.

pub(crate) mod attention;
pub(crate) mod dense;
pub(crate) mod embed;
pub(crate) mod expanded;
pub(crate) mod few;
pub(crate) mod kda;
mod kda_chunked;
pub(crate) mod logits;
pub(crate) mod mla;
pub(crate) mod mlp;
pub(crate) mod moe;
pub(crate) mod norm;
mod pair;
pub(crate) mod reduce;
pub(crate) mod sample;
pub(crate) mod state;
pub(crate) mod wide;
