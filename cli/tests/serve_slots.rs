//! Slots, memories, keys, sockets and signals, against the real program.

mod server;

use serde_json::{Value, json};
use server::{Server, model, read_reply};
use std::io::{Read, Write};
use std::time::Duration;

const PROMPT: &str = "The capital of France";

fn tiny(flags: &[&str]) -> Server {
    let mut all = vec![
        "-c", "512", "-np", "2", "-n", "24", "--seed", "42", "--alias", "tiny",
    ];
    all.extend(flags);
    Server::start("llama-tiny", &all)
}

#[test]
fn keys_origins_and_unknown_paths() {
    let server = Server::start("llama-tiny", &["-c", "256", "--api-key", "one,two"]);
    for open in ["/health", "/v1/health", "/", "/bundle.js", "/bundle.css"] {
        assert_eq!(server.get(open).status, 200, "{open}");
    }
    for closed in ["/v1/models", "/props", "/slots", "/nothing"] {
        let (kind, message) = server.get(closed).error(401);
        assert_eq!(
            (kind.as_str(), message.as_str()),
            ("authentication_error", "Invalid API Key")
        );
    }
    let with = |name: &str, value: &str| {
        server
            .send("GET", "/v1/models", &[(name, value)], b"")
            .status
    };
    assert_eq!(with("Authorization", "Bearer two"), 200);
    assert_eq!(with("Authorization", "one"), 200);
    assert_eq!(with("X-Api-Key", "one"), 200);
    assert_eq!(with("X-Api-Key", "on"), 401);
    assert_eq!(with("Authorization", "Bearer "), 401);

    let origin = [
        ("Origin", "https://example.org"),
        ("Access-Control-Request-Method", "POST"),
    ];
    let reply = server.send("OPTIONS", "/completions", &origin, b"");
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    assert_eq!(
        reply.header("access-control-allow-origin"),
        Some("https://example.org")
    );
    assert_eq!(
        reply.header("access-control-allow-credentials"),
        Some("true")
    );
    assert_eq!(
        reply.header("access-control-allow-methods"),
        Some("GET, POST, DELETE, OPTIONS")
    );
    assert_eq!(reply.header("access-control-allow-headers"), Some("*"));

    let server = Server::start(
        "llama-tiny",
        &[
            "-c",
            "256",
            "--no-ui",
            "--no-slots",
            "--cors-origins",
            "localhost",
        ],
    );
    for (method, path) in [
        ("GET", "/nothing"),
        ("GET", "/"),
        ("GET", "/completion"),
        ("DELETE", "/health"),
        ("POST", "/slots/0/nothing"),
    ] {
        let (kind, message) = server.send(method, path, &[], b"").error(404);
        assert_eq!(
            (kind.as_str(), message.as_str()),
            ("not_found_error", "File Not Found"),
            "{method} {path}"
        );
    }
    for (origin, allowed) in [
        ("http://localhost:3000", true),
        ("http://127.0.0.1", true),
        ("https://evil.example", false),
        ("http://localhost.evil.example", false),
    ] {
        let reply = server.send("GET", "/health", &[("Origin", origin)], b"");
        assert_eq!(
            reply.header("access-control-allow-origin").is_some(),
            allowed,
            "{origin}"
        );
    }
    for (path, flag) in [("/slots", "--slots"), ("/metrics", "--metrics")] {
        let (kind, message) = server.get(path).error(501);
        assert_eq!(kind, "not_supported_error");
        assert!(message.contains(flag));
    }
    for (path, flag) in [
        ("/embedding", "--embeddings"),
        ("/v1/rerank", "--reranking"),
        ("/props", "--props"),
        ("/slots/0?action=save", "--slot-save-path"),
    ] {
        let (kind, message) = server.post(path, &json!({})).error(501);
        assert_eq!(kind, "not_supported_error");
        assert!(message.contains(flag), "{message}");
    }
    assert_eq!(
        server
            .post(
                "/infill",
                &json!({"input_prefix": "a", "input_suffix": "b"})
            )
            .error(501)
            .0,
        "not_supported_error"
    );
}

#[test]
fn models_and_properties() {
    let server = tiny(&["--tags", "x,y", "--alias", "b,a"]);
    let models = server.get("/v1/models").ok();
    let model = &models["data"][0];
    assert_eq!(
        (&model["id"], &model["aliases"]),
        (&json!("a"), &json!(["a", "b"]))
    );
    assert_eq!(model["tags"], json!(["x", "y"]));
    assert_eq!(model["meta"]["n_ctx"], 256);
    let props = server.get("/props").ok();
    assert_eq!(props["total_slots"], 2);
    assert_eq!(props["default_generation_settings"]["n_ctx"], 256);
    assert_eq!(props["default_generation_settings"]["params"]["seed"], 42);
    assert!(
        props["model_path"]
            .as_str()
            .expect("text")
            .ends_with(".gguf")
    );
    assert_eq!(props["memory"]["name"], "full");
    assert!(
        props["chat_template"]
            .as_str()
            .expect("text")
            .contains("start_header_id")
    );
}

#[test]
fn every_route_is_described_and_every_description_answers() {
    let server = tiny(&["--metrics", "--props"]);
    let document = server.get("/openapi.json").ok();
    let mut n = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        for method in operations.as_object().expect("operations").keys() {
            n += 1;
            let path = path.replace("{id}", "0");
            let reply = server.send(&method.to_uppercase(), &path, &[], b"{}");
            assert_ne!(reply.status, 404, "{method} {path}");
        }
    }
    assert!(n > 40, "{n} operations");
    for name in ["n_predict", "temperature", "stop", "memory", "max_tokens"] {
        assert!(
            document["components"]["schemas"]["Generation"]["properties"][name].is_object(),
            "{name}"
        );
    }
}

#[test]
fn slots_files_and_memory() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().to_str().expect("UTF-8");
    let server = tiny(&["--slot-save-path", path, "--metrics"]);
    let fresh = server.get("/slots").ok();
    assert_eq!(fresh.as_array().expect("a list").len(), 2);
    assert!(fresh[0].get("params").is_none());
    let ask = |slot: usize, prompt: &str| {
        let body = json!({"prompt": prompt, "id_slot": slot, "temperature": 0, "n_predict": 8, "ignore_eos": true});
        server.post("/completion", &body).ok()
    };
    let first = ask(1, "What is the capital of France?");
    assert_eq!(first["id_slot"], 1);
    let n = first["tokens_evaluated"].as_u64().expect("a number") + 7;
    let saved = server
        .post("/slots/1?action=save", &json!({"filename": "slot1.bin"}))
        .ok();
    assert_eq!(
        (&saved["n_saved"], &saved["id_slot"]),
        (&json!(n), &json!(1))
    );
    let size = std::fs::metadata(dir.path().join("slot1.bin"))
        .expect("a file")
        .len();
    assert_eq!(saved["n_written"], size);
    let changed = ask(1, "What is the capital of Germany?");
    let restored = server
        .post("/slots/0?action=restore", &json!({"filename": "slot1.bin"}))
        .ok();
    assert_eq!(
        (&restored["n_restored"], &restored["n_read"]),
        (&json!(n), &json!(size))
    );
    // The same part is read again from the restored slot, and the text is the same.
    let again = ask(0, "What is the capital of Germany?");
    assert_eq!(again["timings"]["prompt_n"], changed["timings"]["prompt_n"]);
    assert_eq!(again["content"], changed["content"]);
    let view = server.get("/slots").ok();
    assert_eq!(view[0]["next_token"][0]["n_remain"], -1);
    assert!(view[0]["params"]["temperature"].is_number());
    let erased = server.post("/slots/0?action=erase", &json!({})).ok();
    assert_eq!(erased["n_erased"], again["tokens_cached"]);
    assert_eq!(
        ask(0, "What is the capital of Germany?")["timings"]["cache_n"],
        0
    );

    for bad in ["../evil.bin", "sub/evil.bin", "..", ""] {
        for action in ["save", "restore"] {
            let reply = server.post(
                &format!("/slots/0?action={action}"),
                &json!({ "filename": bad }),
            );
            assert_eq!(reply.error(400).1, "Invalid filename", "{bad}");
        }
    }
    assert_eq!(
        server
            .post("/slots/abc?action=save", &json!({"filename": "x"}))
            .error(400)
            .1,
        "Invalid slot ID"
    );
    assert_eq!(
        server
            .post("/slots/-1?action=save", &json!({"filename": "x"}))
            .error(400)
            .1,
        "Invalid slot ID"
    );
    assert_eq!(
        server
            .post("/slots/0?action=frob", &json!({"filename": "x"}))
            .error(400)
            .1,
        "Invalid action"
    );
    // A broken file is refused and changes nothing.
    let file = dir.path().join("slot1.bin");
    let bytes = std::fs::read(&file).expect("the file");
    for broken in [&bytes[..16], &bytes[..bytes.len() - 1], &[][..]] {
        std::fs::write(dir.path().join("broken.bin"), broken).expect("written");
        let reply = server.post(
            "/slots/0?action=restore",
            &json!({"filename": "broken.bin"}),
        );
        assert!(reply.error(400).1.contains("Unable to restore slot"));
    }
    assert_eq!(
        server
            .post(
                "/slots/0?action=restore",
                &json!({"filename": "absent.bin"})
            )
            .status,
        400
    );

    let metrics = server.get("/metrics");
    assert_eq!(
        metrics.header("content-type"),
        Some("text/plain; version=0.0.4")
    );
    assert!(metrics.header("process-start-time-unix").is_some());
    let text = metrics.text();
    for name in [
        "llamacpp:prompt_tokens_total",
        "llamacpp:tokens_predicted_total",
        "llamacpp:requests_processing",
        "mneme:memory_bytes{slot=\"0\",memory=\"full\"}",
    ] {
        let row = text.lines().find(|l| l.starts_with(name)).expect(name);
        assert!(
            row.rsplit(' ')
                .next()
                .expect("a value")
                .parse::<f64>()
                .is_ok(),
            "{row}"
        );
    }
    assert!(
        !dir.path()
            .parent()
            .expect("a parent")
            .join("evil.bin")
            .exists()
    );
}

#[test]
fn memories_over_the_wire() {
    let server = Server::start("nodes-linear", &["-c", "2048", "-np", "2"]);
    let props = server.get("/props").ok();
    assert_eq!(props["memory"]["name"], "nodes");
    let prompt = "One thing. Another thing, and more of it! A third? ".repeat(8);
    let ask = |memory: Option<&str>| {
        let mut body = json!({"prompt": prompt, "n_predict": 4, "temperature": 0});
        if let Some(memory) = memory {
            body["memory"] = memory.into();
        }
        server.post("/completion", &body).ok()
    };
    let own = ask(None);
    assert_eq!(own["timings"]["memory"]["name"], "nodes");
    let slot = own["id_slot"].as_u64().expect("a number");
    let view = server.get(&format!("/slots/{slot}/memory?text")).ok();
    let nodes = view["nodes"].as_array().expect("a list");
    assert_eq!(json!(nodes.len()), own["timings"]["memory"]["nodes"]);
    for node in nodes {
        assert!(node["start"].as_u64() < node["end"].as_u64());
        assert!(node["text"].is_string());
    }
    // The same again: most of it is known through a remembered state, and the answer is the same.
    let again = ask(None);
    assert_eq!(again["content"], own["content"]);
    assert_eq!(again["timings"]["prompt_n"], 1);
    // Another memory, and back.
    let window = ask(Some("window:window=16,sinks=2"));
    assert_eq!(window["timings"]["memory"]["name"], "window");
    assert!(window["timings"]["memory"]["cells"].as_u64() < own["tokens_evaluated"].as_u64());
    assert_eq!(ask(None)["content"], own["content"]);
    let full = ask(Some("full"));
    assert_eq!(full["timings"]["memory"]["name"], "full");
    assert_eq!(
        server
            .post("/completion", &json!({"prompt": "x", "memory": "ahn"}))
            .error(400)
            .0,
        "invalid_request_error"
    );
    assert_eq!(
        server.get("/slots/9/memory").error(400).1,
        "Invalid slot ID"
    );
}

#[test]
fn dials_turn_without_reading_again() {
    let server = Server::start("nodes-linear", &["-c", "2048", "-np", "1"]);
    let first = "One thing. Another thing, and more of it! A third? ".repeat(6);
    let ask = |prompt: &str| {
        let body = json!({"prompt": prompt, "n_predict": 2, "temperature": 0, "ignore_eos": true});
        server.post("/completion", &body).ok()
    };
    let nodes = |reply: &Value| {
        reply["timings"]["memory"]["nodes"]
            .as_f64()
            .expect("a number")
    };
    let read = |reply: &Value| reply["timings"]["prompt_n"].as_f64().expect("a number");
    let own = ask(&first);
    let own_rate = nodes(&own) / read(&own);
    let set = server.post("/slots/0/memory", &json!({"tau": 1.0})).ok();
    assert_eq!(set["stats"]["tau"], 1.0);
    assert_eq!(set["stats"]["nodes"].as_f64(), Some(nodes(&own)));
    // What is known stays known; with tau 1 only segments that grow too long are cut.
    let more = format!("{first}{}", "More of the same, and on it goes. ".repeat(12));
    let rare = ask(&more);
    assert!(rare["timings"]["cache_n"].as_u64() > Some(0));
    assert!(nodes(&rare) - nodes(&own) < 0.7 * own_rate * read(&rare));
    // With tau 0 every segment that is long enough is.
    server.post("/slots/0/memory", &json!({"tau": 0})).ok();
    let often = ask(&format!("{more}And a few more words, and some after them."));
    assert!(often["timings"]["cache_n"].as_u64() > rare["timings"]["prompt_n"].as_u64());
    assert!(nodes(&often) - nodes(&rare) > 1.5 * own_rate * read(&often));
    for (body, part) in [
        (json!({"tau": 2}), "outside"),
        (json!({"tau": "x"}), "tau"),
        (json!({"what": 1}), "dial"),
        (json!({}), "dials"),
        (json!([1]), "dials"),
    ] {
        let message = server.post("/slots/0/memory", &body).error(400).1;
        assert!(message.contains(part), "{message}");
    }
    let nobody = server.post("/slots/7/memory", &json!({"tau": 0.5}));
    assert_eq!(nobody.error(400).1, "Invalid slot ID");
}

#[test]
fn loading_signals_and_sockets() {
    // A model that is none: status 1.
    let dir = tempfile::tempdir().expect("a folder");
    let bad = dir.path().join("bad.gguf");
    std::fs::write(&bad, b"GGUF but not really").expect("written");
    let mut server = Server::launch(&bad, &[]);
    assert_eq!(server.child.wait().expect("it ends").code(), Some(1));
    // A port that is taken: status 1.
    let server = tiny(&[]);
    let port = server.address.rsplit(':').next().expect("a port");
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(["serve", "--port", port, "-m"])
        .arg(model("llama-tiny"))
        .output()
        .expect("it runs");
    assert_eq!(out.status.code(), Some(1));
    // A flag that is none: status 1, named.
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(["serve", "--frobnicate"])
        .output()
        .expect("it runs");
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("error: invalid argument: --frobnicate"));
    // A signal: status 0, even while an answer is being written.
    let mut server = server;
    let mut stream = server.connect();
    let body =
        json!({"prompt": PROMPT, "n_predict": -1, "ignore_eos": true, "stream": true}).to_string();
    write!(
        stream,
        "POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sent");
    let mut some = [0; 16];
    stream.read_exact(&mut some).expect("it answers");
    server.signal("TERM");
    assert_eq!(server.child.wait().expect("it ends").code(), Some(0));

    // A Unix socket, and its removal.
    let path = dir.path().join("s.sock");
    let mut server = Server::launch(
        &model("llama-tiny"),
        &["--host", path.to_str().expect("UTF-8"), "-c", "256"],
    );
    let reply = loop {
        let mut stream = std::os::unix::net::UnixStream::connect(&path).expect("it listens");
        stream
            .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .expect("sent");
        let reply = read_reply(stream);
        if reply.status == 200 {
            break reply;
        }
        // Until the model is there, every route says so.
        assert_eq!(
            reply.error(503),
            ("unavailable_error".into(), "Loading model".into())
        );
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(reply.json(), json!({"status": "ok"}));
    server.signal("INT");
    assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
    assert!(!path.exists());
}

#[test]
fn a_prompt_known_to_another_slot_is_not_read_again() {
    let long = "The same long beginning of every prompt. ".repeat(4);
    not_read_again(&tiny(&["-n", "-1"]), &long);
    // Of which the memory holds fewer cells.
    let flags = [
        "-c",
        "2048",
        "-np",
        "2",
        "-n",
        "-1",
        "--concept-cache",
        "none",
    ];
    let server = Server::start("concepts-qwen2", &flags);
    not_read_again(&server, &format!("<|context|>{long}<|/context|> What?"));
}

fn not_read_again(server: &Server, prompt: &str) {
    let body = json!({"prompt": prompt, "ignore_eos": true, "stream": true, "temperature": 0});
    let mut stream = server.connect();
    let text = body.to_string();
    write!(
        stream,
        "POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{text}",
        text.len()
    )
    .expect("sent");
    let mut some = [0; 512];
    stream.read_exact(&mut some).expect("it answers");
    let body = json!({"prompt": prompt, "n_predict": 6, "temperature": 0});
    let other = server.post("/completion", &body).ok();
    assert_eq!(other["timings"]["prompt_n"], 1);
    drop(stream);
    server.idle_within(Duration::from_secs(2));
    let body = json!({"prompt": prompt, "n_predict": 6, "temperature": 0, "cache_prompt": false});
    let anew = server.post("/completion", &body).ok();
    assert_eq!(anew["content"], other["content"]);
    assert_eq!(anew["timings"]["cache_n"], 0);
}

#[test]
fn answers_to_one_prompt_share_its_reading() {
    let server = tiny(&["-np", "4", "-c", "2048", "--metrics"]);
    let body = json!({"prompt": PROMPT, "n": 4, "max_tokens": 10, "temperature": 1.5, "seed": 3, "cache_prompt": false});
    let many = server.post("/v1/completions", &body).ok();
    let many = many["choices"].as_array().expect("a list");
    assert_eq!(many.len(), 4);
    let read = |server: &Server| {
        let text = server.get("/metrics").text();
        let row = text
            .lines()
            .find(|l| l.starts_with("llamacpp:prompt_tokens_total "));
        row.and_then(|r| r.rsplit(' ').next()?.parse::<u64>().ok())
            .expect("a number")
    };
    let once = read(&server);
    // Answer i is what seed 3 + i says alone.
    for (i, answer) in many.iter().enumerate() {
        let body = json!({"prompt": PROMPT, "max_tokens": 10, "temperature": 1.5, "seed": 3 + i, "cache_prompt": false});
        let alone = server.post("/v1/completions", &body).ok();
        assert_eq!(alone["choices"][0]["text"], answer["text"], "answer {i}");
    }
    assert_eq!(read(&server), 5 * once);
}

/// A context part of a chat: compressed under `concepts`, once for all slots and for the next server; text under
/// another memory. A prompt that ends in an open context is the client's mistake.
#[test]
fn contexts_in_requests() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().to_str().unwrap();
    let start = || {
        let flags = [
            "-c",
            "1024",
            "-np",
            "2",
            "-n",
            "4",
            "--concept-cache",
            cache,
        ];
        Server::start("concepts-qwen2", &flags)
    };
    let ask = |server: &Server, question: &str, more: Value| {
        let mut body = json!({"temperature": 0, "cache_prompt": false, "messages": [{"role": "user", "content": [
            {"type": "context", "text": "Ann is at the old mill. Her code <|/context|> is 417. The well is dry."},
            {"type": "text", "text": question},
        ]}]});
        let more = more.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(more);
        server.post("/v1/chat/completions", &body).ok()
    };
    let entries = || std::fs::read_dir(dir.path()).unwrap().count();
    let server = start();
    let one = ask(&server, "Where is Ann?", json!({}));
    let memory = &one["timings"]["memory"];
    assert_eq!(memory["name"], "concepts");
    let (nodes, dropped) = (memory["nodes"].as_u64(), memory["dropped"].as_u64());
    assert!(nodes > Some(1) && dropped > Some(20), "{memory}");
    assert_eq!(entries() as u64, nodes.unwrap());
    ask(&server, "And her code?", json!({}));
    assert_eq!(entries() as u64, nodes.unwrap(), "the same segments");
    let full = ask(&server, "Where is Ann?", json!({"memory": "full"}));
    assert_eq!(full["timings"]["memory"]["nodes"], 0);
    let body = json!({"prompt": "What is<|context|>this", "n_predict": 3});
    let (_, message) = server.post("/completion", &body).error(400);
    assert!(message.contains("context that is open"), "{message}");
    drop(server);
    let again = ask(&start(), "Where is Ann?", json!({}));
    assert_eq!(again["choices"][0]["message"], one["choices"][0]["message"]);
    assert_eq!(entries() as u64, nodes.unwrap());
}
