//! A short fingerprint of a model: replicas compare it before they exchange a session's state. It tells different
//! models and seeds apart without reading all weights; it is no proof against someone who forges a checkpoint.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::inventory;
use crate::presets::ModelSpec;
use crate::source::{Origin, WeightSource};

/// Bytes read at each end of a tensor.
const EDGE: usize = 4096;
/// Hexadecimal digits kept: 128 bits.
const DIGITS: usize = 32;

impl WeightSource {
    /// The fingerprint: 32 hexadecimal digits over config.json and, for every tensor by name, the shape, type and CRC-32
    /// of the first and last 4 KiB; or over the configuration and the seed of random weights. How a checkpoint is divided
    /// into files makes no difference.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        match self.origin() {
            Origin::Checkpoint(checkpoint) => {
                hash.update(b"checkpoint\0");
                add_checkpoint(&mut hash, checkpoint);
            }
            Origin::Random { config_text, seed } => {
                hash.update(b"random\0");
                hash.update(seed.to_le_bytes());
                hash.update(config_text);
            }
        }
        let hex = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        hex[..DIGITS].to_owned()
    }
}

/// The fingerprint of a model by its name; see [`WeightSource::digest`].
///
/// # Errors
/// Those of [`WeightSource::open`].
pub fn model_digest(spec: &ModelSpec) -> Result<String> {
    Ok(WeightSource::open(spec)?.digest())
}

fn add_checkpoint(hash: &mut Sha256, checkpoint: &Checkpoint) {
    hash.update((checkpoint.config_text().len() as u64).to_le_bytes());
    hash.update(checkpoint.config_text());
    let tensors: BTreeMap<String, _> =
        inventory::tensors(checkpoint.config()).into_iter().map(|spec| (spec.name.clone(), spec)).collect();
    for (name, spec) in tensors {
        let bytes = checkpoint.bytes(&name).unwrap_or_default();
        let first = crc32fast::hash(&bytes[..bytes.len().min(EDGE)]);
        let last = crc32fast::hash(&bytes[bytes.len().saturating_sub(EDGE)..]);
        hash.update(format!("{name}\0{:?}\0{:?}\0{first:08x}{last:08x}\n", spec.shape, spec.dtype));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::checkpoint::WEIGHTS_FILE;
    use crate::test_support::{odd_config, random, written};

    fn digest(name: &str) -> String {
        model_digest(&ModelSpec::parse(name).unwrap()).unwrap()
    }

    #[test]
    fn shapes_and_seeds_have_different_digests() {
        let digests = ["random:tiny", "random:tiny@1", "random:wide", "random:48b", "random:48b-e16"].map(digest);
        for (index, one) in digests.iter().enumerate() {
            assert_eq!(one.len(), 32);
            assert!(one.bytes().all(|digit| digit.is_ascii_hexdigit()), "{one}");
            assert!(!digests[..index].contains(one));
        }
        assert_eq!(digest("random:tiny"), digest("random:tiny@0"));
    }

    #[test]
    fn the_demo_model_is_the_same_as_a_directory() {
        let folder = tempfile::tempdir().unwrap();
        crate::init_model(folder.path(), &ModelSpec::Demo, &mut |_, _| {}).unwrap();
        assert_eq!(digest(folder.path().to_str().unwrap()), digest("demo"));
        assert_ne!(digest("demo"), digest("random:tiny"));
    }

    #[test]
    fn a_checkpoint_is_known_by_its_contents_and_not_by_its_place() {
        let (one, copy) = (written(&odd_config()), written(&odd_config()));
        let of = |directory: &tempfile::TempDir| digest(directory.path().to_str().unwrap());
        assert_eq!(of(&one), of(&copy));
        assert_ne!(of(&one), random(&odd_config()).digest());

        let path = copy.path().join(WEIGHTS_FILE);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_ne!(of(&one), of(&copy));

        let mut other = odd_config();
        other["routed_scaling_factor"] = json!(1.25);
        assert_ne!(of(&one), of(&written(&other)));
    }
}
