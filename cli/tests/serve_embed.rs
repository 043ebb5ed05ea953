//! Embeddings and reranking over the wire.

mod server;

use mneme_engine::ops::Cpu;
use mneme_engine::{Engine, Feed, LoadOptions, Model, SequenceOptions, Want};
use serde_json::{Value, json};
use server::{Server, model};

const TEXTS: [&str; 3] = ["The sky is blue.", "A", "Grass, which is green"];

fn vector(value: &Value) -> Vec<f32> {
    let numbers = value.as_array().expect("a vector").iter();
    numbers
        .map(|x| x.as_f64().expect("a number") as f32)
        .collect()
}

fn length(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Hidden states of `ids`, straight from the engine.
fn hidden(fixture: &str, ids: &[u32]) -> Vec<Vec<f32>> {
    let ops = Cpu::new(1);
    let model = Model::load(&model(fixture), &LoadOptions::default(), &ops, |_, _| {});
    let model = model.expect("the fixture loads");
    let n_embd = model.hparams().n_embd;
    let mut engine = Engine::new(model, ops, 512);
    let memory = "full".parse().expect("a memory");
    let seq = engine.sequence(&memory, SequenceOptions::default());
    let (seq, tokens, want) = (&mut seq.expect("a sequence"), ids, Want::Hidden);
    let rows = engine.step(&mut [Feed { seq, tokens, want }]);
    let rows = rows.expect("the tokens fit").remove(0);
    rows.chunks_exact(n_embd).map(<[f32]>::to_vec).collect()
}

fn ids(server: &Server, text: &str) -> Vec<u32> {
    let body = json!({"content": text, "add_special": true});
    let reply = server.post("/tokenize", &body).ok();
    let ids = reply["tokens"].as_array().expect("a list").iter();
    ids.map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn embeddings_are_the_pooled_hidden_states() {
    for (flag, pool) in [
        (
            "last",
            (|rows| rows[rows.len() - 1].clone()) as fn(&[Vec<f32>]) -> Vec<f32>,
        ),
        ("cls", |rows| rows[0].clone()),
        ("mean", |rows| {
            let mean =
                |i| rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / rows.len() as f64;
            (0..rows[0].len()).map(|i| mean(i) as f32).collect()
        }),
    ] {
        let flags = [
            "--embeddings",
            "--pooling",
            flag,
            "-c",
            "256",
            "-np",
            "2",
            "-b",
            "3",
        ];
        let server = Server::start("llama-tiny", &flags);
        let reply = server
            .post("/v1/embeddings", &json!({"input": TEXTS, "model": "mine"}))
            .ok();
        assert_eq!(reply["object"], "list");
        assert_eq!(reply["model"], "mine");
        let data = reply["data"].as_array().expect("a list");
        assert_eq!(data.len(), TEXTS.len());
        let mut n = 0;
        for (i, (entry, text)) in data.iter().zip(TEXTS).enumerate() {
            assert_eq!(
                (&entry["index"], &entry["object"]),
                (&json!(i), &json!("embedding"))
            );
            let ids = ids(&server, text);
            n += ids.len();
            let expected = pool(&hidden("llama-tiny", &ids));
            let size = length(&expected);
            let got = vector(&entry["embedding"]);
            assert!((length(&got) - 1.0).abs() < 1e-6);
            for (got, expected) in got.iter().zip(&expected) {
                assert!((f64::from(*got) - f64::from(*expected) / size).abs() < 1e-6);
            }
            // Twice is the same, whatever is known by now; unscaled it has its own length.
            let body = json!({"content": text, "embd_normalize": -1});
            let native = server.post("/embedding", &body).ok();
            assert_eq!(native[0]["index"], 0);
            assert_eq!(vector(&native[0]["embedding"][0]), expected, "{flag}");
        }
        assert_eq!(
            reply["usage"],
            json!({"prompt_tokens": n, "total_tokens": n})
        );
        // Generation goes on beside it.
        let body = json!({"prompt": "A", "n_predict": 3, "ignore_eos": true});
        assert_eq!(
            server.post("/completion", &body).ok()["tokens_predicted"],
            3
        );
    }
}

#[test]
fn forms_of_embedding_requests() {
    let flags = ["--embeddings", "--metrics", "-c", "64", "-np", "1"];
    let server = Server::start("llama-tiny", &flags);
    let ask = |body: &Value| server.post("/v1/embeddings", body);
    let whole = vector(&ask(&json!({"input": "hello world"})).ok()["data"][0]["embedding"]);
    let parts = json!([{"type": "text", "text": "hello "}, {"type": "text", "text": "world"}]);
    for same in [
        json!({"prompt_string": "hello world"}),
        json!({"content": parts}),
        json!(ids(&server, "hello world")),
        json!([["hello world"]]),
    ] {
        let reply = ask(&json!({"input": same})).ok();
        assert_eq!(vector(&reply["data"][0]["embedding"]), whole, "{same}");
    }
    let coded = ask(&json!({"input": "hello world", "encoding_format": "base64"})).ok();
    let text = coded["data"][0]["embedding"].as_str().expect("text");
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = (text.trim_end_matches('=').chars())
        .flat_map(|c| {
            let value = letters.find(c).expect("a letter of base64") as u8;
            (0..6).rev().map(move |i| value >> i & 1)
        })
        .collect();
    let bytes: Vec<u8> = (bits.chunks_exact(8))
        .map(|b| b.iter().fold(0, |byte, bit| byte << 1 | bit))
        .collect();
    let (words, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    let decoded: Vec<f32> = words.iter().map(|w| f32::from_le_bytes(*w)).collect();
    assert_eq!(decoded, whole);

    // Many texts take their turns; a body of them does not fill the queue.
    let many: Vec<String> = (0..150).map(|i| format!("text {}", i % 7)).collect();
    let reply = ask(&json!({"input": many})).ok();
    let data = reply["data"].as_array().expect("a list");
    assert_eq!(data.len(), 150);
    for i in 7..150 {
        assert_eq!(data[i]["embedding"], data[i - 7]["embedding"]);
    }

    for (bad, part) in [
        (json!({}), "must be provided"),
        (json!({"input": []}), "must not be empty"),
        (json!({"input": {"content": "text"}}), "content"),
        (
            json!({"input": {"content": [{"type": "unknown"}]}}),
            "content",
        ),
        (json!({"input": [{"no": 1}]}), "input"),
        (
            json!({"input": "x", "encoding_format": "hex"}),
            "encoding_format",
        ),
        (
            json!({"input": "x", "embd_normalize": "long"}),
            "embd_normalize",
        ),
    ] {
        let (kind, message) = ask(&bad).error(400);
        assert_eq!(kind, "invalid_request_error");
        assert!(message.contains(part), "{bad}: {message}");
    }
    let image = json!({"input": {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}});
    assert!(ask(&image).error(500).1.contains("image input"));
    let long = ask(&json!({"input": "word ".repeat(200)})).error(500);
    assert!(long.1.contains("too large to process"), "{}", long.1);
    let metrics = server.get("/metrics").text();
    assert!(
        metrics.contains("\nllamacpp:tokens_predicted_total 0\n"),
        "{metrics}"
    );
    assert!(
        !metrics.contains("\nllamacpp:prompt_tokens_total 0\n"),
        "{metrics}"
    );
}

#[test]
fn without_pooling_every_token_has_a_vector() {
    let flags = ["--embeddings", "--pooling", "none", "-c", "64", "-np", "1"];
    let server = Server::start("llama-tiny", &flags);
    let body = json!({"input": TEXTS[0]});
    let reply = server.post("/embeddings", &body).ok();
    let rows = reply[0]["embedding"].as_array().expect("rows");
    let expected = hidden("llama-tiny", &ids(&server, TEXTS[0]));
    assert_eq!(rows.len(), expected.len());
    for (row, expected) in rows.iter().zip(expected) {
        assert_eq!(vector(row), expected);
    }
    let (_, message) = server.post("/v1/embeddings", &body).error(400);
    assert!(message.contains("Pooling type 'none'"));
}

#[test]
fn what_is_off_says_so() {
    let server = Server::start("llama-tiny", &["-c", "64"]);
    for (path, flag) in [
        ("/v1/embeddings", "--embeddings"),
        ("/embedding", "--embeddings"),
        ("/rerank", "--reranking"),
    ] {
        let (kind, message) = server.post(path, &json!({"input": "x"})).error(501);
        assert_eq!(kind, "not_supported_error");
        assert!(message.contains(flag), "{message}");
    }
}

/// `fixture` with a classifier of two outputs on top; returns the model and the classifier.
fn reranker(fixture: &str, dir: &std::path::Path) -> (std::path::PathBuf, Vec<Vec<f32>>) {
    use mneme_engine::gguf::{Gguf, GgufWriter, Value};
    let base = Gguf::open(&model(fixture)).expect("the fixture");
    let n_embd = base.tensor("output_norm.weight").expect("a norm").dims[0];
    let head: Vec<Vec<f32>> = [0.13, 0.29]
        .map(|a: f32| (0..n_embd).map(|i| (a * (i as f32 + 1.0)).sin()).collect())
        .into();
    let mut writer = GgufWriter::new();
    for (key, value) in base.keys() {
        writer.set(key, value.clone());
    }
    let template = "query: {query} document: {document}";
    writer.set("tokenizer.chat_template.rerank", Value::from(template));
    for t in base.tensors() {
        writer.tensor(&t.name, &t.dims, t.ty).expect("a tensor");
    }
    let f32_type = base.tensor("output_norm.weight").expect("a norm").ty;
    (writer.tensor("cls.output.weight", &[n_embd, 2], f32_type)).expect("a tensor");
    let path = dir.join("reranker.gguf");
    let mut sink = writer.create(&path, false).expect("a file");
    for t in base.tensors() {
        sink.tensor(&t.name, base.data(t)).expect("data");
    }
    let bytes: Vec<u8> = head
        .iter()
        .flatten()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    sink.tensor("cls.output.weight", &bytes).expect("data");
    sink.finish().expect("the file is complete");
    (path, head)
}

#[test]
fn reranking_orders_documents_by_the_classifier() {
    let dir = tempfile::tempdir().expect("a folder");
    let (path, head) = reranker("qwen3-tiny", dir.path());
    let server = Server::launch(&path, &["--reranking", "-c", "512", "-np", "2"]);
    while server.get("/health").status != 200 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let query = "What is {document}?";
    let mut n = 0;
    let mut expected: Vec<(usize, f64)> = (TEXTS.iter().enumerate())
        .map(|(i, text)| {
            let prompt = format!("query: {query} document: {text}");
            let body = json!({"content": prompt, "add_special": false});
            let reply = server.post("/tokenize", &body).ok();
            let ids = reply["tokens"].as_array().expect("a list").iter();
            let ids: Vec<u32> = ids.map(|id| id.as_u64().expect("an id") as u32).collect();
            n += ids.len();
            let h = hidden("qwen3-tiny", &ids).pop().expect("a row");
            let dot = |w: &Vec<f32>| {
                (w.iter().zip(&h))
                    .map(|(w, h)| f64::from(w * h))
                    .sum::<f64>()
            };
            (i, 1.0 / (1.0 + (dot(&head[1]) - dot(&head[0])).exp()))
        })
        .collect();
    expected.sort_by(|a, b| b.1.total_cmp(&a.1));
    let body = json!({"query": query, "documents": TEXTS});
    let reply = server.post("/v1/rerank", &body).ok();
    assert_eq!(reply["usage"]["prompt_tokens"], n);
    let results = reply["results"].as_array().expect("a list");
    assert_eq!(results.len(), 3);
    for (result, (index, score)) in results.iter().zip(&expected) {
        assert_eq!(result["index"], *index);
        let got = result["relevance_score"].as_f64().expect("a number");
        assert!((got - score).abs() < 1e-5, "{got} {score}");
    }
    let body = json!({"query": query, "texts": TEXTS, "top_n": 1, "return_text": true});
    let one = server.post("/rerank", &body).ok();
    assert_eq!(one.as_array().expect("a list").len(), 1);
    assert_eq!(one[0]["text"], TEXTS[expected[0].0]);
    assert!(one[0]["score"].is_number());
    for documents in [json!([]), json!(null), json!(123), json!([1, 2])] {
        let body = json!({"query": query, "documents": documents});
        assert!(
            server
                .post("/rerank", &body)
                .error(400)
                .1
                .contains("documents")
        );
    }
    assert!(
        server
            .post("/rerank", &json!({"documents": TEXTS}))
            .error(400)
            .1
            .contains("query")
    );
}

#[test]
fn a_model_without_a_classifier_cannot_rerank() {
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(["serve", "--port", "0", "--reranking", "-m"])
        .arg(model("llama-tiny"))
        .output()
        .expect("the program starts");
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("cls.output.weight"), "{text}");
}
