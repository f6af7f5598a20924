//! A load test as a TOML file says it: arrivals, lengths, what prompts share, and what counts as good. `tests/load` has
//! examples. Unknown keys are errors, and so are values that make no test.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::LoadError;

/// A load test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name in reports.
    pub name: String,
    /// Seed of everything that is drawn: the same seed asks for the same at the same times.
    #[serde(default)]
    pub seed: u64,
    /// When conversations begin.
    pub arrivals: Arrivals,
    /// Conversations to begin. A trace ends by itself; otherwise this or `duration_s` is needed.
    #[serde(default)]
    pub conversations: Option<usize>,
    /// Seconds in which conversations begin.
    #[serde(default)]
    pub duration_s: Option<f64>,
    /// Seconds at the start whose requests are sent but not counted.
    #[serde(default)]
    pub warmup_s: f64,
    /// Tokens of each turn's own prompt, beside prefix and history.
    pub prompt: Length,
    /// Tokens to generate in each turn.
    pub output: Length,
    /// Prefixes that conversations share.
    #[serde(default)]
    pub prefixes: Option<Prefixes>,
    /// Turns of a conversation. Default: one.
    #[serde(default)]
    pub turns: Option<Turns>,
    /// Requests that are given up before their end.
    #[serde(default)]
    pub cancel: Option<Cancel>,
    /// Seconds after which a request counts as failed.
    #[serde(default)]
    pub timeout_s: Option<f64>,
    /// 0 takes the most likely token. Default: the server's value.
    #[serde(default)]
    pub temperature: Option<f32>,
    /// Whether answers go on after end-of-sequence tokens, so that lengths are those of the scenario. Servers that do not
    /// know `ignore_eos` need false. Default: true.
    #[serde(default = "yes")]
    pub ignore_eos: bool,
    /// What makes a request good.
    #[serde(default)]
    pub slo: Slo,
    /// What the whole must reach.
    #[serde(default)]
    pub thresholds: Thresholds,
}

/// When conversations begin. All but `closed` are open loops: they do not wait for answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Arrivals {
    /// Independent of each other.
    Poisson {
        /// Conversations a second, in the mean.
        rate: f64,
    },
    /// Gaps of a gamma distribution.
    Gamma {
        /// Conversations a second, in the mean.
        rate: f64,
        /// Coefficient of variation of the gaps: 1 is Poisson, more comes in bursts, less is more even.
        cv: f64,
    },
    /// Poisson with a rate that rises or falls linearly, and stays at the end.
    Ramp {
        /// Conversations a second at the start.
        from: f64,
        /// Conversations a second at the end.
        to: f64,
        /// Seconds from one to the other.
        over_s: f64,
    },
    /// Times of a JSONL file, one request a line: {timestamp (ms), input_length, output_length, hash_ids}.
    Trace {
        /// The file, beside the scenario unless absolute.
        file: PathBuf,
        /// How many times faster than recorded. Default: 1.
        #[serde(default = "one")]
        speed: f64,
    },
    /// A number of clients, each of which waits for its answer before it goes on.
    Closed {
        /// Clients.
        concurrency: usize,
    },
}

/// How many tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Length {
    /// Always the same.
    Fixed {
        /// Tokens.
        tokens: u32,
    },
    /// Each number of a range as likely as another.
    Uniform {
        /// The least.
        min: u32,
        /// The most.
        max: u32,
    },
    /// Log-normal, as lengths of real requests nearly are.
    LogNormal {
        /// Half are shorter.
        median: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
        /// Longer ones are cut to this.
        max: u32,
    },
    /// As the trace says.
    Trace,
}

/// Prefixes that conversations share, as system prompts are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefixes {
    /// How many there are; each conversation draws one.
    pub count: u32,
    /// Tokens of each.
    pub tokens: u32,
}

/// Turns of a conversation: each one's prompt is all that was said before, and something new.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turns {
    /// How many.
    pub count: Length,
    /// Seconds between an answer's end and the next turn. Default: 0.
    #[serde(default)]
    pub think_s: f64,
}

/// Requests that are given up before their end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cancel {
    /// Their share, 0 to 1.
    pub share: f64,
    /// After how many tokens.
    pub after: Length,
}

/// What makes a request good: all that are given must hold.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// Most milliseconds to the first token.
    pub ttft_ms: Option<f64>,
    /// Most milliseconds a token after the first, in the request's mean.
    pub tpot_ms: Option<f64>,
    /// Most milliseconds to the end.
    pub e2e_ms: Option<f64>,
}

/// What the whole must reach; a run that misses one fails.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Thresholds {
    /// Time to the first token.
    pub ttft_ms: Limits,
    /// Time per output token.
    pub tpot_ms: Limits,
    /// Time between responses that carry tokens.
    pub itl_ms: Limits,
    /// Time to the end.
    pub e2e_ms: Limits,
    /// Most failed requests as a share of all, 0 to 1.
    pub failed_share: Option<f64>,
    /// Least share of good requests, 0 to 1.
    pub good_share: Option<f64>,
    /// Least output tokens a second.
    pub output_tok_s: Option<f64>,
    /// Least completed requests a second.
    pub requests_s: Option<f64>,
}

/// Most milliseconds of one latency.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Of its mean.
    pub mean: Option<f64>,
    /// Of its median.
    pub p50: Option<f64>,
    /// Of its 90th percentile.
    pub p90: Option<f64>,
    /// Of its 99th percentile.
    pub p99: Option<f64>,
    /// Of the longest.
    pub max: Option<f64>,
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

impl Scenario {
    /// Reads a file. Paths in it are beside it.
    ///
    /// # Errors
    /// [`LoadError`] names the file and what is wrong in it.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let text = std::fs::read_to_string(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
        let wrong = |reason: String| LoadError::Scenario { path: path.to_owned(), reason };
        let mut scenario: Self = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if let Arrivals::Trace { file, .. } = &mut scenario.arrivals {
            *file = path.parent().unwrap_or(Path::new("")).join(&file);
        }
        Ok(scenario)
    }

    /// Everything that is wrong with it.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut need = |holds: bool, fault: &str| {
            if !holds {
                faults.push(fault.to_owned());
            }
        };
        let positive = |number: f64| number.is_finite() && number > 0.0;
        let share = |number: f64| (0.0..=1.0).contains(&number);
        let is_trace = matches!(self.arrivals, Arrivals::Trace { .. });
        match self.arrivals {
            Arrivals::Poisson { rate } => need(positive(rate), "arrivals.rate: expected a number above 0"),
            Arrivals::Gamma { rate, cv } => {
                need(positive(rate), "arrivals.rate: expected a number above 0");
                need(positive(cv), "arrivals.cv: expected a number above 0");
            }
            Arrivals::Ramp { from, to, over_s } => {
                need(from.is_finite() && from >= 0.0, "arrivals.from: expected a number, at least 0");
                need(positive(to), "arrivals.to: expected a number above 0");
                need(positive(over_s), "arrivals.over_s: expected seconds above 0");
            }
            Arrivals::Trace { speed, .. } => need(positive(speed), "arrivals.speed: expected a number above 0"),
            Arrivals::Closed { concurrency } => need(concurrency > 0, "arrivals.concurrency: expected at least 1"),
        }
        need(
            is_trace || self.conversations.is_some() || self.duration_s.is_some(),
            "conversations or duration_s: give one",
        );
        need(self.conversations != Some(0), "conversations: expected at least 1");
        need(self.duration_s.is_none_or(positive), "duration_s: expected seconds above 0");
        need(self.warmup_s.is_finite() && self.warmup_s >= 0.0, "warmup_s: expected seconds, at least 0");
        need(self.timeout_s.is_none_or(positive), "timeout_s: expected seconds above 0");
        let mut lengths = vec![("prompt", &self.prompt), ("output", &self.output)];
        if let Some(turns) = &self.turns {
            lengths.push(("turns.count", &turns.count));
            need(turns.think_s.is_finite() && turns.think_s >= 0.0, "turns.think_s: expected seconds, at least 0");
            need(!is_trace, "turns: a trace has its own");
        }
        if let Some(cancel) = &self.cancel {
            lengths.push(("cancel.after", &cancel.after));
            need(share(cancel.share), "cancel.share: expected 0 to 1");
        }
        if let Some(prefixes) = &self.prefixes {
            need(prefixes.count > 0 && prefixes.tokens > 0, "prefixes: count and tokens must be at least 1");
            need(!is_trace, "prefixes: a trace has its own, hash_ids");
        }
        for (name, length) in lengths {
            let of_trace = *length == Length::Trace;
            let can_be = is_trace && (name == "prompt" || name == "output");
            need(!of_trace || can_be, &format!("{name}: the trace has no such lengths"));
            need(
                length.makes_sense(),
                &format!("{name}: expected lengths of at least 1, max not below min, sigma at least 0"),
            );
        }
        faults
    }
}

impl Length {
    fn makes_sense(&self) -> bool {
        match *self {
            Self::Fixed { tokens } => tokens > 0,
            Self::Uniform { min, max } => min > 0 && max >= min,
            Self::LogNormal { median, sigma, max } => {
                median.is_finite() && median >= 1.0 && sigma.is_finite() && sigma >= 0.0 && max > 0
            }
            Self::Trace => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "name = \"x\"\nconversations = 3\narrivals = { kind = \"poisson\", rate = 1.0 }\n\
                           prompt = { kind = \"fixed\", tokens = 4 }\noutput = { kind = \"uniform\", min = 1, max = 9 }\n";

    #[test]
    fn a_short_file_has_defaults_and_no_faults() {
        let scenario: Scenario = toml::from_str(MINIMAL).expect("read");
        assert_eq!(scenario.faults(), Vec::<String>::new());
        assert!(scenario.ignore_eos && scenario.turns.is_none() && scenario.warmup_s == 0.0);
    }

    #[test]
    fn ready_scenarios_have_no_faults() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/load");
        let files = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
        let scenarios: Vec<_> = files.filter(|path| path.extension().is_some_and(|kind| kind == "toml")).collect();
        assert!(scenarios.len() >= 6, "{scenarios:?}");
        for path in scenarios {
            let scenario = Scenario::open(&path).expect("a scenario");
            assert_eq!(scenario.faults(), Vec::<String>::new(), "{}", path.display());
            assert!(crate::Plan::new(&scenario).expect("a plan").take(50).count() >= 50, "{}", path.display());
        }
    }

    #[test]
    fn unknown_keys_are_errors() {
        for wrong in ["sed = 1", "[slo]\nttft = 5", "[thresholds.ttft_ms]\np95 = 1"] {
            assert!(toml::from_str::<Scenario>(&format!("{MINIMAL}{wrong}\n")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_fault_is_told() {
        let mut scenario: Scenario = toml::from_str(MINIMAL).expect("read");
        scenario.arrivals = Arrivals::Gamma { rate: 0.0, cv: f64::NAN };
        scenario.conversations = None;
        scenario.prompt = Length::Trace;
        scenario.output = Length::Uniform { min: 5, max: 4 };
        scenario.cancel = Some(Cancel { share: 1.5, after: Length::Fixed { tokens: 0 } });
        let faults = scenario.faults();
        for name in
            ["arrivals.rate", "arrivals.cv", "conversations or", "prompt", "output", "cancel.share", "cancel.after"]
        {
            assert_eq!(faults.iter().filter(|fault| fault.starts_with(name)).count(), 1, "{name}: {faults:?}");
        }
    }
}
