//! The names that `--model` takes: a checkpoint directory, the demo model, or a preset with random weights. A preset is a
//! config.json of its own, so that everything behind the name is the same for all kinds; what the weights are is another
//! module's.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};

/// What separates a preset from a directory in a model's name.
const RANDOM: &str = "random:";
/// Experts of [`Preset::Kimi48bE16`].
const REDUCED_EXPERTS: usize = 16;

/// A shape that needs no checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Five small layers: seconds on a laptop.
    Tiny,
    /// Seven layers with the per-head shapes of the 48B model.
    Wide,
    /// The published 48B-A3B shape.
    Kimi48b,
    /// The same with 16 experts a layer: fits twice on one card.
    Kimi48bE16,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 4] = [Self::Tiny, Self::Wide, Self::Kimi48b, Self::Kimi48bE16];

    /// The name in `random:NAME`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Wide => "wide",
            Self::Kimi48b => "48b",
            Self::Kimi48bE16 => "48b-e16",
        }
    }

    /// The preset's config.json.
    ///
    /// # Errors
    /// None in practice: the documents are part of this program.
    pub fn config_json(self) -> Result<String> {
        let text = match self {
            Self::Tiny => include_str!("tiny.json"),
            Self::Wide => include_str!("wide.json"),
            Self::Kimi48b | Self::Kimi48bE16 => include_str!("48b.json"),
        };
        if self != Self::Kimi48bE16 {
            return Ok(text.to_owned());
        }
        let mut document: Value = serde_json::from_str(text).map_err(ModelError::ConfigSyntax)?;
        document["num_experts"] = REDUCED_EXPERTS.into();
        serde_json::to_string_pretty(&document).map_err(ModelError::ConfigSyntax)
    }

    /// The preset's configuration.
    ///
    /// # Errors
    /// None in practice, as above.
    pub fn config(self) -> Result<ModelConfig> {
        ModelConfig::parse(&self.config_json()?)
    }
}

/// A model's name, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSpec {
    /// A checkpoint directory.
    Directory(PathBuf),
    /// The trained model that is part of the program.
    Demo,
    /// Random weights in the shape of a preset.
    Random {
        /// The shape.
        preset: Preset,
        /// The seed of every weight.
        seed: u64,
    },
}

impl ModelSpec {
    /// Understands `demo` and `random:PRESET[@SEED]` (seed 0 if none is given); anything else is a directory.
    ///
    /// # Errors
    /// An unknown preset or a malformed seed.
    pub fn parse(name: &str) -> Result<Self> {
        let fault = |expected: String, found: String| ModelError::Spec { name: name.to_owned(), expected, found };
        if name == perigee_demo::NAME {
            return Ok(Self::Demo);
        }
        let Some(rest) = name.strip_prefix(RANDOM) else {
            if name.is_empty() {
                return Err(fault("a directory, demo or random:PRESET[@SEED]".into(), "an empty name".into()));
            }
            return Ok(Self::Directory(name.into()));
        };
        let (wanted, seed) = match rest.split_once('@') {
            Some((wanted, seed)) => (wanted, Some(seed)),
            None => (rest, None),
        };
        let Some(preset) = Preset::ALL.into_iter().find(|preset| preset.name() == wanted) else {
            let known = Preset::ALL.map(Preset::name).join(", ");
            return Err(fault(format!("a preset out of {known}"), format!("{wanted:?}")));
        };
        let seed = match seed {
            None => 0,
            Some(text) => {
                text.parse().map_err(|_| fault("a seed from 0 to 2^64 - 1 after the @".into(), format!("{text:?}")))?
            }
        };
        Ok(Self::Random { preset, seed })
    }
}

impl FromStr for ModelSpec {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self> {
        Self::parse(name)
    }
}

impl fmt::Display for ModelSpec {
    /// The name, as [`ModelSpec::parse`] takes it.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(out, "{}", path.display()),
            Self::Demo => out.write_str(perigee_demo::NAME),
            Self::Random { preset, seed } => write!(out, "{RANDOM}{}@{seed}", preset.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LayerKind;

    #[test]
    fn names_are_understood_and_printed_again() {
        let random = |preset, seed| ModelSpec::Random { preset, seed };
        for (name, spec) in [
            ("random:tiny", random(Preset::Tiny, 0)),
            ("random:wide@7", random(Preset::Wide, 7)),
            ("random:48b", random(Preset::Kimi48b, 0)),
            ("random:48b-e16@18446744073709551615", random(Preset::Kimi48bE16, u64::MAX)),
            ("models/random", ModelSpec::Directory("models/random".into())),
            ("demo", ModelSpec::Demo),
            ("./demo", ModelSpec::Directory("./demo".into())),
        ] {
            let parsed: ModelSpec = name.parse().unwrap();
            assert_eq!(parsed, spec);
            assert_eq!(ModelSpec::parse(&parsed.to_string()).unwrap(), spec);
        }
    }

    #[test]
    fn wrong_names_are_refused_with_what_would_do() {
        for (name, message) in [
            ("", "model : expected a directory, demo or random:PRESET[@SEED], found an empty name"),
            ("random:huge", "model random:huge: expected a preset out of tiny, wide, 48b, 48b-e16, found \"huge\""),
            ("random:@1", "model random:@1: expected a preset out of tiny, wide, 48b, 48b-e16, found \"\""),
            ("random:tiny@-1", "model random:tiny@-1: expected a seed from 0 to 2^64 - 1 after the @, found \"-1\""),
            ("random:tiny@", "model random:tiny@: expected a seed from 0 to 2^64 - 1 after the @, found \"\""),
        ] {
            assert_eq!(ModelSpec::parse(name).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn presets_have_the_shapes_they_are_named_after() {
        let full = Preset::Kimi48b.config().unwrap();
        assert_eq!((full.count(LayerKind::Kda), full.count(LayerKind::Mla), full.moe.experts), (20, 7, 256));
        let reduced = Preset::Kimi48bE16.config().unwrap();
        assert_eq!(reduced.moe.experts, 16);
        assert_eq!(crate::config::ModelConfig { moe: full.moe, ..reduced }, full);
        let tiny = Preset::Tiny.config().unwrap();
        assert_eq!((tiny.hidden, tiny.layers.len(), tiny.vocab), (128, 5, 512));
        let wide = Preset::Wide.config().unwrap();
        assert_eq!((wide.kda.head_dim, wide.mla.latent, wide.layers.len()), (128, 512, 7));
    }
}
