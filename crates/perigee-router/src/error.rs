//! Why a router cannot start or go on, and the errors that its clients see. Each has a kind; the table from kinds to codes
//! is perigee-proto's.

use std::time::Duration;

use perigee_proto::standard::ReflectionError;
use perigee_proto::status::{ErrorKind, WireError};
use perigee_telemetry::MetricsError;
use perigee_text::TextError;

use crate::transit::Trouble;

/// A router that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// Bad settings, one a line.
    #[error("{0}")]
    Config(String),
    /// Metrics cannot be registered.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The descriptors for reflection do not load.
    #[error(transparent)]
    Reflection(#[from] ReflectionError),
    /// The system gives no random numbers.
    #[error("random numbers: {0}")]
    Random(String),
}

/// The router takes no more requests.
pub(crate) fn closing() -> WireError {
    WireError::unavailable("ROUTER_DRAINING", "this router is about to end: repeat the request at another one")
}

/// No replica can take requests.
pub(crate) fn no_replica() -> WireError {
    WireError::unavailable("NO_REPLICA", "no replica is ready: wait until one is, or see `perigee replicas`")
}

/// A replica's stream broke, or it was silent for its lease.
pub(crate) fn replica_lost(replica: &str, why: &str) -> WireError {
    WireError::unavailable("REPLICA_LOST", format!("replica {replica} was lost ({why}): repeat the request"))
        .with_fact("replica", replica)
}

/// The engine of a replica failed under a session.
pub(crate) fn engine_failed(replica: &str, message: &str) -> WireError {
    WireError::unavailable("ENGINE_FAILED", format!("replica {replica} failed ({message}): repeat the request"))
        .with_fact("replica", replica)
}

/// A replica broke the rule that indices follow each other.
pub(crate) fn event_gap(replica: &str, expected: u64, found: u64) -> WireError {
    let message = format!("replica {replica} sent index {found} where {expected} was due: repeat the request");
    WireError::unavailable("EVENT_GAP", message).with_fact("replica", replica)
}

/// Nobody took over a session whose owner was lost for `cause`.
pub(crate) fn nobody_took_over(cause: &WireError, waited: Duration) -> WireError {
    let message = format!("{}; nobody took the session over within {waited:?}", cause.message);
    WireError { message, ..cause.clone() }
}

/// A move that did not come about: `what` became of its session, and where that is now.
pub(crate) fn move_failed(what: &str, trouble: &Trouble, session: &str, owner: &str, epoch: u64) -> WireError {
    let at = if owner.is_empty() { "nowhere yet".to_owned() } else { format!("on {owner}") };
    let message = format!("{session} {what} ({at}, epoch {epoch}): {}", trouble.message);
    aborted("MOVE_FAILED", message, owner, epoch).with_fact("cause", trouble.cause)
}

/// A session is being moved already.
pub(crate) fn moving(session: &str, owner: &str, epoch: u64) -> WireError {
    aborted("MOVING", format!("{session} is being moved already: try again once it has arrived"), owner, epoch)
}

fn aborted(reason: &'static str, message: String, owner: &str, epoch: u64) -> WireError {
    let error = WireError { reason: Some(reason), ..WireError::new(ErrorKind::Aborted, message) };
    error.with_fact("owner", owner).with_fact("epoch", epoch.to_string())
}

/// A session that cannot be moved as things are; `reason` says why in a word.
pub(crate) fn cannot_move(reason: &'static str, message: impl Into<String>) -> WireError {
    WireError { reason: Some(reason), ..WireError::new(ErrorKind::FailedPrecondition, message) }
}

/// A replica drains, and a session did not come away from it as it is.
pub(crate) fn left_behind(replica: &str) -> WireError {
    WireError::unavailable("REPLICA_DRAINING", format!("replica {replica} is about to end: repeat the request"))
        .with_fact("replica", replica)
}

/// A replica that cannot be drained as things are; `reason` says why in a word.
pub(crate) fn cannot_drain(reason: &'static str, message: impl Into<String>) -> WireError {
    WireError { reason: Some(reason), ..WireError::new(ErrorKind::FailedPrecondition, message) }
}

/// No replica of that name.
pub(crate) fn unknown_replica(replica: &str) -> WireError {
    WireError::new(ErrorKind::NotFound, format!("no replica {replica:?} is known: see `perigee replicas`"))
}

/// The client's deadline passed.
pub(crate) fn deadline_exceeded() -> WireError {
    WireError::new(ErrorKind::DeadlineExceeded, "the deadline passed; the request was aborted")
}

/// A reader that is slower than the model for too long.
pub(crate) fn slow_reader(limit_bytes: usize) -> WireError {
    let message = format!("more than {limit_bytes} bytes of tokens wait to be read; the request was aborted");
    WireError { reason: Some("SLOW_READER"), ..WireError::new(ErrorKind::ResourceExhausted, message) }
}

/// Too many requests on this router.
pub(crate) fn router_full(limit: usize) -> WireError {
    WireError::exhausted(format!("{limit} requests run on this router already"), Duration::from_secs(1))
}

/// Text was given or asked for without a tokenizer.
pub(crate) fn no_tokenizer(field: &str) -> WireError {
    let message = format!(
        "{field} needs a tokenizer, and there is none: send token_ids, or add tokenizer.json or tiktoken.model"
    );
    WireError { reason: Some("NO_TOKENIZER"), ..WireError::new(ErrorKind::FailedPrecondition, message) }
}

/// A conversation was given without a template.
pub(crate) fn no_template() -> WireError {
    let message = "messages need a chat template, and this model has none: add chat_template.jinja, or send a prompt";
    WireError { reason: Some("NO_TEMPLATE"), ..WireError::new(ErrorKind::FailedPrecondition, message) }
}

/// A tokenizer refused what a client sent in `field`.
pub(crate) fn text_refused(field: &str, error: &TextError) -> WireError {
    match error {
        TextError::NoTokenizer { .. } => no_tokenizer(field),
        TextError::Encode { .. }
        | TextError::Decode { .. }
        | TextError::SpecialInText { .. }
        | TextError::Template { .. } => WireError::invalid(field, error.to_string()),
        TextError::Read { .. }
        | TextError::Malformed { .. }
        | TextError::StateMismatch
        | TextError::VocabularyTooSmall { .. }
        | TextError::SpecialIdOutOfRange { .. } => WireError::new(ErrorKind::Internal, error.to_string()),
    }
}
