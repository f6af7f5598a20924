//! `perigee score` as a user runs it: the real binary and its worker processes. What it computes is judged in more
//! splittings by tests over threads; here it is about processes, sockets, files, messages and exit codes.

// Marked as tests for clippy, which lets only these unwrap.
#[cfg(test)]
mod binary;
#[cfg(test)]
mod deaths;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod refusals;
