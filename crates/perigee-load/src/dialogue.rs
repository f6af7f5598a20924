//! What is said in a conversation, before any server's form is given to it: runs of tokens that are functions of a seed, so
//! that equal seeds are equal prefixes, and the answers so far.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Words for text prompts: common ones, each of which is one token in most vocabularies.
const WORDS: [&str; 32] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "this", "are", "or", "his", "from", "at", "which", "but", "have", "an", "had", "they", "you", "were", "their",
];

/// A run of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Decides what they are.
    pub seed: u64,
    /// How many.
    pub tokens: u32,
}

impl Segment {
    fn draws(self, below: u32) -> impl Iterator<Item = u32> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        (0..self.tokens).map(move |_| random.random_range(0..below.max(1)))
    }
}

/// A part of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// What the client says.
    User(Vec<Segment>),
    /// What was answered: text, and ids where the server tells them.
    Answer {
        /// Text.
        text: String,
        /// Token ids.
        tokens: Vec<u32>,
    },
}

/// Everything said so far; the last message is the client's.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dialogue(pub Vec<Message>);

impl Dialogue {
    /// As token ids below `vocabulary`.
    pub fn token_ids(&self, vocabulary: u32) -> Vec<u32> {
        let mut ids = Vec::new();
        for message in &self.0 {
            match message {
                Message::User(segments) => segments.iter().for_each(|segment| ids.extend(segment.draws(vocabulary))),
                Message::Answer { tokens, .. } => ids.extend(tokens),
            }
        }
        ids
    }

    /// As one text, about a word a token.
    pub fn text(&self) -> String {
        self.0.iter().map(Message::text).collect::<Vec<_>>().join(" ")
    }
}

impl Message {
    /// As text, about a word a token.
    pub fn text(&self) -> String {
        match self {
            Self::User(segments) => {
                let words = segments.iter().flat_map(|segment| segment.draws(WORDS.len() as u32));
                words.map(|word| WORDS[word as usize]).collect::<Vec<_>>().join(" ")
            }
            Self::Answer { text, .. } => text.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_are_equal_prefixes_in_every_form() {
        let shared = Segment { seed: 1, tokens: 100 };
        let said = |seed| Dialogue(vec![Message::User(vec![shared, Segment { seed, tokens: 50 }])]);
        let (one, other) = (said(2), said(3));
        let (ids, others) = (one.token_ids(300), other.token_ids(300));
        assert_eq!((ids.len(), &ids[..100]), (150, &others[..100]));
        assert_ne!(ids[100..], others[100..]);
        assert!(ids.iter().all(|id| *id < 300) && ids.iter().any(|id| *id > 200));
        let (text, other) = (one.text(), other.text());
        assert_eq!(text.split(' ').count(), 150);
        let common = text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        assert!(common >= one.0[0].text().len() / 2 && text != other);
    }

    #[test]
    fn answers_are_part_of_what_follows() {
        let answer = Message::Answer { text: "fine".to_owned(), tokens: vec![7, 8] };
        let segment = Segment { seed: 9, tokens: 1 };
        let dialogue = Dialogue(vec![Message::User(vec![segment]), answer, Message::User(vec![segment])]);
        let ids = dialogue.token_ids(100);
        assert_eq!((ids.len(), ids[1], ids[2], ids[0]), (4, 7, 8, ids[3]));
        assert!(dialogue.text().contains(" fine "));
    }
}
