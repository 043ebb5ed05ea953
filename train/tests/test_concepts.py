"""The compressor of contexts: its PyTorch form against the plain reference, export, resuming."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import concepts as trainer
from concepts import ConceptNet, Plan, places
from reference import Model, token_texts

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
NAMES = ("concepts-qwen2", "concepts-llama", "concepts-qwen3")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_segments_embeddings_and_logits(name):
    net = ConceptNet.load(FIXTURES / name)
    e = load_file(FIXTURES / name / "expected.safetensors")
    texts = token_texts(FIXTURES / name)
    plan = Plan(e["input_ids"].tolist(), net.m["context_token_ids"], net.segment, net.ratio, texts)
    inside = [tuple(e["input_ids"][a:b].tolist()) for a, b in e["segments"]]
    assert plan.segments == inside
    assert [int(a >= 0) for a in plan.answer] == e["answers"].tolist()
    first = places(plan.segments, net.ratio)
    made = net.compress(list(first))
    in_order = torch.cat([made[first[s]:first[s] + -(-len(s) // net.ratio)] for s in plan.segments])
    assert np.abs(in_order.numpy() - e["slot_embd"]).max() < 1e-4
    x = net.read([plan], made, first)
    said = [t for t, a in enumerate(plan.answer) if a >= 0]
    logits = net.logits(x[0, [plan.answer[t] for t in said]]).numpy()
    assert np.abs(logits - e["logits"][said]).max() / np.abs(e["logits"]).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_changes_nothing(name):
    net = ConceptNet.load(FIXTURES / name)
    rng = random.Random(1)
    segments = [tuple(rng.randrange(400) for _ in range(n)) for n in (1, net.segment, 2, net.segment // 2, net.segment)]
    together = net.compress(segments)
    alone = torch.cat([net.compress([s]) for s in segments])
    assert torch.allclose(together, alone, atol=1e-5)
    texts = token_texts(FIXTURES / name)
    begin, end = net.m["context_token_ids"]
    plans = [Plan([begin, *segments[i], end, *range(n)], (begin, end), net.segment, net.ratio, texts)
             for i, n in ((1, 3), (0, 9), (3, 1))]
    first = places(segments, net.ratio)
    rows = net.read(plans, together, first)
    for b, plan in enumerate(plans):
        assert torch.allclose(rows[b, :len(plan.entries)], net.read([plan], together, first)[0], atol=1e-4)


def base(folder):
    """A base with a vocabulary that has no room: the fixture without its memory, its two tokens and rows."""
    from safetensors.torch import load_file as load, save_file

    source = FIXTURES / "concepts-qwen2"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config.pop("memory")
    config["vocab_size"] -= 2
    tensors = {k: v for k, v in load(source / "model.safetensors").items() if not k.startswith("mem.")}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-2].clone()
    save_file(tensors, folder / "model.safetensors")
    data = json.loads((source / "tokenizer.json").read_text())
    del data["added_tokens"][-2:]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps(config))
    names = [t["content"] for t in data["added_tokens"]]
    return [(names * 4)[i] for i in range(4)]


TINY = """
[memory]
"concepts.segment" = 14
"concepts.ratio" = 3
[train]
seed = 3
base = "BASE"
out = "OUT"
special_tokens = SPECIAL
rank = 2
alpha = 6
batch = 2
lr = 1e-2
segments = [9, 14]
answers = 1.0
logits = 0.5
hidden = 1.0
hidden_rows = "all"
steps = 4
warmup = 1
[[levels]]
tasks = { single = 1.0 }
facts = [2, 3]
filler = [0, 2]
questions = 2
"""


def settings(folder):
    special = base(folder / "base")
    path = folder / "run.toml"
    text = TINY.replace("BASE", str(folder / "base")).replace("OUT", str(folder / "out"))
    path.write_text(text.replace("SPECIAL", json.dumps(special)))
    return path


def test_export_gives_the_same_in_the_reference(tmp_path):
    trainer.train(settings(tmp_path), stop=3)
    out = tmp_path / "out"
    net = ConceptNet.load(out / "export")
    saved = torch.load(out / "last.pt", weights_only=False)["mem"]
    b, before = net.mem.lora[1]["ffn_up"].b.weight, saved["lora.1.ffn_up.b.weight"]
    assert torch.allclose(b, before * 3.0), "alpha / rank is part of b"
    assert net.mem.lora[0]["attn_q"].b.weight.abs().max() > 0
    plain = Model.load(out / "export")
    begin, end = net.m["context_token_ids"]
    assert len(plain.embd) == end + 1 and plain.texts[begin] == b"<|context|>" and plain.texts[end] == b"<|/context|>"
    rng = random.Random(5)
    ids = [3, begin, *(rng.randrange(300) for _ in range(33)), end, 9, 11]
    want = plain.forward(ids)
    plan = Plan(ids, (begin, end), net.segment, net.ratio, token_texts(out / "export"))
    first = places(plan.segments, net.ratio)
    with torch.no_grad():
        x = net.read([plan], net.compress(list(first)), first)
        got = net.logits(x[0, [a for a in plan.answer if a >= 0]]).numpy()
    assert np.abs(got - want["logits"][want["answers"] > 0]).max() / np.abs(want["logits"]).max() < 1e-4
    alone, whole = (load_file(out / f / "model.safetensors") for f in ("adapter", "export"))
    assert set(alone) == {k for k in whole if k.startswith("mem.")}
    assert all(np.array_equal(alone[k], whole[k]) for k in alone)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert all(np.array_equal(t, whole[k][:len(t)]) for k, t in before.items()), "the decoder is frozen"
    assert (out / "adapter" / "tokenizer.json").exists() and (out / "adapter" / "config.json").exists()


def test_resume_gives_the_same_loss(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = trainer.train(settings(tmp_path / "a"), stop=4)
    toml = settings(tmp_path / "b")
    trainer.train(toml, stop=2)
    resumed = trainer.train(toml, stop=4)
    assert whole[-1]["step"] == resumed[-1]["step"] == 4
    assert whole[-1]["last_loss"] == pytest.approx(resumed[-1]["last_loss"], abs=1e-6)


def test_decoder_of_the_gguf_reads_as_its_trainer_knew_it(tmp_path):
    pytest.importorskip("gguf")
    from from_gguf import write

    root = FIXTURES.parent
    write(root / "models" / "mneme-records.gguf", tmp_path, root / "train" / "tokenizer")
    net = ConceptNet({**json.loads((tmp_path / "config.json").read_text()),
                      "memory": {"kind": "concepts", "concepts.segment": 8, "concepts.ratio": 2}})
    net.load_state_dict(trainer.base_of(tmp_path)[1], strict=False)
    texts = trainer.Texts({}, trainer.Encoder(tmp_path / "tokenizer.json"), token_texts(tmp_path), net)
    records = [trainer.record(random.Random(f"gguf:{i}"), "single", 4, 2, 2) for i in range(12)]
    assert trainer.score(net, texts, records, "whole")["accuracy"] > 0.9
    assert trainer.score(net, texts, records, "blind")["accuracy"] < 0.3
