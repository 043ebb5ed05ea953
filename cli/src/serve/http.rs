//! Sockets, connections, and what every request goes through before its handler.

use super::args::Args;
use super::errors::{ApiError, ApiResult};
use super::front::Front;
use super::local;
use super::predict;
use super::routes::{Call, Handler, ROUTES};
use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{RawPathParams, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use futures::StreamExt;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// Connections served at a time; more wait to be accepted.
const MAX_CONNECTIONS: usize = 4096;
/// Time a client has for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest silence within a body.
const BODY_SILENCE: Duration = Duration::from_secs(30);
/// How much of a body that is too large is read before giving up on a polite end.
const DRAIN: usize = 1 << 30;
/// Time that running requests get to end after a signal.
const GRACE: Duration = Duration::from_secs(2);

/// Routes that act on this machine.
const LOCAL: [&str; 2] = ["/tools", "/cors-proxy"];

/// A socket that is open.
pub enum Socket {
    /// An address, and the certificate to show there.
    Tcp(TcpListener, Option<TlsAcceptor>),
    /// A path, removed at the end.
    Unix(UnixListener, PathBuf),
}

impl Socket {
    /// Where clients reach it.
    pub fn address(&self) -> String {
        match self {
            Socket::Tcp(listener, tls) => match listener.local_addr() {
                Ok(address) if tls.is_some() => format!("https://{address}"),
                Ok(address) => format!("http://{address}"),
                Err(e) => e.to_string(),
            },
            Socket::Unix(_, path) => path.display().to_string(),
        }
    }
}

/// Reads the certificate and its key, when the flags name them.
fn tls(args: &Args) -> Result<Option<TlsAcceptor>> {
    let (Some(key_file), Some(cert_file)) = (&args.ssl_key_file, &args.ssl_cert_file) else {
        return Ok(None);
    };
    let cert = || format!("--ssl-cert-file {}", cert_file.display());
    let chain = CertificateDer::pem_file_iter(cert_file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(cert)?;
    anyhow::ensure!(!chain.is_empty(), "{}: no certificate in it", cert());
    let key = PrivateKeyDer::from_pem_file(key_file)
        .with_context(|| format!("--ssl-key-file {}", key_file.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .with_context(|| format!("{} and its key", cert()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// Opens every socket of the flags.
pub async fn bind(args: &Args) -> Result<Vec<Socket>> {
    let tls = tls(args)?;
    let mut out = Vec::new();
    for host in &args.hosts {
        if host.ends_with(".sock") {
            let path = PathBuf::from(host);
            // A socket left by a server that was killed is in the way; one that answers is not.
            if std::os::unix::net::UnixStream::connect(&path).is_err() {
                let is_socket = std::fs::symlink_metadata(&path).is_ok_and(|m| {
                    use std::os::unix::fs::FileTypeExt;
                    m.file_type().is_socket()
                });
                if is_socket {
                    std::fs::remove_file(&path).with_context(|| host.clone())?;
                }
            }
            let listener = UnixListener::bind(&path).with_context(|| host.clone())?;
            out.push(Socket::Unix(listener, path));
        } else {
            let address = (host.trim_matches(['[', ']']), args.port);
            let listener = TcpListener::bind(address).await;
            let listener = listener.with_context(|| format!("{host}:{}", args.port))?;
            out.push(Socket::Tcp(listener, tls.clone()));
        }
    }
    Ok(out)
}

/// The routes behind the gate.
pub fn router(front: &Arc<Front>) -> Router {
    let mut router = Router::new();
    let mut add = |method: &str, path: &str, handler: Handler| {
        let (filter, has_body) = match method {
            "GET" => (MethodFilter::GET, false),
            _ => (MethodFilter::POST, true),
        };
        let answer = move |State(front): State<Arc<Front>>,
                           params: RawPathParams,
                           request: Request| async move {
            match run(&front, handler, has_body, &params, request).await {
                Ok(response) => response,
                Err(e) => e.into_response(),
            }
        };
        let path = format!("{}{path}", front.args.api_prefix);
        router = std::mem::take(&mut router).route(&path, on(filter, answer));
    };
    for route in ROUTES {
        for path in route.paths {
            add(route.method, path, route.handler);
        }
    }
    if let Some(path) = &front.args.predict_route {
        let handler = Handler::Model(|app, call| Box::pin(predict::predict(app, call)));
        add("POST", path, handler);
    }
    let missing = || async { ApiError::not_found() };
    router
        .fallback(missing)
        .method_not_allowed_fallback(missing)
        .layer(middleware::from_fn_with_state(Arc::clone(front), gate))
        .with_state(Arc::clone(front))
}

async fn run(
    front: &Arc<Front>,
    handler: Handler,
    has_body: bool,
    params: &RawPathParams,
    request: Request,
) -> ApiResult<Response> {
    let id = params.iter().find(|(name, _)| *name == "id");
    let id = id.map_or(String::new(), |(_, id)| id.to_owned());
    let query = query(request.uri());
    let headers = request.headers().clone();
    if LOCAL
        .iter()
        .any(|path| request.uri().path() == format!("{}{path}", front.args.api_prefix))
    {
        local::check(&headers, allowed_origin(front, &headers).as_ref())?;
    }
    let body = match has_body {
        false => Bytes::new(),
        true => read_body(request.into_body(), front.args.max_body, front.args.timeout).await?,
    };
    let call = Call {
        id,
        query,
        headers,
        body,
    };
    match handler {
        Handler::Front(answer) => answer(Arc::clone(front), call).await,
        // Last: what is no request keeps nobody awake.
        Handler::Model(answer) => answer(front.app().await?, call).await,
    }
}

fn query(uri: &Uri) -> Vec<(String, String)> {
    let pairs = uri
        .query()
        .unwrap_or("")
        .split('&')
        .filter(|p| !p.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decoded(key), percent_decoded(value))
        })
        .collect()
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        let hex = hex.and_then(|h| std::str::from_utf8(h).ok());
        let byte = hex.and_then(|h| u8::from_str_radix(h, 16).ok());
        match byte {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Reads a body of at most `limit` bytes. One that is larger is read on and thrown away, so that
/// the client hears why it is refused instead of losing the connection.
async fn read_body(body: Body, limit: usize, timeout: Duration) -> ApiResult<Bytes> {
    let mut parts = body.into_data_stream();
    let mut out: Vec<u8> = Vec::new();
    let mut n = 0usize;
    let reading = async {
        loop {
            let part = tokio::time::timeout(BODY_SILENCE, parts.next()).await;
            let part = match part {
                Err(_) => return Err(ApiError::too_slow()),
                Ok(None) => break,
                Ok(Some(Err(e))) => {
                    return Err(ApiError::server(format!("the request body broke off: {e}")));
                }
                Ok(Some(Ok(part))) => part,
            };
            n = n.saturating_add(part.len());
            if n > limit {
                out = Vec::new();
                if n > DRAIN {
                    break;
                }
            } else {
                out.extend_from_slice(&part);
            }
        }
        match n > limit {
            true => Err(ApiError::too_large(limit)),
            false => Ok(Bytes::from(std::mem::take(&mut out))),
        }
    };
    match tokio::time::timeout(timeout, reading).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::too_slow()),
    }
}

/// Whether two keys are the same; takes as long for any keys of a length.
fn same_key(a: &[u8], b: &[u8]) -> bool {
    let mut differs = a.len() ^ b.len();
    for i in 0..a.len() {
        differs |= usize::from(a[i] ^ b.get(i).copied().unwrap_or(0));
    }
    std::hint::black_box(differs) == 0
}

fn has_key(front: &Front, headers: &HeaderMap) -> bool {
    let keys = &front.args.api_keys;
    if keys.is_empty() {
        return true;
    }
    let shown = [header::AUTHORIZATION.as_str(), "x-api-key"];
    let shown = shown.iter().filter_map(|name| headers.get(*name));
    let mut fits = false;
    for value in shown {
        let value = value.as_bytes();
        let value = value.strip_prefix(b"Bearer ").unwrap_or(value);
        for key in keys {
            fits |= same_key(key.as_bytes(), value);
        }
    }
    fits
}

/// The origin to allow, if any.
fn allowed_origin(front: &Front, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let text = origin.to_str().ok()?;
    let allowed = &front.args.cors_origins;
    let fits = match allowed.as_str() {
        "*" => true,
        "localhost" => local::is_loopback(local::host(text)),
        list => list.split(',').any(|o| o.trim() == text),
    };
    fits.then(|| origin.clone())
}

/// Keys, origins, loading: what comes before and after every handler.
async fn gate(State(front): State<Arc<Front>>, request: Request, next: Next) -> Response {
    let origin = allowed_origin(&front, request.headers());
    let is_options = request.method() == Method::OPTIONS;
    let path = request.uri().path();
    let path = path.strip_prefix(front.args.api_prefix.as_str());
    let is_open = |path: &str| ROUTES.iter().any(|r| r.open && r.paths.contains(&path));
    let is_open = path.is_some_and(is_open);
    let mut response = if is_options {
        StatusCode::OK.into_response()
    } else if !is_open && !has_key(&front, request.headers()) {
        ApiError::key().into_response()
    } else if front.is_loading() {
        ApiError::unavailable("Loading model").into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(header::SERVER, HeaderValue::from_static("llama.cpp"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        if front.args.cors_credentials {
            let yes = HeaderValue::from_static("true");
            headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, yes);
        }
    }
    if is_options {
        for (name, value) in [
            (
                header::ACCESS_CONTROL_ALLOW_METHODS,
                &front.args.cors_methods,
            ),
            (
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                &front.args.cors_headers,
            ),
        ] {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        }
    }
    response
}

/// Serves until `stop` says so, then lets running requests end for a moment.
pub async fn serve(sockets: Vec<Socket>, router: Router, mut stop: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut paths = Vec::new();
    let mut accepting = Vec::new();
    for socket in sockets {
        let (router, room, stop) = (router.clone(), Arc::clone(&room), stop.clone());
        accepting.push(match socket {
            Socket::Tcp(listener, tls) => tokio::spawn(async move {
                loop {
                    let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
                        return;
                    };
                    match listener.accept().await {
                        Ok((stream, _)) => {
                            // Tokens are small and must not wait for more.
                            let _ = stream.set_nodelay(true);
                            match &tls {
                                None => connection(stream, &router, permit, stop.clone()),
                                Some(tls) => {
                                    let (router, stop) = (router.clone(), stop.clone());
                                    let shaking = tls.accept(stream);
                                    tokio::spawn(async move {
                                        let shaken =
                                            tokio::time::timeout(HEAD_TIMEOUT, shaking).await;
                                        match shaken {
                                            Ok(Ok(stream)) => {
                                                connection(stream, &router, permit, stop);
                                            }
                                            Ok(Err(e)) => tracing::debug!("handshake: {e}"),
                                            Err(_) => tracing::debug!("handshake: too slow"),
                                        }
                                    });
                                }
                            }
                        }
                        Err(e) => pause_after(&e).await,
                    }
                }
            }),
            Socket::Unix(listener, path) => {
                paths.push(path);
                tokio::spawn(async move {
                    loop {
                        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
                            return;
                        };
                        match listener.accept().await {
                            Ok((stream, _)) => connection(stream, &router, permit, stop.clone()),
                            Err(e) => pause_after(&e).await,
                        }
                    }
                })
            }
        });
    }
    // An error means that the sender has gone, which is a way to stop.
    let told = stop.wait_for(|stop| *stop).await.is_ok();
    tracing::debug!("stopping, told: {told}");
    accepting.iter().for_each(|task| task.abort());
    let all = room.acquire_many(MAX_CONNECTIONS as u32);
    let _ = tokio::time::timeout(GRACE, all).await;
    for path in paths {
        let _ = std::fs::remove_file(path);
    }
}

/// Out of file descriptors, most likely: accepting again at once would only spin.
async fn pause_after(e: &std::io::Error) {
    tracing::warn!("accept: {e}");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: &Router,
    permit: tokio::sync::OwnedSemaphorePermit,
    mut stop: watch::Receiver<bool>,
) {
    let service = TowerToHyperService::new(router.clone());
    tokio::spawn(async move {
        let _permit = permit;
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            // Names are the same in any case, but not to every client.
            .title_case_headers(true)
            .max_buf_size(64 << 10);
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let told = async move {
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = told => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(e) = ended {
            tracing::debug!("connection: {e}");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn keys_are_compared_whole() {
        assert!(same_key(b"abc", b"abc"));
        for other in [&b"abd"[..], b"ab", b"abcd", b""] {
            assert!(!same_key(b"abc", other));
            assert!(!same_key(other, b"abc"));
        }
    }

    #[test]
    fn queries_are_decoded() {
        let uri: Uri = "/x?action=save&n=%2Fa+b&flag&bad=%zz"
            .parse()
            .expect("a URI");
        let pairs = query(&uri);
        let pairs: HashMap<_, _> = pairs
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        assert_eq!(pairs["action"], "save");
        assert_eq!(pairs["n"], "/a b");
        assert_eq!(pairs["flag"], "");
        assert_eq!(pairs["bad"], "%zz");
    }
}
