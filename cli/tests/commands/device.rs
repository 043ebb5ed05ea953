//! `--device` and `-ngl` on the emulated card.

use crate::{mneme, model, text};
use serde_json::Value;
use std::process::Output;

fn run(flags: &[&str]) -> Output {
    let model = model("qwen2-tiny");
    let common = ["run", "-m", text(&model), "-p", "a b c", "-n", "4"];
    let greedy = ["--temp", "0", "--json", "--device", "cuda"];
    let mut command = mneme(&[&common[..], &greedy, flags].concat());
    command.output().expect("mneme runs")
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Of three layers: none, some, all, more than there are, as many as fit. What is held on the GPU
/// grows with them, and without a number a line says what went where.
#[test]
fn layers_go_where_they_are_asked_to() {
    let mut held = Vec::new();
    for layers in ["0", "1", "2", "3", "99", "all", "auto", "-1"] {
        let output = run(&["-ngl", layers]);
        assert!(output.status.success(), "-ngl {layers}: {output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let stats = &report["memory"]["stats"];
        let n = |key: &str| stats[key].as_u64().expect(key);
        let said = words(&output).contains("3 of 3 layers on the GPU: weights");
        assert_eq!(said, ["auto", "-1"].contains(&layers), "{layers}");
        assert!(n("card_bytes") <= n("cell_bytes"), "{layers}");
        held.push((3 * n("card_bytes"), n("cell_bytes")));
    }
    let parts: Vec<u64> = held.iter().map(|(there, all)| there / all).collect();
    assert_eq!(parts, [0, 1, 2, 3, 3, 3, 3, 3]);
}

/// With the numbers, and what would help.
#[test]
fn what_has_no_room_is_refused() {
    for layers in ["1", "auto"] {
        let output = run(&["-ngl", layers, "-c", "99999999999"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let words = words(&output);
        for part in ["of 3 layers", "weights", "cells", "are free", "-ngl", "-c"] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
}

#[test]
fn inspect_says_what_lies_where() {
    let model = model("qwen2-tiny");
    let inspect = |flags: &[&str]| {
        let common = ["inspect", text(&model), "-ngl", "1", "--no-tensors"];
        let mut command = mneme(&[&common[..], flags].concat());
        let output = command.output().expect("mneme runs");
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    let shown = String::from_utf8(inspect(&[])).expect("text");
    assert!(
        shown.contains("1 layers on a GPU: there weights"),
        "{shown}"
    );
    let all: Value = serde_json::from_slice(&inspect(&["--json"])).expect("JSON");
    let split = &all["split"];
    assert_eq!(split["n_gpu_layers"], 1);
    let cells = |device: &str| split[device]["cells"].as_u64().expect("bytes");
    assert_eq!(2 * cells("gpu"), cells("cpu"));
}
