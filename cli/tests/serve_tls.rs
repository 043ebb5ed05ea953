//! The server with a certificate.

mod server;

use serde_json::json;
use server::{Reply, Server, model, read_reply};
use std::io::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

fn file(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/tls");
    dir.join(name)
}

/// Sends one request over TLS, trusting the test's certificate only.
fn ask(server: &Server, head: &str, body: &str) -> Reply {
    let mut roots = RootCertStore::empty();
    let cert = CertificateDer::from_pem_file(file("cert.pem")).expect("a certificate");
    roots.add(cert).expect("a usable certificate");
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("a name");
    let client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let socket = TcpStream::connect(&server.address).expect("the server listens");
    let mut stream = StreamOwned::new(client, socket);
    let n = body.len();
    write!(
        stream,
        "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n{body}"
    )
    .expect("the request is taken");
    read_reply(stream)
}

#[test]
fn https_with_a_certificate() {
    let (key, cert) = (file("key.pem"), file("cert.pem"));
    let flags = ["-c", "64", "--ssl-key-file", key.to_str().expect("text")];
    let flags = [
        &flags[..],
        &["--ssl-cert-file", cert.to_str().expect("text")],
    ]
    .concat();
    let server = Server::launch(&model("llama-tiny"), &flags);
    let deadline = Instant::now() + Duration::from_secs(60);
    while ask(&server, "GET /health", "").status != 200 {
        assert!(Instant::now() < deadline, "the server never became ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Whoever speaks plain HTTP, or nothing, disturbs nobody.
    let mut plain = TcpStream::connect(&server.address).expect("the server listens");
    let _ = plain.write_all(b"GET /health HTTP/1.1\r\n\r\n");
    let silent = TcpStream::connect(&server.address).expect("the server listens");
    for stream in [false, true] {
        let body = json!({"prompt": "A", "n_predict": 4, "ignore_eos": true, "stream": stream});
        let reply = ask(&server, "POST /completion", &body.to_string());
        assert_eq!(reply.status, 200);
        let last = match stream {
            true => reply.events().pop().expect("events"),
            false => reply.json(),
        };
        assert_eq!(last["tokens_predicted"], 4);
    }
    drop((plain, silent));
}

#[test]
fn broken_certificates_are_refused_at_the_start() {
    let (key, cert) = (file("key.pem"), file("cert.pem"));
    let (key, cert) = (key.to_str().expect("text"), cert.to_str().expect("text"));
    for (flags, part) in [
        (vec!["--ssl-key-file", key], "one needs the other"),
        (
            vec!["--ssl-key-file", key, "--ssl-cert-file", key],
            "--ssl-cert-file",
        ),
        (
            vec!["--ssl-key-file", cert, "--ssl-cert-file", cert],
            "--ssl-key-file",
        ),
        (
            vec!["--ssl-key-file", key, "--ssl-cert-file", "/nowhere.pem"],
            "/nowhere.pem",
        ),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_mneme"))
            .args(["serve", "--port", "0", "-m"])
            .arg(model("llama-tiny"))
            .args(&flags)
            .output()
            .expect("the program starts");
        assert_eq!(out.status.code(), Some(1), "{flags:?}");
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(text.contains(part), "{flags:?}: {text}");
    }
}
