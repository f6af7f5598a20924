//! `perigee.v1.Inference`: from wire messages to the relay and back. It checks, encodes and names; where a request runs and
//! what its tokens are is decided behind it.

use std::sync::Arc;

use perigee_proto::ids::{RequestId, SessionId};
use perigee_proto::internal::{Abort, Submit, router_message::Body};
use perigee_proto::status::{ErrorKind, WireError};
use perigee_proto::v1::{self, inference_server::Inference};
use perigee_trace::Traced;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status};

use crate::admission::{self, Admission};
use crate::config::Limits;
use crate::error;
use crate::metrics::RouterMetrics;
use crate::model::Model;
use crate::random::Random;
use crate::relay::{NewFlight, Relay};
use crate::replicas::Replicas;
use crate::reply::Reply;
use crate::resume::{ResumeKey, Resumed};
use crate::text::Text;
use crate::trace;
use crate::validate::{self, Plan, Prompt};

/// The front door.
#[derive(Clone)]
pub(crate) struct InferenceService {
    pub(crate) relay: Arc<Relay>,
    pub(crate) replicas: Arc<Replicas>,
    pub(crate) admission: Admission,
    pub(crate) text: Text,
    pub(crate) limits: Arc<Limits>,
    pub(crate) metrics: RouterMetrics,
    pub(crate) random: Random,
    pub(crate) resume_key: ResumeKey,
}

/// Whether a request outlives its router.
pub(crate) enum Lasting {
    /// It does not.
    No,
    /// It does, and begins here.
    Begins,
    /// It does, and goes on here.
    GoesOn(Resumed),
}

impl InferenceService {
    pub(crate) fn model(&self) -> Result<Arc<Model>, WireError> {
        self.replicas.model().ok_or_else(error::no_replica)
    }

    /// Encodes, names and starts what a plan asks for. `check` makes the plan once it is known what is served.
    pub(crate) async fn start(
        &self,
        traced: &Traced,
        deadline: Option<Instant>,
        prompt_logprobs: Option<u64>,
        check: impl FnOnce(&Model) -> Result<Plan, WireError>,
    ) -> Result<Reply, WireError> {
        let check = |model: &Model| Ok((check(model)?, Lasting::No));
        self.start_lasting(traced, deadline, prompt_logprobs, check).await
    }

    /// The same for requests that may outlive their router.
    async fn start_lasting(
        &self,
        traced: &Traced,
        deadline: Option<Instant>,
        prompt_logprobs: Option<u64>,
        check: impl FnOnce(&Model) -> Result<(Plan, Lasting), WireError>,
    ) -> Result<Reply, WireError> {
        let started = self.try_start(traced, deadline, prompt_logprobs, check).await;
        if let Err(error) = &started {
            trace::note_failure(traced, error);
        }
        started
    }

    async fn try_start(
        &self,
        traced: &Traced,
        deadline: Option<Instant>,
        prompt_logprobs: Option<u64>,
        check: impl FnOnce(&Model) -> Result<(Plan, Lasting), WireError>,
    ) -> Result<Reply, WireError> {
        let arrived = Instant::now();
        let model = self.model()?;
        let (mut plan, lasting) = check(&model)?;
        let place = self.admission.enter()?;
        let seed = match plan.seed {
            Some(seed) => seed,
            None => self.random.next()?,
        };
        let request_id = match plan.request_id.take() {
            Some(name) => name,
            None => RequestId::from_random(self.random.next()?),
        };
        let mut sessions = Vec::new();
        for _ in 0..plan.choices {
            sessions.push(SessionId::from_random(self.random.next()?, self.random.next()?).to_string());
        }
        let encoding = self.encode(&mut plan.prompt);
        let prompt = match deadline {
            Some(deadline) => {
                let in_time = tokio::time::timeout_at(deadline, encoding).await;
                in_time.map_err(|_| error::deadline_exceeded())??
            }
            None => encoding.await?,
        };
        let submit = plan.submission(prompt, seed, &model, prompt_logprobs)?;
        self.metrics.prompt_tokens.inc_by(submit.prompt.len() as u64);
        let submit = Submit { request_id: request_id.to_string(), sessions, ..submit };
        traced.span().record("request_id", &submit.request_id);
        let (key, resumed) = match lasting {
            Lasting::No => (None, None),
            Lasting::Begins => (Some(self.resume_key.clone()), None),
            Lasting::GoesOn(resumed) => {
                resumed.check(&submit, submit.sessions.len())?;
                (Some(self.resume_key.clone()), Some(resumed))
            }
        };
        self.relay.start(NewFlight { submit, arrived, deadline, place, traced: traced.clone(), resumed, key })
    }

    /// The tokens of a prompt, which is taken out of its place.
    async fn encode(&self, prompt: &mut Prompt) -> Result<Vec<u32>, WireError> {
        match prompt {
            Prompt::Text(text, special) => self.text.encode("text", std::mem::take(text), *special).await,
            Prompt::Chat(input) => self.text.encode_chat(std::mem::take(&mut **input), self.limits.text_bytes).await,
            Prompt::Tokens(tokens) => Ok(std::mem::take(tokens)),
        }
    }

    /// The text of tokens that a client sent in `field`.
    pub(crate) async fn decode(&self, field: &'static str, tokens: Vec<u32>) -> Result<String, WireError> {
        let _place = self.admission.enter()?;
        let model = self.model()?;
        if tokens.len() as u64 > u64::from(model.max_len) {
            let message = format!("there are {}, but at most {} are taken", tokens.len(), model.max_len);
            return Err(WireError::invalid(field, message));
        }
        validate::token_ids(field, &tokens, &model)?;
        self.text.decode(field, tokens).await
    }

    /// Ends sessions that other routers hold, by asking all replicas who runs them.
    async fn abort_elsewhere(&self, request_id: Option<&str>, session_id: Option<&str>) -> Vec<String> {
        let mut told = Vec::new();
        for attachment in self.replicas.attachments("").unwrap_or_default() {
            let Ok(sessions) = attachment.list_sessions().await else { continue };
            let wanted = sessions.into_iter().filter(|session| {
                session_id.is_some_and(|id| id == session.session)
                    || request_id.is_some_and(|id| id == session.request_id)
            });
            let wanted: Vec<String> = wanted.map(|session| session.session).collect();
            if !wanted.is_empty() && attachment.send(Body::Abort(Abort { sessions: wanted.clone(), epoch: 0 })).is_ok()
            {
                told.extend(wanted);
            }
        }
        told
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = Reply;
    type ResumeStream = Reply;

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Reply>, Status> {
        let (metadata, _, message) = request.into_parts();
        let limit = Some(self.limits.prompt_logprobs);
        let deadline = admission::deadline(&metadata)?;
        let traced = trace::of_call("perigee.v1.Inference/Generate", &metadata);
        let lasting = if message.resumable { Lasting::Begins } else { Lasting::No };
        let check = |model: &Model| Ok((validate::generate(message, model, &self.limits)?, lasting));
        Ok(Response::new(self.start_lasting(&traced, deadline, limit, check).await?))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Result<Response<Reply>, Status> {
        let (metadata, _, message) = request.into_parts();
        let v1::ResumeRequest { request, resume_token, received } = message;
        let traced = trace::of_call("perigee.v1.Inference/Resume", &metadata);
        let deadline = admission::deadline(&metadata)?;
        let mut request = request.ok_or_else(|| WireError::invalid("request", "it must be there"))?;
        let point = self.resume_key.open(&resume_token)?;
        // What the lost router chose where the request left it open.
        if request.request_id.is_empty() {
            request.request_id.clone_from(&point.request_id);
        }
        request.sampling.get_or_insert_default().seed.get_or_insert(point.seed);
        let check = |model: &Model| {
            let plan = validate::generate(request, model, &self.limits)?;
            Ok((plan, Lasting::GoesOn(Resumed::new(point, received, model)?)))
        };
        Ok(Response::new(self.start_lasting(&traced, deadline, Some(self.limits.prompt_logprobs), check).await?))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let tokens = message.token_ids.len();
        let deadline = admission::deadline(&metadata)?;
        let traced = trace::of_call("perigee.v1.Inference/Score", &metadata);
        let check = |model: &Model| validate::score(message, model, &self.limits);
        let mut reply = self.start(&traced, deadline, None, check).await?;
        let mut answer = v1::ScoreResponse::default();
        while let Some(response) = reply.next().await {
            let response = response?;
            if !response.prompt_logprobs.is_empty() {
                let chosen = response.prompt_logprobs.iter().filter_map(|position| position.chosen);
                answer.logprobs = chosen.map(|chosen| chosen.logprob).collect();
            }
            if let Some(usage) = response.usage {
                // The one token that was drawn is no part of the answer.
                answer.usage = Some(v1::Usage { completion: 0, ..usage });
            }
            answer.replica = response.replica;
        }
        if answer.logprobs.len() + 1 != tokens {
            let message =
                format!("replica {} gave {} scores for {tokens} tokens", answer.replica, answer.logprobs.len());
            return Err(WireError::new(ErrorKind::Internal, message).into());
        }
        Ok(Response::new(answer))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let v1::AbortRequest { request_id, session_id } = request.into_inner();
        let (request_id, session_id) = (request_id.as_deref(), session_id.as_deref());
        if let Some(id) = request_id.filter(|_| session_id.is_none()) {
            RequestId::parse(id).map_err(|error| WireError::invalid("request_id", error.to_string()))?;
        } else if let Some(id) = session_id.filter(|_| request_id.is_none()) {
            SessionId::parse(id).map_err(|error| WireError::invalid("session_id", error.to_string()))?;
        } else {
            return Err(WireError::invalid("request_id", "give exactly one of request_id and session_id").into());
        }
        let mut told = self.relay.abort(|flight, session| {
            session_id.is_some_and(|id| id == session) || request_id.is_some_and(|id| id == flight.request_id())
        });
        if told.is_empty() {
            told = self.abort_elsewhere(request_id, session_id).await;
        }
        if told.is_empty() {
            return Err(WireError::new(ErrorKind::NotFound, "nothing of that name runs").into());
        }
        Ok(Response::new(v1::AbortResponse { session_ids: told }))
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        let _place = self.admission.enter()?;
        let v1::TokenizeRequest { text, parse_special } = request.into_inner();
        validate::text_length("text", &text, &self.limits)?;
        let token_ids = self.text.encode("text", text, validate::special_tokens(parse_special)).await?;
        Ok(Response::new(v1::TokenizeResponse { token_ids }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let text = self.decode("token_ids", request.into_inner().token_ids).await?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_model_info(
        &self,
        _request: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let model = self.model()?;
        Ok(Response::new(model.describe(self.text.is_there(), &self.limits)))
    }
}
