//! Text to tokens and back, off the threads that carry streams: a long prompt takes a while, and must not hold up anybody's
//! tokens. As many at once as there are cores; the others wait their turn.

use std::sync::Arc;

use perigee_proto::status::{ErrorKind, WireError};
use perigee_text::{SpecialTokens, TextError, Tokenizer};
use tokio::sync::Semaphore;

use crate::error;

/// The router's tokenizer, if it has one.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    tokenizer: Option<Arc<Tokenizer>>,
    turns: Arc<Semaphore>,
}

impl Text {
    pub(crate) fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { tokenizer, turns: Arc::new(Semaphore::new(cores)) }
    }

    /// Whether text can be encoded.
    pub(crate) fn is_there(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Token ids of a text; special tokens in it are plain text. `field` is what the client sent it in.
    pub(crate) async fn encode(&self, field: &'static str, text: String) -> Result<Vec<u32>, WireError> {
        self.run(field, move |tokenizer| tokenizer.encode(&text, SpecialTokens::AsText)).await
    }

    /// Text of token ids, without special tokens.
    pub(crate) async fn decode(&self, field: &'static str, tokens: Vec<u32>) -> Result<String, WireError> {
        self.run(field, move |tokenizer| tokenizer.decode(&tokens, true)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        field: &'static str,
        work: impl FnOnce(&Tokenizer) -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, WireError> {
        let tokenizer = self.tokenizer.clone().ok_or_else(|| error::no_tokenizer(field))?;
        let broken = |reason: String| WireError::new(ErrorKind::Internal, format!("tokenizer: {reason}"));
        let turn = self.turns.clone().acquire_owned().await.map_err(|closed| broken(closed.to_string()))?;
        let job = tokio::task::spawn_blocking(move || {
            // Kept until the work is done, even if nobody waits for it any more.
            let _turn = turn;
            work(&tokenizer)
        });
        let result = job.await.map_err(|failed| broken(failed.to_string()))?;
        result.map_err(|refused| error::text_refused(field, &refused))
    }
}
