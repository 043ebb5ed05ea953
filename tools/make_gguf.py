#!/usr/bin/env python3
"""Makes GGUF files with random weights in the shapes of real models, through llama.cpp's own tools.

For speed comparisons and format checks: the values mean nothing, the shapes, types and metadata are
those of the real files. The base is written with the gguf package in F16 and quantized by
llama.cpp's llama_model_quantize, so the files are llama.cpp's, not ours.

Development only: needs numpy, gguf and llama-cpp-python (never needed to build or run mneme).

    tools/make_gguf.py OUT_DIR                                   # qwen05 in all types
    tools/make_gguf.py OUT_DIR --shape qwen3b --types q4_k_m     # one type; the base is removed
    tools/make_gguf.py OUT_DIR --memory ahn,nodes,concepts       # and memory adapters for the shape, random too
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import gguf
import numpy as np

# n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff, n_vocab, rope theta, context
SHAPES = {
    "qwen05": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, 1e6, 32768),
    "qwen15": ("qwen2", 1536, 28, 12, 2, 128, 8960, 151936, 1e6, 32768),
    "qwen3b": ("qwen2", 2048, 36, 16, 2, 128, 11008, 151936, 1e6, 32768),
    "qwen3-06": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, 1e6, 40960),
    # For checks of types rather than speed: rows of 256 and of 224, few and many heads per k/v head.
    "small": ("qwen2", 256, 24, 4, 2, 64, 768, 1024, 1e6, 4096),
    "narrow": ("llama", 224, 9, 7, 1, 32, 512, 1024, 5e5, 4096),
    "deep": ("llama", 256, 80, 4, 2, 64, 256, 1024, 1e4, 4096),
    # Keys and values as qwen3b has them in two layers, almost nothing else: what a context of 128k takes.
    "kv3b": ("qwen2", 64, 2, 16, 2, 128, 64, 1024, 1e6, 131072),
    "llama1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, 5e5, 131072),
}
# Of `concepts`: most tokens of a segment, tokens an embedding stands for.
SEGMENT, RATIO = 32, 4
TYPES = ["f16", "q8_0", "q4_0", "q4_k_m", "q6_k", "iq4_xs"]
PRE = {"qwen2": "qwen2", "qwen3": "qwen2", "llama": "llama-bpe"}
FIXTURE = {"qwen2": "qwen2-tiny", "qwen3": "qwen2-tiny", "llama": "llama-tiny"}
SPECIAL = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary(arch, n_vocab):
    """A byte-level BPE that works on any text: the fixture's byte tokens and merges, padded."""
    path = Path(__file__).resolve().parent.parent / "fixtures" / FIXTURE[arch] / "tokenizer.json"
    data = json.loads(path.read_text())
    added = {t["content"] for t in data["added_tokens"]}
    vocab = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab if token not in added]
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    special = SPECIAL.get(arch, SPECIAL["qwen2"])
    # The real vocabularies keep their special tokens after the ordinary ones, before padding.
    n_ordinary = min({151936: 151643, 128256: 128000}.get(n_vocab, n_vocab - 16), n_vocab - len(special))
    if n_ordinary < len(tokens):
        sys.exit(f"--vocab {n_vocab}: at least {len(tokens) + len(special)} tokens are needed")
    types = [gguf.TokenType.NORMAL] * len(tokens)
    while len(tokens) < n_ordinary:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(gguf.TokenType.UNUSED)
    first_special = len(tokens)
    tokens += special
    types += [gguf.TokenType.CONTROL] * len(special)
    while len(tokens) < n_vocab:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(gguf.TokenType.UNUSED)
    return tokens, types, merges, first_special


def tensors(shape, n_vocab, tied):
    """(name, shape as numpy has it, is a matrix) in the order of llama.cpp's converter."""
    arch, n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff, _, _, _ = shape
    yield "token_embd.weight", (n_vocab, n_embd), True
    for il in range(n_layer):
        blk = f"blk.{il}."
        yield blk + "attn_norm.weight", (n_embd,), False
        yield blk + "ffn_down.weight", (n_embd, n_ff), True
        yield blk + "ffn_gate.weight", (n_ff, n_embd), True
        yield blk + "ffn_up.weight", (n_ff, n_embd), True
        yield blk + "ffn_norm.weight", (n_embd,), False
        for name, rows in (("k", n_head_kv), ("q", n_head), ("v", n_head_kv)):
            if arch == "qwen2":
                yield blk + f"attn_{name}.bias", (rows * head_dim,), False
            if arch == "qwen3" and name != "v":
                yield blk + f"attn_{name}_norm.weight", (head_dim,), False
            yield blk + f"attn_{name}.weight", (rows * head_dim, n_embd), True
        yield blk + "attn_output.weight", (n_embd, n_head * head_dim), True
    yield "output_norm.weight", (n_embd,), False
    if not tied:
        yield "output.weight", (n_vocab, n_embd), True
    if arch == "llama":
        yield "rope_freqs.weight", (head_dim // 2,), False


def rope_freqs(head_dim, theta, factor=32.0, low=1.0, high=4.0, original=8192):
    """llama3 scaling: the factor that divides each frequency."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


def write_base(path, shape, n_vocab, tied, seed):
    arch, n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff, _, theta, n_ctx = shape
    writer = gguf.GGUFWriter(None, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"random weights in the shape of {path.stem}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    if head_dim * n_head != n_embd:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(1e-5 if arch == "llama" else 1e-6)
    if arch == "llama":
        writer.add_vocab_size(n_vocab)
        writer.add_rope_dimension_count(head_dim)
    tokens, types, merges, special = vocabulary(arch, n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE[arch])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if arch == "llama":
        writer.add_bos_token_id(special)
        writer.add_eos_token_id(special + 4)
        writer.add_add_bos_token(True)
    else:
        writer.add_eos_token_id(special + 2)
        writer.add_pad_token_id(special)
        writer.add_bos_token_id(special)
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHAT)
    plan = list(tensors(shape, n_vocab, tied))
    for name, dims, matrix in plan:
        dtype = np.dtype(np.float16 if matrix else np.float32)
        writer.add_tensor_info(name, list(dims), dtype, int(np.prod(dims)) * dtype.itemsize)
    partial = path.with_suffix(".partial")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for name, dims, matrix in plan:
        if name == "rope_freqs.weight":
            data = rope_freqs(head_dim, theta)
        elif name.endswith("norm.weight"):
            data = np.ones(dims, dtype=np.float32)
        else:
            data = rng.standard_normal(dims, dtype=np.float32)
            data *= 0.02
            data = data.astype(np.float16) if matrix else data
        writer.write_tensor_data(data)
    writer.close()
    os.replace(partial, path)


def memory_tensors(kind, shape):
    """(name, shape, is a matrix) of a memory; docs/gguf.md."""
    _, n_embd, n_layer, n_head, _, head_dim, *_ = shape
    if kind == "ahn":  # gated delta net
        for il in range(n_layer):
            blk = f"blk.{il}.ahn_"
            yield blk + "b.weight", (n_head, n_embd), True
            yield blk + "a.weight", (n_head, n_embd), True
            yield blk + "dt.bias", (n_head,), False
            yield blk + "decay", (n_head,), False
            yield blk + "g.weight", (n_head, n_embd), True
            yield blk + "norm.weight", (head_dim,), False
            yield blk + "out.weight", (n_head, head_dim, head_dim), True
        return
    if kind == "concepts":
        n_ff, n_kv, rank = shape[6], shape[4] * head_dim, 16
        yield "mem.ce_proj.weight", (n_embd, n_embd), True
        yield "mem.query.weight", (SEGMENT // RATIO, n_embd), False
        for il in range(n_layer):
            for name, n_out, n_in in (("attn_q", n_head * head_dim, n_embd), ("attn_k", n_kv, n_embd),
                                      ("attn_v", n_kv, n_embd), ("attn_output", n_embd, n_head * head_dim),
                                      ("ffn_gate", n_ff, n_embd), ("ffn_up", n_ff, n_embd), ("ffn_down", n_embd, n_ff)):
                yield f"mem.lora.{il}.{name}.a.weight", (rank, n_in), True
                yield f"mem.lora.{il}.{name}.b.weight", (n_out, rank), True
        return
    c, heads = max(64, n_embd // 4), 4
    yield "mem.in_norm.weight", (n_embd,), False
    yield "mem.in.weight", (c, n_embd), True
    yield "mem.out_norm.weight", (c,), False
    for part in ("mem.blk.0.", "mem.active."):
        yield part + "qkv.weight", (3 * c, c), True
        yield part + "beta.weight", (heads, c), True
        yield part + "alpha.weight", (heads, c), True
        yield part + "a", (heads,), False
        yield part + "dt.bias", (heads,), False
        yield part + "gate.weight", (c, c), True
        yield part + "head_norm.weight", (c // heads,), False
    yield "mem.blk.0.norm.weight", (c,), False
    yield "mem.blk.0.conv.weight", (3 * c, 4), False
    yield "mem.blk.0.out.weight", (c, c), True
    yield "mem.blk.0.ffn_norm.weight", (c,), False
    yield "mem.blk.0.ffn_gate.weight", (2 * c, c), True
    yield "mem.blk.0.ffn_up.weight", (2 * c, c), True
    yield "mem.blk.0.ffn_down.weight", (c, 2 * c), True
    yield "mem.decider.weight", (1, c), True
    yield "mem.decider.bias", (1,), False
    yield "mem.node.map.weight", (n_embd, c), True
    yield "mem.node.slot.weight", (1, n_embd), True


def write_adapter(path, kind, shape, n_vocab, seed):
    """A memory adapter of random weights over any file of `shape`."""
    arch, n_embd, n_layer, n_head, n_head_kv, *_ = shape
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "memory")
    writer.add_block_count(n_layer)
    writer.add_embedding_length(n_embd)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    key = f"{arch}.memory."
    writer.add_string(key + "kind", kind)
    if kind == "ahn":
        writer.add_string(key + "ahn.kind", "gated_delta_net")
    elif kind == "concepts":
        writer.add_uint32(key + "concepts.segment", SEGMENT)
        writer.add_uint32(key + "concepts.ratio", RATIO)
        # The last two tokens, which no text has.
        writer.add_array("tokenizer.ggml.context_token_ids", [n_vocab - 2, n_vocab - 1])
    else:
        c = max(64, n_embd // 4)
        writer.add_string(key + "position", "compact")
        writer.add_string(key + "node.sees", "segment")
        writer.add_string(key + "decider.type", "linear")
        for name, value in (("node.slots", 1), ("decider.min_segment", 2), ("decider.max_segment", 64),
                            ("compressor.block_count", 1), ("compressor.embedding_length", c),
                            ("compressor.head_count", 4), ("compressor.feed_forward_length", 2 * c),
                            ("compressor.conv_kernel", 4)):
            writer.add_uint32(key + name, value)
        writer.add_float32(key + "decider.threshold", 0.5)
    rng = np.random.default_rng(seed)
    for name, dims, matrix in memory_tensors(kind, shape):
        data = rng.standard_normal(dims, dtype=np.float32) * 0.02
        if name.endswith("norm.weight"):
            data = np.ones(dims, dtype=np.float32)
        elif name.endswith((".a", "_decay")):
            data = np.full(dims, -0.05, dtype=np.float32)
        writer.add_tensor(name, data.astype(np.float16) if matrix and "ahn_out" not in name else data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(base, path, ty, n_threads):
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = n_threads
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + ty.upper())
    partial = path.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(str(base).encode(), str(partial).encode(), params) != 0:
        sys.exit(f"llama.cpp failed to quantize {base} to {ty}")
    os.replace(partial, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for SHAPE-TYPE.gguf")
    parser.add_argument("--shape", choices=SHAPES, default="qwen05")
    parser.add_argument("--types", default=",".join(TYPES), help="comma list of llama.cpp file types (default: %(default)s)")
    parser.add_argument("--vocab", type=int, help="vocabulary size, instead of the real one")
    parser.add_argument("--layers", type=int, help="number of layers, instead of the real one")
    parser.add_argument("--untied", action="store_true", help="write output.weight")
    parser.add_argument("--memory", default="", help="comma list of memory adapters to write: ahn, nodes, concepts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    shape = list(SHAPES[args.shape])
    shape[2] = args.layers or shape[2]
    n_vocab = args.vocab or shape[7]
    types = args.types.lower().split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / f"{args.shape}-f16.gguf"
    if not base.exists():
        write_base(base, shape, n_vocab, not args.untied, args.seed)
    print(base)
    for ty in types:
        path = args.out / f"{args.shape}-{ty}.gguf"
        if ty != "f16" and not path.exists():
            quantize(base, path, ty, args.threads)
            print(path)
    for kind in filter(None, args.memory.split(",")):
        path = args.out / f"{args.shape}-{kind}.gguf"
        write_adapter(path, kind, shape, n_vocab, args.seed)
        print(path)
    if "f16" not in types:
        base.unlink()


if __name__ == "__main__":
    main()
