//! The real binary: what it prints, what it returns, what it leaves behind.

mod bench;
mod chat;
#[cfg(feature = "cuda-host")]
mod device;
mod errors;
mod logits;
mod perplexity;
mod run;
mod segments;

use std::collections::HashMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{LazyLock, Mutex};

/// One folder of fixtures/.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fixtures")
        .join(name)
}

/// GGUF file of a fixture, converted once.
fn model(name: &str) -> PathBuf {
    static DONE: LazyLock<Mutex<HashMap<String, PathBuf>>> = LazyLock::new(Mutex::default);
    let mut done = DONE.lock().expect("no test panics while converting");
    if let Some(path) = done.get(name) {
        return path.clone();
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("models");
    std::fs::create_dir_all(&dir).expect("a folder");
    let path = dir.join(format!("{name}.gguf"));
    let mut options = mneme_convert::ConvertOptions::new(fixture(name), &path);
    options.output.overwrite = true;
    mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect(name);
    done.insert(name.into(), path.clone());
    path
}

/// The binary on two threads.
fn mneme(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mneme"));
    command.args(args);
    // Nothing of the developer's own may matter.
    command
        .env_remove("MNEME_MODEL")
        .env("MNEME_CONCEPT_CACHE", "none")
        .env("HF_HUB_OFFLINE", "1");
    command
}

/// Runs a command on a model.
fn on(name: &str, command: &str, args: &[&str]) -> Output {
    let model = model(name);
    mneme(&[command, "-m", text(&model), "-t", "2"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs")
}

/// Runs a command with text on stdin.
fn piped(mut command: Command, stdin: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let mut pipe = child.stdin.take().expect("stdin is a pipe");
    // A command that ends early closes the pipe: its answer is what counts.
    let _ = pipe.write_all(stdin);
    drop(pipe);
    child.wait_with_output().expect("the binary ends")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Standard output of a command that must have gone well.
fn stdout(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// The JSON on the last line of standard output.
fn json(output: Output) -> serde_json::Value {
    let text = stdout(output);
    let last = text.lines().last().expect("a line");
    serde_json::from_str(last).expect("JSON")
}
