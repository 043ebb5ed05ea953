// Chat page of mneme. Text from the model or from files only ever becomes text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const FIELDS = ["temperature", "top_p", "top_k", "min_p", "seed", "max_tokens"];

function el(name, attrs = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attrs)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// ---- what the browser keeps ----

function load(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem("mneme." + key)) ?? fallback;
  } catch {
    return fallback;
  }
}

function store(key, value) {
  try {
    localStorage.setItem("mneme." + key, JSON.stringify(value));
  } catch (e) {
    say("This browser's storage is full: the conversation is not kept. (" + e.name + ")");
  }
}

let settings = load("settings", {});
let chats = load("chats", []);
let current = null;
let running = null;
let files = [];

function keep() {
  store("chats", chats.filter((chat) => chat.turns.length));
}

// ---- Markdown ----

const SAFE_LINK = /^(https?:|mailto:)/i;

/** Inline Markdown to nodes. */
function inline(text) {
  const out = [];
  const rules = [
    [/`+/, null],
    [/\*\*([^*]+?)\*\*|__([^_]+?)__/, (m) => el("strong", {}, ...inline(m[1] ?? m[2]))],
    [/\*([^*\s][^*]*?)\*/, (m) => el("em", {}, ...inline(m[1]))],
    [/~~([^~]+?)~~/, (m) => el("del", {}, ...inline(m[1]))],
    [/\[([^\]]+)\]\(([^)\s]+)\)/, (m) => SAFE_LINK.test(m[2])
      ? el("a", { href: m[2], rel: "noopener noreferrer", target: "_blank" }, ...inline(m[1]))
      : document.createTextNode(m[0])],
    [/https?:\/\/[^\s<>"')\]]+/, (m) => el("a", { href: m[0], rel: "noopener noreferrer", target: "_blank" }, m[0])],
  ];
  while (text) {
    let best = null;
    for (const [pattern, make] of rules) {
      let m = pattern.exec(text);
      if (m && make === null) {
        const end = text.indexOf(m[0], m.index + m[0].length);
        if (end < 0) m = null;
        else {
          const body = text.slice(m.index + m[0].length, end);
          m = Object.assign([text.slice(m.index, end + m[0].length)], { index: m.index, body });
        }
      }
      if (m && (!best || m.index < best.m.index)) best = { m, make };
    }
    if (!best) {
      out.push(document.createTextNode(text));
      break;
    }
    const { m, make } = best;
    if (m.index) out.push(document.createTextNode(text.slice(0, m.index)));
    out.push(make ? make(m) : el("code", {}, m.body.trim() || m.body));
    text = text.slice(m.index + m[0].length);
  }
  return out;
}

/** Markdown to a fragment. */
function markdown(text) {
  const root = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  const item = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/;
  while (at < lines.length) {
    const line = lines[at];
    let m;
    if ((m = /^\s*(```+|~~~+)\s*(\S*)/.exec(line))) {
      const body = [];
      at++;
      while (at < lines.length && !lines[at].trim().startsWith(m[1])) body.push(lines[at++]);
      at++;
      root.append(el("pre", { tabindex: "0" }, el("code", {}, body.join("\n"))));
    } else if ((m = /^(#{1,6})\s+(.*)$/.exec(line))) {
      root.append(el("h" + Math.min(6, m[1].length + 2), {}, ...inline(m[2])));
      at++;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      root.append(el("hr"));
      at++;
    } else if (/^\s*>/.test(line)) {
      const body = [];
      while (at < lines.length && /^\s*>/.test(lines[at])) body.push(lines[at++].replace(/^\s*> ?/, ""));
      root.append(el("blockquote", {}, markdown(body.join("\n"))));
    } else if (item.test(line)) {
      at = list(root, lines, at, item);
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "")) {
      const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
      const head = el("tr", {}, ...cells(line).map((c) => el("th", {}, ...inline(c))));
      const body = el("tbody");
      at += 2;
      while (at < lines.length && lines[at].includes("|")) {
        body.append(el("tr", {}, ...cells(lines[at++]).map((c) => el("td", {}, ...inline(c)))));
      }
      root.append(el("table", {}, el("thead", {}, head), body));
    } else if (!line.trim()) {
      at++;
    } else {
      const body = [line];
      at++;
      while (at < lines.length && lines[at].trim() && !/^(\s*(```|~~~|>)|#{1,6}\s)/.test(lines[at]) && !item.test(lines[at])) {
        body.push(lines[at++]);
      }
      root.append(el("p", {}, ...body.flatMap((l, i) => (i ? [el("br"), ...inline(l)] : inline(l)))));
    }
  }
  return root;
}

function list(root, lines, at, item) {
  const first = item.exec(lines[at]);
  const depth = first[1].length;
  const ordered = /\d/.test(first[2]);
  const node = el(ordered ? "ol" : "ul", ordered ? { start: parseInt(first[2], 10) } : {});
  while (at < lines.length) {
    const m = item.exec(lines[at]);
    if (!m || m[1].length < depth) break;
    if (m[1].length > depth && node.lastChild) {
      at = list(node.lastChild, lines, at, item);
      continue;
    }
    node.append(el("li", {}, ...inline(m[3])));
    at++;
  }
  root.append(node);
  return at;
}

// ---- conversation ----

function say(text) {
  $("status").textContent = text;
}

function title(chat) {
  const first = chat.turns.find((turn) => turn.role === "user");
  return (first?.shown ?? first?.content ?? "New chat").slice(0, 60) || "New chat";
}

function turnNode(turn) {
  const what = el("div", { class: "what" });
  const node = el("article", { class: "turn " + turn.role, "aria-label": turn.role }, el("div", { class: "who" }, turn.role === "user" ? "You" : "mneme"), what);
  fill(what, turn);
  return node;
}

function fill(what, turn) {
  what.replaceChildren();
  if (turn.role === "user") {
    what.append(turn.shown ?? turn.content);
    for (const file of turn.files ?? []) what.append(el("div", { class: "dim" }, `${file.name}, ${bytes(file.size)}`));
    return;
  }
  if (turn.thoughts) what.append(el("details", { open: !turn.content }, el("summary", {}, "Thoughts"), markdown(turn.thoughts)));
  if (turn.content) what.append(markdown(turn.content));
  if (turn.error) what.append(el("p", { class: "error", role: "alert" }, turn.error));
}

function show() {
  const empty = el("p", { class: "empty dim" }, "Ask something, or drop a long text here. The memory panel shows how it is cut into segments, and what is kept of them.");
  $("log").replaceChildren(...(current.turns.length ? current.turns.map(turnNode) : [empty]));
  $("log").scrollTop = $("log").scrollHeight;
  $("chat-list").replaceChildren(...chats.map((chat) => el("li", {},
    el("button", { class: "open", type: "button", "aria-current": chat === current ? "true" : false, onclick: () => open(chat) }, title(chat)),
    el("button", { type: "button", "aria-label": "Delete: " + title(chat), onclick: () => remove(chat) }, "×"))));
}

function open(chat) {
  stop();
  current = chat;
  $("chats").classList.remove("open");
  $("show-chats").setAttribute("aria-expanded", "false");
  show();
  $("input").focus();
}

function fresh() {
  const empty = chats.find((chat) => !chat.turns.length);
  const chat = empty ?? { id: Date.now().toString(36), turns: [] };
  if (!empty) chats.unshift(chat);
  open(chat);
}

function remove(chat) {
  stop();
  chats = chats.filter((other) => other !== chat);
  keep();
  if (chat !== current) show();
  else if (chats.length) open(chats[0]);
  else fresh();
}

// ---- the server ----

function headers() {
  const out = { "Content-Type": "application/json" };
  if (settings.key) out.Authorization = "Bearer " + settings.key;
  return out;
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? response.statusText);
  return body;
}

function request(turns) {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const body = { messages, stream: true, return_progress: true, stream_options: { include_usage: true } };
  for (const name of FIELDS) {
    const value = parseFloat(settings[name]);
    if (Number.isFinite(value)) body[name] = value;
  }
  if (settings.memory) body.memory = settings.memory;
  return body;
}

/** Values of `data:` lines as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function send() {
  const text = $("input").value.trim();
  if (running || (!text && !files.length)) return;
  const turn = { role: "user", content: text };
  if (files.length) {
    // A file is a context: a memory that compresses contexts does so once, to every other one it is text.
    const parts = files.flatMap((file) => [{ type: "text", text: `File ${file.name}:` }, { type: "context", text: file.text }]);
    turn.content = [...parts, { type: "text", text }];
    turn.shown = text;
    turn.files = files.map(({ name, text: body }) => ({ name, size: body.length }));
  }
  files = [];
  showFiles();
  $("input").value = "";
  const chat = current;
  chat.turns.push(turn);
  const answer = { role: "assistant", content: "", thoughts: "" };
  const body = request(chat.turns);
  chat.turns.push(answer);
  show();
  const what = $("log").lastElementChild.querySelector(".what");
  what.classList.add("busy");
  const abort = new AbortController();
  running = abort;
  busy(true);
  let drawn = 0;
  const draw = (force) => {
    const now = performance.now();
    if (!force && now - drawn < 60) return;
    drawn = now;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    fill(what, answer);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  const watch = setInterval(memory, 1500);
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: abort.signal });
    if (!response.ok) {
      const error = (await response.json().catch(() => ({}))).error;
      throw new Error(error?.message ?? response.statusText);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const progress = event.prompt_progress;
      if (progress) say(`Reading: ${progress.processed} of ${progress.total} tokens`);
      const delta = event.choices?.[0]?.delta ?? {};
      answer.content += delta.content ?? "";
      answer.thoughts += delta.reasoning_content ?? "";
      if (delta.content || delta.reasoning_content) {
        if (!progress) say("Writing");
        draw(false);
      }
      if (event.timings) {
        const t = event.timings;
        const known = t.cache_n ? ` (${count(t.cache_n)} known before)` : "";
        const speed = t.predicted_n > 1 ? `, ${count(Math.round(t.predicted_per_second))} tokens/s` : "";
        say(`read ${count(t.prompt_n)} in ${(t.prompt_ms / 1000).toFixed(1)} s${known}, wrote ${count(t.predicted_n)}${speed}`);
        if (t.memory) numbers(t.memory);
      }
    }
  } catch (e) {
    if (abort.signal.aborted) say("Stopped");
    else answer.error = e.message;
  } finally {
    clearInterval(watch);
    running = null;
    busy(false);
    what.classList.remove("busy");
    draw(true);
    keep();
    if (current === chat) show();
    memory();
  }
}

function stop() {
  running?.abort();
}

function busy(yes) {
  $("stop").hidden = !yes;
  $("send").disabled = yes;
}

// ---- files ----

function showFiles() {
  $("files").replaceChildren(...files.map((file) => el("span", { class: "chip" }, `${file.name}, ${bytes(file.text.length)}`,
    el("button", { type: "button", "aria-label": "Remove " + file.name, onclick: () => {
      files = files.filter((other) => other !== file);
      showFiles();
    } }, "×"))));
}

async function addFiles(all) {
  for (const file of all) {
    const text = new TextDecoder("utf-8").decode(await file.arrayBuffer());
    if (text.includes("\u0000")) say(`${file.name} is no text`);
    else files.push({ name: file.name, text });
  }
  showFiles();
  $("input").focus();
}

// ---- memory ----

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let i = 0;
  for (; n >= 1024 && i < 3; i++) n /= 1024;
  return `${i ? n.toFixed(1) : n} ${units[i]}`;
}

/** A number as people here write it. */
function count(n) {
  return n.toLocaleString();
}

function numbers(m) {
  const most = Math.max(m.bytes, m.full_bytes, 1);
  $("mem-now").value = m.bytes / most;
  $("mem-full").value = m.full_bytes / most;
  $("mem-bytes").textContent = bytes(m.bytes);
  $("mem-full-bytes").textContent = bytes(m.full_bytes);
  const times = m.bytes ? m.full_bytes / m.bytes : 1;
  $("mem-less").textContent = times >= 1.05 ? `${times.toFixed(times < 10 ? 1 : 0)} times less than a full cache` : "";
  const rows = { tokens: count(m.n_tokens), "cells per layer": count(m.cells), "tokens let go": count(m.dropped), nodes: count(m.nodes) };
  if (m.rate) rows["tokens per node slot"] = m.rate.toFixed(2);
  if (m.rate_spread) rows["spread of segments"] = m.rate_spread.toFixed(2);
  if (m.longest_segment) rows["longest segment"] = m.longest_segment;
  if (m.tau != null) rows.tau = m.tau.toFixed(3);
  $("mem-numbers").replaceChildren(...Object.entries(rows).flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, String(v))]));
}

let looking = false;

/** Looks at the slot that worked last. */
async function memory() {
  if (looking || document.hidden) return;
  looking = true;
  try {
    const slots = await get("slots");
    const slot = slots.filter((s) => s.id_task != null).sort((a, b) => b.is_processing - a.is_processing || b.id_task - a.id_task)[0];
    if (!slot) return;
    const view = await get(`slots/${slot.id}/memory?text`);
    $("mem-spec").textContent = `${view.memory}, slot ${slot.id}`;
    numbers(view.stats);
    segments(view);
  } catch (e) {
    $("mem-spec").textContent = e.message;
  } finally {
    looking = false;
  }
}

/** A colour that neighbours do not share. */
function colour(n) {
  return `hsl(${Math.round(n.id * 137.5) % 360} 60% 50%)`;
}

function segments(view) {
  const shown = view.nodes.slice(-200);
  const cut = (text) => (text.length > 240 ? text.slice(0, 110) + " … " + text.slice(-110) : text);
  const node = (n) => {
    const more = [];
    if (n.level) more.push("level " + n.level);
    if (n.children?.length) more.push("of " + n.children.length);
    if (n.p != null) more.push("p " + n.p.toFixed(2));
    const about = el("div", { class: "about" }, el("b", {}, `${n.start}–${n.end}`), more.join(", "), el("span", {}, `${count(n.end - n.start)} tokens, ${bytes(n.bytes)}`));
    const seg = el("div", { class: "seg", role: "listitem", id: "seg-" + n.id }, about, el("div", {}, cut(n.text ?? "")));
    seg.style.borderColor = colour(n);
    return seg;
  };
  const all = shown.map(node);
  if (view.nodes.length > shown.length) all.unshift(el("div", { class: "dim", role: "listitem" }, `${view.nodes.length - shown.length} earlier ones`));
  const open = view.tail ? view.n_tokens - view.tail.start : 0;
  if (open > 0) {
    const about = el("div", { class: "about" }, el("b", {}, `${view.tail.start}–${view.n_tokens}`), view.nodes.length ? "word for word" : "all word for word", el("span", {}, `${open} tokens`));
    all.push(el("div", { class: "seg", role: "listitem" }, about, el("div", {}, cut(view.tail.text))));
  }
  $("segments").replaceChildren(...all);
  map(view, open);
}

/** The whole text, line by line: a stripe for each node, as wide as its text; what is kept word for word is grey. */
function map(view, open) {
  const bar = $("map");
  bar.hidden = !view.nodes.length;
  bar.setAttribute("aria-label", `${view.nodes.length} nodes stand for ${view.n_tokens - open} tokens; ${open} tokens are kept word for word`);
  const lines = Math.min(8, Math.ceil(view.nodes.length / 24));
  const stripe = (tokens, title, paint, go) => {
    const part = el("span", { title, onclick: go });
    part.style.flex = `0 1 ${((100 * lines * tokens) / view.n_tokens).toFixed(3)}%`;
    part.style.background = paint;
    return part;
  };
  const parts = view.nodes.map((n) => stripe(n.end - n.start, `${n.start}–${n.end}`, colour(n), () =>
    document.getElementById("seg-" + n.id)?.scrollIntoView({ block: "nearest" })));
  if (open > 0) parts.push(stripe(open, "word for word", "var(--line)", () => $("segments").lastElementChild?.scrollIntoView({ block: "nearest" })));
  bar.replaceChildren(...parts);
}

// ---- start ----

function settingsDialog() {
  for (const name of [...FIELDS, "system", "memory", "key"]) $("s-" + name).value = settings[name] ?? "";
  $("settings").showModal();
}

function saveSettings() {
  for (const name of [...FIELDS, "system", "memory", "key"]) settings[name] = $("s-" + name).value.trim();
  store("settings", settings);
  about();
}

async function about() {
  try {
    const props = await get("props");
    $("model").textContent = props.model_alias.split("/").pop().replace(/\.gguf$/, "");
    $("model").title = props.model_path;
    $("memories").replaceChildren(...props.memory.available.map((m) => el("option", { value: m.name }, m.about)));
    $("s-memory").placeholder = props.memory.default;
    const params = props.default_generation_settings.params;
    for (const name of FIELDS) $("s-" + name).placeholder = params[name] === 4294967295 ? "random" : params[name] ?? "";
    say("");
  } catch (e) {
    say(e.message);
  }
}

function toggle(button, panel) {
  const opened = $(panel).classList.toggle("open");
  $(button).setAttribute("aria-expanded", String(opened));
}

$("form").addEventListener("submit", (e) => {
  e.preventDefault();
  send();
});
$("input").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (e) => {
  if (e.key !== "Escape" || $("settings").open) return;
  for (const [button, panel] of [["show-chats", "chats"], ["show-memory", "memory"]]) {
    if (!$(panel).classList.contains("open")) continue;
    toggle(button, panel);
    $(button).focus();
    return;
  }
  stop();
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", fresh);
$("show-chats").addEventListener("click", () => toggle("show-chats", "chats"));
$("show-memory").addEventListener("click", () => toggle("show-memory", "memory"));
$("show-settings").addEventListener("click", settingsDialog);
$("settings").addEventListener("close", saveSettings);
$("file").addEventListener("change", (e) => {
  addFiles([...e.target.files]);
  e.target.value = "";
});
document.addEventListener("dragover", (e) => {
  e.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (e) => {
  if (!e.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (e) => {
  e.preventDefault();
  $("drop").hidden = true;
  addFiles([...e.dataTransfer.files]);
});

if (chats.length) open(chats[0]);
else fresh();
about();
memory();
