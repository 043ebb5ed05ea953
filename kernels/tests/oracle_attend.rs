//! `attend` of every instruction set against the scalar one (F64 sums) and against itself.
//!
//! Outputs are poisoned with NaN before every call, and so is every cell that no query may see.

use mneme_kernels::attend::{
    KvType, PAGE_CELLS, PARTITION_CELLS, PageLayout, Sequence, Visible, attend_with,
};
use mneme_kernels::dispatch::{Isa, available};
use mneme_kernels::pool::Pool;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::ops::Range;

const TYPES: [KvType; 4] = [KvType::F32, KvType::F16, KvType::BF16, KvType::Q8_0];

/// Bound on |got - expected| relative to the largest expected number, for scores of size one. F32
/// sums of some thousand products stay below 1e-5; 16-bit integer queries and weights add at most
/// 2^-16 of the largest query and of a page's largest weight.
const TOLERANCE: f32 = 1e-4;

/// Everything one sequence of a call refers to.
struct Case {
    layout: PageLayout,
    n_head: usize,
    q: Vec<f32>,
    visible: Vec<Visible>,
    kept: Vec<Vec<u8>>,
    raw: Vec<Vec<u8>>,
    raw_base: u64,
    n_always: u32,
    top_k: u32,
    /// Largest number in queries, keys and values.
    size: f32,
}

fn layout(
    group: usize,
    n_head_kv: usize,
    dims: (usize, usize),
    ty: (KvType, KvType),
) -> (PageLayout, usize) {
    let layout = PageLayout {
        n_head_kv,
        head_dim_k: dims.0,
        head_dim_v: dims.1,
        ty_k: ty.0,
        ty_v: ty.1,
    };
    (layout, group * n_head_kv)
}

fn numbers(rng: &mut StdRng, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

/// Pages with some written cells; the rest, and what no cell covers, is NaN in every type (0xff
/// bytes: F32, F16 and BF16 numbers and the scales of Q8_0).
fn pages(
    rng: &mut StdRng,
    layout: &PageLayout,
    cells: Range<usize>,
    n_pages: usize,
    size: f32,
) -> Vec<Vec<u8>> {
    let mut pages = vec![vec![0xffu8; layout.page_bytes()]; n_pages];
    for cell in cells {
        let k = numbers(rng, layout.n_head_kv * layout.head_dim_k, size);
        let v = numbers(rng, layout.n_head_kv * layout.head_dim_v, size);
        layout.write(&mut pages[cell / PAGE_CELLS], cell % PAGE_CELLS, 1, &k, &v);
    }
    pages
}

fn views(pages: &[Vec<u8>]) -> Vec<&[u8]> {
    pages.iter().map(|p| &p[..]).collect()
}

impl Case {
    /// A case in which exactly the cells between the first and the last seen one are written.
    fn new(
        seed: u64,
        shape: (PageLayout, usize),
        visible: Vec<Visible>,
        raw_base: u64,
        size: f32,
    ) -> Case {
        let (layout, n_head) = shape;
        let mut rng = StdRng::seed_from_u64(seed);
        let n_kept = visible.iter().map(|v| v.n_kept).max().unwrap_or(0) as usize;
        let seen = visible.iter().filter(|v| v.raw_begin < v.raw_end);
        let begin = seen.clone().map(|v| v.raw_begin).min().unwrap_or(raw_base);
        let end = seen.map(|v| v.raw_end).max().unwrap_or(raw_base);
        let raw = (begin - raw_base) as usize..(end - raw_base) as usize;
        let n_raw_pages = raw.end.div_ceil(PAGE_CELLS) + 1;
        Case {
            q: numbers(&mut rng, visible.len() * n_head * layout.head_dim_k, size),
            kept: pages(
                &mut rng,
                &layout,
                0..n_kept,
                n_kept.div_ceil(PAGE_CELLS),
                size,
            ),
            raw: pages(&mut rng, &layout, raw, n_raw_pages, size),
            layout,
            n_head,
            visible,
            raw_base,
            n_always: 0,
            top_k: 0,
            size,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim_k as f32).sqrt()
    }

    fn run(&self, isa: Isa, pool: &Pool) -> Vec<f32> {
        self.run_queries(isa, pool, 0..self.visible.len())
    }

    /// Some of the queries, in one call.
    fn run_queries(&self, isa: Isa, pool: &Pool, queries: Range<usize>) -> Vec<f32> {
        let width = self.n_head * self.layout.head_dim_k;
        let mut out = vec![f32::NAN; queries.len() * self.n_head * self.layout.head_dim_v];
        let seq = Sequence {
            q: &self.q[queries.start * width..queries.end * width],
            visible: &self.visible[queries],
            kept: &views(&self.kept),
            n_always: self.n_always,
            top_k: self.top_k,
            raw: &views(&self.raw),
            raw_base: self.raw_base,
            out: &mut out,
        };
        attend_with(
            isa,
            pool,
            &self.layout,
            self.n_head,
            self.scale(),
            &mut [seq],
        );
        out
    }

    /// Compares every instruction set with the scalar one.
    fn check(&self, name: &str) {
        // An error of a score is an error of a weight: the bound grows with the scores.
        let score = self.size * self.size * (self.layout.head_dim_k as f32).sqrt() / 3.0;
        let bound = TOLERANCE * 1f32.max(score / 4.0);
        let pool = Pool::new(1);
        let expected = self.run(Isa::Scalar, &pool);
        assert!(expected.iter().all(|x| x.is_finite()), "{name}: scalar");
        let largest = expected.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
        for &isa in &available()[1..] {
            let got = self.run(isa, &pool);
            for (i, (e, g)) in expected.iter().zip(&got).enumerate() {
                assert!(
                    (e - g).abs() <= bound * largest,
                    "{name} on {}: out[{i}] is {g}, expected {e}: off by {:e}, allowed {bound:e}",
                    isa.name(),
                    (e - g).abs() / largest
                );
            }
        }
    }
}

fn causal(n_q: usize, first: u64, n_kept: u32) -> Vec<Visible> {
    (0..n_q as u64)
        .map(|i| Visible {
            n_kept,
            raw_begin: 0,
            raw_end: first + i + 1,
        })
        .collect()
}

#[test]
fn every_type_and_shape() {
    let mut seed = 0;
    for ty_k in TYPES {
        for ty_v in TYPES {
            for dims in [
                (64, 64),
                (128, 128),
                (16, 16),
                (80, 80),
                (7, 13),
                (256, 40),
                (40, 256),
            ] {
                for (group, n_head_kv) in [(1, 1), (7, 2), (8, 1), (3, 3), (70, 1)] {
                    seed += 1;
                    let visible = causal(1 + seed as usize % 12, 90, 37);
                    let shape = layout(group, n_head_kv, dims, (ty_k, ty_v));
                    Case::new(seed, shape, visible, 0, 1.0)
                        .check(&format!("{ty_k:?}/{ty_v:?} {dims:?} {group}x{n_head_kv}"));
                }
            }
        }
    }
}

#[test]
fn every_length_near_the_edges_of_a_page_and_a_partition() {
    let page = PAGE_CELLS as u64;
    let part = PARTITION_CELLS as u64;
    let lengths = [
        0,
        1,
        31,
        32,
        33,
        page - 1,
        page,
        page + 1,
        2 * page,
        part - 1,
        part,
        part + 1,
        2 * part + 65,
    ];
    for ty in [KvType::F16, KvType::Q8_0] {
        for n_raw in lengths {
            for n_kept in [0, 1, 63, 64, 65, 1025] {
                let visible = vec![
                    Visible {
                        n_kept,
                        raw_begin: 0,
                        raw_end: n_raw
                    };
                    3
                ];
                let shape = layout(4, 1, (64, 64), (ty, ty));
                Case::new(n_raw + u64::from(n_kept), shape, visible, 0, 1.0)
                    .check(&format!("{ty:?}, {n_kept} kept, {n_raw} raw"));
            }
        }
    }
}

#[test]
fn windows_off_every_boundary() {
    for begin in (1000..1140).step_by(7) {
        for len in [1u64, 5, 64, 100, 1500] {
            let visible: Vec<Visible> = (0..20)
                .map(|i| Visible {
                    n_kept: i as u32 % 4,
                    raw_begin: begin + i,
                    raw_end: begin + i + len,
                })
                .collect();
            for ty in [KvType::F16, KvType::Q8_0] {
                let shape = layout(2, 2, (32, 32), (ty, ty));
                Case::new(begin, shape, visible.clone(), 960, 1.0)
                    .check(&format!("window {begin}+{len}"));
            }
        }
    }
}

/// Queries that look far apart: what lies between, seen by none, is NaN.
#[test]
fn cells_between_two_queries_stay_unread() {
    for ty in TYPES {
        let (layout, n_head) = layout(4, 1, (32, 32), (ty, ty));
        let visible = vec![
            Visible {
                n_kept: 0,
                raw_begin: 3,
                raw_end: 9,
            },
            Visible {
                n_kept: 0,
                raw_begin: 50,
                raw_end: 53,
            },
            Visible {
                n_kept: 0,
                raw_begin: 3000,
                raw_end: 3001,
            },
        ];
        let mut case = Case::new(1, (layout, n_head), visible, 0, 1.0);
        let whole = std::mem::replace(&mut case.raw, vec![vec![0xff; layout.page_bytes()]; 48]);
        for cell in (3..9).chain(50..53).chain(3000..3001) {
            let (page, at) = (cell / PAGE_CELLS, cell % PAGE_CELLS);
            layout.copy_cell(&whole[page], at, &mut case.raw[page], at);
        }
        case.check(&format!("{ty:?}"));
    }
}

#[test]
fn large_and_tiny_numbers() {
    for ty in TYPES {
        for size in [1e-4, 1e-2, 4.0, 30.0] {
            let shape = layout(8, 1, (64, 64), (ty, ty));
            Case::new(5, shape, causal(9, 200, 70), 0, size).check(&format!("{ty:?} at {size}"));
        }
    }
}

#[test]
fn top_k_reads_the_best_nodes_only() {
    for ty in TYPES {
        for top_k in [1, 5, 64, 199, 300] {
            let shape = layout(4, 2, (64, 64), (ty, ty));
            let mut case = Case::new(11, shape, causal(17, 30, 200), 0, 1.0);
            case.n_always = 4;
            case.top_k = top_k;
            case.check(&format!("{ty:?} top_k {top_k}"));
        }
    }
}

/// Equal keys rank by age: values that are powers of two tell which cells were seen.
#[test]
fn top_k_prefers_the_older_of_equals() {
    let (layout, n_head) = layout(2, 1, (16, 16), (KvType::F32, KvType::F32));
    let mut page = vec![0xffu8; layout.page_bytes()];
    for cell in 0..10 {
        layout.write(&mut page, cell, 1, &[1.0; 16], &[(1 << cell) as f32; 16]);
    }
    for &isa in available() {
        let mut out = [f32::NAN; 32];
        let seq = Sequence {
            q: &[0.5; 32],
            visible: &[Visible {
                n_kept: 10,
                raw_begin: 0,
                raw_end: 0,
            }],
            kept: &[&page],
            n_always: 1,
            top_k: 3,
            raw: &[],
            raw_base: 0,
            out: &mut out,
        };
        attend_with(isa, &Pool::new(1), &layout, n_head, 1.0, &mut [seq]);
        // Cells 0 (always), 1, 2 and 3.
        let expected = 15.0 / 4.0;
        assert!(
            out.iter().all(|x| (x - expected).abs() < 1e-5),
            "{}: {out:?}",
            isa.name()
        );
    }
}

/// Alone, in a batch, chunked and on any number of threads: the same bits.
#[test]
fn a_query_has_the_same_bits_in_any_company() {
    for ty in TYPES {
        for (group, top_k) in [(1, 0), (7, 0), (8, 0), (8, 33), (70, 0)] {
            let visible: Vec<Visible> = (0..50)
                .map(|i| Visible {
                    n_kept: 100 + i as u32,
                    raw_begin: 3 * i,
                    raw_end: 1100 + i,
                })
                .collect();
            let mut case = Case::new(3, layout(group, 1, (32, 48), (ty, ty)), visible, 0, 2.0);
            case.top_k = top_k;
            case.n_always = 2;
            for &isa in available() {
                let n = if isa == Isa::Scalar { 3 } else { 50 };
                let whole = case.run_queries(isa, &Pool::new(1), 0..n);
                for threads in [2, 5] {
                    let got = case.run_queries(isa, &Pool::new(threads), 0..n);
                    assert_eq!(got, whole, "{ty:?} on {}, {threads} threads", isa.name());
                }
                for chunk in [1, 4, 33] {
                    let pool = Pool::new(3);
                    let chunked: Vec<f32> = (0..n)
                        .step_by(chunk)
                        .flat_map(|i| case.run_queries(isa, &pool, i..(i + chunk).min(n)))
                        .collect();
                    assert_eq!(
                        chunked,
                        whole,
                        "{ty:?} on {}, {chunk} at a time",
                        isa.name()
                    );
                }
            }
        }
    }
}

/// Several sequences in one call are the sequences one by one.
#[test]
fn sequences_do_not_mix() {
    let shape = layout(4, 2, (64, 64), (KvType::F16, KvType::Q8_0));
    let cases: Vec<Case> = [(1usize, 3000u64), (40, 10), (2, 700)]
        .iter()
        .enumerate()
        .map(|(i, &(n_q, first))| Case::new(i as u64, shape, causal(n_q, first, 5), 0, 1.0))
        .collect();
    for &isa in &available()[1..] {
        let pool = Pool::new(2);
        let kept: Vec<_> = cases.iter().map(|c| views(&c.kept)).collect();
        let raw: Vec<_> = cases.iter().map(|c| views(&c.raw)).collect();
        let mut outs: Vec<Vec<f32>> = cases
            .iter()
            .map(|c| vec![f32::NAN; c.visible.len() * shape.1 * 64])
            .collect();
        let mut seqs: Vec<Sequence<'_>> = cases
            .iter()
            .zip(&mut outs)
            .enumerate()
            .map(|(i, (case, out))| Sequence {
                q: &case.q,
                visible: &case.visible,
                kept: &kept[i],
                n_always: 0,
                top_k: 0,
                raw: &raw[i],
                raw_base: 0,
                out,
            })
            .collect();
        attend_with(isa, &pool, &shape.0, shape.1, cases[0].scale(), &mut seqs);
        for (case, out) in cases.iter().zip(&outs) {
            assert_eq!(&case.run(isa, &pool), out, "{}", isa.name());
        }
    }
}

#[test]
fn cells_keep_their_bytes_when_copied() {
    for ty_k in TYPES {
        for ty_v in TYPES {
            for dims in [(64, 64), (40, 72), (7, 13)] {
                let (layout, _) = layout(1, 3, dims, (ty_k, ty_v));
                let mut rng = StdRng::seed_from_u64(1);
                let src = &pages(&mut rng, &layout, 0..64, 1, 1.0)[0];
                let mut dst = vec![0u8; layout.page_bytes()];
                for cell in 0..64 {
                    layout.copy_cell(src, cell, &mut dst, 63 - cell);
                }
                let mut back = vec![0xffu8; layout.page_bytes()];
                for cell in 0..64 {
                    layout.copy_cell(&dst, 63 - cell, &mut back, cell);
                }
                assert!(src == &back, "{ty_k:?}/{ty_v:?} {dims:?}");
                let mut k = vec![f32::NAN; 3 * dims.0];
                let mut v = vec![f32::NAN; 3 * dims.1];
                let (mut k2, mut v2) = (k.clone(), v.clone());
                layout.read(src, 5, &mut k, &mut v);
                layout.read(&dst, 58, &mut k2, &mut v2);
                assert_eq!((k, v), (k2, v2));
            }
        }
    }
}

#[test]
fn what_is_read_is_what_was_written_to_the_precision_of_the_type() {
    // Q8_0: half a step of 1/127, and the rounding of the scale to F16.
    for (ty, bound) in [
        (KvType::F32, 0.0),
        (KvType::F16, 5e-4),
        (KvType::BF16, 4e-3),
        (KvType::Q8_0, 4.5e-3),
    ] {
        let (layout, _) = layout(1, 2, (80, 48), (ty, ty));
        let mut rng = StdRng::seed_from_u64(2);
        let mut page = vec![0xffu8; layout.page_bytes()];
        let k = numbers(&mut rng, 5 * 160, 3.0);
        let v = numbers(&mut rng, 5 * 96, 3.0);
        layout.write(&mut page, 30, 5, &k, &v);
        for c in 0..5 {
            let (mut k2, mut v2) = (vec![f32::NAN; 160], vec![f32::NAN; 96]);
            layout.read(&page, 30 + c, &mut k2, &mut v2);
            let keys = k[c * 160..].iter().zip(&k2);
            for (a, b) in keys.chain(v[c * 96..].iter().zip(&v2)) {
                assert!((a - b).abs() <= 3.0 * bound, "{ty:?}: {a} read as {b}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// More pages, and cells written after the last visible one, change nothing.
    #[test]
    fn hidden_cells_change_nothing(seed in 0u64..1000, n_kept in 0u32..150, n_raw in 1u64..300, ty in 0usize..4) {
        let ty = TYPES[ty];
        let shape = layout(4, 1, (32, 32), (ty, ty));
        let mut case = Case::new(seed, shape, causal(5, n_raw, n_kept), 0, 1.0);
        let before: Vec<_> = available().iter().map(|&isa| case.run(isa, &Pool::new(1))).collect();
        let k = numbers(&mut StdRng::seed_from_u64(seed), 32, 50.0);
        let last = n_raw as usize + 5;
        case.layout.write(&mut case.raw[last / PAGE_CELLS], last % PAGE_CELLS, 1, &k, &k);
        let mut more = vec![0xffu8; case.layout.page_bytes()];
        case.layout.write(&mut more, 0, 1, &k, &k);
        case.raw.push(more.clone());
        case.kept.push(more);
        for (&isa, before) in available().iter().zip(before) {
            prop_assert_eq!(before, case.run(isa, &Pool::new(1)));
        }
    }

    /// The order of kept cells matters to rounding only.
    #[test]
    fn kept_cells_may_be_permuted(seed in 0u64..1000, n in 2usize..200, ty in 0usize..4) {
        let ty = TYPES[ty];
        let visible = vec![Visible { n_kept: n as u32, raw_begin: 0, raw_end: 10 }; 3];
        let mut case = Case::new(seed, layout(4, 1, (32, 32), (ty, ty)), visible, 0, 1.0);
        let before: Vec<_> = available().iter().map(|&isa| case.run(isa, &Pool::new(1))).collect();
        let old = case.kept.clone();
        for cell in 0..n {
            // A permutation: 7919 is prime and n is smaller.
            let to = (cell * 7919 + seed as usize) % n;
            let page = &mut case.kept[to / PAGE_CELLS];
            case.layout.copy_cell(&old[cell / PAGE_CELLS], cell % PAGE_CELLS, page, to % PAGE_CELLS);
        }
        for (&isa, before) in available().iter().zip(before) {
            for (a, b) in before.iter().zip(&case.run(isa, &Pool::new(1))) {
                prop_assert!((a - b).abs() <= TOLERANCE, "{}: {} became {}", isa.name(), a, b);
            }
        }
    }
}
