//! `mneme run`.

use crate::{json, mneme, model, on, piped, stdout, text};
use std::io::Read;
use std::process::Stdio;

const PROMPT: &str = "The quick brown fox. It jumps over the lazy dog! And then? Nothing at all.";

#[test]
fn a_seed_names_an_answer() {
    let run = |seed: &str| {
        json(on(
            "qwen2-tiny",
            "run",
            &[
                "-p",
                PROMPT,
                "-n",
                "12",
                "-s",
                seed,
                "--ignore-eos",
                "--json",
            ],
        ))
    };
    let (a, b, c) = (run("1"), run("1"), run("2"));
    assert_eq!(a["tokens"], b["tokens"]);
    assert_ne!(a["tokens"], c["tokens"]);
    assert_eq!(a["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(a["stop"], "limit");
    assert_eq!(a["seed"], 1);
    assert_eq!(a["memory"]["stats"]["name"], "full");
    assert_eq!(a["memory"]["stats"]["n_dropped"], 0);
    assert!(a["timings"]["prompt_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn prompt_file_and_stdin_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompt.txt");
    std::fs::write(&path, format!("{PROMPT}\n")).unwrap();
    let flags = ["-n", "8", "--temp", "0", "--ignore-eos"];
    fn with<'a>(flags: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
        [flags, more].concat()
    }
    let given = stdout(on("llama-tiny", "run", &with(&flags, &["-p", PROMPT])));
    assert_eq!(
        stdout(on("llama-tiny", "run", &with(&flags, &["-f", text(&path)]))),
        given
    );
    let model = model("llama-tiny");
    let mut command = mneme(&["run", "-m", text(&model)]);
    command.args(flags);
    assert_eq!(stdout(piped(command, PROMPT.as_bytes())), given);
    let echoed = stdout(on(
        "llama-tiny",
        "run",
        &with(&flags, &["-p", PROMPT, "--echo"]),
    ));
    assert_eq!(echoed, format!("{PROMPT}{given}"));
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_shown() {
    let flags = [
        "-p",
        PROMPT,
        "-n",
        "40",
        "-s",
        "7",
        "--ignore-eos",
        "--json",
    ];
    let free = json(on("qwen2-tiny", "run", &flags));
    let said = free["text"].as_str().unwrap();
    // Some letters from the middle of the answer.
    let at = said.char_indices().nth(said.chars().count() / 2).unwrap().0;
    let stop: String = said[at..].chars().take(2).collect();
    let first = said.find(&stop).unwrap();
    let stopped = json(on(
        "qwen2-tiny",
        "run",
        &[&flags[..], &["-r", &stop]].concat(),
    ));
    assert_eq!(stopped["stop"], "word");
    assert_eq!(stopped["text"], said[..first]);
}

#[test]
fn a_grammar_shapes_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vote.gbnf");
    std::fs::write(&path, "root ::= (\"yes\" | \"no\") \"!\"\n").unwrap();
    for seed in ["1", "2", "3"] {
        let flags = [
            "-p", "Well?", "-s", seed, "-n", "1000", "--temp", "100", "--json",
        ];
        let run = |more: &[&str]| json(on("qwen2-tiny", "run", &[&flags[..], more].concat()));
        let vote = run(&["--grammar-file", text(&path)]);
        assert!(
            ["yes!", "no!"].contains(&vote["text"].as_str().unwrap()),
            "{vote}"
        );
        assert_eq!(vote["stop"], "eos");
        let number = run(&["--regex", "[0-9]{3}"]);
        let said = number["text"].as_str().unwrap();
        assert!(said.len() == 3 && said.parse::<u32>().is_ok(), "{number}");
        let schema = r#"{"type": "object", "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"], "additionalProperties": false}"#;
        // JSON allows spaces without end, and this model loves them: let chance alone choose.
        let chance = ["--top-k", "0", "--top-p", "1", "--min-p", "0"];
        let object = run(&[&["-j", schema], &chance[..]].concat());
        assert_eq!(object["stop"], "eos");
        let object: serde_json::Value =
            serde_json::from_str(object["text"].as_str().unwrap()).unwrap();
        assert!(object["ok"].is_boolean());
    }
}

#[test]
fn a_session_goes_on_as_if_it_had_never_stopped() {
    let cases = [
        ("qwen2-tiny", "full"),
        ("qwen2-tiny", "window:window=8,sinks=2"),
        ("ahn-gdn-tiny", "ahn:window=8,sinks=2"),
        ("nodes-linear", "nodes"),
        ("nodes-max", "nodes"),
        ("nodes-sentence", "nodes:decider=sentence"),
        ("gist-qwen2", "gist"),
    ];
    for (name, memory) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.session");
        let flags = [
            "--memory",
            memory,
            "-s",
            "5",
            "--ignore-eos",
            "--json",
            "--repeat-penalty",
            "1.2",
        ];
        let run = |more: &[&str]| json(on(name, "run", &[&flags[..], more].concat()));
        let whole = run(&["-p", PROMPT, "-n", "24"]);
        let session = ["--session", text(&path)];
        let first = run(&[&["-p", PROMPT, "-n", "9"], &session[..]].concat());
        let second = run(&[&["-p", "", "-n", "15"], &session[..]].concat());
        let join = |a: &serde_json::Value, b: &serde_json::Value| {
            [a.as_array().unwrap().clone(), b.as_array().unwrap().clone()].concat()
        };
        assert_eq!(
            whole["tokens"].as_array().unwrap(),
            &join(&first["tokens"], &second["tokens"]),
            "{name} {memory}"
        );
        assert_eq!(
            whole["memory"]["nodes"], second["memory"]["nodes"],
            "{name} {memory}"
        );
        assert_eq!(
            whole["memory"]["held_bytes"],
            second["memory"]["held_bytes"]
        );
    }
}

#[test]
fn sessions_of_something_else_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.session");
    let session = ["--session", text(&path), "-n", "2", "-p", "a"];
    stdout(on("qwen2-tiny", "run", &session));
    let refused = |name: &str, more: &[&str], expected: &str| {
        let output = on(name, "run", &[&session[..], more].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    };
    refused("qwen3-tiny", &[], "made with another model");
    refused(
        "qwen2-tiny",
        &["--memory", "window:window=8,sinks=1"],
        "made with --memory full",
    );
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    refused("qwen2-tiny", &[], "a.session");
    std::fs::write(&path, &bytes[..middle]).unwrap();
    refused("qwen2-tiny", &[], "a.session");
    std::fs::write(&path, "no session").unwrap();
    refused("qwen2-tiny", &[], "a.session");
}

#[test]
fn a_full_context_ends_the_answer() {
    let run = json(on(
        "qwen2-tiny",
        "run",
        &["-p", "a", "-c", "12", "--ignore-eos", "--json"],
    ));
    assert_eq!(run["stop"], "context");
    assert_eq!(run["memory"]["stats"]["n_tokens"], 12);
    // A window never fills it.
    let window = ["--memory", "window:window=6,sinks=2", "-n", "30"];
    let run = json(on(
        "qwen2-tiny",
        "run",
        &[
            &["-p", "a", "-c", "12", "--ignore-eos", "--json"],
            &window[..],
        ]
        .concat(),
    ));
    assert_eq!(run["stop"], "limit");
    assert!(run["memory"]["stats"]["n_dropped"].as_u64().unwrap() > 0);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_an_answer_cleanly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.session");
    let model = model("qwen2-tiny");
    let args = [
        "run",
        "-m",
        text(&model),
        "-p",
        "a",
        "--ignore-eos",
        "-c",
        "1000000",
    ];
    let mut child = mneme(&args)
        .args(["--session", text(&path)])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut some = [0; 8];
    out.read_exact(&mut some).unwrap();
    // The shell's own: a small Debian has no program of that name.
    let kill = std::process::Command::new("sh")
        .args(["-c", &format!("kill -INT {}", child.id())])
        .status()
        .unwrap();
    assert!(kill.success());
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(rest.last(), Some(&b'\n'));
    assert!(path.exists(), "the session is saved");
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_error() {
    let model = model("qwen2-tiny");
    let args = [
        "run",
        "-m",
        text(&model),
        "-p",
        "a",
        "--ignore-eos",
        "-c",
        "1000000",
    ];
    let mut child = mneme(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 8]).unwrap();
    drop(out);
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(0));
    assert!(
        done.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// Contexts under `concepts`: fewer cells than tokens, found again by the next process, and the same
/// answer; text that looks like the end of a context does not end it.
#[test]
fn contexts_are_compressed_once() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, cache] = ["one.txt", "two.txt", "cache"].map(|name| dir.path().join(name));
    let first = "Ann is at the old mill. Her code is 417. The well is dry. Tom has it.";
    std::fs::write(&one, first).unwrap();
    std::fs::write(&two, "Bob is<|/context|> late. He was here.").unwrap();
    let run = |contexts: &[&str]| {
        let mut args = vec![
            "-p",
            "Where?",
            "-n",
            "6",
            "--temp",
            "0",
            "--ignore-eos",
            "--json",
        ];
        args.extend(["--concept-cache", text(&cache)]);
        for context in contexts {
            args.extend(["--context", context]);
        }
        json(on("concepts-qwen2", "run", &args))
    };
    let both = run(&[text(&one), text(&two)]);
    let stats = &both["memory"]["stats"];
    let cells = stats["n_cells"].as_u64().unwrap();
    assert!(
        cells * 3 < stats["n_tokens"].as_u64().unwrap() * 2,
        "{stats}"
    );
    let made = both["memory"]["segments"]["compressed"].as_u64().unwrap();
    assert_eq!(both["memory"]["segments"]["from_cache"], 0);
    assert_eq!(
        both["memory"]["nodes"].as_array().unwrap().len() as u64,
        made
    );
    let again = run(&[text(&one), text(&two)]);
    assert_eq!(again["tokens"], both["tokens"]);
    let segments = serde_json::json!({"from_cache": made, "compressed": 0});
    assert_eq!(again["memory"]["segments"], segments);
    // Another place in the prompt, the same segments.
    let other = run(&[text(&two), text(&one)]);
    assert_eq!(other["memory"]["segments"], segments);
}

#[test]
fn an_open_context_is_refused_in_words() {
    let out = on(
        "concepts-qwen2",
        "run",
        &["-p", "a<|context|>b c", "-n", "3"],
    );
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("context that is open"), "{said}");
    let out = on(
        "qwen2-tiny",
        "run",
        &["-p", "a", "-n", "3", "--memory", "concepts"],
    );
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("mem.ce_proj.weight"), "{said}");
    let out = on(
        "concepts-qwen2",
        "run",
        &["-p", "a", "-n", "3", "--concept-cache", "http://x"],
    );
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(
        said.contains("--concept-cache") && said.contains("redis://"),
        "{said}"
    );
}

/// The compressor in models/ over the model beside it: answers from contexts, right for the right one.
#[test]
fn a_trained_compressor_answers() {
    let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let [model, adapter] =
        ["mneme-records", "mneme-records-concepts"].map(|name| models.join(format!("{name}.gguf")));
    let dir = tempfile::tempdir().unwrap();
    let [people, pets] = ["people.txt", "pets.txt"].map(|name| dir.path().join(name));
    std::fs::write(
        &people,
        "Anna lives in Oslo. Bert lives in Cairo. The hill shone over the deep field.",
    )
    .unwrap();
    std::fs::write(&pets, "Judith keeps a goose. The pet of Ursula is a pony.").unwrap();
    for (question, answer) in [
        ("Where does Anna live?", "Oslo"),
        ("Where does Bert live?", "Cairo"),
        ("Which animal does Judith keep?", "goose"),
        ("Which animal does Ursula keep?", "pony"),
    ] {
        let prompt = format!("<|user|>{question}<|assistant|>");
        let args = [
            "run",
            "-m",
            text(&model),
            "--memory-adapter",
            text(&adapter),
            "-t",
            "2",
            "--json",
            "--context",
            text(&people),
            "--context",
            text(&pets),
            "-p",
            &prompt,
            "-n",
            "4",
            "--temp",
            "0",
        ];
        let said = json(mneme(&args).stdin(Stdio::null()).output().unwrap());
        assert_eq!(said["text"].as_str().unwrap().trim(), answer, "{question}");
        assert_eq!(said["memory"]["stats"]["name"], "concepts");
    }
}
