"""The `nodes`, `gist` and `concepts` memories written down plainly, in F64, one entry at a time.

This file is the oracle of the engine and of the fast trainer: it follows memory.md sentence by sentence and is as
slow as that makes it. The ops at the top bear the names and the argument order of the scalar kernels; `forward` at the
bottom runs a whole token list and returns cuts, entries and the logits after every token.

Choices made where memory.md leaves room (the engine makes the same ones):

- A cut after token t takes effect when token t+1 arrives; a list that ends on a cut leaves it pending and no slots
  are made for it.
- `p` of the rules that are no probabilities (sentence, stride, random) is 0 or 1 and goes through the same rule as the
  learned one (min_segment, max_segment, p > tau), so the dials mean the same everywhere.
- stride: p_t = 1 when the open segment holds `decider.stride` tokens or more. random: p_t = 1 when u_t < `decider.rate`,
  where u_t is SplitMix64 of (`decider.seed`, t): a function of the position alone, so chunking cannot change it.
- cosine works on h (its matrices are [c, c]): p_t = (1 - cos(W_q h_{t-1}, W_k h_t)) / 2 and p_0 = 0.
- sentence looks at the bytes of one token, and at the next one where the terminator is the token's last byte. White
  space is ASCII. The text of a special token is its name.
- Sinks are the first `sinks` *entries*. In position mode `compact` a cut returns the counter to the position after the
  last sink of the segment that closes, so that a sink's position is never given twice.
- top_k ranks every node cell a query may see, a slot's own included; sinks, raw cells of the segment and the window
  are outside the ranking. A consolidated slot sees every node cell, unranked.
- Consolidation is repeated until the bound holds. It folds the oldest `fanin` nodes of the level that holds most nodes
  (ties: the lowest level), fewer where that level holds fewer; if it holds only one, the oldest nodes of any level.
  A child of level 0 or more contributes its own r; the new level is the highest of the children's plus one.
- concepts: a context is what lies between the two context tokens; neither they nor it enter. A segment is closed when
  one more token is pending than it may hold, behind its last whole sentence (behind all but that token where it has
  none), or by the end token. A segment of n tokens has the first ceil(n / ratio) queries behind it and is read alone,
  from position 0. `b` of a low-rank addition holds its factor. A context token answers with the scores of its last
  embedding where it closes the context, and with nothing (a row of zeros, `answers` 0) otherwise.
- gist: a run of gist tokens closes a segment; the next ordinary token opens one. With keep_bos the first entry is a
  sink if it is the bos token.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------- ops


def mul_mat(x, w):
    """x [n_tokens, n_cols] times w [n_rows, n_cols], transposed: [n_tokens, n_rows]."""
    return x @ w.T


def rms_norm(x, w, eps):
    """x [n, d] over its root mean square, times w [d]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rope(kind, x, n_head, head_dim, n_rot, pos, inv_freq, mscale):
    """x [n_tok, n_head, head_dim] rotated by pos [n_tok]; kind "norm" pairs (2i, 2i+1), "neox" pairs (i, i+n_rot/2)."""
    out = np.array(x, copy=True)
    half = n_rot // 2
    for t in range(x.shape[0]):
        for i in range(half):
            angle = float(pos[t]) * float(inv_freq[i])
            c, s = math.cos(angle) * mscale, math.sin(angle) * mscale
            a, b = (2 * i, 2 * i + 1) if kind == "norm" else (i, i + half)
            for h in range(n_head):
                u, v = x[t, h, a], x[t, h, b]
                out[t, h, a] = u * c - v * s
                out[t, h, b] = u * s + v * c
    return out


def silu(x):
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def softplus(x):
    """log(1 + exp(x)) without overflow."""
    return np.logaddexp(0.0, x)


def swiglu(gate, up):
    """silu(gate) * up."""
    return silu(gate) * up


def add(x, y):
    """x + y."""
    return x + y


def attend(n_head, scale, q, k, v, mask):
    """Soft-max attention by mask.

    q [n_q, n_head, dk], k [n_kv, n_head_kv, dk], v [n_kv, n_head_kv, dv]; mask [n_q, n_kv] or, for a ranking per kv
    head, [n_q, n_head_kv, n_kv]; True = seen. Returns [n_q, n_head, dv].
    """
    n_head_kv = k.shape[1]
    out = np.zeros((q.shape[0], n_head, v.shape[2]), q.dtype)
    for i in range(q.shape[0]):
        for h in range(n_head):
            hk = h // (n_head // n_head_kv)
            seen = mask[i] if mask.ndim == 2 else mask[i, hk]
            s = k[seen, hk] @ q[i, h] * scale
            s = np.exp(s - s.max())
            out[i, h] = (s / s.sum()) @ v[seen, hk]
    return out


def recur(rule, n_tokens, n_head, n_head_k, head_dim_k, head_dim_v, q, k, v, g, beta, resets, state):
    """The gated delta rule ("gated_delta"), the delta rule ("delta") or the Mamba2 recurrence ("ssd"), token by token.

    Shapes as in the kernel: q [n_tokens, n_head, dk], k and v [n_tokens, n_head_k, d], g and beta [n_tokens, n_head]
    (g unused by "delta"), resets ascending token positions before which the state starts from zero, state
    [n_head, dk, dv] indexed S[k, v]. Returns (out [n_tokens, n_head, dv], state).
    """
    s = np.array(state, copy=True)
    out = np.zeros((n_tokens, n_head, head_dim_v), q.dtype)
    for t in range(n_tokens):
        if t in resets:
            s[:] = 0.0
        for h in range(n_head):
            hk = h // (n_head // n_head_k)
            qt, kt, vt = q[t, h], k[t, hk], v[t, hk]
            if rule == "ssd":
                qt = qt / max(math.sqrt(float(qt @ qt)), 1e-12)
                kt = kt / max(math.sqrt(float(kt @ kt)), 1e-12)
                s[h] = math.exp(g[t, h]) * s[h] + beta[t, h] * np.outer(kt, vt)
            else:
                qt = qt / math.sqrt(float(qt @ qt) + 1e-6) / math.sqrt(head_dim_k)
                kt = kt / math.sqrt(float(kt @ kt) + 1e-6)
                if rule == "gated_delta":
                    s[h] = math.exp(g[t, h]) * s[h]
                e = beta[t, h] * (vt - kt @ s[h])
                s[h] = s[h] + np.outer(kt, e)
            out[t, h] = qt @ s[h]
    return out, s


# ---------------------------------------------------------------- configuration


@dataclass
class Memory:
    """The "memory" object of config.json: GGUF key suffixes of memory.md section 5, defaults filled in."""

    kind: str = "nodes"
    sinks: int = 0
    window: int = 0
    reset: str = "cut"
    position: str = "keep"
    slots: int = 1
    sees: str = "segment"
    top_k: int = 0
    node_max: int = 0
    fanin: int = 4
    decider: str = "linear"
    threshold: float = 0.5
    min_segment: int = 1
    max_segment: int = 64
    stride: int = 16
    rate: float = 0.0625
    seed: int = 0
    block_count: int = 1
    embedding_length: int = 32
    head_count: int = 2
    feed_forward_length: int = 64
    conv_kernel: int = 4
    gist_token_ids: tuple = ()
    keep_bos: bool = True
    context_token_ids: tuple = ()
    concept_segment: int = 20
    concept_ratio: int = 2

    KEYS = {
        "kind": "kind", "sinks": "sinks", "window": "window", "reset": "reset", "position": "position",
        "node.slots": "slots", "node.sees": "sees", "node.top_k": "top_k", "node.max": "node_max",
        "node.fanin": "fanin", "decider.type": "decider", "decider.threshold": "threshold",
        "decider.min_segment": "min_segment", "decider.max_segment": "max_segment", "decider.stride": "stride",
        "decider.rate": "rate", "decider.seed": "seed", "compressor.block_count": "block_count",
        "compressor.embedding_length": "embedding_length", "compressor.head_count": "head_count",
        "compressor.feed_forward_length": "feed_forward_length", "compressor.conv_kernel": "conv_kernel",
        "gist_token_ids": "gist_token_ids", "gist.keep_bos": "keep_bos",
        "context_token_ids": "context_token_ids", "concepts.segment": "concept_segment", "concepts.ratio": "concept_ratio",
    }

    @classmethod
    def of(cls, values):
        """From the dotted keys of config.json; an unknown key is an error."""
        unknown = set(values) - set(cls.KEYS)
        if unknown:
            raise ValueError(f"unknown memory keys: {sorted(unknown)}")
        return cls(**{cls.KEYS[k]: v for k, v in values.items()})


def rope_inv_freq(config, head_dim):
    """Inverse frequencies [head_dim/2] in F64, with Llama-3 scaling where the config asks for it."""
    base = float(config.get("rope_theta", 10000.0))
    inv = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.get("rope_scaling")
    if not scaling:
        return inv
    if scaling.get("rope_type") != "llama3":
        raise ValueError(f"rope_scaling type {scaling.get('rope_type')!r} is not known here")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    old = scaling["original_max_position_embeddings"]
    out = []
    for f in inv:
        wave = 2 * math.pi / f
        if wave < old / high:
            out.append(f)
        elif wave > old / low:
            out.append(f / factor)
        else:
            smooth = (old / wave - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return np.array(out)


# ---------------------------------------------------------------- compressor, decider, active memory


def _delta_block(w, prefix, y, memory, resets, state):
    """One gated delta recurrence over y [n, c] with the tensors `prefix.*`; conv and silu if `prefix.conv` exists.

    Returns (gated read [n, c], state).
    """
    n, c = y.shape
    n_head = memory.head_count
    hd = c // n_head
    qkv = mul_mat(y, w[f"{prefix}.qkv.weight"])
    conv = w.get(f"{prefix}.conv.weight")
    if conv is not None:
        taps = conv.shape[1]
        padded = np.concatenate([np.zeros((taps - 1, 3 * c)), qkv])
        qkv = silu(sum(padded[i:i + n] * conv[:, i] for i in range(taps)))
    q, k, v = (part.reshape(n, n_head, hd) for part in np.split(qkv, 3, axis=1))
    beta = sigmoid(mul_mat(y, w[f"{prefix}.beta.weight"]))
    g = w[f"{prefix}.a"] * softplus(mul_mat(y, w[f"{prefix}.alpha.weight"]) + w[f"{prefix}.dt.bias"])
    o, state = recur("gated_delta", n, n_head, n_head, hd, hd, q, k, v, g, beta, resets, state)
    read = rms_norm(o, w[f"{prefix}.head_norm.weight"], 1e-6).reshape(n, c)
    return read * silu(mul_mat(y, w[f"{prefix}.gate.weight"])), state


def trunk(w, memory, x):
    """h [n, c] of token embeddings x [n, D] (memory.md 1.2)."""
    eps = 1e-6
    u = mul_mat(rms_norm(x, w["mem.in_norm.weight"], eps), w["mem.in.weight"])
    n_head = memory.head_count
    hd = u.shape[1] // n_head
    for b in range(memory.block_count):
        p = f"mem.blk.{b}"
        y = rms_norm(u, w[f"{p}.norm.weight"], eps)
        read, _ = _delta_block(w, p, y, memory, [], np.zeros((n_head, hd, hd)))
        u = add(u, mul_mat(read, w[f"{p}.out.weight"]))
        y = rms_norm(u, w[f"{p}.ffn_norm.weight"], eps)
        ffn = swiglu(mul_mat(y, w[f"{p}.ffn_gate.weight"]), mul_mat(y, w[f"{p}.ffn_up.weight"]))
        u = add(u, mul_mat(ffn, w[f"{p}.ffn_down.weight"]))
    return rms_norm(u, w["mem.out_norm.weight"], eps)


def splitmix64(seed, t):
    """The t-th output of SplitMix64 as a number in [0, 1)."""
    mask = (1 << 64) - 1
    z = (seed + (t + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


WS = b" \t\n\r\x0b\x0c"
STOP = (b".", b"?", b"!")
FULL_STOP = tuple(s.encode() for s in "。？！")


def ends_ws(s):
    """The token's bytes close a sentence by themselves."""
    body = s.rstrip(WS)
    tail = s[len(body):]
    return (body.endswith(STOP) and bool(tail)) or body.endswith(FULL_STOP) or b"\n\n" in tail


def sentence_cut(before, s, after):
    """Whether a sentence ends with token bytes s, given the bytes of its neighbours (None at the ends of the text)."""
    if ends_ws(s):
        return True
    if s.endswith(STOP) and after is not None and after[:1] in WS:  # white space, or nothing: a control token
        return True
    if s and before is not None and not s.strip(WS):
        tail = before[len(before.rstrip(WS)):]
        return b"\n\n" not in tail and tail.endswith(b"\n") and s.startswith(b"\n")
    return False


def probabilities(w, memory, h, texts):
    """p [n] for every rule that looks at tokens only (stride needs the segment and is done in `cuts`)."""
    n = len(texts) if h is None else h.shape[0]
    kind = memory.decider
    if kind == "linear":
        return sigmoid(mul_mat(h, w["mem.decider.weight"]) + w["mem.decider.bias"])[:, 0]
    if kind == "mlp":
        z = silu(mul_mat(h, w["mem.decider.0.weight"]) + w["mem.decider.0.bias"])
        return sigmoid(mul_mat(z, w["mem.decider.1.weight"]) + w["mem.decider.1.bias"])[:, 0]
    if kind == "cosine":
        q, k = mul_mat(h, w["mem.decider.q.weight"]), mul_mat(h, w["mem.decider.k.weight"])
        p = np.zeros(n)
        for t in range(1, n):
            norms = max(np.linalg.norm(q[t - 1]), 1e-12) * max(np.linalg.norm(k[t]), 1e-12)
            p[t] = (1.0 - q[t - 1] @ k[t] / norms) / 2.0
        return p
    if kind == "sentence":
        near = [None, *texts, None]
        return np.array([float(sentence_cut(near[t], near[t + 1], near[t + 2])) for t in range(n)])
    if kind == "random":
        return np.array([float(splitmix64(memory.seed, t) < memory.rate) for t in range(n)])
    if kind == "stride":
        return np.zeros(n)
    raise ValueError(f"decider.type {kind!r} is not known here")


def cuts(memory, p):
    """Token indices after which a segment closes (memory.md 1.3), one after the last token included; p is completed
    in place for stride."""
    out, length = [], 0
    for t in range(len(p)):
        length += 1
        if memory.decider == "stride":
            p[t] = float(length >= memory.stride)
        if length >= memory.max_segment or (length >= memory.min_segment and p[t] > memory.threshold):
            out.append(t)
            length = 0
    return out


# ---------------------------------------------------------------- the model


@dataclass
class Cell:
    """One entry of the main sequence and its keys and values in every layer."""

    kind: int  # 0 token, 1 slot of a cut, 2 slot of a consolidated node
    pos: int
    segment: int
    n_before: int  # raw tokens before this entry
    sink: bool
    freed: bool = False
    k: list = field(default_factory=list)
    v: list = field(default_factory=list)


@dataclass
class Node:
    """What a segment, or a run of nodes, left behind."""

    level: int
    start: int
    end: int
    r: np.ndarray
    cells: list


class Model:
    """A Hugging Face checkpoint directory (qwen2, qwen3 or llama) with `mem.*` tensors, in F64."""

    def __init__(self, config, tensors, token_texts=None):
        self.config = config
        self.memory = Memory.of(config["memory"])
        self.w = {name: np.asarray(t, dtype=np.float64) for name, t in tensors.items()}
        self.texts = token_texts
        self.n_head = config["num_attention_heads"]
        self.n_head_kv = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.n_head
        self.inv_freq = rope_inv_freq(config, self.head_dim)
        self.eps = config["rms_norm_eps"]
        self.embd = self.w["model.embed_tokens.weight"]
        self.output = self.w.get("lm_head.weight", self.embd)
        self.adapted = False

    @classmethod
    def load(cls, path):
        """Read config.json, model.safetensors (F32) and the token texts of tokenizer.json."""
        from safetensors.numpy import load_file

        path = Path(path)
        config = json.loads((path / "config.json").read_text())
        return cls(config, load_file(path / "model.safetensors"), token_texts(path))

    def _project(self, i, name, gguf_name, x):
        """x [n, n_in] times a matrix of layer i, with its low-rank addition while a segment is compressed."""
        z = mul_mat(x, self.w[f"model.layers.{i}.{name}.weight"])
        a = self.w.get(f"mem.lora.{i}.{gguf_name}.a.weight") if self.adapted else None
        return z if a is None else add(z, mul_mat(mul_mat(x, a), self.w[f"mem.lora.{i}.{gguf_name}.b.weight"]))

    def _layer(self, i, cell, x, cells):
        """Decoder layer i for one entry; cells are those that may be seen, the entry's own the last of them."""
        w, p = self.w, f"model.layers.{i}"
        h = rms_norm(x[None], w[f"{p}.input_layernorm.weight"], self.eps)
        qkv = []
        for name, n in (("q", self.n_head), ("k", self.n_head_kv), ("v", self.n_head_kv)):
            z = self._project(i, f"self_attn.{name}_proj", f"attn_{name}", h)
            bias = w.get(f"{p}.self_attn.{name}_proj.bias")
            z = (z if bias is None else add(z, bias)).reshape(1, n, self.head_dim)
            norm = w.get(f"{p}.self_attn.{name}_norm.weight") if name != "v" else None
            if norm is not None:
                z = rms_norm(z, norm, self.eps)
            if name != "v":
                z = rope("neox", z, n, self.head_dim, self.head_dim, [cell.pos], self.inv_freq, 1.0)
            qkv.append(z)
        q, k, v = qkv
        cell.k.append(k[0])
        cell.v.append(v[0])
        keys, values = (np.stack([getattr(c, a)[i] for c in cells]) for a in "kv")
        mask = self._ranked(cell, cells, q[0], keys)
        o = attend(self.n_head, 1.0 / math.sqrt(self.head_dim), q, keys, values, mask[None])
        x = add(x, self._project(i, "self_attn.o_proj", "attn_output", o.reshape(1, -1))[0])
        h = rms_norm(x[None], w[f"{p}.post_attention_layernorm.weight"], self.eps)
        ffn = swiglu(self._project(i, "mlp.gate_proj", "ffn_gate", h), self._project(i, "mlp.up_proj", "ffn_up", h))
        return add(x, self._project(i, "mlp.down_proj", "ffn_down", ffn)[0])

    def _ranked(self, cell, cells, q, keys):
        """Mask [n_head_kv, n] over the visible cells: all of them, or with top_k the best node cells per kv head.

        Notes the smallest gap between a kept and a dropped score, so that fixtures can avoid near-ties.
        """
        mask = np.ones((self.n_head_kv, len(cells)), bool)
        top_k = self.memory.top_k
        if not top_k or cell.kind == 2:
            return mask
        nodes = [j for j, c in enumerate(cells) if c.kind > 0 and not c.sink]
        group = self.n_head // self.n_head_kv
        for h in range(self.n_head_kv):
            score = keys[:, h] @ q[h * group:(h + 1) * group].sum(axis=0)
            order = sorted(nodes, key=lambda j: -score[j])  # stable: ties stay with the older cell
            if len(order) > top_k:
                self.rank_gap = min(self.rank_gap, score[order[top_k - 1]] - score[order[top_k]])
                mask[h, order[top_k:]] = False
        return mask

    def _entry(self, cell, x, cells):
        """Run one entry through all layers; cells without the entry itself. Returns the last residual row."""
        visible = [c for c in cells if not c.freed and self._sees(cell, c)] + [cell]
        for i in range(self.config["num_hidden_layers"]):
            x = self._layer(i, cell, x, visible)
        return x

    def _sees(self, a, b):
        """Whether entry a sees the earlier entry b (memory.md 1.5)."""
        m = self.memory
        if b.sink or b.kind > 0:
            return True
        if a.kind == 2 or (a.kind == 1 and m.sees == "nodes"):
            return False
        return b.segment == a.segment or a.n_before - b.n_before <= m.window

    def forward(self, ids):
        """One pass over the token list. Returns a dict of arrays: see train/README.md for names and shapes."""
        forward = {"gist": self._forward_gist, "nodes": self._forward_nodes, "concepts": self._forward_concepts}
        return forward[self.memory.kind](ids)

    def _logits(self, x):
        return mul_mat(rms_norm(x[None], self.w["model.norm.weight"], self.eps), self.output)[0]

    def _forward_gist(self, ids):
        m = self.memory
        sinks = m.sinks
        if m.keep_bos and len(ids) and ids[0] == self.config.get("bos_token_id"):
            sinks = max(sinks, 1)
        cells, logits, cut, segment, n_raw = [], [], [], 0, 0
        self.rank_gap = math.inf
        for t, token in enumerate(ids):
            kind = int(token in m.gist_token_ids)
            if cells and kind == 0 and cells[-1].kind == 1:
                segment += 1
            if cells and kind == 1 and cells[-1].kind == 0:
                cut.append(t - 1)
            cell = Cell(kind, t, segment, n_raw, t < sinks)
            n_raw += kind == 0
            logits.append(self._logits(self._entry(cell, self.embd[token], cells)))
            cells.append(cell)
        return {
            "logits": np.array(logits), "cuts": np.array(cut, np.int64),
            "entry_pos": np.array([c.pos for c in cells], np.int64),
            "entry_kind": np.array([c.kind for c in cells], np.int64),
        }

    def _compress(self, tokens):
        """Embeddings [ceil(n / ratio), D] of a segment, from nothing but its tokens."""
        n_slots = -(-len(tokens) // self.memory.concept_ratio)
        rows = [*(self.embd[t] for t in tokens), *self.w["mem.query.weight"][:n_slots]]
        self.adapted = True
        cells, hidden = [], []
        for pos, x in enumerate(rows):
            cell = Cell(1, pos, 0, 0, False)
            hidden.append(self._entry(cell, x, cells))
            cells.append(cell)
        self.adapted = False
        h = rms_norm(np.array(hidden[len(tokens):]), self.w["model.norm.weight"], self.eps)
        e = mul_mat(h, self.w["mem.ce_proj.weight"])
        bias = self.w.get("mem.ce_proj.bias")
        return e if bias is None else add(e, bias)

    def _whole_sentences(self, pending):
        """How many of the pending tokens, one more than a segment holds, become a segment."""
        for n in range(len(pending) - 1, 0, -1):
            texts = [self.texts[t] for t in pending]
            if sentence_cut(texts[n - 2] if n > 1 else None, texts[n - 1], texts[n]):
                return n
        return len(pending) - 1

    def _forward_concepts(self, ids):
        begin, end = self.memory.context_token_ids
        cells, logits, answers, segments, embeddings = [], [], [], [], []
        inside, pending = False, []
        self.rank_gap = math.inf

        def enter(x):
            cell = Cell(0, len(cells), 0, len(cells), False)
            out = self._logits(self._entry(cell, x, cells))
            cells.append(cell)
            return out

        def close(n, after):
            e = self._compress(pending[:n])
            segments.append((after - len(pending), after - len(pending) + n))
            embeddings.extend(e)
            del pending[:n]
            return [enter(x) for x in e][-1]

        for t, token in enumerate(ids):
            answer = None
            if not inside and token == begin:
                inside = True
            elif not inside:
                answer = enter(self.embd[token])
            elif token == end:
                inside = False
                if pending:
                    answer = close(len(pending), t)
            else:
                pending.append(token)
                if len(pending) > self.memory.concept_segment:
                    close(self._whole_sentences(pending), t + 1)
            answers.append(int(answer is not None))
            logits.append(np.zeros(len(self.output)) if answer is None else answer)
        return {
            "logits": np.array(logits), "answers": np.array(answers, np.int64),
            "segments": np.array(segments, np.int64).reshape(-1, 2), "slot_embd": np.array(embeddings),
            "cuts": np.array([b - 1 for _, b in segments], np.int64),
        }

    def _forward_nodes(self, ids):
        m, w = self.memory, self.w
        if m.position == "compact" and m.window:
            raise ValueError(f"position compact needs window 0, got {m.window}")
        x = self.embd[np.asarray(ids)]
        h = trunk(w, m, x)
        p = probabilities(w, m, h, [self.texts[i] for i in ids] if m.decider == "sentence" else None)
        cut = cuts(m, p)
        pending = bool(cut) and cut[-1] == len(ids) - 1
        cut = cut[:-1] if pending else cut
        hd = m.embedding_length // m.head_count
        resets = [t + 1 for t in cut] if m.reset == "cut" else []
        r, _ = _delta_block(w, "mem.active", h, m, resets, np.zeros((m.head_count, hd, hd)))

        self.rank_gap = math.inf
        cells, nodes, logits, embeddings, spans = [], [], [], [], []
        stream = []  # every entry in the order it ran
        pos, start, segment, first_pos = 0, 0, 0, 0
        for t, _ in enumerate(ids):
            cell = Cell(0, pos, segment, t, len(stream) < m.sinks)
            pos += 1
            logits.append(self._logits(self._entry(cell, x[t], cells)))
            cells.append(cell)
            stream.append(cell)
            if t not in cut:
                continue
            if m.position == "compact":
                pos = first_pos + sum(c.sink for c in cells if c.segment == segment)
            node = Node(0, start, t + 1, r[t], [])
            for e in self._slots(r[t]):
                slot = Cell(1, pos, segment, t + 1, len(stream) < m.sinks)
                pos += 1
                self._entry(slot, e, cells)
                cells.append(slot)
                stream.append(slot)
                node.cells.append(slot)
                embeddings.append(e)
            nodes.append(node)
            start, segment, first_pos = t + 1, segment + 1, pos
            while m.node_max and sum(len(n.cells) for n in nodes) > m.node_max and len(nodes) > 1:
                self._consolidate(nodes, cells, stream, embeddings, t + 1)
            spans.append([(n.level, n.start, n.end) for n in nodes])
        return {
            "logits": np.array(logits), "cuts": np.array(cut, np.int64), "p": p, "pending": pending,
            "entry_pos": np.array([c.pos for c in stream], np.int64),
            "entry_kind": np.array([c.kind for c in stream], np.int64),
            "slot_embd": np.array(embeddings).reshape(-1, x.shape[1]),
            "nodes": np.array([(n.level, n.start, n.end) for n in nodes], np.int64).reshape(-1, 3),
            "h": h, "r": r,
        }

    def _slots(self, r):
        """The N_g slot embeddings e_j = slot_j + W_map_j r."""
        slot = self.w["mem.node.slot.weight"]
        return slot + mul_mat(r[None], self.w["mem.node.map.weight"]).reshape(slot.shape)

    def _consolidate(self, nodes, cells, stream, embeddings, n_before):
        """Fold the oldest neighbours of the fullest level into one node (see the head of this file)."""
        m = self.memory
        count = {}
        for n in nodes:
            count[n.level] = count.get(n.level, 0) + 1
        level = min(count, key=lambda lv: (-count[lv], lv))
        children = [n for n in nodes if n.level == level][:m.fanin]
        if len(children) < 2:
            children = nodes[:m.fanin]
        hd = m.embedding_length // m.head_count
        rs = np.stack([n.r for n in children])
        r, _ = _delta_block(self.w, "mem.active", rs, m, [], np.zeros((m.head_count, hd, hd)))
        last = children[-1]
        folded = Node(max(n.level for n in children) + 1, children[0].start, last.end, r[-1], [])
        for e, old in zip(self._slots(r[-1]), last.cells):
            slot = Cell(2, old.pos, old.segment, n_before, False)
            self._entry(slot, e, cells)
            cells.append(slot)
            stream.append(slot)
            folded.cells.append(slot)
            embeddings.append(e)
        at = next(i for i, n in enumerate(nodes) if n is children[0])
        nodes[at:at + len(children)] = [folded]
        for child in children:
            for c in child.cells:
                c.freed = not c.sink
        # The list is in the order of the text, which decides ties of top_k.
        where = next(i for i, c in enumerate(cells) if c is last.cells[-1]) + 1
        moved = cells[-len(folded.cells):]
        del cells[-len(folded.cells):]
        cells[where:where] = moved


def token_texts(path):
    """Bytes of every token id of a byte-level tokenizer.json."""
    data = json.loads((Path(path) / "tokenizer.json").read_text())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for b in range(256):
        if b in printable:
            table[chr(b)] = b
        else:
            table[chr(256 + extra)] = b
            extra += 1
    out = {i: bytes(table[ch] for ch in s) for s, i in data["model"]["vocab"].items() if all(ch in table for ch in s)}
    for token in data["added_tokens"]:
        out[token["id"]] = token["content"].encode()
    return out
