//! The real program with a tiny model, and a client that hides nothing.

#![allow(dead_code)] // each test file uses its part

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The model file of a fixture, converted once per test program.
pub fn model(fixture: &str) -> PathBuf {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    static ONCE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let dir = DIR.get_or_init(|| tempfile::tempdir().expect("a folder"));
    let path = dir.path().join(format!("{fixture}.gguf"));
    let _guard = ONCE.lock().unwrap_or_else(|e| e.into_inner());
    if !path.exists() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../fixtures")
            .join(fixture);
        let options = mneme_convert::ConvertOptions::new(source, &path);
        mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect(fixture);
    }
    path
}

/// A running server, killed at the end.
pub struct Server {
    pub child: Child,
    pub address: String,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("replies are UTF-8")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// Values of the `data:` lines.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        let data = text.lines().filter_map(|l| l.strip_prefix("data: "));
        data.filter(|d| *d != "[DONE]")
            .map(|d| serde_json::from_str(d).expect(d))
            .collect()
    }

    #[track_caller]
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// `error.type` and `error.message`, after a check of status and code.
    #[track_caller]
    pub fn error(&self, status: u16) -> (String, String) {
        let body = self.text();
        assert_eq!(self.status, status, "{body}");
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], status, "{body}");
        let field = |name: &str| error[name].as_str().expect(name).to_owned();
        (field("type"), field("message"))
    }
}

impl Server {
    /// Starts with `flags` and waits until it is ready.
    pub fn start(fixture: &str, flags: &[&str]) -> Server {
        let server = Server::launch(&model(fixture), flags);
        let deadline = Instant::now() + Duration::from_secs(60);
        while server.get("/health").status != 200 {
            assert!(Instant::now() < deadline, "the server never became ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// Starts with `flags` and waits until its socket is open.
    pub fn launch(model: &Path, flags: &[&str]) -> Server {
        Server::launch_in(model, flags, &[])
    }

    /// The same, with environment variables.
    pub fn launch_in(model: &Path, flags: &[&str], env: &[(&str, &str)]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mneme"))
            .envs(env.iter().copied())
            .args(["serve", "--port", "0", "-t", "1", "-m"])
            .arg(model)
            .args(flags)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the program starts");
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let mut line = String::new();
        let address = loop {
            line.clear();
            let n = stderr.read_line(&mut line).expect("stderr is text");
            assert!(n > 0, "the server ended without a socket");
            if let Some(at) = line.trim().strip_prefix("listening on ") {
                let (_, address) = at.split_once("://").unwrap_or(("", at));
                break address.to_owned();
            }
        };
        // What it says later must not fill the pipe.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Server { child, address }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).expect("the server listens");
        let timeout = Some(Duration::from_secs(120));
        stream.set_read_timeout(timeout).expect("a timeout");
        stream
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut stream = self.connect();
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            head += "Host: localhost\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        if method != "GET" {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        head += "\r\n";
        stream
            .write_all(head.as_bytes())
            .expect("the head is taken");
        stream.write_all(body).expect("the body is taken");
        read_reply(stream)
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        let headers = [("Content-Type", "application/json")];
        self.send("POST", path, &headers, body.to_string().as_bytes())
    }

    /// Slots that work.
    pub fn busy(&self) -> usize {
        let slots = self.get("/slots").ok();
        let slots = slots.as_array().expect("a list").iter();
        slots.filter(|s| s["is_processing"] == true).count()
    }

    /// Waits until no slot works.
    #[track_caller]
    pub fn idle_within(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.busy() > 0 {
            assert!(Instant::now() < deadline, "a slot is still busy");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let done = Command::new("sh")
            .args(["-c", &format!("kill -s {name} {pid}")])
            .status();
        assert!(done.expect("kill is there").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a reply to its end.
pub fn read_reply(stream: impl Read) -> Reply {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("a status line");
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status in {line:?}"));
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None => break,
        }
    }
    let chunked = headers
        .iter()
        .any(|(n, v)| n.eq_ignore_ascii_case("transfer-encoding") && v == "chunked");
    let mut body = Vec::new();
    if chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size).expect("a size");
            let n = usize::from_str_radix(size.trim(), 16).expect("sizes are hexadecimal");
            let mut chunk = vec![0; n + 2];
            reader.read_exact(&mut chunk).expect("a chunk");
            body.extend_from_slice(&chunk[..n]);
            if n == 0 {
                break;
            }
        }
    } else {
        reader.read_to_end(&mut body).expect("the body");
    }
    Reply {
        status,
        headers,
        body,
    }
}
