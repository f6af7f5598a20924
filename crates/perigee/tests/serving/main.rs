//! Serving as clients meet it: real clusters of the binary's own processes, real gRPC. Whole clusters are few and the
//! heavy ones run one at a time; what single parts do is tested beside them.

// Marked as tests for clippy, which lets only these unwrap.
#[cfg(test)]
mod answer;
#[cfg(test)]
mod bench;
#[cfg(test)]
mod cluster;
#[cfg(test)]
mod deaths;
#[cfg(test)]
mod demo;
#[cfg(test)]
mod endings;
#[cfg(test)]
mod far;
#[cfg(test)]
mod judge;
#[cfg(test)]
mod parents;
#[cfg(test)]
mod parts;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod text;
#[cfg(test)]
mod up;
#[cfg(test)]
mod work;

use std::time::Duration;

use perigee_proto::v1::{GenerateRequest, SamplingParams};
use perigee_testkit::sandbox::SandboxSpec;

/// How long anything may take that does not hang; nothing waits this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of the binary under test.
fn up(replicas: usize, tp: usize) -> SandboxSpec {
    SandboxSpec::new(env!("CARGO_BIN_EXE_perigee"), replicas, tp)
}

/// A greedy request that goes on to its last token.
fn greedy(token_ids: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    let sampling = SamplingParams { temperature: Some(0.0), ignore_eos: true, ..SamplingParams::default() };
    GenerateRequest { token_ids, max_tokens: Some(max_tokens), sampling: Some(sampling), ..GenerateRequest::default() }
}
