"""The fast model against the plain reference, on the committed fixtures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from model import Mneme, recur as recur_chunked
from reference import Model, recur as recur_plain

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
FAST = ("nodes-linear", "nodes-compact", "nodes-skip", "nodes-skip-compact", "nodes-window", "nodes-qwen3", "nodes-llama",
        "nodes-mlp", "nodes-never", "gist-llama", "gist-qwen2")


@pytest.mark.parametrize("name", FAST)
def test_logits_and_cuts(name):
    model = Mneme.load(FIXTURES / name)
    e = load_file(FIXTURES / name / "expected.safetensors")
    ids = torch.tensor(e["input_ids"])[None]
    cut = None
    with torch.no_grad():
        if "p" in e:
            p = torch.sigmoid(model.mem.decide(model.mem.trunk(model.model.embed_tokens(ids))))
            assert np.abs(p[0].numpy() - e["p"]).max() < 1e-4
            cut = model.cuts_of(p)
            assert cut[0].nonzero()[:, 0].tolist() == e["cuts"].tolist()
        if model.m.get("gist.keep_bos") and ids[0, 0] == model.cfg.get("bos_token_id"):
            model.m["sinks"] = 1
        logits = model(ids, cut)[0].numpy()
    scale = np.abs(e["logits"]).max()
    assert np.abs(logits - e["logits"]).max() / scale < 1e-4


@pytest.mark.parametrize("name", ("nodes-cosine", "nodes-topk", "nodes-max", "nodes-sentence", "nodes-linear", "gist-llama"))
def test_reference_gives_the_committed_values(name):
    e = load_file(FIXTURES / name / "expected.safetensors")
    out = Model.load(FIXTURES / name).forward(e["input_ids"].tolist())
    assert out["cuts"].tolist() == e["cuts"].tolist()
    assert np.abs(out["logits"] - e["logits"]).max() < 1e-5


@pytest.mark.parametrize("chunk", (1, 7, 16, 64))
def test_chunked_recurrence(chunk):
    rng = np.random.default_rng(chunk)
    T, H, d = 50, 3, 8
    q, k, v = (rng.normal(size=(T, H, d)) for _ in range(3))
    g, beta = -rng.exponential(0.3, (T, H)), rng.uniform(0, 1, (T, H))
    resets = [5, 6, 31]
    want, _ = recur_plain("gated_delta", T, H, H, d, d, q, k, v, g, beta, resets, np.zeros((H, d, d)))
    segment = torch.tensor(np.searchsorted(resets, np.arange(T), side="right"))[None]
    heads = [torch.tensor(z).transpose(0, 1)[None] for z in (q, k, v, g, beta)]
    got = recur_chunked(*heads, segment, chunk)[0].transpose(0, 1).numpy()
    assert np.abs(got - want).max() < 1e-9


def test_causality_of_the_reference():
    model = Model.load(FIXTURES / "nodes-linear")
    ids = load_file(FIXTURES / "nodes-linear" / "expected.safetensors")["input_ids"].tolist()
    changed = ids[:50] + ids[50:][::-1]
    a, b = model.forward(ids), model.forward(changed)
    assert np.abs(a["logits"][:50] - b["logits"][:50]).max() == 0.0
    assert [c for c in a["cuts"] if c < 49] == [c for c in b["cuts"] if c < 49]


@pytest.mark.parametrize("name", ("ahn-gdn-tiny", "ahn-dn-tiny", "ahn-gdn-qwen3", "ahn-gdn-untied", "qwen2-tiny", "llama-tiny"))
def test_ahn_and_full_against_the_parity_fixtures(name):
    model = Mneme.load(FIXTURES / name)
    e = load_file(FIXTURES / name / "expected.safetensors")
    with torch.no_grad():
        logits = model(torch.tensor(e["input_ids"])[None])[0].numpy()
    assert np.abs(logits - e["logits"]).max() / np.abs(e["logits"]).max() < 1e-4
