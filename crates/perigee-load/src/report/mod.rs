//! What a run came to, as data. It is JSON as it stands; `table` is for terminals and `page` for browsers.

mod page;
pub mod plot;
mod table;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::Scenario;
pub use crate::spread::Summary;

/// What a run came to. Times are in milliseconds or, where named so, seconds from the start. Rates are over the time from
/// the end of the warm-up to the end of the last counted request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What was run, seed included.
    pub scenario: Scenario,
    /// What was asked.
    pub target: String,
    /// The time that rates are over.
    pub seconds: f64,
    /// Requests sent, those of the warm-up included.
    pub sent: u64,
    /// Requests sent that have no outcome: a fault of this program.
    pub lost: u64,
    /// Completed requests a second.
    pub requests_s: f64,
    /// Output tokens a second.
    pub output_tok_s: f64,
    /// Prompt tokens a second.
    pub prompt_tok_s: f64,
    /// Good requests a second.
    pub goodput_s: f64,
    /// Good requests as a share of those that completed or failed.
    pub good_share: f64,
    /// Failed requests as a share of those that completed or failed.
    pub failed_share: f64,
    /// Counts after the warm-up.
    pub counted: Counted,
    /// The first message of each code of failure.
    pub messages: BTreeMap<String, String>,
    /// Distributions.
    #[serde(flatten)]
    pub latencies: Latencies,
    /// The same as curves.
    pub curves: Curves,
    /// What happened when, the warm-up included.
    pub timeline: Vec<Bucket>,
    /// Moves of sessions, and failures, by time: those of the requests that ended first, where there are very many.
    pub marks: Vec<Mark>,
    /// How many there were beyond these.
    pub marks_left_out: u64,
}

/// Counts after the warm-up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// All requests.
    pub requests: u64,
    /// Completed.
    pub completed: u64,
    /// Completed within all objectives.
    pub good: u64,
    /// Given up by the client on purpose.
    pub cancelled: u64,
    /// Failed.
    pub failed: u64,
    /// These by code.
    pub failures: BTreeMap<String, u64>,
    /// Moves that streams showed.
    pub moves: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of these, found in a cache.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub output_tokens: u64,
}

/// Distributions of times, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Latencies {
    /// From when a request was due to its first token.
    pub ttft_ms: Summary,
    /// A token after the first, in the mean of each request.
    pub tpot_ms: Summary,
    /// Between responses that carry tokens.
    pub itl_ms: Summary,
    /// From when a request was due to the end of its answer.
    pub e2e_ms: Summary,
    /// From when a request was due until it was sent: what this program itself was late by. It is part of the others.
    pub lateness_ms: Summary,
}

/// Points [milliseconds, share of values not above].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Curves {
    /// Time to the first token.
    pub ttft_ms: Vec<[f64; 2]>,
    /// Time per output token.
    pub tpot_ms: Vec<[f64; 2]>,
    /// Time between responses.
    pub itl_ms: Vec<[f64; 2]>,
    /// Time to the end.
    pub e2e_ms: Vec<[f64; 2]>,
}

/// A stretch of the timeline.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bucket {
    /// Its start, in seconds.
    pub from_s: f64,
    /// Its length, in seconds.
    pub seconds: f64,
    /// Requests due in it.
    pub started: u64,
    /// Requests that ended in it.
    pub ended: u64,
    /// Of these, failed.
    pub failed: u64,
    /// Requests that were due and had not ended at its end.
    pub running: u64,
    /// Tokens that came in it.
    pub tokens: u64,
    /// Of first tokens that came in it.
    pub ttft_p50_ms: Option<f64>,
    /// Of first tokens that came in it.
    pub ttft_p99_ms: Option<f64>,
}

/// Something that happened to one request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mark {
    /// When, in seconds.
    pub at_s: f64,
    /// `move` or `failure`.
    pub kind: String,
    /// What.
    pub text: String,
}

impl Latencies {
    /// Names and distributions, in the order in which they are told.
    pub(crate) fn named(&self) -> [(&'static str, &Summary); 5] {
        [
            ("TTFT", &self.ttft_ms),
            ("TPOT", &self.tpot_ms),
            ("inter-token", &self.itl_ms),
            ("end to end", &self.e2e_ms),
            ("sent late", &self.lateness_ms),
        ]
    }
}

impl Report {
    /// What the whole failed to reach, one line each.
    pub fn misses(&self) -> Vec<String> {
        crate::thresholds::misses(self)
    }

    /// For a terminal.
    pub fn table(&self) -> String {
        table::render(self)
    }

    /// One page of HTML that needs nothing else.
    pub fn page(&self) -> String {
        page::render(self)
    }
}
