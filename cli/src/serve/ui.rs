//! The page at `/`: three files inside the program.

use super::errors::{ApiError, ApiResult};
use super::front::Front;
use super::routes::Call;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// Nothing from elsewhere may run or be fetched.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn file(front: &Front, text: &'static str, kind: &'static str) -> ApiResult<Response> {
    if !front.args.ui {
        return Err(ApiError::not_found());
    }
    let mut response = text.into_response();
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ] {
        response
            .headers_mut()
            .insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

/// GET /
pub async fn page(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    file(
        &front,
        include_str!("ui/index.html"),
        "text/html; charset=utf-8",
    )
}

/// GET /bundle.js
pub async fn script(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    file(
        &front,
        include_str!("ui/bundle.js"),
        "text/javascript; charset=utf-8",
    )
}

/// GET /bundle.css
pub async fn style(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    file(
        &front,
        include_str!("ui/bundle.css"),
        "text/css; charset=utf-8",
    )
}

#[cfg(test)]
mod tests {
    const PAGE: &str = include_str!("ui/index.html");
    const SCRIPT: &str = include_str!("ui/bundle.js");

    #[test]
    fn what_the_script_looks_for_is_on_the_page() {
        let mut n = 0;
        for part in SCRIPT.split("$(\"").skip(1) {
            let id = part.split('"').next().unwrap_or("");
            // Ids that are put together end in a dash.
            if !id.ends_with('-') {
                assert!(PAGE.contains(&format!("id=\"{id}\"")), "{id}");
                n += 1;
            }
        }
        assert!(n > 20, "{n} ids");
    }

    #[test]
    fn the_page_needs_nobody_else_and_trusts_no_text() {
        for text in [PAGE, include_str!("ui/bundle.css")] {
            assert!(
                !text.contains("http://") && !text.contains("https://") && !text.contains("url(")
            );
        }
        for word in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!SCRIPT.contains(word), "{word}");
        }
        assert!(
            !PAGE.contains("<script>") && !PAGE.contains(" style=") && !PAGE.contains(" onclick=")
        );
    }
}
