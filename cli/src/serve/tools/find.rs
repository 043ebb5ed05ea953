//! Listings of folders, and patterns of names.

use std::path::Path;
use std::time::{Duration, Instant};

/// Folders that are shown but not entered: large, and made by programs.
const SKIPPED: &[&str] = &[
    ".git",
    ".hg",
    ".svn",
    ".venv",
    "__pycache__",
    "build",
    "dist",
    "node_modules",
    "target",
    "venv",
];
/// Most entries looked at.
const MAX_LOOKED: usize = 100_000;
/// Most time spent looking.
const MAX_TIME: Duration = Duration::from_secs(15);
/// Deepest folder entered.
const MAX_DEPTH: usize = 64;

/// A file or folder below the base.
pub struct Entry {
    /// Its path from there, with `/`.
    pub path: String,
    pub is_dir: bool,
}

/// What is below a folder.
pub struct Listing {
    /// In order of their paths.
    pub entries: Vec<Entry>,
    /// Whether there was too much to look at all of it.
    pub is_cut: bool,
}

/// Everything below `base`, down to `depth` levels. Links are listed as files and not followed.
pub fn list(base: &Path, depth: Option<usize>) -> Result<Listing, String> {
    let begin = Instant::now();
    let mut out = Listing {
        entries: Vec::new(),
        is_cut: false,
    };
    let first = std::fs::read_dir(base).map_err(|e| format!("{}: {e}", base.display()))?;
    let depth = depth.unwrap_or(MAX_DEPTH).min(MAX_DEPTH);
    let mut open = vec![(String::new(), first)];
    while let Some((prefix, dir)) = open.last_mut() {
        let Some(entry) = dir.next() else {
            open.pop();
            continue;
        };
        if out.entries.len() == MAX_LOOKED || begin.elapsed() > MAX_TIME {
            out.is_cut = true;
            break;
        }
        let Ok(entry) = entry else { continue };
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        if is_dir && !SKIPPED.contains(&name.as_str()) && open.len() < depth {
            // A folder that may not be read is listed without what is in it.
            if let Ok(dir) = std::fs::read_dir(entry.path()) {
                open.push((format!("{path}/"), dir));
            }
        }
        out.entries.push(Entry { path, is_dir });
    }
    out.entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

/// A pattern of paths: `*` and `?` within a name, `**` over folders, `[a-z]`. Without a `/` it is
/// about the last name of a path.
pub struct Glob {
    pattern: regex::Regex,
    is_name: bool,
}

impl Glob {
    /// Reads a pattern.
    pub fn new(text: &str) -> Result<Glob, String> {
        let mut pattern = String::from("^(?s:");
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if let Some(after) = rest.strip_prefix("**/") {
                pattern += "(?:.*/)?";
                rest = after;
                continue;
            }
            if let Some(after) = rest.strip_prefix("**") {
                pattern += ".*";
                rest = after;
                continue;
            }
            rest = &rest[c.len_utf8()..];
            match c {
                '*' => pattern += "[^/]*",
                '?' => pattern += "[^/]",
                '[' => {
                    let Some((inside, after)) = rest.split_once(']') else {
                        return Err(format!("`{text}`: `[` without `]`"));
                    };
                    let (not, inside) = match inside.strip_prefix(['!', '^']) {
                        Some(inside) => ("^", inside),
                        None => ("", inside),
                    };
                    pattern += &format!(
                        "[{not}{}]",
                        inside.replace('\\', "\\\\").replace('[', "\\[")
                    );
                    rest = after;
                }
                c => pattern += &regex::escape(c.encode_utf8(&mut [0; 4])),
            }
        }
        pattern += ")$";
        let pattern = regex::Regex::new(&pattern).map_err(|e| format!("`{text}`: {e}"))?;
        Ok(Glob {
            pattern,
            is_name: !text.contains('/'),
        })
    }

    /// Whether a path fits.
    pub fn fits(&self, path: &str) -> bool {
        let name = match self.is_name {
            true => path.rsplit('/').next().unwrap_or(path),
            false => path,
        };
        self.pattern.is_match(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_names_and_paths() {
        for (pattern, path, fits) in [
            ("*.rs", "a/b/c.rs", true),
            ("*.rs", "a/b/c.rsx", false),
            ("a/*.rs", "a/c.rs", true),
            ("a/*.rs", "a/b/c.rs", false),
            ("a/**/*.rs", "a/c.rs", true),
            ("a/**/*.rs", "a/b/d/c.rs", true),
            ("**", "anything/at/all", true),
            ("?[a-c].t", "xb.t", true),
            ("?[!a-c].t", "xb.t", false),
            ("a+b", "a+b", true),
            ("*proj*", "x/project", true),
        ] {
            let glob = Glob::new(pattern).expect(pattern);
            assert_eq!(glob.fits(path), fits, "{pattern} {path}");
        }
        assert!(Glob::new("[a").is_err());
    }

    #[test]
    fn listings_skip_what_programs_made_and_follow_no_links() {
        let dir = tempfile::tempdir().expect("a folder");
        for name in ["src/deep", "build"] {
            std::fs::create_dir_all(dir.path().join(name)).expect(name);
        }
        for name in ["src/deep/x", "build/y", "z"] {
            std::fs::write(dir.path().join(name), "").expect(name);
        }
        std::os::unix::fs::symlink(dir.path(), dir.path().join("round")).expect("a link");
        let paths = |depth| {
            let all = list(dir.path(), depth).expect("listed").entries;
            all.into_iter().map(|e| e.path).collect::<Vec<_>>()
        };
        assert_eq!(paths(Some(1)), ["build", "round", "src", "z"]);
        let all = ["build", "round", "src", "src/deep", "src/deep/x", "z"];
        assert_eq!(paths(None), all);
        assert!(list(&dir.path().join("none"), None).is_err());
    }
}
