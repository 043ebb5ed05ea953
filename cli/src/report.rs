//! Results as files: a table (`.md`), the numbers (`.json`) or a chart (`.svg`).

use crate::plots::{self, Plot};
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use tempfile::NamedTempFile;

/// What can be written about one set of results.
pub struct Report {
    /// Markdown.
    pub table: String,
    /// The numbers.
    pub json: serde_json::Value,
    /// The charts.
    pub plots: Vec<Plot>,
}

/// Refuses a path whose ending names none of the forms, before any work is done.
pub fn check(path: &Path) -> Result<()> {
    match path.extension().and_then(OsStr::to_str) {
        Some("md" | "json" | "svg") => Ok(()),
        _ => bail!(
            "-o {}: the name must end in .md (table), .json (numbers) or .svg (chart)",
            path.display()
        ),
    }
}

impl Report {
    /// Writes the form that `path`'s ending names.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = match path.extension().and_then(OsStr::to_str) {
            Some("md") => self.table.clone(),
            Some("json") => format!("{:#}\n", self.json),
            _ => plots::page(&self.plots),
        };
        write_text(path, &text)
    }
}

/// Whether `path` is there and no regular file: a device or a pipe, which renaming would replace.
pub fn is_special(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir())
}

/// Writes `text` beside `path` and puts it in place, so that no half file is ever seen; straight to
/// devices and pipes.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    let named = || path.display().to_string();
    if is_special(path) {
        return std::fs::write(path, text).with_context(named);
    }
    let mut temp = temp_beside(path)?;
    temp.write_all(text.as_bytes()).with_context(named)?;
    temp.persist(path)
        .map_err(|e| e.error)
        .with_context(named)?;
    Ok(())
}

/// A temporary file in the folder of `path`, to be renamed to it; removed if that never happens.
pub fn temp_beside(path: &Path) -> Result<NamedTempFile> {
    #[cfg(unix)]
    use std::os::unix::fs::PermissionsExt;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".mneme-");
    // As any file a program writes: the umask decides, not the library's 0600.
    #[cfg(unix)]
    builder.permissions(std::fs::Permissions::from_mode(0o666));
    builder
        .tempfile_in(dir)
        .with_context(|| path.display().to_string())
}

/// A Markdown table, columns as wide as their widest cell; the first `n_left` columns are
/// aligned left.
pub fn table(head: &[&str], rows: &[Vec<String>], n_left: usize) -> String {
    let width = |i: usize| {
        let cells = rows.iter().map(|r| r[i].chars().count());
        cells.chain([head[i].chars().count(), 3]).max().unwrap_or(3)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells
            .iter()
            .enumerate()
            .map(|(i, c)| match i < n_left {
                true => format!("{c:<w$}", w = widths[i]),
                false => format!("{c:>w$}", w = widths[i]),
            })
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    let rule: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(i, w)| match i < n_left {
            true => "-".repeat(*w),
            false => "-".repeat(w - 1) + ":",
        })
        .collect();
    let body: String = rows.iter().map(|r| line(r)).collect();
    line(&head) + &line(&rule) + &body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_markdown() {
        let rows = vec![vec!["full".to_owned(), "12.5".to_owned()]];
        let text = table(&["memory", "t/s"], &rows, 1);
        assert_eq!(
            text,
            "| memory |  t/s |\n| ------ | ---: |\n| full   | 12.5 |\n"
        );
    }

    #[test]
    fn unknown_endings_are_refused() {
        assert!(check(Path::new("a.svg")).is_ok());
        assert!(check(Path::new("a.png")).is_err());
        assert!(check(Path::new("svg")).is_err());
    }
    /// As root, renaming a report over /dev/null would leave the system without it.
    #[cfg(unix)]
    #[test]
    fn a_pipe_is_written_to_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || std::fs::read_to_string(pipe).unwrap()
        });
        write_text(&pipe, "text").unwrap();
        assert_eq!(reader.join().unwrap(), "text");
        assert!(is_special(&pipe));
        let missing = dir.path().join("missing");
        assert!(!is_special(&missing) && !is_special(dir.path()));
    }
}
