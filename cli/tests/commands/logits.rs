//! `mneme logits` against PyTorch's, however the tokens are fed.

use crate::{fixture, mneme, model, piped, text};
use mneme_kernels::dispatch;
use safetensors::SafeTensors;
use std::path::Path;

fn write_ids(path: &Path, ids: &[i64]) {
    let header = format!(
        "{{'descr': '<i8', 'fortran_order': False, 'shape': ({},), }}\n",
        ids.len()
    );
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    std::fs::write(path, bytes).unwrap();
}

fn read_rows(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let n = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let floats = bytes[10 + n..].as_chunks().0;
    floats.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Largest difference.
fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    // A NaN is as far away as can be.
    apart.fold(
        0.0,
        |worst, d| if d > worst || d.is_nan() { d } else { worst },
    )
}

#[test]
fn logits_are_pytorchs_in_any_chunks() {
    for name in ["qwen2-tiny", "qwen3-tiny", "llama-tiny"] {
        let bytes = std::fs::read(fixture(name).join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let of = |key: &str| expected.tensor(key).unwrap().data().to_vec();
        let ids: Vec<i64> = of("input_ids")
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect();
        let logits: Vec<f32> = of("logits")
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (dir.path().join("ids.npy"), dir.path().join("out.npy"));
        write_ids(&input, &ids);
        let model = model(name);
        let base = [
            "logits",
            "-m",
            text(&model),
            "--ids",
            text(&input),
            "--out",
            text(&output),
        ];
        let f32_cells = ["-ctk", "f32", "-ctv", "f32"];
        let run = |more: &[&str]| {
            let args: Vec<&str> = base.iter().chain(more).copied().collect();
            crate::stdout(piped(mneme(&args), b""));
            read_rows(&output)
        };
        let whole = run(&f32_cells);
        let apart = worst(&whole, &logits);
        assert!(apart < 1e-4, "{name}: {apart}");
        for more in [
            &["--chunk", "7"][..],
            &["--prefill", "10", "--chunk", "3"],
            &["--prefill", "0", "-t", "1"],
        ] {
            let more: Vec<&str> = f32_cells.iter().chain(more).copied().collect();
            assert!(run(&more) == whole, "{name} {more:?}: the same to the bit");
        }
        for isa in dispatch::available() {
            let got = run(&[&f32_cells[..], &["--isa", isa.name()]].concat());
            let apart = worst(&got, &logits);
            assert!(apart < 1e-4, "{name} with {}: {apart}", isa.name());
        }
        // A window that drops nothing sums the sinks apart from the rest: equal but for rounding.
        let window = ["--memory", "window:window=4096,sinks=4", "--prefill", "5"];
        let window = run(&[&f32_cells[..], &window].concat());
        let apart = worst(&window, &whole);
        assert!(apart < 1e-4, "{name}: {apart}");
    }
}

#[test]
fn a_refused_run_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("ids.npy"), dir.path().join("out.npy"));
    let model = model("qwen2-tiny");
    let args = ["logits", "-m", text(&model), "--ids", text(&input)];
    let out = ["--out", text(&output)];
    let refuse = |ids: &[i64], more: &[&str], expected: &str| {
        write_ids(&input, ids);
        let args: Vec<&str> = args.iter().chain(more).copied().collect();
        let done = piped(mneme(&args), b"");
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    };
    let with_out = |more: &[&'static str]| [&out[..], more].concat();
    refuse(&[1, 2, 100_000], &with_out(&[]), "token id 100000");
    refuse(&[1, -2], &with_out(&[]), "value 1 is -2");
    refuse(&[], &with_out(&[]), "no token ids");
    refuse(&[1, 2, 3, 4], &with_out(&["-c", "3"]), "context");
    refuse(&[1], &with_out(&["--prefill", "2"]), "--prefill 2");
    refuse(
        &[1],
        &["--out", "/nonexistent/folder/x.npy"],
        "/nonexistent/folder/x.npy",
    );
}
