//! A leader's services over real sockets and a modelled engine: alone against a hand-made router, and behind the real one.
//! What the model computes is not tested here, but that every token reaches its client once and everything is freed.

mod cluster;
mod leader;
mod sandbox;
