//! `/tools`: tools that this server runs for a client, on this machine and with its own rights.
//!
//! Nothing is here unless `--tools` names it or an MCP server is configured, and then the server
//! listens on loopback only and pages of other origins are refused ([`super::local`]). Whoever may
//! use it can do what the user can who started the server: it is for one's own machine.

mod files;
mod find;
pub mod mcp;
mod shell;

use super::args::Args;
use super::errors::{ApiError, ApiResult};
use super::front::Front;
use super::generate::{data, json_reply};
use super::routes::Call;
use anyhow::{Result, bail};
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a tool works on.
pub struct Given<'a> {
    params: &'a Value,
    cwd: &'a Path,
}

impl Given<'_> {
    /// The path that parameter `name` means.
    fn path(&self, name: &str) -> Result<PathBuf, String> {
        let path = text(self.params, name)?;
        match path.is_empty() || path.contains('\0') {
            true => Err(format!("`{name}` is no path")),
            false => Ok(self.cwd.join(path)),
        }
    }
}

fn text<'a>(params: &'a Value, name: &str) -> Result<&'a str, String> {
    let value = params.get(name).and_then(Value::as_str);
    value.ok_or_else(|| format!("`{name}` must be a string"))
}

fn int(params: &Value, name: &str) -> Result<Option<i64>, String> {
    match params.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64() {
            Some(n) => Ok(Some(n)),
            None => Err(format!("`{name}` must be a whole number")),
        },
    }
}

fn flag(params: &Value, name: &str) -> bool {
    params.get(name).and_then(Value::as_bool).unwrap_or(false)
}

type Run = fn(&Given<'_>) -> Result<Value, String>;

/// A parameter: name, type, what it is, whether it must be there.
type Param = (&'static str, &'static str, &'static str, bool);

/// A tool of our own.
struct Tool {
    name: &'static str,
    title: &'static str,
    about: &'static str,
    /// Whether it changes anything.
    writes: bool,
    params: &'static [Param],
    /// `None` for the one that takes its time.
    run: Option<Run>,
}

const SHELL: &str = "exec_shell_command";

#[rustfmt::skip]
const TOOLS: &[Tool] = &[
    Tool { name: "read_file", title: "Read file", about: "Text of a file, all of it or some lines", writes: false, run: Some(files::read), params: &[
        ("path", "string", "The file", true), ("start_line", "integer", "First line, from 1", false),
        ("end_line", "integer", "Last line", false), ("append_loc", "boolean", "Number the lines", false)] },
    Tool { name: "file_glob_search", title: "File search", about: "Files and folders whose names fit a pattern; what version control, packages and builds made is not entered", writes: false, run: Some(files::search), params: &[
        ("path", "string", "Where to look", true), ("include", "string", "Pattern, such as *.rs or src/**/*.rs", false),
        ("exclude", "string", "Pattern of what to leave out", false), ("type", "string", "file (default), dir or all", false),
        ("max_depth", "integer", "Levels of folders; 0 for all", false), ("limit", "integer", "Most results", false)] },
    Tool { name: "grep_search", title: "Text search", about: "Lines of files that match a regular expression", writes: false, run: Some(files::grep), params: &[
        ("path", "string", "File or folder", true), ("pattern", "string", "What to look for", true),
        ("include", "string", "Pattern of file names", false), ("exclude", "string", "Pattern of what to leave out", false),
        ("return_line_numbers", "boolean", "Number the lines", false), ("literal", "boolean", "The pattern is plain text", false),
        ("ignore_case", "boolean", "Capitals or not", false), ("context_lines", "integer", "Lines before and after", false)] },
    Tool { name: SHELL, title: "Shell command", about: "Runs a command and returns what it writes", writes: true, run: None, params: &[
        ("command", "string", "The command", true), ("timeout", "integer", "Seconds it may take (10, at most 60)", false),
        ("max_output_size", "integer", "Most bytes of output (16384)", false)] },
    Tool { name: "write_file", title: "Write file", about: "Makes or replaces a file, and folders on the way to it", writes: true, run: Some(files::write), params: &[
        ("path", "string", "The file", true), ("content", "string", "All of its new text", true)] },
    Tool { name: "edit_file", title: "Edit file", about: "Replaces texts that each are in the file exactly once, all or none", writes: true, run: Some(files::edit), params: &[
        ("path", "string", "The file", true), ("edits", "array", "List of {\"old_text\", \"new_text\"}", true)] },
    Tool { name: "get_info", title: "About this machine", about: "Operating system and working directory", writes: false, run: Some(info), params: &[] },
];

fn info(given: &Given<'_>) -> Result<Value, String> {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    let cwd = given.cwd.display();
    Ok(json!({"plain_text_response": format!("os: {os} ({arch})\ncwd: {cwd}")}))
}

impl Tool {
    fn definition(&self) -> Value {
        let mut properties = serde_json::Map::new();
        for (name, kind, about, _) in self.params {
            let mut one = json!({"type": kind, "description": about});
            if *kind == "array" {
                one["items"] = json!({
                    "type": "object",
                    "properties": {"old_text": {"type": "string"}, "new_text": {"type": "string"}},
                    "required": ["old_text", "new_text"],
                });
            }
            properties.insert((*name).into(), one);
        }
        let required = self.params.iter().filter(|p| p.3).map(|p| p.0);
        let required: Vec<&str> = required.collect();
        json!({
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.about,
                "parameters": {"type": "object", "properties": properties, "required": required},
            },
        })
    }

    fn json(&self) -> Value {
        json!({
            "display_name": self.title,
            "tool": self.name,
            "type": "builtin",
            "permissions": {"write": self.writes},
            "uses_cwd": true,
            "definition": self.definition(),
        })
    }
}

/// The tools that the flags turned on.
pub struct Tools {
    ours: Vec<&'static Tool>,
    servers: Vec<mcp::Server>,
}

/// Checks the names of `--tools`.
pub fn check(names: &[String]) -> Result<()> {
    for name in names {
        if name != "all" && !TOOLS.iter().any(|t| t.name == name) {
            let known: Vec<&str> = TOOLS.iter().map(|t| t.name).collect();
            bail!("expected all or some of {}, got `{name}`", known.join(", "));
        }
    }
    Ok(())
}

impl Tools {
    /// The tools of `args`; programs start when they are first asked for something.
    pub fn new(args: &Args) -> Tools {
        let on = |tool: &&Tool| {
            args.tools
                .iter()
                .any(|name| name == "all" || name == tool.name)
        };
        Tools {
            ours: TOOLS.iter().filter(on).collect(),
            servers: args
                .mcp_servers
                .iter()
                .cloned()
                .map(mcp::Server::new)
                .collect(),
        }
    }

    fn check_on(&self) -> ApiResult<()> {
        match self.ours.is_empty() && self.servers.is_empty() {
            true => Err(ApiError::disabled(
                "This server runs no tools. Start it with `--tools`",
            )),
            false => Ok(()),
        }
    }

    /// Every tool of every server, with the server and its own name there.
    async fn theirs(&self) -> Vec<(String, &mcp::Server, &str, &Value)> {
        let all = self.servers.iter().map(mcp::Server::tools);
        let all = futures::future::join_all(all).await;
        let mut out: Vec<(String, &mcp::Server, &str, &Value)> = Vec::new();
        for (server, tools) in self.servers.iter().zip(all) {
            for tool in tools {
                let Some(name) = tool.get("name").and_then(Value::as_str) else {
                    continue;
                };
                let full = format!("{}_{name}", server.name());
                let taken = self.ours.iter().any(|t| t.name == full);
                if !taken && !out.iter().any(|(other, ..)| *other == full) {
                    out.push((full, server, name, tool));
                }
            }
        }
        out
    }
}

/// GET /tools
pub async fn list(front: Arc<Front>, _: Call) -> ApiResult<Response> {
    let tools = &front.tools;
    tools.check_on()?;
    let mut out: Vec<Value> = tools.ours.iter().map(|t| t.json()).collect();
    for (full, _, _, tool) in tools.theirs().await {
        let about = tool
            .get("description")
            .and_then(Value::as_str)
            .unwrap_or("");
        let mut parameters = tool.get("inputSchema").cloned().unwrap_or(json!({}));
        if let Some(parameters) = parameters.as_object_mut() {
            parameters.entry("type").or_insert("object".into());
            parameters.entry("properties").or_insert(json!({}));
        }
        out.push(json!({
            "display_name": full,
            "tool": full,
            "type": "mcp",
            "permissions": {"write": true},
            "uses_cwd": false,
            "definition": {
                "type": "function",
                "function": {"name": full, "description": about, "parameters": parameters},
            },
        }));
    }
    Ok(json_reply(&out.into()))
}

/// Refuses to run anything elsewhere: a tool that was meant for a container must not end up here.
fn check_runtime(call: &Call) -> ApiResult<()> {
    let Some(runtime) = call.headers.get("x-tool-runtime") else {
        return Ok(());
    };
    let runtime = runtime.to_str().unwrap_or("?");
    let (scheme, target) = runtime.split_once(':').unwrap_or((runtime, ""));
    let is_option = target.is_empty() || target.starts_with('-');
    Err(match scheme {
        "ssh" if is_option => ApiError::server(format!("invalid ssh target: {target}")),
        "docker-container" | "podman-container" if is_option => {
            ApiError::server(format!("invalid container id: {target}"))
        }
        "ssh" | "docker" | "podman" | "docker-container" | "podman-container" => {
            ApiError::unsupported("This server runs tools on its own machine only")
        }
        _ => ApiError::server(format!("unknown tool runtime: {runtime}")),
    })
}

/// POST /tools
pub async fn call(front: Arc<Front>, call: Call) -> ApiResult<Response> {
    front.tools.check_on()?;
    let body = call.json()?;
    let name = text(&body, "tool").map_err(ApiError::invalid)?.to_owned();
    let params = match body.get("params") {
        None | Some(Value::Null) => json!({}),
        Some(params @ Value::Object(_)) => params.clone(),
        Some(other) => return Err(super::fields::wrong("params", "an object", other)),
    };
    check_runtime(&call)?;
    let cwd = match call.headers.get("x-tool-cwd") {
        Some(cwd) => PathBuf::from(cwd.to_str().map_err(|e| ApiError::invalid(e.to_string()))?),
        None => std::env::current_dir().map_err(|e| ApiError::server(e.to_string()))?,
    };
    let cwd = std::path::absolute(cwd).map_err(|e| ApiError::invalid(e.to_string()))?;
    let is_stream = flag(&body, "stream");
    tracing::info!("tool {name}");
    let ours = front.tools.ours.iter().find(|t| t.name == name);
    let result = match ours.map(|t| t.run) {
        Some(None) if is_stream => return Ok(shell_stream(params, cwd)),
        Some(None) => {
            let (params, cwd) = (&params, cwd.as_path());
            shell::whole(&Given { params, cwd }).await
        }
        Some(Some(run)) => {
            let work = move || {
                let (params, cwd) = (&params, cwd.as_path());
                run(&Given { params, cwd })
            };
            let work = tokio::task::spawn_blocking(work).await;
            work.map_err(|e| ApiError::server(e.to_string()))?
        }
        None => {
            let theirs = front.tools.theirs().await;
            let Some((_, server, tool, _)) = theirs.iter().find(|(full, ..)| *full == name) else {
                return Err(ApiError::invalid(format!("there is no tool `{name}`")));
            };
            server.call(tool, &params).await
        }
    };
    let reply = result.unwrap_or_else(|e| json!({"error": e}));
    Ok(match is_stream {
        false => json_reply(&reply),
        true => {
            let text = reply.get("plain_text_response").and_then(Value::as_str);
            let text = text.map_or_else(|| reply.to_string(), String::from);
            let last = match reply.get("error") {
                Some(e) => json!({"done": true, "error": e}),
                None => json!({"done": true}),
            };
            events(Body::from(data(&json!({"chunk": text})) + &data(&last)))
        }
    })
}

fn events(body: Body) -> Response {
    let mut response = body.into_response();
    let kind = HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// A command's output as it comes; the command ends when nobody listens any more.
fn shell_stream(params: Value, cwd: PathBuf) -> Response {
    let (tx, rx) = tokio::sync::mpsc::unbounded_channel::<String>();
    tokio::spawn(async move {
        let (params, cwd) = (&params, cwd.as_path());
        let given = Given { params, cwd };
        let say = |text: &str| tx.send(data(&json!({"chunk": text}))).is_ok();
        let ended = tokio::select! {
            ended = shell::run(&given, say) => ended,
            () = tx.closed() => return,
        };
        let last = match ended {
            Ok(()) => json!({"done": true}),
            Err(e) => json!({"done": true, "error": e}),
        };
        // Whoever listened may have gone.
        let _ = tx.send(data(&last));
    });
    let parts = tokio_stream::wrappers::UnboundedReceiverStream::new(rx);
    let parts = futures::StreamExt::map(parts, |text| {
        Ok::<_, std::convert::Infallible>(Bytes::from(text))
    });
    events(Body::from_stream(parts))
}
