"""Train a memory: one TOML per experiment, three stages, resumable.

    python train/train.py compressor train/runs/default.toml       stage 1: rule cuts, mixed per text
    python train/train.py decider    train/runs/default.toml       stage 2: cuts by reinforcement, the rest frozen
    python train/train.py joint      train/runs/default.toml       stage 3: the same with everything learning
    torchrun --nproc-per-node 8 train/train.py joint ...           several GPUs

Each stage writes OUT/<stage>/{last.pt,curve.jsonl,curve.svg,export/}; it goes on from last.pt if that exists and starts
from the stage named by `init` otherwise. Every batch is a function of (seed, step, rank), so a resumed run repeats the
losses of an uninterrupted one.
"""

import argparse
import fnmatch
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
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from data import CHINESE, ENGLISH, Encoder, bare, record, several
from model import Mneme

BUCKET = 4
CAN_BE_CHINESE = ("single", "repeat", "update", "multi_query", "bare", "bare_update", "bare_query")
FAMILIES = {"english": ENGLISH, "chinese": CHINESE}


def draw_record(rng, level):
    """A record of a curriculum level: a table of task weights and ranges."""
    tasks = level["tasks"]
    task = rng.choices(list(tasks), list(tasks.values()))[0]
    family = level.get("relations", "english")
    if rng.random() < level.get("chinese", 0.0) and task in CAN_BE_CHINESE:
        family = "chinese"
    relations = FAMILIES[family]
    facts, extra = (rng.randint(*level[k]) for k in ("facts", "filler"))
    questions, terse = level.get("questions", 4), level.get("terse", 0.0)
    if task.startswith("bare"):  # two lists drawn at random
        return record(rng, {"bare_update": "update", "bare_query": "multi_query"}.get(task, "single"), facts, extra, questions,
                      (bare(rng, family == "chinese"),), level.get("repeat", 1.0), 0.0)
    if task == "several":
        return several(rng, facts, extra, questions)
    if task in ("own", "track"):
        return record(rng, "single", facts, extra, questions, (task,), 1.0, level.get("terse", 0.5))
    return record(rng, "single" if task == "repeat" else task, facts, extra, questions, relations,
                  level.get("repeat", 1.0) if task != "single" else 0.0, terse)


def rule_cuts(rng, marks, end_ids, mode, longest):
    """Cuts of one text under a rule: `sentence`, `thinned` to 60 %, `facts` (ends of facts only), `random`, `stride`;
    never a segment above `longest`. After an answer a cut falls half of the time. `none` reads without any cut, so that
    the same weights can also serve a full or windowed cache."""
    if mode == "none":
        return [False] * len(marks)
    cut, length = [], 0
    stride = rng.randint(6, 24)
    turns = rng.random() < 0.5
    for mark, is_end in zip(marks, end_ids):
        length += 1
        if is_end:
            now = turns
        elif mode == "sentence":
            now = mark in (1, 2)
        elif mode == "thinned":
            now = mark in (1, 2) and rng.random() < 0.6
        elif mode == "facts":
            now = mark == 1
        elif mode == "random":
            now = rng.random() < 0.125
        else:
            now = length >= stride
        now = now or length >= longest
        cut.append(now)
        length = 0 if now else length
    return cut


class Batches:
    """Batches of a curriculum level as tensors."""

    def __init__(self, run, encoder, gist=()):
        self.run, self.encoder, self.gist = run, encoder, list(gist)
        self.pool = None

    def text(self, rng, level):
        """One text of a level: ((ids, weights, marks), cut)."""
        run = self.run
        rules = level.get("rules", run.get("rules", {"sentence": 0.4, "thinned": 0.25, "facts": 0.15, "random": 0.2}))
        ids, weights, marks = self.encoder.encode(draw_record(rng, level), run.get("weight_other", 0.03))
        mode = rng.choices(list(rules), list(rules.values()))[0]
        cut = rule_cuts(rng, marks, [i == self.encoder.end for i in ids], mode, run["longest"])
        if self.gist:
            out = [[], [], []]
            for i, w, m in zip(ids, weights, marks):
                extra = self.gist if m in (1, 2) else []
                out[0] += [i, *extra]
                out[1] += [w] + [0.0] * len(extra)
                out[2] += [m] + [0] * len(extra)
            ids, weights, marks = out
            cut = [False] * len(ids)
        return (ids, weights, marks), cut

    def draw(self, step, rank, level, n, stage, copies=1):
        """n texts (each `copies` times) as (ids, weights, marks, cut, gaps), all [B, T] but gaps [B, segments].

        The texts of BUCKET steps are drawn together and dealt out by length, so that little is padding."""
        run = self.run
        key = (step // BUCKET, rank, id(level), n, stage)
        if self.pool is None or self.pool[0] != key:
            rng = random.Random(f"{run['seed']}:{stage}:{step // BUCKET}:{rank}")
            texts = sorted((self.text(rng, level) for _ in range(n * BUCKET)), key=lambda text: len(text[0][0]))
            order = list(range(BUCKET))
            rng.shuffle(order)
            self.pool = key, texts, order
        _, texts, order = self.pool
        rng = random.Random(f"{run['seed']}:{stage}:gaps:{step}:{rank}")
        share = level.get("gap_share", run.get("gap_share", 0.75))
        rows, cuts = [], []
        for (ids, weights, marks), cut in texts[order[step % BUCKET] * n:][:n]:
            rows += [(ids, weights, marks)] * copies
            cuts += [cut] * copies
        T = max(len(r[0]) for r in rows)
        pad = lambda xs, fill: torch.tensor([list(x) + [fill] * (T - len(x)) for x in xs])
        ids, weights, marks = (pad([r[i] for r in rows], f) for i, f in ((0, self.encoder.pad), (1, 0.0), (2, 0)))
        cut = pad(cuts, False)
        gaps = torch.zeros(len(rows), int(cut.sum(1).max()) + 1 if copies == 1 else T + 1, dtype=torch.long)
        top = run.get("gap_scale", 0)
        if top:
            for b in range(0, len(rows), copies):
                if rng.random() < share:
                    scale = math.exp(rng.uniform(0, math.log(top)))
                    for s in range(gaps.shape[1]):
                        gaps[b:b + copies, s] = int(rng.uniform(0, scale))
        return ids, weights, marks, cut, gaps


def sample_cuts(logit, m, longest, generator):
    """Cuts drawn from p under min_segment and the smaller of `longest` and max_segment, and where the draw was free: both [B, T]."""
    p = torch.sigmoid(logit.detach())
    want = torch.rand(p.shape, generator=generator).to(p.device) < p
    cut, free = torch.zeros_like(want), torch.zeros_like(want)
    length = torch.zeros(len(p), dtype=torch.long, device=p.device)
    for t in range(p.shape[1]):
        length = length + 1
        forced, allowed = length >= min(longest, m["decider.max_segment"]), length >= m["decider.min_segment"]
        free[:, t] = allowed & ~forced
        cut[:, t] = forced | (want[:, t] & allowed)
        length = torch.where(cut[:, t], 0, length)
    return cut, free


class Step(nn.Module):
    """Loss of one batch for a stage; a module so that DDP can wrap it."""

    def __init__(self, model, run, stage):
        super().__init__()
        self.net, self.run, self.stage = model, run, stage

    def forward(self, batch, generator, copies, temperature=0.0, opened=False):
        """Loss and statistics; `copies` of each text stand next to each other, `temperature` weighs the entropy of cuts,
        `opened` reads everything (the warm-up of gist tokens)."""
        ids, weights, marks, cut, gaps = batch
        run, net = self.run, self.net
        stats, h, policy, imitate = {}, None, None, run.get("imitate", 0.0)
        amp = torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=run.get("amp", True))
        with amp:
            if self.stage != "compressor":
                h = net.mem.trunk(net.model.embed_tokens(ids))
                logit = net.mem.decide(h if self.stage == "joint" else h.detach())
                # One price per text: a node costs lambda e^z, and the decider's logit is shifted by as much, so that the
                # threshold tau stands for the price at inference.
                z = (torch.rand(len(ids) // copies, generator=generator).to(ids.device) * 2 - 1) * run.get("dial", 0.0)
                z = z.repeat_interleave(copies)
                logit = logit - z[:, None]
                cut, free = sample_cuts(logit, net.m, run["longest"], generator)
                real = (ids != self.run["pad"])
                cut, free = cut & real, free & real
                policy = logit, free
            elif imitate and net.m["kind"] == "nodes":
                h = net.mem.trunk(net.model.embed_tokens(ids))
                said = net.mem.decide(h.detach())
            # The answers all count; of the rest a share, at a weight that keeps its sum.
            share = run.get("share_other", 0.25)
            keep = (weights >= 0.5) | ((weights > 0) & (torch.rand(weights.shape, generator=generator).to(ids.device) < share))
            keep[:, 0] = False
            b, t = keep.nonzero(as_tuple=True)
            made = {} if run.get("reconstruct", 0.0) and net.m["kind"] == "nodes" and cut.any() else None
            logits = net(ids, cut if net.m["kind"] == "nodes" else None, gaps, (b, t - 1), h, opened, made)
        nll = F.cross_entropy(logits, ids[b, t], reduction="none")
        w = torch.where(weights[b, t] >= 0.5, weights[b, t], weights[b, t] / share)
        loss = (nll * w).sum() / weights.ge(0.5).sum().clamp(min=1)
        if policy is None and h is not None:  # the decider learns the rules' cuts, so that reinforcement begins near them
            real = (ids != run["pad"]) & cut.any(1, keepdim=True)
            miss = F.binary_cross_entropy_with_logits(said, cut.float(), reduction="none")
            loss = loss + imitate * (miss * real).sum() / real.sum().clamp(min=1)
        if made is not None:
            loss = loss + run["reconstruct"] * net.reconstruct(ids, cut, made)
        if run.get("distill", 0.0):  # towards the same model reading everything
            with torch.no_grad(), amp:
                teacher = net(ids, None, None, (b, t - 1), full=True)
            loss = loss + run["distill"] * F.kl_div(F.log_softmax(logits, -1), F.log_softmax(teacher, -1), log_target=True,
                                                    reduction="none").sum(-1).mean()
        hit = logits.detach().argmax(-1) == ids[b, t]
        first = marks[b, t] == 3
        if not first.any():  # a level without questions: values told again
            first = marks[b, t] == 4
        stats["loss"] = loss.item()
        stats["answer"] = hit[first].float().mean().item()
        stats["nodes"] = cut.float().sum(1).mean().item()
        if policy is not None:
            logit, free = policy
            good = weights[b, t] >= 0.5
            n = torch.zeros(len(ids), device=ids.device).index_add(0, b, good.float())
            reward = -torch.zeros(len(ids), device=ids.device).index_add(0, b, (nll.detach() * good).clamp(max=8.0)) / n.clamp(min=1)
            reward = reward - run["lambda"] * z.exp() * cut.float().sum(1)
            groups = reward.view(-1, copies)
            base = (groups.sum(1, keepdim=True) - groups) / (copies - 1)
            advantage = ((groups - base) / (groups.std(1, keepdim=True) + 0.1 * groups.std())).flatten()
            log_p = torch.where(cut, F.logsigmoid(logit), F.logsigmoid(-logit)) * free
            entropy = (F.softplus(logit) - logit * torch.sigmoid(logit)) * free
            length = ids.shape[1]
            loss = loss - (advantage * log_p.sum(1)).mean() * 8.0 / length - temperature * entropy.sum(1).mean() / length
            p = torch.sigmoid(logit.detach() + z[:, None])
            for name, mark in (("p_fact", 1), ("p_filler", 2)):
                stats[name] = p[marks == mark].mean().item()
            stats["p_middle"] = p[(marks == 0) & free].mean().item()
            stats["reward"] = reward.mean().item()
        return loss, stats


def optimizers(model, run, stage):
    """AdamW, and Muon for the matrices inside the model if `muon` is set: it learns the binding of key and value in a
    third of the steps (LOG.md). Learning rate by pattern, frozen patterns left out, vectors and embeddings do not decay."""
    frozen = list(run.get("freeze", []))
    groups = {}
    for name, p in model.named_parameters():
        free = not any(fnmatch.fnmatch(name, pattern) for pattern in frozen)
        if "only" in run:
            free = free and any(fnmatch.fnmatch(name, pattern) for pattern in run["only"])
        if stage == "decider":
            free = free and name.startswith("mem.decider")
        p.requires_grad_(free)
        if not free:
            continue
        scale = next((s for pattern, s in run.get("lr_scale", {}).items() if fnmatch.fnmatch(name, pattern)), 1.0)
        matrix = p.dim() > 1 and not any(part in name for part in ("embed", "lm_head"))
        muon = run.get("muon", False) and p.dim() == 2 and matrix and min(p.shape) >= 32
        groups.setdefault((muon, scale, run.get("weight_decay", 0.01) if matrix else 0.0), []).append(p)
    made = {True: [], False: []}
    for (muon, scale, decay), ps in groups.items():
        made[muon].append({"params": ps, "scale": scale, "weight_decay": decay})
    out = [torch.optim.AdamW(made[False], lr=run["lr"], betas=(0.9, 0.98))] if made[False] else []
    if made[True]:
        out.append(torch.optim.Muon(made[True], lr=run["lr"], adjust_lr_fn="match_rms_adamw"))
    return out


def curriculum(settings, run, here):
    """The phases of a stage: each has `steps`, `levels` (each with a `weight`), and keys that hold while it lasts.

    They are the stage's own or the experiment's `phases` or `levels`, or by a path those of another experiment."""
    for name in ("levels", "phases"):
        found = run.get(name)
        if found is None and "levels" not in run:
            found = settings.get(name)
        if isinstance(found, str):
            found = tomllib.loads((here / found).read_text())[name]
        if found:
            return found if name == "phases" else [{"levels": found, "steps": run["steps"]}]
    raise ValueError("no [[phases]] and no [[levels]]")


def learning_rate(run, step, steps):
    """Linear warm-up, constant, and linear to a twentieth over the last share `cool`, at a step of a phase."""
    warm, last = run.get("warmup", 30), int(steps * run.get("cool", 0.25))
    down = (step - (steps - last)) / max(1, last)
    return run["lr"] * min(1.0, (step + 1) / warm) * (1.0 - 0.95 * max(0.0, down))


def plot(rows, path):
    """The curve as an SVG: accuracy of answers, nodes per text and p by place against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in ("answer", "loss", "nodes", "p_fact") if n in rows[-1]]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3))
    for axis, name in zip(axes, names):
        for key in ([name] if name != "p_fact" else ["p_fact", "p_filler", "p_middle"]):
            axis.plot([r["step"] for r in rows], [r[key] for r in rows], label=key)
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def export(model, cfg, tokenizer, out, run):
    """A checkpoint directory as the fixtures are: what `mneme convert` reads."""
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.tensors(), out / "model.safetensors", {"format": "pt"})
    if cfg["memory"]["kind"] in ("full", "ahn"):  # known by their absence, and by the keys of published checkpoints
        cfg = {k: v for k, v in cfg.items() if k != "memory"}
    (out / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(tokenizer) / name).exists():
            shutil.copyfile(Path(tokenizer) / name, out / name)
    gist = model.m.get("gist_token_ids", [])
    if gist:  # the tokenizer has to know them
        data = json.loads((out / "tokenizer.json").read_text())
        for j, token in enumerate(gist):
            data["added_tokens"].append({**data["added_tokens"][-1], "id": token, "content": f"<|gist_{j}|>"})
        (out / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("compressor", "decider", "joint"))
    parser.add_argument("toml")
    parser.add_argument("--steps", type=int, help="stop after this step of the stage, for tests")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the stage")
    a = parser.parse_args()
    train(a.stage, a.toml, a.steps, a.set)


def train(stage, toml, stop=None, overrides=()):
    """Run a stage; returns the rows of its curve."""
    settings = tomllib.loads(Path(toml).read_text())
    run = {**settings["train"], **settings.get(stage, {})}
    for item in overrides:
        key, _, value = item.partition("=")
        run[key] = tomllib.loads(f"x = {value}")["x"]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        torch.set_num_threads(run.get("threads", 1))
    here = Path(toml).resolve().parent
    tokenizer = here / run["tokenizer"]
    encoder = Encoder(tokenizer / "tokenizer.json", run.get("special_tokens"))
    run["pad"] = encoder.pad
    cfg = {**settings["model"], "memory": {**settings["memory"], **run.get("memory", {})}, "eos_token_id": encoder.end, "bos_token_id": None}
    torch.manual_seed(run["seed"])
    model = Mneme(cfg)
    out = Path(run["out"]) / run.get("name", stage)
    out.mkdir(parents=True, exist_ok=True)
    learners = optimizers(model, run, stage)
    phases = curriculum(settings, run, here)
    total, stage_keys = sum(phase["steps"] for phase in phases), dict(run)
    state = {"step": 0}
    last = out / "last.pt"
    if last.exists():
        saved = torch.load(last, map_location="cpu", weights_only=False)
        model.load_state_dict(saved["model"])
        for learner, was in zip(learners, saved["optimizers"], strict=True):
            learner.load_state_dict(was)
        state = saved["state"]
    elif run.get("init"):
        saved = torch.load(Path(run["out"]) / run["init"] / "last.pt", map_location="cpu", weights_only=False)
        begin = saved["model"]
        if "memory" in run:  # a stage with a decider of another kind: that one begins anew
            begin = {k: v for k, v in begin.items() if not k.startswith("mem.decider.")}
            begin |= {k: v for k, v in model.state_dict().items() if k.startswith("mem.decider.")}
        model.load_state_dict(begin)
        if "decider_bias" in run:  # a decider that starts shy and undecided
            last_layer = model.mem.decider[-1] if model.mem.kind == "mlp" else model.mem.decider
            with torch.no_grad():
                last_layer.bias.fill_(run["decider_bias"])
                last_layer.weight.mul_(run.get("decider_shrink", 0.3))
    elif run.get("base"):  # a pretrained Hugging Face directory; mem.* stays as initialised
        from safetensors.torch import load_file

        missing = set(dict(model.named_parameters()))
        for file in sorted(Path(run["base"]).glob("*.safetensors")):
            found = {k: v.float() for k, v in load_file(file).items() if not k.startswith("mem.")}
            missing -= set(found)
            for name in ("model.embed_tokens.weight", "lm_head.weight"):  # tokens that the base does not know
                if name in found and len(found[name]) < cfg["vocab_size"]:
                    found[name] = torch.cat([found[name], model.state_dict()[name][len(found[name]):]])
            model.load_state_dict(found, strict=False)
        missing = sorted(n for n in missing if not n.startswith("mem.") and ".ahn." not in n)
        if missing:
            raise ValueError(f"{run['base']}: tensors missing: {missing[:4]}")
    model.to(device)
    step_module = Step(model, run, stage)
    if world > 1:
        step_module = nn.parallel.DistributedDataParallel(step_module, find_unused_parameters=True)
    batches = Batches(run, encoder, cfg["memory"].get("gist_token_ids", ()))
    rows, average, began = [], {}, time.time()
    curve = out / "curve.jsonl"
    if curve.exists():
        rows = [r for r in map(json.loads, curve.read_text().splitlines()) if r["step"] <= state["step"]]
    while state["step"] < min(total, stop or total):
        step, phase, began_at = state["step"], 0, 0
        while step >= began_at + phases[phase]["steps"]:
            began_at += phases[phase]["steps"]
            phase += 1
        levels = phases[phase]["levels"]
        run.clear()
        run.update(stage_keys, **{k: v for k, v in phases[phase].items() if k not in ("levels", "steps")})
        copies = run.get("copies", 1)
        rate = learning_rate(run, step - began_at, phases[phase]["steps"])
        for learner in learners:
            for g in learner.param_groups:
                g["lr"] = rate * g["scale"]
        cool = run.get("entropy_end", run.get("entropy", 0.0))
        temperature = run.get("entropy", 0.0) + (cool - run.get("entropy", 0.0)) * step / total
        generator = torch.Generator().manual_seed(hash((run["seed"], step, rank)) & 0x7FFFFFFF)
        pick = random.Random(f"{run['seed']}:level:{step // BUCKET}")
        level, = pick.choices(range(len(levels)), [one.get("weight", 1.0) for one in levels])
        for micro in range(run.get("accumulate", 1)):
            n = levels[level].get(f"batch_{stage}", run["batch"])
            batch = batches.draw(step * run.get("accumulate", 1) + micro, rank, levels[level], n, stage, copies)
            loss, stats = step_module([z.to(device) for z in batch], generator, copies, temperature,
                                      step < run.get("open", 0.0) * total)
            (loss / run.get("accumulate", 1)).backward()
        learnt = [p for learner in learners for g in learner.param_groups for p in g["params"]]
        norm = nn.utils.clip_grad_norm_(learnt, run.get("clip", 1.0))
        for learner in learners:
            learner.step()
            learner.zero_grad(set_to_none=True)
        state["step"] += 1
        for k, v in stats.items():
            if v == v:
                average[k] = average.get(k, v) * 0.9 + v * 0.1
        if rank == 0 and (state["step"] % 20 == 0 or state["step"] == stop):
            row = {"step": state["step"], "phase": phase, "minutes": round((time.time() - began) / 60, 2),
                   "lr": rate, "norm": round(float(norm), 3), "last_loss": stats["loss"], **{k: round(v, 4) for k, v in average.items()}}
            rows.append(row)
            with curve.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(" ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        if rank == 0 and (state["step"] % run.get("save_every", 100) == 0 or state["step"] in (total, stop)):
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in learners], "state": state},
                       out / "part.pt")
            os.replace(out / "part.pt", last)
            export(model, cfg, tokenizer, out / "export", run)
            if len(rows) > 1:
                plot(rows, out / "curve.svg")
    if world > 1:
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    sys.exit(main())
