//! The tool that runs a command.

use super::{Given, int, text};
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::sync::mpsc;

/// Longest time a command may take.
const MAX_SECONDS: i64 = 60;
/// Time it gets when nothing is said.
const SECONDS: i64 = 10;
/// Most bytes of its output.
const MAX_OUTPUT: i64 = 16 << 10;

/// A command's whole process group, killed when it is no longer wanted.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0 {
            // A group that has ended is no error.
            let _ = std::process::Command::new("kill")
                .args(["-KILL", "--", &format!("-{id}")])
                .stderr(Stdio::null())
                .status();
        }
    }
}

async fn pour(mut from: impl AsyncRead + Unpin, to: mpsc::Sender<Vec<u8>>) {
    let mut part = vec![0; 4096];
    while let Ok(n @ 1..) = from.read(&mut part).await {
        if to.send(part[..n].to_vec()).await.is_err() {
            return;
        }
    }
}

/// Runs a command; `say` gets its output as it comes and returns whether anybody still listens.
pub async fn run(given: &Given<'_>, mut say: impl FnMut(&str) -> bool) -> Result<(), String> {
    let command = text(given.params, "command")?;
    let seconds = int(given.params, "timeout")?.unwrap_or(SECONDS);
    let seconds = seconds.clamp(1, MAX_SECONDS) as u64;
    let room = int(given.params, "max_output_size")?.unwrap_or(MAX_OUTPUT);
    let mut room = room.clamp(0, MAX_OUTPUT) as usize;
    let mut child = Command::new("sh")
        .args(["-c", command])
        .current_dir(given.cwd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("the shell does not start: {e}"))?;
    let mut group = Group(child.id());
    let (tx, mut rx) = mpsc::channel(16);
    if let Some(out) = child.stdout.take() {
        tokio::spawn(pour(out, tx.clone()));
    }
    if let Some(err) = child.stderr.take() {
        tokio::spawn(pour(err, tx.clone()));
    }
    drop(tx);
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let mut utf8 = mneme_engine::tokenizer::Utf8Stream::default();
    let mut is_late = false;
    let code = loop {
        tokio::select! {
            part = rx.recv() => {
                let Some(part) = part else {
                    // All output is there; the command may still have to end.
                    match tokio::time::timeout_at(end, child.wait()).await {
                        Ok(status) => break status.ok().and_then(|s| s.code()),
                        Err(_) => { is_late = true; break None; }
                    }
                };
                let part = &part[..part.len().min(room)];
                room -= part.len();
                if let Some(text) = utf8.push(part) && !say(&text) {
                    return Ok(());
                }
            }
            () = tokio::time::sleep_until(end) => { is_late = true; break None; }
        }
    };
    if !is_late {
        // It ended by itself: its number may belong to another by now.
        group.0 = None;
    }
    if let Some(rest) = utf8.flush() {
        say(&rest);
    }
    if room == 0 {
        say("\n[the rest of the output is left out]");
    }
    say(&format!("\n[exit code: {}]", code.unwrap_or(-1)));
    if is_late {
        say(&format!(" [ended after {seconds} s]"));
    }
    Ok(())
}

/// Runs a command and answers with all its output.
pub async fn whole(given: &Given<'_>) -> Result<Value, String> {
    let mut out = String::new();
    run(given, |text| {
        out += text;
        true
    })
    .await?;
    Ok(serde_json::json!({"plain_text_response": out}))
}
