//! Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. Statuses are those of the one table of
//! kinds; only what HTTP itself refuses has others.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use perigee_proto::status::{ErrorKind, WireError};
use serde_json::{Value, json};

/// An error on its way to a client.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HttpError {
    error: Box<WireError>,
    /// Where it is not the kind's.
    status: Option<StatusCode>,
    code: Option<&'static str>,
}

impl From<WireError> for HttpError {
    fn from(error: WireError) -> Self {
        Self { error: Box::new(error), status: None, code: None }
    }
}

impl HttpError {
    /// A field of the body has a bad value.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        WireError::invalid(param, message).into()
    }

    /// The body is no JSON, or not of the right form.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        WireError::new(ErrorKind::InvalidArgument, message).into()
    }

    /// The body has too many bytes.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the body has more than {limit} bytes");
        Self { status: Some(StatusCode::PAYLOAD_TOO_LARGE), ..Self::malformed(message) }
    }

    /// The body did not come to its end in time.
    pub(crate) fn too_slow(limit: Duration) -> Self {
        let message = format!("the body did not come within {limit:?}");
        Self { status: Some(StatusCode::REQUEST_TIMEOUT), ..Self::malformed(message) }
    }

    /// Another model is asked for than is served.
    pub(crate) fn no_such_model(asked: &str, served: &str) -> Self {
        let message = format!("the model {asked:?} does not exist; {served:?} is served");
        let error = WireError { field: Some("model".to_owned()), ..WireError::new(ErrorKind::NotFound, message) };
        Self { code: Some("model_not_found"), ..error.into() }
    }

    /// The same with the parameter that clients of this API know: gRPC's fields are nested, and `prompt` is what the prompt
    /// is called here.
    pub(crate) fn with_names(mut self, prompt: &str) -> Self {
        self.error.field = self.error.field.map(|field| match field.as_str() {
            "text" | "token_ids" | "messages" => prompt.to_owned(),
            // Chat has a switch and a number.
            "sampling.logprobs" if prompt == "messages" => "top_logprobs".to_owned(),
            "grammar" => "response_format".to_owned(),
            other => other.strip_prefix("sampling.").unwrap_or(other).to_owned(),
        });
        self
    }

    /// The JSON object.
    pub(crate) fn body(&self) -> Value {
        let error = &self.error;
        let kind = match error.kind {
            ErrorKind::InvalidArgument | ErrorKind::NotFound | ErrorKind::FailedPrecondition => "invalid_request_error",
            ErrorKind::ResourceExhausted => "rate_limit_error",
            ErrorKind::DeadlineExceeded => "timeout_error",
            ErrorKind::Unauthenticated => "authentication_error",
            ErrorKind::PermissionDenied => "permission_error",
            _ => "server_error",
        };
        let message = match &error.field {
            Some(field) => format!("{field}: {}", error.message),
            None => error.message.clone(),
        };
        let code = self.code.map(str::to_owned).or_else(|| error.reason.map(str::to_lowercase));
        json!({"error": {"message": message, "type": kind, "param": error.field, "code": code}})
    }

    fn status(&self) -> StatusCode {
        let of_kind = StatusCode::from_u16(self.error.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        self.status.unwrap_or(of_kind)
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), axum::Json(self.body())).into_response();
        if let Some(delay) = self.error.retry_after {
            let seconds = delay.as_secs_f64().ceil() as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// Answers what is at no path.
pub(crate) async fn no_such_path(uri: axum::http::Uri) -> HttpError {
    WireError::new(ErrorKind::NotFound, format!("nothing is at {}", uri.path())).into()
}

/// Answers the wrong method.
pub(crate) async fn method_not_allowed(method: axum::http::Method, uri: axum::http::Uri) -> HttpError {
    let error = HttpError::malformed(format!("{} does not take {method}", uri.path()));
    HttpError { status: Some(StatusCode::METHOD_NOT_ALLOWED), ..error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_named_as_clients_know_them() {
        let told = |field: &str| HttpError::invalid(field, "no").with_names("prompt").body()["error"]["param"].clone();
        assert_eq!(told("sampling.top_p"), "top_p");
        assert_eq!(told("token_ids"), "prompt");
        assert_eq!(told("stop"), "stop");
        assert_eq!(told("sampling.logprobs"), "logprobs");
        let chat = HttpError::invalid("sampling.logprobs", "no").with_names("messages");
        assert_eq!(chat.body()["error"]["param"], "top_logprobs");
    }

    #[test]
    fn kinds_have_openais_types_and_the_tables_statuses() {
        let busy = HttpError::from(WireError::exhausted("full", Duration::from_millis(1500)));
        assert_eq!(busy.body()["error"]["type"], "rate_limit_error");
        let response = busy.into_response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()[header::RETRY_AFTER]),
            (429, &HeaderValue::from(2))
        );
        let missing = HttpError::no_such_model("a", "b");
        assert_eq!((missing.status().as_u16(), &missing.body()["error"]["code"]), (404, &json!("model_not_found")));
        let lost = HttpError::from(WireError::unavailable("REPLICA_LOST", "gone"));
        let expected = json!({"message": "gone", "type": "server_error", "param": null, "code": "replica_lost"});
        assert_eq!((lost.status().as_u16(), &lost.body()["error"]), (503, &expected));
        assert_eq!(HttpError::too_large(5).status().as_u16(), 413);
    }
}
