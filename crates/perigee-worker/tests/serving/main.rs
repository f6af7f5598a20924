//! A leader's services over real sockets: over a modelled engine alone against a hand-made router and behind the real one,
//! and over a small real model where sessions move. What the model computes is not tested here, but that every token
//! reaches its client once and everything is freed.

mod asking;
mod cluster;
mod following;
mod leader;
mod moves;
mod refusals;
mod replica;
mod sandbox;
