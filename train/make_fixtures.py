"""Write fixtures/nodes-*/, fixtures/gist-*/ and fixtures/concepts-*/: tiny random checkpoints with memory, and what they must give.

    python train/make_fixtures.py [name ...]

Layout as in fixtures/README.md (F32 weights); train/README.md says what expected.safetensors holds. A seed is rejected
when a decision hangs on rounding: |p - tau| < 1e-3 anywhere, or two scores of a top_k ranking closer than 1e-3.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from reference import Model, token_texts

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
LEARNED = ("linear", "mlp", "cosine")
# Matrices of a layer that may have a low-rank addition, and where the checkpoint has them.
ALL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SOURCES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj"}

# name: (family, memory keys, sizes). Sizes default to those of `base_config` and `memory_keys`.
SPECS = {
    "nodes-linear": ("qwen2", {}, {}),
    "nodes-compact": ("qwen2", {"position": "compact", "sinks": 4}, {}),
    "nodes-skip": ("qwen2", {"node.sees": "nodes", "sinks": 4}, {}),
    "nodes-skip-compact": ("qwen3", {"node.sees": "nodes", "position": "compact", "node.slots": 2}, {}),
    "nodes-window": ("qwen2", {"window": 8, "sinks": 4}, {}),
    "nodes-qwen3": ("qwen3", {"node.slots": 2, "compressor.block_count": 2}, {"heads": 1}),
    "nodes-llama": ("llama", {"window": 8, "sinks": 2}, {}),
    "nodes-mlp": ("qwen2", {"decider.type": "mlp", "node.slots": 2, "sinks": 1}, {}),
    "nodes-cosine": ("qwen3", {"decider.type": "cosine", "decider.threshold": 0.62}, {}),
    "nodes-stride": ("llama", {"decider.type": "stride", "decider.stride": 7, "position": "compact"}, {}),
    "nodes-sentence": ("qwen2", {"decider.type": "sentence", "decider.min_segment": 2}, {"text": True}),
    "nodes-random": ("qwen2", {"decider.type": "random", "decider.rate": 0.15, "decider.seed": 7, "window": 8}, {}),
    "nodes-topk": ("qwen2", {"node.top_k": 3, "sinks": 2}, {"top_k": True}),
    "nodes-max": ("qwen2", {"node.max": 5, "node.fanin": 3, "sinks": 4}, {"length": 96}),
    "nodes-max-compact": ("qwen3", {"node.max": 8, "node.fanin": 2, "node.slots": 2, "position": "compact"}, {"length": 96}),
    "nodes-never": ("llama", {"reset": "never", "node.sees": "nodes", "window": 8}, {}),
    "gist-llama": ("llama", {"kind": "gist", "node.slots": 2, "gist.keep_bos": True}, {"text": True}),
    "gist-qwen2": ("qwen2", {"kind": "gist", "node.slots": 2, "gist.keep_bos": False}, {"text": True}),
    "concepts-qwen2": ("qwen2", {"kind": "concepts"}, {"text": True, "lora": ALL, "bias": True}),
    "concepts-llama": ("llama", {"kind": "concepts", "concepts.segment": 12, "concepts.ratio": 3},
                       {"text": True, "lora": ("attn_q", "attn_k", "attn_v")}),
    "concepts-qwen3": ("qwen3", {"kind": "concepts", "concepts.segment": 9, "concepts.ratio": 4},
                       {"text": True, "lora": ("attn_q", "attn_output", "ffn_up"), "rank": 3}),
}

SOURCE = {"qwen2": "qwen2-tiny", "qwen3": "qwen3-tiny", "llama": "llama-tiny"}

TEXT = (
    "Ann is at the old mill. Her code is 417? No! It was 52.\nThe well is dry... Wait, she said.  A red bag\n\n"
    "Tom has it. 水井在山上。 好！ Run to the sea? e.g. this one. End"
)


def base_config(family, sizes):
    """The config.json of the base model, without memory."""
    config = json.loads((ROOT / SOURCE[family] / "config.json").read_text())
    config.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, torch_dtype="float32", tie_word_embeddings=True)
    if "max_window_layers" in config:
        config["max_window_layers"] = 2
    if family == "qwen3":
        config["head_dim"] = 32
    return config


def memory_keys(keys, sizes):
    """The "memory" object: the keys of a row over the defaults."""
    if keys.get("kind") == "gist":
        return {"sinks": 0, "window": 0, "position": "keep", **keys}
    if keys.get("kind") == "concepts":
        return {"concepts.segment": 20, "concepts.ratio": 2, **keys}
    out = {
        "kind": "nodes", "sinks": 0, "window": 0, "reset": "cut", "position": "keep", "node.slots": 1,
        "node.sees": "segment", "node.top_k": 0, "node.max": 0, "node.fanin": 4, "decider.type": "linear",
        "decider.threshold": 0.5, "decider.min_segment": 3, "decider.max_segment": 20, "compressor.block_count": 1,
        "compressor.embedding_length": sizes.get("c", 32), "compressor.head_count": sizes.get("heads", 2),
        "compressor.feed_forward_length": 2 * sizes.get("c", 32), "compressor.conv_kernel": 4,
    }
    out.update(keys)
    return out


def weights(config, rng, sizes):
    """Random tensors by name: nothing at the value a default would have."""
    w = {}
    d, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_head, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    hd = config.get("head_dim") or d // n_head

    def matrix(name, rows, cols, gain=1.0):
        w[name] = rng.normal(0, gain / np.sqrt(cols), (rows, cols))

    def norm(name, n):
        w[name] = 1.0 + 0.2 * rng.normal(0, 1, n)

    w["model.embed_tokens.weight"] = rng.normal(0, 0.5, (vocab, d))
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        norm(f"{p}.input_layernorm.weight", d)
        for name, n in (("q", n_head), ("k", n_kv), ("v", n_kv)):
            matrix(f"{p}.self_attn.{name}_proj.weight", n * hd, d, 1.0 if name == "v" else 1.4)
            if config["model_type"] == "qwen2":
                w[f"{p}.self_attn.{name}_proj.bias"] = rng.normal(0, 0.3, n * hd)
            if config["model_type"] == "qwen3" and name != "v":
                norm(f"{p}.self_attn.{name}_norm.weight", hd)
        matrix(f"{p}.self_attn.o_proj.weight", d, n_head * hd)
        norm(f"{p}.post_attention_layernorm.weight", d)
        for name, rows, cols in (("gate", inter, d), ("up", inter, d), ("down", d, inter)):
            matrix(f"{p}.mlp.{name}_proj.weight", rows, cols)
    norm("model.norm.weight", d)

    m = config["memory"]
    if m["kind"] == "gist":
        return w
    if m["kind"] == "concepts":
        matrix("mem.ce_proj.weight", d, d, 0.7)
        if sizes.get("bias"):
            w["mem.ce_proj.bias"] = rng.normal(0, 0.2, d)
        w["mem.query.weight"] = rng.normal(0, 0.5, (-(-m["concepts.segment"] // m["concepts.ratio"]), d))
        rank = sizes.get("rank", 4)
        for i in range(config["num_hidden_layers"]):
            for name in sizes["lora"]:
                rows, cols = w[f"model.layers.{i}.{SOURCES[name]}.weight"].shape
                matrix(f"mem.lora.{i}.{name}.a.weight", rank, cols)
                matrix(f"mem.lora.{i}.{name}.b.weight", rows, rank, 0.7)
        return w
    c, heads, ffn = (m[f"compressor.{k}"] for k in ("embedding_length", "head_count", "feed_forward_length"))
    slots = m["node.slots"]
    norm("mem.in_norm.weight", d)
    matrix("mem.in.weight", c, d)

    def recurrence(p):
        matrix(f"{p}.qkv.weight", 3 * c, c, 1.2)
        matrix(f"{p}.beta.weight", heads, c, 1.5)
        matrix(f"{p}.alpha.weight", heads, c, 1.0)
        w[f"{p}.a"] = -np.exp(rng.uniform(-3, 0, heads))
        w[f"{p}.dt.bias"] = rng.normal(-0.5, 0.5, heads)
        matrix(f"{p}.gate.weight", c, c, 1.5)
        norm(f"{p}.head_norm.weight", c // heads)

    for b in range(m["compressor.block_count"]):
        p = f"mem.blk.{b}"
        norm(f"{p}.norm.weight", c)
        recurrence(p)
        w[f"{p}.conv.weight"] = rng.normal(0, 0.5, (3 * c, m["compressor.conv_kernel"]))
        matrix(f"{p}.out.weight", c, c)
        norm(f"{p}.ffn_norm.weight", c)
        matrix(f"{p}.ffn_gate.weight", ffn, c)
        matrix(f"{p}.ffn_up.weight", ffn, c)
        matrix(f"{p}.ffn_down.weight", c, ffn)
    norm("mem.out_norm.weight", c)
    recurrence("mem.active")
    matrix("mem.node.map.weight", slots * d, c, 2.0)
    w["mem.node.slot.weight"] = rng.normal(0, 0.5, (slots, d))
    kind = m["decider.type"]
    if kind == "linear":
        matrix("mem.decider.weight", 1, c, 2.5)
        w["mem.decider.bias"] = np.array([-2.0])
    elif kind == "mlp":
        matrix("mem.decider.0.weight", c, c, 1.5)
        w["mem.decider.0.bias"] = rng.normal(0, 0.3, c)
        matrix("mem.decider.1.weight", 1, c, 5.0)
        w["mem.decider.1.bias"] = np.array([-1.5])
    elif kind == "cosine":
        matrix("mem.decider.q.weight", c, c)
        w["mem.decider.k.weight"] = w["mem.decider.q.weight"] + rng.normal(0, 0.5 / np.sqrt(c), (c, c))
    return w


def input_ids(config, family, sizes, length, rng, source):
    """Random ids, or the sample text where the rule reads text; gist runs are put in after sentence ends."""
    if not sizes.get("text"):
        return [int(i) for i in rng.integers(0, config["vocab_size"] - 12, length)]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    if config["memory"].get("kind") == "concepts":
        # A question, a context of several segments, one of a few tokens, an empty one, and text around them.
        begin, end = config["memory"]["context_token_ids"]
        pieces = ("Where is", TEXT, " and", "It is red.", "?", "", " Say it.")
        ids = []
        for i, piece in enumerate(pieces):
            inner = tokenizer.encode(piece, add_special_tokens=False).ids
            ids += [begin, *inner, end] if i % 2 else inner
        return ids
    gist = config["memory"].get("gist_token_ids")
    if not gist:
        return tokenizer.encode(TEXT, add_special_tokens=False).ids
    ids = [config["bos_token_id"]] if config.get("bos_token_id") is not None else []
    text = TEXT
    for mark in (". ", "? ", "! ", ".\n", "?\n", "!\n"):
        text = text.replace(mark, mark + "\0")
    for piece in text.split("\0"):
        ids += tokenizer.encode(piece, add_special_tokens=False).ids + gist
    return ids + tokenizer.encode(" more", add_special_tokens=False).ids


def attempt(name, seed):
    """Model, ids and result of one seed, or the reason it will not do."""
    family, keys, sizes = SPECS[name]
    rng = np.random.default_rng([seed, sum(name.encode())])
    config = base_config(family, sizes)
    config["memory"] = memory_keys(keys, sizes)
    if keys.get("kind") == "gist":
        config["memory"]["gist_token_ids"] = [config["vocab_size"] + j for j in range(keys["node.slots"])]
        config["vocab_size"] += keys["node.slots"]
    if keys.get("kind") == "concepts":
        config["memory"]["context_token_ids"] = [config["vocab_size"], config["vocab_size"] + 1]
        config["vocab_size"] += 2
    w = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in weights(config, rng, sizes).items()}
    source = ROOT / SOURCE[family]
    texts = token_texts(source)
    texts.update({t: b"" for t in config["memory"].get("context_token_ids", [])})
    model = Model(config, w, texts)
    ids = input_ids(config, family, sizes, sizes.get("length", 80), rng, source)
    out = model.forward(ids)
    if keys.get("kind", "nodes") == "nodes":
        if config["memory"]["decider.type"] in LEARNED and np.abs(out["p"] - config["memory"]["decider.threshold"]).min() < 1e-3:
            return None, "p too near tau"
        if out["pending"]:
            return None, "ends on a cut"
        n_cuts = len(out["cuts"])
        long = [b - a for a, b in zip([-1, *out["cuts"]], out["cuts"])]
        if sizes.get("top_k"):
            if n_cuts < 6 or model.rank_gap < 1e-3:
                return None, "too few nodes, or a ranking too close"
        elif config["memory"]["decider.type"] in LEARNED:
            if not 6 <= n_cuts <= 14 or (max(long) != 20 and "node.max" not in keys):
                return None, f"{n_cuts} cuts, longest {max(long)}"
        if config["memory"].get("position") == "compact" and any(b - a <= 4 for a, b in zip([-1], out["cuts"])):
            return None, "first segment all sinks"
    return (model, config, w, ids, out), ""


def write(name):
    """Find a seed and write the fixture."""
    for seed in range(1500):
        found, _ = attempt(name, seed)
        if found:
            break
    else:
        raise RuntimeError(f"{name}: no seed gives decisions clear of rounding")
    model, config, w, ids, out = found
    family, keys, _ = SPECS[name]
    folder = ROOT / name
    folder.mkdir(exist_ok=True)
    source = ROOT / SOURCE[family]
    for file in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / file, folder / file)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    names = [(token, f"<|gist_{j}|>") for j, token in enumerate(config["memory"].get("gist_token_ids", []))]
    names += zip(config["memory"].get("context_token_ids", []), ("<|context|>", "<|/context|>"))
    for token, content in names:
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": token, "content": content})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(w, folder / "model.safetensors", {"format": "pt"})
    expected = {"input_ids": np.array(ids, np.int64)}
    for key, value in out.items():
        if isinstance(value, np.ndarray):
            expected[key] = np.ascontiguousarray(value if value.dtype.kind == "i" else value.astype(np.float32))
    save_file(expected, folder / "expected.safetensors")
    meta = {"name": name, "seed": seed, "length": len(ids), "n_cuts": len(out["cuts"]), "memory": config["memory"],
            "logits_std": float(out["logits"].std()), "logits_absmax": float(np.abs(out["logits"]).max()),
            "pending": bool(out.get("pending", False))}
    if "p" in out:
        meta["p_margin"] = float(np.abs(out["p"] - config["memory"]["decider.threshold"]).min())
    if config["memory"].get("node.top_k"):
        meta["rank_margin"] = float(model.rank_gap)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: seed {seed}, {len(ids)} tokens, cuts {out['cuts'].tolist()}, logits std {meta['logits_std']:.2f}, {size} bytes")


if __name__ == "__main__":
    for fixture in sys.argv[1:] or SPECS:
        write(fixture)
