//! Which tokens a sequence has seen, and how often it generated them: what the penalties need. Sparse, so that it
//! grows with the distinct tokens and not with the vocabulary, and ordered, so that equal counts serialise to equal
//! bytes when a session moves. It is not the token history and cannot rebuild it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is known about one token of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCount {
    /// The token occurs in the prompt.
    pub in_prompt: bool,
    /// How often the sequence has generated the token.
    pub output: u32,
}

/// The tokens of one sequence with their counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCounts {
    tokens: BTreeMap<u32, TokenCount>,
}

impl TokenCounts {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The counts of a prompt, before anything is generated.
    pub fn from_prompt(prompt: &[u32]) -> Self {
        let mut counts = Self::new();
        counts.record_prompt(prompt);
        counts
    }

    /// Marks tokens as part of the prompt.
    pub fn record_prompt(&mut self, prompt: &[u32]) {
        for &token in prompt {
            self.tokens.entry(token).or_default().in_prompt = true;
        }
    }

    /// Counts one generated token.
    pub fn record_output(&mut self, token: u32) {
        let count = self.tokens.entry(token).or_default();
        count.output = count.output.saturating_add(1);
    }

    /// What is known about a token; all zero for one never seen.
    pub fn get(&self, token: u32) -> TokenCount {
        self.tokens.get(&token).copied().unwrap_or_default()
    }

    /// Every token seen, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, TokenCount)> + '_ {
        self.tokens.iter().map(|(&token, &count)| (token, count))
    }

    /// The number of distinct tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// No token was seen.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_and_output_are_counted_apart() {
        let mut counts = TokenCounts::from_prompt(&[5, 5, 9]);
        counts.record_output(5);
        counts.record_output(7);
        counts.record_output(7);
        assert_eq!(counts.get(5), TokenCount { in_prompt: true, output: 1 });
        assert_eq!(counts.get(7), TokenCount { in_prompt: false, output: 2 });
        assert_eq!(counts.get(9), TokenCount { in_prompt: true, output: 0 });
        assert_eq!(counts.get(1), TokenCount::default());
        assert_eq!(counts.len(), 3);
        assert_eq!(counts.iter().map(|(token, _)| token).collect::<Vec<_>>(), [5, 7, 9]);
    }

    #[test]
    fn equal_counts_serialise_to_equal_bytes_and_back() {
        let mut forward = TokenCounts::from_prompt(&[1, 2, 3]);
        let mut backward = TokenCounts::from_prompt(&[3, 2, 1]);
        for token in [8, 4, 8] {
            forward.record_output(token);
        }
        for token in [8, 8, 4] {
            backward.record_output(token);
        }
        let bytes = postcard::to_stdvec(&forward).unwrap();
        assert_eq!(bytes, postcard::to_stdvec(&backward).unwrap());
        assert_eq!(postcard::from_bytes::<TokenCounts>(&bytes).unwrap(), forward);
    }
}
