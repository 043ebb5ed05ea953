//! Many clients at once: nobody's tokens get lost or mixed, nobody leaves a slot busy.

mod server;

use serde_json::{Value, json};
use server::Server;
use std::io::{BufRead, BufReader, Read, Write};
use std::thread;
use std::time::Duration;

fn request(i: usize, stream: bool) -> Value {
    let prompts = [
        "Write a very long book.",
        "What is",
        "The sky is blue and I love it.",
        "Hello",
    ];
    let long = "A sentence that goes before. ".repeat(i % 5 * 4);
    json!({
        "prompt": format!("{long}{}", prompts[i % prompts.len()]),
        "seed": i,
        "temperature": ([0.0, 0.7, 1.3][i % 3]),
        "n_predict": 8 + i % 17,
        "repeat_penalty": 1.1,
        "cache_prompt": i.is_multiple_of(2),
        "return_tokens": true,
        "stream": stream,
    })
}

fn tokens(events: &[Value]) -> Vec<u64> {
    let all = events
        .iter()
        .filter_map(|e| e["tokens"].as_array())
        .flatten();
    all.filter_map(Value::as_u64).collect()
}

#[test]
fn sixty_four_streams_equal_their_solo_runs() {
    let server = Server::start("llama-tiny", &["-c", "2048", "-np", "4", "-b", "64"]);
    let solo: Vec<Value> = (0..64)
        .map(|i| server.post("/completion", &request(i, false)).ok())
        .collect();
    let together: Vec<(String, Value)> = thread::scope(|scope| {
        let clients: Vec<_> = (0..64)
            .map(|i| {
                let server = &server;
                scope.spawn(move || {
                    let events = server.post("/completion", &request(i, true)).events();
                    let text = events
                        .iter()
                        .filter_map(|e| e["content"].as_str())
                        .collect();
                    assert!(!tokens(&events).is_empty());
                    (text, events.last().expect("events").clone())
                })
            })
            .collect();
        clients
            .into_iter()
            .map(|c| c.join().expect("no client fails"))
            .collect()
    });
    for (i, (alone, (text, last))) in solo.iter().zip(&together).enumerate() {
        assert_eq!(json!(text), alone["content"], "stream {i}");
        assert_eq!(
            last["tokens_predicted"], alone["tokens_predicted"],
            "stream {i}"
        );
        assert_eq!(last["stop_type"], alone["stop_type"], "stream {i}");
    }
    server.idle_within(Duration::from_secs(2));
}

#[test]
fn clients_that_leave_free_their_slots() {
    let server = Server::start("llama-tiny", &["-c", "4096", "-np", "2"]);
    let known = server.post("/completion", &request(1, false)).ok();
    let body =
        json!({"prompt": "Once upon a time", "n_predict": -1, "ignore_eos": true, "stream": true})
            .to_string();
    let whole =
        json!({"prompt": "Once upon a time", "n_predict": -1, "ignore_eos": true}).to_string();
    for i in 0..220 {
        let mut stream = server.connect();
        let body = if i % 4 == 3 { &whole } else { &body };
        write!(
            stream,
            "POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
        .expect("sent");
        match i % 4 {
            // In the middle of the body, before any answer, after some of it, while it waits.
            0 => stream.write_all(&body.as_bytes()[..10]).expect("sent"),
            1 => stream.write_all(body.as_bytes()).expect("sent"),
            2 => {
                stream.write_all(body.as_bytes()).expect("sent");
                let mut some = [0; 64];
                stream
                    .set_read_timeout(Some(Duration::from_millis(30)))
                    .expect("a timeout");
                // Both slots may be taken: then nothing comes yet.
                let _ = stream.read(&mut some);
            }
            _ => stream.write_all(body.as_bytes()).expect("sent"),
        }
    }
    server.idle_within(Duration::from_secs(5));
    let again = server.post("/completion", &request(1, false)).ok();
    assert_eq!(again["content"], known["content"]);
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let server = Server::start(
        "llama-tiny",
        &["-c", "4096", "-np", "2", "-b", "4", "-ub", "4"],
    );
    let long = json!({"prompt": "word and ".repeat(450), "n_predict": 1, "stream": true, "return_progress": true}).to_string();
    let mut stream = server.connect();
    write!(
        stream,
        "POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{long}",
        long.len()
    )
    .expect("sent");
    let mut lines = BufReader::new(stream).lines();
    let began = lines.find(|l| l.as_ref().is_ok_and(|l| l.contains("prompt_progress")));
    assert!(began.is_some());
    let body = json!({"prompt": "Hi", "n_predict": 4, "temperature": 0});
    let short = server.post("/completion", &body).ok();
    assert!(short["tokens_predicted"].as_u64() > Some(0));
    let slots = server.get("/slots").ok();
    let reading = slots
        .as_array()
        .expect("a list")
        .iter()
        .find(|s| s["is_processing"] == true);
    let reading = reading.expect("the long prompt is still being read");
    assert_eq!(reading["next_token"][0]["n_decoded"], 0);
    assert_eq!(
        server.post("/completion", &body).ok()["content"],
        short["content"]
    );
}

#[test]
fn too_many_are_turned_away() {
    let server = Server::start(
        "llama-tiny",
        &["-c", "2048", "-np", "1", "--max-waiting", "2"],
    );
    let body = json!({"prompt": "x", "n_predict": -1, "ignore_eos": true, "stream": true});
    thread::scope(|scope| {
        let clients: Vec<_> = (0..12)
            .map(|_| scope.spawn(|| server.post("/completion", &body)))
            .collect();
        let mut turned_away = 0;
        for client in clients {
            let reply = client.join().expect("no client fails");
            match reply.status {
                200 => {}
                _ => {
                    assert_eq!(reply.error(503).0, "unavailable_error");
                    assert_eq!(reply.header("retry-after"), Some("1"));
                    turned_away += 1;
                }
            }
        }
        assert!(turned_away > 0);
    });
    assert_eq!(server.get("/slots?fail_on_no_slot=1").status, 200);
    server
        .post("/completion", &json!({"prompt": "x", "n_predict": 2}))
        .ok();
}

#[test]
fn slots_that_share_a_pool() {
    let flags = ["-c", "256", "-np", "4", "-kvu"];
    let server = Server::start("llama-tiny", &flags);
    let run = |lengths: [usize; 4]| -> Vec<u16> {
        thread::scope(|scope| {
            let clients: Vec<_> = lengths
                .iter()
                .map(|n| {
                    let body = json!({"prompt": "A", "n_predict": n, "ignore_eos": true});
                    scope.spawn(|| {
                        let body = body;
                        server.post("/completion", &body).status
                    })
                })
                .collect();
            clients
                .into_iter()
                .map(|c| c.join().expect("no client fails"))
                .collect()
        })
    };
    // One alone may use all of it.
    let all = json!({"prompt": "A", "n_predict": 240, "ignore_eos": true});
    assert_eq!(
        server.post("/completion", &all).ok()["tokens_predicted"],
        240
    );
    assert_eq!(run([40, 40, 40, 40]), [200; 4]);
    let statuses = run([200, 200, 200, 200]);
    assert!(statuses.contains(&500), "{statuses:?}");
    server.idle_within(Duration::from_secs(2));
    assert_eq!(run([20, 20, 20, 20]), [200; 4]);
}

#[test]
fn kill_while_saving_leaves_the_old_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().to_str().expect("UTF-8");
    let flags = ["-c", "2048", "-np", "1", "--slot-save-path", path];
    let body = json!({"prompt": "word and ".repeat(400), "n_predict": 2});
    let name = json!({"filename": "s.bin"});
    for round in 0..4 {
        let mut server = Server::start("llama-tiny", &flags);
        if round > 0 {
            let restored = server.post("/slots/0?action=restore", &name).ok();
            assert!(restored["n_restored"].as_u64() > Some(600));
        }
        server.post("/completion", &body).ok();
        server.post("/slots/0?action=save", &name).ok();
        thread::scope(|scope| {
            let saving = scope.spawn(|| {
                loop {
                    // Ends when the server is killed.
                    let Ok(mut stream) = std::net::TcpStream::connect(&server.address) else {
                        return;
                    };
                    let text = name.to_string();
                    let head = format!("POST /slots/0?action=save HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{text}", text.len());
                    let mut reply = Vec::new();
                    if stream.write_all(head.as_bytes()).is_err() || stream.read_to_end(&mut reply).is_err() {
                        return;
                    }
                }
            });
            thread::sleep(Duration::from_millis(15 + 17 * round));
            server.signal("KILL");
            saving.join().expect("it returns");
        });
        let _ = server.child.wait();
    }
    let server = Server::start("llama-tiny", &flags);
    server.post("/slots/0?action=restore", &name).ok();
}
