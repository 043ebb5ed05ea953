#!/usr/bin/env python3
"""Writes sampler_cases.json: settings, logits and what llama.cpp's sampler chain makes of them (candidates and draws).

    python tools/sampler_cases.py ggml-vocab-qwen2.gguf OUT/sampler_cases.json     # needs llama-cpp-python
    MNEME_SAMPLER_CASES=OUT/sampler_cases.json MNEME_VOCAB_DIR=FOLDER cargo test -p mneme-engine --test sampler
"""

import ctypes
import json
import random
import sys

import llama_cpp as L

ORDER = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
DEFAULTS = dict(
    temperature=0.8, dynatemp_range=0.0, dynatemp_exponent=1.0, top_k=40, top_p=0.95, min_p=0.05, typical_p=1.0, top_n_sigma=-1.0,
    xtc_probability=0.0, xtc_threshold=0.1, min_keep=0, repeat_last_n=64, repeat_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, dry_multiplier=0.0, dry_base=1.75, dry_allowed_length=2, dry_penalty_last_n=64,
    dry_sequence_breakers=["\n", ":", '"', "*"], mirostat=0, mirostat_tau=5.0, mirostat_eta=0.1, samplers=ORDER, seed=42, logit_bias=[])

SETTINGS = [
    {}, {"temperature": 0.0}, {"temperature": 2.5}, {"top_k": 0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.5, "min_p": 0.0},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.02}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": 1},
    {"top_k": 0, "top_p": 0.9, "min_p": 0.0, "min_keep": 30}, {"min_p": 0.5, "min_keep": 4}, {"typical_p": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"typical_p": 0.3}, {"top_n_sigma": 1.0, "top_k": 0}, {"top_n_sigma": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05}, {"xtc_probability": 0.5, "xtc_threshold": 0.02, "top_k": 0},
    {"repeat_penalty": 1.3}, {"repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repeat_last_n": 8},
    {"dynatemp_range": 0.5}, {"dynatemp_range": 1.0, "dynatemp_exponent": 2.0, "temperature": 0.7}, {"temperature": 0.0, "dynatemp_range": 0.7},
    {"mirostat": 1}, {"mirostat": 2}, {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.3, "temperature": 1.2},
    {"dry_multiplier": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_base": 1.2, "dry_penalty_last_n": 20},
    {"samplers": ["temperature", "top_p"]}, {"samplers": ["top_k"]}, {"samplers": ["min_p", "penalties", "temperature"], "repeat_penalty": 1.5},
    {"samplers": []}, {"logit_bias": [[1, 5.0], [2, -3.5], [3, 8.0]]},
]


def chain_of(s, vocab, n_vocab):
    c = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
    add = lambda x: L.llama_sampler_chain_add(c, x)
    if s["logit_bias"]:
        array = (L.llama_logit_bias * len(s["logit_bias"]))()
        for slot, (t, b) in zip(array, s["logit_bias"]):
            slot.token, slot.bias = t, b
        add(L.llama_sampler_init_logit_bias(n_vocab, len(array), array))
    if s["mirostat"]:
        add(L.llama_sampler_init_temp(s["temperature"]))
        if s["mirostat"] == 1:
            add(L.llama_sampler_init_mirostat(n_vocab, s["seed"], s["mirostat_tau"], s["mirostat_eta"], 100))
        else:
            add(L.llama_sampler_init_mirostat_v2(s["seed"], s["mirostat_tau"], s["mirostat_eta"]))
        return c
    lib = L.llama_cpp._lib
    for name in s["samplers"]:
        if name == "penalties":
            init = lib.llama_sampler_init_penalties
            init.restype = L.llama_cpp.llama_sampler_p_ctypes
            init.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_float, ctypes.c_float, ctypes.c_float]
            add(init(n_vocab, s["repeat_last_n"], s["repeat_penalty"], s["frequency_penalty"], s["presence_penalty"]))
        elif name == "dry":
            init = lib.llama_sampler_init_dry
            init.restype = L.llama_cpp.llama_sampler_p_ctypes
            init.argtypes = [ctypes.c_void_p, ctypes.c_float, ctypes.c_float, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_char_p), ctypes.c_size_t]
            breakers = (ctypes.c_char_p * len(s["dry_sequence_breakers"]))(*[b.encode() for b in s["dry_sequence_breakers"]])
            add(init(vocab, s["dry_multiplier"], s["dry_base"], s["dry_allowed_length"], s["dry_penalty_last_n"], breakers, len(breakers)))
        elif name == "top_n_sigma":
            add(L.llama_sampler_init_top_n_sigma(s["top_n_sigma"]))
        elif name == "top_k":
            add(L.llama_sampler_init_top_k(s["top_k"]))
        elif name == "typ_p":
            add(L.llama_sampler_init_typical(s["typical_p"], s["min_keep"]))
        elif name == "top_p":
            add(L.llama_sampler_init_top_p(s["top_p"], s["min_keep"]))
        elif name == "min_p":
            add(L.llama_sampler_init_min_p(s["min_p"], s["min_keep"]))
        elif name == "xtc":
            add(L.llama_sampler_init_xtc(s["xtc_probability"], s["xtc_threshold"], s["min_keep"], s["seed"]))
        elif name == "temperature":
            add(L.llama_sampler_init_temp_ext(s["temperature"], s["dynatemp_range"], s["dynatemp_exponent"]))
    add(L.llama_sampler_init_dist(s["seed"]))
    return c


def main():
    llm = L.Llama(sys.argv[1], vocab_only=True, verbose=False)
    vocab = L.llama_model_get_vocab(llm.model)
    rng = random.Random(3)
    n_vocab = 3000
    cases = []
    for number, change in enumerate(SETTINGS):
        s = dict(DEFAULTS, **change, seed=1000 + number) if "seed" not in change else dict(DEFAULTS, **change)
        chain = chain_of(s, vocab, n_vocab)
        prompt = [rng.randrange(40) for _ in range(30)] * 2
        if number % 2:
            prompt.insert(50, 198)  # a newline, which breaks repetitions
        for t in prompt:
            L.llama_sampler_accept(chain, t)
        steps = []
        for step in range(12):
            seed = number * 100 + step
            r = random.Random(seed)
            logits = [ctypes.c_float(r.gauss(0, 3)).value for _ in range(n_vocab)]
            data = (L.llama_token_data * n_vocab)()
            for i, l in enumerate(logits):
                data[i].id, data[i].logit, data[i].p = i, l, 0.0
            array = L.llama_token_data_array(data=data, size=n_vocab, selected=-1, sorted=False)
            L.llama_sampler_apply(chain, ctypes.byref(array))
            left = {}
            for i in range(array.size):
                if array.data[i].logit > -1e30 and array.data[i].p > 0:
                    left[array.data[i].id] = array.data[i].p
            chosen = array.data[array.selected].id
            L.llama_sampler_accept(chain, chosen)
            top = dict(sorted(left.items(), key=lambda x: -x[1])[:60])
            steps.append({"logits": [float(f"{l:.9g}") for l in logits], "n_left": len(left), "top": top, "chosen": chosen})
        cases.append({"settings": s, "prompt": prompt, "steps": steps})
        L.llama_sampler_free(chain)
    with open(sys.argv[2], "w") as f:
        json.dump(cases, f)
    print(len(cases), "settings")


if __name__ == "__main__":
    main()
