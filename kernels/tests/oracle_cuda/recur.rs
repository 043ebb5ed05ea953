//! `recur` against the scalar recurrent form of the host (F64 sums).
//!
//! Token by token: F32 sums of some hundred products, fed back: 2e-5 of the largest number. In
//! chunks: products of numbers rounded to 2^-17 each, whose errors the triangular inverse passes on:
//! 1e-4, as the host's chunked form is held to.

use crate::{bits, close, device, get, poisoned, put, rng};
use mneme_kernels::cuda::recur::{Recur, recur};
use mneme_kernels::cuda::{Buffer, Device};
use mneme_kernels::dispatch::Isa;
use mneme_kernels::pool::Pool;
use mneme_kernels::recur::{self as host, CHUNK, Form, Rule};
use rand::RngExt;
use std::ops::Range;

const RULES: [Rule; 3] = [Rule::GatedDelta, Rule::Delta, Rule::Ssd];
const TOLERANCE: f32 = 2e-5;
const TOLERANCE_CHUNKED: f32 = 1e-4;

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

/// A case's numbers on the device.
struct Placed {
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    g: Option<Buffer<f32>>,
    beta: Buffer<f32>,
    resets: Option<Buffer<u32>>,
    state: Buffer<f32>,
    out: Buffer<f32>,
}

impl Case {
    fn new(
        seed: u64,
        rule: Rule,
        n_tokens: usize,
        heads: (usize, usize),
        dims: (usize, usize),
    ) -> Case {
        let mut rng = rng(seed);
        let mut numbers = |n: usize, range: Range<f32>| -> Vec<f32> {
            (0..n).map(|_| rng.random_range(range.clone())).collect()
        };
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
            q: numbers(n_tokens * n_head * dims.0, -1.0..1.0),
            k: numbers(n_tokens * n_head_k * dims.0, -1.0..1.0),
            v: numbers(n_tokens * n_head_k * dims.1, -1.0..1.0),
            g: numbers(n_g, -0.2..0.0),
            beta: numbers(n_tokens * n_head, 0.05..0.95),
            resets: Vec::new(),
            state: numbers(n_head * dims.0 * dims.1, -1.0..1.0),
        }
    }

    fn expected(&self) -> (Vec<f32>, Vec<f32>) {
        let mut state = self.state.clone();
        let mut out = vec![f32::NAN; self.n_tokens * self.n_head * self.dims.1];
        let seq = host::Recur {
            rule: self.rule,
            n_tokens: self.n_tokens,
            n_head: self.n_head,
            n_head_k: self.n_head_k,
            head_dim_k: self.dims.0,
            head_dim_v: self.dims.1,
            q: host::Numbers::F32(&self.q),
            k: host::Numbers::F32(&self.k),
            v: host::Numbers::F32(&self.v),
            g: host::Numbers::F32(&self.g),
            beta: host::Numbers::F32(&self.beta),
            resets: &self.resets,
            state: &mut state,
            out: &mut out,
        };
        host::recur_with(Isa::Scalar, &Pool::new(1), Form::Recurrent, &mut [seq]);
        (out, state)
    }

    fn place(&self, dev: &Device, tokens: Range<usize>, state: &[f32]) -> Placed {
        let part = |x: &[f32], width: usize| put(dev, &x[tokens.start * width..tokens.end * width]);
        let flags: Vec<u32> = tokens
            .clone()
            .map(|t| u32::from(self.resets.contains(&t)))
            .collect();
        Placed {
            q: part(&self.q, self.n_head * self.dims.0),
            k: part(&self.k, self.n_head_k * self.dims.0),
            v: part(&self.v, self.n_head_k * self.dims.1),
            g: (self.rule != Rule::Delta).then(|| part(&self.g, self.n_head)),
            beta: part(&self.beta, self.n_head),
            resets: (!self.resets.is_empty()).then(|| put(dev, &flags)),
            state: put(dev, state),
            out: poisoned(dev, tokens.len() * self.n_head * self.dims.1),
        }
    }

    fn call<'a>(&self, p: &'a mut Placed, n_tokens: usize) -> Recur<'a> {
        Recur {
            rule: self.rule,
            n_tokens,
            n_head: self.n_head,
            n_head_k: self.n_head_k,
            head_dim_k: self.dims.0,
            head_dim_v: self.dims.1,
            q: p.q.all(),
            k: p.k.all(),
            v: p.v.all(),
            q_stride: 0,
            k_stride: 0,
            v_stride: 0,
            g: p.g.as_ref().map(Buffer::all),
            beta: p.beta.all(),
            resets: p.resets.as_ref().map(Buffer::all),
            from: None,
            state: p.state.all_mut(),
            out: p.out.all_mut(),
        }
    }

    /// Some of the tokens, from a given state, which becomes the final one.
    fn run(
        &self,
        dev: &Device,
        form: Form,
        tokens: Range<usize>,
        state: &mut Vec<f32>,
    ) -> Vec<f32> {
        let mut placed = self.place(dev, tokens.clone(), state);
        recur(dev, form, &mut [self.call(&mut placed, tokens.len())]).expect("recur");
        *state = get(dev, &placed.state);
        get(dev, &placed.out)
    }

    fn check(&self, dev: &Device, name: &str) {
        let (out, state) = self.expected();
        for form in [Form::Recurrent, Form::Chunked] {
            let mut got_state = self.state.clone();
            let got = self.run(dev, form, 0..self.n_tokens, &mut got_state);
            let name = format!("{name} {:?} {form:?}", self.rule);
            let bound = match form {
                Form::Chunked => TOLERANCE_CHUNKED,
                Form::Recurrent | Form::Auto => TOLERANCE,
            };
            close(&out, &got, bound, &format!("{name}: out"));
            close(&state, &got_state, bound, &format!("{name}: state"));
        }
    }
}

#[test]
fn lengths_around_the_chunk() {
    let Some(dev) = device() else { return };
    for rule in RULES {
        for n in [0, 1, 2, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7] {
            Case::new(n as u64, rule, n, (2, 1), (32, 40)).check(dev, &format!("{n} tokens"));
        }
    }
}

#[test]
fn any_head_size() {
    let Some(dev) = device() else { return };
    for rule in RULES {
        for dims in [
            (128, 128),
            (256, 33),
            (64, 128),
            (1, 1),
            (7, 13),
            (65, 32),
            (100, 100),
        ] {
            for heads in [(1, 1), (4, 2)] {
                Case::new(7, rule, 11, heads, dims).check(dev, &format!("{dims:?} {heads:?}"));
            }
        }
    }
}

#[test]
fn resets_at_every_offset() {
    let Some(dev) = device() else { return };
    for rule in RULES {
        let mut case = Case::new(3, rule, CHUNK + 9, (1, 1), (16, 16));
        for r in 0..case.n_tokens {
            case.resets = vec![r];
            case.check(dev, &format!("reset at {r}"));
        }
        case.resets = (0..case.n_tokens).collect();
        case.check(dev, "reset everywhere");
        case.resets = vec![0, 1, 5, 62, 63, 64, 65];
        case.check(dev, "resets in a row");
    }
}

/// A reset forgets a state that is not even a number.
#[test]
fn a_reset_forgets_anything() {
    let Some(dev) = device() else { return };
    for rule in RULES {
        for reset in [0, 10] {
            let mut case = Case::new(4, rule, 20, (1, 1), (32, 32));
            case.resets = vec![reset];
            let (mut clean, mut dirty) = (case.state.clone(), vec![f32::INFINITY; 32 * 32]);
            let expected = case.run(dev, Form::Recurrent, 0..20, &mut clean);
            let got = case.run(dev, Form::Recurrent, 0..20, &mut dirty);
            assert_eq!(expected[reset * 32..], got[reset * 32..], "{rule:?}");
            assert_eq!(clean, dirty, "{rule:?}");
        }
    }
}

#[test]
fn strong_decay_neither_overflows_nor_leaves_nan() {
    let Some(dev) = device() else { return };
    for rule in [Rule::GatedDelta, Rule::Ssd] {
        for g in [-1e-6, -1.0, -20.0, -90.0, -1000.0, -1e30] {
            let mut case = Case::new(5, rule, 70, (1, 1), (32, 32));
            case.g.fill(g);
            case.check(dev, &format!("all g = {g}"));
            let mut case = Case::new(6, rule, 70, (1, 1), (32, 32));
            case.g[20] = g;
            case.g[65] = g;
            case.check(dev, &format!("two g = {g}"));
        }
    }
}

#[test]
fn large_and_tiny_numbers() {
    let Some(dev) = device() else { return };
    for rule in RULES {
        for size in [1e-6f32, 1e-3, 1e3, 1e6] {
            let mut case = Case::new(8, rule, 20, (1, 1), (64, 64));
            for x in [&mut case.q, &mut case.k, &mut case.v, &mut case.state] {
                x.iter_mut().for_each(|x| *x *= size);
            }
            case.check(dev, &format!("numbers of {size}"));
        }
        let mut case = Case::new(9, rule, 20, (1, 1), (64, 64));
        case.k.fill(0.0);
        case.q[..64].fill(0.0);
        case.check(dev, "keys of zero");
    }
}

/// Write strength 1 on repeated keys.
#[test]
fn equal_keys_replace_each_other() {
    let Some(dev) = device() else { return };
    let mut case = Case::new(10, Rule::Delta, 100, (1, 1), (64, 32));
    let first = case.k[..64].to_vec();
    case.k
        .chunks_exact_mut(64)
        .for_each(|k| k.copy_from_slice(&first));
    case.beta.fill(1.0);
    case.check(dev, "equal keys");
}

/// Sequences of several rules and sizes in one call, more than one launch takes: the same bits.
#[test]
fn sequences_do_not_mix() {
    let Some(dev) = device() else { return };
    let cases: Vec<Case> = (0..20)
        .map(|i| {
            let dims = [(32, 40), (100, 16), (200, 8)][i % 3];
            Case::new(i as u64, RULES[i % 3], i * 3 % 20, (4, 2), dims)
        })
        .collect();
    let mut placed: Vec<Placed> = cases
        .iter()
        .map(|c| c.place(dev, 0..c.n_tokens, &c.state))
        .collect();
    let mut calls: Vec<Recur<'_>> = cases
        .iter()
        .zip(&mut placed)
        .map(|(c, p)| c.call(p, c.n_tokens))
        .collect();
    recur(dev, Form::Recurrent, &mut calls).expect("recur");
    for (case, placed) in cases.iter().zip(&placed) {
        let mut state = case.state.clone();
        let out = case.run(dev, Form::Recurrent, 0..case.n_tokens, &mut state);
        assert_eq!(bits(&out), bits(&get(dev, &placed.out)));
        assert_eq!(bits(&state), bits(&get(dev, &placed.state)));
    }
}

/// Split anywhere with the state carried: the same bits.
#[test]
fn a_sequence_may_be_split_anywhere() {
    let Some(dev) = device() else { return };
    for (i, rule) in RULES.into_iter().enumerate() {
        let mut case = Case::new(i as u64, rule, 30, (2, 1), (32, 40));
        case.resets = vec![13];
        let mut whole = case.state.clone();
        let out = case.run(dev, Form::Recurrent, 0..30, &mut whole);
        for at in [0, 1, 8, 13, 14, 29, 30] {
            let mut carried = case.state.clone();
            let mut parts = case.run(dev, Form::Recurrent, 0..at, &mut carried);
            parts.extend(case.run(dev, Form::Recurrent, at..30, &mut carried));
            assert_eq!(bits(&out), bits(&parts), "{rule:?} at {at}");
            assert_eq!(bits(&whole), bits(&carried), "{rule:?} at {at}");
        }
    }
}

/// More chunks than there is room for at once go in rounds; a long call takes chunks by itself.
#[test]
fn long_calls_go_in_rounds() {
    let Some(dev) = device() else { return };
    // 64 MiB hold 14 chunks of 20 heads of these.
    let case = Case::new(13, Rule::GatedDelta, 15 * CHUNK + 3, (20, 1), (129, 1));
    let (out, state) = case.expected();
    let mut got_state = case.state.clone();
    let got = case.run(dev, Form::Auto, 0..case.n_tokens, &mut got_state);
    close(&out, &got, TOLERANCE_CHUNKED, "out");
    close(&state, &got_state, TOLERANCE_CHUNKED, "state");
}

/// The state before and the state after in two buffers: the same bits, and the first one stays.
#[test]
fn the_state_before_may_be_kept() {
    let Some(dev) = device() else { return };
    for (form, n) in [
        (Form::Recurrent, 0),
        (Form::Recurrent, 9),
        // Several rounds.
        (Form::Chunked, 15 * CHUNK + 3),
    ] {
        let case = Case::new(14, Rule::GatedDelta, n, (20, 1), (129, 1));
        let mut state = case.state.clone();
        let expected = case.run(dev, form, 0..n, &mut state);
        let before = put(dev, &case.state);
        let poison = vec![f32::NAN; state.len()];
        let mut placed = case.place(dev, 0..n, &poison);
        let mut call = case.call(&mut placed, n);
        call.from = Some(before.all());
        recur(dev, form, &mut [call]).expect("recur");
        assert_eq!(bits(&expected), bits(&get(dev, &placed.out)));
        assert_eq!(bits(&state), bits(&get(dev, &placed.state)));
        assert_eq!(bits(&case.state), bits(&get(dev, &before)));
    }
}

/// Queries, keys and values as thirds of one buffer.
#[test]
fn strides_pick_rows_out_of_a_wider_buffer() {
    let Some(dev) = device() else { return };
    let case = Case::new(12, Rule::GatedDelta, 9, (2, 2), (16, 16));
    let mut state = case.state.clone();
    let expected = case.run(dev, Form::Recurrent, 0..9, &mut state);
    let mut qkv = Vec::new();
    for t in 0..9 {
        for x in [&case.q, &case.k, &case.v] {
            qkv.extend_from_slice(&x[t * 32..(t + 1) * 32]);
        }
    }
    let qkv = put(dev, &qkv);
    let mut placed = case.place(dev, 0..9, &case.state);
    let mut call = case.call(&mut placed, 9);
    (call.q, call.k, call.v) = (
        qkv.all(),
        qkv.slice(32..qkv.len()),
        qkv.slice(64..qkv.len()),
    );
    (call.q_stride, call.k_stride, call.v_stride) = (96, 96, 96);
    recur(dev, Form::Recurrent, &mut [call]).expect("recur");
    assert_eq!(bits(&expected), bits(&get(dev, &placed.out)));
    assert_eq!(bits(&state), bits(&get(dev, &placed.state)));
}
