#!/usr/bin/env python3
"""Checks our converter and quantizer against llama.cpp's library.

    tools/check_llama.py logits MNEME FIXTURES_DIR         # our GGUF in llama.cpp gives the fixtures' logits
    tools/check_llama.py quantize MNEME IN.gguf [TYPE...]  # our quantized tensors are llama.cpp's, byte for byte
    tools/check_llama.py compare MNEME IN.gguf...          # the same file and tokens: top-1 agreement and KL divergence
    tools/check_llama.py types IN.gguf... > FILE           # the types that llama.cpp chooses, for convert/tests

MNEME is the mneme executable. Development only: needs numpy, gguf and llama-cpp-python.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

QUANTIZE_TYPES = [
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S",
    "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_M", "TQ1_0", "TQ2_0", "F16", "BF16",
]
IMATRIX_TYPES = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S", "Q4_0", "Q5_0", "Q4_K_M", "IQ4_XS", "IQ4_NL"]


@llama_cpp.llama_log_callback
def silent(_level, _text, _data):
    pass


def read_safetensors(path):
    blob = path.read_bytes()
    n = int.from_bytes(blob[:8], "little")
    out = {}
    for name, t in json.loads(blob[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        dtype = {"F32": np.float32, "I64": np.int64}[t["dtype"]]
        start, end = t["data_offsets"]
        out[name] = np.frombuffer(blob[8 + n + start : 8 + n + end], dtype).reshape(t["shape"])
    return out


def llama_logits(path, ids):
    """[n, n_vocab] of one prefill, F32 K/V, no flash attention."""
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError("llama.cpp does not load it")
    context = llama_cpp.llama_context_default_params()
    context.n_ctx = max(len(ids), 64)
    context.n_batch = context.n_ubatch = context.n_ctx
    context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
    context.n_threads = context.n_threads_batch = 2
    for field in ("flash_attn_type", "flash_attn"):
        if hasattr(context, field):
            setattr(context, field, 0)
    ctx = llama_cpp.llama_init_from_model(model, context)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i] = int(token)
        batch.pos[i] = i
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1
    if llama_cpp.llama_decode(ctx, batch) != 0:
        raise RuntimeError("llama_decode failed")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), shape=(len(ids), n_vocab)).copy()
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokenize = tokenizer(vocab)
    cases = path.parent / "cases.json"
    wrong = []
    if cases.exists():
        for case in json.loads(cases.read_text())["encode"]:
            got = tokenize(case["text"], case.get("add_special_tokens", False))
            if got != case["ids"]:
                wrong.append(case["text"])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)
    return logits, wrong


def tokenizer(vocab):
    def tokenize(text, add_special):
        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 16))()
        n = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), add_special, True)
        return list(buffer[:n])

    return tokenize


def check_logits(mneme, fixtures):
    failed = 0
    for folder in sorted(p for p in fixtures.iterdir() if p.name.startswith(("qwen", "llama"))):
        expected = read_safetensors(folder / "expected.safetensors")
        with tempfile.TemporaryDirectory() as temp:
            out = Path(temp) / "m.gguf"
            subprocess.run([mneme, "convert", folder, "-o", out, "--outtype", "f32"], check=True, capture_output=True)
            (Path(temp) / "cases.json").write_bytes((folder / "text_cases.json").read_bytes())
            logits, wrong = llama_logits(out, expected["input_ids"])
        error = float(np.abs(logits - expected["logits"]).max())
        ok = error < 2e-3 and logits.shape == expected["logits"].shape
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {folder.name}: largest logit error {error:.1e}, {len(wrong)} texts tokenised differently")
        for text in wrong:
            print(f"       {text!r}")
    return failed


def compare(mneme, files, n=256):
    """A Markdown row per file: how often both choose the same token, and KL(llama.cpp || mneme) in nats."""
    print("| file | tokens | top-1 equal | mean KL | 99th percentile | largest logit difference / largest logit |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for file in files:
        n_vocab = next(int(t.shape[1]) for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
        ids = np.random.default_rng(11).integers(0, n_vocab, n).astype(np.int32)
        theirs, _ = llama_logits(file, ids)
        with tempfile.TemporaryDirectory() as temp:
            np.save(f"{temp}/ids.npy", ids)
            command = [mneme, "logits", "-m", file, "--ids", f"{temp}/ids.npy", "--out", f"{temp}/logits.npy", "-ctk", "f32", "-ctv", "f32"]
            subprocess.run(command, check=True, capture_output=True)
            ours = np.load(f"{temp}/logits.npy")

        def log_softmax(x):
            x = x.astype(np.float64) - x.max(-1, keepdims=True)
            return x - np.log(np.exp(x).sum(-1, keepdims=True))

        p, q = log_softmax(theirs), log_softmax(ours)
        kl = (np.exp(p) * (p - q)).sum(-1)
        same = (theirs.argmax(-1) == ours.argmax(-1)).mean()
        error = np.abs(theirs - ours).max() / np.abs(theirs).max()
        print(f"| {file.name} | {n} | {same:.3f} | {kl.mean():.1e} | {np.quantile(kl, 0.99):.1e} | {error:.1e} |", flush=True)
    return 0


def imatrix_for(path, out):
    """A made-up importance matrix for every matrix, in the old .dat format; the same numbers for both tools."""
    rng = np.random.default_rng(7)
    reader = gguf.GGUFReader(path)
    entries = {}
    for tensor in reader.tensors:
        name = tensor.name
        if len(tensor.shape) == 2 and name.endswith(".weight") and name.startswith("blk."):
            entries[name] = (rng.random(int(tensor.shape[0]), dtype=np.float32) ** 3 + 0.01).astype(np.float32)
    with open(out, "wb") as f:
        f.write(np.int32(len(entries)).tobytes())
        for name, values in entries.items():
            f.write(np.int32(len(name)).tobytes() + name.encode() + np.int32(1).tobytes())
            f.write(np.int32(len(values)).tobytes() + values.tobytes())
    return entries


def llama_quantize(source, out, ftype, entries, dry_run=False):
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = 2
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + ftype)
    params.dry_run = dry_run
    keep = []
    if entries:
        cls = llama_cpp.llama_model_imatrix_data
        array = (cls * (len(entries) + 1))()
        for slot, (name, values) in zip(array, entries.items()):
            keep.append(values)
            slot.name = name.encode()
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            slot.size = len(values)
        params.imatrix = ctypes.cast(array, type(params.imatrix))
        keep.append(array)
    done = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) == 0
    if not done and not dry_run:
        raise RuntimeError(f"llama.cpp cannot quantize to {ftype}")
    return done


def check_quantize(mneme, source, types):
    failed = 0
    with tempfile.TemporaryDirectory(dir=source.parent) as temp:
        temp = Path(temp)
        entries = imatrix_for(source, temp / "imatrix.dat")
        plan = [(t, None) for t in types or QUANTIZE_TYPES] + [(t, entries) for t in types or IMATRIX_TYPES]
        for ftype, importances in plan:
            ours, theirs = temp / "ours.gguf", temp / "theirs.gguf"
            label = ftype + (" with imatrix" if importances else "")
            try:
                llama_quantize(source, theirs, ftype, importances)
            except RuntimeError as error:
                print(f"skip {label}: {error}")
                continue
            command = [mneme, "quantize", source, ours, ftype, "--force"]
            command += ["--imatrix", temp / "imatrix.dat"] if importances else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"FAIL {label}: {done.stderr.strip()}")
                failed += 1
                continue
            a = {t.name: t for t in gguf.GGUFReader(ours).tensors}
            b = {t.name: t for t in gguf.GGUFReader(theirs).tensors}
            wrong = sorted(set(a) ^ set(b))
            wrong += [n for n in a if n in b and a[n].tensor_type != b[n].tensor_type]
            wrong += [n for n in a if n in b and n not in wrong and not np.array_equal(a[n].data, b[n].data)]
            failed += bool(wrong)
            kinds = sorted({t.tensor_type.name for t in a.values()})
            print(f"{'FAIL' if wrong else 'ok  '} {label}: {len(a)} tensors ({' '.join(kinds)}) {wrong[:5]}")
    return failed


def run_lengths(types):
    out = []
    for ty in types:
        if out and out[-1][0] == ty:
            out[-1][1] += 1
        else:
            out.append([ty, 1])
    return " ".join(ty if n == 1 else f"{ty}*{n}" for ty, n in out)


def print_types(sources):
    """Per file, file type and kind of tensor: the types by layer, from dry runs of llama.cpp's quantizer."""
    line = re.compile(r"\]\s+(\S+)\s+- \[.*?type =\s*(\w+),(?:.*->.*\((\w+)\))?")
    text = []

    @llama_cpp.llama_log_callback
    def collect(_level, part, _data):
        text.append(part.decode())

    for source in sources:
        reader = gguf.GGUFReader(source)
        field = lambda key: reader.get_field(key).contents()
        arch = field("general.architecture")
        shape = [field(f"{arch}.{k}") for k in ("block_count", "attention.head_count", "attention.head_count_kv")]
        cols = {t.name: int(t.shape[0]) for t in reader.tensors}
        rows = sorted({(re.sub(r"^blk\.\d+\.", "", n), c) for n, c in cols.items() if n.endswith("weight") and "norm" not in n})
        rows = " ".join(f"{name}={n_cols}" for name, n_cols in rows if name != "rope_freqs.weight")
        print(f"model {arch} {' '.join(map(str, shape))} {rows}")
        with tempfile.TemporaryDirectory() as temp:
            entries = imatrix_for(source, Path(temp) / "imatrix.dat")
        for ftype in sorted(set(QUANTIZE_TYPES + IMATRIX_TYPES + ["MXFP4_MOE", "Q1_0", "Q2_0"])):
            for importances in (None, entries):
                text.clear()
                llama_cpp.llama_log_set(collect, None)
                ok = llama_quantize(source, "/dev/null", ftype, importances, dry_run=True)
                llama_cpp.llama_log_set(silent, None)
                if not ok:
                    continue
                kinds = {}
                for found in line.finditer("".join(text)):
                    name, before, after = found.groups()
                    kind = re.sub(r"^blk\.\d+\.", "", name)
                    if kind.endswith("weight") and "norm" not in kind and kind != "rope_freqs.weight":
                        kinds.setdefault(kind, []).append(after or before)
                print(f"{ftype} {'imatrix' if importances else 'plain'}")
                for kind, types in sorted(kinds.items()):
                    print(f"  {kind} {run_lengths(types)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["logits", "quantize", "compare", "types"])
    parser.add_argument("mneme", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("types", nargs="*")
    args = parser.parse_args()
    llama_cpp.llama_log_set(silent, None)
    if args.what == "types":
        return print_types([args.mneme, args.path, *map(Path, args.types)])
    args.mneme = args.mneme.resolve()  # `./mneme` would otherwise be looked for in PATH
    if args.what == "compare":
        return compare(args.mneme, [args.path, *map(Path, args.types)])
    if args.what == "logits":
        sys.exit(check_logits(args.mneme, args.path) != 0)
    sys.exit(check_quantize(args.mneme, args.path, args.types) != 0)


if __name__ == "__main__":
    main()
