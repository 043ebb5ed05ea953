//! The sampler against plain definitions, and against llama.cpp's chain where its results are at hand.

mod fixture;

use mneme_engine::memory::decider::splitmix64;
use mneme_engine::ops::{MOST_BEST, best_of};
use mneme_engine::sampler::{
    Error, RANDOM_SEED, Sampler, SamplerKind, SamplerParams, log_sum_exp, parse_logit_bias,
    top_logprobs,
};
use mneme_engine::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

/// All steps off but the last; then `change`.
fn only(change: impl FnOnce(&mut SamplerParams)) -> SamplerParams {
    let mut p = SamplerParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 7,
        ..SamplerParams::default()
    };
    change(&mut p);
    p
}

fn sampler(p: &SamplerParams) -> Sampler {
    Sampler::without_vocabulary(p).unwrap()
}

/// Ids left after the steps, ascending.
fn left(p: &SamplerParams, logits: &[f32]) -> Vec<u32> {
    let mut s = sampler(p);
    s.sample(logits);
    let mut ids: Vec<u32> = s.candidates().iter().map(|c| c.id).collect();
    ids.sort_unstable();
    ids
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits
        .iter()
        .fold(f64::NEG_INFINITY, |m, &l| m.max(l.into()));
    let e: Vec<f64> = logits.iter().map(|&l| (f64::from(l) - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|p| p / sum).collect()
}

/// Ids by falling logit.
fn ranking(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| {
        logits[b as usize]
            .total_cmp(&logits[a as usize])
            .then(a.cmp(&b))
    });
    ids
}

fn ascending(mut ids: Vec<u32>) -> Vec<u32> {
    ids.sort_unstable();
    ids
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-12f32..12.0, 2..400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn top_k_keeps_the_k_greatest(logits in logits(), k in 1usize..50) {
        let mut expected = ranking(&logits);
        expected.truncate(k);
        prop_assert_eq!(left(&only(|p| p.top_k = k as i32), &logits), ascending(expected.clone()));
        // The same after another step has made the list.
        let after = only(|p| {
            p.top_k = k as i32;
            p.samplers = vec![SamplerKind::Temperature, SamplerKind::TopK];
        });
        prop_assert_eq!(left(&after, &logits), ascending(expected));
    }

    #[test]
    fn top_p_keeps_the_shortest_head(logits in logits(), top_p in 0.05f32..0.99, min_keep in 0usize..9) {
        let p = softmax(&logits);
        let mut sum = 0.0;
        let mut expected = Vec::new();
        for id in ranking(&logits) {
            if sum >= f64::from(top_p) && expected.len() >= min_keep {
                break;
            }
            sum += p[id as usize];
            expected.push(id);
        }
        // Sums at the very edge may fall on either side.
        prop_assume!((sum - f64::from(top_p)).abs() > 1e-5);
        let got = left(&only(|s| { s.top_p = top_p; s.min_keep = min_keep }), &logits);
        let edge = expected.iter().scan(0.0, |s, &id| { *s += p[id as usize]; Some(*s) }).any(|s| (s - f64::from(top_p)).abs() < 1e-5);
        prop_assume!(!edge);
        prop_assert_eq!(got, ascending(expected));
    }

    #[test]
    fn min_p_is_relative_to_the_greatest(logits in logits(), min_p in 0.001f32..0.9, min_keep in 0usize..9) {
        let p = softmax(&logits);
        let ranked = ranking(&logits);
        let least = p[ranked[0] as usize] * f64::from(min_p);
        prop_assume!(p.iter().all(|q| (q / least - 1.0).abs() > 1e-4));
        let n = ranked.iter().filter(|&&id| p[id as usize] >= least).count().max(min_keep).min(ranked.len());
        let got = left(&only(|s| { s.min_p = min_p; s.min_keep = min_keep }), &logits);
        prop_assert_eq!(got, ascending(ranked[..n].to_vec()));
    }

    #[test]
    fn top_n_sigma_is_a_band(logits in logits(), n in 0.2f32..3.0) {
        let count = logits.len() as f64;
        let mean = logits.iter().map(|&l| f64::from(l)).sum::<f64>() / count;
        let sigma = (logits.iter().map(|&l| (f64::from(l) - mean).powi(2)).sum::<f64>() / count).sqrt();
        let max = logits.iter().fold(f64::MIN, |m, &l| m.max(l.into()));
        let least = max - f64::from(n) * sigma;
        prop_assume!(logits.iter().all(|&l| (f64::from(l) - least).abs() > 1e-6));
        let expected: Vec<u32> = (0..logits.len() as u32).filter(|&id| f64::from(logits[id as usize]) >= least).collect();
        prop_assert_eq!(left(&only(|s| s.top_n_sigma = n), &logits), expected);
    }

    #[test]
    fn typical_keeps_what_is_nearest_the_entropy(logits in logits(), typical_p in 0.1f32..0.95) {
        let p = softmax(&logits);
        let entropy: f64 = p.iter().map(|&q| -q * q.ln()).sum();
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let distance = |id: u32| (-p[id as usize].ln() - entropy).abs();
        ids.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        prop_assume!(ids.windows(2).all(|w| (distance(w[0]) - distance(w[1])).abs() > 1e-5));
        let mut sum = 0.0;
        let n = ids.iter().position(|&id| { sum += p[id as usize]; sum > f64::from(typical_p) });
        prop_assume!((sum - f64::from(typical_p)).abs() > 1e-5);
        ids.truncate(n.map_or(ids.len(), |n| n + 1));
        prop_assert_eq!(left(&only(|s| s.typical_p = typical_p), &logits), ascending(ids));
    }

    #[test]
    fn probabilities_are_the_softmax_at_a_temperature(logits in logits(), temperature in 0.2f32..3.0) {
        let mut s = sampler(&only(|p| p.temperature = temperature));
        let id = s.sample(&logits);
        prop_assert!((id as usize) < logits.len());
        let scaled: Vec<f32> = logits.iter().map(|l| l / temperature).collect();
        let expected = softmax(&scaled);
        for c in s.candidates() {
            prop_assert!((f64::from(c.p) - expected[c.id as usize]).abs() < 1e-5);
        }
        // Temperature 0 takes the greatest, whatever else is set.
        let mut greedy = Sampler::without_vocabulary(&SamplerParams::greedy()).unwrap();
        prop_assert_eq!(greedy.sample(&logits), ranking(&logits)[0]);
    }

    #[test]
    fn penalties_by_definition(logits in logits(), said in prop::collection::vec(0u32..20, 0..40),
                               repeat in 0.5f32..2.0, presence in -1f32..1.0, frequency in -1f32..1.0, last_n in -1i32..30) {
        let p = only(|p| {
            p.repeat_penalty = repeat;
            p.presence_penalty = presence;
            p.frequency_penalty = frequency;
            p.repeat_last_n = last_n;
        });
        let mut s = sampler(&p);
        said.iter().for_each(|&id| s.accept(id));
        s.sample(&logits);
        let window = if last_n < 0 { said.len() } else { said.len().min(last_n as usize) };
        let seen = &said[said.len() - window..];
        for c in s.candidates() {
            let count = seen.iter().filter(|&&id| id == c.id).count();
            let mut expected = logits[c.id as usize];
            if count > 0 {
                expected = if expected <= 0.0 { expected * repeat } else { expected / repeat };
                expected -= count as f32 * frequency + presence;
            }
            prop_assert!((c.logit - expected).abs() < 1e-4, "{} {} {}", c.id, c.logit, expected);
        }
    }

    #[test]
    fn dry_by_definition(said in prop::collection::vec(0u32..4, 0..40), allowed in 0i32..5, last_n in -1i32..40) {
        let p = only(|p| {
            p.dry_multiplier = 0.5;
            p.dry_allowed_length = allowed;
            p.dry_penalty_last_n = last_n;
        });
        let mut s = sampler(&p);
        said.iter().for_each(|&id| s.accept(id));
        s.sample(&[0.0; 6]);
        let window = if last_n < 0 { said.len() } else { said.len().min(last_n as usize) };
        let text = &said[said.len() - window..];
        for c in s.candidates() {
            // The longest end of the text that also stands earlier, followed by this token.
            let mut longest = None;
            for at in 0..text.len().saturating_sub(1) {
                if text[at + 1] == c.id {
                    let same = (0..=at).take_while(|&n| text[at - n] == text[text.len() - 1 - n]).count();
                    longest = longest.max(Some(same));
                }
            }
            let expected = match longest {
                Some(n) if text.len() > allowed as usize && n >= allowed as usize => -0.5 * 1.75f32.powi(n as i32 - allowed),
                _ => 0.0,
            };
            prop_assert!((c.logit - expected).abs() <= 1e-4 * expected.abs(), "{} {} {} {:?}", c.id, c.logit, expected, text);
        }
    }

    #[test]
    fn state_goes_on_where_it_was_saved(seed in 0u32..1000, n in 0usize..30, mirostat in 0u8..3) {
        let p = SamplerParams {
            seed, mirostat, xtc_probability: 0.5, repeat_penalty: 1.2, dry_multiplier: 1.0, ..SamplerParams::default()
        };
        let step = |s: &mut Sampler, i: usize| {
            let logits: Vec<f32> = (0..100).map(|t| ((t * 37 + i * 11) % 101) as f32 / 12.0).collect();
            let id = s.sample(&logits);
            s.accept(id);
            id
        };
        let mut a = sampler(&p);
        (0..n).for_each(|i| { step(&mut a, i); });
        let saved = a.save();
        let mut b = sampler(&SamplerParams { seed: 5, ..p.clone() });
        b.restore(&saved).unwrap();
        let mut c = a.clone();
        for i in n..n + 20 {
            let id = step(&mut a, i);
            prop_assert_eq!(step(&mut b, i), id);
            prop_assert_eq!(step(&mut c, i), id);
        }
        for cut in 1..25.min(saved.len()) {
            prop_assert!(b.restore(&saved[..cut]).is_err());
        }
        prop_assert!(b.restore(&[]).is_err());
    }

    #[test]
    fn logprobs_are_those_of_the_raw_logits(logits in logits(), n in 0usize..30) {
        let p = softmax(&logits);
        let mut out = Vec::new();
        top_logprobs(&logits, n, &mut out);
        prop_assert_eq!(out.len(), n.min(logits.len()));
        for ((id, logprob), expected) in out.iter().zip(ranking(&logits)) {
            prop_assert_eq!(*id, expected);
            prop_assert!((f64::from(*logprob) - p[*id as usize].ln()).abs() < 1e-4);
        }
    }

    #[test]
    fn any_settings_and_logits_give_a_token(
        mut logits in prop::collection::vec(prop_oneof![8 => -20f32..20.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(f32::NAN), 1 => Just(1e30f32)], 0..80),
        knobs in prop::collection::vec(-0.5f32..2.0, 12), mirostat in 0u8..3, top_k in -2i32..60, min_keep in 0usize..20,
    ) {
        let p = SamplerParams {
            seed: 3, temperature: knobs[0], top_p: knobs[1], min_p: knobs[2], typical_p: knobs[3], top_n_sigma: knobs[4],
            xtc_probability: knobs[5], xtc_threshold: knobs[6] / 2.0, dynatemp_range: knobs[7], dynatemp_exponent: knobs[8],
            presence_penalty: knobs[9], dry_multiplier: knobs[10], frequency_penalty: knobs[11], mirostat, top_k, min_keep,
            ..SamplerParams::default()
        };
        let mut s = sampler(&p);
        for _ in 0..5 {
            let id = s.sample(&logits) as usize;
            let possible = logits.iter().any(|l| *l > f32::NEG_INFINITY);
            if possible {
                prop_assert!(id < logits.len() && logits[id] > f32::NEG_INFINITY, "{id} of {logits:?}");
            } else {
                prop_assert_eq!(id, 0);
            }
            s.accept(id as u32);
            if !logits.is_empty() {
                logits.rotate_left(1);
            }
        }
    }
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [1.0f32, 0.0, -1.0, 2.0, f32::NEG_INFINITY];
    let expected = softmax(&logits);
    let mut s = sampler(&only(|_| ()));
    let mut counts = [0u32; 5];
    let n = 40000;
    for _ in 0..n {
        counts[s.sample(&logits) as usize] += 1;
    }
    for (count, p) in counts.iter().zip(&expected) {
        let sigma = (p * (1.0 - p) / f64::from(n)).sqrt();
        assert!(
            (f64::from(*count) / f64::from(n) - p).abs() <= 5.0 * sigma,
            "{counts:?}"
        );
    }
}

#[test]
fn xtc_takes_out_all_top_choices_but_the_last() {
    let logits = [5.0f32, 4.8, 4.6, 0.0, -1.0];
    let p = only(|p| {
        p.xtc_probability = 1.0;
        p.xtc_threshold = 0.2;
    });
    assert_eq!(left(&p, &logits), [2, 3, 4]);
    assert_eq!(
        left(
            &SamplerParams {
                min_keep: 4,
                ..p.clone()
            },
            &logits
        ),
        [0, 1, 2, 3, 4]
    );
    assert_eq!(
        left(
            &SamplerParams {
                xtc_threshold: 0.6,
                ..p
            },
            &logits
        ),
        [0, 1, 2, 3, 4]
    );
}

#[test]
fn dry_stops_at_breakers() {
    let t = Tokenizer::from_gguf(&fixture::gguf("qwen2-tiny")).unwrap();
    let ids = |text: &str| t.encode(text, false, false);
    let p = only(|p| {
        p.dry_multiplier = 1.0;
        p.dry_allowed_length = 2;
    });
    let penalised = |said: &str, next: &str| {
        let mut s = Sampler::new(&p, &t).unwrap();
        ids(said).into_iter().for_each(|id| s.accept(id));
        s.sample(&vec![0.0; t.n_vocab()]);
        let next = ids(next)[0];
        s.candidates().iter().find(|c| c.id == next).unwrap().logit < 0.0
    };
    assert!(penalised("xyzqxyz", "q"));
    assert!(
        !penalised("xyz:qxyz:", "q"),
        "nothing repeats since the breaker"
    );
    assert!(
        !penalised("xyz:xyz", ":"),
        "a breaker itself is never penalised"
    );
}

#[test]
fn bias_and_ignored_ends() {
    let logits = [0.0f32, 5.0, 1.0];
    let p = only(|p| p.logit_bias = vec![(1, f32::NEG_INFINITY), (2, 3.0), (99, 1.0)]);
    let mut s = sampler(&p);
    s.sample(&logits);
    let of = |id| s.candidates().iter().find(|c| c.id == id).map(|c| c.logit);
    assert_eq!((of(0), of(1), of(2)), (Some(0.0), None, Some(4.0)));

    let t = Tokenizer::from_gguf(&fixture::gguf("qwen2-tiny")).unwrap();
    let mut logits = vec![0.0f32; 512];
    logits[511] = 50.0;
    let mut s = Sampler::new(
        &SamplerParams {
            ignore_eos: true,
            ..SamplerParams::greedy()
        },
        &t,
    )
    .unwrap();
    assert_ne!(s.sample(&logits), 511);
    assert_eq!(
        Sampler::new(&SamplerParams::greedy(), &t)
            .unwrap()
            .sample(&logits),
        511
    );

    let b = |json: Value| parse_logit_bias(&json, &t);
    assert_eq!(
        b(json!([[5, 1.5], [6, false]])).unwrap(),
        [(5, 1.5), (6, f32::NEG_INFINITY)]
    );
    assert_eq!(b(json!({"5": -2, "<|im_end|>": 1})).unwrap()[0], (5, -2.0));
    assert_eq!(
        b(json!([["5", 1]])).unwrap(),
        [(t.encode("5", false, false)[0], 1.0)]
    );
    assert_eq!(b(Value::Null).unwrap(), []);
    for bad in [
        json!([[512, 1]]),
        json!([[1]]),
        json!([[1, true]]),
        json!(3),
        json!([[null, 1]]),
        json!({"a": "b"}),
    ] {
        assert!(
            matches!(b(bad.clone()), Err(Error::LogitBias { .. })),
            "{bad}"
        );
    }
}

#[test]
fn settings_from_json() {
    let p: SamplerParams = serde_json::from_value(json!({})).unwrap();
    assert_eq!(p, SamplerParams::default());
    let names: Vec<&str> = p.samplers.iter().map(|k| k.name()).collect();
    assert_eq!(
        names,
        [
            "penalties",
            "dry",
            "top_n_sigma",
            "top_k",
            "typ_p",
            "top_p",
            "min_p",
            "xtc",
            "temperature"
        ]
    );
    assert_eq!(
        SamplerKind::from_letters("edskypmxt").unwrap(),
        SamplerKind::DEFAULT
    );
    let p: SamplerParams = serde_json::from_value(
        json!({"seed": -1, "samplers": ["top-k", "nucleus", "temp", "typ"], "logit_bias": [[1, 2.0], [3, false]], "unknown": 1}),
    )
    .unwrap();
    assert_eq!(p.seed, RANDOM_SEED);
    assert_eq!(
        p.samplers,
        [
            SamplerKind::TopK,
            SamplerKind::TopP,
            SamplerKind::Temperature,
            SamplerKind::TypicalP
        ]
    );
    assert_eq!(p.logit_bias, [(1, 2.0), (3, f32::NEG_INFINITY)]);
    let p: SamplerParams = serde_json::from_value(json!({"samplers": "kt", "seed": 5})).unwrap();
    assert_eq!((p.samplers.len(), p.seed), (2, 5));
    let back = serde_json::to_value(&p).unwrap();
    assert_eq!(back["samplers"], json!(["top_k", "temperature"]));
    assert_eq!(serde_json::from_value::<SamplerParams>(back).unwrap(), p);
    for bad in [
        json!({"samplers": "kq"}),
        json!({"samplers": ["nope"]}),
        json!({"seed": -2}),
        json!({"top_k": "x"}),
    ] {
        assert!(
            serde_json::from_value::<SamplerParams>(bad.clone()).is_err(),
            "{bad}"
        );
    }
    let refused = [
        SamplerParams {
            repeat_penalty: 0.0,
            ..p.clone()
        },
        SamplerParams {
            repeat_penalty: f32::NAN,
            ..p.clone()
        },
        SamplerParams {
            temperature: f32::INFINITY,
            ..p.clone()
        },
        SamplerParams {
            repeat_last_n: -2,
            ..p.clone()
        },
        SamplerParams {
            mirostat: 3,
            ..p.clone()
        },
    ];
    for bad in refused {
        assert!(Sampler::without_vocabulary(&bad).is_err(), "{bad:?}");
    }
    let clamped = SamplerParams {
        temperature: -1.0,
        top_p: 7.0,
        min_p: -1.0,
        top_k: -5,
        ..p
    }
    .clamped();
    assert_eq!(
        (
            clamped.temperature,
            clamped.top_p,
            clamped.min_p,
            clamped.top_k
        ),
        (0.0, 1.0, 0.0, 0)
    );
}

#[test]
fn a_random_seed_is_shown_and_repeats() {
    let mut a = sampler(&SamplerParams::default());
    let mut b = sampler(&SamplerParams {
        seed: a.seed(),
        ..SamplerParams::default()
    });
    let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
    let draw = |s: &mut Sampler| (0..20).map(|_| s.sample(&logits)).collect::<Vec<u32>>();
    assert_eq!(draw(&mut a), draw(&mut b));
    assert!((log_sum_exp(&[0.0; 8]) - 8f64.ln()).abs() < 1e-12);
    assert_eq!(log_sum_exp(&[f32::NEG_INFINITY]), f64::NEG_INFINITY);
}

/// Candidates and draws of llama.cpp's chain, written by `tools/sampler_cases.py`.
#[test]
fn llama_cpp_agrees() {
    let (Ok(path), Ok(dir)) = (
        std::env::var("MNEME_SAMPLER_CASES"),
        std::env::var("MNEME_VOCAB_DIR"),
    ) else {
        eprintln!("skipped: set MNEME_SAMPLER_CASES and MNEME_VOCAB_DIR");
        return;
    };
    let vocab = std::path::Path::new(&dir).join("ggml-vocab-qwen2.gguf");
    let t = Tokenizer::from_gguf(&mneme_engine::gguf::Gguf::open(&vocab).unwrap()).unwrap();
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for (number, case) in cases.as_array().unwrap().iter().enumerate() {
        let p: SamplerParams = serde_json::from_value(case["settings"].clone()).unwrap();
        let mut s = Sampler::new(&p, &t).unwrap();
        for id in case["prompt"].as_array().unwrap() {
            s.accept(id.as_u64().unwrap() as u32);
        }
        for (i, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            let logits: Vec<f32> = step["logits"]
                .as_array()
                .unwrap()
                .iter()
                .map(|l| l.as_f64().unwrap() as f32)
                .collect();
            let what = format!("settings {number}, step {i}: {}", case["settings"]);
            let id = s.sample(&logits);
            let possible = s.candidates().iter().filter(|c| c.p > 0.0).count();
            assert_eq!(possible as u64, step["n_left"].as_u64().unwrap(), "{what}");
            for (id, p) in step["top"].as_object().unwrap() {
                let id: u32 = id.parse().unwrap();
                let got = s
                    .candidates()
                    .iter()
                    .find(|c| c.id == id)
                    .unwrap_or_else(|| panic!("{id} {what}"));
                assert!(
                    (f64::from(got.p) - p.as_f64().unwrap()).abs() < 2e-5,
                    "{id} {} {p} {what}",
                    got.p
                );
            }
            assert_eq!(u64::from(id), step["chosen"].as_u64().unwrap(), "{what}");
            s.accept(id);
        }
    }
}

/// Chains whose choice depends on the likeliest tokens alone, and on how many.
fn short_chains() -> Vec<(SamplerParams, usize)> {
    use SamplerKind::{MinP, Penalties, Temperature, TopK, TopP, TypicalP, Xtc};
    let default = SamplerParams {
        seed: 7,
        ..SamplerParams::default()
    };
    let with = |change: &dyn Fn(&mut SamplerParams)| {
        let mut p = default.clone();
        change(&mut p);
        p
    };
    vec![
        (default.clone(), 40),
        (with(&|p| p.temperature = 0.0), 40),
        // Greedy without a list: the steps before keep the likeliest token.
        (with(&|p| (p.temperature, p.top_k) = (-1.0, 0)), 1),
        (
            with(&|p| (p.top_k, p.typical_p, p.xtc_probability) = (7, 0.6, 0.5)),
            7,
        ),
        (
            with(&|p| (p.top_k, p.dynatemp_range) = (MOST_BEST as i32, 0.5)),
            MOST_BEST,
        ),
        (
            with(&|p| p.samplers = vec![TopK, Penalties, TopP, TopK, MinP, Temperature]),
            40,
        ),
        (
            with(&|p| (p.samplers, p.temperature) = (vec![TopP, TopK, Temperature, Xtc], 0.0)),
            1,
        ),
        (
            with(&|p| (p.samplers, p.top_k) = (vec![TopK, TypicalP], 3)),
            3,
        ),
    ]
}

#[test]
fn the_likeliest_tokens_choose_as_all_logits_do() {
    for (p, k) in short_chains() {
        let (mut all, mut few) = (sampler(&p), sampler(&p));
        assert_eq!(few.n_best(), Some(k), "{p:?}");
        for step in 0..200 {
            let n = if step % 10 == 0 { 20 } else { 3000 };
            // Many are equal, some impossible.
            let mut logits: Vec<f32> = (0..n)
                .map(|i| ((splitmix64(step as u64, i) * 128.0).round() / 8.0) as f32 - 8.0)
                .collect();
            logits[step % 20] = f32::NAN;
            logits[(step + 7) % 20] = f32::NEG_INFINITY;
            let mut best = Vec::new();
            best_of(&logits, k + step % 3, &mut best);
            let expected = all.sample(&logits);
            assert_eq!(few.sample_best(&best), expected, "{p:?}");
            assert_eq!(few.candidates(), all.candidates(), "{p:?}");
            all.accept(expected);
            few.accept(expected);
        }
        assert_eq!(few.save(), all.save(), "{p:?}");
        assert_eq!(few.sample_best(&[]), all.sample(&[f32::NAN; 3]));
    }
}

#[test]
fn chains_that_look_at_all_logits_say_so() {
    use SamplerKind::{Temperature, TopK, TopP};
    let changes: [&dyn Fn(&mut SamplerParams); 12] = [
        &|p| p.top_k = 0,
        &|p| p.top_k = MOST_BEST as i32 + 1,
        &|p| p.repeat_penalty = 1.1,
        &|p| p.dry_multiplier = 0.8,
        &|p| p.mirostat = 2,
        &|p| p.logit_bias = vec![(3, 1.0)],
        &|p| p.top_n_sigma = 1.0,
        &|p| p.samplers = vec![TopP, TopK, Temperature],
        &|p| p.samplers = vec![Temperature, TopK],
        &|p| p.samplers = vec![TopP],
        &|p| p.samplers = Vec::new(),
        &|p| (p.temperature, p.dynatemp_range, p.top_k) = (0.0, 0.5, 0),
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut p = SamplerParams::default();
        change(&mut p);
        assert_eq!(sampler(&p).n_best(), None, "{i}");
    }
}

#[test]
fn the_best_of_a_row_are_those_of_a_sort() {
    for (n, k) in [(1, 1), (50, 70), (5000, 3), (5000, 40), (9000, 1024)] {
        // Zeros of both signs among few different numbers.
        let row: Vec<f32> = (0..n)
            .map(|i| {
                (-4.0 * splitmix64(6, i)) as i32 as f32 * (2.0 * splitmix64(7, i)) as i32 as f32
            })
            .collect();
        let mut best = Vec::new();
        best_of(&row, k, &mut best);
        let mut expected = ranking(&row);
        expected.truncate(k);
        assert_eq!(
            best.iter().map(|b| b.0).collect::<Vec<_>>(),
            expected,
            "{k} of {n}"
        );
    }
    let mut best = vec![(1, 1.0)];
    best_of(&[1.0, 2.0], 0, &mut best);
    assert!(best.is_empty());
}
