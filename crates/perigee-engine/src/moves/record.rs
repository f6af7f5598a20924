//! A session's record as bytes: what a handoff carries besides tokens, tensors and segments. The encoding has a version of
//! its own and is read by the same version only; a replica with another one has the session replayed.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::sequence::Sequence;

/// Version of the record's encoding. It rises with every change of [`Sequence`] or of what is in it.
pub const RECORD_VERSION: u16 = 3;

/// A session between steps, without its tokens, which travel by themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its `tokens` are empty.
    pub(crate) sequence: Sequence,
    /// Tokens that state and latents cover.
    pub(crate) computed: u64,
    /// Positions whose prompt logits were had.
    pub(crate) scored: u64,
    /// Whether logits of prompt positions are wanted.
    pub(crate) prompt_logits: bool,
    /// How long the client still waits.
    pub(crate) time_left: Option<Duration>,
    /// Where the homes of its segments answer.
    pub(crate) homes: Vec<HomeAddress>,
}

/// Where a home answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HomeAddress {
    pub(crate) replica: String,
    pub(crate) incarnation: String,
    pub(crate) endpoint: String,
}

/// A record that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Another version.
    #[error("a session record of version {found}, this replica reads version {RECORD_VERSION}; replay the session")]
    Version {
        /// The version of the record.
        found: u16,
    },
    /// Not a record.
    #[error("a session record that cannot be read: {0}")]
    Malformed(String),
    /// It contradicts what came with it.
    #[error("a session record with {what} {found}, but the handoff has {expected}")]
    Contradiction {
        /// What is counted.
        what: &'static str,
        /// What the handoff says.
        expected: u64,
        /// What the record says.
        found: u64,
    },
}

impl Record {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        postcard::to_extend(self, RECORD_VERSION.to_le_bytes().to_vec())
            .map_err(|error| RecordError::Malformed(error.to_string()))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let Some((version, body)) = bytes.split_first_chunk() else {
            return Err(RecordError::Malformed(format!("{} bytes", bytes.len())));
        };
        let found = u16::from_le_bytes(*version);
        if found != RECORD_VERSION {
            return Err(RecordError::Version { found });
        }
        match postcard::take_from_bytes(body) {
            Ok((record, [])) => Ok(record),
            Ok((_, rest)) => Err(RecordError::Malformed(format!("{} bytes are left over", rest.len()))),
            Err(error) => Err(RecordError::Malformed(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use perigee_sampling::{SamplingParams, TokenCounts};
    use perigee_text::grammar::GrammarSource;

    use super::*;
    use crate::request::{SessionId, StopRule};
    use crate::sequence::PromptLogprobs;

    fn record() -> Record {
        let sampling = SamplingParams { repetition_penalty: 1.2, seed: 7, ..SamplingParams::greedy() };
        let sequence = Sequence {
            session: SessionId("s".into()),
            request_id: "r".into(),
            epoch: 3,
            choice: 1,
            tokens: Vec::new(),
            prompt_length: 80,
            sampling,
            stop: StopRule { max_tokens: 9, stop: vec!["never".into()], ..StopRule::default() },
            end_tokens: vec![2],
            max_length: 100,
            priority: -1,
            cache_salt: "salt".into(),
            counts: TokenCounts::from_prompt(&[5, 5, 6]),
            text: None,
            prompt_logprobs: Some(PromptLogprobs::new(2)),
            cached: 0,
            grammar: Some(GrammarSource::Regex("a+".into())),
            trace: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().ok(),
        };
        let homes = vec![HomeAddress { replica: "a".into(), incarnation: "1".into(), endpoint: "h:1".into() }];
        let time_left = Some(Duration::from_millis(1500));
        Record { sequence, computed: 81, scored: 64, prompt_logits: true, time_left, homes }
    }

    #[test]
    fn a_record_comes_back_whole() {
        let bytes = record().encode().unwrap();
        assert_eq!(Record::decode(&bytes).unwrap(), record());
    }

    #[test]
    fn other_versions_and_cut_or_longer_records_are_refused() {
        let bytes = record().encode().unwrap();
        let mut newer = bytes.clone();
        newer[0] += 1;
        assert_eq!(Record::decode(&newer), Err(RecordError::Version { found: RECORD_VERSION + 1 }));
        for length in 0..bytes.len() {
            assert!(matches!(Record::decode(&bytes[..length]), Err(RecordError::Malformed(_))), "{length} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(Record::decode(&longer), Err(RecordError::Malformed(_))));
    }
}
