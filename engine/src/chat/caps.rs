//! What a chat template can show, found out by rendering small conversations.

use serde::Serialize;
use serde_json::{Value, json};

use super::{ChatTemplate, RenderInput};

/// Abilities of a template. The serialised names are those of the server's `/props`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Caps {
    /// Definitions of tools appear in the prompt.
    pub supports_tools: bool,
    /// Tool calls of the assistant appear in the prompt.
    pub supports_tool_calls: bool,
    /// Several tool calls in one message appear.
    pub supports_parallel_tool_calls: bool,
    /// A system message appears.
    pub supports_system_role: bool,
    /// Content may be a string.
    pub supports_string_content: bool,
    /// Content may be a list of parts.
    pub supports_typed_content: bool,
    /// Arguments of tool calls may be objects.
    pub supports_object_arguments: bool,
    /// Reasoning of earlier turns appears.
    pub supports_preserve_reasoning: bool,
    /// The variable `reasoning_effort` changes the prompt.
    pub supports_reasoning_effort: bool,
    /// Arguments of tool calls may be JSON text.
    #[serde(skip)]
    pub supports_string_arguments: bool,
    /// Null content is shown as nothing (not as `None` or an error).
    #[serde(skip)]
    pub supports_null_content: bool,
}

const SYSTEM: &str = "zqSystemzq";
const USER: &str = "zqUserzq";
const REPLY: &str = "zqReplyzq";
const THOUGHT: &str = "zqThoughtzq";
const TOOL: &str = "zqtool";
const SECOND_TOOL: &str = "zqother";
const ARGUMENT: &str = "zqargument";
const ARGUMENT_VALUE: &str = "zqvalue";

fn user(content: Value) -> Value {
    json!({"role": "user", "content": content})
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "description": "probe",
        "parameters": {"type": "object", "properties": {ARGUMENT: {"type": "string", "description": "probe"}},
            "required": [ARGUMENT]}}})
}

fn call(id: &str, name: &str, arguments: Value) -> Value {
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// Renders `template` on probes. A probe that fails counts as not supported.
pub(super) fn probe(template: &ChatTemplate) -> Caps {
    let render = |messages: Vec<Value>, tools: Option<Value>, kwargs: Value| -> Option<String> {
        let input = RenderInput {
            messages: Value::Array(messages),
            tools,
            add_generation_prompt: true,
            kwargs: kwargs.as_object().cloned().unwrap_or_default(),
            bos_token: "<s>".to_string(),
            eos_token: "</s>".to_string(),
            now: Some(0),
            ..RenderInput::default()
        };
        template.render_as_is(&input).ok()
    };
    let says = |out: &Option<String>, what: &str| out.as_ref().is_some_and(|o| o.contains(what));

    let plain = render(vec![user(json!(USER))], None, json!({}));
    let typed_user = user(json!([{"type": "text", "text": USER}]));
    let typed = render(vec![typed_user], None, json!({}));
    let supports_string_content = says(&plain, USER);
    // A template that prints the list itself shows its keys.
    let supports_typed_content =
        says(&typed, USER) && !says(&typed, "'type'") && !says(&typed, "\"type\"");
    let text = |s: &str| match supports_string_content {
        true => json!(s),
        false => json!([{"type": "text", "text": s}]),
    };

    let system = json!({"role": "system", "content": text(SYSTEM)});
    let with_system = render(vec![system, user(text(USER))], None, json!({}));

    let tools = json!([tool(TOOL), tool(SECOND_TOOL)]);
    let with_tools = render(vec![user(text(USER))], Some(tools.clone()), json!({}));

    let called = |content: Value, arguments: Value, n: usize| {
        let all = [
            call("call00001", TOOL, arguments.clone()),
            call("call00002", SECOND_TOOL, arguments),
        ];
        let mut messages = vec![
            user(text(USER)),
            json!({"role": "assistant", "content": content, "tool_calls": all[..n]}),
        ];
        for id in ["call00001", "call00002"].iter().take(n) {
            messages.push(
                json!({"role": "tool", "tool_call_id": id, "name": TOOL, "content": text("done")}),
            );
        }
        messages.push(json!({"role": "assistant", "content": text(REPLY)}));
        messages.push(user(text("more")));
        render(messages, None, json!({}))
    };
    let object = json!({ARGUMENT: ARGUMENT_VALUE});
    let string = json!(object.to_string());
    let with_object = called(text(""), object.clone(), 1);
    let with_string = called(text(""), string.clone(), 1);
    let shows_call = |out: &Option<String>| says(out, TOOL) && says(out, ARGUMENT_VALUE);
    let supports_object_arguments = shows_call(&with_object);
    // JSON text that is encoded once more shows escaped quotes.
    let supports_string_arguments =
        shows_call(&with_string) && !says(&with_string, &format!("\\\"{ARGUMENT}"));
    let arguments = if supports_object_arguments {
        object
    } else {
        string
    };
    let two = called(text(""), arguments.clone(), 2);
    let parallel = says(&two, TOOL) && says(&two, SECOND_TOOL);
    let with_null = called(Value::Null, arguments, 1);

    let thinking = render(
        vec![
            user(text(USER)),
            json!({"role": "assistant", "content": text(REPLY), "reasoning_content": THOUGHT, "thinking": THOUGHT}),
            user(text("more")),
        ],
        None,
        json!({"preserve_thinking": true, "clear_thinking": false, "preserve_reasoning": true}),
    );
    let effort = |level: &str| {
        let kwargs = json!({"reasoning_effort": level, "enable_thinking": true});
        render(vec![user(text(USER))], None, kwargs)
    };
    let (high, low) = (effort("high"), effort("low"));

    Caps {
        supports_tools: says(&with_tools, TOOL),
        supports_tool_calls: shows_call(&with_object) || shows_call(&with_string),
        supports_parallel_tool_calls: parallel,
        supports_system_role: says(&with_system, SYSTEM) && says(&with_system, USER),
        supports_string_content,
        supports_typed_content,
        supports_object_arguments,
        supports_preserve_reasoning: says(&thinking, THOUGHT),
        supports_reasoning_effort: high.is_some() && low.is_some() && high != low,
        supports_string_arguments,
        supports_null_content: says(&with_null, TOOL) && !says(&with_null, "None"),
    }
}
