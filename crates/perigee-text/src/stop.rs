//! Stop strings over streamed text. It holds back what may be the start of a stop string, reports the match, and
//! gives out the same text however the input was cut into pieces. It knows no tokens: stop token ids are the engine's
//! affair.
//!
//! The match is the one that is complete first; of several that are complete at the same place, the longest. So a
//! stream can stop at once, without waiting whether a longer stop string would have followed.

use serde::{Deserialize, Serialize};

/// The most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;
/// The most bytes of a stop string.
pub const MAX_STOP_BYTES: usize = 256;

/// Stop strings outside their limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// Too many of them.
    #[error("stop has {found} strings, but at most {MAX_STOP_STRINGS} are allowed")]
    TooMany {
        /// How many were given.
        found: usize,
    },
    /// One is empty or too long.
    #[error("stop[{index}] has {bytes} bytes, but must have between 1 and {MAX_STOP_BYTES}")]
    Length {
        /// Which one, from 0.
        index: usize,
        /// Its length in bytes.
        bytes: usize,
    },
}

/// What a piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// The text to give out now.
    pub text: String,
    /// The index of the stop string that was found, from then on in every output.
    pub stopped: Option<usize>,
}

/// Finds stop strings in a stream of text. The state is serialisable and moves with its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StopRecord")]
pub struct StopMatcher {
    stops: Vec<String>,
    include_stop: bool,
    /// Text not given out: the longest end of the stream that starts some stop string, all of it where a match was
    /// found.
    held: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher before its first text. With `include_stop` the stop string itself is given out too; otherwise only
    /// what is before it.
    ///
    /// # Errors
    /// [`StopError`] for more than [`MAX_STOP_STRINGS`] strings, an empty one, or one over [`MAX_STOP_BYTES`].
    pub fn new(stops: Vec<String>, include_stop: bool) -> Result<Self, StopError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopError::TooMany { found: stops.len() });
        }
        let out_of_range = |stop: &String| !(1..=MAX_STOP_BYTES).contains(&stop.len());
        if let Some(index) = stops.iter().position(out_of_range) {
            return Err(StopError::Length { index, bytes: stops[index].len() });
        }
        Ok(Self { stops, include_stop, held: String::new(), stopped: None })
    }

    /// Adds text. After a match, further text is ignored.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.stopped.is_some() {
            return StopOutput { text: String::new(), stopped: self.stopped };
        }
        self.held.push_str(text);
        if let Some(found) = self.find() {
            let length = self.stops[found.index].len();
            self.held.truncate(if self.include_stop { found.end } else { found.end - length });
            self.stopped = Some(found.index);
            return StopOutput { text: std::mem::take(&mut self.held), stopped: self.stopped };
        }
        let kept = self.held.split_off(self.held.len() - self.possible_start());
        StopOutput { text: std::mem::replace(&mut self.held, kept), stopped: None }
    }

    /// Gives text out without looking for stop strings in it, as before a request's min_tokens are reached. Matches
    /// do not begin in it either.
    pub fn pass(&mut self, text: &str) -> String {
        let mut out = std::mem::take(&mut self.held);
        if self.stopped.is_none() {
            out.push_str(text);
        }
        out
    }

    /// Ends the stream and returns what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The index of the stop string that was found.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// The match in the held text that ends first, the longest of those.
    fn find(&self) -> Option<Match> {
        let matches = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            self.held.find(stop.as_str()).map(|start| Match { end: start + stop.len(), index })
        });
        matches.min_by_key(|found| (found.end, std::cmp::Reverse(self.stops[found.index].len()), found.index))
    }

    /// The bytes at the end of the held text that are the start of a stop string, as many as possible.
    fn possible_start(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        (first..self.held.len())
            .filter_map(|start| self.held.get(start..))
            .find(|end| self.stops.iter().any(|stop| stop.starts_with(end)))
            .map_or(0, str::len)
    }
}

struct Match {
    end: usize,
    index: usize,
}

/// A matcher as it arrives from elsewhere, before its limits are checked.
#[derive(Deserialize)]
struct StopRecord {
    stops: Vec<String>,
    include_stop: bool,
    held: String,
    stopped: Option<usize>,
}

impl TryFrom<StopRecord> for StopMatcher {
    type Error = StopError;

    fn try_from(record: StopRecord) -> Result<Self, StopError> {
        let StopRecord { stops, include_stop, held, stopped } = record;
        Ok(Self { held, stopped, ..Self::new(stops, include_stop)? })
    }
}
