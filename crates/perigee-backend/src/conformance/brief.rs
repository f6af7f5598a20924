//! The cases that together launch whatever the suite launches, in every form of its schedule: for checkers of memory and races,
//! under which a launch takes a hundred times as long. The rest are the same launches with other numbers.

/// Beginnings of their names.
pub const BRIEF: [&str; 41] = [
    "load/counts bytes",
    "rms_norm/width 50",
    "rms_norm/width 64",
    "rms_norm/width 4608",
    "embed/random rule",
    "logits/odd vocabulary",
    "logits/wide",
    "mlp/narrow",
    "mlp/few tokens",
    "moe/one group",
    "moe/no shared experts",
    "moe/two shared experts",
    "moe/four groups, negative bias",
    "moe/many experts",
    "moe/depths of",
    "moe/deep",
    "moe/many tiles",
    // One of each size of a head, the one without kernels of its own included; 64 tokens a chunk, up to five chunks.
    "kda_mixer/lengths/2x32, conv 3",
    "kda_mixer/lengths/2x24",
    "kda_mixer/lengths/3x64",
    "kda_mixer/lengths/2x128, conv 4, Mixed",
    "kda_mixer/batch/2x32, conv 3",
    "kda_mixer/batch/3x64",
    "kda_mixer/batch/2x128, conv 4, Mixed",
    "kda_mixer/many rows/2x128",
    "mla/batch/latent 64",
    "mla/batch/latent 512",
    "mla/segments/latent 512",
    "mla/remote parts/latent 512",
    "mla/answers for others/latent 64",
    "mla/answers for others/latent 512",
    "mla/long rows",
    "mla/long contexts",
    "step/",
    "sample/filters/peaked",
    "sample/changed logits/ties",
    "sample/logprobs/peaked",
    "sample/masks",
    "state_slots/sums/3x128",
    "latent_pages/copy/latent 64",
    "all_reduce",
];

/// Whether a case of this name is one of them.
pub fn is_brief(name: &str) -> bool {
    BRIEF.iter().any(|beginning| name.starts_with(beginning))
}
