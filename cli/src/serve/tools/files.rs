//! Tools that read and write files.

use super::find::{self, Glob};
use super::{Given, flag, int, text};
use serde_json::{Value, json};
use std::path::Path;

/// Largest file that is read whole.
const MAX_FILE: u64 = 16 << 20;
/// Most of a file that is answered.
const MAX_ANSWER: usize = 64 << 10;
/// Most matches of a search.
const MAX_MATCHES: usize = 200;
/// Most entries of a listing.
const MAX_ENTRIES: usize = 1000;

fn load(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let meta = std::fs::metadata(path).map_err(|e| format!("{shown}: {e}"))?;
    if !meta.is_file() {
        return Err(format!("{shown}: is no regular file"));
    }
    if meta.len() > MAX_FILE {
        return Err(format!(
            "{shown}: has {} bytes, at most {MAX_FILE} are read",
            meta.len()
        ));
    }
    let bytes = std::fs::read(path).map_err(|e| format!("{shown}: {e}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Text of a file, or some of its lines.
pub fn read(given: &Given<'_>) -> Result<Value, String> {
    let path = given.path("path")?;
    let all = load(&path)?;
    let first = int(given.params, "start_line")?.unwrap_or(1).max(1);
    let last = int(given.params, "end_line")?.unwrap_or(i64::MAX);
    let numbered = flag(given.params, "append_loc");
    let mut out = String::new();
    for (at, line) in (1..).zip(all.split_inclusive('\n')) {
        if at < first || at > last {
            continue;
        }
        if numbered {
            out += &format!("{at}: ");
        }
        out += line;
        if out.len() > MAX_ANSWER {
            let end = (0..=MAX_ANSWER).rev().find(|at| out.is_char_boundary(*at));
            out.truncate(end.unwrap_or(0));
            out += "\n[the rest is left out: ask for other lines]";
            break;
        }
    }
    Ok(json!({"plain_text_response": out}))
}

/// Writes a file beside its old self and renames it.
fn store(path: &Path, content: &str) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(failed)?;
    let mut temp = tempfile::Builder::new();
    let before = std::fs::metadata(path).map(|m| m.permissions());
    let temp = match before {
        Ok(permissions) => temp.permissions(permissions).tempfile_in(dir),
        Err(_) => {
            use std::os::unix::fs::PermissionsExt;
            let usual = std::fs::Permissions::from_mode(0o644);
            temp.permissions(usual).tempfile_in(dir)
        }
    };
    let temp = temp.map_err(failed)?;
    std::fs::write(temp.path(), content).map_err(failed)?;
    temp.persist(path).map_err(|e| failed(e.error))?;
    Ok(())
}

/// Makes or replaces a file.
pub fn write(given: &Given<'_>) -> Result<Value, String> {
    let path = given.path("path")?;
    let content = text(given.params, "content")?;
    store(&path, content)?;
    Ok(json!({"result": "file written successfully", "bytes": content.len()}))
}

/// Replaces texts that each are in the file once.
pub fn edit(given: &Given<'_>) -> Result<Value, String> {
    let path = given.path("path")?;
    let edits = given.params.get("edits").and_then(Value::as_array);
    let edits = edits.filter(|e| !e.is_empty());
    let edits = edits.ok_or("`edits` must be a list with at least one edit")?;
    let before = load(&path)?;
    if before.contains('\u{fffd}') {
        return Err(format!("{}: is not UTF-8", path.display()));
    }
    let mut places = Vec::new();
    for (i, one) in edits.iter().enumerate() {
        let (old, new) = (text(one, "old_text")?, text(one, "new_text")?);
        if old.is_empty() {
            return Err(format!("edits[{i}].old_text is empty"));
        }
        match before.matches(old).count() {
            1 => {}
            n => {
                return Err(format!(
                    "edits[{i}].old_text is in the file {n} times; it must be unique"
                ));
            }
        }
        let at = before.find(old).unwrap_or(0);
        places.push((at, at + old.len(), new));
    }
    places.sort_unstable();
    if places.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err("the edits overlap".into());
    }
    let mut after = String::with_capacity(before.len());
    let mut from = 0;
    for (start, end, new) in &places {
        after += &before[from..*start];
        after += new;
        from = *end;
    }
    after += &before[from..];
    if after == before {
        return Err("the edits change nothing".into());
    }
    store(&path, &after)?;
    Ok(json!({"result": "file edited successfully", "edits_applied": places.len()}))
}

/// The pattern of parameter `name`, if given.
fn glob(params: &Value, name: &str) -> Result<Option<Glob>, String> {
    match params.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => Glob::new(text(params, name)?).map(Some),
    }
}

/// Files and folders whose names fit.
pub fn search(given: &Given<'_>) -> Result<Value, String> {
    let base = given.path("path")?;
    let params = given.params;
    let kind = params.get("type").and_then(Value::as_str).unwrap_or("file");
    let (files, dirs) = match kind {
        "file" => (true, false),
        "dir" => (false, true),
        "all" => (true, true),
        _ => return Err(format!("invalid type: {kind} (expected file, dir or all)")),
    };
    let limit = match int(params, "limit")? {
        None => MAX_ENTRIES,
        Some(n) if n >= 1 => (n as usize).min(MAX_ENTRIES),
        Some(n) => return Err(format!("invalid limit: {n} (expected 1 or more)")),
    };
    let depth = int(params, "max_depth")?.filter(|n| *n > 0);
    let (include, exclude) = (glob(params, "include")?, glob(params, "exclude")?);
    let listing = find::list(&base, depth.map(|n| n as usize))?;
    let fits: Vec<_> = (listing.entries.iter())
        .filter(|e| if e.is_dir { dirs } else { files })
        .filter(|e| include.as_ref().is_none_or(|g| g.fits(&e.path)))
        .filter(|e| !exclude.as_ref().is_some_and(|g| g.fits(&e.path)))
        .collect();
    let mut out = String::new();
    let mut entries = Vec::new();
    for entry in fits.iter().take(limit) {
        let end = if entry.is_dir { "/" } else { "" };
        out += &format!("{}{end}\n", entry.path);
        let kind = if entry.is_dir { "dir" } else { "file" };
        entries.push(json!({"path": entry.path, "type": kind}));
    }
    out += &format!("\n---\nTotal matches: {}\n", fits.len());
    if fits.len() > limit {
        out += &format!("[only the first {limit} are shown]\n");
    }
    if listing.is_cut {
        out += "[the folder holds more than was looked at]\n";
    }
    Ok(json!({"plain_text_response": out, "entries": entries, "base": base}))
}

/// Lines of files that match a pattern.
pub fn grep(given: &Given<'_>) -> Result<Value, String> {
    let base = given.path("path")?;
    let params = given.params;
    let pattern = text(params, "pattern")?;
    let pattern = match flag(params, "literal") {
        true => regex::escape(pattern),
        false => pattern.to_owned(),
    };
    let pattern = regex::RegexBuilder::new(&pattern)
        .case_insensitive(flag(params, "ignore_case"))
        .size_limit(1 << 20)
        .build()
        .map_err(|e| format!("invalid pattern: {e}"))?;
    let around = int(params, "context_lines")?.unwrap_or(0).clamp(0, 100) as usize;
    let numbered = flag(params, "return_line_numbers") || around > 0;
    let (include, exclude) = (glob(params, "include")?, glob(params, "exclude")?);
    let (files, is_cut) = match base.is_file() {
        true => (vec![(base.clone(), base.display().to_string())], false),
        false => {
            let listing = find::list(&base, None)?;
            let files = listing.entries.into_iter().filter(|e| !e.is_dir);
            let files = files
                .filter(|e| include.as_ref().is_none_or(|g| g.fits(&e.path)))
                .filter(|e| !exclude.as_ref().is_some_and(|g| g.fits(&e.path)))
                .map(|e| (base.join(&e.path), e.path));
            (files.collect(), listing.is_cut)
        }
    };
    let (mut out, mut total) = (String::new(), 0);
    'files: for (path, shown) in files {
        let Ok(content) = load(&path) else { continue };
        let lines: Vec<&str> = content.lines().collect();
        for i in (0..lines.len()).filter(|i| pattern.is_match(lines[*i])) {
            if total == MAX_MATCHES || out.len() > MAX_ANSWER {
                out += "[there is more: narrow the pattern]\n";
                break 'files;
            }
            total += 1;
            for j in i.saturating_sub(around)..(i + around + 1).min(lines.len()) {
                let mark = if i == j { ':' } else { '-' };
                out += &format!("{shown}{mark}");
                if numbered {
                    out += &format!("{}{mark}", j + 1);
                }
                out += lines[j];
                out.push('\n');
            }
            if around > 0 {
                out += "--\n";
            }
        }
    }
    out += &format!("\n---\nTotal matches: {total}\n");
    if is_cut {
        out += "[the folder holds more than was looked at]\n";
    }
    Ok(json!({"plain_text_response": out}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<'a>(params: &'a Value, cwd: &'a Path) -> Given<'a> {
        Given { params, cwd }
    }

    #[test]
    fn edits_apply_together_or_not_at_all() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("a/b.txt");
        let params = json!({"path": "a/b.txt", "content": "one\ntwo\ntwo\n"});
        write(&with(&params, dir.path())).expect("written");
        let try_edits = |edits: Value| {
            let params = json!({"path": path, "edits": edits});
            edit(&with(&params, dir.path()))
        };
        let one = |old: &str, new: &str| json!({"old_text": old, "new_text": new});
        for (edits, why) in [
            (json!([one("two", "x")]), "unique"),
            (json!([one("three", "x")]), "unique"),
            (json!([one("", "x")]), "empty"),
            (json!([one("one\n", "x"), one("ne", "y")]), "overlap"),
            (json!([one("one", "one")]), "nothing"),
            (json!([one("one", "1"), one("nine", "9")]), "unique"),
            (json!([]), "edits"),
        ] {
            let e = try_edits(edits).expect_err(why);
            assert!(e.contains(why), "{e}");
        }
        let before = std::fs::read_to_string(&path).expect("there");
        assert_eq!(before, "one\ntwo\ntwo\n");
        let done = try_edits(json!([one("two\ntwo", "2\n3"), one("one", "1")]));
        assert_eq!(done.expect("edited")["edits_applied"], 2);
        let after = std::fs::read_to_string(&path).expect("there");
        assert_eq!(after, "1\n2\n3\n");
        let params = json!({"path": path, "start_line": 2, "end_line": 2, "append_loc": true});
        let lines = read(&with(&params, dir.path())).expect("read");
        assert_eq!(lines["plain_text_response"], "2: 2\n");
    }
}
