//! Tests of the engine over the modelled executor, from the handle's side: one binary, so that its parts share their
//! support.

mod door;
mod endings;
mod failures;
mod loads;
mod scores;
mod solo_runs;
mod support;
mod threads;
