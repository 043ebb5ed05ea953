"""The decoder of a GGUF file as a Hugging Face folder (config.json, model.safetensors in F32, tokenizer).

    python train/from_gguf.py models/mneme-records.gguf runs-out/records --tokenizer train/tokenizer

For qwen2 and qwen3, whose rows GGUF keeps in the order of the checkpoint (those of llama are reordered there). Memory
tensors stay behind: the folder is a base that another memory is trained on. The tokenizer is copied from a folder that
has it as a tokenizer.json, after its tokens have been compared with those of the file one by one.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def checkpoint_name(name):
    """The Hugging Face name of a GGUF tensor; None for a memory's."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("mem.") or "ahn" in stem:
        return None
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    blk, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"


def read(path):
    """(config, tensors by Hugging Face name in F32, tokens) of a GGUF file."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    field = lambda key: reader.get_field(key).contents()
    arch = field("general.architecture")
    if arch not in CLASSES:
        raise ValueError(f"{path}: architecture {arch!r}, expected one of {sorted(CLASSES)}")
    tensors = {}
    for t in reader.tensors:
        name = checkpoint_name(t.name)
        if name:  # GGUF names the fastest dimension first; the data is already laid out by rows
            tensors[name] = np.ascontiguousarray(dequantize(t.data, t.tensor_type), dtype=np.float32)
    heads = field(f"{arch}.attention.head_count")
    of = lambda key, default: field(key) if reader.get_field(key) else default
    config = {
        "architectures": [CLASSES[arch]], "model_type": arch, "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": field(f"{arch}.embedding_length"), "intermediate_size": field(f"{arch}.feed_forward_length"),
        "num_hidden_layers": field(f"{arch}.block_count"), "num_attention_heads": heads,
        "num_key_value_heads": of(f"{arch}.attention.head_count_kv", heads), "hidden_act": "silu",
        "max_position_embeddings": field(f"{arch}.context_length"),
        "rms_norm_eps": float(f"{field(f'{arch}.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": of(f"{arch}.rope.freq_base", 10000.0), "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": of("tokenizer.ggml.eos_token_id", None),
    }
    if head_dim := of(f"{arch}.attention.key_length", None):
        config["head_dim"] = head_dim
    return config, tensors, field("tokenizer.ggml.tokens")


def write(path, out, tokenizer):
    """The folder `out` from the file `path`."""
    config, tensors, tokens = read(path)
    data = json.loads((Path(tokenizer) / "tokenizer.json").read_text())
    known = {i: text for text, i in data["model"]["vocab"].items()}
    known |= {t["id"]: t["content"] for t in data["added_tokens"]}
    wrong = [i for i, text in enumerate(tokens) if known.get(i, text) != text]
    if wrong or len(known) > len(tokens):
        raise ValueError(f"{tokenizer}: not the tokenizer of {path} (token {wrong[0] if wrong else len(tokens)})")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(tokenizer) / name).exists():
            shutil.copyfile(Path(tokenizer) / name, out / name)
    return config, tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf")
    parser.add_argument("out")
    parser.add_argument("--tokenizer", required=True, help="folder with the tokenizer.json")
    a = parser.parse_args()
    made, written = write(a.gguf, a.out, a.tokenizer)
    n = sum(t.size for t in written.values())
    print(f"{a.out}: {len(written)} tensors, {n:,} numbers, vocabulary {made['vocab_size']}")
