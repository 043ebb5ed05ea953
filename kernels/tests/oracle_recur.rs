//! `recur` of every instruction set and form against the scalar recurrent form (F64 sums).
//!
//! Outputs are poisoned with NaN before every call.

use half::{bf16, f16};
use mneme_kernels::dispatch::{Isa, available};
use mneme_kernels::pool::Pool;
use mneme_kernels::recur::{CHUNK, Form, Numbers, Recur, Rule, recur_with};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::ops::Range;

const RULES: [Rule; 3] = [Rule::GatedDelta, Rule::Delta, Rule::Ssd];

/// Bound on |got - expected| relative to the largest expected number. F32 sums give some 1e-6;
/// the chunked form on AMX multiplies numbers of 16 bits, 2^-17 each, and its triangular inverse
/// passes errors on.
const TOLERANCE: f32 = 1e-4;

#[derive(Clone)]
struct Case {
    rule: Rule,
    n_tokens: usize,
    n_head: usize,
    n_head_k: usize,
    dims: (usize, usize),
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    resets: Vec<usize>,
    state: Vec<f32>,
}

fn numbers(rng: &mut StdRng, n: usize, range: Range<f32>) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(range.clone())).collect()
}

impl Case {
    /// Heads of `dims` (key, value), `heads` (query, key), numbers of size one, mild decay.
    fn new(
        seed: u64,
        rule: Rule,
        n_tokens: usize,
        heads: (usize, usize),
        dims: (usize, usize),
    ) -> Case {
        let mut rng = StdRng::seed_from_u64(seed);
        let (n_head, n_head_k) = heads;
        let n_g = if rule == Rule::Delta {
            0
        } else {
            n_tokens * n_head
        };
        Case {
            rule,
            n_tokens,
            n_head,
            n_head_k,
            dims,
            q: numbers(&mut rng, n_tokens * n_head * dims.0, -1.0..1.0),
            k: numbers(&mut rng, n_tokens * n_head_k * dims.0, -1.0..1.0),
            v: numbers(&mut rng, n_tokens * n_head_k * dims.1, -1.0..1.0),
            g: numbers(&mut rng, n_g, -0.2..0.0),
            beta: numbers(&mut rng, n_tokens * n_head, 0.05..0.95),
            resets: Vec::new(),
            state: numbers(&mut rng, n_head * dims.0 * dims.1, -1.0..1.0),
        }
    }

    /// Output and final state.
    fn run(&self, isa: Isa, form: Form, pool: &Pool) -> (Vec<f32>, Vec<f32>) {
        let mut state = self.state.clone();
        let out = self.run_tokens(isa, form, pool, 0..self.n_tokens, &mut state);
        (out, state)
    }

    /// Some of the tokens, from a given state.
    fn run_tokens(
        &self,
        isa: Isa,
        form: Form,
        pool: &Pool,
        tokens: Range<usize>,
        state: &mut [f32],
    ) -> Vec<f32> {
        fn rows(x: &[f32], tokens: Range<usize>, width: usize) -> &[f32] {
            &x[tokens.start * width..tokens.end * width]
        }
        let resets: Vec<usize> = self
            .resets
            .iter()
            .filter(|r| tokens.contains(r))
            .map(|r| r - tokens.start)
            .collect();
        let mut out = vec![f32::NAN; tokens.len() * self.n_head * self.dims.1];
        let seq = Recur {
            rule: self.rule,
            n_tokens: tokens.len(),
            n_head: self.n_head,
            n_head_k: self.n_head_k,
            head_dim_k: self.dims.0,
            head_dim_v: self.dims.1,
            q: Numbers::F32(rows(&self.q, tokens.clone(), self.n_head * self.dims.0)),
            k: Numbers::F32(rows(&self.k, tokens.clone(), self.n_head_k * self.dims.0)),
            v: Numbers::F32(rows(&self.v, tokens.clone(), self.n_head_k * self.dims.1)),
            g: Numbers::F32(if self.g.is_empty() {
                &[]
            } else {
                rows(&self.g, tokens.clone(), self.n_head)
            }),
            beta: Numbers::F32(rows(&self.beta, tokens.clone(), self.n_head)),
            resets: &resets,
            state,
            out: &mut out,
        };
        recur_with(isa, pool, form, &mut [seq]);
        out
    }

    fn check(&self, name: &str) {
        let pool = Pool::new(1);
        let expected = self.run(Isa::Scalar, Form::Recurrent, &pool);
        for &isa in available() {
            for form in [Form::Recurrent, Form::Chunked, Form::Auto] {
                let got = self.run(isa, form, &pool);
                let name = format!("{name} {:?} {form:?} on {}", self.rule, isa.name());
                compare(&expected.0, &got.0, &format!("{name}: out"));
                compare(&expected.1, &got.1, &format!("{name}: state"));
            }
        }
    }
}

fn compare(expected: &[f32], got: &[f32], name: &str) {
    assert_eq!(expected.len(), got.len());
    assert!(expected.iter().all(|x| x.is_finite()), "{name}: expected");
    let largest = expected.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    for (i, (e, g)) in expected.iter().zip(got).enumerate() {
        assert!(
            (e - g).abs() <= TOLERANCE * largest,
            "{name}[{i}] is {g}, expected {e}: off by {:e}",
            (e - g).abs() / largest
        );
    }
}

#[test]
fn lengths_around_the_chunk() {
    for rule in RULES {
        for n in [
            0,
            1,
            2,
            31,
            32,
            33,
            CHUNK - 1,
            CHUNK,
            CHUNK + 1,
            2 * CHUNK,
            3 * CHUNK + 7,
            600,
        ] {
            Case::new(n as u64, rule, n, (2, 2), (64, 64)).check(&format!("{n} tokens"));
        }
    }
}

#[test]
fn any_head_size() {
    for rule in RULES {
        for dims in [
            (128, 128),
            (256, 256),
            (64, 128),
            (128, 48),
            (1, 1),
            (7, 13),
            (16, 16),
            (40, 100),
            (100, 33),
            (33, 17),
        ] {
            for heads in [(1, 1), (4, 2)] {
                Case::new(7, rule, CHUNK + 5, heads, dims).check(&format!("{dims:?} {heads:?}"));
            }
        }
    }
}

#[test]
fn resets_at_every_offset() {
    for rule in RULES {
        let mut case = Case::new(3, rule, CHUNK + 20, (2, 1), (32, 32));
        for r in 0..case.n_tokens {
            case.resets = vec![r];
            case.check(&format!("reset at {r}"));
        }
        case.resets = (0..case.n_tokens).collect();
        case.check("reset everywhere");
        case.resets = vec![0, 1, 5, 62, 63, 64, 65, 83];
        case.check("resets in a row");
    }
}

/// A reset forgets a state that is not even a number.
#[test]
fn a_reset_forgets_anything() {
    for rule in RULES {
        for reset in [0, 10] {
            let mut case = Case::new(4, rule, 100, (1, 1), (32, 32));
            case.resets = vec![reset];
            let width = 32;
            let pool = Pool::new(1);
            for &isa in available() {
                let clean = case.run(isa, Form::Recurrent, &pool);
                let mut dirty = case.clone();
                dirty.state.fill(f32::INFINITY);
                let got = dirty.run(isa, Form::Recurrent, &pool);
                let seen = reset * width;
                assert_eq!(clean.0[seen..], got.0[seen..], "{rule:?} on {}", isa.name());
                assert_eq!(clean.1, got.1, "{rule:?} on {}", isa.name());
            }
        }
    }
}

#[test]
fn strong_decay_neither_overflows_nor_leaves_nan() {
    for rule in [Rule::GatedDelta, Rule::Ssd] {
        for g in [-1e-6, -1.0, -20.0, -90.0, -1000.0, -1e30] {
            let mut case = Case::new(5, rule, 150, (1, 1), (64, 64));
            case.g.fill(g);
            case.check(&format!("all g = {g}"));
            // One strong step among mild ones.
            let mut case = Case::new(6, rule, 150, (1, 1), (64, 64));
            case.g[70] = g;
            case.g[100] = g;
            case.check(&format!("two g = {g}"));
        }
    }
}

#[test]
fn large_and_tiny_numbers() {
    for rule in RULES {
        for size in [1e-6f32, 1e-3, 1e3, 1e6] {
            let mut case = Case::new(8, rule, 100, (1, 1), (64, 64));
            for x in [&mut case.q, &mut case.k, &mut case.v, &mut case.state] {
                x.iter_mut().for_each(|x| *x *= size);
            }
            case.check(&format!("numbers of {size}"));
        }
        let mut case = Case::new(9, rule, 100, (1, 1), (64, 64));
        case.k.fill(0.0);
        case.q[..64].fill(0.0);
        case.check("keys of zero");
    }
}

/// Inputs of 16 bits: exactly what the same numbers give in F32, on every instruction set, in both
/// forms, with resets, whatever is stored beside them and however heads share keys.
#[test]
fn sixteen_bit_inputs_are_their_numbers() {
    type Stored = (Vec<f16>, Vec<bf16>);
    let store = |x: &mut Vec<f32>, bf: bool| -> Stored {
        let f = x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
        let b = x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
        *x = if bf {
            b.iter().map(|x| x.to_f32()).collect()
        } else {
            f.iter().map(|x| x.to_f32()).collect()
        };
        (f, b)
    };
    fn view(x: &Stored, bf: bool) -> Numbers<'_> {
        if bf {
            Numbers::BF16(&x.1)
        } else {
            Numbers::F16(&x.0)
        }
    }
    for rule in RULES {
        for (n, heads, dims) in [
            (0, (2, 1), (32, 32)),
            (1, (6, 2), (64, 64)),
            (CHUNK - 1, (5, 1), (40, 24)),
            (2 * CHUNK, (4, 2), (64, 48)),
            (5 * CHUNK + 9, (6, 2), (33, 17)),
        ] {
            for bf in [false, true] {
                let mut case = Case::new(21, rule, n, heads, dims);
                case.resets = [0, 70, 128, 129, 300]
                    .into_iter()
                    .filter(|&r| r < n)
                    .collect();
                let kv = [
                    store(&mut case.q, bf),
                    store(&mut case.k, bf),
                    store(&mut case.v, bf),
                ];
                let gates = [store(&mut case.g, bf), store(&mut case.beta, bf)];
                case.check(&format!("rounded, {n} tokens"));
                for &isa in available() {
                    for form in [Form::Recurrent, Form::Chunked] {
                        for (threads, all) in [(1, true), (3, false)] {
                            let pool = Pool::new(threads);
                            let expected = case.run(isa, form, &pool);
                            let mut state = case.state.clone();
                            let mut out = vec![f32::NAN; n * heads.0 * dims.1];
                            let seq = Recur {
                                rule,
                                n_tokens: n,
                                n_head: heads.0,
                                n_head_k: heads.1,
                                head_dim_k: dims.0,
                                head_dim_v: dims.1,
                                q: view(&kv[0], bf),
                                k: view(&kv[1], bf),
                                v: view(&kv[2], bf),
                                g: if all {
                                    view(&gates[0], bf)
                                } else {
                                    Numbers::F32(&case.g)
                                },
                                beta: if all {
                                    view(&gates[1], bf)
                                } else {
                                    Numbers::F32(&case.beta)
                                },
                                resets: &case.resets,
                                state: &mut state,
                                out: &mut out,
                            };
                            recur_with(isa, &pool, form, &mut [seq]);
                            assert_eq!(
                                (out, state),
                                expected,
                                "{rule:?} {form:?} {n} tokens on {}",
                                isa.name()
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Write strength 1 on repeated keys: the triangular inverse at its worst, and still right.
#[test]
fn equal_keys_replace_each_other() {
    let mut case = Case::new(10, Rule::Delta, 200, (1, 1), (64, 64));
    let first = case.k[..64].to_vec();
    for k in case.k.chunks_exact_mut(64) {
        k.copy_from_slice(&first);
    }
    case.beta.fill(1.0);
    case.check("equal keys");
}

/// Alone, on any number of threads, beside other sequences: the same bits, in both forms.
#[test]
fn heads_and_sequences_do_not_mix() {
    let cases: Vec<Case> = [3, 70, 200]
        .iter()
        .map(|&n| Case::new(n as u64, Rule::GatedDelta, n, (4, 2), (32, 48)))
        .collect();
    for &isa in available() {
        for form in [Form::Recurrent, Form::Chunked] {
            let alone: Vec<_> = cases
                .iter()
                .map(|c| c.run(isa, form, &Pool::new(1)))
                .collect();
            for threads in [1, 2, 5] {
                let mut states: Vec<Vec<f32>> = cases.iter().map(|c| c.state.clone()).collect();
                let mut outs: Vec<Vec<f32>> = alone
                    .iter()
                    .map(|(out, _)| vec![f32::NAN; out.len()])
                    .collect();
                let mut seqs: Vec<Recur<'_>> = cases
                    .iter()
                    .zip(states.iter_mut().zip(&mut outs))
                    .map(|(c, (state, out))| Recur {
                        rule: c.rule,
                        n_tokens: c.n_tokens,
                        n_head: c.n_head,
                        n_head_k: c.n_head_k,
                        head_dim_k: c.dims.0,
                        head_dim_v: c.dims.1,
                        q: Numbers::F32(&c.q),
                        k: Numbers::F32(&c.k),
                        v: Numbers::F32(&c.v),
                        g: Numbers::F32(&c.g),
                        beta: Numbers::F32(&c.beta),
                        resets: &c.resets,
                        state,
                        out,
                    })
                    .collect();
                recur_with(isa, &Pool::new(threads), form, &mut seqs);
                for ((state, out), alone) in states.iter().zip(&outs).zip(&alone) {
                    assert_eq!(
                        (out, state),
                        (&alone.0, &alone.1),
                        "{form:?} on {}",
                        isa.name()
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Splitting anywhere and carrying the state: the same bits token by token, the same numbers
    /// in chunks.
    #[test]
    fn a_sequence_may_be_split_anywhere(
        seed in 0u64..1000, n in 1usize..200, at in 0.0f64..1.0, rule in 0usize..3, reset in 0usize..200,
    ) {
        let mut case = Case::new(seed, RULES[rule], n, (2, 1), (32, 40));
        if reset < n {
            case.resets = vec![reset];
        }
        let at = (at * n as f64) as usize;
        let pool = Pool::new(1);
        for &isa in available() {
            for form in [Form::Recurrent, Form::Chunked] {
                let (out, state) = case.run(isa, form, &pool);
                let mut carried = case.state.clone();
                let mut parts = case.run_tokens(isa, form, &pool, 0..at, &mut carried);
                parts.extend(case.run_tokens(isa, form, &pool, at..n, &mut carried));
                if form == Form::Recurrent {
                    prop_assert_eq!((&out, &state), (&parts, &carried));
                } else {
                    compare(&out, &parts, "split out");
                    compare(&state, &carried, "split state");
                }
            }
        }
    }
}
