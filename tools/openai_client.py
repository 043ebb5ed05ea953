#!/usr/bin/env python3
"""The official `openai` package against `mneme serve`: chat, streams, completions, models, embeddings, JSON mode, tools,
errors. What the package parses is checked, so the model may say what it likes; a tiny random one will do.

Needs the package `openai` (never needed to build or run mneme); without it, it says so and ends with status 0.

    python3 -m venv .venv && .venv/bin/pip install openai
    .venv/bin/python tools/openai_client.py --mneme target/release/mneme -m model.gguf
"""

import argparse
import json
import math
import subprocess
import sys

try:
    import openai
    from pydantic import BaseModel
except ImportError:
    print("skipped: the package `openai` is not installed")
    sys.exit(0)

FAILED = []
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    capital: bool
    size: int


def check(ok, what):
    print(("ok      " if ok else "FAILED  ") + what, flush=True)
    if not ok:
        FAILED.append(what)


def start(args, *flags):
    command = [args.mneme, "serve", "--port", "0", "-m", args.model, "-t", str(args.threads), "-np", "2", "-c", "4096", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    port = None
    for line in process.stderr:
        if line.startswith("listening on "):
            port = int(line.rsplit(":", 1)[1])
        if line.startswith("ready"):
            return process, port
    sys.exit(f"the server ended with status {process.wait()}: {' '.join(command)}")


def refused(what, kind, call, **fields):
    try:
        call()
    except kind as e:
        for name, value in fields.items():
            check(value in str(getattr(e, name)), f"{what}: {kind.__name__}, {name} {value!r}")
        return
    except openai.APIError as e:
        check(False, f"{what}: {type(e).__name__} instead of {kind.__name__}: {e}")
        return
    check(False, f"{what}: not refused")


def chat(client):
    got = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, seed=1, temperature=0.7)
    choice = got.choices[0]
    check(got.object == "chat.completion" and got.id.startswith("chatcmpl-"), "chat: object and id")
    check(choice.message.role == "assistant" and isinstance(choice.message.content, str), "chat: a message")
    check(choice.finish_reason in ("stop", "length"), f"chat: finish_reason {choice.finish_reason}")
    usage = got.usage
    check(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 8, "chat: usage adds up")
    again = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, seed=1, temperature=0.7)
    check(again.choices[0].message.content == choice.message.content, "chat: the same seed says the same")
    two = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=4, n=2)
    check([c.index for c in two.choices] == [0, 1], "chat: n=2")
    probs = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=4)
    entries = probs.choices[0].logprobs.content
    check(len(entries) == probs.usage.completion_tokens and all(len(e.top_logprobs) == 4 for e in entries), "chat: logprobs")
    check(all(e.logprob <= 0 and bytes(e.bytes).decode(errors="replace") == e.token for e in entries), "chat: bytes are the token's")


def streams(client):
    whole = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=12, temperature=0)
    parts, ids, roles, usage, finish = [], set(), [], None, None
    for event in client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        ids.add(event.id)
        usage = event.usage or usage
        for choice in event.choices:
            parts.append(choice.delta.content or "")
            roles.append(choice.delta.role)
            finish = choice.finish_reason or finish
    check("".join(parts) == whole.choices[0].message.content, "stream: the parts are the whole")
    check(len(ids) == 1 and roles[0] == "assistant" and set(roles[1:]) <= {None}, "stream: one id, the role once")
    check(finish == whole.choices[0].finish_reason, f"stream: finish_reason {finish}")
    check(usage is not None and usage.completion_tokens == whole.usage.completion_tokens, "stream: usage at the end")
    with client.chat.completions.stream(model="any", messages=MESSAGES, max_tokens=12, temperature=0) as stream:
        kinds = {event.type for event in stream}
        try:
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as e:  # some versions of the package raise it at the limit
            final = e.completion
    check(final.choices[0].message.content == whole.choices[0].message.content, "stream: the helper's final completion")
    check("chunk" in kinds, "stream: the helper's events")
    with client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=2000, stream=True) as stream:
        next(iter(stream))
    after = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=1)
    check(after.usage.completion_tokens == 1, "stream: one that was left frees its slot")


def completions(client):
    got = client.completions.create(model="any", prompt="Once upon a time", max_tokens=6, temperature=0)
    check(got.object == "text_completion" and got.usage.completion_tokens <= 6, "completion: object, usage")
    parts = [
        c.text
        for event in client.completions.create(model="any", prompt="Once upon a time", max_tokens=6, temperature=0, stream=True)
        for c in event.choices
    ]
    check("".join(parts) == got.choices[0].text, "completion: the parts are the whole")
    many = client.completions.create(model="any", prompt=["a b", "c d"], max_tokens=2, temperature=0)
    check(len(many.choices) == 2, "completion: several prompts")
    text = got.choices[0].text
    if len(text) > 2:
        cut = client.completions.create(model="any", prompt="Once upon a time", max_tokens=6, temperature=0, stop=[text[2]])
        check(text[2] not in cut.choices[0].text and cut.choices[0].finish_reason == "stop", "completion: stop")


def structured(client):
    got = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": {
            "type": "object", "properties": {"capital": {"type": "boolean"}, "size": {"enum": [1, 2, 3]}},
            "required": ["capital", "size"], "additionalProperties": False}}},
    )
    value = json.loads(got.choices[0].message.content)
    check(set(value) == {"capital", "size"} and value["size"] in (1, 2, 3), f"JSON schema: {value}")
    got = client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=300, temperature=0, response_format={"type": "json_object"}, stop=["}"]
    )
    check(got.choices[0].message.content.lstrip().startswith("{"), "JSON mode: begins an object")
    got = client.chat.completions.parse(
        model="any", messages=MESSAGES, max_tokens=200, temperature=0, response_format=City,
        logit_bias={}, extra_body={"logit_bias": []},
    )
    parsed = got.choices[0].message.parsed
    check(isinstance(parsed, City), f"parse: {parsed!r}")


def tools(client):
    for choice in ["required", {"type": "function", "function": {"name": "weather"}}]:
        got = client.chat.completions.create(model="any", messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=200, temperature=0)
        calls = got.choices[0].message.tool_calls or []
        check(got.choices[0].finish_reason == "tool_calls" and len(calls) == 1, f"tools: one call for {choice}")
        if calls:
            said = json.loads(calls[0].function.arguments)
            check(calls[0].function.name == "weather" and set(said) == {"city", "unit"}, f"tools: arguments {said}")
    names, arguments = [], ""
    for event in client.chat.completions.create(
        model="any", messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0, stream=True
    ):
        for choice in event.choices:
            for call in choice.delta.tool_calls or []:
                names.append(call.function.name)
                arguments += call.function.arguments or ""
    check([n for n in names if n] == ["weather"] and set(json.loads(arguments)) == {"city", "unit"}, "tools: a streamed call")
    again = MESSAGES + [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris","unit":"C"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    got = client.chat.completions.create(model="any", messages=again, tools=[TOOL], tool_choice="none", max_tokens=8)
    check(not got.choices[0].message.tool_calls, "tools: none after a result")


def models(client, name):
    listed = client.models.list().data
    check(len(listed) == 1 and listed[0].id == name and listed[0].object == "model", "models: the one there is")


def embeddings(client):
    got = client.embeddings.create(model="any", input=["one text", "another", "one text"])
    vectors = [d.embedding for d in got.data]
    check(len(vectors) == 3 and vectors[0] == vectors[2], "embeddings: the same text has the same one")
    check(all(abs(math.hypot(*v) - 1) < 1e-3 for v in vectors), "embeddings: of length 1")
    plain = client.embeddings.create(model="any", input="one text", encoding_format="float").data[0].embedding
    check(max(abs(a - b) for a, b in zip(plain, vectors[0])) < 1e-6, "embeddings: base64 and numbers agree")


def responses(client):
    got = client.responses.create(model="any", input="Say something", max_output_tokens=8, temperature=0)
    check(got.status in ("completed", "incomplete") and isinstance(got.output_text, str), "responses: text")
    done = None
    parts = ""
    with client.responses.stream(model="any", input="Say something", max_output_tokens=8, temperature=0) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                parts += event.delta
        done = stream.get_final_response()
    check(parts == got.output_text == done.output_text, "responses: the parts are the whole")


def errors(client, port, key):
    refused("a wrong key", openai.AuthenticationError, lambda: openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="no").models.list(), message="Invalid API Key")
    refused("no messages", openai.BadRequestError, lambda: client.post("/chat/completions", cast_to=object, body={"model": "x"}), type="invalid_request_error")
    refused("a prompt that is too long", openai.BadRequestError, lambda: client.chat.completions.create(model="any", messages=[{"role": "user", "content": "word " * 20000}]), type="exceed_context_size_error", message="exceeds the available context size")
    refused("a schema that is none", openai.BadRequestError, lambda: client.chat.completions.create(model="any", messages=MESSAGES, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}), type="invalid_request_error")
    refused("an unknown path", openai.NotFoundError, lambda: client.post("/nonsense", cast_to=object, body={}), type="not_found_error")
    refused("a bad temperature in a stream", openai.BadRequestError, lambda: list(client.chat.completions.create(model="any", messages=MESSAGES, temperature="hot", stream=True)), type="invalid_request_error")
    refused("input that is empty", openai.BadRequestError, lambda: client.embeddings.create(model="any", input=[]), type="invalid_request_error")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mneme", default="target/release/mneme")
    parser.add_argument("-m", "--model", default="models/mneme-records.gguf")
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    key = "a key"
    process, port = start(args, "--embeddings", "--api-key", key, "--alias", "named", "--memory", "full")
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=120)
        print(f"openai {openai.__version__}")
        models(client, "named")
        chat(client)
        streams(client)
        completions(client)
        structured(client)
        tools(client)
        embeddings(client)
        responses(client)
        errors(client, port, key)
    finally:
        process.terminate()
        process.wait(30)
    print(f"{len(FAILED)} failed")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
