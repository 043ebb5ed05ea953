"""The language of records: documents of uneven density with questions, drawn from records.json by a seed.

    python train/data.py generate --task single --facts 12 --filler 30 --n 5 --seed 1     JSONL on standard output
    python train/data.py tokenizer --out train/tokenizer                                  tokenizer.json and friends
"""

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORDS = json.loads((HERE / "records.json").read_text())
LISTS = RECORDS["lists"]
RELATIONS = {r["name"]: r for r in RECORDS["relations"]}
# The simple cases of what was bought and of who holds what: one thing to a person, one holder to a thing. The trainer
# teaches them first (a person or a thing as a value); no task of RECORDS["tasks"] draws them.
RELATIONS["own"] = {
    "name": "own", "key": RECORDS["own"]["owner"], "value": RECORDS["own"]["thing"],
    "fact": [t.format(owner="{key}", thing="{value}") for t in RECORDS["own"]["fact"]],
    "question": [t.format(owner="{key}") for t in RECORDS["own"]["list_question"]],
}
RELATIONS["track"] = {
    "name": "track", "key": RECORDS["track"]["thing"], "value": RECORDS["track"]["holder"],
    "fact": [t.format(holder="{value}", thing="{key}") for t in RECORDS["track"]["start"]],
    "question": [t.format(thing="{key}") for t in RECORDS["track"]["question"]],
}
# Lists any two of which make keys and values of bare statements, and the bare form in Chinese.
WORDS = ("person", "city", "trade", "animal", "word", "thing", "room", "colour", "event", "month")
CHINESE_WORDS = ("zh_person", "zh_city", "zh_thing", "zh_room")
CHINESE_TERSE = {"fact": "{key}{value}。", "question": "{key}呢？", "pair": "{key}和{key2}呢？"}
ENGLISH = ("home", "place", "date", "password", "trade", "pet", "colour")
CHINESE = ("zh_home", "zh_place")
TASKS = tuple(RECORDS["tasks"])


@dataclass
class Statement:
    """One sentence: `text`, where its value begins and ends inside it, and whether the value is told before it."""

    text: str
    kind: str  # "fact" or "filler"
    value: tuple = (0, 0)
    known: bool = False


@dataclass
class Record:
    """A document and its questions."""

    statements: list
    questions: list = field(default_factory=list)  # (question, answer)
    task: str = "single"
    chinese: bool = False

    def text(self):
        """The document as one string."""
        return ("" if self.chinese else " ").join(s.text for s in self.statements)

    def ends(self, kind):
        """Offsets in characters after each statement of a kind."""
        out, at = [], 0
        for s in self.statements:
            at += len(s.text)
            if s.kind == kind:
                out.append(at)
            at += 0 if self.chinese else 1
        return out


def statement(template, known=False, **words):
    """A fact from a template; its value is the last placeholder of the template."""
    last = max(words, key=lambda name: template.rfind("{" + name + "}"))
    before, _, after = template.rpartition("{" + last + "}")
    head = before.format(**words)
    text = head + words[last] + after.format(**words)
    return Statement(text, "fact", (len(head), len(head) + len(words[last])), known)


def filler(rng, chinese=False):
    """One sentence that says nothing a question asks for."""
    template = rng.choice(RECORDS["filler"]["zh" if chinese else "en"])
    out = []
    for part in template.split("{"):
        name, brace, rest = part.partition("}")
        out.append(rng.choice(LISTS[name]) + rest if brace else part)
    text = "".join(out)
    return Statement(text[0].upper() + text[1:], "filler")


def spread(rng, ordered, extra):
    """Merge sentences in their order with filler at random places, in bursts so that density is uneven."""
    gaps = [0] * (len(ordered) + 1)
    left = len(extra)
    while left:
        burst = min(left, rng.randint(1, 4))
        gaps[rng.randrange(len(gaps))] += burst
        left -= burst
    out, it = [], iter(extra)
    for gap, s in zip(gaps, [*ordered, None]):
        out += [next(it) for _ in range(gap)]
        if s is not None:
            out.append(s)
    return out


def bare(rng, chinese=False):
    """A relation between two lists of words drawn at random, told and asked in the bare form of a list only."""
    key, value = rng.sample(CHINESE_WORDS if chinese else WORDS, 2)
    form = CHINESE_TERSE if chinese else {**RECORDS["terse"], "pair": "And {key} and {key2}"}
    return {"name": "zh_bare" if chinese else "bare", "key": key, "value": value, "fact": [form["fact"]],
            "question": [form["question"]], "update": [form["fact"]], "pair": [form["pair"]]}


def several(rng, n_facts=8, n_filler=0, n_questions=4):
    """A document of bare statements with up to four values to a key; answers are all of them in their order."""
    relation = bare(rng)
    values = rng.sample(LISTS[relation["value"]], min(n_facts, len(LISTS[relation["value"]])))
    keys = rng.sample(LISTS[relation["key"]], rng.randint(max(2, len(values) // 3), max(3, len(values) // 2)))
    told, facts = {}, []
    for value in values:
        key = rng.choice([k for k in keys if len(told.get(k, ())) < 4])
        told.setdefault(key, []).append(value)
        facts.append(statement(relation["fact"][0], key=key, value=value))
    asked = [rng.choice(list(told)) for _ in range(n_questions)]
    questions = [(relation["question"][0].format(key=k), RECORDS["answer"]["join"].join(told[k])) for k in asked]
    return Record(spread(rng, facts, [filler(rng) for _ in range(n_filler)]), questions, "several")


def record(rng, task="single", n_facts=8, n_filler=6, n_questions=4, relations=ENGLISH, repeat=0.0, terse=0.0):
    """A document of about n_facts statements and n_filler sentences of filler, and n_questions about it.

    `repeat` is how often a statement returns later in other words (a fraction: for that share of them), `terse` the
    share told and asked in the bare form of a list. Questions are drawn with replacement.
    """
    relations = [r if isinstance(r, dict) else RELATIONS[r] for r in relations]
    chinese = relations[0]["name"].startswith("zh_")
    short = CHINESE_TERSE if chinese else RECORDS["terse"]
    facts, questions = [], []
    if task in ("multi_value", "aggregation"):
        own = RECORDS["own"]
        things = rng.sample(LISTS[own["thing"]], min(n_facts, len(LISTS[own["thing"]])))
        people = rng.sample(LISTS[own["owner"]], max(2, len(things) // 3))
        bought = {p: [] for p in people}
        for thing in things:
            owner = rng.choice([p for p in people if len(bought[p]) < 4])
            bought[owner].append(thing)
            facts.append(statement(rng.choice(own["fact"]), owner=owner, thing=thing))
        owners = [p for p in people if bought[p]]
        for _ in range(n_questions):
            p = rng.choice(owners)
            if task == "aggregation":
                q = rng.choice(own["count_question"])
                questions.append((q.format(owner=p), LISTS[own["count"]][len(bought[p]) - 1]))
            else:
                questions.append((rng.choice(own["list_question"]).format(owner=p), " and ".join(bought[p])))
    elif task == "tracking":
        track = RECORDS["track"]
        chains = max(1, n_facts // 3)
        holder, steps = {}, []
        for thing in rng.sample(LISTS[track["thing"]], chains):
            path = rng.sample(LISTS[track["holder"]], rng.randint(2, 4))
            moves = [statement(rng.choice(track["start"]), holder=path[0], thing=thing)]
            for a, b in zip(path, path[1:]):
                moves.append(statement(rng.choice(track["step"]), holder=a, thing=thing, next=b))
            holder[thing] = path[-1]
            steps.append(moves)
        while any(steps):
            facts.append(rng.choice([s for s in steps if s]).pop(0))
        for _ in range(n_questions):
            thing = rng.choice(list(holder))
            questions.append((rng.choice(track["question"]).format(thing=thing), holder[thing]))
    else:
        told, order = {}, []
        keys = {}
        while len(told) < n_facts:
            relation = rng.choice(relations)
            pool = keys.setdefault(relation["key"], rng.sample(LISTS[relation["key"]], len(LISTS[relation["key"]])))
            # Keys of several relations overlap in a multi_key text: few keys, several statements about each.
            few = pool[:max(2, n_facts // 2)] if task == "multi_key" else pool
            key = rng.choice(few)
            if (relation["name"], key) in told:
                if len(told) >= sum(len(LISTS[r["key"]]) for r in relations) // 2:
                    break
                continue
            told[relation["name"], key] = rng.choice(LISTS[relation["value"]])
            order.append((relation, key))
        tellings = [(r, k, told[r["name"], k], False, "fact") for r, k in order]
        later = []
        for r, k in order:
            if task == "update" and rng.random() < 0.5:
                told[r["name"], k] = rng.choice(LISTS[r["value"]])
                later.append((r, k, told[r["name"], k], False, "update"))
            else:
                for _ in range(int(repeat) + (rng.random() < repeat % 1)):
                    later.append((r, k, told[r["name"], k], True, "fact"))
        for item in later:  # anywhere after the first telling
            first = next(i for i, t in enumerate(tellings) if t[0] is item[0] and t[1] == item[1])
            tellings.insert(rng.randint(first + 1, len(tellings)), item)
        for r, k, v, known, form in tellings:
            template = short["fact"] if rng.random() < terse else rng.choice(r[form])
            facts.append(statement(template, known, key=k, value=v))
        for _ in range(n_questions):
            r, k = rng.choice(order)
            if task == "multi_query":
                same = [o for o in order if o[0] is r and o[1] != k]
                if same:
                    k2 = rng.choice(same)[1]
                    q = rng.choice(r["pair"]).format(key=k, key2=k2)
                    questions.append((q, told[r["name"], k] + " and " + told[r["name"], k2]))
                    continue
            template = short["question"] if rng.random() < terse else rng.choice(r["question"])
            questions.append((template.format(key=k), told[r["name"], k]))
    sentences = spread(rng, facts, [filler(rng, chinese) for _ in range(n_filler)])
    return Record(sentences, questions, task, chinese)


class Encoder:
    """Records to token ids with loss weights, sentence by sentence (the tokenizer never merges across them)."""

    def __init__(self, tokenizer, special_tokens=None):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        names = special_tokens or RECORDS["special_tokens"]
        found = [self.tokenizer.token_to_id(t) for t in names]
        if None in found:
            raise ValueError(f"{tokenizer}: no token {names[found.index(None)]!r}; set special_tokens = [end, user, assistant, pad]")
        self.end, self.user, self.assistant, self.pad = found
        self.cache = {}

    def ids(self, text):
        """Token ids of a piece of text, remembered."""
        found = self.cache.get(text)
        if found is None:
            found = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self.cache) < 500_000:
                self.cache[text] = found
        return found

    def encode(self, record, weight_other=0.03):
        """(ids, weights, marks): weights[t] counts the prediction *of* token t; marks[t] is 1 at the last token of a
        statement, 2 of filler, 3 at the first token of an answer, 4 at that of a value told again."""
        ids, weights, marks = [], [], []
        for i, s in enumerate(record.statements):
            text = s.text if record.chinese or i == 0 else " " + s.text
            offset = len(text) - len(s.text)
            if s.kind == "fact" and s.known:
                begin, end = s.value[0] + offset, s.value[1] + offset
                if text[begin - 1] == " ":
                    begin -= 1
                parts = [(text[:begin], weight_other), (text[begin:end], 1.0), (text[end:], weight_other)]
            else:
                parts = [(text, weight_other)]
            for part, weight in parts:
                piece = self.ids(part)
                ids += piece
                weights += [weight] * len(piece)
                marks += [4 if weight == 1.0 else 0] + [0] * (len(piece) - 1)
            marks[-1] = 1 if s.kind == "fact" else 2
        for question, answer in record.questions:
            piece = [self.user, *self.ids(question), self.assistant]
            ids += piece
            weights += [weight_other] * len(piece)
            marks += [0] * len(piece)
            piece = [*self.ids(answer if record.chinese else " " + answer), self.end]
            ids += piece
            weights += [1.0] * len(piece)
            marks += [3] + [0] * (len(piece) - 1)
        return ids, weights, marks


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|> {{ m['content'] }}<|end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pieces(text, words):
    """A Chinese text cut at the words of the lists: the splitting of Qwen2 takes a run of letters for one word, and
    without these cuts byte pairs would grow over the border between a key, what is said of it, and its value."""
    out, start, at = [], 0, 0
    longest = max(map(len, words))
    while at < len(text):
        found = next((text[at:at + n] for n in range(longest, 0, -1) if text[at:at + n] in words), None)
        if found:
            out += [text[start:at], found]
            start = at = at + len(found)
        else:
            at += 1
    return [piece for piece in (*out, text[start:]) if piece]


def train_tokenizer(out, vocab_size=2048, seed=0):
    """A byte-level BPE with Qwen2's splitting, trained on generated records; written as a Hugging Face tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    rng = random.Random(seed)
    texts = []
    chinese = {w for name, ws in LISTS.items() if name.startswith("zh_") for w in ws}
    for _ in range(6000):
        task = rng.choice(TASKS)
        relations = CHINESE if task in ("single", "repeat", "update", "multi_query") and rng.random() < 0.25 else ENGLISH
        r = record(rng, task, 12, 12, 4, relations)
        if r.chinese:
            for part in [s.text for s in r.statements] + [t for pair in r.questions for t in pair]:
                texts += pieces(part, chinese)
        else:
            texts.append(r.text() + "".join("\n" + q + " " + a for q, a in r.questions))
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = RECORDS["special_tokens"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "add_bos_token": False, "bos_token": None,
        "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": None, "clean_up_tokenization_spaces": False,
        "split_special_tokens": False, "errors": "replace", "model_max_length": 1048576,
        "chat_template": CHAT_TEMPLATE,
    }, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({
        "eos_token_id": tokenizer.token_to_id("<|end|>"), "pad_token_id": tokenizer.token_to_id("<|pad|>")}, indent=2) + "\n")
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(dest="command", required=True)
    g = sub.add_parser("generate")
    g.add_argument("--task", choices=TASKS, default="single")
    g.add_argument("--facts", type=int, default=8)
    g.add_argument("--filler", type=int, default=6)
    g.add_argument("--n", type=int, default=1)
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--chinese", action="store_true")
    t = sub.add_parser("tokenizer")
    t.add_argument("--out", default=str(HERE / "tokenizer"))
    t.add_argument("--vocab", type=int, default=2048)
    a = parser.parse_args()
    if a.command == "tokenizer":
        tokenizer = train_tokenizer(a.out, a.vocab)
        print(f"{a.out}: {tokenizer.get_vocab_size()} tokens")
        return
    for i in range(a.n):
        rng = random.Random(f"{a.seed}:{i}")
        r = record(rng, a.task, a.facts, a.filler, 1, CHINESE if a.chinese else ENGLISH, 0.5 if a.task == "repeat" else 0.0)
        (question, answer), = r.questions
        print(json.dumps({"text": r.text(), "question": question, "answer": answer, "task": a.task,
                          "facts": [s.text for s in r.statements if s.kind == "fact"],
                          "ends": r.ends("fact"), "filler_ends": r.ends("filler")}, ensure_ascii=False))


if __name__ == "__main__":
    main()
