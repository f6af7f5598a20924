//! Requests of one HTTP call, which may be several where it has several prompts: starts them all, and merges their streams
//! into one. Dropping it ends them. What a response looks like to a client is `completions`' and `chat`'s business.

use std::pin::Pin;
use std::task::{Context, Poll};

use perigee_proto::status::WireError;
use perigee_proto::v1::{self, FinishReason};
use perigee_trace::Traced;
use serde_json::{Value, json};
use tokio_stream::{Stream, StreamExt, StreamMap};

use super::error::HttpError;
use crate::reply::Responses;
use crate::service::InferenceService;
use crate::validate::{self, Prompt};

/// The streams of a call's requests, by the number of their prompt.
#[derive(Debug)]
pub(crate) struct Answers {
    streams: StreamMap<usize, Responses>,
    /// Read ahead, so that an error before the first token has a status of its own.
    first: Option<(usize, v1::GenerateResponse)>,
    /// What the prompt's field is called.
    prompt_name: &'static str,
    /// Choices of each request.
    choices: u32,
    counts: Counts,
}

/// Counts over all requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    prompt: u64,
    completion: u64,
    cached: u64,
}

/// What was started.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) answers: Answers,
    /// Tokens of each prompt.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Name of the first request, which the answer's id is made of.
    pub(crate) name: String,
}

impl Answers {
    /// Starts a request for every prompt and waits for the first response of any.
    ///
    /// # Errors
    /// Whatever is wrong with the request or the cluster before there is a token.
    pub(crate) async fn start(
        service: &InferenceService,
        traced: &Traced,
        request: &v1::GenerateRequest,
        prompts: Vec<Prompt>,
        prompt_name: &'static str,
    ) -> Result<Started, HttpError> {
        let named = |error: WireError| HttpError::from(error).with_names(prompt_name);
        let mut streams = StreamMap::new();
        let mut started = Vec::new();
        let mut name = String::new();
        let limit = Some(service.limits.prompt_logprobs);
        for (number, prompt) in prompts.into_iter().enumerate() {
            let request = request.clone();
            let check = |model: &_| validate::generate_from(prompt, request, model, &service.limits);
            let reply = service.start(traced, None, limit, check).await.map_err(named)?;
            if number == 0 {
                name = reply.request_id().to_owned();
            }
            started.push(reply.prompt().to_vec());
            streams.insert(number, Responses(reply));
        }
        let choices = request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1);
        let mut answers = Self { streams, first: None, prompt_name, choices, counts: Counts::default() };
        answers.first = answers.next().await.transpose()?;
        // Counted when it is read.
        answers.counts = Counts::default();
        Ok(Started { answers, prompts: started, name })
    }

    /// Counts of what was read.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// The number of a choice among those of all prompts.
    pub(crate) fn index(&self, prompt: usize, response: &v1::GenerateResponse) -> usize {
        prompt * self.choices as usize + response.choice as usize
    }

    /// How many choices there are.
    pub(crate) fn total(&self, prompts: usize) -> usize {
        prompts * self.choices as usize
    }
}

impl Stream for Answers {
    type Item = Result<(usize, v1::GenerateResponse), HttpError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = match self.first.take() {
            Some(first) => Some(Ok(first)),
            None => match Pin::new(&mut self.streams).poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => None,
                Poll::Ready(Some((number, Ok(response)))) => Some(Ok((number, response))),
                Poll::Ready(Some((_, Err(error)))) => Some(Err(HttpError::from(error).with_names(self.prompt_name))),
            },
        };
        if let Some(Ok((_, response))) = &item
            && let Some(usage) = &response.usage
        {
            self.counts.add(response.choice, usage);
        }
        Poll::Ready(item)
    }
}

impl Counts {
    /// A prompt counts once, whatever its choices.
    fn add(&mut self, choice: u32, usage: &v1::Usage) {
        if choice == 0 {
            self.prompt += usage.prompt;
            self.cached += usage.cached;
        }
        self.completion += usage.completion;
    }

    /// The same where the drawn tokens are no part of the answer.
    pub(crate) fn without_completion(self) -> Self {
        Self { completion: 0, ..self }
    }

    /// OpenAI's object.
    pub(crate) fn object(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

/// OpenAI's word for the end of a choice; none before it.
pub(crate) fn finish_reason(response: &v1::GenerateResponse) -> Option<&'static str> {
    match response.finish_reason() {
        FinishReason::Unspecified => None,
        FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::Aborted => Some("abort"),
    }
}
