//! What a chat model writes, taken apart as it comes: thoughts, content, calls of tools.

use mneme_engine::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// Marks around thoughts.
pub const THOUGHTS: &[(&str, &str)] = &[
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
];

/// How a model writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name":…,"arguments":…}</tool_call>`: Hermes, Qwen.
    Hermes,
    /// The whole answer is `{"name":…,"parameters":…}`, perhaps after `<|python_tag|>`: Llama 3.x.
    Llama,
    /// `[TOOL_CALLS][{"name":…,"arguments":…}]` or `[TOOL_CALLS]name[ARGS]{…}`: Mistral.
    Mistral,
}

impl ToolFormat {
    /// The format that a template teaches its model.
    pub fn of_template(source: &str) -> ToolFormat {
        let rows = [
            ("[TOOL_CALLS]", ToolFormat::Mistral),
            ("<tool_call>", ToolFormat::Hermes),
            ("<|python_tag|>", ToolFormat::Llama),
            ("<|start_header_id|>", ToolFormat::Llama),
        ];
        let row = rows.iter().find(|row| source.contains(row.0));
        row.map_or(ToolFormat::Hermes, |row| row.1)
    }

    fn begins(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Hermes => &["<tool_call>"],
            ToolFormat::Llama => &["<|python_tag|>"],
            ToolFormat::Mistral => &["[TOOL_CALLS]"],
        }
    }
}

/// How an answer is to be read.
#[derive(Clone, Debug, Default)]
pub struct Format {
    /// Whether thoughts are told apart from content.
    pub thoughts: bool,
    /// The mark that ends the thoughts, when the prompt has already begun them.
    pub open: Option<&'static str>,
    /// How tools are called; `None` without tools.
    pub tools: Option<ToolFormat>,
}

impl Format {
    /// Control tokens that must reach the reader as text.
    pub fn preserved(&self, vocab: &Tokenizer) -> Vec<u32> {
        let mut marks: Vec<&str> = Vec::new();
        if self.thoughts {
            marks.extend(THOUGHTS.iter().flat_map(|t| [t.0, t.1]));
        }
        if self.tools.is_some() {
            marks.extend(["<tool_call>", "</tool_call>", "<|python_tag|>"]);
            marks.extend(["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]);
        }
        marks.iter().filter_map(|m| vocab.token_id(m)).collect()
    }
}

/// A part of what was understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// More of the thoughts.
    Reasoning(String),
    /// More of the content.
    Content(String),
    /// A tool is called; its arguments follow.
    Call {
        /// Number of the call in this answer.
        index: usize,
        /// Name of the tool.
        name: String,
        /// Id of the call.
        id: String,
    },
    /// Arguments of call `index`, as JSON text.
    Arguments {
        /// Number of the call in this answer.
        index: usize,
        /// The text.
        text: String,
    },
}

/// A complete call.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Id of the call.
    pub id: String,
    /// Name of the tool.
    pub name: String,
    /// Arguments as JSON text.
    pub arguments: String,
}

/// A complete answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// Thoughts.
    pub reasoning: String,
    /// Content.
    pub content: String,
    /// Calls of tools.
    pub calls: Vec<ToolCall>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Nothing but white space so far.
    Start,
    /// Inside thoughts that end with this mark.
    Thinking(&'static str),
    /// Content, perhaps with calls in between.
    Content,
    /// Inside a call.
    Calling,
}

/// Reads an answer piece by piece.
#[derive(Debug)]
pub struct Reader {
    format: Format,
    state: State,
    /// Text not yet understood.
    rest: String,
    /// Everything understood so far.
    message: Message,
    /// Makes the id of a call.
    new_id: fn() -> String,
    /// Whether leading white space of the content is still to be dropped.
    trim: bool,
}

impl Reader {
    /// A reader at the beginning of an answer; calls that bring no id get one from `new_id`.
    pub fn new(format: Format, new_id: fn() -> String) -> Reader {
        let state = match format.open.filter(|_| format.thoughts) {
            Some(end) => State::Thinking(end),
            None => State::Start,
        };
        Reader {
            format,
            state,
            rest: String::new(),
            message: Message::default(),
            new_id,
            trim: false,
        }
    }

    /// What has been understood.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// Adds text and returns what it reveals; at the end everything left is given out.
    pub fn push(&mut self, text: &str, end: bool) -> Vec<Delta> {
        self.rest.push_str(text);
        let mut out = Vec::new();
        while self.step(end, &mut out) {}
        out.retain(|d| match d {
            Delta::Reasoning(t) | Delta::Content(t) => !t.is_empty(),
            Delta::Call { .. } | Delta::Arguments { .. } => true,
        });
        for delta in &out {
            match delta {
                Delta::Reasoning(t) => self.message.reasoning.push_str(t),
                Delta::Content(t) => self.message.content.push_str(t),
                Delta::Call { .. } | Delta::Arguments { .. } => {}
            }
        }
        out
    }

    /// One step of understanding; false when more text is needed.
    fn step(&mut self, end: bool, out: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Start => self.start(end, out),
            State::Thinking(mark) => self.think(mark, end, out),
            State::Content => self.content(end, out),
            State::Calling => self.call(end, out),
        }
    }

    fn start(&mut self, end: bool, _: &mut Vec<Delta>) -> bool {
        let body = self.rest.trim_start();
        let thoughts = if self.format.thoughts { THOUGHTS } else { &[] };
        if let Some((begin, mark)) = thoughts.iter().find(|t| body.starts_with(t.0)) {
            self.rest = body[begin.len()..].trim_start_matches('\n').to_owned();
            self.state = State::Thinking(mark);
            return true;
        }
        if self.format.tools == Some(ToolFormat::Llama) && body.starts_with('{') {
            self.state = State::Calling;
            return true;
        }
        let may_begin = thoughts.iter().any(|t| t.0.starts_with(body))
            || (self.format.tools == Some(ToolFormat::Llama) && body.is_empty());
        if may_begin && !end && (thoughts.len() + usize::from(self.format.tools.is_some())) > 0 {
            return false;
        }
        self.state = State::Content;
        true
    }

    fn think(&mut self, mark: &'static str, end: bool, out: &mut Vec<Delta>) -> bool {
        if self.message.reasoning.is_empty() {
            // The line break after the opening mark may come in a later piece.
            let n = self.rest.len() - self.rest.trim_start_matches('\n').len();
            self.rest.drain(..n);
        }
        if let Some(at) = self.rest.find(mark) {
            out.push(Delta::Reasoning(self.rest[..at].trim_end().to_owned()));
            self.rest.drain(..at + mark.len());
            self.state = State::Start;
            self.format.thoughts = false;
            self.trim = true;
            return true;
        }
        // White space before the mark belongs to it.
        let mut keep = match end {
            true => 0,
            false => overlap(&self.rest, mark),
        };
        if !end || keep > 0 {
            let before = &self.rest[..self.rest.len() - keep];
            keep += before.len() - before.trim_end().len();
        }
        self.give(keep, out, Delta::Reasoning);
        false
    }

    fn content(&mut self, end: bool, out: &mut Vec<Delta>) -> bool {
        if self.trim {
            let n = self.rest.len() - self.rest.trim_start().len();
            self.rest.drain(..n);
            if self.rest.is_empty() {
                return false;
            }
            self.trim = false;
        }
        let Some(tools) = self.format.tools else {
            self.give(0, out, Delta::Content);
            return false;
        };
        for begin in tools.begins() {
            if let Some(at) = self.rest.find(begin) {
                let before = self.rest[..at].trim_end().to_owned();
                out.push(Delta::Content(before));
                self.rest.drain(..at + begin.len());
                self.state = State::Calling;
                return true;
            }
        }
        let mut keep = 0;
        if !end {
            keep = tools
                .begins()
                .iter()
                .map(|b| overlap(&self.rest, b))
                .max()
                .unwrap_or(0);
            let before = &self.rest[..self.rest.len() - keep];
            keep += before.len() - before.trim_end().len();
        }
        self.give(keep, out, Delta::Content);
        false
    }

    /// Gives out all but the last `keep` bytes of the rest.
    fn give(&mut self, keep: usize, out: &mut Vec<Delta>, make: fn(String) -> Delta) {
        let n = self.rest.len() - keep;
        out.push(make(self.rest.drain(..n).collect()));
    }

    fn call(&mut self, end: bool, out: &mut Vec<Delta>) -> bool {
        let tools = self.format.tools.unwrap_or(ToolFormat::Hermes);
        match parse_calls(tools, &self.rest) {
            Parsed::Calls(calls, used) => {
                for call in calls {
                    let index = self.message.calls.len();
                    let call = ToolCall {
                        id: call.id.clone().unwrap_or_else(self.new_id),
                        name: call.name,
                        arguments: call.arguments,
                    };
                    out.push(Delta::Call {
                        index,
                        name: call.name.clone(),
                        id: call.id.clone(),
                    });
                    out.push(Delta::Arguments {
                        index,
                        text: call.arguments.clone(),
                    });
                    self.message.calls.push(call);
                }
                self.rest.drain(..used);
                self.state = State::Content;
                self.trim = true;
                true
            }
            Parsed::More if !end => false,
            // What cannot be read as a call is what the model said.
            Parsed::More | Parsed::Not => {
                let written = match (tools, self.rest.trim_start().starts_with('{')) {
                    (ToolFormat::Llama, true) => String::new(),
                    (format, _) => format.begins()[0].to_owned(),
                };
                out.push(Delta::Content(written + &std::mem::take(&mut self.rest)));
                self.format.tools = None;
                self.state = State::Content;
                true
            }
        }
    }
}

/// Length of the longest end of `text` that begins `mark`.
fn overlap(text: &str, mark: &str) -> usize {
    (1..mark.len().min(text.len() + 1))
        .rev()
        .find(|&n| mark.is_char_boundary(n) && text.ends_with(&mark[..n]))
        .unwrap_or(0)
}

struct RawCall {
    id: Option<String>,
    name: String,
    arguments: String,
}

enum Parsed {
    /// Calls, and how many bytes they took.
    Calls(Vec<RawCall>, usize),
    /// More text is needed.
    More,
    /// No call at all.
    Not,
}

/// Reads one JSON value at the start of `text`; `Err(true)` when it may become one.
fn json_prefix(text: &str) -> Result<(Value, usize), bool> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    match stream.next() {
        Some(Ok(value)) => Ok((value, stream.byte_offset())),
        Some(Err(e)) => Err(e.is_eof()),
        None => Err(true),
    }
}

fn raw_call(value: &Value) -> Option<RawCall> {
    // Some models wrap the call once more.
    let value = value
        .get("function")
        .filter(|f| f.is_object())
        .unwrap_or(value);
    let name = value.get("name")?.as_str()?.to_owned();
    let arguments = value.get("arguments").or_else(|| value.get("parameters"));
    Some(RawCall {
        id: value.get("id").and_then(Value::as_str).map(String::from),
        name,
        arguments: match arguments {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => "{}".into(),
        },
    })
}

fn parse_calls(format: ToolFormat, text: &str) -> Parsed {
    let lead = text.len() - text.trim_start().len();
    let body = &text[lead..];
    if body.is_empty() {
        return Parsed::More;
    }
    match format {
        ToolFormat::Hermes if body.starts_with('<') || "<function=".starts_with(body) => {
            parse_tagged(text)
        }
        ToolFormat::Mistral if !body.starts_with('[') => {
            // name[ARGS]{…}
            let Some(at) = body.find("[ARGS]") else {
                return match body.contains(['{', '\n']) {
                    true => Parsed::Not,
                    false => Parsed::More,
                };
            };
            let name = body[..at].split("[CALL_ID]").next().unwrap_or("").trim();
            match json_prefix(&body[at + 6..]) {
                Ok((arguments, used)) => Parsed::Calls(
                    vec![RawCall {
                        id: None,
                        name: name.to_owned(),
                        arguments: arguments.to_string(),
                    }],
                    lead + at + 6 + used,
                ),
                Err(true) => Parsed::More,
                Err(false) => Parsed::Not,
            }
        }
        _ => match json_prefix(body) {
            Ok((value, used)) => {
                let calls: Option<Vec<RawCall>> = match &value {
                    Value::Array(all) => all.iter().map(raw_call).collect(),
                    one => raw_call(one).map(|call| vec![call]),
                };
                let Some(calls) = calls.filter(|c| !c.is_empty()) else {
                    return Parsed::Not;
                };
                let mut used = lead + used;
                if format == ToolFormat::Hermes {
                    let close = "</tool_call>";
                    let after = text[used..].trim_start();
                    if after.starts_with(close) {
                        used = text.len() - after.len() + close.len();
                    } else if close.starts_with(after) {
                        return Parsed::More;
                    }
                }
                Parsed::Calls(calls, used)
            }
            Err(true) => Parsed::More,
            Err(false) => Parsed::Not,
        },
    }
}

/// `<function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, as Qwen3-Coder writes.
fn parse_tagged(text: &str) -> Parsed {
    let close = "</tool_call>";
    let Some(end) = text.find(close) else {
        return Parsed::More;
    };
    let Some(rest) = text[..end].trim().strip_prefix("<function=") else {
        return Parsed::Not;
    };
    let Some((name, mut body)) = rest.split_once('>') else {
        return Parsed::Not;
    };
    let mut arguments = serde_json::Map::new();
    while let Some((_, after)) = body.split_once("<parameter=") {
        let Some((key, after)) = after.split_once('>') else {
            return Parsed::Not;
        };
        let (value, after) = after.split_once("</parameter>").unwrap_or((after, ""));
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let parsed = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
        arguments.insert(key.trim().to_owned(), parsed);
        body = after;
    }
    let call = RawCall {
        id: None,
        name: name.trim().to_owned(),
        arguments: Value::Object(arguments).to_string(),
    };
    Parsed::Calls(vec![call], end + close.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `text` whole, and in pieces of every size: the message must be the same.
    fn read(format: &Format, text: &str) -> Message {
        let id = || "id".to_string();
        let mut whole = Reader::new(format.clone(), id);
        whole.push(text, true);
        for size in 1..text.len() {
            let mut reader = Reader::new(format.clone(), id);
            let mut at = 0;
            let mut shown = Message::default();
            while at < text.len() {
                let mut to = (at + size).min(text.len());
                while !text.is_char_boundary(to) {
                    to += 1;
                }
                for delta in reader.push(&text[at..to], to == text.len()) {
                    match delta {
                        Delta::Reasoning(t) => shown.reasoning += &t,
                        Delta::Content(t) => shown.content += &t,
                        Delta::Call { name, id, .. } => shown.calls.push(ToolCall {
                            id,
                            name,
                            arguments: String::new(),
                        }),
                        Delta::Arguments { index, text } => shown.calls[index].arguments += &text,
                    }
                }
                at = to;
            }
            assert_eq!(&shown, whole.message(), "pieces of {size}");
        }
        whole.message().clone()
    }

    fn tools(format: ToolFormat) -> Format {
        Format {
            thoughts: true,
            open: None,
            tools: Some(format),
        }
    }

    #[test]
    fn plain_text_stays_as_it_is() {
        let format = Format::default();
        assert_eq!(
            read(&format, " Hello <think> {x}\n").content,
            " Hello <think> {x}\n"
        );
    }

    #[test]
    fn thoughts_are_told_apart() {
        let format = Format {
            thoughts: true,
            ..Format::default()
        };
        let m = read(&format, "<think>\nHm, é.\n</think>\n\nYes.");
        assert_eq!(
            (m.reasoning.as_str(), m.content.as_str()),
            ("Hm, é.", "Yes.")
        );
        let m = read(&format, "<thin ice");
        assert_eq!(
            (m.reasoning.as_str(), m.content.as_str()),
            ("", "<thin ice")
        );
        let open = Format {
            thoughts: true,
            open: Some("</think>"),
            tools: None,
        };
        let m = read(&open, "Hm.</think>Yes.");
        assert_eq!((m.reasoning.as_str(), m.content.as_str()), ("Hm.", "Yes."));
        let m = read(&open, "never ends");
        assert_eq!(
            (m.reasoning.as_str(), m.content.as_str()),
            ("never ends", "")
        );
    }

    #[test]
    fn hermes_calls() {
        let text = "Let me look.\n<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": [1, \"}\"]}}\n</tool_call>\n<tool_call>{\"name\":\"b\",\"arguments\":{}}</tool_call>";
        let m = read(&tools(ToolFormat::Hermes), text);
        assert_eq!(m.content, "Let me look.");
        assert_eq!(m.calls.len(), 2);
        assert_eq!(
            (m.calls[0].name.as_str(), m.calls[0].arguments.as_str()),
            ("a", r#"{"x":[1,"}"]}"#)
        );
        assert_eq!(m.calls[1].name, "b");
    }

    #[test]
    fn tagged_calls() {
        let text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=s>\nhi there\n</parameter>\n</function>\n</tool_call>";
        let m = read(&tools(ToolFormat::Hermes), text);
        assert_eq!(m.calls[0].name, "f");
        assert_eq!(m.calls[0].arguments, r#"{"a":1,"s":"hi there"}"#);
    }

    #[test]
    fn llama_calls() {
        for lead in ["", "<|python_tag|>", "\n"] {
            let text = format!("{lead}{{\"name\": \"f\", \"parameters\": {{\"x\": 1}}}}");
            let m = read(&tools(ToolFormat::Llama), &text);
            assert_eq!(m.calls[0].arguments, r#"{"x":1}"#, "{lead:?}");
            assert_eq!(m.content, "");
        }
    }

    #[test]
    fn mistral_calls() {
        let m = read(
            &tools(ToolFormat::Mistral),
            r#"[TOOL_CALLS][{"name":"f","arguments":{"x":1},"id":"abc"}]"#,
        );
        assert_eq!(
            (m.calls[0].id.as_str(), m.calls[0].arguments.as_str()),
            ("abc", r#"{"x":1}"#)
        );
        let m = read(
            &tools(ToolFormat::Mistral),
            r#"Sure.[TOOL_CALLS]f[ARGS]{"x":1}"#,
        );
        assert_eq!(
            (m.content.as_str(), m.calls[0].name.as_str()),
            ("Sure.", "f")
        );
    }

    #[test]
    fn what_is_no_call_is_content() {
        for (format, text) in [
            (ToolFormat::Llama, "{ \"story\": true } and more"),
            (ToolFormat::Llama, "{ not json"),
            (ToolFormat::Hermes, "<tool_call>{broken"),
            (ToolFormat::Mistral, "a [TOOL"),
            (ToolFormat::Hermes, "1 < 2 <tool"),
        ] {
            let m = read(&tools(format), text);
            assert_eq!((m.content.as_str(), m.calls.len()), (text, 0));
        }
    }
}
