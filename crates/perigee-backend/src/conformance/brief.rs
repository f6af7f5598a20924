//! The cases that together launch whatever the suite launches, in every form of its schedule: for checkers of memory and races,
//! under which an access to memory takes a thousand times as long. The rest are the same launches with other numbers.

use crate::weights::DType;

/// Names of those for either activation type; `*` stands for any end.
const EITHER: [&str; 27] = [
    "load/counts bytes",
    "all_reduce/group of one",
    "rms_norm/width 50",
    "rms_norm/width 64",
    "rms_norm/width 4608",
    "embed/random rule",
    "logits/odd vocabulary",
    "mlp/narrow",
    "moe/one group",
    "moe/no shared experts",
    "moe/four groups, negative bias",
    "moe/depths of *",
    // One head of each size, the one without kernels of its own included; up to four chunks of 64 tokens.
    "kda_mixer/lengths/1x32, conv 4, Mixed",
    "kda_mixer/lengths/1x64, conv 4, Repeat",
    "kda_mixer/lengths/1x128, conv 4, Open",
    "kda_mixer/lengths/2x24, conv 4, Mixed",
    "kda_mixer/transaction/1x32, conv 4, Mixed",
    "kda_mixer/many rows/2x128",
    "mla/batch/latent 64",
    "mla/batch/query rank 48",
    "mla/remote parts/latent 64",
    "mla/answers for others/latent 64",
    "mla/long contexts/latent 512",
    "step/*",
    "sample/filters/peaked",
    "sample/logprobs/peaked",
    "state_slots/sums/4x32",
];

/// The same for bfloat16, which has kernels for tensor cores and for few and for many rows.
const BFLOAT16: [&str; 12] = [
    "logits/wide",
    "mlp/few tokens",
    "moe/two shared experts",
    "moe/many experts",
    "moe/many experts of few rows",
    "moe/deep",
    "moe/many tiles",
    "moe/wide",
    "mla/batch/latent 512",
    "mla/answers for others/latent 512",
    "mla/long rows/latent 512",
    "mla/many ranges/latent 512, 2 heads",
];

/// Names of the cases that [`is_brief`] is true of; `*` stands for any end.
pub fn brief_names(activation: DType) -> impl Iterator<Item = &'static str> {
    let more = if activation == DType::Bf16 { &BFLOAT16[..] } else { &[] };
    EITHER.iter().chain(more).copied()
}

/// Whether this is the name of a case that launches something with this activation type that no other such case does.
pub fn is_brief(name: &str, activation: DType) -> bool {
    brief_names(activation).any(|brief| is_named(name, brief))
}

/// Whether a name is one that `brief` gives.
pub fn is_named(name: &str, brief: &str) -> bool {
    brief.strip_suffix('*').map_or(name == brief, |beginning| name.starts_with(beginning))
}
