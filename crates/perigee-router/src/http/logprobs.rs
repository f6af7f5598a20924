//! Log-probabilities in OpenAI's two forms: lists side by side for completions, objects for chat. A token is shown by its
//! bytes as text; those that are no UTF-8 by themselves are shown with U+FFFD, and exactly in chat's `bytes`.

use std::sync::Arc;

use perigee_proto::v1::{PositionLogprobs, TokenLogprob};
use perigee_text::{DetokenizeStream, Tokenizer};
use serde_json::{Map, Value, json};

/// Shows tokens.
#[derive(Debug, Clone)]
pub(crate) struct Shower(pub(crate) Option<Arc<Tokenizer>>);

impl Shower {
    fn bytes(&self, token: u32) -> Vec<u8> {
        match &self.0 {
            Some(tokenizer) => tokenizer.token_bytes(token),
            None => format!("token_id:{token}").into_bytes(),
        }
    }

    fn text(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.bytes(token)).into_owned()
    }

    /// An entry of chat's `content`.
    pub(crate) fn chat(&self, position: &PositionLogprobs) -> Option<Value> {
        let entry = |token: &TokenLogprob| {
            let bytes = self.bytes(token.token_id);
            json!({"token": String::from_utf8_lossy(&bytes), "logprob": finite(token.logprob), "bytes": bytes})
        };
        let mut chosen = entry(position.chosen.as_ref()?);
        chosen["top_logprobs"] = position.top.iter().map(entry).collect();
        Some(chosen)
    }
}

/// JSON has no infinity; OpenAI writes this for what is as good as impossible.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// Completions' lists.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Lists {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl Lists {
    /// Adds a token at an offset in characters; what is not known of a prompt's first token is null.
    pub(crate) fn push(&mut self, shower: &Shower, token: u32, position: Option<&PositionLogprobs>, offset: usize) {
        self.tokens.push(shower.text(token));
        self.text_offset.push(offset);
        let chosen = position.and_then(|position| position.chosen.as_ref());
        self.token_logprobs.push(chosen.map(|chosen| finite(chosen.logprob)));
        self.top_logprobs.push(position.zip(chosen).map(|(position, chosen)| {
            let mut top = Map::new();
            // The chosen token is always among them. Tokens that look alike keep the value of the most likely one.
            for token in position.top.iter().chain([chosen]) {
                top.entry(shower.text(token.token_id)).or_insert_with(|| finite(token.logprob).into());
            }
            top
        }));
    }

    /// Adds all tokens of a prompt; returns how many characters they have.
    pub(crate) fn push_prompt(&mut self, shower: &Shower, prompt: &[u32], positions: &[PositionLogprobs]) -> usize {
        let mut stream = shower.0.as_ref().map(|tokenizer| DetokenizeStream::new(tokenizer, false));
        let mut offset = 0;
        for (at, &token) in prompt.iter().enumerate() {
            self.push(shower, token, positions.get(at), offset);
            if let (Some(stream), Some(tokenizer)) = (&mut stream, &shower.0) {
                // A decoder that fails has no text to count.
                offset += stream.push(tokenizer, token).map_or(0, |text| text.chars().count());
            }
        }
        offset
    }

    /// Appends another one's.
    pub(crate) fn extend(&mut self, other: Self) {
        self.tokens.extend(other.tokens);
        self.token_logprobs.extend(other.token_logprobs);
        self.top_logprobs.extend(other.top_logprobs);
        self.text_offset.extend(other.text_offset);
    }

    /// OpenAI's object.
    pub(crate) fn object(&self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_the_prompts_first_token_without_a_value() {
        let shower = Shower(None);
        let at = |token_id, logprob| TokenLogprob { token_id, logprob };
        let known = PositionLogprobs { chosen: Some(at(5, f32::NEG_INFINITY)), top: vec![at(7, -0.5), at(8, -1.0)] };
        let mut lists = Lists::default();
        assert_eq!(lists.push_prompt(&shower, &[4, 5], &[PositionLogprobs::default(), known]), 0);
        let top = json!({"token_id:7": -0.5, "token_id:8": -1.0, "token_id:5": -9999.0});
        let expected = json!({"tokens": ["token_id:4", "token_id:5"], "token_logprobs": [null, -9999.0],
                              "top_logprobs": [null, top], "text_offset": [0, 0]});
        assert_eq!(lists.object(), expected);
    }
}
