//! `mneme chat` through a pipe: every line is a message.

use crate::{mneme, model, piped, stdout, text};

fn chat(name: &str, flags: &[&str], stdin: &str) -> String {
    let model = model(name);
    let mut command = mneme(&["chat", "-m", text(&model), "-n", "10", "-s", "3"]);
    command.args(flags);
    stdout(piped(command, stdin.as_bytes()))
}

#[test]
fn turns_follow_each_other() {
    let one = chat("qwen2-tiny", &["-sys", "Be brief."], "Hello there.\n");
    let two = chat(
        "qwen2-tiny",
        &["-sys", "Be brief."],
        "Hello there.\nAnd now?\n",
    );
    assert!(
        two.starts_with(&one) && two.len() > one.len(),
        "{one:?} {two:?}"
    );
    // A message over two lines is one message.
    let joined = chat(
        "qwen2-tiny",
        &["-sys", "Be brief."],
        "Hello \\\nthere.\n/stats\n",
    );
    assert!(joined.contains("3 messages"), "{joined}");
}

#[test]
fn a_live_cache_equals_reading_everything_anew() {
    // The second answer comes once from the kept cache and once from a saved conversation.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chat.session");
    for (name, memory) in [
        ("qwen2-tiny", "full"),
        ("qwen3-tiny", "window:window=16,sinks=2"),
        ("nodes-linear", "nodes"),
        ("llama-tiny", "full"),
    ] {
        let flags = ["--memory", memory];
        let whole = chat(name, &flags, "First words.\nSecond words.\n");
        let save = format!("First words.\n/save {}\n", text(&path));
        let first = chat(name, &flags, &save);
        let load = format!("/load {}\nSecond words.\n", text(&path));
        let second = chat(name, &flags, &load);
        let first = first.lines().filter(|l| !l.ends_with(" written"));
        let second = second.lines().filter(|l| !l.ends_with(" tokens"));
        let both: Vec<&str> = first.chain(second).collect();
        assert_eq!(both, whole.lines().collect::<Vec<_>>(), "{name} {memory}");
    }
}

#[test]
fn undo_takes_a_turn_back() {
    for (name, memory) in [
        ("qwen2-tiny", "full"),
        ("qwen2-tiny", "window:window=12,sinks=2"),
        ("ahn-gdn-tiny", "ahn:window=12,sinks=2"),
        ("nodes-linear", "nodes"),
        ("nodes-max", "nodes"),
    ] {
        let flags = ["--memory", memory, "--temp", "0"];
        let whole = chat(name, &flags, "One.\nTwo.\n");
        let undone = chat(
            name,
            &flags,
            "One.\nThree is a longer message.\n/undo\nTwo.\n",
        );
        let last = |s: &str| s.lines().last().map(str::to_owned);
        assert_eq!(last(&undone), last(&whole), "{name} {memory}\n{undone}");
        assert!(undone.contains(" read again"), "{undone}");
    }
}

#[test]
fn undo_reaches_behind_a_saved_session() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chat.session");
    for (name, memory) in [
        ("qwen2-tiny", "full"),
        ("ahn-gdn-tiny", "ahn:window=12,sinks=2"),
        ("nodes-linear", "nodes"),
    ] {
        let flags = ["--memory", memory, "--temp", "0"];
        let whole = chat(name, &flags, "One.\nTwo.\n");
        let save = format!("One.\nThree is a longer message.\n/save {}\n", text(&path));
        chat(name, &flags, &save);
        let load = format!("/load {}\n/undo\nTwo.\n", text(&path));
        let undone = chat(name, &flags, &load);
        let last = |s: &str| s.lines().last().map(str::to_owned);
        assert_eq!(last(&undone), last(&whole), "{name} {memory}\n{undone}");
    }
}

#[test]
fn an_answer_that_the_template_writes_otherwise_is_not_read_again() {
    // The shipped model says " Oslo", and its template puts a space of its own before an answer.
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/mneme-records.gguf");
    let ask = |lines: &str| {
        let command = mneme(&["chat", "-m", shipped, "--temp", "0"]);
        stdout(piped(command, lines.as_bytes()))
    };
    let two = "Anna lives in Oslo.\nWhere does Anna live?\n";
    let held = |said: &str| -> usize {
        let stats = said.lines().find(|l| l.contains(" tokens in the sequence"));
        let words: Vec<&str> = stats.unwrap().split_whitespace().collect();
        words[2].parse().unwrap()
    };
    let one = held(&ask("Anna lives in Oslo.\n/stats\n"));
    let undone = ask(&format!("{two}/undo\n/stats\n"));
    assert!(undone.contains(" 0 read again"), "{undone}");
    assert_eq!(held(&undone), one, "{undone}");
}

#[test]
fn a_file_is_part_of_the_next_message() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    std::fs::write(&path, "The key is under the mat. The cat is on it.\n").unwrap();
    let flags = ["--temp", "0"];
    let by_file = chat(
        "qwen2-tiny",
        &flags,
        &format!("/file {}\nWhere?\n", text(&path)),
    );
    let typed = chat(
        "qwen2-tiny",
        &flags,
        "The key is under the mat. The cat is on it.\\\n\\\nWhere?\n",
    );
    assert!(by_file.contains("tokens read"), "{by_file}");
    assert_eq!(by_file.lines().last(), typed.lines().last());
}

#[test]
fn dials_and_views() {
    let out = chat(
        "nodes-linear",
        &[],
        "/set tau 0.1\n/set temp 0\n/set top-k 5\nSome words. And more.\n/memory\n/stats\n/help\n/reset\n/stats\n/exit\nignored\n",
    );
    for expected in [
        "tau 0.1",
        "temp 0",
        "top_k 5",
        "tokens per slot",
        "tau 0.100",
        "/undo",
        "2 messages",
        "started anew",
        "0 messages",
    ] {
        assert!(out.contains(expected), "{expected}: {out}");
    }
    assert!(!out.contains("ignored"));
}

#[test]
fn mistakes_end_a_script() {
    let model = model("qwen2-tiny");
    for (line, expected) in [
        ("/fly", "no command /fly"),
        ("/file missing.txt", "missing.txt"),
        ("/set wings 2", "no dial `wings`"),
        ("/set tau 0.5", "tau"),
        ("/undo", "nothing to take back"),
    ] {
        let output = piped(
            mneme(&["chat", "-m", text(&model), "-n", "2"]),
            line.as_bytes(),
        );
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {stderr}");
        assert!(stderr.contains(expected), "{line}: {stderr}");
    }
}

/// A file is a context of its own: read as far as it goes before the question comes.
#[test]
fn a_file_is_a_context() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doc.txt");
    std::fs::write(
        &path,
        "Ann is at the old mill. Her code is 417. The well is dry. Tom has it.\n",
    )
    .unwrap();
    let script = format!(
        "/file {}\nWhere is Ann?\n/memory\nAgain?\n/undo\n/memory\n",
        text(&path)
    );
    let said = chat("concepts-qwen2", &[], &script);
    assert_eq!(said.matches("Ann is at the old mill.").count(), 2, "{said}");
    assert!(said.contains("memory concepts"), "{said}");
}
