"""Teach a trained compressor to hold words in roles that its language never gave them.

    python train/roles.py runs-out/default/joint/export runs-out/order/roles --steps 400

The nodes of a trained model are sums: on statements of the seven relations, whose keys and values come from different
lists, a node embedding is `constant of the template + Wk embedding(key) + Wv embedding(value)` to an R2 of 0.96. A word
that was only ever a key is not held so when it stands as a value: it overwrites the key (train/LOG.md). Here Wk and Wv
are fitted to the model's own nodes, and the compressor alone, without the decoder, learns to give their sum for the
statements of `own` and `track`; for everything else it keeps the nodes and the boundary probabilities that it had.
Writes OUT/last.pt, from where `train.py compressor` goes on with `init`.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from data import CHINESE, ENGLISH, LISTS, RECORDS, RELATIONS, Encoder, Record, filler, record, spread, statement
from model import Mneme
from train import rule_cuts

OWN, TRACK = RECORDS["own"], RECORDS["track"]
# Statement forms without roles yet: template, and which placeholders are key and value.
FORMS = {
    **{("own", i): (t, "owner", "thing") for i, t in enumerate(OWN["fact"])},
    ("own", "terse"): ("{owner} {thing}.", "owner", "thing"),
    **{("start", i): (t, "thing", "holder") for i, t in enumerate(TRACK["start"])},
    ("start", "terse"): ("{thing} {holder}.", "thing", "holder"),
    **{("step", i): (t, "thing", "next") for i, t in enumerate(TRACK["step"])},
}


class Nodes:
    """Node embeddings of single statements under a model, and words as vectors."""

    def __init__(self, net, encoder):
        self.net, self.encoder = net, encoder
        self.before = encoder.ids(" Bert lives in Rome.")

    def word(self, w):
        """The token embedding of a word, of length about 1."""
        return self.net.model.embed_tokens.weight.detach()[self.encoder.ids(" " + w)[0]] / 5.7

    @torch.no_grad()
    def of(self, texts):
        """[n, D]: each statement a segment of its own, the same sentence before it."""
        ids = [self.encoder.ids(" " + t) for t in texts]
        longest, n = max(map(len, ids)), len(self.before)
        x = self.net.model.embed_tokens(torch.tensor([self.before + i + [0] * (longest - len(i)) for i in ids]))
        segment = torch.zeros(x.shape[:2], dtype=torch.long)
        segment[:, n:] = 1
        r = self.net.mem.active(self.net.mem.trunk(x), segment)
        return self.net.mem.embed(r[range(len(ids)), [n + len(i) - 1 for i in ids]])[:, 0]


def fit(nodes, rng, n=260):
    """(Wk, Wv, R2): the linear parts of key and value in the nodes of the seven relations."""
    templates, rows = {}, []
    for name in ENGLISH:
        relation = RELATIONS[name]
        for _ in range(n):
            t = rng.choice(relation["fact"])
            key, value = rng.choice(LISTS[relation["key"]]), rng.choice(LISTS[relation["value"]])
            rows.append((templates.setdefault(t, len(templates)), key, value, t.format(key=key, value=value)))
    rng.shuffle(rows)
    e = nodes.of([r[3] for r in rows])
    one_hot = F.one_hot(torch.tensor([r[0] for r in rows]), len(templates)).float()
    x = torch.cat([one_hot] + [torch.stack([nodes.word(r[i]) for r in rows]) for i in (1, 2)], 1)
    solve = lambda x, y: torch.linalg.solve(x.T @ x + 0.3 * torch.eye(x.shape[1]), x.T @ y)
    half = len(rows) // 6
    w, means = solve(x[half:], e[half:]), solve(one_hot[half:], e[half:])
    left = e[:half] - x[:half] @ w
    r2 = 1 - left.square().sum() / (e[:half] - one_hot[:half] @ means).square().sum()
    d = e.shape[1]
    return w[-2 * d:-d], w[-d:], r2.item()


def constants(nodes, wk, wv, rng, n=120):
    """What each form of FORMS adds to the parts of its key and value: the mean over what the model makes of it now."""
    out = {}
    for form, (template, key, value) in FORMS.items():
        draws = [{"owner": rng.choice(LISTS["person"]), "thing": rng.choice(LISTS["thing"]),
                  "holder": rng.choice(LISTS["person"]), "next": rng.choice(LISTS["person"])} for _ in range(n)]
        parts = torch.stack([nodes.word(d[key]) @ wk + nodes.word(d[value]) @ wv for d in draws])
        out[form] = (nodes.of([template.format(**d) for d in draws]) - parts).mean(0)
    return out


def special(rng):
    """A record of own or track, and (form, key, value) of each of its facts in order."""
    n, facts, told = rng.randint(4, 10), [], []

    def tell(form, **words):
        template, key, value = FORMS[form]
        facts.append(statement(template, **{k: w for k, w in words.items() if "{" + k + "}" in template}))
        told.append((form, words[key], words[value]))

    if rng.random() < 0.5:
        people = rng.sample(LISTS["person"], max(2, n // 2))
        for thing in rng.sample(LISTS["thing"], n):
            tell(("own", "terse" if rng.random() < 0.25 else rng.randrange(len(OWN["fact"]))), owner=rng.choice(people), thing=thing)
    else:
        chains = []
        for thing in rng.sample(LISTS["thing"], max(1, n // 3)):
            path, bare = rng.sample(LISTS["person"], rng.randint(2, 4)), rng.random() < 0.25
            chains.append([(thing, a, b, bare) for a, b in zip([None, *path], path)])
        while any(chains):
            thing, giver, holder, bare = rng.choice([c for c in chains if c]).pop(0)
            if bare or giver is None:
                tell(("start", "terse" if bare else rng.randrange(len(TRACK["start"]))), thing=thing, holder=holder)
            else:
                tell(("step", rng.randrange(len(TRACK["step"]))), thing=thing, holder=giver, next=holder)
    return Record(spread(rng, facts, [filler(rng) for _ in range(rng.randint(0, 8))])), told


def draw(rng, encoder):
    """One text: (ids, cut, told or None)."""
    if rng.random() < 0.5:
        r, told = special(rng)
        mode = rng.choice(("facts", "facts", "sentence"))
    else:
        task, told = rng.choice(("repeat", "multi_key", "update", "single", "multi_query")), None
        chinese = task != "multi_key" and rng.random() < 0.12
        r = record(rng, task, rng.randint(4, 9), rng.randint(0, 8), 2, CHINESE if chinese else ENGLISH,
                   0.5 if task == "repeat" else 0.0, 0.15 if rng.random() < 0.3 else 0.0)
        mode = rng.choice(("facts", "facts", "sentence", "random", "thinned"))
    ids, _, marks = encoder.encode(r)
    cut = rule_cuts(rng, marks, [i == encoder.end for i in ids], mode, 256)
    if told is not None:
        told = dict(zip([t for t, mark in enumerate(marks) if mark == 1], told))
    return ids, cut, told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(1)
    train(a.checkpoint, a.out, a.steps, a.batch, a.lr, a.seed)


def train(checkpoint, out, steps, batch=24, lr=2e-3, seed=1):
    """Runs it; returns the mean squared errors of the last step: statements of FORMS, everything else."""
    elder, net = Mneme.load(checkpoint).requires_grad_(False), Mneme.load(checkpoint)
    encoder = Encoder(Path(checkpoint) / "tokenizer.json")
    rng = random.Random(f"roles:{seed}")
    nodes = Nodes(elder, encoder)
    wk, wv, r2 = fit(nodes, rng)
    print(f"nodes are sums to an R2 of {r2:.3f}", flush=True)
    base = constants(nodes, wk, wv, rng)
    learns = [p for n, p in net.named_parameters() if n.startswith("mem.") and not n.startswith("mem.decider")]
    optimizer = torch.optim.AdamW(learns, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 20) * (1 - 0.95 * max(0.0, 2 * step / steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        texts = [draw(rng, encoder) for _ in range(batch)]
        longest = max(len(ids) for ids, _, _ in texts)
        ids = torch.tensor([t[0] + [encoder.pad] * (longest - len(t[0])) for t in texts])
        cut = torch.tensor([t[1] + [False] * (longest - len(t[0])) for t in texts])
        segment = cut.long().cumsum(1) - cut.long()
        b, t = cut.nonzero(as_tuple=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = elder.model.embed_tokens(ids)
            h = elder.mem.trunk(x)
            p, want = elder.mem.decide(h), elder.mem.embed(elder.mem.active(h, segment)[b, t])[:, 0].float()
            h = net.mem.trunk(x)
            said, got = net.mem.decide(h), net.mem.embed(net.mem.active(h, segment)[b, t])[:, 0].float()
        taught = torch.zeros(len(b), dtype=torch.bool)
        for i, (row, at) in enumerate(zip(b.tolist(), t.tolist())):
            if texts[row][2] and at in texts[row][2]:
                form, key, value = texts[row][2][at]
                want[i], taught[i] = base[form] + nodes.word(key) @ wk + nodes.word(value) @ wv, True
        error = (got - want).square().mean(1)
        real = ids != encoder.pad
        drift = ((said - p).clamp(-6.0, 6.0).square() * real).sum() / real.sum()
        optimizer.zero_grad()
        (error.mean() / want.var(0).mean().detach() + 0.05 * drift).backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        if step % 25 == 24 or step + 1 == steps:
            print(f"step {step + 1} taught {error[taught].mean():.3f} kept {error[~taught].mean():.3f} of {want.var(0).mean():.1f}"
                  f" drift of the decider {drift:.4f}", flush=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save({"model": net.state_dict(), "state": {"level": 0}}, Path(out) / "last.pt")
    return error[taught].mean().item(), error[~taught].mean().item()


if __name__ == "__main__":
    main()
