//! `mneme perplexity`.

use crate::{json, on, stdout, text};

fn story() -> String {
    (0..200)
        .map(|i| format!("Line {i} of a story that goes nowhere. "))
        .collect()
}

#[test]
fn memories_that_drop_nothing_agree_and_curves_cover_the_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("story.txt");
    std::fs::write(&path, story()).unwrap();
    let svg = dir.path().join("curve.svg");
    let flags = ["-f", text(&path), "-c", "96", "--chunks", "3", "--json"];
    let run = |more: &[&str]| json(on("qwen2-tiny", "perplexity", &[&flags[..], more].concat()));
    let full = run(&[]);
    assert_eq!(full["n_tokens"], 3 * 47);
    let nll = full["nll"].as_f64().unwrap();
    assert!((full["perplexity"].as_f64().unwrap() - nll.exp()).abs() < 1e-9 * nll.exp());
    let wide = run(&["--memory", "window:window=500,sinks=4"]);
    // A window sums its sinks apart from the rest: equal but for rounding.
    assert!((wide["nll"].as_f64().unwrap() - nll).abs() < 1e-5 * nll);
    let narrow = run(&["--memory", "window:window=8,sinks=1"]);
    assert!((narrow["nll"].as_f64().unwrap() - nll).abs() > 1e-3);
    let curve = run(&["--by-position", "-o", text(&svg)]);
    assert_eq!(curve["nll"], full["nll"]);
    let buckets = curve["by_position"].as_array().unwrap();
    assert_eq!(buckets[0]["begin"], 1);
    assert_eq!(buckets.last().unwrap()["end"], 96);
    let n: u64 = buckets
        .iter()
        .map(|b| b["n_tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(n, 3 * 95);
    assert!(std::fs::read_to_string(&svg).unwrap().contains("<polyline"));
}

#[test]
fn a_text_too_short_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("short.txt");
    std::fs::write(&path, "Only this.").unwrap();
    let output = on("qwen2-tiny", "perplexity", &["-f", text(&path)]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("one chunk needs 512"), "{stderr}");
    std::fs::write(&path, story()).unwrap();
    assert!(
        stdout(on(
            "qwen2-tiny",
            "perplexity",
            &["-f", text(&path), "--chunks", "1"]
        ))
        .contains("full: perplexity ")
    );
}
