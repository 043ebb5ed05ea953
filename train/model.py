"""The `nodes`, `gist`, `ahn` and `full` memories on a small decoder, batched and parallel over time: what is trained.

The same equations as reference.py (tests hold them to 1e-4), with the recurrence in chunks and the memory as a mask
over entries. Parameter names are those of the exported checkpoint, except `A_log`, which is exported as `a` = -exp(A_log).
Segments are arbitrary; sinks and windows are supported; top_k and consolidation are read-time options and are not.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class RmsNorm(nn.Module):
    """x over its root mean square, times a weight [d]."""

    def __init__(self, d, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def linear(n_in, n_out, bias=False, gain=1.0):
    """A linear layer with weights of standard deviation gain / sqrt(n_in)."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(n_in))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def recur(q, k, v, g, beta, segment, chunk=64):
    """The gated delta rule in chunks; q, k, v [B, H, T, d] raw, g and beta [B, H, T], segment [B, T] (the state starts
    from zero where it changes). Returns o [B, H, T, d].

    Inside a chunk, with S the state before it, G the cumulative log decay and D_ij = exp(G_i - G_j) where i and j share
    a segment, the errors E solve (I + tril(beta D (K K^T), -1)) E = beta (V - exp(G) K S).
    """
    B, H, T, d = q.shape
    q = q * torch.rsqrt(q.pow(2).sum(-1, keepdim=True) + 1e-6) / math.sqrt(d)
    k = k * torch.rsqrt(k.pow(2).sum(-1, keepdim=True) + 1e-6)
    chunk = min(chunk, T)
    n = -(-T // chunk)
    pad = n * chunk - T
    if pad:
        q, k, v = (F.pad(z, (0, 0, 0, pad)) for z in (q, k, v))
        g, beta = F.pad(g, (0, pad)), F.pad(beta, (0, pad))
        segment = F.pad(segment, (0, pad), mode="replicate") if segment.dim() == 3 else torch.cat(
            [segment, segment[:, -1:].expand(B, pad)], 1)
    q, k, v = (z.reshape(B, H, n, chunk, d) for z in (q, k, v))
    G = g.reshape(B, H, n, chunk).cumsum(-1)
    beta = beta.reshape(B, H, n, chunk, 1)
    seg = segment.reshape(B, 1, n, chunk)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    same = (seg[..., :, None] == seg[..., None, :]) & lower
    D = (G[..., :, None] - G[..., None, :]).masked_fill(~same, float("-inf")).exp()
    before = torch.cat([seg[:, :, :1, :1] - 1, seg[:, :, :-1, -1:]], 2)  # the state is zero before the first chunk
    carry = (G.exp() * (seg == before))[..., None]
    A = (beta * D * (k @ k.transpose(-1, -2))).tril(-1)
    rhs = torch.cat([beta * v, beta * carry * k], -1)
    solved = torch.linalg.solve_triangular(A + torch.eye(chunk, device=q.device), rhs, upper=False, unitriangular=True)
    U, W = solved.split(d, -1)
    P = D * (q @ k.transpose(-1, -2))
    out, S = [], None
    for i in range(n):
        E = U[:, :, i] if S is None else U[:, :, i] - W[:, :, i] @ S
        o = P[:, :, i] @ E
        if S is not None:
            o = o + (carry[:, :, i] * q[:, :, i]) @ S
        out.append(o)
        if i + 1 < n:
            write = (D[:, :, i, -1, :, None] * k[:, :, i]).transpose(-1, -2) @ E
            S = write if S is None else carry[:, :, i, -1:] * S + write
    return torch.cat(out, 2)[:, :, :T]


class Bias(nn.Module):
    """A lone bias vector, so that it is named `dt.bias`."""

    def __init__(self, n):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))


class Delta(nn.Module):
    """One gated delta recurrence with output gate; with a causal convolution in the trunk, without in the active memory."""

    def __init__(self, c, n_head, conv=0):
        super().__init__()
        self.n_head, self.taps = n_head, conv
        self.qkv = linear(c, 3 * c)
        self.beta, self.alpha = linear(c, n_head), linear(c, n_head)
        self.A_log = nn.Parameter(torch.log(torch.linspace(0.05, 0.5, n_head)))
        self.dt = Bias(n_head)
        self.gate = linear(c, c)
        self.head_norm = RmsNorm(c // n_head)
        if conv:
            self.conv = nn.Module()
            w = torch.randn(3 * c, conv) * 0.1
            w[:, -1] += 1.0
            self.conv.weight = nn.Parameter(w)

    def forward(self, y, segment):
        B, T, c = y.shape
        z = self.qkv(y).float()
        if self.taps:
            z = F.conv1d(F.pad(z.transpose(1, 2), (self.taps - 1, 0)), self.conv.weight[:, None], groups=3 * c)
            z = F.silu(z.transpose(1, 2))
        q, k, v = (part.reshape(B, T, self.n_head, -1).transpose(1, 2) for part in z.split(c, -1))
        beta = torch.sigmoid(self.beta(y).float()).transpose(1, 2)
        g = (-self.A_log.exp() * F.softplus(self.alpha(y).float() + self.dt.bias)).transpose(1, 2)
        with torch.autocast(y.device.type, enabled=False):
            o = recur(q, k, v, g, beta, segment)
        return self.head_norm(o.transpose(1, 2)).reshape(B, T, c) * F.silu(self.gate(y).float())


class TrunkBlock(Delta):
    """A gated delta block of the compressor trunk: recurrence and feed-forward, each with its residual."""

    def __init__(self, c, n_head, ffn, conv):
        super().__init__(c, n_head, conv)
        self.norm, self.ffn_norm = RmsNorm(c), RmsNorm(c)
        self.out = linear(c, c, gain=0.5)
        self.ffn_gate, self.ffn_up, self.ffn_down = linear(c, ffn), linear(c, ffn), linear(ffn, c, gain=0.5)

    def forward(self, u, segment):
        u = u + self.out(super().forward(self.norm(u), segment))
        y = self.ffn_norm(u)
        return u + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))


class Compressor(nn.Module):
    """Everything named `mem.*`: trunk, decider, active memory, node embedding."""

    def __init__(self, d, m):
        super().__init__()
        c, heads = m["compressor.embedding_length"], m["compressor.head_count"]
        self.slots, self.reset = m["node.slots"], m.get("reset", "cut")
        self.kind = m["decider.type"]
        self.in_norm = RmsNorm(d)
        self.add_module("in", linear(d, c))
        self.blk = nn.ModuleList(
            TrunkBlock(c, heads, m["compressor.feed_forward_length"], m.get("compressor.conv_kernel", 4))
            for _ in range(m["compressor.block_count"]))
        self.out_norm = RmsNorm(c)
        if self.kind == "linear":
            self.decider = linear(c, 1, bias=True)
        elif self.kind == "mlp":
            self.decider = nn.ModuleList([linear(c, c, bias=True), linear(c, 1, bias=True)])
        self.active = Delta(c, heads)
        self.node = nn.Module()
        # The learned part of a slot begins small and the recurrence's part does not: the first norm of the decoder sees
        # their ratio, and a large constant slot trained into a gist token that ignored the recurrence (train/LOG.md).
        self.node.map = linear(c, self.slots * d)
        self.node.slot = nn.Module()
        self.node.slot.weight = nn.Parameter(torch.randn(self.slots, d) * 0.02)

    def trunk(self, x):
        """h [B, T, c] of token embeddings x [B, T, D]."""
        u = getattr(self, "in")(self.in_norm(x)).float()
        whole = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        for block in self.blk:
            u = block(u, whole)
        return self.out_norm(u)

    def decide(self, h):
        """Logit of the boundary probability [B, T]."""
        if self.kind == "mlp":
            return self.decider[1](F.silu(self.decider[0](h)))[..., 0].float()
        return self.decider(h)[..., 0].float()

    def embed(self, r):
        """Slot embeddings [n, N_g, D] of reads r [n, c]."""
        return self.node.slot.weight + self.node.map(r).reshape(-1, self.slots, self.node.slot.weight.shape[1])


class Ahn(nn.Module):
    """The artificial hippocampus of a layer (ahn.md section 6, GatedDeltaNet or DeltaNet), under its published names."""

    def __init__(self, cfg, n_head, hd):
        super().__init__()
        d = cfg["hidden_size"]
        self.fn = nn.Module()
        f = self.fn
        f.b_proj, f.g_proj, f.o_norm = linear(d, n_head), linear(d, n_head), RmsNorm(hd, 1e-5)
        f.o_proj = nn.Module()
        f.o_proj.weight = nn.Parameter(torch.zeros(n_head, hd, hd))
        self.gated = cfg.get("_ahn_implementation", "GatedDeltaNet") == "GatedDeltaNet"
        if self.gated:
            f.a_proj = linear(d, n_head)
            f.A_log = nn.Parameter(torch.log(torch.linspace(0.01, 0.1, n_head)))
            f.dt_bias = nn.Parameter(torch.zeros(n_head))

    def forward(self, h, q, k, v, window, sinks):
        """What memory adds to the attention output [B, H, T, d]: token u is written when u + window reads; q, k, v are
        rotated, [B, H, T, d], k and v repeated to the query heads."""
        f, T = self.fn, h.shape[1]
        n = T - window - sinks
        if n <= 0:
            return torch.zeros_like(q)
        read, write = slice(window + sinks, T), slice(sinks, T - window)
        beta = torch.sigmoid(f.b_proj(h[:, write]).float()).transpose(1, 2)
        if self.gated:
            g = (-f.A_log.exp() * F.softplus(f.a_proj(h[:, write]).float() + f.dt_bias)).transpose(1, 2)
        else:
            g = torch.zeros_like(beta)
        whole = torch.zeros(h.shape[0], n, dtype=torch.long, device=h.device)
        o = recur(q[:, :, read].float(), k[:, :, write].float(), v[:, :, write].float(), g, beta, whole)
        gate = F.silu(f.g_proj(h[:, read]).float()).transpose(1, 2)
        m = (f.o_norm(o) * gate[..., None]) @ f.o_proj.weight
        return F.pad(m, (0, 0, window + sinks, 0))


class Layer(nn.Module):
    """One decoder layer of qwen2, qwen3 or llama."""

    def __init__(self, cfg):
        super().__init__()
        d, self.n_head, self.n_kv = cfg["hidden_size"], cfg["num_attention_heads"], cfg["num_key_value_heads"]
        self.hd = cfg.get("head_dim") or d // self.n_head
        eps, bias, depth = cfg["rms_norm_eps"], cfg["model_type"] == "qwen2", 2 * cfg["num_hidden_layers"]
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(d, eps), RmsNorm(d, eps)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        a = self.self_attn
        a.q_proj, a.k_proj = linear(d, self.n_head * self.hd, bias), linear(d, self.n_kv * self.hd, bias)
        a.v_proj, a.o_proj = linear(d, self.n_kv * self.hd, bias), linear(self.n_head * self.hd, d, gain=depth**-0.5)
        if cfg["model_type"] == "qwen3":
            a.q_norm, a.k_norm = RmsNorm(self.hd, eps), RmsNorm(self.hd, eps)
        ffn = cfg["intermediate_size"]
        self.mlp.gate_proj, self.mlp.up_proj = linear(d, ffn), linear(d, ffn)
        self.mlp.down_proj = linear(ffn, d, gain=depth**-0.5)
        if cfg["memory"]["kind"] == "ahn":
            self.ahn = Ahn(cfg, self.n_head, self.hd)
            self.window, self.sinks = cfg["sliding_window"], cfg.get("num_attn_sinks") or 0

    def forward(self, x, cos, sin, mask, recall=True):
        B, S, _ = x.shape
        a = self.self_attn
        h = self.input_layernorm(x)
        q = a.q_proj(h).reshape(B, S, self.n_head, self.hd)
        k = a.k_proj(h).reshape(B, S, self.n_kv, self.hd)
        v = a.v_proj(h).reshape(B, S, self.n_kv, self.hd)
        if hasattr(a, "q_norm"):
            q, k = a.q_norm(q), a.k_norm(k)
        # The soft-max stays in F32 on the CPU: its BF16 backward is slower there than the F32 one.
        ty = v.dtype if v.is_cuda else torch.float32
        q, k, v = (z.to(ty).transpose(1, 2) for z in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if self.n_kv != self.n_head:
            k, v = (z.repeat_interleave(self.n_head // self.n_kv, 1) for z in (k, v))
        with torch.autocast(x.device.type, enabled=x.is_cuda):
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            if recall and hasattr(self, "ahn"):
                o = o + self.ahn(h, q, k, v, self.window, self.sinks)
        x = x + a.o_proj(o.transpose(1, 2).reshape(B, S, -1))
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


def rotate(x, cos, sin):
    """RoPE of x [B, S, H, d] in pairs (i, i + d/2); cos and sin [B, S, 1, d/2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layout:
    """Where tokens and slots stand in the main sequence, and who sees whom, for a batch of cuts [B, T]."""

    def __init__(self, cut, m, gaps=None, slot_of=None):
        """`gaps` [B, segments] is added to the position counter before each segment. For gist, `slot_of` [B, T] marks
        the gist tokens of the input and cut is unused: entries are then the tokens themselves."""
        B, T = (slot_of if cut is None else cut).shape
        device = (slot_of if cut is None else cut).device
        n_slots = m["node.slots"]
        rows = torch.arange(B, device=device)[:, None]
        t = torch.arange(T, device=device)[None].expand(B, T)
        if slot_of is not None:
            opens = torch.zeros_like(slot_of)
            opens[:, 1:] = slot_of[:, :-1] & ~slot_of[:, 1:]
            self.size, self.token = T, t
            segment, kind, valid = opens.long().cumsum(1), slot_of, torch.ones_like(slot_of)
            raw = (~slot_of).long().cumsum(1) - (~slot_of).long()
            position = t
            self.slot = None
        else:
            done = cut.long().cumsum(1)
            seg = done - cut.long()
            b, s = cut.nonzero(as_tuple=True)
            self.size = T + n_slots * int(done[:, -1].max())
            self.token = t + seg * n_slots
            self.cut_rows, self.cut_tokens = b, s
            self.slot = self.token[b, s][:, None] + 1 + torch.arange(n_slots, device=device)[None]
            self.slot_rows = b[:, None].expand_as(self.slot)

            def entries(of_token, of_slot, fill):
                out = torch.full((B, self.size), fill, dtype=of_token.dtype, device=device)
                out[rows, self.token] = of_token
                out[self.slot_rows, self.slot] = of_slot.expand_as(self.slot)
                return out

            segment = entries(seg, seg[b, s][:, None], -1)
            kind = entries(torch.zeros_like(cut), torch.ones_like(b, dtype=torch.bool)[:, None], False)
            valid = entries(torch.ones_like(cut), torch.ones_like(b, dtype=torch.bool)[:, None], False)
            raw = entries(t, (s + 1)[:, None], -1)
            offset = gaps.cumsum(1).gather(1, seg.clamp(max=gaps.shape[1] - 1)) if gaps is not None else torch.zeros_like(seg)
            if m.get("position", "keep") == "compact":
                start = torch.where(seg > 0, torch.cummax(torch.where(F.pad(cut, (1, -1)), t, torch.zeros_like(t)), 1).values, 0)
                sinks = min(m.get("sinks", 0), T)
                kept = torch.zeros_like(seg)  # sinks before the segment, which a cut does not give back
                is_sink = self.token < sinks
                n_sink = is_sink.long().sum(1, keepdim=True)
                kept = torch.minimum(start, n_sink)
                base = seg * n_slots + kept + offset
                upto = torch.minimum(t + 1, n_sink) - kept  # sinks in the open segment
                position = entries(base + t - start, (base + upto)[b, s][:, None] + torch.arange(n_slots, device=device), 0)
            else:
                position = entries(self.token + offset, self.slot + offset[b, s][:, None], 0)
        self.position = position
        self.kind, self.valid = kind, valid
        i = torch.arange(self.size, device=device)
        a_seg, b_seg = segment[:, :, None], segment[:, None, :]
        near = raw[:, :, None] - raw[:, None, :] <= m.get("window", 0)
        raw_seen = (a_seg == b_seg) | (near & ~kind[:, None, :])
        if m.get("node.sees", "segment") == "nodes":
            raw_seen = raw_seen & ~kind[:, :, None]
        seen = raw_seen | kind[:, None, :] | (i < m.get("sinks", 0))[None, None, :]
        seen = seen & valid[:, None, :] & (i[None, :] <= i[:, None])[None]
        self.mask = (seen | torch.eye(self.size, dtype=torch.bool, device=device)[None])[:, None]


class Plain:
    """Entries are the tokens: causal attention, for `ahn` within the window and to the sinks."""

    def __init__(self, ids, cfg, full):
        B, T = ids.shape
        t = torch.arange(T, device=ids.device)
        self.token = self.position = t[None].expand(B, T)
        seen = t[None, :] <= t[:, None]
        if cfg["memory"]["kind"] == "ahn" and not full:
            seen = seen & ((t[:, None] - t[None, :] < cfg["sliding_window"]) | (t[None, :] < (cfg.get("num_attn_sinks") or 0)))
        self.mask = seen[None, None]


class Mneme(nn.Module):
    """A decoder with a `nodes`, `gist`, `ahn` or `full` memory. `cfg` is the config.json of the checkpoint."""

    def __init__(self, cfg):
        super().__init__()
        if "memory" not in cfg:
            cfg["memory"] = {"kind": "ahn" if "_ahn_implementation" in cfg else "full"}
        self.cfg, self.m = cfg, cfg["memory"]
        d = cfg["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg["vocab_size"], d)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5 if cfg.get("tie_word_embeddings") else 1.0)
        self.model.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg["num_hidden_layers"]))
        self.model.norm = RmsNorm(d, cfg["rms_norm_eps"])
        if not cfg.get("tie_word_embeddings"):
            self.lm_head = linear(d, cfg["vocab_size"])
        else:
            nn.init.constant_(self.model.norm.weight, 2.0 / math.sqrt(d))
        if self.m["kind"] == "nodes":
            self.mem = Compressor(d, self.m)
        from reference import rope_inv_freq

        inv = rope_inv_freq(cfg, cfg.get("head_dim") or d // cfg["num_attention_heads"])
        self.register_buffer("inv_freq", torch.tensor(inv, dtype=torch.float64), persistent=False)

    def forward(self, ids, cut=None, gaps=None, rows=None, h=None, full=False, made=None):
        """Logits after the tokens of ids [B, T] under cuts [B, T] (a cut after t is True at t).

        With `rows` = (b, t) index tensors only those rows are projected to the vocabulary: [n, V]; else [B, T, V].
        `h` may hand in the trunk's output, so that it is not computed twice. `full` reads without any memory: the
        teacher of a distillation, and the warm-up of gist tokens. A dict `made` receives the slots [n, N_g, D] and the
        (b, t) they were made at.
        """
        if full and self.m["kind"] == "nodes":
            cut = torch.zeros_like(ids, dtype=torch.bool)
        x = self.model.embed_tokens(ids)
        if self.m["kind"] == "nodes":
            lay = Layout(cut, self.m, gaps)
            h = self.mem.trunk(x) if h is None else h
            done = cut.long().cumsum(1) - cut.long()
            r = self.mem.active(h, done if self.mem.reset == "cut" else torch.zeros_like(done))
            slots = self.mem.embed(r[lay.cut_rows, lay.cut_tokens])
            if made is not None:
                made.update(slots=slots, at=(lay.cut_rows, lay.cut_tokens))
            e = x.new_zeros(x.shape[0], lay.size, x.shape[2])
            e = e.index_put((torch.arange(len(x), device=x.device)[:, None].expand_as(lay.token), lay.token), x)
            e = e.index_put((lay.slot_rows, lay.slot), slots.to(e.dtype))
        elif self.m["kind"] == "gist" and not full:
            gist = torch.isin(ids, torch.tensor(self.m["gist_token_ids"], device=ids.device))
            lay, e = Layout(None, self.m, slot_of=gist), x
        else:
            lay, e = Plain(ids, self.cfg, full), x
        angle = lay.position[..., None].double() * self.inv_freq
        cos, sin = angle.cos().float()[:, :, None], angle.sin().float()[:, :, None]
        for layer in self.model.layers:
            e = layer(e, cos, sin, lay.mask, not full)
        if rows is None:
            y = e[torch.arange(len(x), device=x.device)[:, None], lay.token]
        else:
            y = e[rows[0], lay.token[rows]]
        y = self.model.norm(y)
        return F.linear(y, self.model.embed_tokens.weight if self.cfg.get("tie_word_embeddings") else self.lm_head.weight).float()

    def reconstruct(self, ids, cut, made):
        """How far the slots of `made` (see forward) tell which tokens their segments held: the mean over segments of the
        cross-entropy between the segment's tokens and one soft-max over the vocabulary read off the slots."""
        rows, _ = made["at"]
        flat = cut.flatten()
        segment = (flat.long().cumsum(0) - flat.long()).view_as(ids)
        row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        closed = segment < len(rows)
        closed &= rows[segment.clamp(max=len(rows) - 1)] == row
        held = made["slots"].new_zeros(len(rows), self.cfg["vocab_size"])
        held.index_put_((segment[closed], ids[closed]), held.new_ones(()), accumulate=True)
        logits = F.linear(self.model.norm(made["slots"].mean(1)), self.model.embed_tokens.weight).float()
        return -(held * F.log_softmax(logits, -1)).sum(-1).div(held.sum(-1)).mean()

    def cuts_of(self, p):
        """Cuts [B, T] of probabilities p [B, T] by the rule of memory.md 1.3."""
        m, p = self.m, p.detach().cpu()
        tau, low, high = m["decider.threshold"], m["decider.min_segment"], m["decider.max_segment"]
        cut = torch.zeros(p.shape, dtype=torch.bool)
        length = torch.zeros(len(p), dtype=torch.long)
        for t in range(p.shape[1]):
            length += 1
            now = (length >= high) | ((length >= low) & (p[:, t] > tau))
            cut[:, t] = now
            length[now] = 0
        return cut

    def tensors(self):
        """The checkpoint's tensors by exported name, F32, contiguous."""
        out = {}
        for name, t in self.state_dict().items():
            t = t.detach().float().cpu().contiguous()
            if name.startswith("mem.") and name.endswith(".A_log"):
                name, t = name.removesuffix("A_log") + "a", -t.exp()
            out[name] = t
        return out

    def load_tensors(self, tensors):
        """The inverse of `tensors`."""
        state = {}
        for name, t in tensors.items():
            if name.startswith("mem.") and name.endswith(".a"):
                name, t = name.removesuffix("a") + "A_log", torch.log(-t)
            if not name.endswith("ahn.fn.D"):  # published, and without effect
                state[name] = t
        self.load_state_dict(state)

    @classmethod
    def load(cls, path):
        """A model from a checkpoint directory as the fixtures are."""
        from safetensors.torch import load_file

        path = Path(path)
        model = cls(json.loads((path / "config.json").read_text()))
        model.load_tensors({k: v.float() for k, v in load_file(path / "model.safetensors").items()})
        return model
