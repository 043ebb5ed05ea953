#!/usr/bin/env python3
"""llama.cpp's own server tests (tools/server/tests) against several servers, counted test by test.

The tests download their models; here each preset gets a tiny random one instead, made with llama.cpp's vocabulary
files, the same for every server. A random model says nothing, so what the text of an answer matches is not compared.
Each server is run in a copy of the folder; a test marked slow is left out unless --slow is given.

Needs the tests' own packages (their requirements.txt) and gguf; never needed to build or run mneme.

    tools/llama_suite.py LLAMA_CPP --out /tmp/suite --server "llama-server=build/bin/llama-server" \\
        --server "mneme=target/release/mneme serve"
    tools/llama_suite.py LLAMA_CPP --out /tmp/suite --table      # only the table of what has been run before
"""

import argparse
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

# What starts instead of the server: names of models to download become files that are here.
WRAPPER = '''#!{python}
import os, sys
args, kept, model = sys.argv[1:], [], None
while args:
    arg = args.pop(0)
    if arg in ("--hf-repo", "--hf-file", "--model-url", "--model"):
        name = args.pop(0)
        for part, file in (("bge", "embed"), ("reranker", "rerank"), ("infill", "infill"), ("", "text")):
            if model in (None, "text") and part in name:
                model = file
                break
    elif arg != "--offline":
        kept.append(arg)
if model is None and not {router}:
    model = "text"  # a server without a model is llama.cpp's router
if model is not None:
    kept = ["-m", os.path.join({models!r}, model + ".gguf"), *kept]
if "--threads" not in kept:
    kept += ["-t", "{threads}"]
command = {command!r}
os.execv(command[0], command + kept)
'''


def make_models(source, folder):
    """Four models of two layers: plain, with tokens for filling in, with mean pooling, with a classifier of relevance."""
    import gguf
    import numpy as np

    vocab = gguf.GGUFReader(source / "models" / "ggml-vocab-llama-spm.gguf")
    fields = [f for f in vocab.fields.values() if f.name.startswith("tokenizer.")]
    n_vocab, n_embd, n_ff, head = len(vocab.fields["tokenizer.ggml.tokens"].data), 64, 128, 16
    for name, arch in (("text", "llama"), ("infill", "llama"), ("embed", "llama"), ("rerank", "qwen3")):
        path = folder / f"{name}.gguf"
        if path.exists():
            continue
        writer = gguf.GGUFWriter(path.with_suffix(".partial"), arch)
        writer.add_name(name)
        writer.add_context_length(2048)
        writer.add_embedding_length(n_embd)
        writer.add_block_count(2)
        writer.add_feed_forward_length(n_ff)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(1e4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(n_vocab)
        writer.add_file_type(0)
        if name == "infill":
            for nth, part in enumerate(("pre", "suf", "mid", "rep", "sep")):
                writer.add_uint32(f"tokenizer.ggml.fim_{part}_token_id", n_vocab - 1 - nth)
        if name in ("embed", "rerank"):
            writer.add_pooling_type(gguf.PoolingType.MEAN if name == "embed" else gguf.PoolingType.RANK)
        for f in fields:
            sub = f.types[-1] if f.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(f.name, f.contents(), f.types[0], sub)
        rng = np.random.default_rng(1)

        def tensor(tensor_name, *dims):
            ones = tensor_name.endswith("norm.weight")
            data = np.ones(dims) if ones else rng.standard_normal(dims) * 0.05
            writer.add_tensor(tensor_name, data.astype(np.float32))

        tensor("token_embd.weight", n_vocab, n_embd)
        tensor("output.weight", n_vocab, n_embd)
        tensor("output_norm.weight", n_embd)
        if name == "rerank":
            tensor("cls.output.weight", 1, n_embd)
        for il in range(2):
            blk = f"blk.{il}."
            tensor(blk + "attn_norm.weight", n_embd)
            tensor(blk + "ffn_norm.weight", n_embd)
            tensor(blk + "attn_q.weight", 4 * head, n_embd)
            tensor(blk + "attn_k.weight", 2 * head, n_embd)
            tensor(blk + "attn_v.weight", 2 * head, n_embd)
            tensor(blk + "attn_output.weight", n_embd, 4 * head)
            if arch == "qwen3":
                tensor(blk + "attn_q_norm.weight", head)
                tensor(blk + "attn_k_norm.weight", head)
            tensor(blk + "ffn_gate.weight", n_ff, n_embd)
            tensor(blk + "ffn_up.weight", n_ff, n_embd)
            tensor(blk + "ffn_down.weight", n_embd, n_ff)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(path.with_suffix(".partial"), path)


def run(args, name, command):
    """The suite in a folder of its own; what pytest saw goes to NAME.xml, what it said to NAME.txt."""
    folder = args.out / name
    tests = folder / "tools/server/tests"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(args.source / "tools/server/tests", tests)
    (folder / "models").symlink_to(args.source.resolve() / "models")
    for file, line in (("conftest.py", "\nServerPreset.load_all = lambda: None\n"),
                       ("utils.py", "\ndef match_regex(regex, text):\n    return True\n")):
        with open(tests / file, "a") as out:
            out.write(line)
    wrapper = folder / "server.py"
    command = [str(Path(command[0]).resolve()), *command[1:]]
    fill = {"python": sys.executable, "models": str(args.out.resolve()), "command": command, "threads": args.threads}
    wrapper.write_text(WRAPPER.format(router=name == "llama-server", **fill))
    wrapper.chmod(0o755)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={args.out.resolve()}/{name}.xml"]
    pytest += [] if args.slow else ["-m", "not slow"]
    pytest += args.pytest.split()
    with open(args.out / f"{name}.txt", "w") as out:
        environment = {**os.environ, "LLAMA_SERVER_BIN_PATH": str(wrapper.resolve())}
        subprocess.run(pytest, cwd=tests, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False)


def outcomes(path):
    """Test -> passed, failed or skipped."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        test = case.get("classname").split(".")[-1], case.get("name")
        parts = {child.tag for child in case}
        bad = parts & {"failure", "error"}
        found[test] = "failed" if bad else "skipped" if "skipped" in parts else "passed"
    return found


def table(out):
    results = {path.stem: outcomes(path) for path in sorted(out.glob("*.xml"))}
    files = sorted({file for result in results.values() for file, _ in result})
    print("| file | " + " | ".join(f"{name} passed/failed/skipped" for name in results) + " |")
    print("|---" * (len(results) + 1) + "|")
    for file in [*files, "all"]:
        row = []
        for result in results.values():
            count = Counter(how for (of, _), how in result.items() if file in (of, "all"))
            row.append(f"{count['passed']}/{count['failed']}/{count['skipped']}")
        print(f"| {file} | " + " | ".join(row) + " |")
    for one in results:
        for test in sorted(set().union(*results.values())):
            others = [name for name in results if name != one and results[name].get(test) == "passed"]
            if others and results[one].get(test) != "passed":
                print(f"not {one}: {test[0]}::{test[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="llama.cpp's source tree")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, copies and results")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--pytest", default="", help="files and options for pytest, in one argument")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        make_models(args.source, args.out)
        for server in args.server:
            name, _, command = server.partition("=")
            run(args, name, command.split())
    table(args.out)


if __name__ == "__main__":
    main()
