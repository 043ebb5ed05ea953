"""Determinism of the generator, resuming, and the reader."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train as trainer
from data import CHINESE, ENGLISH, LISTS, TASKS, WORDS, Encoder, record, several
from evaluate import Reader, wilson
from model import Mneme

HERE = Path(__file__).resolve().parents[1]
VOCAB = Encoder(HERE / "tokenizer" / "tokenizer.json").tokenizer.get_vocab_size()
FIXTURES = HERE.parent / "fixtures"

TINY = """
[model]
model_type = "qwen2"
vocab_size = VOCAB
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
rms_norm_eps = 1e-6
rope_theta = 10000.0
tie_word_embeddings = true
[memory]
kind = "nodes"
position = "compact"
"node.slots" = 2
"decider.type" = "linear"
"decider.threshold" = 0.5
"decider.min_segment" = 2
"decider.max_segment" = 24
"compressor.block_count" = 1
"compressor.embedding_length" = 32
"compressor.head_count" = 2
"compressor.feed_forward_length" = 32
[train]
seed = 5
tokenizer = "TOKENIZER"
out = "OUT"
longest = 24
amp = false
steps = 6
batch = 3
lr = 1e-3
gap_scale = 8
save_every = 3
[compressor]
reconstruct = 0.1
[joint]
copies = 2
lambda = 0.02
dial = 2.0
entropy = 0.01
entropy_end = 0.001
[[levels]]
tasks = { repeat = 0.5, update = 0.5 }
facts = [2, 4]
filler = [1, 3]
questions = 2
"""


def settings(folder):
    path = folder / "run.toml"
    path.write_text(TINY.replace("TOKENIZER", str(HERE / "tokenizer")).replace("OUT", str(folder / "out")).replace("VOCAB", str(VOCAB)))
    return path


@pytest.mark.parametrize("stage", ("compressor", "joint"))
def test_resume_gives_the_same_loss(tmp_path, stage):
    whole = trainer.train(stage, settings(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path), stop=6)
    (tmp_path / "b").mkdir()
    toml = settings(tmp_path / "b")
    trainer.train(stage, toml, stop=3)
    resumed = trainer.train(stage, toml, stop=6)
    assert whole[-1]["step"] == resumed[-1]["step"] == 6
    assert whole[-1]["last_loss"] == pytest.approx(resumed[-1]["last_loss"], abs=1e-6)


def test_export_loads_again(tmp_path):
    trainer.train("compressor", settings(tmp_path), stop=3)
    folder = tmp_path / "out" / "compressor"
    net = Mneme.load(folder / "export")
    saved = torch.load(folder / "last.pt", weights_only=False)["model"]
    for name, t in net.state_dict().items():
        assert torch.allclose(t, saved[name], atol=1e-6), name
    assert Encoder(folder / "export" / "tokenizer.json").end == net.cfg["eos_token_id"]


def test_decider_stage_may_have_a_head_of_another_kind(tmp_path):
    toml = settings(tmp_path)
    trainer.train("compressor", toml, stop=2)
    toml.write_text(toml.read_text() + """
[decider]
init = "compressor"
memory = { "decider.type" = "mlp" }
decider_bias = -1.5
decider_shrink = 1.0
steps = 3
copies = 2
lambda = 0.01
lr = 1e-2
""")
    trainer.train("decider", toml, stop=3)
    out = tmp_path / "out"
    before, after = (torch.load(out / stage / "last.pt", weights_only=False)["model"] for stage in ("compressor", "decider"))
    heads = {name for name in after if name.startswith("mem.decider.")}
    assert heads == {f"mem.decider.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")}
    assert all(torch.equal(after[name], before[name]) for name in after if name not in heads), "everything else is frozen"
    assert after["mem.decider.1.bias"].item() != -1.5, "the head learns"
    assert json.loads((out / "decider" / "export" / "config.json").read_text())["memory"]["decider.type"] == "mlp"


@pytest.mark.parametrize("task", TASKS)
def test_generator_is_a_function_of_its_seed(task):
    a, b = (record(random.Random(7), task, 6, 4, 3, repeat=0.5) for _ in range(2))
    assert a.text() == b.text() and a.questions == b.questions
    assert a.text() != record(random.Random(8), task, 6, 4, 3, repeat=0.5).text()
    text = a.text()
    for end in a.ends("fact") + a.ends("filler"):
        assert text[end - 1] in ".。"


def test_generator_command_repeats_itself():
    command = [sys.executable, str(HERE / "data.py"), "generate", "--task", "update", "--n", "3", "--seed", "4"]
    first, second = (subprocess.run(command, capture_output=True, check=True, text=True).stdout for _ in range(2))
    assert first == second
    assert set(json.loads(first.splitlines()[0])) >= {"text", "question", "answer", "facts", "ends"}


@pytest.mark.parametrize("relations", (ENGLISH, CHINESE))
def test_sentences_encode_as_the_whole_text_does(relations):
    encoder = Encoder(HERE / "tokenizer" / "tokenizer.json")
    for seed in range(20):
        # A value told again is a piece of its own for the encoder; in Chinese, without spaces, that parts words.
        r = record(random.Random(seed), "update", 5, 5, 2, relations, 0.0 if relations is CHINESE else 0.5)
        ids, weights, marks = encoder.encode(r)
        text = r.text() + "".join(f"<|user|>{q}<|assistant|>{'' if r.chinese else ' '}{a}<|end|>" for q, a in r.questions)
        assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert encoder.tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert len(ids) == len(weights) == len(marks)


def test_words_of_the_lists_are_tokens():
    encoder = Encoder(HERE / "tokenizer" / "tokenizer.json")
    for name in (*WORDS, "zh_person", "zh_city", "zh_thing", "zh_room"):
        for word in LISTS[name]:
            ids = encoder.ids(f"{word}住在{word}。" if name.startswith("zh_") else f" {word}")
            held = [encoder.tokenizer.decode([i]).strip() for i in ids]
            assert held.count(word) == (2 if name.startswith("zh_") else 1), (word, held)


@pytest.mark.parametrize("task", ("bare", "bare_update", "bare_query", "several", "own", "track", *TASKS))
def test_levels_draw_every_task(task):
    level = {"tasks": {task: 1.0}, "facts": [3, 7], "filler": [1, 1], "questions": 2, "terse": 0.5, "chinese": 0.5}
    for seed in range(20):
        r = trainer.draw_record(random.Random(seed), level)
        assert 2 <= sum(s.kind == "fact" for s in r.statements) <= 28
        text = r.text()
        for question, answer in r.questions:
            if task != "aggregation":
                assert all(word in text for word in answer.split(" and ")), (text, question, answer)


def test_several_values_are_asked_in_their_order():
    r = several(random.Random(3), 8, 2, 12)
    facts = [s.text.rstrip(".").split() for s in r.statements if s.kind == "fact"]
    for question, answer in r.questions:
        key = question.removeprefix("And ")
        assert answer.split(" and ") == [value for k, value in facts if k == key]
    assert any(" and " in answer for _, answer in r.questions)


def test_phases_follow_each_other_and_keep_to_themselves(tmp_path):
    toml = settings(tmp_path)
    head, _, levels = toml.read_text().partition("[[levels]]")
    phase = lambda steps, more: f"[[phases]]\nsteps = {steps}\n{more}\n[[phases.levels]]{levels}"
    toml.write_text(head.replace("gap_scale = 8", "gap_scale = 8\ncool = 0.0\nwarmup = 1")
                    + phase(2, "lr = 5e-4\n") + phase(2, ""))
    trainer.train("compressor", toml, stop=1)
    assert trainer.train("compressor", toml, stop=2)[-1]["lr"] == 5e-4
    again = trainer.train("compressor", toml, stop=4)
    assert again[-1]["lr"] == 1e-3 and again[-1]["phase"] == 1


def test_muon_moves_matrices_and_adamw_the_rest(tmp_path):
    toml = settings(tmp_path)
    toml.write_text(toml.read_text().replace("seed = 5", "seed = 5\nmuon = true"))
    trainer.train("compressor", toml, stop=1)
    adamw, muon = trainer.optimizers(Mneme.load(tmp_path / "out" / "compressor" / "export"),
                                     {"lr": 1e-3, "muon": True}, "compressor")
    assert type(muon).__name__ == "Muon" and type(adamw).__name__ == "AdamW"
    assert all(p.dim() == 2 and min(p.shape) >= 32 for g in muon.param_groups for p in g["params"])
    assert sum(len(g["params"]) for o in (adamw, muon) for g in o.param_groups) == len(
        list(Mneme.load(tmp_path / "out" / "compressor" / "export").parameters()))


@pytest.mark.parametrize("name", ("nodes-linear", "nodes-skip-compact", "nodes-qwen3"))
def test_reader_equals_the_batched_model(name):
    net = Mneme.load(FIXTURES / name)
    ids = torch.randint(0, 500, (1, 60), generator=torch.Generator().manual_seed(1))
    cut = torch.zeros(1, 60, dtype=torch.bool)
    cut[0, [9, 17, 40]] = True
    with torch.no_grad():
        want = net(ids, cut)[0]
        x = net.model.embed_tokens(ids)
        h = net.mem.trunk(x)
        r = net.mem.active(h, cut.long().cumsum(1) - cut.long())[0]
        reader, rows, a = Reader(net), [], 0
        for t in (9, 17, 40, 59):
            rows.append(reader.segment(x[0, a:t + 1], net.mem.embed(r[t:t + 1])[0] if cut[0, t] else x[0, :0]))
            a = t + 1
        got = F.linear(net.model.norm(torch.cat(rows)), net.model.embed_tokens.weight)
    assert (got - want).abs().max() < 1e-4


def test_wilson_interval_covers():
    low, high = wilson(50, 100)
    assert low < 0.5 < high and 0.4 < low and high < 0.6


def test_gist_arm_trains_and_exports_its_tokens(tmp_path):
    toml = settings(tmp_path)
    text = toml.read_text()
    head, tail = text.split("[memory]")
    tail = tail[tail.index("[train]"):]
    gist = [VOCAB, VOCAB + 1]
    memory = f'[memory]\nkind = "gist"\nposition = "keep"\n"node.slots" = 2\ngist_token_ids = {gist}\n'
    toml.write_text(head.replace(f"vocab_size = {VOCAB}", f"vocab_size = {VOCAB + 2}") + memory + tail)
    trainer.train("compressor", toml, stop=3)
    encoder = Encoder(tmp_path / "out" / "compressor" / "export" / "tokenizer.json")
    assert encoder.tokenizer.token_to_id("<|gist_1|>") == gist[1]
    batch = trainer.Batches({"seed": 1, "longest": 24}, encoder, gist).draw(
        0, 0, {"tasks": {"single": 1.0}, "facts": [3, 3], "filler": [2, 2]}, 1, "compressor")
    assert (batch[0] == gist[1]).sum() == 5 and not batch[3].any()


def test_pretrained_base_is_loaded_and_frozen(tmp_path):
    toml = settings(tmp_path)
    trainer.train("compressor", toml, stop=3)
    base = tmp_path / "out" / "compressor" / "export"
    run = toml.read_text().replace(str(tmp_path / "out"), str(tmp_path / "second"))
    toml.write_text(run.replace("seed = 5", f'seed = 6\nbase = "{base}"\nfreeze = ["model.*"]\ndistill = 0.5'))
    trainer.train("compressor", toml, stop=3)
    before, after = Mneme.load(base), Mneme.load(tmp_path / "second" / "compressor" / "export")
    changed = {n for (n, a), (_, b) in zip(before.named_parameters(), after.named_parameters()) if not torch.allclose(a, b)}
    assert changed and all(n.startswith("mem.") for n in changed)


def test_ahn_arm_learns_nothing_but_its_memory(tmp_path):
    toml = settings(tmp_path)
    head, tail = toml.read_text().split("[memory]")
    tail = tail[tail.index("[train]"):]
    toml.write_text(head + '[memory]\nkind = "full"\n' + tail)
    trainer.train("compressor", toml, stop=3)
    base = tmp_path / "out" / "compressor" / "export"
    head += 'sliding_window = 12\nnum_attn_sinks = 2\n_ahn_implementation = "GatedDeltaNet"\n'
    tail = tail.replace("[train]", f'[train]\nbase = "{base}"\nonly = ["*.ahn.*"]\ndistill = 1.0', 1)
    toml.write_text(head + '[memory]\nkind = "ahn"\n' + tail.replace(str(tmp_path / "out") + '"', str(tmp_path / "second") + '"'))
    trainer.train("compressor", toml, stop=3)
    before, after = Mneme.load(base), Mneme.load(tmp_path / "second" / "compressor" / "export")
    old = dict(before.named_parameters())
    for name, p in after.named_parameters():
        assert name not in old or torch.equal(p, old[name]), name
    assert any(p.abs().sum() > 0 for n, p in after.named_parameters() if n.endswith("ahn.fn.o_proj.weight"))


def test_reconstruction_counts_the_tokens_of_closed_segments(tmp_path):
    trainer.train("compressor", settings(tmp_path), stop=1)
    net = Mneme.load(tmp_path / "out" / "compressor" / "export")
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    cut = torch.zeros(2, 9, dtype=torch.bool)
    cut[0, 2] = cut[0, 6] = cut[1, 4] = True
    made = {}
    net(ids, cut, made=made)
    total = 0.0
    for i, (b, begin, end) in enumerate(((0, 0, 3), (0, 3, 7), (1, 0, 5))):
        y = net.model.norm(made["slots"][i].mean(0)) @ net.model.embed_tokens.weight.T
        total -= F.log_softmax(y, -1)[ids[b, begin:end]].mean() / 3
    assert net.reconstruct(ids, cut, made).item() == pytest.approx(total.item(), rel=1e-5)


def test_a_text_without_cuts_reads_as_full_attention():
    assert trainer.rule_cuts(random.Random(1), [0, 1] * 60, [False] * 120, "none", 24) == [False] * 120


def test_levels_may_be_those_of_another_experiment(tmp_path):
    (tmp_path / "a").mkdir()
    own = settings(tmp_path / "a")
    head, _, _ = own.read_text().partition("[[levels]]")
    other = tmp_path / "other.toml"
    other.write_text('levels = "a/run.toml"\n' + head.replace(str(tmp_path / "a" / "out"), str(tmp_path / "out")))
    assert trainer.train("compressor", other, stop=1)[-1]["loss"] == trainer.train("compressor", own, stop=1)[-1]["loss"]
