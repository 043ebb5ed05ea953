#!/usr/bin/env python3
"""Writes NAME.gguf.cases.json beside every ggml-vocab-NAME.gguf of a folder: texts and llama.cpp's ids for them.

    python tools/vocab_cases.py FOLDER        # needs the llama-cpp-python package
    MNEME_VOCAB_DIR=FOLDER cargo test -p mneme-engine --test tokenizer

The vocabulary files come with the sources of llama.cpp (models/). Nothing here is needed to build or test without them.
"""

import json
import random
import sys
from pathlib import Path

import llama_cpp

SKIP = ("bert", "gemma-4")

HARD = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\n\n\n", "\t\n", " \n", "\n ", "\r\n", "\r\n\r\n", "a\r\nb", "\r", "a\rb",
    "Hello world", " Hello world", "Hello, world!", " Hello, world!", "HELLO", "hello  world", "hello   world",
    "a  b   c    d     e", "trailing   ", "   leading", "\u00a0nbsp\u00a0", "\u2003em\u2003\u2003space", "\u3000全角　空白",
    "0", "12", "123", "1234", "12345", "1234567890", "3.14159", "1,000,000", "v1.2.3-rc4", "٠١٢٣٤٥", "①②③", "½⅓", "x²",
    "I'm you're he'll we've they'd it's don't I'M YOU'RE HE'LL WE'VE 'S 'Tis ''quoted''", "o'clock '99 rock'n'roll",
    "你好，世界。这是一个测试！", "日本語のテキストです。カタカナとひらがな", "한국어 텍스트", "Привет, мир! Ёлка", "Γειά σου Κόσμε",
    "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "ไทยภาษา", "Việt Nam đẹp", "Ünïcödé ßtraße ŒUVRE",
    "😀", "😀😀", "👨‍👩‍👧‍👦", "🏳️‍🌈🇩🇪🇫🇷", "👍🏽", "a😀b", " 😀 ", "\u200b", "a\u200bb", "\ufeff", "\u202e", "\ufffd", "\U0010ffff",
    "\x00", "\x01\x02", "\x7f", "\x1b[31mred\x1b[0m", "\x85", "a\x0bb\x0cc",
    "def f(x):\n    return x**2  # square\n\n\nclass A:\n\tpass\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "<html><body class=\"x\">&nbsp;</body></html>", "https://example.com/a/b?c=d&e=f#g", "user@example.com",
    "{\"key\": [1, 2.5, null, true]}", "\\n \\t \\\\", "$x^2 + y_1 \\le \\frac{a}{b}$", "!!!???...---___***", "!@#$%^&*()",
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", "<|eot_id|><|eot_id|>",
    "<|begin_of_text|>x", " <s> </s> ", "[INST] hi [/INST]", "<0x0A>", "<0xFF>", "▁", "a▁b", "▁▁▁", " ▁ ", "Ġ", "ĠĊ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "=" * 200, " " * 100, "\n" * 50, "\t" * 30 + "x", "1" * 50, "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "ΐΰ ǆ ﬁ ﬀ", "Ω Å K", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟏𝟐𝟑", "क्‍ष", "한", "ǅ ǈ ᾼ", "ªº ʰʷ", "〇一二三", "ⅣⅫ", "௧௨௩",
]
# Decomposed text: llama.cpp leaves it as it is, a Qwen tokenizer composes it first.
DECOMPOSED = ["e\u0301", "cafe\u0301 re\u0301sume\u0301", "n\u0303 o\u0308 A\u030a", "\u0301", "x\u0301\u0302\u0303"]


def random_texts(n: int) -> list[str]:
    rng = random.Random(7)
    pool = list("abcdefghijklmnopqrstuvwxyzABC 0123456789    \n\n\t\r.,;:!?'\"()[]{}<>|/\\-_=+*&^%$#@~`") + [
        "the ", " of", "ing ", "'s", "'LL", "\r\n", "é", "ß", "ж", "中", "文", "한", "😀", "\u200d", "\u00a0", "\u3000", "\u00ad",
        "़", "ا", "٣", "²", "ǅ", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "▁", "\u2028", "\x00", "…", "—", "。", "！",
    ]
    return ["".join(rng.choice(pool) for _ in range(rng.randrange(1, 60))) for _ in range(n)]


def main() -> None:
    folder = Path(sys.argv[1])
    texts = HARD + random_texts(1500)
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        if any(s in path.name for s in SKIP):
            continue
        try:
            llm = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        except ValueError as error:
            print(f"{path.name}: {error}")
            continue
        cases = []
        for text in texts + DECOMPOSED:
            for add, parse in ((False, False), (True, True)):
                ids = llm.tokenize(text.encode(), add_bos=add, special=parse)
                cases.append({"text": text, "add_special": add, "parse_special": parse, "ids": ids})
        pieces = []
        for i in range(llm.n_vocab()):
            buf = (llama_cpp.ctypes.c_char * 512)()
            n = llama_cpp.llama_token_to_piece(llama_cpp.llama_model_get_vocab(llm.model), i, buf, 512, 0, True)
            pieces.append(list(bytes(buf)[: max(n, 0)]))
        vocab = llama_cpp.llama_model_get_vocab(llm.model)
        eog = [i for i in range(llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
        out = {"cases": cases, "pieces": pieces, "eog": eog}
        path.with_name(path.name + ".cases.json").write_text(json.dumps(out))
        print(f"{path.name}: {len(cases)} cases")


if __name__ == "__main__":
    main()
