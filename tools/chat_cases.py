#!/usr/bin/env python3
"""Writes chat_cases.json for a folder of *.jinja chat templates: conversations and what Jinja2 makes of them, set up as
Hugging Face does; and for the built-in names, what llama.cpp makes of them.

    python tools/chat_cases.py FOLDER        # needs jinja2 and llama-cpp-python
    MNEME_TEMPLATE_DIR=FOLDER cargo test -p mneme-engine --test chat
"""

import ctypes
import datetime
import json
import sys
from pathlib import Path

import jinja2
import llama_cpp
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = 1_700_000_000


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    now = datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc)
    env.globals["strftime_now"] = lambda f: now.strftime(f)
    return env


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city; it's \"quoted\" <b>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "name ö"},
                "days": {"type": "integer", "default": 3},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city"],
        },
    },
}


def call(arguments, i=1):
    return {"id": f"call0000{i}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


u = lambda text: {"role": "user", "content": text}
a = lambda text: {"role": "assistant", "content": text}
s = lambda text: {"role": "system", "content": text}
t = lambda text, i=1: {"role": "tool", "name": "get_weather", "tool_call_id": f"call0000{i}", "content": text}

CONVERSATIONS = [
    ([u("Hello there!")], None, {}),
    ([s("Be  brief. "), u(" Hi "), a(" Hello! \n"), u("How are you?\n\n")], None, {}),
    ([u("a"), a("b"), u("c"), a("d"), u("e")], None, {}),
    ([s(""), u("")], None, {}),
    ([u("Ünïcödé 日本 <|im_end|> {{ x }} {% if %}")], None, {}),
    ([u("Weather in Rome?")], [WEATHER], {}),
    ([s("Be brief."), u("Weather in Rome?")], [WEATHER, WEATHER], {}),
    ([u("W?"), {"role": "assistant", "content": "", "tool_calls": [call({"city": "Rome", "days": 2})]}, t("{\"c\": 20}"), a("20 C"), u("And?")], [WEATHER], {}),
    ([u("W?"), {"role": "assistant", "content": "Let me see.", "tool_calls": [call({"city": "Rome"}, 1), call({"city": "Oslo"}, 2)]}, t("20", 1), t("5", 2)], [WEATHER], {}),
    ([u("Q"), {"role": "assistant", "content": "A", "reasoning_content": "because"}, u("Q2")], None, {}),
    ([u("Q"), a("<think>\nhm\n</think>\n\nA"), u("Q2")], None, {"enable_thinking": False}),
    ([u("Q")], None, {"enable_thinking": True, "reasoning_effort": "high"}),
    ([u("Q")], None, {"enable_thinking": False}),
]


def named():
    lib = llama_cpp.llama_cpp._lib
    names = ["chatml", "llama2", "llama2-sys", "llama3", "llama4", "mistral-v1", "mistral-v3", "mistral-v3-tekken", "mistral-v7",
             "mistral-v7-tekken", "zephyr", "gemma", "phi3", "phi4", "falcon3", "vicuna", "openchat", "deepseek", "deepseek2",
             "deepseek3", "command-r", "granite"]

    class Message(ctypes.Structure):
        _fields_ = [("role", ctypes.c_char_p), ("content", ctypes.c_char_p)]

    apply = lib.llama_chat_apply_template
    apply.restype = ctypes.c_int32
    apply.argtypes = [ctypes.c_char_p, ctypes.POINTER(Message), ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p, ctypes.c_int32]
    out = []
    for name in names:
        for messages, tools, kwargs in CONVERSATIONS[:5]:
            array = (Message * len(messages))(*[(m["role"].encode(), m["content"].encode()) for m in messages])
            for generation in (True, False):
                buf = ctypes.create_string_buffer(1 << 16)
                n = apply(name.encode(), array, len(messages), generation, buf, 1 << 16)
                assert n >= 0, name
                out.append({"name": name, "messages": messages, "add_generation_prompt": generation, "rendered": buf.raw[:n].decode()})
    return out


def main():
    folder = Path(sys.argv[1])
    env = environment()
    cases = []
    for path in sorted(folder.glob("*.jinja")):
        template = env.from_string(path.read_text())
        for i, (messages, tools, kwargs) in enumerate(CONVERSATIONS):
            case = {"file": path.name, "conversation": i, "messages": messages, "tools": tools, "kwargs": kwargs}
            try:
                case["rendered"] = template.render(
                    messages=messages, tools=tools, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", **kwargs)
            except Exception as error:
                case["error"] = f"{type(error).__name__}: {error}"
            cases.append(case)
    (folder / "chat_cases.json").write_text(json.dumps({"now": NOW, "cases": cases, "named": named()}))
    print(len(cases), "cases,", sum("error" in c for c in cases), "refused")


if __name__ == "__main__":
    main()
