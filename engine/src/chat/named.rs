//! Chat templates by name, for files without one and for `--chat-template NAME`.
//!
//! Names and results are llama.cpp's: no BOS at the start, messages only (no tools).

/// Name and Jinja source of every built-in template.
pub const NAMED_TEMPLATES: &[(&str, &str)] = &[
    (
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    (
        "llama2",
        "{{ '[INST] ' }}{% set ns = namespace(open=true) %}{% for m in messages %}\
         {% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}\
         {% if m.role == 'system' %}{{ m.content + '\n' }}{% elif m.role == 'user' %}{{ m.content + ' [/INST]' }}\
         {% else %}{{ m.content + '</s>' }}{% set ns.open = false %}{% endif %}{% endfor %}",
    ),
    (
        "llama2-sys",
        "{{ '[INST] ' }}{% set ns = namespace(open=true) %}{% for m in messages %}\
         {% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}\
         {% if m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}\
         {% elif m.role == 'user' %}{{ m.content + ' [/INST]' }}\
         {% else %}{{ m.content + '</s>' }}{% set ns.open = false %}{% endif %}{% endfor %}",
    ),
    (
        "llama3",
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim + '<|eot_id|>' }}\
         {% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    (
        "llama4",
        "{% for m in messages %}{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' + m.content|trim + '<|eot|>' }}\
         {% endfor %}{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}",
    ),
    (
        "mistral-v1",
        "{% set ns = namespace(open=false) %}{% for m in messages %}\
         {% if not ns.open %}{{ ' [INST] ' }}{% set ns.open = true %}{% endif %}\
         {% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}{{ m.content + ' [/INST]' }}\
         {% else %}{{ ' ' + m.content + '</s>' }}{% set ns.open = false %}{% endif %}{% endfor %}",
    ),
    (
        "mistral-v3",
        "{% set ns = namespace(open=false) %}{% for m in messages %}\
         {% if not ns.open %}{{ '[INST] ' }}{% set ns.open = true %}{% endif %}\
         {% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}{{ m.content + '[/INST]' }}\
         {% else %}{{ ' ' + m.content|trim + '</s>' }}{% set ns.open = false %}{% endif %}{% endfor %}",
    ),
    (
        "mistral-v3-tekken",
        "{% set ns = namespace(open=false) %}{% for m in messages %}\
         {% if not ns.open %}{{ '[INST]' }}{% set ns.open = true %}{% endif %}\
         {% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}{{ m.content + '[/INST]' }}\
         {% else %}{{ m.content + '</s>' }}{% set ns.open = false %}{% endif %}{% endfor %}",
    ),
    (
        "mistral-v7",
        "{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + m.content + '[/SYSTEM_PROMPT]' }}\
         {% elif m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
    ),
    (
        "mistral-v7-tekken",
        "{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}\
         {% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
    ),
    (
        "zephyr",
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|endoftext|>\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    (
        "gemma",
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}\
         {% set ns.system = ns.system + m.content|trim %}{% else %}\
         {% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' }}\
         {% if ns.system and role != 'model' %}{{ ns.system + '\n\n' }}{% set ns.system = '' %}{% endif %}\
         {{ m.content|trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    (
        "phi3",
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    (
        "phi4",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ),
    (
        "falcon3",
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    ),
    (
        "vicuna",
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}\
         {% elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}\
         {% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + '</s>\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    (
        "openchat",
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '<|end_of_turn|>' }}\
         {% else %}{{ 'GPT4 Correct ' + m.role|capitalize + ': ' + m.content + '<|end_of_turn|>' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}",
    ),
    (
        "deepseek",
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\
         {% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n' }}\
         {% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n<|EOT|>\n' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    ),
    (
        "deepseek2",
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}\
         {% elif m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}\
         {% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    ),
    (
        "deepseek3",
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}\
         {% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}\
         {% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}\
         {% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
    ),
    (
        "command-r",
        "{% for m in messages %}{% if m.role == 'system' %}\
         {{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + m.content|trim + '<|END_OF_TURN_TOKEN|>' }}\
         {% elif m.role == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content|trim + '<|END_OF_TURN_TOKEN|>' }}\
         {% elif m.role == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + m.content|trim + '<|END_OF_TURN_TOKEN|>' }}\
         {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
    ),
    (
        "granite",
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    ),
];
