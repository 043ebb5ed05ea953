#!/usr/bin/env python3
"""mneme and llama.cpp side by side on one file: tokens per second and their ratio.

Both read the same GGUF with the same number of threads, in turns, in one run, because a machine's
speed drifts from minute to minute. llama.cpp is the library inside the llama-cpp-python package,
with flash attention on; each round times one prompt and one stretch of decoding at every depth.
The table shows medians over the rounds.

llama.cpp takes minutes to read a deep context. With --peer-reads N it reads N tokens and doubles what it holds
from then on: its cells are copied through its state functions and moved to later positions, so that the depth must be
N times a power of two. Its speed at a depth does not depend on what the cells say; the times of `fill` beyond N are then
left out.

Development only: needs numpy and llama-cpp-python (never needed to build or run mneme).

    tools/bench_peer.py -m model.gguf -d 0,4096 --rounds 3
    tools/bench_peer.py -m model.gguf -d 16384 --memory window:window=2048,sinks=4
    tools/bench_peer.py -m model.gguf -d 4096,16384,32768 --peer-reads 4096 --rounds 1
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "f32": llama_cpp.GGML_TYPE_F32, "q8_0": llama_cpp.GGML_TYPE_Q8_0}


@llama_cpp.llama_log_callback
def log_errors(level, text, _):
    """llama.cpp's errors only."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class Peer:
    """llama.cpp's library on one model."""

    def __init__(self, args, n_ctx):
        llama_cpp.llama_log_set(log_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            args.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            sys.exit(f"{args.model}: llama.cpp cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = 2048
        params.n_ubatch = args.ubatch
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if args.peer_reads:
            params.n_seq_max, params.kv_unified = 2, True  # a second sequence to copy by
        params.type_k = KV_TYPES[args.cache_type_k]
        params.type_v = KV_TYPES[args.cache_type_v]
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            sys.exit(f"{args.model}: llama.cpp cannot make a context of {n_ctx} tokens")
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = np.random.default_rng(1).integers(0, n_vocab, n_ctx).astype(np.int32)

    def read(self, at, n):
        """Reads tokens [at, at + n); logits of the last one, as mneme's bench asks for them."""
        for begin in range(at, at + n, 2048):
            part = self.tokens[begin : min(begin + 2048, at + n)]
            pointer = part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            batch = llama_cpp.llama_batch_get_one(pointer, len(part))
            if llama_cpp.llama_decode(self.ctx, batch) != 0:
                sys.exit("llama.cpp: decoding failed")
        llama_cpp.llama_synchronize(self.ctx)

    def forget(self, depth):
        """Goes back to `depth` tokens."""
        memory = llama_cpp.llama_get_memory(self.ctx)
        if not llama_cpp.llama_memory_seq_rm(memory, 0, depth, -1):
            sys.exit("llama.cpp: cannot take tokens back")

    def double(self, depth):
        """From `depth` tokens to twice as many: the same cells again, at later positions."""
        size = llama_cpp.llama_state_seq_get_size(self.ctx, 0)
        state = (ctypes.c_uint8 * size)()
        if llama_cpp.llama_state_seq_get_data(self.ctx, state, size, 0) != size:
            sys.exit("llama.cpp: cannot save its cells")
        if llama_cpp.llama_state_seq_set_data(self.ctx, state, size, 1) != size:
            sys.exit("llama.cpp: cannot restore its cells")
        memory = llama_cpp.llama_get_memory(self.ctx)
        llama_cpp.llama_memory_seq_add(memory, 1, 0, -1, depth)
        llama_cpp.llama_memory_seq_cp(memory, 1, 0, -1, -1)
        llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)
        self.read(2 * depth, 1)  # the keys are turned to their new positions with the next token
        self.forget(2 * depth)

    def round(self, args):
        """Tokens per second by (test, depth)."""
        self.forget(0)
        self.read(0, 16)
        self.forget(0)
        rates, filled, filling = {}, 0, 0.0
        for depth in args.depths:
            to_read = min(depth, args.peer_reads or depth)
            start = time.perf_counter()
            self.read(filled, max(to_read - filled, 0))
            filling += time.perf_counter() - start
            filled = max(filled, to_read)
            if depth and filled == depth:
                rates["fill", depth] = depth / filling
            while filled < depth:
                self.double(filled)
                filled *= 2
            if args.n_prompt:
                start = time.perf_counter()
                self.read(depth, args.n_prompt)
                rates["pp", depth] = args.n_prompt / (time.perf_counter() - start)
                self.forget(depth)
            if args.n_gen:
                start = time.perf_counter()
                for i in range(args.n_gen):
                    self.read(depth + i, 1)
                rates["tg", depth] = args.n_gen / (time.perf_counter() - start)
                self.forget(depth)
        return rates


def mneme_round(args):
    """Tokens per second by (test, depth), and the whole JSON of `mneme bench`."""
    command = [args.mneme, "bench", "-m", args.model, "-t", str(args.threads), "-r", "1", "--json"]
    command += ["-p", str(args.n_prompt), "-n", str(args.n_gen)]
    command += ["-d", ",".join(map(str, args.depths)), "--ubatch-size", str(args.ubatch)]
    command += ["--cache-type-k", args.cache_type_k, "--cache-type-v", args.cache_type_v]
    command += ["--memory", args.memory]
    command += ["--memory-adapter", args.memory_adapter] if args.memory_adapter else []
    command += ["--isa", args.isa] if args.isa else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    # Filling a context begins at depth 0; it is known by where it ends, as the peer's.
    at = {(r["test"], r["n_tokens"] if r["test"] == "fill" else r["depth"]): r["tokens_per_second"] for r in result["rows"]}
    return at, result


def main():
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-d", "--depths", type=lambda s: sorted({int(d) for d in s.split(",")}), default=[0, 4096])
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-ub", "--ubatch", type=int, default=512)
    parser.add_argument("-ctk", "--cache-type-k", choices=KV_TYPES, default="f16")
    parser.add_argument("-ctv", "--cache-type-v", choices=KV_TYPES, default="f16")
    parser.add_argument("--memory-adapter", help="mneme's memory adapter (tools/make_gguf.py --memory)")
    parser.add_argument("--memory", default="full", help="mneme's memory; llama.cpp always keeps all")
    parser.add_argument("--isa", help="mneme's widest instruction set, for a llama.cpp that was built for less")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mneme", default=str(root / "target" / "release" / "mneme"))
    parser.add_argument("--peer-reads", type=int, default=0, metavar="N", help="tokens llama.cpp reads before it doubles (0: all)")
    args = parser.parse_args()
    for depth in args.depths:
        if args.peer_reads and depth > args.peer_reads and depth not in [args.peer_reads << i for i in range(20)]:
            parser.error(f"-d {depth}: not --peer-reads {args.peer_reads} times a power of two")

    n_ctx = max(args.depths) + max(args.n_prompt, args.n_gen, 16)
    peer = Peer(args, (n_ctx + 255) // 256 * 256)
    ours, theirs, peaks = {}, {}, []
    for i in range(args.rounds):
        print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
        # In turns, and the first one changes, so that neither always runs on the warmer machine.
        for who in ("mneme", "peer") if i % 2 == 0 else ("peer", "mneme"):
            if who == "mneme":
                rates, result = mneme_round(args)
                peaks.append(result["peak"])
            else:
                rates = peer.round(args)
            for key, rate in rates.items():
                (ours if who == "mneme" else theirs).setdefault(key, []).append(rate)

    info = llama_cpp.llama_print_system_info().decode()
    print(f"{args.model}, {args.threads} threads, memory {args.memory}, K/V {args.cache_type_k}/{args.cache_type_v}")
    print(f"llama.cpp from llama-cpp-python {llama_cpp.__version__}: {info.strip()}\n")
    print("| test | depth | mneme tokens/s | llama.cpp tokens/s | ratio |")
    print("| ---- | ----: | -------------: | -----------------: | ----: |")
    rows = []
    for test, depth in ours:
        if (test, depth) not in theirs:
            continue  # the peer's fill is not timed at depth 0
        mine, other = statistics.median(ours[test, depth]), statistics.median(theirs[test, depth])
        n = {"pp": args.n_prompt, "tg": args.n_gen, "fill": depth}[test]
        print(f"| {test}{n} | {depth} | {mine:.2f} | {other:.2f} | {mine / other:.2f} |")
        rows.append({
            "test": test, "n_tokens": n, "depth": depth, "ratio": mine / other,
            "mneme": ours[test, depth], "peer": theirs[test, depth],
        })
    print(json.dumps({
        "model": args.model, "threads": args.threads, "memory": args.memory,
        "cache_type_k": args.cache_type_k, "cache_type_v": args.cache_type_v,
        "peer": f"llama-cpp-python {llama_cpp.__version__}", "peaks": peaks, "rows": rows,
    }))


if __name__ == "__main__":
    main()
