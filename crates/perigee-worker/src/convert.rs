//! Between the wire and the engine's plain types, both ways. Values are checked for shape only; what they mean is checked
//! at the engine's door.

use std::time::{Duration, Instant};

use perigee_engine::moves::TakeOver;
use perigee_engine::request::{
    EventBatch, FinishReason, Load, PositionLogprobs, RefusedRequest, Request, SessionEvent, SessionId, SessionInfo,
    StopRule, TokenLogprob,
};
use perigee_proto::internal::{self, replica_message::Body};
use perigee_sampling::SamplingParams;
use perigee_text::grammar::GrammarSource;

use crate::move_report;

/// A deadline ten years away is none; adding one might leave what the clock can tell.
const FAR_MS: u64 = 10 * 365 * 24 * 3_600_000;

/// A submitted request, received at `now`.
///
/// # Errors
/// [`RefusedRequest::Invalid`] where a message cannot have come from a router of this version.
pub(crate) fn request(submit: internal::Submit, now: Instant) -> Result<Request, RefusedRequest> {
    let sampling = submit.sampling.ok_or_else(|| invalid("sampling", "is missing"))?;
    if sampling.bias_ids.len() != sampling.bias_values.len() {
        return Err(invalid("sampling.logit_bias", "has ids and values of different number"));
    }
    let deadline = deadline(submit.deadline_ms, now);
    Ok(Request {
        request_id: submit.request_id,
        sessions: submit.sessions.into_iter().map(SessionId).collect(),
        first_choice: submit.first_choice,
        epoch: submit.epoch,
        prompt: submit.prompt,
        delivered: submit.delivered,
        sampling: SamplingParams {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.bias_ids.into_iter().zip(sampling.bias_values).collect(),
            seed: sampling.seed,
            logprobs: sampling.logprobs,
            prompt_logprobs: submit.prompt_logprobs,
        },
        stop: StopRule {
            max_tokens: submit.max_tokens,
            min_tokens: submit.min_tokens,
            ignore_eos: submit.ignore_eos,
            stop_token_ids: submit.stop_token_ids,
            stop: submit.stop,
        },
        prompt_logprobs: submit.prompt_logprobs,
        priority: submit.priority,
        deadline,
        cache_salt: submit.cache_salt,
        text: submit.text,
        // Made where that holds nobody up.
        grammar: None,
        resumable: submit.resumable,
        trace: submit.traceparent.parse().ok(),
    })
}

/// When a client stops waiting. One so far away that the clock cannot tell it is none.
fn deadline(left_ms: Option<u64>, now: Instant) -> Option<Instant> {
    left_ms.filter(|left| *left < FAR_MS).and_then(|left| now.checked_add(Duration::from_millis(left)))
}

/// A router's word that a session's client has turned to it.
pub(crate) fn take_over(order: internal::TakeOver, now: Instant) -> TakeOver {
    let internal::TakeOver { session, epoch, first, next, deadline_ms } = order;
    TakeOver { session: SessionId(session), epoch, first, next, deadline: deadline(deadline_ms, now) }
}

/// What a submitted request's text must be.
///
/// # Errors
/// [`RefusedRequest::Invalid`] for a grammar without a source.
pub(crate) fn grammar_source(grammar: internal::Grammar) -> Result<GrammarSource, RefusedRequest> {
    use internal::grammar::Source;
    match grammar.source {
        Some(Source::JsonSchema(schema)) => Ok(GrammarSource::JsonSchema(schema)),
        Some(Source::Regex(expression)) => Ok(GrammarSource::Regex(expression)),
        Some(Source::Lark(grammar)) => Ok(GrammarSource::Lark(grammar)),
        None => Err(invalid("grammar", "has no source")),
    }
}

fn invalid(field: &'static str, message: &str) -> RefusedRequest {
    RefusedRequest::Invalid { field, message: message.to_owned() }
}

/// Why a request does not run here.
pub(crate) fn refused(sessions: Vec<String>, refused: RefusedRequest) -> internal::Refused {
    let message = refused.to_string();
    let (reason, field, message) = match refused {
        RefusedRequest::Invalid { field, message } => (internal::RefusedReason::Invalid, public_field(field), message),
        RefusedRequest::Full { .. } => (internal::RefusedReason::Full, String::new(), message),
        RefusedRequest::Unavailable(_) => (internal::RefusedReason::Unavailable, String::new(), message),
    };
    internal::Refused { sessions, reason: reason.into(), field, message }
}

/// A field's name as clients know it: the engine names sampling parameters without the message that holds them.
fn public_field(field: &str) -> String {
    match field {
        "token_ids" | "text" | "grammar" | "stop" | "max_tokens" | "priority" | "cache_salt" | "delivered"
        | "sampling" => field.to_owned(),
        inner if inner.starts_with("sampling.") => inner.to_owned(),
        inner => format!("sampling.{inner}"),
    }
}

/// What one step did, for one router: its events, with the reports on moves at their places among them. The load comes
/// last.
pub(crate) fn messages(batch: EventBatch, draining: bool) -> Vec<Body> {
    let mut messages = Vec::with_capacity(1 + 2 * batch.reports.len());
    let mut events = batch.events.into_iter().map(event);
    let mut said = 0;
    for reported in batch.reports {
        let before: Vec<_> = events.by_ref().take(reported.before.saturating_sub(said)).collect();
        said += before.len();
        if !before.is_empty() {
            messages.push(Body::Batch(internal::EventBatch { events: before, ..internal::EventBatch::default() }));
        }
        messages.push(Body::MoveReport(move_report::report(reported)));
    }
    let load = Some(load(batch.load, draining));
    messages.push(Body::Batch(internal::EventBatch { events: events.collect(), load, clock: 0 }));
    messages
}

/// How busy the replica is.
pub(crate) fn load(load: Load, draining: bool) -> internal::Load {
    internal::Load {
        running: load.running,
        waiting: load.waiting,
        queued_tokens: load.queued_tokens,
        slots_free: load.slots_free,
        slots_total: load.slots_total,
        pages_free: load.pages_free,
        pages_total: load.pages_total,
        parked: load.parked,
        step_ms: load.step_ms,
        steps: load.steps,
        homes: load.homes,
        context_tokens: load.context_tokens,
        draining,
        // Known beside the engine; set where the batch is sent.
        decode_ms: 0.0,
        prompt_token_ms: 0.0,
    }
}

fn event(event: SessionEvent) -> internal::SessionEvent {
    let finish = match event.finish {
        None => internal::Finish::Unspecified,
        Some(FinishReason::Stop) => internal::Finish::Stop,
        Some(FinishReason::Length) => internal::Finish::Length,
        Some(FinishReason::Aborted) => internal::Finish::Aborted,
        Some(FinishReason::DeadlineExceeded) => internal::Finish::Deadline,
        Some(FinishReason::Error) => internal::Finish::Error,
    };
    internal::SessionEvent {
        session: event.session.0,
        epoch: event.epoch,
        choice: event.choice,
        index: event.index,
        token: event.token,
        text: event.text,
        logprobs: event.logprobs.map(|logprobs| Box::new(position(logprobs))),
        prompt_logprobs: event
            .prompt_logprobs
            .into_iter()
            .flatten()
            .map(|entry| entry.map(position).unwrap_or_default())
            .collect(),
        finish: finish.into(),
        error: event.error.unwrap_or_default(),
        usage: event.usage.map(|usage| {
            Box::new(internal::Counts { prompt: usage.prompt, completion: usage.completion, cached: usage.cached })
        }),
    }
}

fn position(position: PositionLogprobs) -> internal::Position {
    let entries = || std::iter::once(&position.chosen).chain(&position.top);
    internal::Position {
        has_chosen: true,
        ids: entries().map(|entry: &TokenLogprob| entry.token).collect(),
        logprobs: entries().map(|entry| entry.logprob).collect(),
    }
}

/// A session as operators see it.
pub(crate) fn session(info: SessionInfo) -> internal::Session {
    // An empty home is the replica that answers.
    let segments = info.segments.into_iter().map(|segment| internal::Segment {
        home: segment.home,
        incarnation: segment.incarnation,
        first: segment.first,
        tokens: segment.tokens,
    });
    internal::Session {
        session: info.session.0,
        request_id: info.request_id,
        epoch: info.epoch,
        status: info.status.to_owned(),
        context: info.context,
        segments: segments.collect(),
    }
}

#[cfg(test)]
mod tests {
    use perigee_engine::request::Usage;

    use super::*;

    fn submit() -> internal::Submit {
        internal::Submit {
            request_id: "r".to_owned(),
            sessions: vec!["a".to_owned(), "b".to_owned()],
            epoch: 3,
            prompt: vec![1, 2],
            sampling: Some(internal::Sampling {
                temperature: 0.5,
                bias_ids: vec![7, 9],
                bias_values: vec![1.0, -1.0],
                seed: 11,
                logprobs: Some(2),
                ..internal::Sampling::default()
            }),
            max_tokens: 5,
            min_tokens: 1,
            ignore_eos: true,
            stop_token_ids: vec![4],
            stop: vec!["x".to_owned()],
            prompt_logprobs: Some(1),
            priority: -2,
            deadline_ms: Some(1500),
            cache_salt: "salt".to_owned(),
            text: true,
            first_choice: 6,
            delivered: vec![],
            grammar: None,
            resumable: true,
            traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned(),
        }
    }

    #[test]
    fn a_request_keeps_every_field() {
        let now = Instant::now();
        let request = request(submit(), now).expect("well formed");
        assert_eq!(request.sessions, [SessionId("a".to_owned()), SessionId("b".to_owned())]);
        assert_eq!((request.epoch, request.first_choice, request.priority), (3, 6, -2));
        assert_eq!((request.prompt, request.cache_salt.as_str(), request.text), (vec![1, 2], "salt", true));
        assert_eq!(request.deadline, Some(now + Duration::from_millis(1500)));
        assert_eq!((request.sampling.seed, request.sampling.logprobs), (11, Some(2)));
        assert_eq!(request.trace.map(|trace| trace.to_string()), Some(submit().traceparent));
        assert_eq!(request.sampling.logit_bias, [(7, 1.0), (9, -1.0)]);
        assert_eq!((request.prompt_logprobs, request.sampling.prompt_logprobs), (Some(1), Some(1)));
        let stop = StopRule {
            max_tokens: 5,
            min_tokens: 1,
            ignore_eos: true,
            stop_token_ids: vec![4],
            stop: vec!["x".to_owned()],
        };
        assert_eq!(request.stop, stop);
    }

    #[test]
    fn malformed_messages_are_refused_and_far_deadlines_are_none() {
        let now = Instant::now();
        let without = internal::Submit { sampling: None, ..submit() };
        assert!(matches!(request(without, now), Err(RefusedRequest::Invalid { field: "sampling", .. })));
        let mut uneven = submit();
        uneven.sampling.as_mut().expect("set").bias_values.pop();
        assert!(matches!(request(uneven, now), Err(RefusedRequest::Invalid { field: "sampling.logit_bias", .. })));
        let endless = internal::Submit { deadline_ms: Some(u64::MAX), ..submit() };
        assert_eq!(request(endless, now).expect("well formed").deadline, None);
    }

    #[test]
    fn refusals_name_fields_as_clients_know_them() {
        for (field, public) in [("n", "sampling.n"), ("top_p", "sampling.top_p"), ("max_tokens", "max_tokens")] {
            let refusal = RefusedRequest::Invalid { field, message: "m".to_owned() };
            let wire = refused(vec!["s".to_owned()], refusal);
            assert_eq!((wire.field.as_str(), wire.reason()), (public, internal::RefusedReason::Invalid));
        }
        let full = refused(vec![], RefusedRequest::Full { waiting: 3, limit: 3 });
        assert_eq!(full.reason(), internal::RefusedReason::Full);
        assert!(full.message.contains('3'), "{}", full.message);
    }

    #[test]
    fn reports_keep_their_places_among_the_events() {
        let said = |before, epoch| perigee_engine::moves::Reported {
            before,
            session: SessionId("a".to_owned()),
            report: perigee_migration::epochs::Report { epoch, phase: perigee_migration::epochs::Phase::Ready },
            message: String::new(),
            facts: None,
        };
        let token = |index| SessionEvent {
            session: SessionId("a".to_owned()),
            epoch: 1,
            choice: 0,
            index,
            token: Some(7),
            text: String::new(),
            logprobs: None,
            prompt_logprobs: None,
            finish: None,
            error: None,
            usage: None,
        };
        let order = |events: u64, reports| {
            let events = (0..events).map(token).collect();
            let batch = EventBatch { events, reports, load: Load { steps: 5, ..Load::default() } };
            let told = |body: &Body| match body {
                Body::Batch(batch) => {
                    let indices: Vec<String> = batch.events.iter().map(|event| event.index.to_string()).collect();
                    let load = batch.load.map_or("", |load| if load.steps == 5 { " load" } else { " other load" });
                    format!("[{}{load}]", indices.join(" "))
                }
                Body::MoveReport(report) => format!("report {}", report.epoch),
                other => format!("{other:?}"),
            };
            messages(batch, false).iter().map(told).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(order(2, vec![]), "[0 1 load]");
        assert_eq!(order(0, vec![said(0, 3)]), "report 3, [ load]");
        assert_eq!(order(3, vec![said(0, 3), said(2, 4), said(2, 5)]), "report 3, [0 1], report 4, report 5, [2 load]");
        assert_eq!(order(2, vec![said(2, 3)]), "[0 1], report 3, [ load]");
    }

    #[test]
    fn events_carry_logprobs_and_ends() {
        let chosen = TokenLogprob { token: 5, logprob: -0.25 };
        let other = TokenLogprob { token: 6, logprob: -2.0 };
        let at = PositionLogprobs { chosen, top: vec![chosen, other] };
        let wire = event(SessionEvent {
            session: SessionId("a".to_owned()),
            epoch: 2,
            choice: 1,
            index: 4,
            token: Some(5),
            text: "t".to_owned(),
            logprobs: Some(at.clone()),
            prompt_logprobs: Some(vec![None, Some(at)]),
            finish: Some(FinishReason::Length),
            error: None,
            usage: Some(Usage { prompt: 2, completion: 5, cached: 1 }),
        });
        let expected = internal::Position { has_chosen: true, ids: vec![5, 5, 6], logprobs: vec![-0.25, -0.25, -2.0] };
        assert_eq!(wire.logprobs.as_deref(), Some(&expected));
        assert_eq!(wire.prompt_logprobs, [internal::Position::default(), expected]);
        assert_eq!((wire.finish(), wire.index, wire.epoch), (internal::Finish::Length, 4, 2));
        assert_eq!(wire.usage.as_deref(), Some(&internal::Counts { prompt: 2, completion: 5, cached: 1 }));
    }
}
