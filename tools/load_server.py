#!/usr/bin/env python3
"""Loads `mneme serve` until something gives: streams, clients that leave, kills, hostile bytes.

Every stream must equal its solo run, memory must stay flat, no slot may stay busy, and a file that was
whole must stay whole. Ends with one JSON line; status 1 when a check failed. Standard library only.

    tools/load_server.py --mneme target/release/mneme -m model.gguf --seconds 300 --leave 1000 --kills 20
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

FAILED = []


def check(ok, what):
    print(("ok      " if ok else "FAILED  ") + what, flush=True)
    if not ok:
        FAILED.append(what)


class Server:
    def __init__(self, args, *flags):
        command = [args.mneme, "serve", "--port", "0", "-m", args.model, "-t", str(args.threads), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = None
        for line in self.process.stderr:
            if line.startswith("listening on "):
                self.port = int(line.rsplit(":", 1)[1])
            if line.startswith("ready"):
                break
        else:
            sys.exit("the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def ask(self, method, path, body=None, timeout=600):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        connection.request(method, path, body)
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        return reply.status, text

    def json(self, method, path, body=None):
        status, text = self.ask(method, path, body)
        assert status == 200, (status, text[:300])
        return json.loads(text)

    def stream(self, body):
        """Text, tokens written and the last event of a streamed completion."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", "/completion", json.dumps({**body, "stream": True}))
        reply = connection.getresponse()
        assert reply.status == 200, (reply.status, reply.read()[:300])
        text, last = "", {}
        for line in reply:
            if line.startswith(b"data: "):
                last = json.loads(line[6:])
                text += last.get("content", "")
        connection.close()
        return text, last.get("tokens_predicted"), last

    def memory(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))

    def idle_within(self, seconds):
        begin = time.monotonic()
        while any(slot["is_processing"] for slot in self.json("GET", "/slots")):
            if time.monotonic() - begin > seconds:
                return None
            time.sleep(0.01)
        return time.monotonic() - begin

    def end(self):
        self.process.terminate()
        return self.process.wait(30)


def request(i):
    """The i-th of 64 different requests: shared and own prefixes, greedy and sampled, short and long."""
    texts = ["Write a very long book.", "What is", "The sky is blue", "Hello"]
    return {
        "prompt": "A sentence that goes before. " * (i % 5 * 4) + texts[i % 4],
        "seed": i,
        "temperature": [0, 0.7, 1.3][i % 3],
        "n_predict": 8 + i % 17,
        "repeat_penalty": 1.1,
        "cache_prompt": i % 2 == 0,
    }


def streams(server, args):
    solo = [server.json("POST", "/completion", request(i)) for i in range(64)]
    until = time.monotonic() + args.seconds
    counts, wrong, memory = [0] * 64, [], []

    def client(i):
        while time.monotonic() < until:
            text, n, _ = server.stream(request(i))
            if text != solo[i]["content"] or n != solo[i]["tokens_predicted"]:
                wrong.append(i)
            counts[i] += 1

    def watch():
        while time.monotonic() < until:
            memory.append(server.memory())
            time.sleep(min(5, args.seconds / 10))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(client, i) for i in range(64)]:
            done.result()
    watcher.join()
    check(not wrong, f"{sum(counts)} streams in {args.seconds} s, 64 at a time, equal their solo runs")
    check(min(counts) * 3 >= max(counts), f"fair: each client got {min(counts)} to {max(counts)} answers")
    early, late = memory[len(memory) // 5], memory[-1]
    check(late <= early * 1.05 + 4, f"memory {early} MiB early, {late} MiB late")
    return {"streams": sum(counts), "wrong": len(wrong), "rss_early": early, "rss_late": late}


def leavers(server, args):
    chance = random.Random(1)

    def leave(i):
        body = {"prompt": "Once upon a time " * chance.randrange(1, 40), "n_predict": -1, "ignore_eos": True, "stream": i % 3 > 0}
        body = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            s.settimeout(chance.choice([0.001, 0.02, 0.2]))
            try:
                s.recv(1000)
            except TimeoutError:
                pass

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(leave, range(args.leave)))
    spent = server.idle_within(30)
    check(spent is not None, f"{args.leave} clients left, all slots idle after {spent} s")
    check(server.json("POST", "/completion", request(3))["tokens_predicted"] > 0, "and it answers")


def hostile(server, args):
    def status(path, body):
        return server.ask("POST", path, body)[0]

    check(status("/completion", b"{" + b" " * (100 << 20) + b"}") == 413, "a body of 100 MiB: 413")
    check(status("/completion", b"[" * 1_000_000) == 500, "a million brackets: 500")
    check(status("/v1/chat/completions", b'{"messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}") == 500, "nested 50,000 deep: 500")
    check(status("/completion", b'{"prompt":"\xff\xfe"}') == 500, "bytes that are no UTF-8: 500")
    for value in ["-1e999", "1e400", "99999999999999999999999", "-5", '"x"', "[]", "{}"]:
        got = status("/completion", '{"prompt":"x","n_predict":%s}' % value)
        check(got in (400, 500), f"n_predict {value}: {got}")
    slow = []
    for i in range(200):
        s = socket.create_connection(("127.0.0.1", server.port))
        s.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\n" + (b"Content-Length: 100\r\n\r\n{" if i % 2 else b""))
        slow.append(s)
    begin = time.monotonic()
    server.json("POST", "/completion", request(1))
    check(time.monotonic() - begin < 10, f"200 clients dawdle, another is answered in {time.monotonic() - begin:.2f} s")
    time.sleep(35)
    ended = 0
    for s in slow:
        s.settimeout(1)
        try:
            # Either a 408 or an end; never an open line without a word.
            ended += s.recv(1000) is not None
        except TimeoutError:
            pass
        s.close()
    check(ended == len(slow), f"{ended} of {len(slow)} of them were shown out within 35 s")
    check(server.idle_within(5) is not None, "no slot is busy")


def kills(args):
    chance = random.Random(2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "slot.bin")
        flags = ["-np", "2", "-c", str(args.context), "--slot-save-path", folder]
        server = Server(args, *flags)
        words = "word and another " * (args.context // 20)

        def fill(slot, n):
            body = {"prompt": words[: len(words) * n // 4], "id_slot": slot, "n_predict": 1}
            server.json("POST", "/completion", body)

        fill(0, 2)
        begin = time.monotonic()
        server.json("POST", "/slots/0?action=save", {"filename": "slot.bin"})
        spent = time.monotonic() - begin
        old = open(path, "rb").read()
        intact = whole = 0
        for _ in range(args.kills):
            fill(1, 3)

            def save():
                try:
                    server.ask("POST", "/slots/1?action=save", {"filename": "slot.bin"})
                except OSError:
                    pass
                except http.client.HTTPException:
                    pass

            saving = threading.Thread(target=save)
            saving.start()
            time.sleep(chance.random() * spent * 2)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            saving.join()
            now = open(path, "rb").read()
            intact += now == old
            server = Server(args, *flags)
            status, _ = server.ask("POST", "/slots/0?action=restore", {"filename": "slot.bin"})
            whole += status == 200
            old = now
        check(whole == args.kills, f"kill -9 while saving: {intact} of {args.kills} times the old file, else the new one; {whole} restored")
        server.end()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mneme", default="target/release/mneme")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-c", "--context", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--leave", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    server = Server(args, "-np", "4", "-c", str(args.context))
    result = streams(server, args)
    leavers(server, args)
    hostile(server, args)
    check(server.end() == 0, "SIGTERM ends it with status 0")
    kills(args)
    print(json.dumps({**result, "failed": FAILED}))
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
