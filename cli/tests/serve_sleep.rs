//! A server that lets its model go when nobody uses it, and one that speaks a cloud's protocol.

mod server;

use serde_json::{Value, json};
use server::{Server, model};
use std::time::{Duration, Instant};

fn is_sleeping(server: &Server) -> bool {
    server.get("/props").ok()["is_sleeping"] == true
}

#[track_caller]
fn wait_for_sleep(server: &Server) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_sleeping(server) {
        assert!(Instant::now() < deadline, "the server stays awake");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn counter(server: &Server, name: &str) -> f64 {
    let text = server.get("/metrics").text();
    let name = format!("llamacpp:{name} ");
    let found = text.lines().find_map(|l| l.strip_prefix(&name));
    found.expect(&name).parse().expect("a number")
}

#[test]
fn a_server_that_nobody_uses_lets_its_model_go() {
    let flags = ["-c", "256", "-np", "2", "--metrics", "--alias", "tiny"];
    let server = Server::start(
        "qwen2-tiny",
        &[&flags[..], &["--sleep-idle-seconds", "1"]].concat(),
    );
    let body =
        json!({"prompt": [5, 6, 7], "n_predict": 8, "temperature": 0, "return_tokens": true});
    let before = server.post("/completion", &body).ok();
    assert_eq!(counter(&server, "tokens_predicted_total"), 8.0);
    let props = server.get("/props").ok();
    assert_eq!(props["is_sleeping"], false);
    wait_for_sleep(&server);

    // What needs no model is answered, and wakes nobody.
    assert_eq!(server.get("/health").ok()["status"], "ok");
    let models = server.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], "tiny");
    let asleep = server.get("/props").ok();
    for (name, value) in props.as_object().expect("an object") {
        // Slots were in use in between.
        if !["is_sleeping", "memory"].contains(&name.as_str()) {
            assert_eq!(&asleep[name], value, "{name}");
        }
    }
    assert_eq!(counter(&server, "tokens_predicted_total"), 8.0);
    assert_eq!(server.get("/").status, 200);
    assert_eq!(server.get("/openapi.json").status, 200);
    assert_eq!(server.get("/nothing").status, 404);
    assert!(is_sleeping(&server));

    // Several wake it together; the answer is the one it gave before.
    let replies: Vec<Value> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| server.post("/completion", &body).ok()))
            .collect();
        asked
            .into_iter()
            .map(|t| t.join().expect("an answer"))
            .collect()
    });
    for reply in &replies {
        assert_eq!(reply["tokens"], before["tokens"]);
    }
    assert!(!is_sleeping(&server));
    // It counts on from where it was.
    assert_eq!(counter(&server, "tokens_predicted_total"), 40.0);

    wait_for_sleep(&server);
    let tokens = server.post("/tokenize", &json!({"content": "hello"})).ok();
    assert!(!tokens["tokens"].as_array().expect("a list").is_empty());
    assert!(!is_sleeping(&server));
}

#[test]
fn a_server_that_cannot_wake_says_why_and_tries_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let (path, aside) = (dir.path().join("model.gguf"), dir.path().join("aside"));
    std::fs::copy(model("qwen2-tiny"), &path).expect("a copy");
    let server = Server::launch(
        &path,
        &["-c", "64", "-np", "1", "--sleep-idle-seconds", "1"],
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.get("/health").status != 200 {
        assert!(Instant::now() < deadline, "the server never became ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    wait_for_sleep(&server);
    std::fs::rename(&path, &aside).expect("moved");
    let body = json!({"content": "hello"});
    let (kind, message) = server.post("/tokenize", &body).error(500);
    assert!(
        kind == "server_error" && message.contains("model.gguf"),
        "{message}"
    );
    assert!(is_sleeping(&server));
    std::fs::rename(&aside, &path).expect("moved back");
    server.post("/tokenize", &body).ok();
    assert!(!is_sleeping(&server));
}

#[test]
fn instances_are_requests_of_other_routes() {
    let env = [("AIP_MODE", "PREDICTION"), ("AIP_PREDICT_ROUTE", "/ask")];
    let server = Server::launch_in(&model("qwen2-tiny"), &["-c", "256", "-np", "2"], &env);
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.get("/health").status != 200 {
        assert!(Instant::now() < deadline, "the server never became ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    let chat = json!({
        "@requestFormat": "chatCompletions", "max_tokens": 4, "stream": true,
        "messages": [{"role": "user", "content": "hello"}],
    });
    let reply = server.post(
        "/ask",
        &json!({"instances": [
            chat,
            {"@requestFormat": "/tokenize", "content": "hello"},
            {"@requestFormat": "no such"},
            {"@requestFormat": "detokenize", "tokens": "wrong"},
            7,
        ]}),
    );
    let reply = reply.ok();
    let all = reply["predictions"].as_array().expect("a list");
    assert_eq!(all.len(), 5);
    assert_eq!(all[0]["choices"][0]["message"]["role"], "assistant");
    assert_eq!(
        all[1]["tokens"],
        server.post("/tokenize", &json!({"content": "hello"})).ok()["tokens"]
    );
    for wrong in &all[2..] {
        assert_eq!(wrong["error"]["code"], 400, "{wrong}");
    }
    server.post("/ask", &json!({"instances": 1})).error(400);
    server.post("/ask", &json!([])).error(400);
    let many = vec![json!({}); 200];
    server.post("/ask", &json!({"instances": many})).error(400);

    let plain = Server::start("qwen2-tiny", &["-c", "64", "-np", "1"]);
    plain.post("/predict", &json!({"instances": []})).error(404);
    plain.get("/cors-proxy?url=http://127.0.0.1/").error(403);
    plain
        .post("/tools", &json!({"tool": "read_file"}))
        .error(403);
}
