//! Tools of other programs: servers of the Model Context Protocol, spoken with over their stdin and
//! stdout, one JSON-RPC message a line.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;

/// Longest line a server may write.
const MAX_LINE: u64 = 16 << 20;
/// Time for an answer unless the configuration says otherwise.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Time for a program to start and to say what it has.
const START: Duration = Duration::from_secs(10);
/// Most pages of a list of tools.
const MAX_PAGES: usize = 64;

/// A program to start.
#[derive(Clone, Debug)]
pub struct Config {
    name: String,
    command: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    cwd: Option<String>,
    timeout: Duration,
}

/// Reads `{"mcpServers": {NAME: {"command", "args", "env", "cwd", "timeout_ms"}}}`.
pub fn configs(text: &str) -> Result<Vec<Config>> {
    let value: Value = serde_json::from_str(text).context("not JSON")?;
    let all = value.get("mcpServers").unwrap_or(&value);
    let all = all.as_object().context("expected an object of servers")?;
    let strings = |value: Option<&Value>, what: &str| -> Result<Vec<String>> {
        let list = match value {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(list) => list
                .as_array()
                .with_context(|| format!("{what}: no list"))?,
        };
        let texts = list.iter().map(|v| v.as_str().map(String::from));
        let texts: Option<Vec<_>> = texts.collect();
        texts.with_context(|| format!("{what}: not all are strings"))
    };
    let mut out = Vec::new();
    for (name, one) in all {
        let Some(command) = one.get("command").and_then(Value::as_str) else {
            bail!("{name}: no `command` (servers that are reached by a URL are not supported)");
        };
        let env = match one.get("env") {
            None | Some(Value::Null) => Vec::new(),
            Some(env) => {
                let env = env
                    .as_object()
                    .with_context(|| format!("{name}.env: no object"))?;
                let pairs = env
                    .iter()
                    .map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())));
                let pairs: Option<Vec<_>> = pairs.collect();
                pairs.with_context(|| format!("{name}.env: not all are strings"))?
            }
        };
        let timeout = one.get("timeout_ms").and_then(Value::as_u64);
        out.push(Config {
            name: name.clone(),
            command: command.to_owned(),
            args: strings(one.get("args"), &format!("{name}.args"))?,
            env,
            cwd: one.get("cwd").and_then(Value::as_str).map(String::from),
            timeout: timeout.map_or(TIMEOUT, Duration::from_millis),
        });
    }
    Ok(out)
}

/// Requests that wait for their answers, by number; `None` once the program has gone.
type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Value>>>>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A program that runs.
struct Line {
    /// Killed when dropped.
    _child: Child,
    stdin: tokio::sync::Mutex<ChildStdin>,
    waiting: Waiting,
    next: AtomicU64,
}

impl Line {
    fn open(config: &Config) -> Result<Line> {
        let mut command = Command::new(&config.command);
        command
            .args(&config.args)
            .envs(config.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        if let Some(cwd) = &config.cwd {
            command.current_dir(cwd);
        }
        let mut child = command.spawn().with_context(|| config.command.clone())?;
        let stdin = child.stdin.take().context("no stdin")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let answered = Arc::clone(&waiting);
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout);
            loop {
                let mut line = Vec::new();
                let read = (&mut lines)
                    .take(MAX_LINE)
                    .read_until(b'\n', &mut line)
                    .await;
                if !matches!(read, Ok(1..)) || line.last() != Some(&b'\n') {
                    break;
                }
                // What is no answer (a notification, a log line) is nobody's.
                let Ok(message) = serde_json::from_slice::<Value>(&line) else {
                    continue;
                };
                let id = message.get("id").and_then(Value::as_u64);
                let is_answer = message.get("method").is_none();
                let to = id.filter(|_| is_answer).and_then(|id| {
                    let mut waiting = lock(&answered);
                    waiting.as_mut()?.remove(&id)
                });
                if let Some(to) = to {
                    // Whoever asked may have gone.
                    let _ = to.send(message);
                }
            }
            // Dropping the senders tells all who wait.
            lock(&answered).take();
        });
        Ok(Line {
            _child: child,
            stdin: tokio::sync::Mutex::new(stdin),
            waiting,
            next: AtomicU64::new(1),
        })
    }

    fn is_open(&self) -> bool {
        lock(&self.waiting).is_some()
    }

    async fn send(&self, message: &Value) -> Result<()> {
        let mut line = message.to_string();
        line.push('\n');
        let mut stdin = self.stdin.lock().await;
        stdin.write_all(line.as_bytes()).await?;
        stdin.flush().await?;
        Ok(())
    }

    async fn ask(&self, method: &str, params: Value, timeout: Duration) -> Result<Value> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        match &mut *lock(&self.waiting) {
            Some(waiting) => waiting.insert(id, tx),
            None => bail!("it has ended"),
        };
        let message = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        let answer = tokio::time::timeout(timeout, async {
            self.send(&message).await?;
            rx.await.context("it ended before it answered")
        })
        .await;
        if let Some(waiting) = &mut *lock(&self.waiting) {
            waiting.remove(&id);
        }
        let answer = answer.with_context(|| format!("no answer within {timeout:?}"))??;
        if let Some(error) = answer.get("error") {
            let message = error.get("message").and_then(Value::as_str);
            bail!("{}", message.unwrap_or("it answered with an error"));
        }
        Ok(answer.get("result").cloned().unwrap_or(Value::Null))
    }

    async fn greet(&self) -> Result<()> {
        let params = json!({
            "protocolVersion": "2024-11-05",
            "capabilities": {},
            "clientInfo": {"name": "mneme", "version": env!("CARGO_PKG_VERSION")},
        });
        self.ask("initialize", params, START).await?;
        self.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}))
            .await
    }

    async fn list(&self) -> Result<Vec<Value>> {
        let mut tools = Vec::new();
        let mut params = json!({});
        for _ in 0..MAX_PAGES {
            let mut page = self.ask("tools/list", params, START).await?;
            if let Some(Value::Array(more)) = page.get_mut("tools").map(Value::take) {
                tools.extend(more);
            }
            match page.get("nextCursor").and_then(Value::as_str) {
                Some(next) => params = json!({"cursor": next}),
                None => break,
            }
        }
        Ok(tools)
    }
}

/// A server, started when it is first needed and again when it has gone.
pub struct Server {
    config: Config,
    line: tokio::sync::Mutex<Option<Arc<Line>>>,
    tools: tokio::sync::OnceCell<Vec<Value>>,
}

impl Server {
    /// A server that is not started yet.
    pub fn new(config: Config) -> Server {
        Server {
            config,
            line: tokio::sync::Mutex::new(None),
            tools: tokio::sync::OnceCell::new(),
        }
    }

    /// What its tools' names begin with.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    async fn line(&self) -> Result<Arc<Line>> {
        let mut held = self.line.lock().await;
        if let Some(line) = held.as_ref().filter(|line| line.is_open()) {
            return Ok(Arc::clone(line));
        }
        let line = Arc::new(Line::open(&self.config)?);
        line.greet().await?;
        *held = Some(Arc::clone(&line));
        Ok(line)
    }

    /// Its tools as it describes them; empty when it does not start.
    pub async fn tools(&self) -> &[Value] {
        let list = || async { self.line().await?.list().await };
        match self.tools.get_or_try_init(list).await {
            Ok(tools) => tools,
            Err(e) => {
                tracing::warn!("MCP server `{}`: {e:#}", self.config.name);
                &[]
            }
        }
    }

    /// Calls one of its tools.
    pub async fn call(&self, tool: &str, params: &Value) -> Result<Value, String> {
        let ask = json!({"name": tool, "arguments": params});
        let timeout = self.config.timeout;
        let result = async { self.line().await?.ask("tools/call", ask, timeout).await };
        let result = result
            .await
            .map_err(|e| format!("MCP server `{}`: {e:#}", self.config.name))?;
        let parts = result.get("content").and_then(Value::as_array);
        let texts = parts.into_iter().flatten().filter_map(|p| p.get("text"));
        let texts: Vec<&str> = texts.filter_map(Value::as_str).collect();
        let text = texts.join("\n");
        match result.get("isError").and_then(Value::as_bool) {
            Some(true) => Err(text),
            _ => Ok(json!({"plain_text_response": text, "content": result["content"]})),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_are_checked() {
        let good = r#"{"mcpServers": {"a": {"command": "x", "args": ["1"], "timeout_ms": 5}}}"#;
        let all = configs(good).expect("a configuration");
        assert_eq!((all.len(), all[0].args.len()), (1, 1));
        assert_eq!(all[0].timeout, Duration::from_millis(5));
        for bad in [
            "x",
            "[]",
            r#"{"a": {"args": []}}"#,
            r#"{"a": {"command": "x", "args": [1]}}"#,
            r#"{"a": {"command": "x", "env": {"A": 1}}}"#,
        ] {
            assert!(configs(bad).is_err(), "{bad}");
        }
    }
}
