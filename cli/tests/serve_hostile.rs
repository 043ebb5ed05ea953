//! Requests that mean harm or make no sense: the right status, and the server lives.

mod server;

use serde_json::{Value, json};
use server::{Server, read_reply};
use std::io::{Read, Write};
use std::time::Duration;

fn lives(server: &Server) {
    let reply = server.post("/completion", &json!({"prompt": "x", "n_predict": 1}));
    assert_eq!(reply.ok()["tokens_predicted"], 1);
}

#[test]
fn bodies_that_are_no_json() {
    let server = Server::start("llama-tiny", &["-c", "512", "-np", "2"]);
    let deep = "[".repeat(100_000);
    let nested = format!("{{\"prompt\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let bodies: Vec<&[u8]> = vec![
        b"",
        b"{",
        b"nonsense",
        b"{\"prompt\": \"x\",}",
        b"\xff\xfe\x00",
        b"{\"prompt\": \"\xc3\x28\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": 1e99999}",
        deep.as_bytes(),
        nested.as_bytes(),
    ];
    for path in [
        "/completion",
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/v1/responses",
        "/v1/messages",
        "/infill",
        "/apply-template",
    ] {
        for body in &bodies {
            let reply = server.send("POST", path, &[], body);
            let shown = String::from_utf8_lossy(&body[..body.len().min(20)]).into_owned();
            assert_eq!(reply.error(500).0, "server_error", "{path} {shown}");
        }
        // JSON, but no object.
        for body in ["1", "null", "[]", "\"x\""] {
            let reply = server.send("POST", path, &[], body.as_bytes());
            assert!(
                path == "/tokenize" || reply.status == 400 || reply.status == 501,
                "{path} {body} {}",
                reply.status
            );
        }
    }
    // Any content type will do.
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    let reply = server.send("POST", "/tokenize", &form, br#"{"content": "x"}"#);
    assert!(reply.ok()["tokens"].is_array());
    lives(&server);
}

#[test]
fn values_that_make_no_sense() {
    let server = Server::start("llama-tiny", &["-c", "512", "-np", "2", "-n", "4"]);
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1e308),
        json!(-1e308),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(0.5),
        json!(""),
        json!("x"),
        json!([]),
        json!([[]]),
        json!({}),
        json!({"a": {"b": []}}),
        json!([null]),
        json!("\u{0}\u{ffff}"),
        json!(["a", 1, null, {}]),
    ];
    let fields = [
        "prompt",
        "n_predict",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "top_n_sigma",
        "xtc_probability",
        "repeat_last_n",
        "repeat_penalty",
        "dry_multiplier",
        "dry_base",
        "dry_allowed_length",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "mirostat",
        "mirostat_tau",
        "seed",
        "stop",
        "stream",
        "n_probs",
        "logit_bias",
        "samplers",
        "grammar",
        "json_schema",
        "id_slot",
        "n",
        "n_keep",
        "n_discard",
        "n_indent",
        "t_max_predict_ms",
        "min_keep",
        "response_fields",
        "memory",
        "cache_prompt",
        "post_sampling_probs",
        "ignore_eos",
        "lora",
        "sse_ping_interval",
        "dynatemp_range",
        "dynatemp_exponent",
    ];
    for field in fields {
        for value in &values {
            let mut body = json!({"prompt": "Hello", "n_predict": 2, "n_probs": 1});
            body[field] = value.clone();
            let reply = server.post("/completion", &body);
            assert!(
                matches!(reply.status, 200 | 400),
                "{field} {value}: {} {}",
                reply.status,
                reply.text()
            );
        }
    }
    let fields = [
        "messages",
        "tools",
        "tool_choice",
        "response_format",
        "stream_options",
        "top_logprobs",
        "logprobs",
        "chat_template_kwargs",
        "reasoning_effort",
        "reasoning_format",
        "add_generation_prompt",
        "continue_final_message",
        "parallel_tool_calls",
    ];
    for field in fields {
        for value in &values {
            let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
            body[field] = value.clone();
            let reply = server.post("/v1/chat/completions", &body);
            assert!(
                matches!(reply.status, 200 | 400),
                "{field} {value}: {} {}",
                reply.status,
                reply.text()
            );
        }
    }
    for value in &values {
        for (path, field) in [
            ("/tokenize", "content"),
            ("/detokenize", "tokens"),
            ("/v1/responses", "input"),
            ("/v1/messages", "messages"),
            ("/v1/messages", "system"),
        ] {
            let mut body = json!({"max_tokens": 2, "messages": []});
            body[field] = value.clone();
            let reply = server.post(path, &body);
            assert!(
                matches!(reply.status, 200 | 400),
                "{path} {field} {value}: {} {}",
                reply.status,
                reply.text()
            );
        }
    }
    lives(&server);
}

#[test]
fn bodies_that_are_too_large_or_never_end() {
    let server = Server::start(
        "llama-tiny",
        &["-c", "512", "-np", "1", "--max-body", "1", "-to", "2"],
    );
    // 100 MB: refused, and the client hears it.
    let mut stream = server.connect();
    let n = 100_000_000usize;
    write!(
        stream,
        "POST /completion HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n"
    )
    .expect("sent");
    let block = vec![b' '; 1 << 20];
    let mut left = n;
    while left > 0 {
        let now = left.min(block.len());
        stream
            .write_all(&block[..now])
            .expect("the server reads on");
        left -= now;
    }
    let (kind, message) = read_reply(stream).error(413);
    assert_eq!(kind, "invalid_request_error");
    assert!(message.contains("1048576"), "{message}");
    // Just below the limit is read.
    let text = "a".repeat(1 << 19);
    assert_eq!(
        server
            .post("/completion", &json!({ "prompt": text }))
            .error(400)
            .0,
        "exceed_context_size_error"
    );
    // A body that stops coming.
    let mut stream = server.connect();
    write!(stream, "POST /completion HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{{\"prompt\"").expect("sent");
    assert_eq!(read_reply(stream).status, 408);
    // Many heads that never end hold nobody up.
    let slow: Vec<_> = (0..300)
        .map(|_| {
            let mut stream = server.connect();
            stream
                .write_all(b"POST /completion HTTP/1.1\r\nHost: x\r\nX-Slow: ")
                .expect("sent");
            stream
        })
        .collect();
    lives(&server);
    drop(slow);
    // A head that is too large, and one that is none.
    for head in [
        format!("GET /health HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(1 << 20)),
        "\u{1}\u{2}\u{3}\r\n\r\n".repeat(10),
    ] {
        let mut stream = server.connect();
        let _ = stream.write_all(head.as_bytes());
        let mut reply = Vec::new();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout");
        let _ = stream.read_to_end(&mut reply);
        let text = String::from_utf8_lossy(&reply);
        assert!(reply.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    lives(&server);
}

#[test]
fn grammars_that_mean_harm() {
    let server = Server::start("llama-tiny", &["-c", "512", "-np", "1", "-n", "8"]);
    let deep = (0..400).fold(
        json!({"type": "string"}),
        |inner, _| json!({"type": "array", "items": inner}),
    );
    let parens = format!("root ::= {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000));
    let schemas: Vec<Value> = vec![
        json!({"json_schema": deep}),
        json!({"json_schema": {"$ref": "#"}}),
        json!({"json_schema": {"$ref": "http://127.0.0.1:1/x"}}),
        json!({"json_schema": {"type": "string", "pattern": "((((a+)+)+)+)+$"}}),
        json!({"json_schema": {"type": "array", "minItems": 1_000_000_000}}),
        json!({"grammar": parens}),
        json!({"grammar": "root ::= root"}),
        json!({"grammar": "root ::= \"a\"{1000000000}"}),
        json!({"grammar": "root ::="}),
    ];
    for more in schemas {
        let mut body = more.clone();
        body["prompt"] = "x".into();
        let text = body.to_string();
        let reply = server.send("POST", "/completion", &[], text.as_bytes());
        let shown = &text[..text.len().min(60)];
        assert!(
            matches!(reply.status, 200 | 400 | 500),
            "{shown}: {}",
            reply.status
        );
        lives(&server);
    }
}

#[test]
fn mutated_bodies() {
    use rand::{RngExt, SeedableRng, rngs::StdRng};
    let server = Server::start("llama-tiny", &["-c", "512", "-np", "2", "-n", "3"]);
    let seeds = [
        (
            "/completion",
            json!({"prompt": ["a", 5, "b"], "n_predict": 2, "stop": ["x", "y"], "logit_bias": [[3, -1.5], ["a", false]], "stream": true, "samplers": "kt", "n_probs": 2}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]}],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}],
            "tool_choice": "required", "stream": true, "stream_options": {"include_usage": true}}),
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "u"}], "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"enum": [1, "a", null]}}}}}),
        ),
        (
            "/v1/messages",
            json!({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]}], "thinking": {"type": "enabled"}}),
        ),
        (
            "/v1/responses",
            json!({"input": [{"type": "function_call", "call_id": "c", "name": "n", "arguments": "{}"}, {"role": "user", "content": "x"}]}),
        ),
        (
            "/completion",
            json!({"prompt": "x", "grammar": "root ::= [a-z]+ (\" \" root)?", "memory": "window:window=8,sinks=1"}),
        ),
    ];
    let mut rng = StdRng::seed_from_u64(5);
    let parts: [&[u8]; 12] = [
        b"null",
        b"-1",
        b"1e400",
        b"\"",
        b"{",
        b"]",
        b"\xff",
        b"\\u0000",
        b"99999999999999999999",
        b"true",
        b"[[[[",
        b",,",
    ];
    for round in 0..600 {
        let (path, body) = &seeds[round % seeds.len()];
        let mut bytes = body.to_string().into_bytes();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..4) {
                0 => bytes[at] = rng.random(),
                1 => drop(bytes.drain(at..(at + 6).min(bytes.len()))),
                2 => {
                    let part = parts[rng.random_range(0..parts.len())];
                    bytes.splice(at..at, part.iter().copied());
                }
                _ => {
                    let end = (at + rng.random_range(1..30)).min(bytes.len());
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy);
                }
            }
            if bytes.is_empty() {
                bytes.push(b' ');
            }
        }
        let is_json = serde_json::from_slice::<Value>(&bytes).is_ok();
        let reply = server.send("POST", path, &[], &bytes);
        let shown = String::from_utf8_lossy(&bytes);
        match is_json {
            true => assert!(
                matches!(reply.status, 200 | 400),
                "{} {shown}: {}",
                reply.status,
                reply.text()
            ),
            false => assert_eq!(reply.error(500).0, "server_error", "{shown}"),
        }
    }
    lives(&server);
}
