#!/usr/bin/env python3
"""The page of `mneme serve` in headless Chromium: a long text is dropped, a question asked, and what the page
shows is compared with what the server says. On a desktop's width and on a phone's.

Talks to the browser over its debugging pipe; standard library only. Without a browser it says so and ends with
status 0 (skipped). Ends with status 1 when a check failed. `--shots DIR` keeps screenshots.

    tools/page_check.py --mneme target/release/mneme -m models/mneme-records.gguf --shots /tmp/shots
"""

import argparse
import base64
import http.client
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --disable-default-apps --hide-scrollbars "
    "--remote-debugging-pipe"
).split()
FAILED = []


def check(ok, what):
    print(("ok      " if ok else "FAILED  ") + what, flush=True)
    if not ok:
        FAILED.append(what)


class Browser:
    """Chromium, spoken to in JSON messages that end in a zero byte, on its file descriptors 3 and 4."""

    def __init__(self, program, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def ends():
            # 3 and 4 may be in the way of each other: both first go elsewhere.
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        command = [program, *QUIET, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=ends, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.read_end, self.write_end = ours_in, ours_out
        self.buffer, self.n, self.events, self.session = b"", 0, [], None

    def message(self, deadline):
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.read_end], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self.read_end, 1 << 20)
            if not part:
                raise EOFError("the browser has gone")
            self.buffer += part
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, _timeout=60, **params):
        self.n += 1
        body = {"id": self.n, "method": method, "params": params}
        if self.session:
            body["sessionId"] = self.session
        os.write(self.write_end, json.dumps(body).encode() + b"\0")
        deadline = time.monotonic() + _timeout
        while True:
            got = self.message(deadline)
            if got.get("id") == self.n:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            self.events.append(got)

    def page(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "DOM", "Log"]:
            self.call(domain + ".enable")

    def js(self, text):
        got = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"{text}: {got['exceptionDetails']}")
        return got["result"].get("value")

    def until(self, text, what, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.js(text):
                return True
            time.sleep(0.1)
        check(False, f"{what} within {seconds} s")
        return False

    def size(self, width, height, phone):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def go(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && typeof about === 'function'", "the page")

    def key(self, name, code, text=None, modifiers=0):
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def shot(self, folder, name):
        if folder:
            data = self.call("Page.captureScreenshot", format="png")["data"]
            (Path(folder) / name).write_bytes(base64.b64decode(data))

    def complaints(self):
        """What the page's console and the browser's log complained about."""
        out = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                out.append(str(params["exceptionDetails"].get("exception", {}).get("description")))
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                out.append(params["entry"]["text"])
            elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
                out.append(str(params["args"]))
        return out

    def end(self):
        self.process.terminate()
        self.process.wait(30)


class Server:
    def __init__(self, args):
        command = [args.mneme, "serve", "--port", "0", "-m", args.model, "-t", str(args.threads), "-np", "2", *args.flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = None
        for line in self.process.stderr:
            if line.startswith("listening on "):
                self.port = int(line.rsplit(":", 1)[1])
            if line.startswith("ready"):
                return
        sys.exit(f"the server ended with status {self.process.wait()}: {' '.join(command)}")

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        reply = connection.getresponse()
        return json.loads(reply.read())

    def end(self):
        self.process.terminate()
        self.process.wait(30)


def records(n):
    """Filler with facts in between, in the manner of the trained model's records."""
    people = "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas".split()
    places = "Oslo Paris Rome Lima Cairo Delhi Tokyo Quito Sofia Dakar".split()
    out = []
    for i in range(n):
        out.append(f"{people[i % 10]} lives in {places[(i * 7) % 10]}.")
        out.append("The weather was calm and nothing much happened that day, so people went on with what they did.")
    return " ".join(out)


def rgb_count(browser):
    return browser.js(
        "new Set([...document.querySelectorAll('#segments .seg')].map(s => getComputedStyle(s).borderLeftColor)).size"
    )


def ask(browser, server, question, text_file, name, args):
    """Drops a file, asks, and compares the panel with the server's own numbers."""
    if text_file:
        body = json.dumps(Path(text_file).read_text())
        # A drop as the page's listener gets it: a DataTransfer with a file.
        browser.js(
            "(() => { const t = new DataTransfer(); t.items.add(new File([%s], 'records.txt', {type: 'text/plain'}));"
            "document.dispatchEvent(new DragEvent('dragover', {dataTransfer: t, bubbles: true, cancelable: true}));"
            "document.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true})); })()" % body
        )
        browser.until("document.querySelectorAll('#files .chip').length === 1", "the dropped file's chip")
        browser.shot(args.shots, f"{name}-dropped.png")
    browser.js("document.getElementById('input').focus()")
    browser.call("Input.insertText", text=question)
    before = browser.js("document.querySelectorAll('#log .turn').length")
    browser.key("Enter", 13, "\r")
    browser.until(f"document.querySelectorAll('#log .turn').length === {before + 2}", "the question in the conversation")
    browser.until("document.getElementById('stop').hidden && running === null", "the end of the answer", 180)
    # The panel is drawn once more when the answer has ended.
    time.sleep(0.6)
    said = browser.js("document.querySelector('#log .turn:last-child .what').textContent")
    check(bool(said.strip()), f"{name}: an answer ({said.strip()[:60]!r})")
    slot = max((s for s in server.get("/slots") if "id_task" in s), key=lambda s: s["id_task"])
    memory = server.get(f"/slots/{slot['id']}/memory")
    stats = memory["stats"]
    shown = browser.js("document.getElementById('mem-numbers').textContent")
    check(browser.js(f"count({stats['nodes']})") in shown, f"{name}: the panel shows {stats['nodes']} nodes")
    held = browser.js("[document.getElementById('mem-bytes').textContent, document.getElementById('mem-full-bytes').textContent]")
    want = [browser.js(f"bytes({stats[k]})") for k in ("bytes", "full_bytes")]
    check(held == want, f"{name}: held {held[0]} against {held[1]} of a full cache")
    n_nodes = len(memory["nodes"])
    n_shown = browser.js("document.querySelectorAll('#segments .seg').length")
    check(n_shown >= min(n_nodes, 200), f"{name}: {n_shown} segments shown of {n_nodes} nodes")
    stripes = browser.js("document.querySelectorAll('#map span').length")
    check(stripes >= n_nodes, f"{name}: {stripes} stripes of the whole text")
    if n_nodes > 3:
        check(rgb_count(browser) > 3, f"{name}: segments have {rgb_count(browser)} colours")


def fits(browser, name):
    wide = browser.js("document.documentElement.scrollWidth > window.innerWidth")
    check(not wide, f"{name}: nothing is wider than the screen")
    # What a finger or a screen reader meets: a name, and a size that can be hit.
    nameless = browser.js(
        "[...document.querySelectorAll('button, input, textarea, a')].filter(e => e.checkVisibility() && !("
        "e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"
    )
    check(nameless == [], f"{name}: every control has a name {nameless or ''}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mneme", default="target/release/mneme")
    parser.add_argument("-m", "--model", default="models/mneme-records.gguf")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--browser", default=os.environ.get("CHROMIUM"), help="else the first of " + ", ".join(BROWSERS))
    parser.add_argument("--text", help="file to drop, else made-up records")
    parser.add_argument("--question", default="Where does Clara live?")
    parser.add_argument("--sentences", type=int, default=150)
    parser.add_argument("--shots", help="folder for screenshots")
    parser.add_argument("flags", nargs="*", help="further flags of mneme serve, after --")
    args = parser.parse_args()
    program = args.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        print(f"skipped: no browser ({', '.join(BROWSERS)}); CHROMIUM or --browser may name one")
        return
    if args.shots:
        Path(args.shots).mkdir(parents=True, exist_ok=True)
    server = Server(args)
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    browser = Browser(program, folder.name)
    text = args.text or str(Path(folder.name) / "records.txt")
    if not args.text:
        Path(text).write_text(records(args.sentences))
    try:
        browser.page()
        for name, width, height, phone in [("desktop", 1280, 800, False), ("phone", 390, 844, True)]:
            browser.size(width, height, phone)
            browser.go(f"http://127.0.0.1:{server.port}/")
            browser.until("document.getElementById('model').textContent !== ''", "the model's name")
            browser.shot(args.shots, f"{name}-start.png")
            fits(browser, name)
            browser.js("document.getElementById('new-chat').click()")
            ask(browser, server, args.question, text, name, args)
            fits(browser, name + " with an answer")
            browser.shot(args.shots, f"{name}-answer.png")
            if phone:
                browser.js("document.getElementById('show-memory').click()")
                visible = browser.js("document.getElementById('memory').checkVisibility()")
                check(visible, "phone: the memory panel opens")
                browser.shot(args.shots, "phone-memory.png")
                browser.key("Escape", 27)
                check(not browser.js("document.getElementById('memory').checkVisibility()"), "phone: Escape closes the panel")
                browser.js("document.getElementById('show-chats').click()")
                browser.shot(args.shots, "phone-chats.png")
                browser.js("document.getElementById('show-chats').click()")
        # What was said is still there after a reload, and can be taken away.
        kept = browser.js("document.querySelectorAll('#log .turn').length")
        browser.go(f"http://127.0.0.1:{server.port}/")
        check(browser.js("document.querySelectorAll('#log .turn').length") == kept, "a reload keeps the conversation")
        check(browser.js("document.querySelectorAll('#chat-list li').length") >= 2, "both conversations are listed")
        # A keyboard alone reaches everything: tab from the top to the message field.
        browser.js("document.activeElement.blur(); window.scrollTo(0, 0)")
        seen = set()
        for _ in range(40):
            browser.key("Tab", 9)
            seen.add(browser.js("document.activeElement.id"))
        for control in ["input", "send", "show-settings"]:
            check(control in seen, f"Tab reaches #{control}")
        # Markdown becomes elements, HTML stays text.
        browser.js("fill(document.querySelector('#log .turn:last-child .what'), {role: 'assistant', content: "
                   "'# T\\n\\n**b** `c` <img src=x onerror=alert(1)>\\n\\n```\\nx\\n```\\n\\n- a\\n- b\\n\\n|a|b|\\n|-|-|\\n|1|2|'})")
        drawn = browser.js("['h3', 'strong', 'code', 'pre', 'li', 'td', 'img'].map(n => document.querySelector('#log .turn:last-child .what ' + n) !== null)")
        check(drawn == [True] * 6 + [False], f"Markdown is drawn, HTML is not {drawn}")
        # Settings open, and close by Escape.
        browser.js("document.getElementById('show-settings').click()")
        check(browser.js("document.getElementById('settings').open"), "settings open")
        browser.shot(args.shots, "phone-settings.png")
        browser.key("Escape", 27)
        check(browser.until("!document.getElementById('settings').open", "settings closed", 5), "Escape closes settings")
        # Stop ends an answer at once.
        browser.size(1280, 800, False)
        browser.js("document.getElementById('new-chat').click(); settings.max_tokens = '2000'")
        browser.call("Input.insertText", text="Go on and on.")
        browser.key("Enter", 13, "\r")
        browser.until("running !== null || document.querySelectorAll('#log .turn').length === 2", "an answer that runs")
        browser.js("stop()")
        browser.until("running === null", "the end after stop", 10)
        time.sleep(0.5)
        check(all(not s["is_processing"] for s in server.get("/slots")), "no slot is busy after stop")
        complaints = browser.complaints()
        check(complaints == [], f"the console is silent {complaints or ''}")
    finally:
        browser.end()
        server.end()
        folder.cleanup()
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
