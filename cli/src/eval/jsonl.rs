//! Samples from JSONL files: our own, RULER's and LongBench's.
//!
//! One object a line. The text is `context`, `text`, or RULER's whole `input`; the question is
//! `question`, or LongBench's `input`; what is right is `answers`, `outputs`, `answer` or `output`.

use super::sample::{Question, Sample, Segment};
use super::score::Score;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

/// Tokens an answer to a file's question may take unless the file says so.
const N_PREDICT: usize = 64;

/// Reads all samples of `path`. `score` overrides what suits the format: all answers for RULER,
/// words in common for LongBench, equality for our own. Errors name file and line.
pub fn read(path: &Path, score: Option<Score>) -> Result<Vec<Sample>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut out = Vec::new();
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let here = || format!("{}:{}", path.display(), i + 1);
        let line = line.with_context(here)?;
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            continue;
        }
        out.push(sample(line, score).with_context(here)?);
    }
    if out.is_empty() {
        bail!("{} holds no samples", path.display());
    }
    Ok(out)
}

/// One line of a file.
fn sample(line: &str, score: Option<Score>) -> Result<Sample> {
    let value: Value = serde_json::from_str(line).context("not a JSON value")?;
    let Value::Object(row) = value else {
        bail!("expected an object");
    };
    let text_of = |key: &str| -> Result<Option<&str>> {
        match row.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => bail!("`{key}` must be a string, got {}", kind(other)),
        }
    };
    let context = match text_of("context")? {
        Some(text) => Some(text),
        None => text_of("text")?,
    };
    let input = text_of("input")?;
    let question = text_of("question")?;
    let (text, question) = match (context, input, question) {
        (Some(text), _, Some(question)) | (Some(text), Some(question), None) => (text, question),
        (None, Some(text), question) => (text, question.unwrap_or("")),
        (Some(text), None, None) => (text, ""),
        (None, None, _) => bail!("no text: `context`, `text` or `input` expected"),
    };
    let keys = ["answers", "outputs", "answer", "output"];
    let Some(key) = keys
        .into_iter()
        .find(|k| row.get(*k).is_some_and(|v| !v.is_null()))
    else {
        bail!("no answer: one of `{}` expected", keys.join("`, `"));
    };
    let answers = strings(key, &row[key])?;
    if answers.is_empty() {
        bail!("`{key}` is empty");
    }
    let ours = row.get("facts").is_some_and(Value::is_array);
    let (default, format) = match key {
        "outputs" => (Score::All, "ruler"),
        _ if ours => (Score::Exact, "records"),
        _ => (Score::F1, "longbench"),
    };
    let score = match (score, text_of("score")?) {
        (Some(score), _) => score,
        (None, Some(name)) => <Score as clap::ValueEnum>::from_str(name, true)
            .map_err(|_| anyhow::anyhow!("unknown score `{name}`"))?,
        (None, None) => default,
    };
    let offsets: Vec<usize> = (text.char_indices().map(|(at, _)| at))
        .chain([text.len()])
        .collect();
    let facts = match row.get("facts") {
        Some(Value::Array(list)) => list
            .iter()
            .map(|f| range(f, &offsets))
            .collect::<Result<_>>()?,
        _ => Vec::new(),
    };
    let n_predict = match row.get("max_tokens") {
        None | Some(Value::Null) => N_PREDICT,
        Some(n) => match n.as_u64() {
            Some(n @ 1..=4096) => n as usize,
            _ => bail!("`max_tokens` must be 1..=4096, got {n}"),
        },
    };
    let chance = row.get("chance").and_then(Value::as_f64).unwrap_or(0.0);
    Ok(Sample {
        task: match (text_of("task")?, text_of("dataset")?) {
            (Some(name), _) | (None, Some(name)) => name.into(),
            (None, None) => format.into(),
        },
        segments: segments(&row, &offsets)?,
        questions: vec![Question {
            text: question.into(),
            prefix: text_of("answer_prefix")?.unwrap_or("").into(),
            answers,
            facts,
            chance,
        }],
        text: text.into(),
        score,
        n_predict,
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A string, a number, or an array of them.
fn strings(key: &str, value: &Value) -> Result<Vec<String>> {
    match value {
        Value::String(s) => Ok(vec![s.clone()]),
        Value::Number(n) => Ok(vec![n.to_string()]),
        Value::Array(list) => {
            let one = |v: &Value| match v {
                Value::String(s) => Ok(s.clone()),
                Value::Number(n) => Ok(n.to_string()),
                other => bail!("`{key}` must hold strings, got {}", kind(other)),
            };
            list.iter().map(one).collect()
        }
        other => bail!("`{key}` must be a string or an array, got {}", kind(other)),
    }
}

/// Bytes of `{"start", "end"}` in characters.
fn range(value: &Value, offsets: &[usize]) -> Result<Range<usize>> {
    let number = |key: &str| value.get(key).and_then(Value::as_u64);
    match (number("start"), number("end")) {
        (Some(a), Some(b)) if a < b && (b as usize) < offsets.len() => {
            Ok(offsets[a as usize]..offsets[b as usize])
        }
        _ => bail!("`facts` holds {value}, expected start < end inside the text"),
    }
}

/// Sentences from the `ends` of facts and `filler_ends`; those that are missing make none.
fn segments(row: &Map<String, Value>, offsets: &[usize]) -> Result<Vec<Segment>> {
    let mut ends = Vec::new();
    for (key, fact) in [("ends", true), ("filler_ends", false)] {
        let list = match row.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Array(list)) => list,
            Some(other) => bail!("`{key}` must be an array, got {}", kind(other)),
        };
        for end in list {
            match end.as_u64() {
                Some(end) if (end as usize) < offsets.len() => {
                    ends.push((offsets[end as usize], fact));
                }
                _ => bail!("`{key}` holds {end}, expected an offset inside the text"),
            }
        }
    }
    ends.sort_unstable();
    let mut start = 0;
    let mut out = Vec::new();
    for (end, fact) in ends {
        if end <= start {
            bail!("`ends` and `filler_ends` name the offset of byte {end} twice");
        }
        out.push(Segment {
            range: start..end,
            fact,
        });
        start = end;
    }
    Ok(out)
}

/// A sample's questions as lines of our own format, offsets in characters.
pub fn write(sample: &Sample, extra: &Map<String, Value>) -> Vec<String> {
    // Byte offsets to characters, by one walk over the text.
    let mut chars = vec![0usize; sample.text.len() + 1];
    let mut n = 0;
    for (at, c) in sample.text.char_indices() {
        chars[at] = n;
        n += 1;
        let _ = c;
    }
    chars[sample.text.len()] = n;
    let ends = |fact| -> Vec<usize> { sample.ends(fact).iter().map(|&b| chars[b]).collect() };
    let line = |q: &Question| {
        let facts: Vec<Value> = (q.facts.iter())
            .map(|f| json!({"start": chars[f.start], "end": chars[f.end]}))
            .collect();
        let mut row = json!({
            "task": sample.task,
            "text": sample.text,
            "question": q.text,
            "answers": q.answers,
            "facts": facts,
            "ends": ends(true),
            "filler_ends": ends(false),
            "score": sample.score,
            "max_tokens": sample.n_predict,
            "chance": q.chance,
        });
        let map = row.as_object_mut().expect("an object was just made");
        if let [answer] = &q.answers[..] {
            map.insert("answer".into(), json!(answer));
        }
        if !q.prefix.is_empty() {
            map.insert("answer_prefix".into(), json!(q.prefix));
        }
        map.extend(extra.iter().map(|(k, v)| (k.clone(), v.clone())));
        row.to_string()
    };
    sample.questions.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::records::{Relations, Shape, record};
    use std::io::Write;

    #[test]
    fn formats_of_the_benchmarks() {
        let ruler = r#"{"index": 0, "input": "Hay. The number is 17.", "outputs": ["17"], "length": 9, "answer_prefix": " It is"}"#;
        let s = sample(ruler, None).unwrap();
        assert_eq!((s.task.as_str(), s.score), ("ruler", Score::All));
        assert_eq!(s.questions[0].text, "");
        assert_eq!(s.questions[0].prefix, " It is");
        let longbench = r#"{"input": "Who?", "context": "It was Ann.", "answers": ["Ann", "Anna"], "length": 3, "dataset": "hotpotqa", "language": "en", "all_classes": null, "_id": "x"}"#;
        let s = sample(longbench, None).unwrap();
        assert_eq!((s.task.as_str(), s.score), ("hotpotqa", Score::F1));
        assert_eq!(s.text, "It was Ann.");
        assert_eq!(s.questions[0].text, "Who?");
        assert_eq!(s.questions[0].answers, ["Ann", "Anna"]);
        let s = sample(longbench, Some(Score::Part)).unwrap();
        assert_eq!(s.score, Score::Part);
        let number = r#"{"text": "a", "question": "b", "answer": 7}"#;
        assert_eq!(sample(number, None).unwrap().questions[0].answers, ["7"]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        for relations in [Relations::English, Relations::Chinese] {
            let shape = Shape {
                task: "single".into(),
                n_facts: 5,
                n_filler: 6,
                n_questions: 3,
                relations,
                repeat: 0.0,
                terse: 0.0,
            };
            let s = record("9:9", &shape).unwrap();
            let lines = write(&s, &Map::new());
            assert_eq!(lines.len(), 3);
            for (line, q) in lines.iter().zip(&s.questions) {
                let back = sample(line, None).unwrap();
                assert_eq!(back.questions[0], *q);
                assert_eq!(back.text, s.text);
                assert_eq!(
                    (back.ends(true), back.ends(false)),
                    (s.ends(true), s.ends(false))
                );
                assert_eq!(back.score, Score::Exact);
            }
        }
    }

    #[test]
    fn broken_lines_say_what_is_wrong() {
        for (line, what) in [
            ("{", "not a JSON value"),
            ("[1]", "expected an object"),
            (r#"{"question": "q", "answer": "a"}"#, "no text"),
            (
                r#"{"text": 5, "answer": "a"}"#,
                "`text` must be a string, got a number",
            ),
            (r#"{"text": "t", "question": "q"}"#, "no answer"),
            (r#"{"text": "t", "answers": []}"#, "`answers` is empty"),
            (
                r#"{"text": "t", "answers": [null]}"#,
                "must hold strings, got null",
            ),
            (r#"{"text": "t", "answers": {"a": 1}}"#, "got an object"),
            (
                r#"{"text": "tt", "answer": "a", "facts": [{"start": 1, "end": 9}]}"#,
                "inside the text",
            ),
            (
                r#"{"text": "tt", "answer": "a", "facts": [{"start": 1, "end": 1}]}"#,
                "start < end",
            ),
            (r#"{"text": "tt", "answer": "a", "ends": [7]}"#, "holds 7"),
            (r#"{"text": "tt", "answer": "a", "ends": [1, 1]}"#, "twice"),
            (
                r#"{"text": "t", "answer": "a", "score": "best"}"#,
                "unknown score `best`",
            ),
            (
                r#"{"text": "t", "answer": "a", "max_tokens": -1}"#,
                "`max_tokens`",
            ),
        ] {
            let e = format!("{:#}", sample(line, None).unwrap_err());
            assert!(e.contains(what), "{line}: {e}");
        }
    }

    #[test]
    fn files_name_their_lines() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "\u{feff}{{\"text\": \"t\", \"answer\": \"a\"}}\n\n").unwrap();
        assert_eq!(read(file.path(), None).unwrap().len(), 1);
        writeln!(file, "oops").unwrap();
        let e = format!("{:#}", read(file.path(), None).unwrap_err());
        assert!(e.contains(":4: not a JSON value"), "{e}");
        file.write_all(&[0xff, 0xfe, b'\n']).unwrap();
        assert!(read(file.path(), None).is_err());
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(read(empty.path(), None).is_err());
        assert!(read(Path::new("no such file"), None).is_err());
    }
}
