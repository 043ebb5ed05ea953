//! GBNF, llama.cpp's grammar notation, into the Lark notation of the grammar engine.
//!
//! GBNF describes characters, Lark describes lexemes that are matched greedily. So that nothing changes, every
//! character of a GBNF grammar becomes a lexeme of its own, one character long.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::Error;

/// Deepest nesting of parentheses.
const MAX_DEPTH: usize = 100;
/// Greatest count in `{m,n}`.
const MAX_REPEAT: u32 = 2000;
/// Longest grammar, in bytes.
pub(super) const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Converts a grammar; its start is the rule `root`.
pub(super) fn to_lark(source: &str) -> Result<String, Error> {
    let mut p = Parser {
        source,
        at: 0,
        out: String::from("%llguidance {}\n"),
        rules: Vec::new(),
        ids: HashMap::new(),
        depth: 0,
    };
    p.blank(true);
    while p.at < source.len() {
        p.rule()?;
    }
    match p.rules.iter().find(|r| r.name == "root") {
        Some(Rule { defined: true, .. }) => {}
        _ => {
            return Err(p.error("the grammar has no rule \"root\""));
        }
    }
    if let Some(rule) = p.rules.iter().find(|r| !r.defined) {
        let what = format!("rule {:?} is used but not defined", rule.name);
        return Err(p.error_at(rule.first_use, &what));
    }
    let _ = writeln!(p.out, "start: r{}", p.ids["root"]);
    Ok(p.out)
}

struct Rule {
    name: String,
    defined: bool,
    first_use: usize,
}

struct Parser<'a> {
    source: &'a str,
    at: usize,
    out: String,
    rules: Vec<Rule>,
    ids: HashMap<String, usize>,
    depth: usize,
}

impl Parser<'_> {
    fn error(&self, what: &str) -> Error {
        self.error_at(self.at, what)
    }

    fn error_at(&self, at: usize, what: &str) -> Error {
        let before = &self.source[..at.min(self.source.len())];
        Error::Gbnf {
            line: before.matches('\n').count() + 1,
            what: what.to_string(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.source[self.at..].chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let found = self.source[self.at..].starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    /// Skips spaces and comments, and newlines if `newlines`.
    fn blank(&mut self, newlines: bool) {
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' => self.at += 1,
                '\r' | '\n' if newlines => self.at += 1,
                '#' => {
                    let rest = &self.source[self.at..];
                    self.at += rest.find('\n').unwrap_or(rest.len());
                }
                _ => return,
            }
        }
    }

    fn name(&mut self) -> Option<String> {
        let rest = &self.source[self.at..];
        let n = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_')))
            .unwrap_or(rest.len());
        if n == 0 {
            return None;
        }
        self.at += n;
        Some(rest[..n].to_string())
    }

    /// Number of the rule, noted as used.
    fn id(&mut self, name: String, at: usize) -> usize {
        if let Some(&id) = self.ids.get(&name) {
            return id;
        }
        let id = self.rules.len();
        self.ids.insert(name.clone(), id);
        self.rules.push(Rule {
            name,
            defined: false,
            first_use: at,
        });
        id
    }

    fn rule(&mut self) -> Result<(), Error> {
        let at = self.at;
        let Some(name) = self.name() else {
            return Err(self.error("expected the name of a rule"));
        };
        self.blank(false);
        if !self.eat("::=") {
            return Err(self.error(&format!("expected \"::=\" after {name:?}")));
        }
        let id = self.id(name.clone(), at);
        if self.rules[id].defined {
            return Err(self.error_at(at, &format!("rule {name:?} is defined twice")));
        }
        self.rules[id].defined = true;
        let _ = write!(self.out, "r{id}: ");
        self.blank(true);
        self.alternatives(false)?;
        self.out.push('\n');
        self.blank(true);
        Ok(())
    }

    /// Whether the rule ends here: at the end, or where `name ::=` follows on a new line.
    fn at_next_rule(&mut self) -> bool {
        let back = self.at;
        self.blank(true);
        let ends = self.at == self.source.len() || {
            let named = self.name().is_some();
            self.blank(false);
            named && self.source[self.at..].starts_with("::=")
        };
        self.at = back;
        ends
    }

    fn alternatives(&mut self, nested: bool) -> Result<(), Error> {
        loop {
            self.sequence(nested)?;
            self.blank(nested);
            // An alternative may stand on a line of its own.
            let back = self.at;
            self.blank(true);
            if self.eat("|") {
                self.out.push_str(" | ");
                self.blank(true);
            } else {
                self.at = back;
                return Ok(());
            }
        }
    }

    fn sequence(&mut self, nested: bool) -> Result<(), Error> {
        let from = self.out.len();
        loop {
            self.blank(nested);
            if matches!(self.peek(), Some('\n' | '\r')) && !self.at_next_rule() {
                self.blank(true);
            }
            let at = self.at;
            match self.peek() {
                None | Some('|' | ')' | '\n' | '\r') => break,
                _ if !nested && self.starts_rule() => {
                    return Err(self.error("expected a new line before the next rule"));
                }
                _ => {}
            }
            let item = self.item()?;
            let repeat = self.repeat()?;
            if self.out.len() > from {
                self.out.push(' ');
            }
            let _ = match repeat {
                Some(repeat) => write!(self.out, "({item}){repeat}"),
                None => write!(self.out, "{item}"),
            };
            if self.out.len() > 64 * MAX_SOURCE_BYTES {
                return Err(self.error_at(at, "the grammar is too large"));
            }
        }
        if self.out.len() == from {
            self.out.push_str("\"\""); // nothing at all
        }
        Ok(())
    }

    fn starts_rule(&mut self) -> bool {
        let back = self.at;
        let named = self.name().is_some();
        self.blank(false);
        let starts = named && self.source[self.at..].starts_with("::=");
        self.at = back;
        starts
    }

    /// A literal, class, group, rule or token, as Lark.
    fn item(&mut self) -> Result<String, Error> {
        let at = self.at;
        match self.peek() {
            Some('"') => self.literal(),
            Some('[') => self.class(),
            Some('.') => {
                self.at += 1;
                Ok(r"/[\x{0}-\x{10FFFF}]/".to_string())
            }
            Some('(') => {
                self.at += 1;
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return Err(self.error("parentheses are nested too deeply"));
                }
                let outer = std::mem::take(&mut self.out);
                let inner = self.alternatives(true);
                let group = std::mem::replace(&mut self.out, outer);
                inner?;
                self.blank(true);
                if !self.eat(")") {
                    return Err(self.error_at(at, "this \"(\" is never closed"));
                }
                self.depth -= 1;
                Ok(format!("({group})"))
            }
            Some('<') => {
                let rest = &self.source[self.at..];
                let Some(end) = rest.find('>').filter(|&end| !rest[..end].contains('\n')) else {
                    return Err(self.error("this \"<\" is never closed"));
                };
                self.at += end + 1;
                Ok(rest[..=end].to_string())
            }
            Some('!') => Err(self.error("excluded tokens (\"!<...>\") are not supported")),
            _ => match self.name() {
                Some(name) => {
                    let id = self.id(name, at);
                    Ok(format!("r{id}"))
                }
                None => Err(self.error(&format!("unexpected {:?}", self.peek().unwrap_or(' ')))),
            },
        }
    }

    fn literal(&mut self) -> Result<String, Error> {
        let at = self.at;
        self.at += 1;
        let mut out = String::from("(");
        loop {
            match self.peek() {
                None | Some('\n') => return Err(self.error_at(at, "this string is never closed")),
                Some('"') => break,
                Some(_) => {
                    let c = self.character()?;
                    let _ = write!(out, "/\\x{{{:X}}}/ ", c as u32);
                }
            }
        }
        self.at += 1;
        if out.len() == 1 {
            return Ok("\"\"".to_string());
        }
        out.pop();
        out.push(')');
        Ok(out)
    }

    fn class(&mut self) -> Result<String, Error> {
        let at = self.at;
        self.at += 1;
        let mut out = String::from("/[");
        if self.eat("^") {
            out.push('^');
        }
        let empty = out.len();
        loop {
            match self.peek() {
                None | Some('\n') => return Err(self.error_at(at, "this \"[\" is never closed")),
                Some(']') => break,
                Some(_) => {}
            }
            let first = self.character()?;
            let _ = write!(out, "\\x{{{:X}}}", first as u32);
            let rest = &self.source[self.at..];
            if rest.starts_with('-') && !rest[1..].starts_with(']') {
                self.at += 1;
                if matches!(self.peek(), None | Some('\n')) {
                    return Err(self.error_at(at, "this \"[\" is never closed"));
                }
                let last = self.character()?;
                if last < first {
                    let what = format!("the range {first:?}-{last:?} is backwards");
                    return Err(self.error_at(at, &what));
                }
                let _ = write!(out, "-\\x{{{:X}}}", last as u32);
            }
        }
        self.at += 1;
        if out.len() == empty {
            return Err(self.error_at(at, "a class must hold at least one character"));
        }
        out.push_str("]/");
        Ok(out)
    }

    /// A character of a literal or class, escapes resolved.
    fn character(&mut self) -> Result<char, Error> {
        let at = self.at;
        let c = self.take().ok_or_else(|| self.error("unexpected end"))?;
        if c != '\\' {
            return Ok(c);
        }
        let digits = match self.take() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^' | '/')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            _ => return Err(self.error_at(at, "unknown escape")),
        };
        let hex = (self.source.get(self.at..self.at + digits))
            .filter(|h| h.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = hex.and_then(|h| u32::from_str_radix(h, 16).ok());
        match code.and_then(char::from_u32) {
            Some(c) => {
                self.at += digits;
                Ok(c)
            }
            None => {
                let what = format!("expected {digits} hexadecimal digits of a character");
                Err(self.error_at(at, &what))
            }
        }
    }

    /// `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}` after an item.
    fn repeat(&mut self) -> Result<Option<String>, Error> {
        for mark in ["*", "+", "?"] {
            if self.eat(mark) {
                return Ok(Some(mark.to_string()));
            }
        }
        let at = self.at;
        if !self.eat("{") {
            return Ok(None);
        }
        self.blank(false);
        let least = self.number()?;
        self.blank(false);
        let mut most = least;
        if self.eat(",") {
            self.blank(false);
            most = self.number()?;
            self.blank(false);
        } else if least.is_none() {
            return Err(self.error_at(at, "expected a number after \"{\""));
        }
        if !self.eat("}") {
            return Err(self.error_at(at, "this \"{\" is never closed"));
        }
        let least = least.unwrap_or(0);
        match most {
            Some(most) if most < least => {
                Err(self.error_at(at, &format!("{{{least},{most}}} is backwards")))
            }
            Some(most) => Ok(Some(format!("{{{least},{most}}}"))),
            None => Ok(Some(format!("{{{least},}}"))),
        }
    }

    fn number(&mut self) -> Result<Option<u32>, Error> {
        let rest = &self.source[self.at..];
        let n = rest.bytes().take_while(u8::is_ascii_digit).count();
        if n == 0 {
            return Ok(None);
        }
        match rest[..n].parse() {
            Ok(count) if count <= MAX_REPEAT => {
                self.at += n;
                Ok(Some(count))
            }
            _ => Err(self.error(&format!(
                "{} repetitions are too many, at most {MAX_REPEAT}",
                &rest[..n]
            ))),
        }
    }
}
