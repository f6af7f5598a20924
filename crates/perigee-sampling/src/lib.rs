//! Token sampling as a pure function of logits, parameters, seed, choice and position. Nothing here reads a clock, a
//! file or a global random source, so a replay on another replica or device draws the same token. It is the reference
//! for device samplers and knows no model, no tokenizer and no network.

mod adjust;
pub mod counts;
mod filter;
pub mod logprobs;
pub mod noise;
pub mod params;
pub mod philox;
pub mod sample;

pub use counts::{TokenCount, TokenCounts};
pub use logprobs::{TokenLogprobs, prompt_logprobs};
pub use noise::Noise;
pub use params::{ParamError, SamplingParams};
pub use sample::{Draw, SampleError, Sampled, Scratch, sample};
