//! Tests of the engine over the modelled executor, from the handle's side: one binary, so that its parts share their
//! support. The attribute on each part tells clippy that helpers are test code too.

#[cfg(test)]
mod ahead;
#[cfg(test)]
mod door;
#[cfg(test)]
mod draws;
#[cfg(test)]
mod endings;
#[cfg(test)]
mod failures;
#[cfg(test)]
mod grammars;
#[cfg(test)]
mod handing;
#[cfg(test)]
mod loads;
#[cfg(test)]
mod orphans;
#[cfg(test)]
mod scores;
#[cfg(test)]
mod solo_runs;
#[cfg(test)]
mod support;
#[cfg(test)]
mod threads;
