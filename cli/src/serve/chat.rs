//! Chat requests: from messages to a prompt, a language for the answer, and a way to read it.

use super::app::App;
use super::errors::{ApiError, ApiResult};
use super::fields::{self, get, wrong};
use super::generate::{self, Generation};
use super::output::{Format, THOUGHTS, ToolFormat};
use super::prompt::NO_IMAGES;
use mneme_engine::chat::{Error as TemplateError, RenderInput, strftime};
use mneme_engine::grammar::Grammar;
use serde_json::{Map, Value, json};

/// A rendered conversation.
pub struct Rendered {
    /// The prompt, without the BOS that the tokenizer adds.
    pub prompt: String,
    /// How to read the answer.
    pub format: Format,
    /// The tools the model may call.
    pub tools: Vec<Value>,
    /// The model must call one.
    pub must_call: bool,
}

/// A chat request, ready to be handed in.
pub struct Chat {
    /// The generation.
    pub generation: Generation,
    /// How to read the answer.
    pub format: Format,
}

/// Messages in the form templates take; refuses what is no conversation.
fn messages(app: &App, body: &Value) -> ApiResult<Vec<Value>> {
    let Some(Value::Array(all)) = get(body, "messages") else {
        return Err(ApiError::invalid("'messages' must be an array"));
    };
    let mut out = Vec::with_capacity(all.len());
    for message in all {
        let mut message = message.clone();
        let Some(role) = message.get("role").and_then(Value::as_str) else {
            return Err(ApiError::invalid("every message needs a 'role'"));
        };
        let content = message.get("content");
        match content {
            Some(Value::String(_) | Value::Null) => {}
            None if role == "assistant" => {}
            None => {
                let what = "All non-assistant messages must contain 'content'";
                return Err(ApiError::invalid(what));
            }
            Some(Value::Array(parts)) => {
                for part in parts {
                    match part.get("type").and_then(Value::as_str) {
                        Some("text" | "input_text" | "output_text" | "context")
                            if part["text"].is_string() => {}
                        Some("image_url" | "input_image" | "image") => {
                            return Err(ApiError::server(NO_IMAGES));
                        }
                        Some("input_audio") => {
                            return Err(ApiError::server("audio input is not supported"));
                        }
                        _ => return Err(wrong("content", "parts of type text", part)),
                    }
                }
            }
            Some(other) => return Err(wrong("content", "text or a list of parts", other)),
        }
        contexts(app, body, &mut message)?;
        out.push(message);
    }
    let trailing = out.iter().rev().take_while(|m| m["role"] == "assistant");
    if app.args.prefill_assistant && trailing.count() >= 2 {
        return Err(ApiError::invalid(
            "Cannot have 2 or more assistant messages at the end of the list.",
        ));
    }
    Ok(out)
}

/// Parts of type context become text that says so to the request's memory.
fn contexts(app: &App, body: &Value, message: &mut Value) -> ApiResult<()> {
    let parts = message.get_mut("content").and_then(Value::as_array_mut);
    let parts = parts.into_iter().flatten();
    for part in parts.filter(|part| part["type"] == "context") {
        let memory = app.memory_of(body)?;
        let memory = memory.as_ref().unwrap_or(&app.memory);
        let text = part["text"].as_str().unwrap_or("");
        let text = app.model.context(memory, text).into_owned();
        *part = json!({"type": "text", "text": text});
    }
    Ok(())
}

/// Which tools may be called, and whether one must be.
fn tools(app: &App, body: &Value) -> ApiResult<(Vec<Value>, bool)> {
    let all = match get(body, "tools") {
        None => return Ok((Vec::new(), false)),
        Some(Value::Array(all)) => all,
        Some(other) => return Err(wrong("tools", "a list", other)),
    };
    if all.is_empty() {
        return Ok((Vec::new(), false));
    }
    if !app.args.jinja {
        return Err(ApiError::server("tools param requires --jinja flag"));
    }
    for tool in all {
        if !tool["function"]["name"].is_string() {
            return Err(wrong("tools", "functions with a name", tool));
        }
    }
    match get(body, "tool_choice") {
        None => Ok((all.clone(), false)),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Ok((all.clone(), false)),
            "none" => Ok((Vec::new(), false)),
            "required" => Ok((all.clone(), true)),
            _ => Err(ApiError::invalid(format!("Invalid tool_choice: {choice}"))),
        },
        Some(choice) => {
            let name = &choice["function"]["name"];
            let one: Vec<Value> = all
                .iter()
                .filter(|t| t["function"]["name"] == *name)
                .cloned()
                .collect();
            match one.is_empty() {
                true => Err(wrong("tool_choice", "a tool of the list", choice)),
                false => Ok((one, true)),
            }
        }
    }
}

fn template_error(e: &TemplateError) -> ApiError {
    match e {
        TemplateError::Message { .. } | TemplateError::Messages { .. } => {
            ApiError::invalid(e.to_string())
        }
        _ => ApiError::server(e.to_string()),
    }
}

/// Renders the conversation of `body`.
pub fn render(app: &App, body: &Value) -> ApiResult<Rendered> {
    let mut messages = messages(app, body)?;
    let (tools, must_call) = tools(app, body)?;
    let mut kwargs: Map<String, Value> = app.args.chat_template_kwargs.clone();
    match get(body, "chat_template_kwargs") {
        None => {}
        Some(Value::Object(more)) => kwargs.extend(more.clone()),
        Some(other) => return Err(wrong("chat_template_kwargs", "an object", other)),
    }
    let mut thinks = match app.args.reasoning.as_str() {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    };
    match get(body, "reasoning_effort") {
        None => {}
        Some(Value::String(effort)) if effort == "none" => thinks = Some(false),
        Some(Value::String(effort)) => {
            kwargs.insert("reasoning_effort".into(), effort.clone().into());
        }
        Some(other) => return Err(wrong("reasoning_effort", "a string", other)),
    }
    match kwargs.get("enable_thinking") {
        Some(Value::Bool(b)) => thinks = Some(*b),
        // Templates that ask whether to think are told, as llama.cpp tells them: some take silence for no.
        Some(Value::Null) | None => {
            kwargs.insert("enable_thinking".into(), thinks.unwrap_or(true).into());
        }
        Some(other) => return Err(wrong("enable_thinking", "true or false", other)),
    }
    // Today's date under the names that templates read it by.
    for (name, format) in [("date_string", "%d %b %Y"), ("datetime", "%b %d %Y")] {
        if !kwargs.contains_key(name) {
            kwargs.insert(name.into(), strftime(format, super::app::now()).into());
        }
    }
    let template = match (&app.tool_template, tools.is_empty()) {
        (Some(template), false) => template,
        _ => &app.template,
    };
    // FireFunction's template fails without it.
    if template.source().contains("functions") {
        kwargs.entry("functions").or_insert("".into());
    }
    if !tools.is_empty() && !template.caps().supports_tools {
        describe_tools(&mut messages, &tools);
    }
    let generation_prompt = fields::flag(body, "add_generation_prompt", true)?;
    let last_is_assistant = messages.last().is_some_and(|m| m["role"] == "assistant");
    let explicit = fields::flag(body, "continue_final_message", false)?;
    if explicit && get(body, "add_generation_prompt") == Some(&Value::Bool(true)) {
        return Err(ApiError::invalid(
            "add_generation_prompt and continue_final_message cannot both be true",
        ));
    }
    let has_calls = |m: &Value| {
        get(m, "tool_calls")
            .and_then(Value::as_array)
            .is_some_and(|c| !c.is_empty())
    };
    let goes_on = last_is_assistant
        && (explicit || app.args.prefill_assistant)
        && !messages.last().is_some_and(has_calls);
    if goes_on && let Some(last) = messages.last_mut() {
        last["content"] = joined(&last["content"]).into();
    }
    let vocab = &app.model.tokenizer;
    let input = RenderInput {
        messages: Value::Array(messages),
        tools: match template.caps().supports_tools && !tools.is_empty() {
            true => Some(Value::Array(tools.clone())),
            false => None,
        },
        add_generation_prompt: generation_prompt && !goes_on,
        continue_final_message: goes_on,
        kwargs,
        bos_token: vocab.bos_text(),
        eos_token: vocab.eos_text(),
        now: None,
    };
    let rendered = template.render(&input).map_err(|e| template_error(&e))?;
    // The tokenizer puts BOS in front; a second one would confuse the model.
    let mut prompt = rendered.as_str();
    if vocab.add_bos() && !input.bos_token.is_empty() {
        prompt = prompt.strip_prefix(&input.bos_token).unwrap_or(prompt);
    }
    if vocab.add_eos() && !input.eos_token.is_empty() {
        prompt = prompt.strip_suffix(&input.eos_token).unwrap_or(prompt);
    }
    let mut prompt = prompt.to_owned();
    let source = template.source();
    let mut format = Format {
        thoughts: app.args.reasoning_format != "none"
            && fields::text(body, "reasoning_format")? != Some("none"),
        open: None,
        tools: (!tools.is_empty()).then(|| ToolFormat::of_template(source)),
    };
    if !tools.is_empty() && !template.caps().supports_tools {
        format.tools = Some(ToolFormat::Hermes);
    }
    for (begin, end) in THOUGHTS {
        if !prompt.trim_end().ends_with(begin) || !input.add_generation_prompt {
            continue;
        }
        match thinks {
            Some(false) => prompt.push_str(end),
            _ => format.open = Some(end),
        }
    }
    if thinks == Some(false)
        && source.contains("<|START_THINKING|>")
        && prompt.ends_with("<|CHATBOT_TOKEN|>")
    {
        prompt.push_str("<|START_THINKING|><|END_THINKING|>");
    }
    Ok(Rendered {
        prompt,
        format,
        tools,
        must_call,
    })
}

/// Text of a message's content, an empty line between its parts.
fn joined(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts.iter().filter_map(|p| p["text"].as_str()).collect();
            texts.join("\n\n")
        }
        _ => String::new(),
    }
}

/// Tells a model whose template knows no tools about them, in a system message.
fn describe_tools(messages: &mut Vec<Value>, tools: &[Value]) {
    let mut text = String::from(
        "You can call functions. They are described here, one per line, as JSON schemas:\n",
    );
    for tool in tools {
        text += &format!("{}\n", tool["function"]);
    }
    text += "To call one, answer with nothing but\n<tool_call>\n{\"name\": NAME, \"arguments\": OBJECT}\n</tool_call>";
    match messages.first_mut().filter(|m| m["role"] == "system") {
        Some(system) => {
            let before = joined(&system["content"]);
            system["content"] = format!("{before}\n\n{text}").into();
        }
        None => messages.insert(0, json!({"role": "system", "content": text})),
    }
}

/// The language that `response_format` asks for.
fn response_format(app: &App, body: &Value) -> ApiResult<Option<Grammar>> {
    let Some(format) = get(body, "response_format") else {
        return Ok(None);
    };
    let schema = match format["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => match get(format, "schema") {
            None => json!({}),
            Some(schema) => schema.clone(),
        },
        Some("json_schema") => match get(&format["json_schema"], "schema") {
            None => {
                return Err(wrong(
                    "response_format",
                    "a json_schema with a schema",
                    format,
                ));
            }
            Some(schema) => schema.clone(),
        },
        _ => {
            return Err(ApiError::invalid(format!(
                "response_format type must be one of \"text\", \"json_object\" or \"json_schema\", but got: {}",
                format["type"]
            )));
        }
    };
    generate::schema_grammar(app, &schema).map(Some)
}

/// The schema of exactly one call of one of `tools`.
fn call_schema(tools: &[Value], format: ToolFormat) -> Value {
    let arguments = match format {
        ToolFormat::Llama => "parameters",
        _ => "arguments",
    };
    let calls: Vec<Value> = (tools.iter())
        .map(|tool| {
            let f = &tool["function"];
            let parameters = get(f, "parameters")
                .cloned()
                .unwrap_or(json!({"type": "object"}));
            json!({
                "type": "object",
                "properties": {"name": {"const": f["name"]}, arguments: parameters},
                "required": ["name", arguments],
                "additionalProperties": false,
            })
        })
        .collect();
    match calls.len() {
        1 => calls.into_iter().next().unwrap_or_default(),
        _ => json!({"anyOf": calls}),
    }
}

/// Reads a chat request.
pub fn read(app: &App, body: &Value) -> ApiResult<Chat> {
    let rendered = render(app, body)?;
    let mut generation = Generation::read(app, &without_logprobs(body))?;
    let has = |name: &str| get(body, name).is_some_and(|v| v != "");
    if !rendered.tools.is_empty() && has("grammar") {
        return Err(ApiError::invalid(
            "Cannot use custom grammar constraints with tools.",
        ));
    }
    if has("grammar") && has("json_schema") {
        return Err(ApiError::invalid(
            "Either \"json_schema\" or \"grammar\" can be specified, but not both",
        ));
    }
    if let Some(grammar) = response_format(app, body)? {
        if has("grammar") {
            return Err(ApiError::invalid(
                "Either \"response_format\" or \"grammar\" can be specified, but not both",
            ));
        }
        generation.grammar = Some(grammar);
    }
    let wants = fields::flag(body, "logprobs", false).or_else(|e| match get(body, "logprobs") {
        Some(n) if n.is_number() => Ok(true),
        _ => Err(e),
    })?;
    match (wants, get(body, "top_logprobs")) {
        (false, Some(_)) => {
            return Err(ApiError::invalid(
                "top_logprobs requires logprobs to be set to true",
            ));
        }
        (false, None) => {}
        (true, top) => {
            let n = match top {
                None => 20,
                Some(n) => n
                    .as_u64()
                    .ok_or_else(|| wrong("top_logprobs", "a whole number", n))?,
            };
            generation.settings.0.insert("n_probs".into(), n.into());
        }
    }
    let mut format = rendered.format;
    if wants && format.tools.is_some() && generation.settings.is("stream") {
        return Err(ApiError::invalid(
            "logprobs is not supported with tools + stream",
        ));
    }
    if let (true, Some(tools)) = (rendered.must_call, format.tools) {
        let schema = call_schema(&rendered.tools, tools);
        generation.grammar = Some(generate::schema_grammar(app, &schema)?);
        // The answer is the bare call.
        format.tools = Some(ToolFormat::Llama);
        format.open = None;
    } else if generation.grammar.is_some() {
        // A grammar leaves no room for thoughts.
        format.thoughts = false;
        format.open = None;
    }
    generation.preserved = format.preserved(&app.model.tokenizer);
    generation.prompts = vec![app.encode(&rendered.prompt)];
    Ok(Chat { generation, format })
}

/// In chats `logprobs` is a flag, elsewhere a number.
fn without_logprobs(body: &Value) -> Value {
    let mut body = body.clone();
    if let Some(body) = body.as_object_mut() {
        body.remove("logprobs");
    }
    body
}
