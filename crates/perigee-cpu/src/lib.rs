//! The CPU backend: the readable reference of every op.
