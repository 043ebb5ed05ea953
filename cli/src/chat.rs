//! `mneme chat`: a conversation on a live memory.
//!
//! What has been read is never read again: each turn only the text that the template adds is fed.
//! When a template changes what came before (some leave out old reasoning), the sequence goes back
//! to where the texts part.

use crate::args::{GrammarArgs, MemoryArgs, ModelArgs, SamplingArgs, parse_positive};
use crate::bytes::human_bytes;
use crate::generate::{Limits, Speaker, Stop};
use crate::interrupt::{self, Interrupted};
use crate::saved::{Saved, Turn};
use anyhow::{Context, Result, bail};
use mneme_engine::chat::{ChatTemplate, RenderInput};
use mneme_engine::grammar::Grammar;
use mneme_engine::sampler::{Sampler, SamplerParams};
use mneme_engine::{Engine, Error, Output, Sequence};
use mneme_kernels::attend::PAGE_CELLS;
use rustyline::error::ReadlineError;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Arguments of `mneme chat`.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  mneme chat -m model.gguf -sys 'Answer briefly.' \
    --memory window:window=4096,sinks=4\n\nType /help in the conversation for its commands. \
    Ctrl-C stops an answer, Ctrl-D ends the conversation. When stdin is no terminal, every line \
    is a message."
)]
pub struct Args {
    /// First message of the system (short: -sys)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system_prompt: Option<String>,
    /// First message of the user
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Most tokens of an answer; -1 for no limit
    #[arg(short, long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    n_predict: i64,
    /// Stop answers at this text; may be repeated
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    reverse_prompt: Vec<String>,
    /// Chat template: a built-in name, or Jinja text [default: the model's]
    #[arg(long, value_name = "NAME|TEXT", conflicts_with = "chat_template_file")]
    chat_template: Option<String>,
    /// File with a chat template
    #[arg(long, value_name = "FILE")]
    chat_template_file: Option<PathBuf>,
    /// Further variables of the template, as JSON: '{"enable_thinking": false}'
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Go on from this file if it exists, and save there at the end
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Tokens read between two looks at Ctrl-C
    #[arg(short, long, value_name = "N", default_value_t = 2048, value_parser = parse_positive)]
    batch_size: usize,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    grammar: GrammarArgs,
}

const HELP: &str = "\
/help              this list
/reset             start anew
/undo              take back the last message and its answer
/file PATH         read a text file into the next message
/save FILE         save the conversation
/load FILE         go on with a saved one
/stats             numbers about the conversation
/memory            what the memory holds
/set NAME VALUE    change a dial: temp, top_k, top_p, min_p, seed, n_predict, ...; tau, target_rate
/exit              leave (Ctrl-D)
A line that ends in \\ goes on in the next one.";

fn parse_object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|e| format!("expected a JSON object: {e}"))
}

struct Chat<'a> {
    args: &'a Args,
    engine: Engine,
    template: ChatTemplate,
    params: SamplerParams,
    sampler: Sampler,
    seq: Sequence,
    pending: Vec<u32>,
    messages: Vec<Value>,
    /// The text that `seq` and `pending` hold.
    rendered: String,
    turns: Vec<Turn>,
    /// Text of files for the next message.
    draft: String,
    /// As it stands before an answer.
    grammar: Option<Grammar>,
    n_predict: i64,
    stops: Vec<String>,
    n_said: usize,
    seconds: f64,
    colour: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    interrupt::watch();
    let params = args.sampling.params()?;
    let engine = args.model.load(args.memory.contexts())?;
    let model = engine.model.clone();
    let template = match (&args.chat_template, &args.chat_template_file) {
        (Some(text), _) if text.contains('{') => ChatTemplate::new(text)?,
        (Some(name), _) => ChatTemplate::named(name)?,
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            ChatTemplate::new(&text)?
        }
        (None, None) => ChatTemplate::from_gguf(model.gguf())?,
    };
    if template.is_fallback() {
        eprintln!("the model has no chat template; ChatML is used");
    }
    let seq = args.memory.sequence(&engine)?;
    let mut chat = Chat {
        sampler: Sampler::new(&params, &model.tokenizer)?,
        args,
        template,
        params,
        seq,
        pending: Vec::new(),
        messages: Vec::new(),
        rendered: String::new(),
        turns: Vec::new(),
        draft: String::new(),
        grammar: args.grammar.build(&model.tokenizer)?,
        n_predict: args.n_predict,
        stops: args.reverse_prompt.clone(),
        n_said: 0,
        seconds: 0.0,
        colour: std::io::stdout().is_terminal(),
        engine,
    };
    chat.start();
    if let Some(path) = args.session.as_deref().filter(|path| path.exists()) {
        chat.load(path)?;
    }
    if let Some(text) = &args.prompt {
        chat.say(text)?;
    }
    let ended = match std::io::stdin().is_terminal() {
        true => chat.edit(),
        false => chat.lines(),
    };
    if let Some(path) = &args.session {
        chat.save(path)?;
    }
    ended
}

impl Chat<'_> {
    /// The beginning of a conversation.
    fn start(&mut self) {
        self.messages.clear();
        if let Some(text) = &self.args.system_prompt {
            let message = json!({"role": "system", "content": text});
            self.messages.push(message);
        }
    }

    /// Reads messages with line editing until Ctrl-D.
    fn edit(&mut self) -> Result<()> {
        let mut editor = rustyline::DefaultEditor::new().context("terminal")?;
        let history = history_file();
        if let Some(path) = &history {
            let _ = editor.load_history(path);
        }
        println!(
            "{} with memory {}; /help for help",
            self.name(),
            self.seq.spec()
        );
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { "> " } else { "  " };
            match editor.readline(prompt) {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    if let Some(line) = line.strip_suffix('\\') {
                        text += line;
                        text.push('\n');
                        continue;
                    }
                    text += &line;
                    if !self.take(&std::mem::take(&mut text))? {
                        break;
                    }
                }
                // Ctrl-C clears the line.
                Err(ReadlineError::Interrupted) => text.clear(),
                Err(ReadlineError::Eof) => break,
                Err(e) => return Err(e).context("terminal"),
            }
        }
        if let Some(path) = &history {
            let _ = path.parent().map(std::fs::create_dir_all);
            let _ = editor.save_history(path);
        }
        Ok(())
    }

    /// Reads messages from a pipe or file, one a line.
    fn lines(&mut self) -> Result<()> {
        let mut text = String::new();
        for line in std::io::stdin().lock().lines() {
            let line = line.context("reading stdin")?;
            if let Some(line) = line.strip_suffix('\\') {
                text += line;
                text.push('\n');
                continue;
            }
            text += &line;
            if !self.take(&std::mem::take(&mut text))? {
                return Ok(());
            }
            // Nobody is there to go on after Ctrl-C.
            interrupt::check()?;
        }
        match text.is_empty() {
            true => Ok(()),
            false => self.take(&text).map(|_| ()),
        }
    }

    /// A line of the user: a command or a message. False to leave.
    fn take(&mut self, line: &str) -> Result<bool> {
        let trimmed = line.trim();
        if trimmed.is_empty() && self.draft.is_empty() {
            return Ok(true);
        }
        let interactive = std::io::stdin().is_terminal();
        if interactive {
            interrupt::clear();
        }
        let done = match trimmed.strip_prefix('/') {
            None => self.say(line),
            Some("exit" | "quit") => return Ok(false),
            Some(command) => self.command(command),
        };
        match done {
            Ok(()) => Ok(true),
            // The conversation goes on after a mistake, if someone is there to go on with it.
            Err(e) if interactive && e.is::<Interrupted>() => {
                println!("\n[interrupted]");
                Ok(true)
            }
            Err(e) if interactive && !is_output(&e) => {
                eprintln!("error: {}", crate::one_line(&e));
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        let rest = rest.trim();
        let path = || match rest {
            "" => bail!("/{name} needs a file"),
            path => Ok(PathBuf::from(path)),
        };
        let said = match name {
            "help" => HELP.to_owned(),
            "reset" => {
                self.reset()?;
                "started anew".into()
            }
            "undo" => self.undo()?,
            "file" => self.file(&path()?)?,
            "save" => {
                let n = self.save(&path()?)?;
                format!("{} written", human_bytes(n as f64))
            }
            "load" => {
                self.load(&path()?)?;
                format!(
                    "{} messages, {} tokens",
                    self.messages.len(),
                    self.seq.n_past()
                )
            }
            "stats" => self.stats(),
            "memory" => self.memory(),
            "set" => self.set(rest)?,
            _ => bail!("no command /{name}; /help lists them"),
        };
        writeln!(std::io::stdout(), "{}", said.trim_end())?;
        Ok(())
    }

    fn name(&self) -> String {
        let path = &self.engine.model.path;
        let name = path.file_name().unwrap_or(path.as_os_str());
        name.to_string_lossy().into_owned()
    }

    fn reset(&mut self) -> Result<()> {
        self.seq = self.args.memory.sequence(&self.engine)?;
        self.sampler = Sampler::new(&self.params, &self.engine.model.tokenizer)?;
        self.pending.clear();
        self.rendered.clear();
        self.turns.clear();
        self.draft.clear();
        self.start();
        Ok(())
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let tokenizer = &self.engine.model.tokenizer;
        Ok(self.template.render(&RenderInput {
            messages: messages.into(),
            add_generation_prompt,
            kwargs: self.args.chat_template_kwargs.clone().unwrap_or_default(),
            bos_token: tokenizer.bos_text(),
            eos_token: tokenizer.eos_text(),
            ..RenderInput::default()
        })?)
    }

    /// The sequence now holds `text`, which need not begin as what it held before: turns keep what
    /// they had.
    fn set_rendered(&mut self, text: String) {
        let chars = text.chars().zip(self.rendered.chars());
        let same = chars.take_while(|(a, b)| a == b);
        let same = same.map(|(a, _)| a.len_utf8()).sum();
        for turn in self.turns.iter_mut().filter(|t| t.n_rendered > same) {
            let own = &self.rendered[same..turn.n_rendered];
            turn.rest = format!("{own}{}", turn.rest);
            turn.n_rendered = same;
        }
        self.rendered = text;
    }

    /// Brings the sequence to hold `text`; returns what an answer begins from where one `answers`, or
    /// nothing when it already does.
    fn read(&mut self, text: String, answers: bool) -> Result<Option<Output>> {
        let model = self.engine.model.clone();
        let tokenizer = &model.tokenizer;
        let mut tokens;
        let rest = match text.strip_prefix(&self.rendered) {
            Some(rest) if !self.rendered.is_empty() => Some(rest.to_owned()),
            _ => self.after_answer(&text)?,
        };
        if let Some(rest) = rest {
            tokens = tokenizer.encode(&rest, false, true);
            // The token that ended the answer comes back with the template's own text.
            if self.pending.first().is_some_and(|&id| tokenizer.is_eog(id)) {
                self.pending.clear();
            }
        } else {
            let add_bos = !text.starts_with(&tokenizer.bos_text()) || tokenizer.bos().is_none();
            tokens = tokenizer.encode(&text, add_bos, true);
            self.pending.clear();
            let held = self.seq.tokens();
            let mut same = tokens.iter().zip(held).take_while(|(a, b)| a == b).count();
            // The last token is always read, for its logits.
            same = same.min(tokens.len().saturating_sub(1));
            if same < held.len() {
                same = self.seq.truncate(self.engine.ops(), same);
            }
            tokens.drain(..same);
        }
        if tokens.is_empty() {
            return Ok(None);
        }
        let mut speaker = Speaker {
            engine: &mut self.engine,
            seq: &mut self.seq,
            sampler: &mut self.sampler,
            grammar: self.grammar.clone(),
            pending: std::mem::take(&mut self.pending),
        };
        let n_batch = self.args.batch_size;
        let read = match answers {
            true => speaker.read(&tokens, n_batch),
            false => (speaker.read_on(&tokens, n_batch)).map(|()| Output::default()),
        };
        match read {
            Ok(output) => {
                self.set_rendered(text);
                Ok(Some(output))
            }
            Err(e) => {
                // What the sequence holds now is only known by its tokens.
                self.set_rendered(String::new());
                Err(e)
            }
        }
    }

    /// What `text` adds to a sequence that ends with the last answer, where the template writes
    /// that answer otherwise than the model said it (trimmed, or after a space of its own). The
    /// answer stays as it was said: reading it again would cost the whole conversation.
    fn after_answer(&self, text: &str) -> Result<Option<String>> {
        let is_answer = |m: &Value| m["role"] == "assistant";
        let Some(last) = self.messages.iter().rposition(is_answer) else {
            return Ok(None);
        };
        let answer = self.messages[last]["content"].as_str().unwrap_or("").trim();
        if answer.is_empty() || !self.rendered.trim_end().ends_with(answer) {
            return Ok(None);
        }
        let before = self.render(&self.messages[..=last], false)?;
        let end = before.rfind(answer).map(|at| at + answer.len());
        Ok(match (text.strip_prefix(&before), end) {
            (Some(new), Some(end)) => Some(format!("{}{new}", &before[end..])),
            _ => None,
        })
    }

    /// A message of the user, and the answer to it.
    fn say(&mut self, text: &str) -> Result<()> {
        let mut content = std::mem::take(&mut self.draft);
        if !content.is_empty() && !text.trim().is_empty() {
            content += "\n\n";
        }
        content += text;
        self.remember();
        self.messages
            .push(json!({"role": "user", "content": content}));
        if let Err(e) = self.answer() {
            // The message did not get through: the conversation is what it was.
            let turn = self.turns.pop().expect("a turn was begun above");
            self.messages.truncate(turn.n_messages);
            return Err(e);
        }
        Ok(())
    }

    /// Notes the moment before a message, for /undo.
    fn remember(&mut self) {
        self.seq.mark();
        self.turns.push(Turn {
            n_past: self.seq.n_past(),
            n_messages: self.messages.len(),
            n_rendered: self.rendered.len(),
            rest: String::new(),
            pending: self.pending.clone(),
        });
    }

    fn answer(&mut self) -> Result<()> {
        let text = self.render(&self.messages, true)?;
        let Some(output) = self.read(text, true)? else {
            bail!("the template adds nothing for an answer to follow");
        };
        let limits = Limits {
            n_predict: usize::try_from(self.n_predict).ok(),
            stops: &self.stops,
            special: false,
        };
        let colour = self.colour;
        let mut out = std::io::stdout().lock();
        if colour {
            write!(out, "\x1b[32m")?;
        }
        let mut speaker = Speaker {
            engine: &mut self.engine,
            seq: &mut self.seq,
            sampler: &mut self.sampler,
            grammar: self.grammar.clone(),
            pending: Vec::new(),
        };
        let answer = speaker.answer(output, &limits, |text| {
            out.write_all(text.as_bytes())?;
            Ok(out.flush()?)
        });
        self.pending = speaker.pending;
        if colour {
            write!(out, "\x1b[0m")?;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(e) => {
                self.set_rendered(String::new());
                return Err(e);
            }
        };
        writeln!(out)?;
        match answer.stop {
            Stop::Context => eprintln!("[the context is full: -c, /reset or another --memory]"),
            Stop::Interrupted => eprintln!("[stopped]"),
            Stop::Limit | Stop::Eos | Stop::Word => {}
        }
        self.n_said += answer.tokens.len();
        self.seconds += answer.seconds;
        // What was said is now in the sequence as the model said it: control tokens included.
        let ended = usize::from(answer.stop == Stop::Eos);
        let said = &answer.tokens[..answer.tokens.len() - ended];
        self.rendered += &self.engine.model.tokenizer.decode(said, false);
        let message = json!({"role": "assistant", "content": answer.text});
        self.messages.push(message);
        Ok(())
    }

    fn undo(&mut self) -> Result<String> {
        let Some(turn) = self.turns.pop() else {
            bail!("nothing to take back");
        };
        let tokens = self.seq.tokens()[..turn.n_past].to_vec();
        self.messages.truncate(turn.n_messages);
        self.draft.clear();
        let held = self.seq.truncate(self.engine.ops(), turn.n_past);
        self.pending = turn.pending;
        self.rendered.truncate(turn.n_rendered);
        self.rendered += &turn.rest;
        // Memories that cannot go back exactly return to a mark; the rest is read again.
        let rest = &tokens[held..];
        if !rest.is_empty() {
            let mut sampler = self.sampler.clone();
            let mut speaker = Speaker {
                engine: &mut self.engine,
                seq: &mut self.seq,
                sampler: &mut sampler,
                grammar: None,
                pending: Vec::new(),
            };
            speaker.read(rest, self.args.batch_size)?;
        }
        Ok(format!(
            "{} tokens held, {} read again",
            self.seq.n_past(),
            rest.len()
        ))
    }

    /// Adds a file to the next message, and reads what can be read of that message now.
    fn file(&mut self, path: &Path) -> Result<String> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        if !self.draft.is_empty() {
            self.draft += "\n\n";
        }
        self.draft += &self.engine.model.context(self.seq.spec(), text.trim_end());
        // The conversation up to the end of the text: the template's rest comes with the question.
        const MARK: &str = "\u{1}here\u{1}";
        let mut messages = self.messages.clone();
        messages.push(json!({"role": "user", "content": format!("{}{MARK}", self.draft)}));
        let rendered = self.render(&messages, true)?;
        let before = self.seq.n_past();
        if let Some((text, _)) = rendered.split_once(MARK) {
            if self
                .turns
                .last()
                .is_none_or(|t| t.n_messages != self.messages.len())
            {
                self.seq.mark();
            }
            // Not its last words: with what follows they may become other tokens.
            let sure = &text[..whole_words(text)];
            if sure.len() > self.rendered.len() {
                self.read(sure.to_owned(), false)?;
            }
        }
        Ok(format!(
            "{} tokens read; ask about them",
            self.seq.n_past().saturating_sub(before)
        ))
    }

    fn save(&mut self, path: &Path) -> Result<u64> {
        let saved = Saved {
            pending: self.pending.clone(),
            sampler: self.sampler.save(),
            messages: self.messages.clone(),
            rendered: self.rendered.clone(),
            turns: self.turns.clone(),
        };
        saved.save(&self.seq, path)
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let n_ctx = self.args.memory.cells.options(&self.engine.model)?.n_ctx;
        let asked = self.args.memory.memory.as_ref();
        let (seq, saved) = Saved::load(&self.engine.model, path, n_ctx, asked)?;
        let mut sampler = Sampler::new(&self.params, &self.engine.model.tokenizer)?;
        saved.restore_sampler(&mut sampler, &seq);
        self.seq = seq;
        self.sampler = sampler;
        self.pending = saved.pending;
        self.messages = saved.messages;
        self.rendered = saved.rendered;
        self.turns = saved.turns;
        self.draft.clear();
        Ok(())
    }

    fn stats(&self) -> String {
        format!(
            "{} messages, {} tokens in the sequence, {} said at {:.1}/s\n{}",
            self.messages.len(),
            self.seq.n_past(),
            self.n_said,
            self.n_said as f64 / self.seconds.max(1e-9),
            self.held(),
        )
    }

    fn held(&self) -> String {
        let s = self.seq.stats();
        let held = s.cell_bytes + s.state_bytes;
        let of_full = match held <= s.full_bytes {
            true => format!("({:.1} %)", 100.0 * held as f64 / s.full_bytes as f64),
            // A short text: less than the pages that cells come in.
            false => format!("(cells come in pages of {PAGE_CELLS})"),
        };
        let there = match s.card_bytes {
            0 => String::new(),
            n => format!(", {} of it on the GPU", human_bytes(n as f64)),
        };
        format!(
            "memory {}: {} held{there}, a full cache {} {of_full}; {} tokens dropped",
            self.seq.spec(),
            human_bytes(held as f64),
            human_bytes(s.full_bytes as f64),
            s.n_dropped
        )
    }

    /// What the memory holds, newest nodes last.
    fn memory(&self) -> String {
        const SHOWN: usize = 24;
        let s = self.seq.stats();
        let mut out = self.held();
        let _ = write!(out, "\n{} cells", s.n_cells);
        let nodes = self.seq.nodes();
        if nodes.is_empty() {
            return out;
        }
        let _ = write!(
            out,
            ", {} nodes of {} slots, {:.2} tokens per slot (spread {:.2}), longest segment {}",
            s.n_nodes, s.n_slots, s.rate, s.rate_spread, s.longest_segment
        );
        if let Some(tau) = s.tau {
            let _ = write!(out, ", tau {tau:.3}");
        }
        let _ = write!(
            out,
            "\n{:>6} {:>5} {:>15} {:>6} {:>9}  text",
            "node", "level", "tokens", "p", "bytes"
        );
        if nodes.len() > SHOWN {
            let _ = write!(out, "\n... {} older", nodes.len() - SHOWN);
        }
        let tokenizer = &self.engine.model.tokenizer;
        for n in &nodes[nodes.len().saturating_sub(SHOWN)..] {
            let text = tokenizer.decode(&self.seq.tokens()[n.start..n.end], false);
            let text: String = text
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .take(48)
                .collect();
            let _ = write!(
                out,
                "\n{:>6} {:>5} {:>15} {:>6.3} {:>9}  {text}",
                n.id,
                n.level,
                format!("{}..{}", n.start, n.end),
                n.p,
                human_bytes(n.bytes as f64)
            );
        }
        out
    }

    /// `/set NAME VALUE`.
    fn set(&mut self, rest: &str) -> Result<String> {
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            bail!("/set needs a name and a value, such as /set temp 0.7");
        };
        let (name, value) = (name.replace('-', "_"), value.trim());
        match name.as_str() {
            "tau" | "target_rate" => {
                let number = value.parse().with_context(|| format!("{name} {value}"))?;
                match self.seq.set(&name, number) {
                    Ok(()) => {}
                    Err(Error::Memory { what, .. }) => bail!("{what}"),
                    Err(e) => return Err(e.into()),
                }
            }
            "n_predict" => {
                self.n_predict = value.parse().with_context(|| format!("{name} {value}"))?;
            }
            _ => {
                let key = match name.as_str() {
                    "temp" => "temperature",
                    "typical" => "typical_p",
                    "top_nsigma" => "top_n_sigma",
                    "mirostat_ent" => "mirostat_tau",
                    "mirostat_lr" => "mirostat_eta",
                    other => other,
                };
                let mut params = serde_json::to_value(&self.params)?;
                let Some(slot) = params.get_mut(key) else {
                    bail!("no dial `{name}`");
                };
                *slot = serde_json::from_str(value).unwrap_or_else(|_| value.into());
                let params: SamplerParams =
                    serde_json::from_value(params).with_context(|| format!("{name} {value}"))?;
                let mut sampler = Sampler::new(&params, &self.engine.model.tokenizer)?;
                for &id in self.seq.tokens().iter().chain(&self.pending) {
                    sampler.accept(id);
                }
                self.params = params;
                self.sampler = sampler;
            }
        }
        Ok(format!("{name} {value}"))
    }
}

/// Length of the longest beginning of `text` that ends before a space between two words, where no
/// tokenizer joins what comes before with what comes after.
fn whole_words(text: &str) -> usize {
    let between = |at: &usize| {
        let before = text[..*at].chars().next_back();
        let after = text[*at + 1..].chars().next();
        before.is_some_and(char::is_alphanumeric) && after.is_some_and(char::is_alphabetic)
    };
    let mut spaces = text.match_indices(' ').map(|(at, _)| at).rev();
    spaces.find(between).unwrap_or(0)
}

/// Whether writing to stdout failed: then there is nobody to go on for.
fn is_output(e: &anyhow::Error) -> bool {
    e.chain().any(|c| {
        c.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// Where the lines typed are kept.
fn history_file() -> Option<PathBuf> {
    let state = match std::env::var_os("XDG_STATE_HOME") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".local/state"),
    };
    Some(state.join("mneme").join("history"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_words() {
        assert_eq!(whole_words("the cat is on it."), "the cat is on".len());
        assert_eq!(whole_words("the cat. On  it"), "the".len());
        assert_eq!(whole_words("été là"), "été".len());
        assert_eq!(whole_words("word"), 0);
        assert_eq!(whole_words(""), 0);
    }
}
