//! `/cors-proxy?url=…`: fetches for a page what its browser would not let it read.
//!
//! Only with `--ui-mcp-proxy`, which binds the server to loopback. Of the page's request nothing is
//! passed on but its body and the headers it named for that purpose, so that neither keys nor
//! cookies meant for this server reach another one.

use super::errors::{ApiError, ApiResult};
use super::front::Front;
use super::local::is_loopback;
use super::routes::Call;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header};
use axum::response::Response;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// What a header that is to be passed on is called here, before its name there.
const PREFIX: &str = "x-llama-server-proxy-header-";
/// Time for a connection to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// Time until the answer's head must be there.
const ANSWER: Duration = Duration::from_secs(600);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// GET /cors-proxy
pub async fn get(front: Arc<Front>, call: Call) -> ApiResult<Response> {
    fetch(&front, Method::GET, call).await
}

/// POST /cors-proxy
pub async fn post(front: Arc<Front>, call: Call) -> ApiResult<Response> {
    fetch(&front, Method::POST, call).await
}

async fn fetch(front: &Front, method: Method, call: Call) -> ApiResult<Response> {
    if !front.args.proxy {
        return Err(ApiError::disabled(
            "This server is no proxy. Start it with `--ui-mcp-proxy`",
        ));
    }
    let url = call.query("url").unwrap_or("");
    let refuse = |what: &str| ApiError::invalid(format!("Field 'url': {what}: `{url}`"));
    let uri: Uri = url.parse().map_err(|_| refuse("expected a URL"))?;
    let is_tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(refuse("expected http:// or https://")),
    };
    let authority = uri.authority().ok_or_else(|| refuse("no host in"))?;
    if authority.as_str().contains('@') {
        return Err(refuse("no name or password may be in"));
    }
    let host = uri.host().unwrap_or("").trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 });
    let path = uri.path_and_query().map_or("/", |p| p.as_str());

    let mut request = Request::builder().method(method).uri(path);
    if let Some(headers) = request.headers_mut() {
        *headers = named(&call.headers)?;
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| refuse("bad host in"))?;
        headers.insert(header::HOST, host);
    }
    let request = request
        .body(Body::from(call.body.clone()))
        .map_err(|e| ApiError::invalid(e.to_string()))?;

    let failed = |e: String| ApiError::server(format!("fetching {url}: {e}"));
    let stream = tokio::time::timeout(CONNECT, connect(host, port, is_tls)).await;
    let stream = stream
        .map_err(|_| failed("no connection".into()))?
        .map_err(|e| failed(e.to_string()))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(e.to_string()))?;
    tokio::spawn(async move {
        if let Err(e) = connection.await {
            tracing::debug!("a proxied connection broke off: {e}");
        }
    });
    let reply = tokio::time::timeout(ANSWER, sender.send_request(request)).await;
    let (head, body) = reply
        .map_err(|_| failed("no answer".into()))?
        .map_err(|e| failed(e.to_string()))?
        .into_parts();
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = head.status;
    *response.headers_mut() = kept(&head.headers);
    Ok(response)
}

async fn connect(host: &str, port: u16, is_tls: bool) -> std::io::Result<Box<dyn Stream>> {
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto, pki_types::ServerName};
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    if !is_tls {
        return Ok(Box::new(stream));
    }
    let roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(std::io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    Ok(Box::new(connector.connect(name, stream).await?))
}

/// The headers that the page named for the other server.
fn named(headers: &HeaderMap) -> ApiResult<HeaderMap> {
    let mut out = HeaderMap::new();
    for (name, value) in headers {
        let Some(name) = name.as_str().strip_prefix(PREFIX) else {
            continue;
        };
        let known = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| ApiError::invalid(format!("`{name}` is no name of a header")))?;
        if !is_of_connection(&known) && known != header::HOST && known != header::CONTENT_LENGTH {
            out.append(known, value.clone());
        }
    }
    Ok(out)
}

/// Whether a header is about one connection, not about what is in it.
fn is_of_connection(name: &HeaderName) -> bool {
    let names = [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
    ];
    names.contains(name) || name.as_str() == "keep-alive"
}

/// What of the other server's head is shown: no cookies for us, no word on who may read it.
fn kept(headers: &HeaderMap) -> HeaderMap {
    let mut out = HeaderMap::new();
    for (name, value) in headers {
        let text = name.as_str();
        let ours = text.starts_with("access-control-") || text.starts_with("content-security");
        if !ours && !is_of_connection(name) && *name != header::SET_COOKIE {
            out.append(name, value.clone());
        }
    }
    // What is fetched must not run as a page of ours.
    out.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("sandbox; default-src 'none'"),
    );
    out
}

/// Whether `host` of a listener keeps other machines out.
pub fn listens_here_only(host: &str) -> bool {
    host.ends_with(".sock") || is_loopback(host.trim_matches(['[', ']']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_named_headers_go_out_and_no_cookie_comes_in() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer key"),
            ("cookie", "a=b"),
            ("x-llama-server-proxy-header-authorization", "Bearer other"),
            ("x-llama-server-proxy-header-host", "elsewhere"),
            ("x-llama-server-proxy-header-transfer-encoding", "chunked"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let out = named(&headers).expect("names of headers");
        assert_eq!(out.len(), 1);
        assert_eq!(out["authorization"], "Bearer other");

        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("set-cookie", "a=b"),
            ("access-control-allow-origin", "*"),
            ("mcp-session-id", "7"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let out = kept(&headers);
        assert_eq!(out["mcp-session-id"], "7");
        assert!(!out.contains_key("set-cookie"));
        assert!(!out.contains_key("access-control-allow-origin"));
        assert!(out.contains_key("content-security-policy"));
    }

    #[test]
    fn addresses_that_others_reach_are_known() {
        for here in [
            "127.0.0.1",
            "localhost",
            "::1",
            "[::1]",
            "127.9.9.9",
            "/tmp/a.sock",
        ] {
            assert!(listens_here_only(here), "{here}");
        }
        for elsewhere in [
            "0.0.0.0",
            "::",
            "192.168.1.2",
            "example.org",
            "localhost.example",
        ] {
            assert!(!listens_here_only(elsewhere), "{elsewhere}");
        }
    }
}
