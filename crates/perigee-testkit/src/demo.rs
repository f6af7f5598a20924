//! What the demo model is known to say: greedy continuations and the log probabilities of a page that it was not trained
//! on, as the training framework computed them (`perigee-demo/train/expected.py`).

use serde_json::Value;

use crate::error::Result;

const EXPECTED: &str = include_str!("../../perigee-demo/expected.json");

/// A prompt and its greedy continuation.
#[derive(Debug, Clone)]
pub struct Continuation {
    /// The text that is gone on from.
    pub prompt: String,
    /// The tokens that follow, the end of the text among them where it comes.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
}

/// A page with the log probability of every token but the first.
#[derive(Debug, Clone)]
pub struct Page {
    /// Bytes of its text.
    pub bytes: usize,
    /// Its tokens: the end of the text before it, its own, its end.
    pub tokens: Vec<u32>,
    /// Of the tokens from the second on, in nats.
    pub logprobs: Vec<f64>,
}

/// The known continuations.
///
/// # Errors
/// None in practice: the document is part of this crate.
pub fn continuations() -> Result<Vec<Continuation>> {
    let document: Value = serde_json::from_str(EXPECTED)?;
    let read = |entry: &Value| Continuation {
        prompt: entry["prompt"].as_str().unwrap_or_default().to_owned(),
        tokens: ids(&entry["tokens"]),
        text: entry["text"].as_str().unwrap_or_default().to_owned(),
    };
    Ok(document["continuations"].as_array().into_iter().flatten().map(read).collect())
}

/// The page.
///
/// # Errors
/// As [`continuations`].
pub fn page() -> Result<Page> {
    let document: Value = serde_json::from_str(EXPECTED)?;
    let page = &document["page"];
    Ok(Page {
        bytes: page["text"].as_str().unwrap_or_default().len(),
        tokens: ids(&page["tokens"]),
        logprobs: page["logprobs"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect(),
    })
}

fn ids(list: &Value) -> Vec<u32> {
    let numbers = list.as_array().into_iter().flatten().filter_map(Value::as_u64);
    numbers.filter_map(|number| u32::try_from(number).ok()).collect()
}
