//! Bad input: a clear line, the right exit code, nothing left behind.

use crate::{mneme, model, piped, text};
use std::process::{Output, Stdio};

#[track_caller]
fn refused(output: &Output, code: i32, expected: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(
        stderr.contains(expected),
        "expected `{expected}` in: {stderr}"
    );
    assert!(output.stdout.is_empty(), "nothing is printed: {output:?}");
    if code == 1 {
        let lines: Vec<&str> = stderr.lines().collect();
        assert!(
            lines.len() == 1 && lines[0].starts_with("error: "),
            "one line: {stderr}"
        );
    }
}

#[test]
fn wrong_arguments() {
    let model = model("qwen2-tiny");
    let model = text(&model);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["run", "-m", "missing.gguf", "-p", "a"], 1, "missing.gguf"),
        (&["run", "-p", "a"], 2, "--model"),
        (&["run", "-m", model, "-p", "a", "--isa", "mmx"], 2, "`mmx`"),
        (&["run", "-m", model, "--frobnicate"], 2, "--frobnicate"),
        (
            &["run", "-m", model, "-hf", "a/b"],
            2,
            "cannot be used with",
        ),
        (&["fly"], 2, "fly"),
        (&["run", "-m", model, "-p", ""], 1, "the prompt is empty"),
        (
            &["run", "-m", model, "-p", "a", "-c", "99999999999999"],
            1,
            "-c 99999999999999",
        ),
        (&["run", "-m", model, "-p", "a", "-c", "-1"], 2, "'-1'"),
        (
            &["run", "-m", model, "-p", "a b c d e f g h", "-c", "4"],
            1,
            "has room for 4",
        ),
        (
            &["run", "-m", model, "-p", "a", "-ctk", "q3"],
            2,
            "f32, f16, bf16, q8_0",
        ),
        (&["run", "-m", model, "-p", "a", "-t", "0"], 2, "at least 1"),
        (
            &["run", "-m", model, "-p", "a", "--device", "abacus"],
            2,
            "expected auto, cpu, cuda or cuda:N",
        ),
        (
            &["run", "-m", model, "-p", "a", "-ngl", "some"],
            2,
            "expected a number of layers",
        ),
        (
            &["run", "-m", model, "-p", "a", "--temp", "NaN"],
            1,
            "temperature",
        ),
        (
            &["run", "-m", model, "-p", "a", "--samplers", "magic"],
            1,
            "magic",
        ),
        (
            &["run", "-m", model, "-p", "a", "--memory", "elephant"],
            1,
            "full, window",
        ),
        (
            &[
                "run",
                "-m",
                model,
                "-p",
                "a",
                "--memory",
                "window:colour=red",
            ],
            1,
            "no option `colour`",
        ),
        (
            &["run", "-m", model, "-p", "a", "--memory", "window:window"],
            2,
            "key=value",
        ),
        (
            &["run", "-m", model, "-p", "a", "--memory", "nodes"],
            1,
            "no compressor",
        ),
        (
            &["run", "-m", model, "-p", "a", "--tau", "0.5"],
            1,
            "`full` takes no options",
        ),
        (
            &["run", "-m", model, "-p", "a", "--grammar", "root ::= ("],
            1,
            "gbnf grammar, line 1",
        ),
        (
            &["run", "-m", model, "-p", "a", "-j", "{"],
            1,
            "json schema",
        ),
        (
            &["run", "-m", model, "-p", "a", "-j", "{}", "--regex", "a"],
            2,
            "cannot be used with",
        ),
        (&["run", "-m", model, "-f", "missing.txt"], 1, "missing.txt"),
        (
            &["run", "-m", model, "-p", "a", "--memory-adapter", model],
            1,
            "adapter",
        ),
        (&["bench", "-m", model, "-o", "plot.png"], 1, ".svg"),
        (&["bench", "-m", model, "--memory", "ahn"], 1, "ahn"),
        (
            &["perplexity", "-m", model, "-f", "missing.txt"],
            1,
            "missing.txt",
        ),
        (
            &["chat", "-m", model, "--chat-template", "martian"],
            1,
            "martian",
        ),
        (
            &["chat", "-m", model, "--chat-template-kwargs", "[1]"],
            2,
            "JSON object",
        ),
    ];
    for (args, code, expected) in cases {
        refused(&piped(mneme(args), b""), *code, expected);
    }
}

#[test]
fn broken_model_files() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(model("qwen2-tiny")).unwrap();
    let cases: [(&str, &[u8]); 4] = [
        ("empty.gguf", b""),
        (
            "text.gguf",
            b"this is no model at all, only text of some length",
        ),
        ("head.gguf", &whole[..1000]),
        ("cut.gguf", &whole[..whole.len() - 1000]),
    ];
    for (name, bytes) in cases {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let output = piped(mneme(&["run", "-m", text(&path), "-p", "a"]), b"");
        refused(&output, 1, name);
    }
}

#[test]
fn text_that_is_not_utf8() {
    let model = model("qwen2-tiny");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("latin1.txt");
    std::fs::write(&path, b"caf\xe9 au lait").unwrap();
    for command in ["run", "perplexity"] {
        let output = piped(
            mneme(&[command, "-m", text(&model), "-f", text(&path)]),
            b"",
        );
        refused(&output, 1, "latin1.txt: not UTF-8 at byte 3");
    }
    let output = piped(mneme(&["run", "-m", text(&model)]), b"caf\xe9");
    refused(&output, 1, "stdin: not UTF-8 at byte 3");
}

#[test]
fn help_teaches_the_memories() {
    let output = piped(mneme(&["--help"]), b"");
    let help = crate::stdout(output);
    for word in [
        "Examples:",
        "mneme chat",
        "window",
        "nodes",
        "gist",
        "ahn",
        "target_rate",
    ] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

/// A GPU that is asked for and cannot be had is said so in words; without being asked for, and
/// with `-ngl 0`, the CPU runs the model.
#[test]
#[cfg(not(feature = "cuda-host"))]
fn a_gpu_that_is_not_there() {
    let model = model("qwen2-tiny");
    let run = |flags: &[&str]| {
        let common = ["run", "-m", text(&model), "-p", "a b", "-n", "2"];
        let mut command = mneme(&[&common[..], flags].concat());
        command.output().expect("mneme runs")
    };
    let expected = match cfg!(feature = "cuda") {
        true => "cuda:9",
        false => "built without the feature `cuda`",
    };
    refused(&run(&["--device", "cuda:9"]), 1, expected);
    for flags in [
        &["--device", "cpu"][..],
        &["--device", "cuda:9", "-ngl", "0"],
    ] {
        let output = run(flags);
        assert!(output.status.success(), "{flags:?}: {output:?}");
    }
}

/// Half a file is no file, whoever ends the program.
#[cfg(unix)]
#[test]
fn an_ended_conversion_leaves_nothing() {
    use mneme_engine::gguf::{GgmlType, GgufWriter, Value};
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("large.gguf"), dir.path().join("small"));
    std::fs::create_dir(&to).unwrap();
    // Large enough that the signal finds it at work.
    let (rows, cols) = (65_536u64, 512u64);
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", Value::String("llama".into()));
    for (key, n) in [("block_count", 1), ("attention.head_count", 8)] {
        writer.set(&format!("llama.{key}"), Value::U32(n));
    }
    let name = "blk.0.ffn_down.weight";
    writer.tensor(name, &[cols, rows], GgmlType::F32).unwrap();
    let mut sink = writer.create(&from, false).unwrap();
    sink.tensor(name, &vec![0x3c; (rows * cols * 4) as usize])
        .unwrap();
    sink.finish().unwrap();
    let files = || std::fs::read_dir(&to).unwrap().count();
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 143)] {
        let out = to.join("out.gguf");
        let args = ["quantize", text(&from), text(&out), "q4_k_m", "--pure"];
        let mut child = mneme(&args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while files() == 0 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let kill = format!("kill -{signal} {}", child.id());
        let kill = std::process::Command::new("sh")
            .args(["-c", &kill])
            .status();
        assert!(kill.unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal}");
        assert_eq!(files(), 0, "{signal}");
    }
}
