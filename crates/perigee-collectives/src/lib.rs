//! Collectives among the ranks of a tensor-parallel group, behind one trait.
