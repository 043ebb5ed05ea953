//! `mneme eval` and `mneme demo`, run as a user runs them, on a model of random weights.

mod tiny;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn mneme(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a run that must succeed.
fn stdout(args: &[&str]) -> String {
    let out = mneme(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?}: {err}");
    String::from_utf8(out.stdout).unwrap()
}

/// Standard error of a run that must fail.
fn failure(args: &[&str]) -> String {
    let out = mneme(args);
    assert!(!out.status.success(), "{args:?}");
    String::from_utf8(out.stderr).unwrap()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text.trim_end().lines().last().unwrap()).unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn generated_texts_repeat_and_differ() {
    let args = [
        "eval",
        "generate",
        "--task",
        "update,cwe",
        "--length",
        "600,900",
    ];
    let first = stdout(&[&args[..], &["-n", "3", "--seed", "7"]].concat());
    assert_eq!(
        first,
        stdout(&[&args[..], &["-n", "3", "--seed", "7"]].concat())
    );
    assert_ne!(
        first,
        stdout(&[&args[..], &["-n", "3", "--seed", "8"]].concat())
    );
    let rows: Vec<Value> = first
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    // Four questions a text in the language of records, one in RULER's shapes.
    assert_eq!(rows.len(), 2 * 3 * (4 + 1));
    for row in &rows {
        let text: Vec<char> = row["text"].as_str().unwrap().chars().collect();
        let answers = row["answers"].as_array().unwrap();
        assert!(!answers.is_empty());
        for fact in row["facts"].as_array().unwrap() {
            let at = |key: &str| fact[key].as_u64().unwrap() as usize;
            let told: String = text[at("start")..at("end")].iter().collect();
            assert!(told.contains(answers[0].as_str().unwrap()), "{told}");
            let ends = row["ends"].as_array().unwrap();
            assert!(ends.contains(&fact["end"]));
        }
    }
    let zh = stdout(&[
        "eval", "generate", "--lang", "zh", "-n", "1", "--length", "300",
    ]);
    assert!(zh.contains('。') && !zh.contains("\\u"));
}

#[test]
fn generate_refuses_what_makes_no_sense() {
    let generate = |args: &[&str]| failure(&[&["eval", "generate"], args].concat());
    assert!(generate(&["--task", "none"]).contains("unknown task"));
    assert!(generate(&["--length", "0"]).contains("number of tokens"));
    assert!(generate(&["--length", "9"]).contains("more than the 9 asked for"));
    assert!(generate(&["--task", "tracking", "--lang", "zh"]).contains("English"));
    assert!(generate(&["-o", "/no/such/folder/x.jsonl"]).contains("/no/such/folder"));
}

#[test]
fn arms_side_by_side_at_equal_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::model(dir.path(), true);
    let file = |name: &str| dir.path().join(name);
    let arms = [
        "full",
        "nodes:tau=0.5",
        "window:sinks=0",
        "nodes:decider=stride",
        "nodes:decider=random",
        "nodes:decider=sentence",
    ];
    let (plots, report) = (file("plots"), file("report.json"));
    let (answers, tables) = (file("answers.jsonl"), file("tables.md"));
    let mut args = vec![
        "eval",
        "run",
        "-m",
        path(&model),
        "--task",
        "single,multi_value",
        "--length",
        "400,700",
        "-n",
        "3",
        "--questions",
        "2",
        "--predict",
        "4",
        "--equal-bytes",
        "-t",
        "1",
        "--plot",
        path(&plots),
        "-o",
        path(&report),
        "--answers",
        path(&answers),
        "--markdown",
        path(&tables),
    ];
    for arm in &arms {
        args.extend(["--arm", *arm]);
    }
    let printed = stdout(&args);
    assert_eq!(printed, std::fs::read_to_string(&tables).unwrap());
    assert_eq!(printed.matches("### ").count(), 4);
    let report = json(&std::fs::read_to_string(&report).unwrap());
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4 * arms.len());
    for group in rows.chunks(arms.len()) {
        let number = |i: usize, keys: &[&str]| -> f64 {
            let value = keys.iter().fold(&group[i], |v, k| &v[*k]);
            value
                .as_f64()
                .unwrap_or_else(|| panic!("{keys:?} of {}", group[i]))
        };
        for (i, arm) in arms.iter().enumerate() {
            assert_eq!(group[i]["arm"], *arm);
            assert_eq!(number(i, &["score", "n"]), 6.0);
            let places = group[i]["places"].as_array().unwrap();
            let n: u64 = places.iter().map(|p| p["n"].as_u64().unwrap()).sum();
            assert_eq!(n, 6, "{arm}: {places:?}");
            assert!(number(i, &["held", "full_bytes"]) >= number(i, &["held", "cell_bytes"]));
        }
        // Everything is at hand in full, and next to nothing after nodes.
        assert_eq!(group[0]["places"][0]["place"], "in_window");
        assert_eq!(number(0, &["cell_ratio"]), 1.0);
        let cell = number(0, &["held", "full_bytes"]) / number(0, &["held", "n_tokens"]);
        let target = number(1, &["bytes"]);
        let window = number(2, &["bytes"]);
        assert!(
            window <= target && target - window < cell,
            "{window} for {target}"
        );
        // Strides are whole numbers: between two neighbours lie about k^2 / n nodes.
        let nodes = |i| number(i, &["held", "n_nodes"]);
        let step = nodes(1) * nodes(1) / number(1, &["held", "n_tokens"]);
        assert!((nodes(3) - nodes(1)).abs() <= step / 2.0 + 1.0);
        assert!((nodes(4) - nodes(1)).abs() <= 1.0);
        assert!(number(1, &["boundary", "crossings_per_cut"]) > 0.0);
        assert!(group[3]["boundary"]["crossings_per_cut"].is_null());
        assert!(group[0]["boundary"].is_null());
        assert!(number(5, &["boundary", "f1_sentences"]) > 0.3);
    }
    let lines = std::fs::read_to_string(&answers).unwrap();
    assert_eq!(lines.lines().count(), 4 * 3 * 2 * arms.len());
    for line in lines.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert!(row["got"].is_string() && row["score"].is_number());
    }
    let mut names: Vec<String> = std::fs::read_dir(&plots)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names.len(), 4 + 4 + 2, "{names:?}");
}

/// A sentence rule without a lower bound cuts exactly where the generator ended its sentences.
#[test]
fn sentence_cuts_fall_on_the_generators_ends() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::model(dir.path(), true);
    for (lang, task) in [("en", "single"), ("zh", "update"), ("en", "tracking")] {
        let out = stdout(&[
            "eval",
            "run",
            "-m",
            path(&model),
            "--lang",
            lang,
            "--task",
            task,
            "-n",
            "2",
            "--length",
            "500",
            "--predict",
            "1",
            "-t",
            "1",
            "--arm",
            "nodes:decider=sentence,min=1,max=400",
            "--sweep",
            "tau=0.1,0.9",
        ]);
        let report = json(&out);
        let rows = report["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 2);
        for row in rows {
            assert_eq!(row["boundary"]["f1_sentences"], 1.0, "{lang} {task}");
            assert_eq!(row["boundary"]["recall_facts"], 1.0);
            assert!(!row["places"].to_string().contains("across"), "{row}");
        }
    }
}

#[test]
fn files_of_the_benchmarks_run_on_any_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::model(dir.path(), false);
    let data = dir.path().join("data.jsonl");
    let rows = [
        r#"{"input": "The number is 17. What is the number?", "outputs": ["17"], "answer_prefix": " It is"}"#,
        r#"{"input": "Who?", "context": "It was Ann.", "answers": ["Ann"], "dataset": "qa", "length": 3}"#,
        r#"{"input": "Who?", "context": "It was Bob.", "answers": ["Bob"], "dataset": "qa", "length": 3}"#,
    ];
    std::fs::write(&data, rows.join("\n")).unwrap();
    let base = [
        "eval",
        "run",
        "-m",
        path(&model),
        "--jsonl",
        path(&data),
        "--style",
        "plain",
        "--predict",
        "3",
        "-t",
        "1",
    ];
    let report = json(&stdout(&base));
    let got: Vec<(&str, u64)> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| {
            (
                r["task"].as_str().unwrap(),
                r["score"]["n"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(got, [("ruler", 1), ("qa", 2)]);
    assert!(report["seed"].is_null());

    let fails = |more: &[&str]| failure(&[&base[..], more].concat());
    assert!(fails(&["--arm", "nodes"]).contains("no compressor"));
    assert!(fails(&["--arm", "window:size=3"]).contains("no option `size`"));
    assert!(fails(&["--arm", "full", "--equal-bytes"]).contains("--equal-bytes"));
    assert!(fails(&["--sweep", "tau"]).contains("option=value"));
    std::fs::write(&data, "{\"input\": 3}\n").unwrap();
    assert!(fails(&[]).contains("data.jsonl:1: `input` must be a string"));
}

/// What `generate` writes and `run` reads back is what `run` makes itself.
#[test]
fn a_file_of_ours_scores_as_the_texts_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::model(dir.path(), true);
    let data = dir.path().join("data.jsonl");
    let texts = [
        "--task",
        "update",
        "--length",
        "300",
        "-n",
        "2",
        "--seed",
        "5",
        "--questions",
        "1",
    ];
    let generate = ["eval", "generate", "-m", path(&model), "-o", path(&data)];
    stdout(&[&generate[..], &texts[..]].concat());
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let run = [
        "eval",
        "run",
        "-m",
        path(&model),
        "-t",
        "1",
        "--predict",
        "5",
        "--answers",
    ];
    let direct = json(&stdout(&[&run[..], &[path(&one)], &texts[..]].concat()));
    let read = json(&stdout(
        &[&run[..], &[path(&two), "--jsonl", path(&data)]].concat(),
    ));
    for key in ["score", "places", "boundary", "held", "chance"] {
        for i in [0, 1] {
            assert_eq!(direct["rows"][i][key], read["rows"][i][key], "{key}");
        }
    }
    let answers = |p: &Path| {
        let text = std::fs::read_to_string(p).unwrap();
        let got = |l: &str| serde_json::from_str::<Value>(l).unwrap()["got"].clone();
        text.lines().map(got).collect::<Vec<_>>()
    };
    assert_eq!(answers(&one), answers(&two));
    assert_eq!(answers(&one).len(), 4);
}

#[test]
fn the_demo_compares_and_answers_without_a_terminal() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let model = tiny::model(dir.path(), true);
    let args = [
        "demo",
        "-m",
        path(&model),
        "--length",
        "1500",
        "--facts",
        "12",
        "--questions",
        "6",
        "-t",
        "1",
    ];
    let out = stdout(&[&args[..], &["--no-ask", "--json"]].concat());
    let report = json(&out);
    let arms = report["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().map(|a| a["memory"].as_str().unwrap()).collect();
    assert!(names[0] == "full" && names[1].starts_with("window:") && names[2] == "nodes");
    for arm in arms {
        assert_eq!(arm["score"]["n"], 6);
        let n: u64 = (arm["by_quarter"].as_array().unwrap().iter())
            .map(|q| q[1].as_u64().unwrap())
            .sum();
        assert_eq!(n, 6);
    }
    let bytes = |i: usize| arms[i]["bytes"].as_f64().unwrap();
    assert!(bytes(1) <= bytes(2) && bytes(2) < bytes(0));
    assert!(out.contains("window") && out.contains("#") && !out.contains('█'));

    let mut child = Command::new(env!("CARGO_BIN_EXE_mneme"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all(b"Where does Anna live?\n\nnever read\n")
        .unwrap();
    drop(stdin);
    let out = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let (_, talk) = out.split_once("Your turn.").unwrap();
    assert!(
        talk.contains("> Where does Anna live?\n    full "),
        "{talk}"
    );
    assert_eq!(talk.matches("\n    ").count(), 3, "{talk}");
    assert!(!talk.contains("never read"));

    // A model without a memory is compared with a window.
    let plain = tiny::model(dir.path(), false);
    let small = [
        "--length",
        "600",
        "--facts",
        "5",
        "--questions",
        "2",
        "--no-ask",
        "--json",
    ];
    let out = stdout(&[&["demo", "-m", path(&plain), "-t", "1"], &small[..]].concat());
    assert_eq!(json(&out)["arms"].as_array().unwrap().len(), 2);
    assert!(failure(&["demo", "-m", "/no/such/model.gguf"]).contains("/no/such/model.gguf"));
    let short = failure(&["demo", "-m", path(&plain), "--length", "50"]);
    assert!(short.contains("--length 50"), "{short}");
}

/// The trained model of the tree, through files, tokenizer, memory and report: it remembers what a
/// window of the same bytes has lost, and cuts where facts end. Its card has the exact scores.
#[test]
fn the_model_of_the_tree_remembers() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/mneme-records.gguf");
    let args = [
        "eval",
        "run",
        "-m",
        model,
        "-t",
        "2",
        "--task",
        "single",
        "--length",
        "1500",
        "--facts",
        "24",
        "--questions",
        "8",
        "-n",
        "6",
        "--seed",
        "4711",
        "--equal-bytes",
        "--arm",
        "nodes",
        "--arm",
        "window",
    ];
    let report = json(&stdout(&args));
    let arms = report["rows"].as_array().unwrap();
    let mean = |arm: &Value| arm["score"]["mean"].as_f64().unwrap();
    assert!(mean(&arms[0]) > 0.85, "{}", arms[0]["score"]);
    assert!(mean(&arms[1]) < 0.4, "{}", arms[1]["score"]);
    let fewer = arms[0]["cell_ratio"].as_f64().unwrap();
    assert!(fewer > 8.0, "{}", arms[0]["held"]);
    let f1 = arms[0]["boundary"]["f1_facts"].as_f64().unwrap();
    assert!(f1 > 0.9, "{}", arms[0]["boundary"]);
}

/// What it learnt last: hand-overs followed to their end, every value of a key, and Chinese.
#[test]
fn the_model_of_the_tree_follows_lists_and_reads_chinese() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/mneme-records.gguf");
    let shape = [
        "--length", "700", "--facts", "12", "-n", "8", "--seed", "4711",
    ];
    let score = |more: &[&str]| -> Vec<f64> {
        let base = ["eval", "run", "-m", model, "-t", "2", "--arm", "nodes"];
        let report = json(&stdout(&[&base[..], &shape, more].concat()));
        let rows = report["rows"].as_array().unwrap().clone();
        let mean = |row: &Value| row["score"]["mean"].as_f64().unwrap();
        rows.iter().map(mean).collect()
    };
    for (got, least) in score(&["--task", "tracking,multi_value,multi_query"])
        .into_iter()
        .zip([0.7, 0.75, 0.75])
    {
        assert!(got > least, "{got} {least}");
    }
    let chinese = score(&["--task", "single", "--lang", "zh"]);
    assert!(chinese[0] > 0.8, "{chinese:?}");
}

/// Tokens per slot come out as asked, at a length where the controller has had time, below and
/// above what the decider would spend by itself.
#[test]
fn a_target_rate_is_held_by_the_model_of_the_tree() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/mneme-records.gguf");
    let mut args = vec!["eval", "run", "-m", model, "-t", "2", "--task", "single"];
    args.extend(["--length", "4k", "--facts", "64", "--questions", "1"]);
    args.extend(["-n", "3", "--seed", "4711"]);
    let targets = [16.0, 32.0, 64.0];
    let arms = targets.map(|r| format!("nodes:target_rate={r}"));
    for arm in &arms {
        args.extend(["--arm", arm.as_str()]);
    }
    let report = json(&stdout(&args));
    for (row, target) in report["rows"].as_array().unwrap().iter().zip(targets) {
        let rate = row["held"]["rate"].as_f64().unwrap();
        assert!((rate / target - 1.0).abs() < 0.05, "{target}: {rate}");
    }
}

/// As README says it, in the tree's own folder: the model, and not the memory that lies beside it.
#[test]
fn the_demo_finds_the_model_of_the_tree() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let models = std::fs::read_dir(root.join("models")).unwrap();
    let files = models.filter(|e| {
        e.as_ref()
            .unwrap()
            .path()
            .extension()
            .is_some_and(|x| x == "gguf")
    });
    assert!(files.count() > 1, "a model and an adapter");
    let out = Command::new(env!("CARGO_BIN_EXE_mneme"))
        .current_dir(root)
        .args("demo --length 600 --facts 5 --questions 3 --no-ask --json".split(' '))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let arms = json(&said)["arms"].as_array().unwrap().len();
    assert_eq!(arms, 3);
}
