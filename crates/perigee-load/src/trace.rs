//! Recorded arrivals: JSON lines in the form of the published Mooncake traces, {timestamp (ms), input_length,
//! output_length, hash_ids}. Prompts share what their leading hash_ids, one for 512 tokens, have in common.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::LoadError;

/// Tokens that one of `hash_ids` stands for.
pub(crate) const BLOCK_TOKENS: u32 = 512;

/// One recorded request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Recorded {
    /// From the first one on.
    pub(crate) at: Duration,
    pub(crate) input: u32,
    pub(crate) output: u32,
    pub(crate) blocks: Vec<u64>,
}

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads a trace; times become relative to the first and are divided by `speed`.
pub(crate) fn read(path: &Path, speed: f64) -> Result<Vec<Recorded>, LoadError> {
    let text = std::fs::read_to_string(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    let wrong = |line: usize, reason: &str| LoadError::Trace { path: path.to_owned(), line, reason: reason.to_owned() };
    let mut requests: Vec<Recorded> = Vec::new();
    let mut first = None;
    for (index, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let line: Line = serde_json::from_str(text).map_err(|error| wrong(index + 1, &error.to_string()))?;
        let since = line.timestamp - *first.get_or_insert(line.timestamp);
        let at = Duration::try_from_secs_f64(since / 1e3 / speed)
            .map_err(|_| wrong(index + 1, "timestamp: expected milliseconds, not before the first line's"))?;
        if requests.last().is_some_and(|last| last.at > at) {
            return Err(wrong(index + 1, "timestamp: it is before that of the line above"));
        }
        if line.input_length == 0 || line.output_length == 0 {
            return Err(wrong(index + 1, "input_length and output_length must be at least 1"));
        }
        requests.push(Recorded { at, input: line.input_length, output: line.output_length, blocks: line.hash_ids });
    }
    if requests.is_empty() {
        return Err(wrong(1, "the file has no request"));
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, speed: f64) -> Result<Vec<Recorded>, String> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        read(file.path(), speed).map_err(|error| error.to_string())
    }

    #[test]
    fn times_are_relative_and_scaled() {
        let text = "{\"timestamp\": 1000, \"input_length\": 700, \"output_length\": 5, \"hash_ids\": [1, 2]}\n\n\
                    {\"timestamp\": 1500, \"input_length\": 3, \"output_length\": 4}\n";
        let requests = read_text(text, 2.0).expect("read");
        assert_eq!(requests[0], Recorded { at: Duration::ZERO, input: 700, output: 5, blocks: vec![1, 2] });
        assert_eq!(requests[1], Recorded { at: Duration::from_millis(250), input: 3, output: 4, blocks: vec![] });
    }

    #[test]
    fn bad_lines_are_named() {
        let good = "{\"timestamp\": 5, \"input_length\": 1, \"output_length\": 1}\n";
        for (text, expected) in [
            ("".to_owned(), "no request"),
            (format!("{good}{{}}"), "line 2: missing field"),
            (format!("{good}{}", good.replace('5', "4")), "line 2: timestamp"),
            (good.replace("\"input_length\": 1", "\"input_length\": 0"), "line 1: input_length"),
        ] {
            let error = read_text(&text, 1.0).expect_err("refused");
            assert!(error.contains(expected), "{error}");
        }
    }
}
