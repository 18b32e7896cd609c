//! What went wrong, in OpenAI's shape.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::Error;

#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// OpenAI's words: `invalid_request_error`, `rate_limit_error`, ..
    kind: &'static str,
    code: Option<&'static str>,
    /// The field of the request that is wrong.
    param: Option<String>,
    /// Seconds.
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl ToString) -> Self {
        Self {
            status,
            kind,
            message: message.to_string(),
            code: None,
            param: None,
            retry_after: None,
        }
    }

    /// A request that must be changed.
    pub fn bad(message: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// The same, and where.
    pub fn field(param: impl ToString, message: impl ToString) -> Self {
        Self {
            param: Some(param.to_string()),
            ..Self::bad(message)
        }
    }

    pub fn status(status: StatusCode, message: impl ToString) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    pub fn no_model(name: &str, known: &str) -> Self {
        Self {
            code: Some("model_not_found"),
            param: Some("model".into()),
            ..Self::status(
                StatusCode::NOT_FOUND,
                format!("no model {name:?} here: choose of {known}"),
            )
        }
    }

    pub fn unauthorized() -> Self {
        let said = "an API key is needed: send it as Authorization: Bearer KEY";
        Self {
            code: Some("invalid_api_key"),
            ..Self::status(StatusCode::UNAUTHORIZED, said)
        }
    }

    /// More than a key or the queue takes; `seconds` later it may.
    pub fn too_many(message: impl ToString, seconds: u64) -> Self {
        Self {
            code: Some("rate_limit_exceeded"),
            retry_after: Some(seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    pub fn busy(message: impl ToString) -> Self {
        Self {
            retry_after: Some(5),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message)
        }
    }

    /// Our own fault.
    pub fn bug(error: impl ToString) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "server_error", error)
    }

    /// What the engine refused or could not do.
    pub fn failed(error: Error) -> Self {
        match error {
            Error::Invalid(said) => Self::bad(said),
            error => Self::bug(error),
        }
    }

    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

/// Does what computes for long, or waits for a disk, where it holds up no other request.
///
/// # Errors
/// Those of `work`.
pub async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(ApiError::bug)?
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(status = self.status.as_u16(), "{}", self.message);
        }
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let how = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, how);
        }
        response
    }
}
