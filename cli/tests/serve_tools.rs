//! What acts on this machine: tools, MCP servers and the proxy. Off unless asked for, and then for
//! this machine only.

mod server;

use serde_json::{Value, json};
use server::{Reply, Server};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

fn tool(server: &Server, name: &str, params: &Value) -> Value {
    let body = json!({"tool": name, "params": params});
    server.post("/tools", &body).ok()
}

fn with(server: &Server, path: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
    let method = if body.is_null() { "GET" } else { "POST" };
    server.send(method, path, headers, body.to_string().as_bytes())
}

/// A program whose flags are refused: its status and what it says.
fn refused(flags: &[&str]) -> String {
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(["serve", "-m", "none.gguf", "--port", "0"])
        .args(flags)
        .output()
        .expect("the program starts");
    assert!(!out.status.success(), "{flags:?}");
    String::from_utf8(out.stderr).expect("text")
}

#[test]
fn nothing_runs_unless_asked_for_and_then_only_here() {
    let server = Server::start("llama-tiny", &["-c", "256"]);
    for path in ["/tools", "/cors-proxy?url=http://127.0.0.1/"] {
        assert_eq!(
            with(&server, path, &[], &Value::Null).error(403).0,
            "feature_disabled"
        );
        assert_eq!(server.post(path, &json!({"tool": "get_info"})).status, 403);
    }
    for flags in [
        &["--tools", "all", "--host", "0.0.0.0"][..],
        &["--ui-mcp-proxy", "--host", "127.0.0.1,::"],
        &[
            "--mcp-servers-json",
            "{\"a\":{\"command\":\"x\"}}",
            "--host",
            "example.org",
        ],
    ] {
        assert!(refused(flags).contains("loopback"), "{flags:?}");
    }
    assert!(refused(&["--tools", "read_file,rm"]).contains("rm"));
    assert!(refused(&["--mcp-servers-json", "no json"]).contains("--mcp-servers-json"));
    assert!(refused(&["--mcp-servers-config", "/none.json"]).contains("none.json"));

    let server = Server::start("llama-tiny", &["-c", "256", "--tools", "get_info"]);
    let ask = json!({"tool": "get_info"});
    assert_eq!(with(&server, "/tools", &[], &ask).status, 200);
    for headers in [
        &[("Origin", "https://evil.example")][..],
        &[("Host", "evil.example:8080")],
        &[("Host", "evil.example"), ("Origin", "http://evil.example")],
        &[("Sec-Fetch-Site", "cross-site")],
        &[("Sec-Fetch-Site", "same-site")],
    ] {
        for body in [&Value::Null, &ask] {
            let reply = with(&server, "/tools", headers, body);
            assert_eq!(reply.error(403).0, "feature_disabled", "{headers:?}");
        }
    }
    let page = [("Origin", "http://localhost:3000")];
    assert_eq!(with(&server, "/tools", &page, &ask).status, 200);
    // Only what was named is there.
    let list = server.get("/tools").ok();
    assert_eq!(list.as_array().map(Vec::len), Some(1));
    let other = json!({"tool": "exec_shell_command", "params": {"command": "true"}});
    assert_eq!(server.post("/tools", &other).status, 400);
    // With a key, the key counts here too.
    let flags = ["-c", "256", "--tools", "all", "--api-key", "k"];
    let server = Server::start("llama-tiny", &flags);
    assert_eq!(with(&server, "/tools", &[], &ask).status, 401);
    assert_eq!(
        with(&server, "/tools", &[("X-Api-Key", "k")], &ask).status,
        200
    );
}

#[test]
fn files_and_commands() {
    let server = Server::start("llama-tiny", &["-c", "256", "--tools", "all"]);
    let dir = tempfile::tempdir().expect("a folder");
    let cwd = dir.path().to_str().expect("a path");
    let here = [("x-tool-cwd", cwd)];
    let run = |name: &str, params: Value| {
        let body = json!({"tool": name, "params": params});
        with(&server, "/tools", &here, &body).ok()
    };
    let text = |reply: Value| {
        reply["plain_text_response"]
            .as_str()
            .expect("text")
            .to_owned()
    };
    let written = run(
        "write_file",
        json!({"path": "a/b.txt", "content": "one\ntwo\n"}),
    );
    assert_eq!(written["result"], "file written successfully");
    let edits = json!([{"old_text": "two", "new_text": "2"}]);
    assert_eq!(
        run("edit_file", json!({"path": "a/b.txt", "edits": edits}))["edits_applied"],
        1
    );
    assert_eq!(
        text(run("read_file", json!({"path": "a/b.txt"}))),
        "one\n2\n"
    );
    let found = run("file_glob_search", json!({"path": ".", "include": "*.txt"}));
    assert_eq!(
        found["entries"],
        json!([{"path": "a/b.txt", "type": "file"}])
    );
    let lines = text(run("grep_search", json!({"path": ".", "pattern": "^\\d$"})));
    assert!(
        lines.starts_with("a/b.txt:2\n") && lines.contains("Total matches: 1"),
        "{lines}"
    );
    let listed = text(run(
        "exec_shell_command",
        json!({"command": "cat a/b.txt; exit 3"}),
    ));
    assert_eq!(listed, "one\n2\n\n[exit code: 3]");
    assert!(text(run("get_info", json!({}))).contains(cwd));
    for (name, params) in [
        ("read_file", json!({})),
        ("read_file", json!({"path": "none"})),
        ("read_file", json!({"path": "."})),
        ("read_file", json!({"path": "/dev/zero"})),
        ("grep_search", json!({"path": ".", "pattern": "("})),
        ("file_glob_search", json!({"path": ".", "limit": 0})),
        (
            "edit_file",
            json!({"path": "a/b.txt", "edits": [{"old_text": "x"}]}),
        ),
    ] {
        assert!(
            run(name, params.clone())["error"].is_string(),
            "{name} {params}"
        );
    }
    assert_eq!(server.post("/tools", &json!({"tool": 1})).status, 400);
    assert_eq!(
        server
            .post("/tools", &json!({"tool": "get_info", "params": [1]}))
            .status,
        400
    );
    // A tool meant for elsewhere does not run here.
    let body = json!({"tool": "exec_shell_command", "params": {"command": "touch x"}});
    for (runtime, status) in [("docker:busybox", 501), ("ssh:-o", 500), ("what:", 500)] {
        let reply = with(
            &server,
            "/tools",
            &[here[0], ("x-tool-runtime", runtime)],
            &body,
        );
        assert_eq!(reply.status, status, "{runtime}");
    }
    assert!(!dir.path().join("x").exists());
}

#[test]
fn commands_stream_and_end_with_whom_they_are_for() {
    let server = Server::start("llama-tiny", &["-c", "256", "--tools", "all"]);
    let body =
        json!({"tool": "exec_shell_command", "params": {"command": "echo hello"}, "stream": true});
    let events = server.post("/tools", &body).events();
    let (last, parts) = events.split_last().expect("events");
    assert_eq!(*last, json!({"done": true}));
    let text: String = parts.iter().filter_map(|e| e["chunk"].as_str()).collect();
    assert_eq!(text, "hello\n\n[exit code: 0]");
    // Too long: the command and what it started end.
    let begin = Instant::now();
    let late = json!({"command": "sleep 50 & sleep 50", "timeout": 1});
    let late = tool(&server, "exec_shell_command", &late);
    assert!(
        late["plain_text_response"]
            .as_str()
            .expect("text")
            .contains("ended after 1 s")
    );
    assert!(begin.elapsed() < Duration::from_secs(20));
    let many = json!({"command": "yes | head -c 100000", "max_output_size": 10});
    let many = tool(&server, "exec_shell_command", &many);
    assert!(many["plain_text_response"].as_str().expect("text").len() < 100);
}

/// A server that answers once with `reply` and hands out the head of the request.
fn once(reply: &'static str) -> (String, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let seen = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a request");
        let mut head = String::new();
        let mut lines = BufReader::new(stream.try_clone().expect("a stream"));
        while lines.read_line(&mut head).expect("a line") > 2 {}
        stream.write_all(reply.as_bytes()).expect("taken");
        head.to_lowercase()
    });
    (address, seen)
}

#[test]
fn the_proxy_passes_on_only_what_was_named() {
    let flags = ["-c", "256", "--ui-mcp-proxy", "--api-key", "k"];
    let server = Server::start("llama-tiny", &flags);
    let key = ("Authorization", "Bearer k");
    let (address, seen) = once(
        "HTTP/1.1 201 Created\r\nContent-Type: text/html\r\nSet-Cookie: a=b\r\nContent-Length: 2\r\nMcp-Session-Id: 7\r\n\r\nok",
    );
    let headers = [
        key,
        ("Cookie", "secret=1"),
        ("x-llama-server-proxy-header-accept", "text/plain"),
        ("x-llama-server-proxy-header-authorization", "Bearer theirs"),
    ];
    let path = format!("/cors-proxy?url=http://{address}/a%3Fb%3D1");
    let reply = with(&server, &path, &headers, &Value::Null);
    assert_eq!((reply.status, reply.text().as_str()), (201, "ok"));
    assert_eq!(reply.header("mcp-session-id"), Some("7"));
    assert_eq!(reply.header("set-cookie"), None);
    assert!(
        reply
            .header("content-security-policy")
            .expect("a policy")
            .contains("sandbox")
    );
    let head = seen.join().expect("a request came");
    assert!(head.starts_with("get /a?b=1 http/1.1"), "{head}");
    assert!(head.contains("authorization: bearer theirs") && head.contains("accept: text/plain"));
    assert!(
        !head.contains("cookie") && !head.contains("bearer k"),
        "{head}"
    );

    let (address, seen) = once("HTTP/1.1 204 No Content\r\n\r\n");
    let reply = with(
        &server,
        &format!("/cors-proxy?url=http://{address}"),
        &[key],
        &json!({}),
    );
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    assert!(
        seen.join()
            .expect("a request came")
            .starts_with("post / http")
    );
    for bad in [
        "",
        "ftp://localhost/",
        "file:///etc/passwd",
        "http://u:p@localhost/",
        "http://",
        "//x",
    ] {
        let path = format!("/cors-proxy?url={bad}");
        assert_eq!(
            with(&server, &path, &[key], &Value::Null).status,
            400,
            "{bad}"
        );
    }
    // Nobody listens there any more.
    let gone = format!("/cors-proxy?url=http://{address}");
    assert_eq!(with(&server, &gone, &[key], &Value::Null).status, 500);
    assert_eq!(with(&server, &gone, &[], &Value::Null).status, 401);
}

/// A program that speaks the protocol well enough, ends when it is told to, and counts its calls.
const MCP: &str = r#"n=0; while read -r line; do
id=$(printf %s "$line" | sed -n 's/.*"id":\([0-9]*\).*/\1/p')
case "$line" in
*'"initialize"'*) echo 'a log line'; printf '{"jsonrpc":"2.0","id":%s,"result":{}}\n' "$id";;
*'"tools/list"'*) printf '{"jsonrpc":"2.0","method":"notifications/x"}\n{"jsonrpc":"2.0","id":%s,"result":{"tools":[{"name":"say","description":"d"}]}}\n' "$id";;
*crash*) exit 1;;
*silent*) ;;
*wrong*) printf '{"jsonrpc":"2.0","id":%s,"error":{"code":1,"message":"no such thing"}}\n' "$id";;
*'"tools/call"'*) n=$((n+1)); printf '{"jsonrpc":"2.0","id":%s,"result":{"content":[{"type":"text","text":"call %s"}]}}\n' "$id" "$n";;
esac; done"#;

#[test]
fn tools_of_other_programs() {
    let servers = json!({"mcpServers": {
        "my": {"command": "sh", "args": ["-c", MCP], "timeout_ms": 1500},
        "bad": {"command": "/no/such/program"},
    }});
    let flags = ["-c", "256", "--mcp-servers-json", &servers.to_string()];
    let server = Server::start("llama-tiny", &flags);
    let list = server.get("/tools").ok();
    assert_eq!(list.as_array().map(Vec::len), Some(1));
    let function = &list[0]["definition"]["function"];
    assert_eq!(
        (&list[0]["tool"], &function["name"]),
        (&json!("my_say"), &json!("my_say"))
    );
    assert_eq!(
        function["parameters"],
        json!({"type": "object", "properties": {}})
    );
    let say = |what: &str| tool(&server, "my_say", &json!({"what": what}));
    assert_eq!(say("x")["plain_text_response"], "call 1");
    assert_eq!(say("x")["plain_text_response"], "call 2");
    assert!(
        say("wrong")["error"]
            .as_str()
            .expect("an error")
            .contains("no such thing")
    );
    assert!(
        say("silent")["error"]
            .as_str()
            .expect("an error")
            .contains("no answer")
    );
    assert_eq!(say("x")["plain_text_response"], "call 3");
    // A program that ends is started again.
    assert!(
        say("crash")["error"]
            .as_str()
            .expect("an error")
            .contains("ended")
    );
    assert_eq!(say("x")["plain_text_response"], "call 1");
    assert_eq!(
        server.post("/tools", &json!({"tool": "my_none"})).status,
        400
    );
    server.signal("TERM");
}
