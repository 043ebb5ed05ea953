#!/usr/bin/env python3
"""mneme serve and llama-server side by side on one file: throughput of parallel streams, and how long a
short request waits for its first token while a long prompt is being read.

Both servers get the same GGUF, threads, slots and token ids, in turns within one run, and only one of them
has anything to do at a time; the table shows medians, the range in brackets, and the ratio mneme / llama.cpp.
Ends with one JSON line. Standard library only; llama-server is never needed to build or run mneme.

    tools/bench_server.py -m model.gguf --llama-server llama.cpp/build/bin/llama-server -t 2
    tools/bench_server.py -m model.gguf --llama-server ... --streams "" --long 16384    # only the waiting
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

WORDS = "the of and to in is was for on that with as by at from his it an were are".split()


def words(seed, n):
    """n words that no other seed begins with, so that no server knows a part of them."""
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

    def prompt(self, seed, n):
        """n token ids that no other seed begins with."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/tokenize", json.dumps({"content": words(seed, n)}))
        return json.loads(connection.getresponse().read())["tokens"][:n]

    def ask(self, ids, n):
        """A stream that was asked for: its connection, and when."""
        body = {"prompt": ids, "n_predict": n, "ignore_eos": True, "temperature": 0, "stream": True, "cache_prompt": False}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1200)
        begin = time.perf_counter()
        connection.request("POST", "/completion", json.dumps(body))
        return connection, begin

    def stream(self, ids, n):
        """Seconds to the first token and to the last, tokens written."""
        connection, begin = self.ask(ids, n)
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
        return first, last, final["tokens_predicted"]

    def busy(self):
        return sum(slot["is_processing"] for slot in json.loads(self.get("/slots")[1]))

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def throughput(server, args, parallel, seed):
    """Tokens per second over all of `parallel` streams, reading their prompts included."""
    prompts = [server.prompt(seed * 100 + i, args.prompt) for i in range(parallel)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        done = [job.result() for job in [pool.submit(server.stream, ids, args.predict) for ids in prompts]]
    return [sum(d[2] for d in done) / (time.perf_counter() - begin)]


def first_tokens(server, args, seed):
    """Seconds to the first token of short requests, one after the other while a long prompt is read."""
    long = server.prompt(seed * 100 + 50, args.long)
    shorts = [server.prompt(seed * 100 + 51 + i, 8) for i in range(args.shorts)]
    connection, begin = server.ask(long, 1)
    connection.sock.setblocking(False)
    out = []
    for nth, ids in enumerate(shorts):
        time.sleep(args.delay)
        at = time.perf_counter() - begin
        if answered(connection):
            print(f"note: {server.name} had read the long prompt after {nth} short requests", file=sys.stderr)
            break
        first = server.stream(ids, 4)[0]
        print(f"      {server.name}: asked after {at:.1f} s of reading, first token after {first:.2f} s", file=sys.stderr)
        out.append(first)
    connection.close()
    # llama-server may read on for a while; it is the last to be asked.
    deadline = time.perf_counter() + 5
    while server.busy() and time.perf_counter() < deadline:
        time.sleep(0.1)
    return out


def answered(connection):
    """Whether a token has come; heads of replies and pings come before."""
    try:
        return b"data: {" in connection.sock.recv(1 << 16, socket.MSG_PEEK)
    except BlockingIOError:
        return False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--mneme", default="target/release/mneme")
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a stream's prompt")
    parser.add_argument("--predict", type=int, default=48, help="tokens each stream writes")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the long prompt; 0: no such test")
    parser.add_argument("--shorts", type=int, default=4, help="short requests while it is read")
    parser.add_argument("--delay", type=float, default=2.0, help="seconds before each of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18200)
    args = parser.parse_args()
    streams = [int(n) for n in args.streams.split(",") if n]
    slots = max([2, *streams])
    ctx = slots * max(args.long + 64, args.prompt + args.predict + 64)
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
                got[server.name] += measure(server, nth + 1)
        if not all(got.values()):
            return
        ours, theirs = (got[server.name] for server in servers)
        ratio = statistics.median(ours) / statistics.median(theirs)
        rows.append({"test": test, "mneme": ours, "llama.cpp": theirs, "ratio": ratio, "better": better})
        cell = lambda all: f"{statistics.median(all):.2f} {unit} [{min(all):.2f}, {max(all):.2f}]"
        print(f"| {test} | {cell(ours)} | {cell(theirs)} | {ratio:.3f} |", flush=True)

    print(f"{os.path.basename(args.model)}, {args.threads} threads, -np {slots}")
    print("| test | mneme | llama.cpp | ratio |\n| --- | ---: | ---: | ---: |")
    for server in servers:
        server.stream(server.prompt(99, 64), 8)
    for n in streams:
        row(f"{n} streams", "tokens/s", lambda s, nth, n=n: throughput(s, args, n, nth * 10 + n), args.rounds, "more")
    if args.long:
        name = f"first token beside a prompt of {args.long} tokens"
        row(name, "s", lambda s, nth: first_tokens(s, args, nth + 90), 1, "less")
    for server in servers:
        server.end()
    print(json.dumps({"model": os.path.basename(args.model), "threads": args.threads, "rows": rows}))


if __name__ == "__main__":
    main()
