//! `mneme bench`: that it measures what it says, not how fast.

use crate::{json, on, text};

#[test]
fn every_memory_at_every_depth_has_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (svg, md) = (dir.path().join("b.svg"), dir.path().join("b.md"));
    let out = json(on(
        "qwen2-tiny",
        "bench",
        &[
            "-p",
            "8",
            "-n",
            "4",
            "-d",
            "400,0",
            "-r",
            "2",
            "--no-peaks",
            "--json",
            "--memory",
            "full",
            "--memory",
            "window:window=16,sinks=2",
            "-o",
            text(&svg),
            "-o",
            text(&md),
        ],
    ));
    assert!(out["peak"].is_null());
    assert!(out["bytes_per_token"].as_u64().unwrap() > 0);
    let rows = out["rows"].as_array().unwrap();
    let names: Vec<String> = rows
        .iter()
        .map(|r| {
            format!(
                "{} {} {}",
                r["memory"].as_str().unwrap(),
                r["test"].as_str().unwrap(),
                r["depth"]
            )
        })
        .collect();
    let one = |m: &str| ["pp 0", "tg 0", "fill 0", "pp 400", "tg 400"].map(|t| format!("{m} {t}"));
    assert_eq!(
        names,
        [one("full"), one("window:window=16,sinks=2")].concat()
    );
    for r in rows {
        let n = if r["test"] == "fill" { 1 } else { 2 };
        assert_eq!(r["seconds"].as_array().unwrap().len(), n);
        assert!(r["tokens_per_second"].as_f64().unwrap() > 0.0);
    }
    let held = |i: usize| rows[i]["held_bytes"].as_u64().unwrap();
    assert_eq!(
        held(4),
        rows[4]["full_bytes"].as_u64().unwrap().max(held(4))
    );
    assert!(held(9) < held(4), "the window holds less");
    assert!(
        std::fs::read_to_string(&svg)
            .unwrap()
            .contains("window:window=16")
    );
    assert!(std::fs::read_to_string(&md).unwrap().contains("| tg4 "));
}
