//! Routes that act on this machine (`/tools`, `/cors-proxy`): who may use them.
//!
//! They are off unless a flag turns them on, and then the server listens on loopback only
//! ([`super::args`]). That leaves the pages in this machine's browsers: a page of another origin
//! can send requests it may not read the answers of, and a name that resolves to 127.0.0.1 makes
//! its own origin of us. Both are refused here, whatever the answer would have been.

use super::errors::{ApiError, ApiResult};
use axum::http::{HeaderMap, HeaderValue, header};

/// The host of an authority or origin, without scheme, port and brackets.
pub fn host(text: &str) -> &str {
    let text = text.split_once("://").map_or(text, |(_, rest)| rest);
    match text.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or(""),
        None => text.split(':').next().unwrap_or(""),
    }
}

/// Whether a name or an address is this machine's own.
pub fn is_loopback(host: &str) -> bool {
    let address = host.parse::<std::net::IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|a| a.is_loopback())
}

/// Refuses what may come from a page of another origin. `allowed` is the origin that the CORS flags
/// let read replies.
pub fn check(headers: &HeaderMap, allowed: Option<&HeaderValue>) -> ApiResult<()> {
    let text = |name: &str| headers.get(name).map(|v| v.to_str().unwrap_or("?"));
    if let Some(name) = text(header::HOST.as_str())
        && !is_loopback(host(name))
    {
        return Err(ApiError::disabled(format!(
            "this route is for `localhost` only, not for `{name}`"
        )));
    }
    if let Some(origin) = text(header::ORIGIN.as_str()) {
        return match allowed {
            Some(_) => Ok(()),
            None => Err(ApiError::disabled(format!(
                "pages of `{origin}` may not use this route (--cors-origins)"
            ))),
        };
    }
    match text("sec-fetch-site") {
        None | Some("none" | "same-origin") => Ok(()),
        Some(_) => Err(ApiError::disabled("other pages may not use this route")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_others_are_refused() {
        let try_with = |pairs: &[(&'static str, &'static str)], allowed: bool| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, HeaderValue::from_static(value));
            }
            let origin = HeaderValue::from_static("http://localhost");
            check(&headers, allowed.then_some(&origin)).is_ok()
        };
        assert!(try_with(&[], false));
        assert!(try_with(&[("host", "127.0.0.1:8080")], false));
        assert!(try_with(&[("host", "[::1]:8080")], false));
        assert!(try_with(
            &[("host", "localhost"), ("origin", "http://localhost")],
            true
        ));
        assert!(!try_with(&[("host", "evil.example:8080")], true));
        assert!(!try_with(
            &[("host", "localhost"), ("origin", "http://evil.example")],
            false
        ));
        assert!(!try_with(
            &[("host", "localhost"), ("sec-fetch-site", "cross-site")],
            false
        ));
        assert!(try_with(&[("sec-fetch-site", "same-origin")], false));
    }
}
