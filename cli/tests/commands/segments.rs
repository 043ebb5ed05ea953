//! `mneme inspect --segments`.

use crate::{mneme, model, piped, stdout, text};

#[test]
fn the_page_shows_text_cuts_and_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("story.txt");
    let story = "One sentence <here>. Another & more. ".repeat(8);
    std::fs::write(&path, &story).unwrap();
    for name in [
        "nodes-linear",
        "nodes-max",
        "nodes-sentence",
        "nodes-skip-compact",
    ] {
        let model = model(name);
        let args = [
            "inspect",
            "-m",
            text(&model),
            "--segments",
            text(&path),
            "-c",
            "4096",
        ];
        let said = stdout(piped(mneme(&args), b""));
        let out = dir.path().join("story.html");
        assert_eq!(said.trim(), text(&out));
        let html = std::fs::read_to_string(&out).unwrap();
        assert!(html.contains("class=\"t cut\""), "{name}: nothing is cut");
        assert!(html.contains("&lt;") && !html.contains("<here>"), "{name}");
        assert!(html.contains("tokens per node slot") && html.contains("<svg"));
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_memory_without_segments_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("story.txt");
    std::fs::write(&path, "Some words.").unwrap();
    let model = model("qwen2-tiny");
    let args = ["inspect", text(&model), "--segments", text(&path)];
    let output = piped(mneme(&args), b"");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the full memory made no nodes"), "{stderr}");
    assert!(!dir.path().join("story.html").exists());
}
