//! Sessions that change replicas: real clusters of the binary's own processes, with moves asked for as operators ask for
//! them, and the same engines in one process where something is to be broken on purpose. What single parts of a move do is
//! tested beside them.

// Marked as tests for clippy, which lets only these unwrap.
#[cfg(test)]
mod broken;
#[cfg(test)]
mod captured;
#[cfg(test)]
mod circle;
#[cfg(test)]
mod client;
#[cfg(test)]
mod deaths;
#[cfg(test)]
mod demo;
#[cfg(test)]
mod drains;
#[cfg(test)]
mod judge;
#[cfg(test)]
mod kills;
#[cfg(test)]
mod known;
#[cfg(test)]
mod neighbours;
#[cfg(test)]
mod pairs;
#[cfg(test)]
mod plan;
#[cfg(test)]
mod restarts;
#[cfg(test)]
mod resumes;
#[cfg(test)]
mod schedules;
#[cfg(test)]
mod shortage;

use std::time::Duration;

use perigee_proto::v1::{GenerateRequest, SamplingParams};

/// How long anything may take that does not hang; nothing waits this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A greedy request that goes on to its last token.
fn greedy(token_ids: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    let sampling = SamplingParams { temperature: Some(0.0), ignore_eos: true, ..SamplingParams::default() };
    GenerateRequest { token_ids, max_tokens: Some(max_tokens), sampling: Some(sampling), ..GenerateRequest::default() }
}
