"""Train a compressor of contexts for a frozen decoder: the memory `concepts` (CompLLM, arXiv 2509.19228).

    python train/concepts.py train train/runs/concepts.toml
    python train/concepts.py score runs-out/concepts/export --facts 8 --filler 0,8,24

A segment of n <= S tokens and the first ceil(n / C) learned queries behind it run through the decoder with
low-rank additions; `ce_proj` of the queries' last hidden states are input embeddings that the bare decoder reads in
place of the segment. Additions, queries and `ce_proj` learn, from the answers and from the same decoder reading the
context itself.

OUT/{last.pt,curve.jsonl,curve.svg,export/,adapter/}: `export` is a whole checkpoint, `adapter` holds the `mem.*`
tensors alone. Every batch is a function of (seed, step), so a resumed run repeats the losses of an uninterrupted one.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
import tomllib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import ENGLISH, LISTS, Encoder, Record, record
from evaluate import wilson
from model import Mneme
from reference import sentence_cut, token_texts
from train import BUCKET, curriculum, draw_record, learning_rate, optimizers, plot

# Matrices of a layer that may have a low-rank addition: the name in a file and where the decoder has them.
TARGETS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj"}
CONTEXT = ("<|context|>", "<|/context|>")


class LowRank(nn.Module):
    """scale B (A x). B begins at zero, so that the compressor begins as the decoder."""

    def __init__(self, n_in, n_out, rank, scale):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False), scale
        nn.init.normal_(self.a.weight, std=1 / math.sqrt(n_in))
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.scale * self.b(self.a(x))


class Compressor(nn.Module):
    """Everything named `mem.*`."""

    def __init__(self, net, n_query, targets, rank, scale, bias):
        super().__init__()
        d = net.cfg["hidden_size"]
        self.query = nn.Module()
        self.query.weight = nn.Parameter(torch.randn(n_query, d))
        self.ce_proj = nn.Linear(d, d, bias=bias)
        self.lora = nn.ModuleList()
        for layer in net.model.layers:
            shapes = {name: layer.get_submodule(TARGETS[name]).weight.shape for name in targets}
            lows = {name: LowRank(n_in, n_out, rank, scale) for name, (n_out, n_in) in shapes.items()}
            self.lora.append(nn.ModuleDict(lows))

    @torch.no_grad()
    def begin(self, net):
        """Where training begins, once the decoder's weights are known: queries and outputs as large as embeddings of
        tokens. With a tied head a hidden state already points at the embedding of the token it predicts, so the
        identity is a map between the two that says something from the first step on."""
        size = net.model.embed_tokens.weight.pow(2).mean().sqrt()
        self.query.weight.normal_().mul_(size)
        nn.init.eye_(self.ce_proj.weight).mul_(size / net.model.norm.weight.pow(2).mean().sqrt())
        if self.ce_proj.bias is not None:
            self.ce_proj.bias.zero_()


class ConceptNet(Mneme):
    """A decoder, and the compressor of its contexts. `cfg["memory"]` holds the keys of the exported config."""

    def __init__(self, cfg, targets=tuple(TARGETS), rank=16, scale=1.0, bias=True, n_query=None):
        super().__init__(cfg)
        self.segment, self.ratio = self.m["concepts.segment"], self.m["concepts.ratio"]
        self.mem = Compressor(self, n_query or -(-self.segment // self.ratio), targets, rank, scale, bias)
        self.adapting = False
        for layer, lows in zip(self.model.layers, self.mem.lora):  # hooks, so that the decoder's names stay as they are
            for name, low in lows.items():
                add = lambda _, args, out, low=low: out + low(args[0]) if self.adapting else None
                layer.get_submodule(TARGETS[name]).register_forward_hook(add)

    def run(self, x, hidden=None):
        """Last residual rows [B, T, D] of input embeddings x [B, T, D] read causally from position 0; those after every
        layer are appended to `hidden`. Rows may be padded at their ends: nothing sees what is behind it."""
        T = x.shape[1]
        angle = torch.arange(T, device=x.device)[None, :, None].double() * self.inv_freq
        cos, sin = angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()[None, None]
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
            if hidden is not None:
                hidden.append(x)
        return x

    def logits(self, x):
        """Scores [n, V] of residual rows x [n, D]."""
        head = self.model.embed_tokens if self.cfg.get("tie_word_embeddings") else self.lm_head
        return F.linear(self.model.norm(x), head.weight).float()

    def compress(self, segments):
        """Embeddings [ceil(n_0 / C) + ceil(n_1 / C) + ..., D] of lists of tokens, all in one batch."""
        device = self.model.embed_tokens.weight.device
        slots = [-(-len(s) // self.ratio) for s in segments]
        T = max(len(s) + k for s, k in zip(segments, slots))
        x = self.model.embed_tokens(torch.tensor([[*s, *[0] * (T - len(s))] for s in segments], device=device))
        at = [(i, len(s) + j, j) for i, (s, k) in enumerate(zip(segments, slots)) for j in range(k)]
        i, t, j = torch.tensor(at, device=device).unbind(1)
        x = x.index_put((i, t), self.mem.query.weight[j].to(x.dtype))
        self.adapting = True
        try:
            h = self.run(x)[i, t]
        finally:
            self.adapting = False
        return self.mem.ce_proj(self.model.norm(h)).float()

    def read(self, plans, embeddings, first, hidden=None):
        """Last residual rows [B, T, D] of plans; `first` says where in `embeddings` those of a segment begin."""
        device = embeddings.device
        T = max(len(p.entries) for p in plans)
        ids = torch.tensor([[*p.entries, *[0] * (T - len(p.entries))] for p in plans], device=device)
        x = self.model.embed_tokens(ids.clamp(min=0))
        want = [first[s] + j for p in plans for s in p.segments for j in range(-(-len(s) // self.ratio))]
        if want:  # row by row, as nonzero finds them
            x = x.index_put((ids < 0).nonzero(as_tuple=True), embeddings[torch.tensor(want, device=device)].to(x.dtype))
        return self.run(x, hidden)

    def tensors(self):
        """As Mneme's, the factor of a low-rank addition in its `b`."""
        out = super().tensors()
        for i, lows in enumerate(self.mem.lora):
            for name, low in lows.items():
                out[f"mem.lora.{i}.{name}.b.weight"] = low.scale * low.b.weight.detach().float().cpu()
        return out

    @classmethod
    def load(cls, path):
        """From an exported folder, or a fixture."""
        from safetensors.torch import load_file

        path = Path(path)
        tensors = {k: v.float() for k, v in load_file(path / "model.safetensors").items()}
        halves = {k: v for k, v in tensors.items() if k.startswith("mem.lora.") and k.endswith(".a.weight")}
        lows = {k.split(".")[3]: len(v) for k, v in halves.items()}
        net = cls(json.loads((path / "config.json").read_text()), tuple(lows), max(lows.values(), default=0),
                  bias="mem.ce_proj.bias" in tensors, n_query=len(tensors["mem.query.weight"]))
        net.load_state_dict(tensors)
        return net


class Plan:
    """What enters the main sequence for a list of tokens: `entries` are tokens, and -1 for every embedding of the
    `segments` in their order; `answer[t]` is the entry whose scores answer token t, or -1."""

    def __init__(self, ids, context, segment, ratio, texts):
        self.entries, self.segments, self.answer = [], [], []
        inside, pending = False, []

        def close(n):
            self.segments.append(tuple(pending[:n]))
            self.entries += [-1] * -(-n // ratio)
            del pending[:n]

        for token in ids:
            answers = False
            if not inside and token == context[0]:
                inside = True
            elif not inside:
                self.entries.append(token)
                answers = True
            elif token == context[1]:
                inside = False
                if pending:
                    close(len(pending))
                    answers = True
            else:
                pending.append(token)
                if len(pending) > segment:
                    close(whole_sentences(pending, texts))
            self.answer.append(len(self.entries) - 1 if answers else -1)


def whole_sentences(pending, texts):
    """How many of the pending tokens, one more than a segment holds, become one: up to the last end of a sentence."""
    near = [None, *(texts[t] for t in pending)]
    ends = (n for n in range(len(pending) - 1, 0, -1) if sentence_cut(near[n - 1], near[n], near[n + 1]))
    return next(ends, len(pending) - 1)


def places(segments, ratio):
    """Where the embeddings of each different segment begin when they are made one after another."""
    first, n = {}, 0
    for s in segments:
        if s not in first:
            first[s] = n
            n += -(-len(s) // ratio)
    return first


class Texts:
    """Batches of records: documents as contexts, questions and answers as tokens."""

    def __init__(self, run, encoder, texts, net):
        self.run, self.encoder, self.texts, self.net = run, encoder, texts, net
        vocab = encoder.tokenizer.get_vocab(with_added_tokens=True)
        free = max(vocab.values()) + 1
        # Tokens of the base that are named, rows that pad its vocabulary, or two new ones. They never enter the
        # decoder: what opens a context must not occur elsewhere, what closes it not within one.
        names = run.get("context_tokens")
        self.context = tuple(vocab[name] for name in names) if names else (free, free + 1)
        self.pool = None

    def text(self, r):
        """(document, questions and answers, which of the latter's tokens are answers, which begin one)."""
        document, _, _ = self.encoder.encode(Record(r.statements, [], r.task, r.chinese))
        tail, weights, marks = self.encoder.encode(Record([], r.questions, r.task, r.chinese))
        return document, tail, [w >= 0.5 for w in weights], [m == 3 for m in marks]

    def plan(self, document, tail, segment=None):
        """A document in the place of a context, and what follows it."""
        ids = [self.context[0], *document, self.context[1], *tail]
        return Plan(ids, self.context, segment or self.net.segment, self.net.ratio, self.texts)

    def draw(self, step, level, n):
        """n texts of a step; those of BUCKET steps are drawn together and dealt out by length."""
        key = (step // BUCKET, id(level), n)
        if self.pool is None or self.pool[0] != key:
            rng = random.Random(f"{self.run['seed']}:concepts:{step // BUCKET}")
            found = (self.text(draw_record(rng, level)) for _ in range(n * BUCKET))
            found = sorted(found, key=lambda t: len(t[0]) + len(t[1]))
            order = list(range(BUCKET))
            rng.shuffle(order)
            self.pool = key, found, order
        _, found, order = self.pool
        return found[order[step % BUCKET] * n:][:n]


def loss_of(net, texts, batch, run, rng):
    """Loss and statistics of a batch under the weights `answers`, `logits`, `hidden` of `run`."""
    low, high = run.get("segments", (net.segment, net.segment))
    plans = [texts.plan(document, tail, rng.randint(low, high)) for document, tail, *_ in batch]
    first = places([s for p in plans for s in p.segments], net.ratio)
    mine, whole, device = [], [], net.inv_freq.device
    amp = torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.get("amp", False))
    with amp:
        e = net.compress(list(first))
        x = net.read(plans, e, first, mine)
    # Rows whose scores predict an answer's tokens, in the compressed reading (u) and in the whole one (v).
    where = [(b, len(p.entries) - len(tail) + i - 1, len(document) + i - 1, tail[i], starts[i])
             for b, (p, (document, tail, wanted, starts)) in enumerate(zip(plans, batch))
             for i in range(1, len(tail)) if wanted[i]]
    b, u, v, target, starts = torch.tensor(where, device=device).unbind(1)
    logits = net.logits(x[b, u])
    parts = {"answers": F.cross_entropy(logits, target)}
    stats = {"answer": (logits.detach().argmax(-1) == target)[starts > 0].float().mean().item()}
    if run.get("logits", 0.0) or run.get("hidden", 0.0):
        plain = [Plan([*document, *tail], (-1, -1), 1, 1, None) for document, tail, *_ in batch]
        with torch.no_grad(), amp:
            y = net.read(plain, e.detach(), {}, whole)
            teacher = net.logits(y[b, v])
        stats["teacher"] = (teacher.argmax(-1) == target)[starts > 0].float().mean().item()
        far = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(teacher, -1), log_target=True, reduction="none")
        parts["logits"] = far.sum(-1).mean()
    if run.get("hidden", 0.0):
        if run.get("hidden_rows", "answers") == "all":  # questions too: what they gather is what answers are found by
            where = [(k, len(p.entries) - len(tail) + i, len(document) + i)
                     for k, (p, (document, tail, *_)) in enumerate(zip(plans, batch)) for i in range(len(tail))]
            b, u, v = torch.tensor(where, device=device).unbind(1)
        far = [F.smooth_l1_loss(s[b, u].float(), t[b, v].float()) / t[b, v].float().std() for s, t in zip(mine, whole)]
        parts["hidden"] = torch.stack(far).mean()
    loss = sum(run.get(name, 0.0) * part for name, part in parts.items())
    return loss, {"loss": loss.item(), **stats, **{f"loss_{name}": part.item() for name, part in parts.items()}}


def base_of(folder):
    """config and tensors of a Hugging Face folder, its memory left out."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    config.pop("memory", None)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {k: v.float() for k, v in load_file(file).items() if not k.startswith("mem.")}
    return config, tensors


def export(net, base, out, context, whole=True):
    """A folder that `mneme convert` reads: the checkpoint with its compressor, or the compressor alone."""
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tensors = net.tensors() if whole else {k: t for k, t in net.tensors().items() if k.startswith("mem.")}
    config = {**net.cfg, "memory": {**net.m, "context_token_ids": list(context)}}
    config["vocab_size"] = max(net.cfg["vocab_size"], *(i + 1 for i in context))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:  # no room: two rows that nothing reads, of zeros, so that they score nothing either
            tensors[name] = F.pad(tensors[name], (0, 0, 0, config["vocab_size"] - len(tensors[name])))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    data = json.loads((base / "tokenizer.json").read_text())
    shape = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    known = {t["id"] for t in data["added_tokens"]}
    data["added_tokens"] += [{"id": i, "content": text, **shape} for i, text in zip(context, CONTEXT) if i not in known]
    (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False) + "\n")


def train(toml, stop=None, overrides=()):
    """A whole run, or as far as step `stop`; returns the rows of its curve."""
    settings = tomllib.loads(Path(toml).read_text())
    run = dict(settings["train"])
    for item in overrides:
        key, _, value = item.partition("=")
        run[key] = tomllib.loads(f"x = {value}")["x"]
    torch.set_num_threads(run.get("threads", 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, out = Path(run["base"]), Path(run["out"])
    config, tensors = base_of(base)
    torch.manual_seed(run["seed"])
    rank = run.get("rank", 16)
    config = {**config, "memory": {"kind": "concepts", **settings["memory"]}}
    scale = run.get("alpha", rank) / rank
    net = ConceptNet(config, run.get("targets", tuple(TARGETS)), rank, scale, run.get("bias", True))
    missing, unknown = net.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.startswith("mem.")]
    if unknown or missing:
        raise ValueError(f"{base}: unknown tensors {unknown[:4]}, missing {missing[:4]}")
    net.mem.begin(net)
    net.to(device)
    learners = optimizers(net, {**run, "only": ["mem.*"]}, "concepts")
    encoder = Encoder(base / "tokenizer.json", run.get("special_tokens"))
    texts = Texts(run, encoder, token_texts(base), net)
    out.mkdir(parents=True, exist_ok=True)
    done, last, curve, rows = 0, out / "last.pt", out / "curve.jsonl", []
    if last.exists():
        saved = torch.load(last, map_location="cpu", weights_only=False)
        net.mem.load_state_dict(saved["mem"])
        for learner, was in zip(learners, saved["optimizers"], strict=True):
            learner.load_state_dict(was)
        done = saved["step"]
    if curve.exists():
        rows = [r for r in map(json.loads, curve.read_text().splitlines()) if r["step"] <= done]
    curve.write_text("".join(json.dumps(r) + "\n" for r in rows))
    phases = curriculum(settings, run, Path(toml).resolve().parent)
    total, average, began = sum(phase["steps"] for phase in phases), {}, time.time()
    spent = rows[-1]["minutes"] if rows else 0.0
    for step in range(done, min(total, stop or total)):
        phase, began_at = 0, 0
        while step >= began_at + phases[phase]["steps"]:
            began_at += phases[phase]["steps"]
            phase += 1
        now = {**run, **{k: v for k, v in phases[phase].items() if k not in ("levels", "steps")}}
        rate = learning_rate(now, step - began_at, phases[phase]["steps"])
        for learner in learners:
            for g in learner.param_groups:
                g["lr"] = rate * g["scale"]
        levels = phases[phase]["levels"]
        pick = random.Random(f"{run['seed']}:level:{step // BUCKET}")
        level, = pick.choices(levels, [one.get("weight", 1.0) for one in levels])
        batch = texts.draw(step, level, level.get("batch", now["batch"]))
        loss, stats = loss_of(net, texts, batch, now, random.Random(f"{run['seed']}:segments:{step}"))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.mem.parameters(), now.get("clip", 1.0))
        for learner in learners:
            learner.step()
            learner.zero_grad(set_to_none=True)
        for k, v in stats.items():
            average[k] = average.get(k, v) * 0.9 + v * 0.1
        if (step + 1) % 20 == 0 or step + 1 in (total, stop):
            minutes = round(spent + (time.time() - began) / 60, 2)
            rows.append({"step": step + 1, "phase": phase, "minutes": minutes, "lr": rate,
                         "norm": round(float(norm), 3), "last_loss": stats["loss"],
                         **{k: round(v, 4) for k, v in average.items()}})
            with curve.open("a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
            print(" ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
        if (step + 1) % run.get("save_every", 100) == 0 or step + 1 in (total, stop):
            state = {"mem": net.mem.state_dict(), "optimizers": [o.state_dict() for o in learners], "step": step + 1}
            torch.save(state, out / "part.pt")
            os.replace(out / "part.pt", last)
            if len(rows) > 1:
                plot(rows, out / "curve.svg")
    export(net, base, out / "export", texts.context)
    export(net, base, out / "adapter", texts.context, whole=False)
    return rows


@torch.no_grad()
def score(net, texts, records, arm, group=16):
    """Right answers, questions, means of an arm: `compressed`, `whole` (the context as tokens), `blind` (no context).

    Right is an answer whose every token is the first choice, its end included. `among` is what guessing each
    word among the document's values of its list would give, `list` what guessing in the whole list would."""
    right = asked = tokens = entries = 0
    among, of_list = [], []
    for at in range(0, len(records), group):
        plans, targets = [], []
        for r in records[at:at + group]:
            document = texts.text(Record(r.statements, [], r.task, r.chinese))[0]
            values = {s.text[s.value[0]:s.value[1]] for s in r.statements if s.kind == "fact"}
            for question, answer in r.questions:
                _, tail, wanted, _ = texts.text(Record([], [(question, answer)], r.task, r.chinese))
                ids = [*document, *tail] if arm == "whole" else tail
                plan = texts.plan(document, tail) if arm == "compressed" else Plan(ids, (-1, -1), 1, 1, None)
                plans.append(plan)
                behind = len(plan.entries) - len(tail)
                targets.append([(behind + i - 1, tail[i]) for i in range(len(tail)) if wanted[i]])
                tokens += len(document)
                entries += behind
                words = answer.split(" and ")
                lists = [ws for name, ws in LISTS.items() if not name.startswith("f_")]
                kinds = [next((ws for ws in lists if w in ws), [w]) for w in words]
                among.append(math.prod(1 / max(1, len(values & set(kind))) for kind in kinds))
                of_list.append(math.prod(1 / len(kind) for kind in kinds))
        first = places([s for p in plans for s in p.segments], net.ratio)
        x = net.read(plans, net.compress(list(first)) if first else net.mem.query.weight, first)
        for b, want in enumerate(targets):
            place, token = torch.tensor(want).unbind(1)
            right += bool((net.logits(x[b, place]).argmax(-1) == token).all())
            asked += 1
    low, high = wilson(right, asked)
    return {"arm": arm, "right": right, "n": asked, "accuracy": right / asked, "low": low, "high": high,
            "tokens": tokens / asked, "entries": entries / asked,
            "among": sum(among) / asked, "list": sum(of_list) / asked}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    t = sub.add_parser("train")
    t.add_argument("toml")
    t.add_argument("--steps", type=int, help="stop after this step")
    t.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of [train]")
    s = sub.add_parser("score")
    s.add_argument("checkpoint", help="an exported folder, whole")
    s.add_argument("--task", default="single")
    s.add_argument("--facts", type=int, default=8)
    s.add_argument("--filler", default="0,8,24", help="sentences of filler, one row each")
    s.add_argument("--documents", type=int, default=64)
    s.add_argument("--questions", type=int, default=4)
    s.add_argument("--arms", default="whole,compressed,blind")
    s.add_argument("--segment", type=int, help="most tokens of a segment, instead of the checkpoint's")
    s.add_argument("--seed", type=int, default=990001)
    a = parser.parse_args()
    if a.command == "train":
        train(a.toml, a.steps, a.set)
        return
    torch.set_num_threads(1)
    net, path = ConceptNet.load(a.checkpoint).eval(), Path(a.checkpoint)
    net.segment = a.segment or net.segment
    texts = Texts({}, Encoder(path / "tokenizer.json"), token_texts(path), net)
    texts.context = tuple(net.m["context_token_ids"])
    for filler in map(int, a.filler.split(",")):
        records = [record(random.Random(f"eval:{a.seed}:{i}"), a.task, a.facts, filler, a.questions, ENGLISH)
                   for i in range(a.documents)]
        for arm in a.arms.split(","):
            row = score(net, texts, records, arm, max(1, 8192 // (40 + 10 * (a.facts + filler)) // a.questions))
            print(f"facts {a.facts} filler {filler} {arm:10}"
                  f" {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}"
                  f"  tokens {row['tokens']:.0f}  entries {row['entries']:.0f}"
                  f"  guess {row['among']:.3f} {row['list']:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
