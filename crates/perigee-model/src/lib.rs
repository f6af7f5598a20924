//! The Kimi Linear architecture, once, over the coarse ops of a backend: config, checkpoint, shards, forward.
