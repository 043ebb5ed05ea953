//! Errors as they go over the wire: `{"error":{"code","message","type"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mneme_engine::scheduler::{Failure, Refused};
use serde_json::{Map, Value, json};

/// A failed request.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// `type` of the body.
    pub kind: &'static str,
    /// `message` of the body.
    pub message: String,
    /// Further fields of the body.
    pub extra: Map<String, Value>,
}

/// Result of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            kind,
            message: message.into(),
            extra: Map::new(),
        }
    }

    /// 400: the request cannot be carried out as it is.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 401.
    pub fn key() -> ApiError {
        let message = "Invalid API Key";
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
    }

    /// 403: a feature that is not on.
    pub fn disabled(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "feature_disabled", message)
    }

    /// 404.
    pub fn not_found() -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "not_found_error", "File Not Found")
    }

    /// 408: the body did not come in time.
    pub fn too_slow() -> ApiError {
        let message = "the request body did not arrive in time";
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            message,
        )
    }

    /// 413.
    pub fn too_large(limit: usize) -> ApiError {
        let message = format!("the request body is larger than {limit} bytes");
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            message,
        )
    }

    /// 500.
    pub fn server(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 501.
    pub fn unsupported(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_IMPLEMENTED, "not_supported_error", message)
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        ApiError::new(status, "unavailable_error", message)
    }

    /// The body.
    pub fn body(&self) -> Value {
        let mut error = json!({
            "code": self.status.as_u16(),
            "message": self.message,
            "type": self.kind,
        });
        if let Some(error) = error.as_object_mut() {
            error.extend(self.extra.clone());
        }
        json!({ "error": error })
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        let message = failure.to_string();
        match failure {
            Failure::Context { n_prompt, n_ctx } => {
                let mut e = ApiError::invalid(message);
                e.kind = "exceed_context_size_error";
                e.extra.insert("n_prompt_tokens".into(), n_prompt.into());
                e.extra.insert("n_ctx".into(), n_ctx.into());
                e
            }
            Failure::Invalid(_) => ApiError::invalid(message),
            Failure::PoolExhausted | Failure::Engine(_) => ApiError::server(message),
            Failure::Stopped => ApiError::unavailable(message),
        }
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        ApiError::unavailable(refused.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body().to_string()).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json; charset=utf-8"),
        );
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            let soon = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        response
    }
}
