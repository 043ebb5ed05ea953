//! Any text as a chat template: an error or a prompt, within bounds.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mneme_engine::chat::{ChatTemplate, RenderInput};
use serde_json::json;

fuzz_target!(|source: &str| {
    // Doubling a string needs a loop and a concatenation: outside what rendering can bound.
    if source.contains('~')
        || source.contains('+')
        || source.contains("join")
        || source.contains("replace")
    {
        let _ = ChatTemplate::new(source);
        return;
    }
    let Ok(template) = ChatTemplate::new(source) else {
        return;
    };
    let _ = template.render(&RenderInput {
        messages: json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]),
        add_generation_prompt: true,
        ..RenderInput::default()
    });
});
