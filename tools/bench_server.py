#!/usr/bin/env python3
"""mneme serve and llama-server side by side on one file: throughput of parallel streams, and how long a
short request waits while a long prompt is being read.

Both servers get the same GGUF, threads, slots and requests, in turns within one run; the table shows
medians and the ratio mneme / llama.cpp. Ends with one JSON line. Standard library only; llama-server is
never needed to build or run mneme.

    tools/bench_server.py -m model.gguf --llama-server llama.cpp/build/bin/llama-server -t 2
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

WORDS = "the of and to in is was for on that with as by at from his it an were are".split()


def prompt(seed, n):
    """About n words that no other seed begins with, so that no server knows a part of it."""
    out, state = [], seed * 7919 + 1
    for _ in range(n):
        state = (state * 1103515245 + 12345) % (1 << 31)
        out.append(WORDS[(state >> 8) % len(WORDS)])
    return " ".join(out)


class Server:
    def __init__(self, name, command, port):
        self.name, self.port = name, port
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                sys.exit(f"{name} ended with status {self.process.returncode}: {' '.join(command)}")
            time.sleep(0.05)
        sys.exit(f"{name} did not start")

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def stream(self, text, n, on_first=None):
        """Seconds to the first token and to the last, tokens written, tokens of the prompt."""
        body = {"prompt": text, "n_predict": n, "ignore_eos": True, "temperature": 0, "stream": True, "cache_prompt": False}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1200)
        begin = time.perf_counter()
        connection.request("POST", "/completion", json.dumps(body))
        reply = connection.getresponse()
        if reply.status != 200:
            sys.exit(f"{self.name}: {reply.status} {reply.read()[:300]}")
        first = last = None
        final = {}
        for line in reply:
            if line.startswith(b"data: "):
                last = time.perf_counter() - begin
                first = first or last
                final = json.loads(line[6:])
        connection.close()
        return first, last, final["tokens_predicted"], final["tokens_evaluated"]

    def end(self):
        self.process.terminate()
        self.process.wait(30)


def throughput(server, args, parallel, seed):
    """Tokens per second over all of `parallel` streams, reading their prompts included."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [pool.submit(server.stream, prompt(seed * 100 + i, args.words), args.predict) for i in range(parallel)]
        done = [job.result() for job in jobs]
    seconds = time.perf_counter() - begin
    return sum(d[2] for d in done) / seconds


def first_token(server, args, seed):
    """Seconds to the first token of a short request that comes while a long prompt is read."""
    long = threading.Thread(target=server.stream, args=(prompt(seed * 100 + 50, args.long), 1))
    long.start()
    time.sleep(args.delay)
    short = server.stream(prompt(seed * 100 + 51, 8), 4)
    busy = long.is_alive()
    long.join()
    if not busy:
        print(f"note: {server.name} had read the long prompt before the short request was done", file=sys.stderr)
    return short[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--mneme", default="target/release/mneme")
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--words", type=int, default=64, help="words of a stream's prompt")
    parser.add_argument("--predict", type=int, default=48, help="tokens each stream writes")
    parser.add_argument("--long", type=int, default=16000, help="words of the long prompt")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds from the long request to the short one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ttft-rounds", type=int, default=1)
    parser.add_argument("--port", type=int, default=18200)
    args = parser.parse_args()
    streams = [int(n) for n in args.streams.split(",")]
    slots = max(streams)
    ctx = slots * 20480
    shared = ["-m", args.model, "-t", str(args.threads), "-np", str(slots), "-c", str(ctx)]
    servers = [
        Server("mneme", [args.mneme, "serve", "--port", str(args.port), *shared], args.port),
        Server(
            "llama.cpp",
            [args.llama_server, "--port", str(args.port + 1), "-tb", str(args.threads), "-fa", "on", "--no-webui", "-fit", "off", *shared],
            args.port + 1,
        ),
    ]
    rows = []

    def row(test, unit, measure, rounds, better):
        got = {server.name: [] for server in servers}
        for nth in range(rounds):
            for server in servers:
                got[server.name].append(measure(server, nth + 1))
        ours, theirs = (statistics.median(got[server.name]) for server in servers)
        rows.append({"test": test, "mneme": ours, "llama.cpp": theirs, "ratio": ours / theirs, "better": better})
        print(f"| {test} | {ours:.2f} {unit} | {theirs:.2f} {unit} | {ours / theirs:.2f} |", flush=True)

    print(f"{os.path.basename(args.model)}, {args.threads} threads, -np {slots}")
    print("| test | mneme | llama.cpp | ratio |\n| --- | ---: | ---: | ---: |")
    for server in servers:
        server.stream(prompt(99, 64), 8)
    for n in streams:
        row(f"{n} streams", "tokens/s", lambda s, nth, n=n: throughput(s, args, n, nth * 10 + n), args.rounds, "more")
    name = f"first token beside a prompt of {args.long} words"
    row(name, "s", lambda s, nth: first_token(s, args, nth + 90), args.ttft_rounds, "less")
    for server in servers:
        server.end()
    print(json.dumps({"model": os.path.basename(args.model), "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
