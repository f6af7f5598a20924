//! Text and conversations to tokens and back, off the threads that carry streams: a long prompt takes a while, and must not hold up anybody's
//! tokens. As many at once as there are cores; the others wait their turn.

use std::sync::Arc;

use perigee_proto::status::{ErrorKind, WireError};
use perigee_text::{ChatInput, ChatTemplate, SpecialTokens, TextError, Tokenizer};
use tokio::sync::Semaphore;

use crate::error;

/// The router's tokenizer and chat template, if it has them.
#[derive(Debug, Clone)]
pub(crate) struct Text {
    tokenizer: Option<Arc<Tokenizer>>,
    template: Option<Arc<ChatTemplate>>,
    turns: Arc<Semaphore>,
}

impl Text {
    pub(crate) fn new(tokenizer: Option<Arc<Tokenizer>>, template: Option<Arc<ChatTemplate>>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { tokenizer, template, turns: Arc::new(Semaphore::new(cores)) }
    }

    /// The tokenizer, for work of a few tokens.
    pub(crate) fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// Whether text can be encoded.
    pub(crate) fn is_there(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Token ids of a text. `field` is what the client sent it in.
    pub(crate) async fn encode(
        &self,
        field: &'static str,
        text: String,
        special: SpecialTokens,
    ) -> Result<Vec<u32>, WireError> {
        self.run(field, move |tokenizer| tokenizer.encode(&text, special)).await
    }

    /// Token ids of a conversation; control tokens come from the template alone. At most `limit` bytes are rendered.
    pub(crate) async fn encode_chat(&self, input: ChatInput, limit: usize) -> Result<Vec<u32>, WireError> {
        let field = "messages";
        let template = self.template.clone().ok_or_else(|| match self.tokenizer {
            None => error::no_tokenizer(field),
            Some(_) => error::no_template(),
        })?;
        let render = move |tokenizer: &Tokenizer| {
            let rendered = template.render(&input, tokenizer)?;
            if rendered.bytes() > limit {
                return Err(TextError::Template {
                    reason: format!("it comes to {} bytes, but at most {limit} are taken", rendered.bytes()),
                });
            }
            tokenizer.encode_rendered(&rendered)
        };
        self.run(field, render).await
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
