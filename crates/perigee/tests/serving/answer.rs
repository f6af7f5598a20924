//! A stream as its client puts it together. Every rule that a stream must keep is checked while it is read: indices
//! without gap or repeat, one end of each choice, what comes first and what comes last.

use std::ops::ControlFlow;
use std::time::Instant;

use perigee_proto::v1::{FinishReason, GenerateRequest, GenerateResponse, PositionLogprobs, Usage};
use perigee_testkit::sandbox::Clients;
use tonic::{Status, Streaming};

/// One choice of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    /// One a token, where asked for.
    pub(crate) logprobs: Vec<PositionLogprobs>,
    pub(crate) prompt_logprobs: Vec<PositionLogprobs>,
    pub(crate) finish: Option<FinishReason>,
    pub(crate) usage: Option<Usage>,
    session: String,
    responses: usize,
}

/// How a stream ended.
#[derive(Debug, Clone)]
pub(crate) enum End {
    /// By itself, every choice finished.
    Finished,
    /// The client dropped it.
    Dropped,
    /// With a status.
    Failed(Status),
}

/// What a client received.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) choices: Vec<Choice>,
    /// Who served it first.
    pub(crate) replica: String,
    pub(crate) seed: Option<u64>,
    pub(crate) end: End,
    pub(crate) ended: Instant,
}

impl Answer {
    /// Tokens of all choices.
    pub(crate) fn tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.tokens.len()).sum()
    }

    /// The status that it ended with.
    pub(crate) fn status(&self) -> &Status {
        match &self.end {
            End::Failed(status) => status,
            other => panic!("the stream ended with {other:?} after {} tokens", self.tokens()),
        }
    }

    /// The answer itself, where it ended by itself.
    pub(crate) fn finished(self) -> Self {
        match &self.end {
            End::Finished => self,
            other => panic!("the stream ended with {other:?} after {} tokens", self.tokens()),
        }
    }
}

/// Sends a request and reads its whole answer.
pub(crate) async fn ask(clients: &Clients, request: &GenerateRequest) -> Answer {
    read(clients, request, |_| ControlFlow::Continue(())).await
}

/// Sends a request and reads its answer while `go_on` says so; it hears of every response. A request that is refused has
/// an answer without tokens.
pub(crate) async fn read(
    clients: &Clients,
    request: &GenerateRequest,
    go_on: impl FnMut(&GenerateResponse) -> ControlFlow<()>,
) -> Answer {
    match clients.inference.clone().generate(request.clone()).await {
        Ok(stream) => read_stream(stream.into_inner(), request, go_on).await,
        Err(status) => Reader::new(request).end(End::Failed(status)),
    }
}

/// The same for a stream whose replica may die, so that another one goes on with it.
pub(crate) async fn read_through_deaths(
    clients: &Clients,
    request: &GenerateRequest,
    go_on: impl FnMut(&GenerateResponse) -> ControlFlow<()>,
) -> Answer {
    let reader = Reader { may_move: true, ..Reader::new(request) };
    match clients.inference.clone().generate(request.clone()).await {
        Ok(stream) => reader.read(stream.into_inner(), go_on).await,
        Err(status) => reader.end(End::Failed(status)),
    }
}

/// Reads an open stream.
pub(crate) async fn read_stream(
    stream: Streaming<GenerateResponse>,
    request: &GenerateRequest,
    go_on: impl FnMut(&GenerateResponse) -> ControlFlow<()>,
) -> Answer {
    Reader::new(request).read(stream, go_on).await
}

struct Reader<'a> {
    request: &'a GenerateRequest,
    may_move: bool,
    /// Epoch and replica of the last response.
    owner: (u64, String),
    answer: Answer,
}

impl<'a> Reader<'a> {
    fn new(request: &'a GenerateRequest) -> Self {
        let choices = request.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1);
        let choices = vec![Choice::default(); choices as usize];
        let answer = Answer { choices, replica: String::new(), seed: None, end: End::Finished, ended: Instant::now() };
        Self { request, may_move: false, owner: (0, String::new()), answer }
    }

    async fn read(
        mut self,
        mut stream: Streaming<GenerateResponse>,
        mut go_on: impl FnMut(&GenerateResponse) -> ControlFlow<()>,
    ) -> Answer {
        loop {
            match stream.message().await {
                Ok(Some(response)) => {
                    let control = go_on(&response);
                    self.take(response);
                    if control.is_break() {
                        return self.end(End::Dropped);
                    }
                }
                Ok(None) => return self.end(End::Finished),
                Err(status) => return self.end(End::Failed(status)),
            }
        }
    }

    fn take(&mut self, response: GenerateResponse) {
        let told = format!("{response:?}");
        let sampling = self.request.sampling.clone().unwrap_or_default();
        let choice = self.answer.choices.get_mut(response.choice as usize).expect("a choice that was asked for");
        assert!(choice.finish.is_none(), "a response after the end of its choice: {told}");
        assert_eq!(response.index, choice.tokens.len() as u64, "a gap or a repeat: {told}");
        assert!(response.epoch == 1 || self.may_move, "nothing moved: {told}");

        let is_first = choice.responses == 0;
        choice.responses += 1;
        assert_eq!(response.seed.is_some(), is_first, "the seed comes first: {told}");
        assert_eq!(!response.request_id.is_empty(), is_first, "the request's name comes first: {told}");
        let prompt_logprobs = is_first && sampling.prompt_logprobs.is_some();
        assert_eq!(!response.prompt_logprobs.is_empty(), prompt_logprobs, "the prompt comes first: {told}");
        if is_first {
            choice.session.clone_from(&response.session_id);
            choice.prompt_logprobs = response.prompt_logprobs;
        }
        assert_eq!(response.session_id, choice.session, "a choice has one session");
        if let Some(seed) = response.seed {
            assert_eq!(*self.answer.seed.get_or_insert(seed), seed, "a request has one seed");
            assert!(sampling.seed.is_none_or(|asked| asked == seed), "another seed than asked for");
        }
        if self.answer.replica.is_empty() {
            self.answer.replica.clone_from(&response.replica);
        }
        let owner = (response.epoch, response.replica);
        assert!(owner.0 > self.owner.0 || owner == self.owner, "another replica has a later epoch: {told}");
        self.owner = owner;

        if let Some(token) = response.token_id {
            choice.tokens.push(token);
            assert_eq!(response.logprobs.is_some(), sampling.logprobs.is_some(), "logprobs as asked for: {told}");
            if let (Some(position), Some(top)) = (response.logprobs, sampling.logprobs) {
                assert_eq!(position.chosen.map(|chosen| chosen.token_id), Some(token));
                assert_eq!(position.top.len(), top as usize, "as many alternatives as asked for");
                assert!(position.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob), "in order: {told}");
                choice.logprobs.push(position);
            }
        }
        choice.text.push_str(&response.text);
        let finish = FinishReason::try_from(response.finish_reason).expect("a known reason");
        assert_eq!(response.usage.is_some(), finish != FinishReason::Unspecified, "counts come last: {told}");
        if finish != FinishReason::Unspecified {
            choice.finish = Some(finish);
            choice.usage = response.usage;
            let usage = response.usage.expect("checked above");
            assert_eq!(usage.completion, choice.tokens.len() as u64, "{told}");
            if !self.request.token_ids.is_empty() {
                assert_eq!(usage.prompt, self.request.token_ids.len() as u64, "{told}");
            }
        }
    }

    fn end(mut self, end: End) -> Answer {
        if matches!(end, End::Finished) {
            let open = self.answer.choices.iter().filter(|choice| choice.finish.is_none()).count();
            assert_eq!(open, 0, "the stream ended before {open} of its choices");
        }
        self.answer.end = end;
        self.answer.ended = Instant::now();
        self.answer
    }
}
