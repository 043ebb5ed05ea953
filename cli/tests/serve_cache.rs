//! Prompts that leave their slots: kept in host memory, taken up again, bounded.

mod server;

use serde_json::{Value, json};
use server::Server;

const FIRST: &str =
    "One thing. Another thing, and more of it! A third? A fourth thing comes after the third one. ";
const SECOND: &str =
    "Nothing of this was there before: quite other words, in another order, about other things. ";

fn ask(server: &Server, prompt: &str) -> Value {
    let body = json!({"prompt": prompt, "n_predict": 6, "temperature": 0, "ignore_eos": true});
    server.post("/completion", &body).ok()
}

fn cached(reply: &Value) -> u64 {
    reply["timings"]["cache_n"].as_u64().expect("a number")
}

fn gauge(server: &Server, name: &str) -> f64 {
    let text = server.get("/metrics").text();
    let row = text
        .lines()
        .find_map(|l| l.strip_prefix(&format!("mneme:prompt_cache_{name} ")));
    row.expect(name).parse().expect("a number")
}

#[test]
fn every_memory_takes_up_what_left_its_slot() {
    for (fixture, memory, exact) in [
        ("llama-tiny", "full", true),
        ("llama-tiny", "window:window=16,sinks=2", true),
        ("ahn-gdn-tiny", "ahn", false),
        ("nodes-linear", "nodes", false),
        ("gist-llama", "gist", false),
    ] {
        let flags = ["-c", "2048", "-np", "1", "--metrics", "--memory", memory];
        let server = Server::start(fixture, &flags);
        let (first, second) = (FIRST.repeat(4), SECOND.repeat(4));
        let own = ask(&server, &first);
        let n = own["timings"]["prompt_n"].as_u64().expect("a number");
        // The token that every text begins with is known.
        assert!(cached(&ask(&server, &second)) < 2, "{memory}");
        assert_eq!(gauge(&server, "entries"), 1.0, "{memory}");
        let again = ask(&server, &first);
        assert_eq!(cached(&again), n - 1, "{memory}");
        assert_eq!(again["content"], own["content"], "{memory}");
        assert_eq!(gauge(&server, "hits_total"), 1.0, "{memory}");
        // Away once more, and on from there.
        assert!(cached(&ask(&server, &second)) > 0, "{memory}");
        let longer = format!("{first}And on it goes.");
        let on = ask(&server, &longer);
        assert!(cached(&on) > n / 2, "{memory}: {} of {n}", cached(&on));
        if exact {
            let fresh = Server::start(fixture, &[&flags[..], &["--cache-ram", "0"]].concat());
            assert_eq!(ask(&fresh, &longer)["content"], on["content"], "{memory}");
        }
    }
}

#[test]
fn a_text_that_parts_from_a_kept_one_leaves_it_there() {
    let server = Server::start("llama-tiny", &["-c", "2048", "-np", "1", "--metrics"]);
    let (one, other) = (format!("{FIRST}{}", SECOND.repeat(3)), FIRST.repeat(4));
    let n = ask(&server, &one)["timings"]["prompt_n"].as_u64();
    ask(
        &server,
        "Something short that pushes the first text out of its only slot.",
    );
    // It shares only the beginning with what is kept.
    let part = cached(&ask(&server, &other));
    assert!(part > 0 && Some(part) < n, "{part} of {n:?}");
    assert_eq!(Some(cached(&ask(&server, &one)) + 1), n);
}

#[test]
fn the_cache_is_bounded_and_can_be_off() {
    let flags = ["-c", "1024", "-np", "1", "--metrics", "--cache-ram"];
    let server = Server::start("llama-tiny", &[&flags[..], &["1"]].concat());
    for i in 0..120 {
        ask(&server, &format!("{i} {i} {i}: {FIRST}"));
    }
    assert_eq!(gauge(&server, "limit_bytes"), f64::from(1 << 20));
    assert!(gauge(&server, "bytes") <= f64::from(1 << 20));
    assert!(gauge(&server, "evicted_total") > 0.0);
    assert!(gauge(&server, "entries") > 1.0);
    let props = server.get("/props").ok();
    assert_eq!(props["prompt_cache"]["limit_bytes"], 1 << 20);
    assert!(props["prompt_cache"]["tokens"].as_u64() > Some(0));
    // The last ones are there, the first ones are not.
    assert!(cached(&ask(&server, &format!("118 118 118: {FIRST}"))) > 16);
    assert!(cached(&ask(&server, &format!("0 0 0: {FIRST}"))) < 16);

    let server = Server::start("llama-tiny", &[&flags[..], &["0"]].concat());
    for _ in 0..2 {
        assert!(cached(&ask(&server, &FIRST.repeat(2))) < 2);
        ask(&server, &SECOND.repeat(2));
    }
    assert_eq!(gauge(&server, "entries"), 0.0);
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(["serve", "-m", "x.gguf", "--cache-ram", "-2"])
        .output()
        .expect("the program starts");
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("--cache-ram"));
}

#[test]
fn an_erased_slot_is_forgotten_and_a_turned_one_is_not_kept() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().to_str().expect("a path");
    // Slots that share one pool are kept as soon as another one starts.
    let server = Server::start(
        "llama-tiny",
        &["-c", "2048", "--slot-save-path", path, "--metrics"],
    );
    let at = |slot: u32, prompt: &str| {
        let body = json!({"prompt": prompt, "n_predict": 2, "id_slot": slot});
        server.post("/completion", &body).ok()
    };
    at(0, FIRST);
    at(1, SECOND);
    assert_eq!(gauge(&server, "entries"), 1.0);
    let erased = server.post("/slots/0?action=erase", &json!({})).ok();
    assert!(erased["n_erased"].as_u64() > Some(16));
    assert_eq!(gauge(&server, "entries"), 0.0);
    assert!(cached(&ask(&server, FIRST)) < 16);

    let server = Server::start("nodes-linear", &["-c", "2048", "-np", "1", "--metrics"]);
    ask(&server, &FIRST.repeat(3));
    server.post("/slots/0/memory", &json!({"tau": 1})).ok();
    ask(&server, &SECOND.repeat(3));
    assert_eq!(gauge(&server, "entries"), 0.0);
    assert!(cached(&ask(&server, &FIRST.repeat(3))) < 16);
}
