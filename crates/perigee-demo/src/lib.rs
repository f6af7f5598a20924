//! The demo model: a Kimi Linear model of 0.7 million parameters, trained on the King James Version, as the files of a
//! checkpoint that are part of the program. How it was made and what its licence is: `train/README.md`. It knows
//! nothing of what reads it.

/// Its name for `--model`.
pub const NAME: &str = "demo";
/// config.json.
pub const CONFIG: &str = include_str!("../model/config.json");
/// tokenizer.json: byte-level BPE, 512 tokens.
pub const TOKENIZER: &str = include_str!("../model/tokenizer.json");
/// tokenizer_config.json: what other programs read the names of special tokens from.
pub const TOKENIZER_CONFIG: &str = include_str!("../model/tokenizer_config.json");
/// generation_config.json: how its text is drawn where a request does not say.
pub const GENERATION_CONFIG: &str = include_str!("../model/generation_config.json");
/// chat_template.jinja: a conversation as the text would tell it.
pub const CHAT_TEMPLATE: &str = include_str!("../model/chat_template.jinja");

/// The lower halves of all 16-bit words of model.safetensors, then the upper ones, in the format of RFC 1951.
const PACKED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/weights.packed"));
/// Bytes of model.safetensors.
const LENGTH: usize = include!(concat!(env!("OUT_DIR"), "/weights.length"));

/// Weights that are not as they were built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the weights of the model demo are damaged in this program's file; install it anew")]
pub struct Damaged;

/// model.safetensors, bf16.
///
/// # Errors
/// [`Damaged`].
pub fn weights() -> Result<Vec<u8>, Damaged> {
    unpack(PACKED)
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, Damaged> {
    let halves = miniz_oxide::inflate::decompress_to_vec_with_limit(packed, LENGTH).map_err(|_| Damaged)?;
    if halves.len() != LENGTH {
        return Err(Damaged);
    }
    let (lower, upper) = halves.split_at(LENGTH.div_ceil(2));
    let mut weights = vec![0; LENGTH];
    weights.iter_mut().step_by(2).zip(lower).for_each(|(to, from)| *to = *from);
    weights.iter_mut().skip(1).step_by(2).zip(upper).for_each(|(to, from)| *to = *from);
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_file_and_a_damaged_copy_is_noticed() {
        assert!(weights().unwrap() == include_bytes!("../model/model.safetensors"), "packed and unpacked");
        assert_eq!(unpack(&PACKED[..PACKED.len() / 2]), Err(Damaged));
    }
}
