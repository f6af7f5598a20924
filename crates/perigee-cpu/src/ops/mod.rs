//! The ops, one file each, named as in the model. Each is a function over plain slices; the backend lends it caches,
//! workers and the current batch.

pub(crate) mod embed;
pub(crate) mod kda;
pub(crate) mod kda_chunk;
pub(crate) mod mla;
pub(crate) mod mlp;
pub(crate) mod moe;
pub(crate) mod norm;
