//! The one table from error kinds to gRPC codes and HTTP statuses, and errors as they cross the wire: a kind, a message,
//! and the structured details of google.rpc. Whether to retry is decided by kind, never by message.

use std::{collections::BTreeMap, collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of the google.rpc.ErrorInfo that errors carry.
pub const ERROR_DOMAIN: &str = "perigee";

/// What kind of thing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A field of the request has a bad value.
    InvalidArgument,
    /// Nothing of that name exists.
    NotFound,
    /// Too much work, or too large a message.
    ResourceExhausted,
    /// The cluster lacks something that the call needs.
    FailedPrecondition,
    /// A session moved on: another owner or epoch.
    Aborted,
    /// Nobody can answer just now.
    Unavailable,
    /// The client's deadline passed.
    DeadlineExceeded,
    /// This version does not offer the call.
    Unimplemented,
    /// The client went away, or asked for the end.
    Cancelled,
    /// The caller did not say who it is.
    Unauthenticated,
    /// The caller may not do that.
    PermissionDenied,
    /// A fault of the program.
    Internal,
}

/// Kind, gRPC code, HTTP status, and whether the same call may succeed later or elsewhere.
const TABLE: [(ErrorKind, Code, u16, bool); 12] = [
    (ErrorKind::InvalidArgument, Code::InvalidArgument, 400, false),
    (ErrorKind::NotFound, Code::NotFound, 404, false),
    (ErrorKind::ResourceExhausted, Code::ResourceExhausted, 429, true),
    (ErrorKind::FailedPrecondition, Code::FailedPrecondition, 412, false),
    (ErrorKind::Aborted, Code::Aborted, 409, false),
    (ErrorKind::Unavailable, Code::Unavailable, 503, true),
    (ErrorKind::DeadlineExceeded, Code::DeadlineExceeded, 504, false),
    (ErrorKind::Unimplemented, Code::Unimplemented, 501, false),
    (ErrorKind::Cancelled, Code::Cancelled, 499, false),
    (ErrorKind::Unauthenticated, Code::Unauthenticated, 401, false),
    (ErrorKind::PermissionDenied, Code::PermissionDenied, 403, false),
    (ErrorKind::Internal, Code::Internal, 500, false),
];

impl ErrorKind {
    /// Every kind, in the order of the table.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> (Code, u16, bool) {
        TABLE.iter().find(|row| row.0 == self).map_or((Code::Internal, 500, false), |row| (row.1, row.2, row.3))
    }

    /// Its gRPC code.
    pub fn grpc_code(self) -> Code {
        self.row().0
    }

    /// Its HTTP status.
    pub fn http_status(self) -> u16 {
        self.row().1
    }

    /// Whether the same call may succeed later or elsewhere.
    pub fn is_retryable(self) -> bool {
        self.row().2
    }

    /// The kind of a code that came over the wire; codes that Perigee never sends count as `Internal`.
    pub fn from_grpc_code(code: Code) -> Self {
        TABLE.iter().find(|row| row.1 == code).map_or(Self::Internal, |row| row.0)
    }
}

/// An error as it crosses the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What kind of thing went wrong.
    pub kind: ErrorKind,
    /// What went wrong, where, and what to do about it.
    pub message: String,
    /// The field at fault, where the kind is `InvalidArgument`; travels as google.rpc.BadRequest.
    pub field: Option<String>,
    /// When to try again; travels as google.rpc.RetryInfo.
    pub retry_after: Option<Duration>,
    /// Why, in a word that programs can read, such as `REPLICA_LOST`; travels as google.rpc.ErrorInfo.
    pub reason: Option<&'static str>,
    /// Facts for programs, such as `owner` and `epoch`; travel in the same google.rpc.ErrorInfo.
    pub facts: BTreeMap<&'static str, String>,
}

impl WireError {
    /// An error without details.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), field: None, retry_after: None, reason: None, facts: BTreeMap::new() }
    }

    /// A field of the request has a bad value; `message` says what would do.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(ErrorKind::InvalidArgument, message) }
    }

    /// Too much work; trying again after a while may help.
    pub fn exhausted(message: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(ErrorKind::ResourceExhausted, message) }
    }

    /// Nobody can answer just now; `reason` says why in a word.
    pub fn unavailable(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason: Some(reason), ..Self::new(ErrorKind::Unavailable, message) }
    }

    /// The same with a fact for programs.
    pub fn with_fact(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.facts.insert(name, value.into());
        self
    }
}

impl From<WireError> for Status {
    fn from(error: WireError) -> Self {
        let mut details = ErrorDetails::new();
        if let Some(field) = &error.field {
            details.add_bad_request_violation(field.as_str(), error.message.as_str());
        }
        if let Some(delay) = error.retry_after {
            details.set_retry_info(Some(delay));
        }
        if error.reason.is_some() || !error.facts.is_empty() {
            let facts: HashMap<String, String> =
                error.facts.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
            details.set_error_info(error.reason.unwrap_or_default(), ERROR_DOMAIN, facts);
        }
        let message = match &error.field {
            Some(field) => format!("{field}: {}", error.message),
            None => error.message,
        };
        Status::with_error_details(error.kind.grpc_code(), message, details)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_kind_has_its_own_code_and_status() {
        let kinds: Vec<ErrorKind> = ErrorKind::all().collect();
        let codes: HashSet<i32> = kinds.iter().map(|kind| kind.grpc_code() as i32).collect();
        let statuses: HashSet<u16> = kinds.iter().map(|kind| kind.http_status()).collect();
        assert_eq!(codes.len(), kinds.len());
        assert_eq!(statuses.len(), kinds.len());
        for kind in kinds {
            assert_eq!(ErrorKind::from_grpc_code(kind.grpc_code()), kind);
        }
        assert_eq!(ErrorKind::from_grpc_code(Code::DataLoss), ErrorKind::Internal);
    }

    #[test]
    fn only_busy_and_unavailable_are_worth_trying_again() {
        let retryable: Vec<ErrorKind> = ErrorKind::all().filter(|kind| kind.is_retryable()).collect();
        assert_eq!(retryable, [ErrorKind::ResourceExhausted, ErrorKind::Unavailable]);
    }

    #[test]
    fn an_invalid_field_travels_as_a_field_violation() {
        let status = Status::from(WireError::invalid("sampling.top_p", "1.5 is not in (0, 1]"));
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "sampling.top_p: 1.5 is not in (0, 1]");
        let details = status.get_error_details();
        let violations = &details.bad_request().expect("BadRequest in the details").field_violations;
        assert_eq!(violations.len(), 1);
        assert_eq!(violations[0].field, "sampling.top_p");
        assert_eq!(violations[0].description, "1.5 is not in (0, 1]");
    }

    #[test]
    fn a_busy_answer_says_when_to_come_back() {
        let status = Status::from(WireError::exhausted("full", Duration::from_millis(1500)));
        assert_eq!(status.code(), Code::ResourceExhausted);
        let delay = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
        assert_eq!(delay, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn facts_travel_for_programs() {
        let error = WireError { reason: Some("STALE_EPOCH"), ..WireError::new(ErrorKind::Aborted, "moved") }
            .with_fact("owner", "replica-1")
            .with_fact("epoch", "7");
        let status = Status::from(error);
        let details = status.get_error_details();
        let info = details.error_info().expect("ErrorInfo in the details");
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("STALE_EPOCH", ERROR_DOMAIN));
        assert_eq!(info.metadata.get("owner").map(String::as_str), Some("replica-1"));
        assert_eq!(info.metadata.get("epoch").map(String::as_str), Some("7"));
    }
}
