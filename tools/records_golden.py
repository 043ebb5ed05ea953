#!/usr/bin/env python3
"""Writes cli/tests/records.jsonl from train/data.py: what the Rust generator must give for the same seeds.

    tools/records_golden.py            write it
    tools/records_golden.py --check    fail if data.py or records.json would write something else

To be run whenever the language of records changes; needs nothing but Python.
"""

import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "train"))

from data import CHINESE, ENGLISH, TASKS, record  # noqa: E402

OUT = ROOT / "cli" / "tests" / "records.jsonl"


def row(task, n_facts, n_filler, seed, chinese=False, n_questions=1, terse=0.0):
    """One document, as the test reads it."""
    repeat = 0.5 if task == "repeat" else 0.0
    rng = random.Random(seed)
    r = record(rng, task, n_facts, n_filler, n_questions, CHINESE if chinese else ENGLISH, repeat, terse)
    return {"seed": seed, "task": task, "n_facts": n_facts, "n_filler": n_filler, "chinese": chinese, "repeat": repeat,
            "terse": terse, "text": r.text(), "questions": [list(q) for q in r.questions],
            "ends": r.ends("fact"), "filler_ends": r.ends("filler")}


def rows():
    """Every task twice, both languages, large counts, terse forms."""
    for task in TASKS:
        yield row(task, 3, 2, "1:0")
        yield row(task, 12, 9, "eval:990001:1", n_questions=4)
        if task in ("single", "repeat", "update", "multi_query"):
            yield row(task, 5, 4, "3:2", chinese=True, n_questions=2)
            yield row(task, 8, 3, "4:0", n_questions=5, terse=0.5)
    yield row("single", 140, 3, "5:0")
    yield row("tracking", 60, 0, "5:1")


def main():
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows())
    if "--check" in sys.argv[1:]:
        if OUT.read_text(encoding="utf-8") != text:
            sys.exit(f"{OUT.relative_to(ROOT)} is not what train/data.py writes now: run tools/records_golden.py and "
                     "make cli/src/eval/records.rs agree")
        return
    OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
