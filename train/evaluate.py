"""Score an exported checkpoint on fresh records: arms side by side, with n and a 95 % interval.

    python train/evaluate.py CHECKPOINT --task single --facts 12 --filler 20 --n 512 --seed 990001
    python train/evaluate.py CHECKPOINT --facts 60 --filler 3000 --documents 4 --questions 25 --top-k 32

A question counts as right when every token of the answer is the model's first choice. `rate` is tokens per node slot,
`cells` the cells held when the question comes, as a share of the tokens read. Documents are read segment by segment
with closed segments forgotten, as the engine does, so length costs time and not memory.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from data import CHINESE, ENGLISH, TASKS, Encoder, record
from model import Mneme, rotate
from reference import splitmix64


class Reader:
    """Reads one document segment by segment, holding only what the memory holds (window 0)."""

    def __init__(self, net, top_k=0):
        self.net, self.top_k = net, top_k
        if net.m.get("window", 0) or net.m.get("sinks", 0):
            raise ValueError("the reader knows window 0 and no sinks only")
        self.kept = [None] * len(net.model.layers)  # per layer (k, v) [H, n, d] of the node cells
        self.position = 0

    def state(self):
        """What must be put back to ask another question of the same document."""
        return list(self.kept), self.position

    def restore(self, state):
        """The inverse of `state`."""
        self.kept, self.position = list(state[0]), state[1]

    def segment(self, x, slots, keep=True):
        """Run a segment's token embeddings x [n, D] and its slots [N_g, D] (empty if open); returns token rows [n, D]."""
        net, n, g = self.net, len(x), len(slots)
        e = torch.cat([x, slots])[None]
        compact = net.m.get("position", "keep") == "compact"
        slot_at = self.position if compact else self.position + n
        position = torch.cat([torch.arange(n) + self.position, torch.arange(g) + slot_at])
        angle = position[None, :, None].double() * net.inv_freq
        cos, sin = angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]
        own = torch.ones(n + g, n + g, dtype=torch.bool).tril()
        if net.m.get("node.sees") == "nodes":
            own[n:, :n] = False
        for i, layer in enumerate(net.model.layers):
            a = layer.self_attn
            h = layer.input_layernorm(e)
            q, k, v = (p(h).reshape(1, n + g, -1, layer.hd) for p in (a.q_proj, a.k_proj, a.v_proj))
            if hasattr(a, "q_norm"):
                q, k = a.q_norm(q), a.k_norm(k)
            q, k, v = (z[0].transpose(0, 1) for z in (rotate(q, cos, sin), rotate(k, cos, sin), v))
            group = layer.n_head // layer.n_kv
            score = q @ k.repeat_interleave(group, 0).transpose(1, 2)
            score = score.masked_fill(~own, float("-inf"))
            values = v
            if self.kept[i] is not None:
                past = q @ self.kept[i][0].repeat_interleave(group, 0).transpose(1, 2)
                if self.top_k and past.shape[-1] > self.top_k:
                    by_head = past.reshape(layer.n_kv, group, n + g, -1).sum(1)
                    worst = by_head.topk(self.top_k, -1).values[..., -1:]
                    past = past.masked_fill((by_head < worst).repeat_interleave(group, 0), float("-inf"))
                score = torch.cat([past, score], -1)
                values = torch.cat([self.kept[i][1], v], 1)
            o = torch.softmax(score / math.sqrt(layer.hd), -1) @ values.repeat_interleave(group, 0)
            e = e + a.o_proj(o.transpose(0, 1).reshape(1, n + g, -1))
            y = layer.post_attention_layernorm(e)
            e = e + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
            if g and keep:
                new = k[:, n:], v[:, n:]
                old = self.kept[i]
                self.kept[i] = new if old is None else tuple(torch.cat(z, 1) for z in zip(old, new))
        if g:
            self.position = slot_at + g
        return e[0, :n]


def choose_cuts(net, arm, p, marks, rng, settings):
    """Cut flags [T] of an arm: learned[@tau], sentence, facts, stride, random, none."""
    T = len(marks)
    if arm.startswith("learned"):
        tau = float(arm.partition("@")[2] or net.m["decider.threshold"])
        want = (p > tau).tolist()
    elif arm == "sentence":
        want = [m in (1, 2) for m in marks]
    elif arm == "facts":
        want = [m == 1 for m in marks]
    elif arm == "random":
        want = [splitmix64(rng.randrange(1 << 32), t) < settings["rate"] for t in range(T)]
    elif arm == "stride":
        want = [False] * T
    else:
        return [False] * T
    cut, length = [], 0
    longest = settings["stride"] if arm == "stride" else net.m["decider.max_segment"]
    for t in range(T):
        length += 1
        now = length >= longest or (want[t] and length >= net.m["decider.min_segment"])
        cut.append(now)
        length = 0 if now else length
    return cut


@torch.no_grad()
def score(net, encoder, documents, arm, settings, top_k=0, seed=0):
    """Right answers, questions and means of an arm over documents (records with questions)."""
    rng = random.Random(f"{seed}:{arm}")
    right = asked = tokens = nodes = 0
    spread = {1: [0, 0], 2: [0, 0]}  # tokens and cuts inside facts and filler
    for doc in documents:
        alone = type(doc)(doc.statements, [], doc.task, doc.chinese)
        ids, _, marks = encoder.encode(alone)
        x_doc = net.model.embed_tokens(torch.tensor(ids))
        reader, state, n_doc = Reader(net, top_k), None, len(ids)
        for question, answer in doc.questions:
            tail, _, tail_marks = encoder.encode(type(doc)([], [(question, answer)], doc.task, doc.chinese))
            x = torch.cat([x_doc, net.model.embed_tokens(torch.tensor(tail))])
            h = net.mem.trunk(x[None])
            p = torch.sigmoid(net.mem.decide(h))[0]
            if state is None:
                cut = choose_cuts(net, arm, p[:n_doc], marks, rng, settings)
                done = [t for t in range(n_doc - 1) if cut[t]]
                doc_cut = cut
                tokens += n_doc
                nodes += len(done)
                t0, kind = 0, []
                for t, m in enumerate(marks):
                    if m in spread:
                        spread[m][0] += t + 1 - t0
                        spread[m][1] += sum(cut[t0:t + 1])
                        t0 = t + 1
            tail_cut = [bool(c) for c in (p[n_doc:] > float("inf"))]
            if arm.startswith("learned"):
                tail_cut = choose_cuts(net, arm, p[n_doc:], tail_marks, rng, settings)
            cut = doc_cut + tail_cut
            cut[-1] = False
            ends = [t for t in range(len(cut)) if cut[t]]
            segment = torch.tensor([0] + cut[:-1]).cumsum(0)[None]
            if state is None:
                r = net.mem.active(h, segment)[0]
                starts = [0] + [t + 1 for t in done]
                for a, t in zip(starts, done):
                    reader.segment(x[a:t + 1], net.mem.embed(r[t:t + 1])[0])
                state, begin = reader.state(), starts[-1]
            reader.restore(state)
            r = net.mem.active(h[:, begin:], segment[:, begin:])[0]
            rows, a = [], begin
            for t in [t for t in ends if t >= begin] + [len(cut) - 1]:
                if a > t:
                    continue
                slots = net.mem.embed(r[t - begin:t - begin + 1])[0] if cut[t] else x[:0]
                rows.append(reader.segment(x[a:t + 1], slots))
                a = t + 1
            y = net.model.norm(torch.cat(rows))
            logits = F.linear(y, net.model.embed_tokens.weight)
            first = n_doc + tail_marks.index(3)
            want = torch.tensor(tail[first - n_doc:])
            got = logits[first - 1 - begin:-1].argmax(-1)
            right += bool((got == want).all())
            asked += 1
    out = {"arm": arm, "right": right, "n": asked, "accuracy": right / asked, "tokens": tokens / len(documents),
           "nodes": nodes / len(documents), "rate": tokens / max(1, nodes)}
    out["low"], out["high"] = wilson(right, asked)
    for mark, name in ((1, "rate_facts"), (2, "rate_filler")):
        out[name] = spread[mark][0] / max(1, spread[mark][1])
    return out


def wilson(right, n, z=1.96):
    """The 95 % Wilson interval of a share."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--task", choices=TASKS, default="single")
    parser.add_argument("--relations", choices=("english", "chinese"), default="english")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--filler", type=int, default=8)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--arms", default="learned,sentence,facts,stride,random")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int, default=990001)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    net = Mneme.load(a.checkpoint).eval()
    encoder = Encoder(Path(a.checkpoint) / "tokenizer.json")
    relations = {"english": ENGLISH, "chinese": CHINESE}[a.relations]
    documents = [record(random.Random(f"eval:{a.seed}:{i}"), a.task, a.facts, a.filler, a.questions, relations)
                 for i in range(a.documents)]
    settings = {"stride": 12, "rate": 1 / 12}
    for i, arm in enumerate(a.arms.split(",")):
        row = score(net, encoder, documents, arm, settings, a.top_k, a.seed)
        if i == 0 and arm.startswith("learned"):  # stride and random spend what the learned cuts spent
            settings = {"stride": max(2, round(row["rate"])), "rate": 1 / row["rate"]}
        if a.json:
            print(json.dumps(row), flush=True)
        else:
            print(f"{row['arm']:14} {row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] n {row['n']}  tokens {row['tokens']:.0f}"
                  f"  nodes {row['nodes']:.1f}  rate {row['rate']:.1f}  facts {row['rate_facts']:.1f}  filler {row['rate_filler']:.1f}", flush=True)


if __name__ == "__main__":
    main()
