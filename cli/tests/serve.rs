//! The protocols on the wire, against the real program.

mod server;

use serde_json::{Value, json};
use server::Server;

const PROMPT: &str = "The capital of France";

fn tiny(flags: &[&str]) -> Server {
    let mut all = vec![
        "-c", "512", "-np", "2", "-n", "24", "--seed", "42", "--alias", "tiny",
    ];
    all.extend(flags);
    Server::start("llama-tiny", &all)
}

#[test]
fn native_completion() {
    let server = tiny(&[]);
    let body = json!({"prompt": PROMPT, "n_predict": 8, "temperature": 0});
    let reply = server.post("/completion", &body);
    assert_eq!(
        reply.header("content-type"),
        Some("application/json; charset=utf-8")
    );
    assert_eq!(reply.header("server"), Some("llama.cpp"));
    let whole = reply.ok();
    assert_eq!(whole["stop"], true);
    assert_eq!(whole["tokens"], json!([]));
    assert_eq!(whole["stop_type"], "limit");
    assert_eq!(whole["truncated"], false);
    assert_eq!(whole["model"], "tiny");
    assert_eq!(whole["generation_settings"]["seed"], 42);
    assert_eq!(whole["generation_settings"]["n_predict"], 8);
    let t = &whole["timings"];
    assert_eq!(t["predicted_n"], 8);
    assert_eq!(t["cache_n"], 0);
    assert_eq!(t["prompt_n"], whole["tokens_evaluated"]);
    // llama.cpp's clients expect numbers only; a memory that is asked for is named.
    for (name, value) in t.as_object().expect("an object") {
        assert!(value.is_number(), "{name}: {value}");
    }
    let mut named = body.clone();
    named["memory"] = "full".into();
    let named = server.post("/completion", &named).ok();
    assert_eq!(named["timings"]["memory"]["name"], "full");
    assert!(whole["prompt"].as_str().expect("text").ends_with(PROMPT));

    // Streamed it is the same text, and the end carries everything else.
    let mut body = body;
    body["stream"] = true.into();
    let reply = server.post("/completion", &body);
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    assert_eq!(reply.header("x-accel-buffering"), Some("no"));
    assert!(!reply.text().contains("[DONE]"));
    let events = reply.events();
    let (last, parts) = events.split_last().expect("events");
    let text: String = parts.iter().filter_map(|e| e["content"].as_str()).collect();
    assert_eq!(json!(text), whole["content"]);
    for part in parts {
        assert_eq!(part["stop"], false);
        assert!(!part["tokens"].as_array().expect("ids").is_empty());
    }
    assert_eq!(last["content"], "");
    // The prompt was known but for its last token.
    assert_eq!(last["timings"]["prompt_n"], 1);
    assert_eq!(
        last["timings"]["cache_n"].as_u64(),
        whole["tokens_evaluated"].as_u64().map(|n| n - 1)
    );
}

#[test]
fn prompts_in_every_form() {
    let server = tiny(&[]);
    let ids = server
        .post(
            "/tokenize",
            &json!({"content": PROMPT, "add_special": true}),
        )
        .ok();
    let ids = ids["tokens"].clone();
    let ask = |prompt: Value| {
        let body =
            json!({"prompt": prompt, "n_predict": 6, "temperature": 0, "cache_prompt": false});
        server.post("/completion", &body)
    };
    let text = ask(json!(PROMPT)).ok();
    assert_eq!(ask(ids.clone()).ok()["content"], text["content"]);
    assert_eq!(
        ask(json!({"prompt_string": PROMPT})).ok()["content"],
        text["content"]
    );
    let batch = ask(json!([ids, PROMPT])).ok();
    let batch = batch.as_array().expect("a list");
    assert_eq!(batch.len(), 2);
    for (i, one) in batch.iter().enumerate() {
        assert_eq!(one["index"], i);
        assert_eq!(one["content"], text["content"]);
    }
    assert!(ask(json!([1, 2, PROMPT, 3])).ok()["content"].is_string());
    assert!(ask(json!("")).ok()["content"].is_string());
    for bad in [
        json!([]),
        json!([9999999]),
        json!([-1]),
        json!({"x": 1}),
        json!(true),
        json!([[]]),
    ] {
        assert_eq!(
            ask(bad.clone()).error(400).0,
            "invalid_request_error",
            "{bad}"
        );
    }
    let (kind, _) = server.post("/completion", &json!({})).error(400);
    assert_eq!(kind, "invalid_request_error");
}

#[test]
fn stop_strings_probabilities_and_fields() {
    let server = tiny(&[]);
    let body = json!({"prompt": PROMPT, "n_predict": 16, "temperature": 0, "return_tokens": true, "n_probs": 3});
    let whole = server.post("/completion", &body).ok();
    let text = whole["content"].as_str().expect("text");
    let probs = whole["completion_probabilities"]
        .as_array()
        .expect("a list");
    assert_eq!(probs.len(), 16);
    for p in probs {
        assert_eq!(p["top_logprobs"].as_array().expect("a list").len(), 3);
        // Greedy: the token itself is the likeliest.
        assert_eq!(p["top_logprobs"][0]["id"], p["id"]);
        assert!(p["logprob"].as_f64().expect("a number") <= 0.0);
    }
    assert_eq!(whole["tokens"].as_array().expect("ids").len(), 16);

    // A stop string in the middle of the text never shows, streamed or not.
    let at = text
        .char_indices()
        .map(|c| c.0)
        .nth(text.chars().count() / 2)
        .expect("text");
    let end = text[at..]
        .char_indices()
        .map(|c| c.0)
        .nth(2)
        .map_or(text.len(), |n| at + n);
    let word = &text[at..end];
    let cut = &text[..text.find(word).expect("it is there")];
    for stream in [false, true] {
        let body = json!({"prompt": PROMPT, "n_predict": 16, "temperature": 0, "stop": [word], "stream": stream});
        let reply = server.post("/completion", &body);
        let (shown, last) = match stream {
            false => {
                let whole = reply.ok();
                (whole["content"].as_str().expect("text").to_owned(), whole)
            }
            true => {
                let events = reply.events();
                let text = events
                    .iter()
                    .filter_map(|e| e["content"].as_str())
                    .collect();
                (text, events.last().expect("events").clone())
            }
        };
        assert_eq!(shown, cut);
        assert_eq!(last["stop_type"], "word");
        assert_eq!(last["stopping_word"], word);
    }

    let body = json!({"prompt": PROMPT, "n_predict": 2, "response_fields": ["content", "generation_settings/n_predict"]});
    let some = server.post("/completion", &body).ok();
    assert_eq!(some.as_object().expect("an object").len(), 2);
    assert_eq!(some["generation_settings/n_predict"], 2);

    let body = json!({"prompt": PROMPT, "n_predict": 4, "n_probs": 5, "post_sampling_probs": true});
    let post = server.post("/completion", &body).ok();
    for p in post["completion_probabilities"].as_array().expect("a list") {
        let prob = p["prob"].as_f64().expect("a number");
        assert!(prob > 0.0 && prob <= 1.0);
        assert!(p["top_probs"].is_array());
    }
}

#[test]
fn field_limits() {
    let server = tiny(&[]);
    let ask = |field: &str, value: Value| {
        let mut body = json!({"prompt": PROMPT, "n_predict": 1});
        body[field] = value;
        server.post("/completion", &body)
    };
    for (field, value) in [
        ("n_predict", json!(-2)),
        ("n_predict", json!("many")),
        ("repeat_last_n", json!(-2)),
        ("mirostat", json!(3)),
        ("stop", json!(7)),
        ("stream", json!("yes")),
        ("temperature", json!("hot")),
        ("n", json!(99)),
        ("n", json!(0)),
        ("logit_bias", json!(5)),
        ("samplers", json!(1)),
        ("memory", json!("nothing-like-this")),
        ("memory", json!("window:what=1")),
        ("memory", json!(4)),
        ("grammar", json!("this is no grammar")),
    ] {
        let (kind, message) = ask(field, value.clone()).error(400);
        assert_eq!(kind, "invalid_request_error", "{field} {value}");
        assert!(
            field == "grammar" || message.contains(&format!("'{field}'")),
            "{message}"
        );
    }
    for (field, value, shown) in [
        ("temperature", json!(-1), json!(0.0)),
        ("top_p", json!(7), json!(1.0)),
        ("top_k", json!(-5), json!(0)),
        ("min_p", json!(-1), json!(0.0)),
        ("temperature", json!(null), json!(0.8)),
        ("top_k", json!(1e300), json!(2147483647)),
        ("seed", json!(-1), json!(4294967295u32)),
        ("nonsense", json!({"a": 1}), json!(null)),
    ] {
        let settings = &ask(field, value).ok()["generation_settings"];
        assert_eq!(settings[field], shown, "{field}");
    }
    // The server's own limit stands in for none; a request may ask for another.
    for (asked, expected) in [(-1, 24), (26, 26)] {
        let body = json!({"prompt": PROMPT, "max_tokens": asked, "ignore_eos": true});
        let reply = server.post("/completion", &body).ok();
        assert_eq!(reply["generation_settings"]["n_predict"], expected);
        assert_eq!(reply["tokens_predicted"], expected);
    }
    // Zero still yields one token.
    let body = json!({"prompt": PROMPT, "n_predict": 0});
    assert_eq!(
        server.post("/completion", &body).ok()["tokens_predicted"],
        1
    );
}

#[test]
fn seeds_and_biases() {
    let server = tiny(&[]);
    let ask = |more: Value| {
        let mut body =
            json!({"prompt": PROMPT, "n_predict": 12, "temperature": 1.5, "return_tokens": true});
        for (key, value) in more.as_object().expect("fields") {
            body[key] = value.clone();
        }
        server.post("/completion", &body).ok()["tokens"].clone()
    };
    let one = ask(json!({"seed": 7, "cache_prompt": false}));
    assert_eq!(one, ask(json!({"seed": 7, "cache_prompt": true})));
    assert_ne!(one, ask(json!({"seed": 8})));
    let first = one[0].clone();
    for bias in [json!([[first, false]]), json!({first.to_string(): -1000})] {
        let other = ask(json!({"seed": 7, "logit_bias": bias}));
        assert!(!other.as_array().expect("ids").contains(&first));
    }
    let body = json!({"prompt": PROMPT, "n_predict": 1, "ignore_eos": true});
    let reply = server.post("/completion", &body).ok();
    let biases = reply["generation_settings"]["logit_bias"]
        .as_array()
        .expect("a list");
    assert!(!biases.is_empty() && biases.iter().all(|b| b["bias"].is_null()));
}

#[test]
fn context_ends() {
    let server = Server::start("llama-tiny", &["-c", "128", "-np", "2"]);
    let (kind, message) = server
        .post("/completion", &json!({"prompt": "x ".repeat(200)}))
        .error(400);
    assert_eq!(kind, "exceed_context_size_error");
    assert!(message.contains("exceeds the available context size"));
    let body = json!({"messages": [{"role": "user", "content": "x ".repeat(200)}], "stream": true});
    let reply = server.post("/chat/completions", &body);
    assert_eq!(reply.error(400).0, "exceed_context_size_error");
    let error = &reply.json()["error"];
    assert_eq!(error["n_ctx"], 64);
    assert!(error["n_prompt_tokens"].as_u64() > Some(64));

    let body = json!({"prompt": PROMPT, "ignore_eos": true});
    let reply = server.post("/completion", &body).ok();
    assert_eq!(
        (&reply["truncated"], &reply["stop_type"]),
        (&json!(true), &json!("limit"))
    );
    let t = &reply["timings"];
    assert_eq!(
        t["prompt_n"]
            .as_u64()
            .zip(t["predicted_n"].as_u64())
            .map(|(a, b)| a + b),
        Some(64)
    );

    let server = Server::start("llama-tiny", &["-c", "64", "-np", "1", "--context-shift"]);
    let body = json!({"prompt": PROMPT, "ignore_eos": true, "n_predict": 100, "n_keep": 4});
    let reply = server.post("/completion", &body).ok();
    assert_eq!(
        (&reply["truncated"], &reply["tokens_predicted"]),
        (&json!(true), &json!(100))
    );
}

#[test]
fn tokens_there_and_back() {
    let server = tiny(&[]);
    let text = "What is the capital of France ? 媽 🤗";
    let ids = server.post("/tokenize", &json!({"content": text})).ok();
    let back = server.post("/detokenize", &ids).ok();
    assert_eq!(back["content"].as_str().map(str::trim), Some(text));
    let with = server
        .post("/tokenize", &json!({"content": text, "with_pieces": true}))
        .ok();
    for token in with["tokens"].as_array().expect("a list") {
        assert!(token["piece"].is_string() || token["piece"].is_array());
    }
    assert_eq!(
        server.post("/tokenize", &json!({})).ok(),
        json!({"tokens": []})
    );
    let mixed = server
        .post("/tokenize", &json!({"content": [1, "a", 2]}))
        .ok();
    assert_eq!(mixed["tokens"][0], 1);
}

#[test]
fn openai_completion() {
    let server = tiny(&[]);
    let body = json!({"prompt": PROMPT, "max_tokens": 6, "temperature": 0});
    let whole = server.post("/v1/completions", &body).ok();
    assert_eq!(whole["object"], "text_completion");
    assert!(whole["id"].as_str().expect("id").starts_with("chatcmpl-"));
    assert!(
        whole["system_fingerprint"]
            .as_str()
            .expect("text")
            .starts_with('b')
    );
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["choices"][0]["logprobs"], Value::Null);
    assert_eq!(whole["usage"]["completion_tokens"], 6);
    let total = whole["usage"]["prompt_tokens"].as_u64().map(|n| n + 6);
    assert_eq!(whole["usage"]["total_tokens"].as_u64(), total);

    let mut body = body;
    body["stream"] = true.into();
    let reply = server.post("/v1/completions", &body);
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
    let events = reply.events();
    let text: String = events
        .iter()
        .filter_map(|e| e["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(json!(text), whole["choices"][0]["text"]);
    let last = events.last().expect("events");
    assert_eq!(last["usage"]["completion_tokens"], 6);
    assert_eq!(last["choices"][0]["finish_reason"], "length");

    let body = json!({"prompt": [PROMPT, "Hello"], "max_tokens": 3, "n": 2, "logprobs": 2});
    let many = server.post("/v1/completions", &body).ok();
    let choices = many["choices"].as_array().expect("a list");
    assert_eq!(choices.len(), 4);
    for (i, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], i);
        assert_eq!(
            choice["logprobs"]["content"]
                .as_array()
                .expect("a list")
                .len(),
            3
        );
    }
}

fn chat_body(more: Value) -> Value {
    let mut body = json!({
        "max_tokens": 8,
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "Book"},
            {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "best?"}]},
        ],
    });
    for (key, value) in more.as_object().expect("fields") {
        body[key] = value.clone();
    }
    body
}

#[test]
fn openai_chat() {
    let server = tiny(&[]);
    let whole = server
        .post("/v1/chat/completions", &chat_body(json!({})))
        .ok();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "tiny");
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert!(choice["message"].get("tool_calls").is_none());

    let more = json!({"stream": true, "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2});
    let reply = server.post("/chat/completions", &chat_body(more));
    assert!(reply.text().ends_with("data: [DONE]\n\n"));
    let events = reply.events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": null})
    );
    assert!(events.iter().all(|e| e["id"] == events[0]["id"]));
    let last = events.last().expect("events");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        whole["usage"].clone().tap_cached(&last["usage"])
    );
    assert!(last["timings"]["predicted_n"].is_number());
    let end = &events[events.len() - 2]["choices"][0];
    assert_eq!(
        (&end["delta"], &end["finish_reason"]),
        (&json!({}), &choice["finish_reason"])
    );
    let mut text = String::new();
    let mut said = String::new();
    for event in &events[1..events.len() - 2] {
        let choice = &event["choices"][0];
        let part = choice["delta"]["content"].as_str().expect("content");
        assert!(!part.is_empty());
        text += part;
        for token in choice["logprobs"]["content"].as_array().expect("a list") {
            said += token["token"].as_str().expect("text");
        }
    }
    assert_eq!(json!(text), choice["message"]["content"]);
    assert_eq!(text, said);

    let two = server
        .post(
            "/chat/completions",
            &chat_body(json!({"n": 2, "temperature": 1.0})),
        )
        .ok();
    assert_eq!(two["choices"].as_array().expect("a list").len(), 2);
    let verbose = server
        .post("/chat/completions", &chat_body(json!({"verbose": true})))
        .ok();
    let prompt = verbose["__verbose"]["prompt"].as_str().expect("text");
    assert!(prompt.contains("What is\nbest?"), "{prompt}");
    let applied = server.post("/apply-template", &chat_body(json!({}))).ok();
    assert!(prompt.ends_with(applied["prompt"].as_str().expect("text")));
}

/// Compares usage but for the tokens that were known.
trait TapCached {
    fn tap_cached(self, other: &Value) -> Value;
}

impl TapCached for Value {
    fn tap_cached(mut self, other: &Value) -> Value {
        self["prompt_tokens_details"] = other["prompt_tokens_details"].clone();
        self
    }
}

#[test]
fn chats_that_are_refused() {
    let server = tiny(&["--no-jinja"]);
    let user = json!({"role": "user", "content": "x"});
    let assistant = json!({"role": "assistant", "content": "x"});
    for messages in [
        json!(null),
        json!("string"),
        json!([123]),
        json!([{}]),
        json!([{"role": 123}]),
        json!([{"role": "system", "content": 123}]),
        json!([{"role": "system", "content": "x"}, {}]),
        json!([{"role": "user"}]),
        json!([user, assistant, assistant]),
        json!([{"role": "user", "content": [{"type": "sound"}]}]),
    ] {
        let reply = server.post("/chat/completions", &json!({ "messages": messages }));
        assert_eq!(reply.error(400).0, "invalid_request_error", "{messages}");
    }
    for more in [
        json!({"response_format": {"type": "sound"}}),
        json!({"response_format": {"type": "json_object", "schema": 123}}),
        json!({"response_format": {"type": "json_object", "schema": {"type": 123}}}),
        json!({"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}}),
        json!({"top_logprobs": 3}),
        json!({"add_generation_prompt": true, "continue_final_message": true}),
        json!({"grammar": "root ::= \"a\"", "json_schema": {}}),
    ] {
        let reply = server.post("/chat/completions", &chat_body(more.clone()));
        assert_eq!(reply.error(400).0, "invalid_request_error", "{more}");
    }
    let image =
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    let (kind, message) = server
        .post("/chat/completions", &json!({ "messages": image }))
        .error(500);
    assert_eq!(kind, "server_error");
    assert!(message.contains("image input is not supported"));
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let reply = server.post("/chat/completions", &chat_body(json!({ "tools": tools })));
    assert!(reply.status >= 400);
}

#[test]
fn assistant_messages_are_continued() {
    let server = tiny(&["--chat-template", "llama3", "-v"]);
    let parts = json!([{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]);
    for (content, begun) in [(json!("Whill"), "Whill"), (parts, "Wh\n\nill")] {
        let body = json!({"max_tokens": 2, "messages": [
            {"role": "user", "content": "Hey"},
            {"role": "assistant", "content": content},
        ]});
        let reply = server.post("/chat/completions", &body).ok();
        let prompt = reply["__verbose"]["prompt"].as_str().expect("text");
        assert!(
            prompt.ends_with(&format!(
                "<|start_header_id|>assistant<|end_header_id|>\n\n{begun}"
            )),
            "{prompt}"
        );
    }
}

#[test]
fn answers_in_a_language() {
    let server = tiny(&["-n", "64", "-c", "2048"]);
    let said = |more: Value| {
        let reply = server.post("/chat/completions", &chat_body(more)).ok();
        reply["choices"][0]["message"]["content"]
            .as_str()
            .expect("text")
            .to_owned()
    };
    assert_eq!(said(json!({"json_schema": {"const": "42"}})), "\"42\"");
    let format = json!({"type": "json_schema", "json_schema": {"schema": {"const": "foooooo"}}});
    assert_eq!(
        said(json!({"response_format": format, "max_tokens": 40})),
        "\"foooooo\""
    );
    assert_eq!(said(json!({"grammar": "root ::= \"a\"{5,5}"})), "aaaaa");
    let object = said(
        json!({"response_format": {"type": "json_object"}, "max_tokens": 64, "temperature": 0.5}),
    );
    assert!(object.trim_start().starts_with('{'), "{object}");
    let body = json!({"prompt": PROMPT, "grammar": "root ::= (\"yes\" | \"no\")", "stream": true});
    let events = server.post("/completion", &body).events();
    let text: String = events
        .iter()
        .filter_map(|e| e["content"].as_str())
        .collect();
    assert!(text == "yes" || text == "no", "{text}");
    let body = json!({"prompt": PROMPT, "regex": "(ab|cd){3}", "max_tokens": 20});
    let text = server.post("/completion", &body).ok()["content"].clone();
    let text = text
        .as_str()
        .expect("text")
        .replace("ab", "")
        .replace("cd", "");
    assert_eq!(text, "");
    let lark = "%llguidance {}\nstart: \"x\" \"y\"";
    let body = json!({"prompt": PROMPT, "grammar": lark, "max_tokens": 20});
    assert_eq!(server.post("/completion", &body).ok()["content"], "xy");
    // A tool that must be called is called.
    let tools = json!([{"type": "function", "function": {"name": "test", "parameters": {
        "type": "object", "properties": {"success": {"type": "boolean", "const": true}}, "required": ["success"]}}}]);
    for stream in [false, true] {
        let more =
            json!({"tools": tools, "tool_choice": "required", "max_tokens": 64, "stream": stream});
        let reply = server.post("/chat/completions", &chat_body(more));
        if stream {
            let events = reply.events();
            let calls: Vec<&Value> = events
                .iter()
                .map(|e| &e["choices"][0]["delta"]["tool_calls"][0])
                .filter(|c| c.is_object())
                .collect();
            assert_eq!(calls[0]["function"]["name"], "test");
            assert!(calls[0]["id"].is_string());
            let arguments: String = calls
                .iter()
                .filter_map(|c| c["function"]["arguments"].as_str())
                .collect();
            assert_eq!(
                serde_json::from_str::<Value>(&arguments).expect("JSON"),
                json!({"success": true})
            );
        } else {
            let reply = reply.ok();
            let message = &reply["choices"][0]["message"];
            assert_eq!(message["tool_calls"][0]["function"]["name"], "test");
            assert_eq!(reply["choices"][0]["finish_reason"], "tool_calls");
        }
    }
}

#[test]
fn progress_of_a_prompt() {
    let server = Server::start("llama-tiny", &["-c", "256", "-np", "1", "-b", "32"]);
    let body = json!({"messages": [{"role": "user", "content": "This is a test".repeat(10)}],
        "max_tokens": 4, "stream": true, "return_progress": true});
    for round in 0..2 {
        let events = server.post("/chat/completions", &body).events();
        let all: Vec<&Value> = events
            .iter()
            .filter_map(|e| e.get("prompt_progress"))
            .collect();
        let (first, last) = (all[0], all[all.len() - 1]);
        assert_eq!(first["cache"], first["processed"]);
        assert_eq!(last["processed"], last["total"]);
        assert_eq!(first["cache"].as_u64() > Some(0), round == 1);
        let done: Vec<u64> = all.iter().filter_map(|p| p["processed"].as_u64()).collect();
        assert!(done.windows(2).all(|w| w[0] < w[1]), "{done:?}");
    }
}

#[test]
fn responses_and_messages() {
    let server = tiny(&[]);
    let body = json!({"input": "Write an example", "max_output_tokens": 6, "temperature": 0});
    let whole = server.post("/v1/responses", &body).ok();
    assert!(whole["id"].as_str().expect("id").starts_with("resp_"));
    let item = &whole["output"][0];
    assert!(item["id"].as_str().expect("id").starts_with("msg_"));
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = server.post("/v1/responses", &streamed).events();
    let kinds: Vec<&str> = events.iter().filter_map(|e| e["type"].as_str()).collect();
    assert_eq!(
        kinds[..4],
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added"
        ]
    );
    assert_eq!(kinds.last(), Some(&"response.completed"));
    let text: String = events
        .iter()
        .filter(|e| e["type"] == "response.output_text.delta")
        .filter_map(|e| e["delta"].as_str())
        .collect();
    assert_eq!(json!(text), item["content"][0]["text"]);
    let last = &events.last().expect("events")["response"];
    assert_eq!(last["output"][0]["content"][0]["text"], json!(text));
    assert!(
        server
            .post(
                "/v1/responses",
                &json!({"input": "x", "previous_response_id": "y"})
            )
            .status
            == 400
    );

    let body = json!({"max_tokens": 6, "temperature": 0, "system": "S", "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "tool_result", "tool_use_id": "t", "content": "c"}]},
    ]});
    let whole = server.post("/v1/messages", &body).ok();
    assert_eq!(
        (&whole["type"], &whole["content"][0]["type"]),
        (&json!("message"), &json!("text"))
    );
    assert!(whole.get("timings").is_none());
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = server.post("/v1/messages", &streamed).events();
    let kinds: Vec<&str> = events.iter().filter_map(|e| e["type"].as_str()).collect();
    assert_eq!(kinds.first(), Some(&"message_start"));
    assert_eq!(
        kinds[kinds.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    let text: String = events
        .iter()
        .filter_map(|e| e["delta"]["text"].as_str())
        .collect();
    assert_eq!(json!(text), whole["content"][0]["text"]);
    assert!(
        server.post("/v1/messages/count_tokens", &body).ok()["input_tokens"].as_u64() > Some(0)
    );
    assert!(
        server
            .post("/v1/messages", &json!({"max_tokens": 1}))
            .status
            >= 400
    );
    server
        .post("/v1/messages", &json!({"max_tokens": 1, "messages": []}))
        .ok();
}
