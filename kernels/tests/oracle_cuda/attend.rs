//! `attend` and the cells it reads, against the scalar instruction set of the host.
//!
//! Cells that no query may see are NaN, pages stand in the pool in no order, outputs are poisoned.

use crate::{bits, device, get, poisoned, put, rng};
use mneme_kernels::attend::{KvType, PAGE_CELLS, PageLayout, Sequence, Visible, attend_with};
use mneme_kernels::cuda::attend::{
    Cells, PART_CELLS, Queries, Table, attend, copy_cells, page_bytes, page_from_host,
    page_to_host, read_cells, write_cells,
};
use mneme_kernels::cuda::{Buffer, Device};
use mneme_kernels::dispatch::Isa;
use mneme_kernels::pool::Pool;
use rand::RngExt;
use rand::rngs::StdRng;
use std::ops::Range;

const TYPES: [KvType; 4] = [KvType::F32, KvType::F16, KvType::BF16, KvType::Q8_0];

fn numbers(rng: &mut StdRng, n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-size..size)).collect()
}

fn layout(n_head_kv: usize, dims: (usize, usize), ty: (KvType, KvType)) -> PageLayout {
    PageLayout {
        n_head_kv,
        head_dim_k: dims.0,
        head_dim_v: dims.1,
        ty_k: ty.0,
        ty_v: ty.1,
    }
}

/// One sequence, its pages as the host has them.
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
    size: f32,
}

impl Case {
    /// Exactly the cells between the first and the last seen one are written.
    fn new(
        seed: u64,
        (layout, n_head): (PageLayout, usize),
        visible: Vec<Visible>,
        raw_base: u64,
        size: f32,
    ) -> Case {
        let mut rng = rng(seed);
        let n_kept = visible.iter().map(|v| v.n_kept).max().unwrap_or(0) as usize;
        let seen = visible.iter().filter(|v| v.raw_begin < v.raw_end);
        let begin = seen.clone().map(|v| v.raw_begin).min().unwrap_or(raw_base);
        let end = seen.map(|v| v.raw_end).max().unwrap_or(raw_base);
        let mut pages = |cells: Range<usize>, n: usize| {
            let mut pages = vec![vec![0xffu8; layout.page_bytes()]; n];
            for cell in cells {
                let k = numbers(&mut rng, layout.n_head_kv * layout.head_dim_k, size);
                let v = numbers(&mut rng, layout.n_head_kv * layout.head_dim_v, size);
                layout.write(&mut pages[cell / PAGE_CELLS], cell % PAGE_CELLS, 1, &k, &v);
            }
            pages
        };
        let raw = (begin - raw_base) as usize..(end - raw_base) as usize;
        let n_raw = raw.end.div_ceil(PAGE_CELLS);
        let (kept, raw) = (
            pages(0..n_kept, n_kept.div_ceil(PAGE_CELLS)),
            pages(raw, n_raw),
        );
        let q = numbers(&mut rng, visible.len() * n_head * layout.head_dim_k, size);
        Case {
            layout,
            n_head,
            q,
            visible,
            kept,
            raw,
            raw_base,
            n_always: 0,
            top_k: 0,
            size,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim_k as f32).sqrt()
    }

    fn expected(&self) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.visible.len() * self.n_head * self.layout.head_dim_v];
        let seq = Sequence {
            q: &self.q,
            visible: &self.visible,
            kept: &self.kept.iter().map(|p| &p[..]).collect::<Vec<_>>(),
            n_always: self.n_always,
            top_k: self.top_k,
            raw: &self.raw.iter().map(|p| &p[..]).collect::<Vec<_>>(),
            raw_base: self.raw_base,
            out: &mut out,
        };
        attend_with(
            Isa::Scalar,
            &Pool::new(1),
            &self.layout,
            self.n_head,
            self.scale(),
            &mut [seq],
        );
        out
    }

    /// How far a number may be off. Weights: half of F16's last bit with F16 and Q8_0 values (which
    /// are themselves rounded to it when dequantised), of BF16's twice over with the others.
    /// Scores: queries in two halves; Q8_0 keys are rounded to F16 when dequantised.
    fn bound(&self) -> f32 {
        let score = self.size * self.size * (self.layout.head_dim_k as f32).sqrt() / 3.0;
        let weights = match self.layout.ty_v {
            KvType::F16 => 2f32.powi(-11),
            KvType::Q8_0 => 2f32.powi(-10),
            KvType::F32 | KvType::BF16 => 2f32.powi(-15),
        };
        let scores = match self.layout.ty_k {
            KvType::F16 => score * 2f32.powi(-18),
            KvType::Q8_0 => score * 2f32.powi(-11),
            KvType::F32 | KvType::BF16 => score * 2f32.powi(-14),
        };
        1.1 * self.size * (weights + scores) + 1e-6 * self.size
    }

    fn check(&self, dev: &Device, name: &str) {
        let expected = self.expected();
        let got = run(dev, &[self], 0..self.visible.len());
        compare(&expected, &got, self.bound(), name);
    }
}

fn compare(expected: &[f32], got: &[f32], bound: f32, name: &str) {
    for (i, (e, g)) in expected.iter().zip(got).enumerate() {
        assert!(
            (e - g).abs() <= bound,
            "{name}: out[{i}] is {g}, expected {e}: off by {:e}, allowed {bound:e}",
            (e - g).abs()
        );
    }
}

/// What lies on the device for some sequences of one layout.
struct Placed {
    pool: Buffer<u8>,
    pages: Buffer<u32>,
    tables: Buffer<Table>,
}

/// Puts the pages into a pool, the last first, with a page of NaN between any two.
fn place(dev: &Device, cases: &[&Case]) -> Placed {
    let layout = cases[0].layout;
    let n = page_bytes(&layout);
    let all: Vec<&Vec<u8>> = cases
        .iter()
        .flat_map(|c| c.kept.iter().chain(&c.raw))
        .collect();
    let mut pool = vec![0xffu8; (2 * all.len() + 1) * n];
    let mut pages = Vec::new();
    for (i, host) in all.iter().enumerate() {
        let page = 2 * (all.len() - i) - 1;
        pages.push(page as u32);
        page_from_host(&layout, host, &mut pool[page * n..][..n]);
    }
    let mut at = 0;
    let tables: Vec<Table> = cases
        .iter()
        .map(|c| {
            let (n_kept, n_raw) = (c.kept.len() as u32, c.raw.len() as u32);
            let table = Table {
                kept: at,
                n_kept,
                raw: at + n_kept,
                n_raw,
                raw_base: c.raw_base,
                n_always: c.n_always,
                top_k: c.top_k,
            };
            at += n_kept + n_raw;
            table
        })
        .collect();
    Placed {
        pool: put(dev, &pool),
        pages: put(dev, &pages),
        tables: put(dev, &tables),
    }
}

/// Queries `range` of each of some sequences in one call.
fn run(dev: &Device, cases: &[&Case], range: Range<usize>) -> Vec<f32> {
    let first = cases[0];
    let (layout, n_head) = (first.layout, first.n_head);
    let placed = place(dev, cases);
    let (mut q, mut seq, mut visible) = (Vec::new(), Vec::new(), Vec::new());
    for (i, c) in cases.iter().enumerate() {
        let width = n_head * layout.head_dim_k;
        let range = range.start.min(c.visible.len())..range.end.min(c.visible.len());
        q.extend_from_slice(&c.q[range.start * width..range.end * width]);
        seq.extend(range.clone().map(|_| i as u32));
        visible.extend_from_slice(&c.visible[range]);
    }
    let cells = |v: &Visible| v.n_kept as u64 + v.raw_end.saturating_sub(v.raw_begin);
    let max_cells = visible.iter().map(cells).max().unwrap_or(0) as usize;
    let ranked = cases
        .iter()
        .filter(|c| c.top_k > 0)
        .flat_map(|c| &c.visible);
    let max_ranked = ranked.map(|v| v.n_kept).max().unwrap_or(0) as usize;
    let mut out = poisoned(dev, seq.len() * n_head * layout.head_dim_v);
    attend(
        dev,
        &layout,
        n_head,
        first.scale(),
        &Queries {
            q: put(dev, &q).all(),
            seq: put(dev, &seq).all(),
            visible: put(dev, &visible).all(),
        },
        &Cells {
            pool: placed.pool.all(),
            pages: placed.pages.all(),
            tables: placed.tables.all(),
        },
        max_cells,
        max_ranked,
        out.all_mut(),
    )
    .expect("attend");
    get(dev, &out)
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
    let Some(dev) = device() else { return };
    let mut seed = 0;
    for ty_k in TYPES {
        for ty_v in TYPES {
            for dims in [
                (64, 64),
                (128, 128),
                (7, 13),
                (80, 96),
                (256, 40),
                (40, 256),
            ] {
                let (group, n_head_kv) =
                    [(1, 1), (7, 2), (8, 1), (3, 3), (70, 1)][seed as usize % 5];
                seed += 1;
                let visible = causal(1 + seed as usize % 3, 90, 37);
                let shape = (layout(n_head_kv, dims, (ty_k, ty_v)), group * n_head_kv);
                Case::new(seed, shape, visible, 0, 1.0).check(
                    dev,
                    &format!("{ty_k:?}/{ty_v:?} {dims:?} {group}x{n_head_kv}"),
                );
            }
        }
    }
}

#[test]
fn every_length_near_the_edges_of_a_page_and_a_part() {
    let Some(dev) = device() else { return };
    let (page, part) = (PAGE_CELLS as u64, PART_CELLS as u64);
    for ty in [KvType::F16, KvType::Q8_0] {
        for n_raw in [
            0,
            1,
            15,
            16,
            17,
            page - 1,
            page,
            page + 1,
            part - 1,
            part,
            part + 1,
            3 * part + 9,
        ] {
            for n_kept in [0, 1, 64, 129] {
                let one = Visible {
                    n_kept,
                    raw_begin: 0,
                    raw_end: n_raw,
                };
                let shape = (layout(1, (64, 64), (ty, ty)), 4);
                Case::new(n_raw + u64::from(n_kept), shape, vec![one; 2], 0, 1.0)
                    .check(dev, &format!("{ty:?}, {n_kept} kept, {n_raw} raw"));
            }
        }
    }
}

#[test]
fn windows_off_every_boundary() {
    let Some(dev) = device() else { return };
    for begin in (1000..1140).step_by(23) {
        for len in [1u64, 5, 64, 300] {
            let visible: Vec<Visible> = (0..9)
                .map(|i| Visible {
                    n_kept: i as u32 % 4,
                    raw_begin: begin + i,
                    raw_end: begin + i + len,
                })
                .collect();
            let shape = (layout(2, (32, 32), (KvType::F16, KvType::F16)), 4);
            Case::new(begin, shape, visible, 960, 1.0).check(dev, &format!("window {begin}+{len}"));
        }
    }
}

/// Queries that look far apart: what lies between, seen by none, is NaN.
#[test]
fn cells_between_two_queries_stay_unread() {
    let Some(dev) = device() else { return };
    for ty in TYPES {
        let layout = layout(1, (32, 32), (ty, ty));
        let see = |raw_begin, raw_end| Visible {
            n_kept: 0,
            raw_begin,
            raw_end,
        };
        let visible = vec![see(3, 9), see(50, 53), see(3000, 3001)];
        let mut case = Case::new(1, (layout, 4), visible, 0, 1.0);
        let nan = vec![vec![0xff; layout.page_bytes()]; 48];
        let whole = std::mem::replace(&mut case.raw, nan);
        for cell in (3..9).chain(50..53).chain(3000..3001) {
            let (page, at) = (cell / PAGE_CELLS, cell % PAGE_CELLS);
            layout.copy_cell(&whole[page], at, &mut case.raw[page], at);
        }
        case.check(dev, &format!("{ty:?}"));
    }
}

#[test]
fn large_and_tiny_numbers() {
    let Some(dev) = device() else { return };
    for ty in TYPES {
        for size in [1e-4, 1e-2, 4.0, 30.0] {
            let shape = (layout(1, (64, 64), (ty, ty)), 8);
            Case::new(5, shape, causal(5, 200, 70), 0, size)
                .check(dev, &format!("{ty:?} at {size}"));
        }
    }
}

#[test]
fn top_k_reads_the_best_nodes_only() {
    let Some(dev) = device() else { return };
    for ty in TYPES {
        for top_k in [1, 5, 64, 195, 199, 300] {
            let shape = (layout(2, (64, 64), (ty, ty)), 8);
            let mut case = Case::new(11, shape, causal(3, 30, 200), 0, 1.0);
            case.n_always = 4;
            case.top_k = top_k;
            case.check(dev, &format!("{ty:?} top_k {top_k}"));
        }
    }
}

/// Equal keys rank by age: values that are powers of two tell which cells were seen.
#[test]
fn top_k_prefers_the_older_of_equals() {
    let Some(dev) = device() else { return };
    let layout = layout(1, (16, 16), (KvType::F32, KvType::F32));
    for (n_always, top_k, expected) in [(1, 3, 15.0 / 4.0), (0, 1, 1.0), (2, 5, 127.0 / 7.0)] {
        let visible = vec![Visible {
            n_kept: 10,
            raw_begin: 0,
            raw_end: 0,
        }];
        let mut case = Case::new(0, (layout, 2), visible, 0, 1.0);
        for cell in 0..10 {
            layout.write(
                &mut case.kept[0],
                cell,
                1,
                &[1.0; 16],
                &[(1 << cell) as f32; 16],
            );
        }
        case.q.fill(0.5);
        case.n_always = n_always;
        case.top_k = top_k;
        let got = run(dev, &[&case], 0..1);
        assert!(
            got.iter().all(|x| (x - expected).abs() < 1e-3),
            "{top_k}: {got:?}"
        );
    }
}

/// Alone and in a batch of any size: the same bits. The batch is large enough that it takes the
/// form of prefill, a few queries that of decode.
#[test]
fn a_query_has_the_same_bits_in_any_company() {
    let Some(dev) = device() else { return };
    for (i, ty) in TYPES.into_iter().enumerate() {
        let (group, top_k) = [(1, 0), (7, 0), (8, 33), (70, 0)][i];
        let n_q = 2200 / group;
        let visible: Vec<Visible> = (0..n_q as u64)
            .map(|i| Visible {
                n_kept: 70 + i as u32 % 50,
                raw_begin: i % 150,
                raw_end: 160 + i % 40,
            })
            .collect();
        let mut case = Case::new(3, (layout(1, (32, 48), (ty, ty)), group), visible, 0, 2.0);
        case.top_k = top_k;
        case.n_always = 2;
        let whole = run(dev, &[&case], 0..n_q);
        for queries in [0..1, 5..6, 3..20, n_q - 2..n_q] {
            let width = group * 48;
            let expected = &whole[queries.start * width..queries.end * width];
            let got = run(dev, &[&case], queries.clone());
            assert_eq!(bits(expected), bits(&got), "{ty:?}, queries {queries:?}");
        }
    }
}

/// Several sequences in one call are the sequences one by one, in both forms.
#[test]
fn sequences_do_not_mix() {
    let Some(dev) = device() else { return };
    let shape = (layout(2, (64, 64), (KvType::F16, KvType::Q8_0)), 8);
    for sizes in [[1, 5, 2], [100, 263, 151]] {
        let mut cases: Vec<Case> = sizes
            .iter()
            .zip([300u64, 10, 70])
            .enumerate()
            .map(|(i, (&n_q, first))| Case::new(i as u64, shape, causal(n_q, first, 5), 0, 1.0))
            .collect();
        cases[1].top_k = 2;
        let all = run(dev, &cases.iter().collect::<Vec<_>>(), 0..usize::MAX);
        let alone: Vec<f32> = cases
            .iter()
            .flat_map(|c| run(dev, &[c], 0..usize::MAX))
            .collect();
        assert_eq!(bits(&all), bits(&alone));
        let expected: Vec<f32> = cases.iter().flat_map(Case::expected).collect();
        compare(&expected, &all, cases[0].bound(), "three sequences");
    }
}

/// Nonsense in the tables gives NaN, not a wrong answer and not a crash.
#[test]
fn cells_that_no_page_holds_give_nan() {
    let Some(dev) = device() else { return };
    let layout = layout(1, (64, 64), (KvType::F16, KvType::F16));
    let case = Case::new(0, (layout, 1), causal(1, 200, 70), 0, 1.0);
    let placed = place(dev, &[&case]);
    let n = case.kept.len() as u32 + case.raw.len() as u32;
    let table = get_table(dev, &placed);
    let wrong = [
        Table { n_raw: 1, ..table },
        Table { n_kept: 1, ..table },
        Table { raw: n, ..table },
        Table {
            kept: u32::MAX,
            ..table
        },
        Table {
            raw_base: 64,
            ..table
        },
    ];
    let call = |table: Table, seq: u32, max_cells: usize| {
        let mut out = poisoned(dev, 64);
        dev.zero(out.all_mut()).expect("zero");
        let (q, seq) = (put(dev, &case.q), put(dev, &[seq]));
        let (visible, tables) = (put(dev, &case.visible), put(dev, &[table]));
        let queries = Queries {
            q: q.all(),
            seq: seq.all(),
            visible: visible.all(),
        };
        let cells = Cells {
            pool: placed.pool.all(),
            pages: placed.pages.all(),
            tables: tables.all(),
        };
        attend(
            dev,
            &layout,
            1,
            1.0,
            &queries,
            &cells,
            max_cells,
            0,
            out.all_mut(),
        )
        .expect("attend");
        get(dev, &out)
    };
    assert!(call(table, 0, 300).iter().all(|x| x.is_finite()));
    for table in wrong {
        assert!(call(table, 0, 300).iter().all(|x| x.is_nan()), "{table:?}");
    }
    assert!(
        call(table, 1, 300).iter().all(|x| x.is_nan()),
        "no such sequence"
    );
}

fn get_table(dev: &Device, placed: &Placed) -> Table {
    let mut table = [Table::default()];
    dev.read(placed.tables.all(), &mut table).expect("read");
    table[0]
}

/// Written on the device as on the host, byte for byte; read back as stored; moved exactly.
#[test]
fn cells_are_written_read_and_moved_exactly() {
    let Some(dev) = device() else { return };
    let mut rng = rng(9);
    for ty_k in TYPES {
        for ty_v in TYPES {
            for dims in [(64, 64), (40, 72), (7, 13), (256, 128)] {
                let layout = layout(3, dims, (ty_k, ty_v));
                let n = page_bytes(&layout);
                let slots: Vec<u32> = [64, 127, 70, 0, 65, u32::MAX, 3 * 64].to_vec();
                let k = numbers(&mut rng, slots.len() * 3 * dims.0, 2.0);
                let v = numbers(&mut rng, slots.len() * 3 * dims.1, 2.0);
                let mut host = vec![vec![0u8; layout.page_bytes()]; 3];
                for (i, &slot) in slots.iter().enumerate().filter(|(_, s)| **s < 3 * 64) {
                    let (k, v) = (&k[i * 3 * dims.0..], &v[i * 3 * dims.1..]);
                    let (page, cell) = (slot as usize / 64, slot as usize % 64);
                    layout.write(&mut host[page], cell, 1, &k[..3 * dims.0], &v[..3 * dims.1]);
                }
                let mut pool = put(dev, &vec![0u8; 3 * n]);
                let slots_dev = put(dev, &slots);
                let (k_dev, v_dev) = (put(dev, &k), put(dev, &v));
                write_cells(
                    dev,
                    &layout,
                    pool.all_mut(),
                    slots_dev.all(),
                    k_dev.all(),
                    v_dev.all(),
                )
                .expect("write_cells");
                let name = format!("{ty_k:?}/{ty_v:?} {dims:?}");
                let check_page =
                    |pool: &Buffer<u8>, page: usize, slot: usize, from: (usize, usize)| {
                        let bytes = get(dev, pool);
                        let mut back = vec![0u8; layout.page_bytes()];
                        page_to_host(&layout, &bytes[page * n..][..n], &mut back);
                        let (mut a, mut b) = (vec![0.0; 3 * dims.0], vec![0.0; 3 * dims.1]);
                        let (mut c, mut d) = (a.clone(), b.clone());
                        layout.read(&back, slot, &mut a, &mut b);
                        layout.read(&host[from.0], from.1, &mut c, &mut d);
                        assert_eq!((bits(&a), bits(&b)), (bits(&c), bits(&d)), "{name}");
                    };
                for &slot in slots.iter().filter(|s| **s < 3 * 64) {
                    let (page, cell) = (slot as usize / 64, slot as usize % 64);
                    check_page(&pool, page, cell, (page, cell));
                }
                let (mut k2, mut v2) = (poisoned(dev, k.len()), poisoned(dev, v.len()));
                read_cells(
                    dev,
                    &layout,
                    pool.all(),
                    slots_dev.all(),
                    k2.all_mut(),
                    v2.all_mut(),
                )
                .expect("read_cells");
                let (k2, v2) = (get(dev, &k2), get(dev, &v2));
                let (mut c, mut d) = (vec![0.0; 3 * dims.0], vec![0.0; 3 * dims.1]);
                for (i, &slot) in slots.iter().enumerate() {
                    let (k2, v2) = (&k2[i * c.len()..][..c.len()], &v2[i * d.len()..][..d.len()]);
                    if slot as usize >= 3 * 64 {
                        assert!(k2.iter().chain(v2).all(|x| x.is_nan()));
                        continue;
                    }
                    layout.read(
                        &host[slot as usize / 64],
                        slot as usize % 64,
                        &mut c,
                        &mut d,
                    );
                    assert_eq!((bits(k2), bits(v2)), (bits(&c), bits(&d)), "{name}");
                }
                let (from, to) = (put(dev, &[64u32, 127, 5000]), put(dev, &[150u32, 1, 2]));
                copy_cells(dev, &layout, pool.all_mut(), from.all(), to.all()).expect("copy_cells");
                check_page(&pool, 2, 22, (1, 0));
                check_page(&pool, 0, 1, (1, 63));
            }
        }
    }
}

#[test]
fn pages_go_to_the_device_and_back_unchanged() {
    let mut rng = rng(10);
    for ty_k in TYPES {
        for ty_v in TYPES {
            let layout = layout(2, (40, 72), (ty_k, ty_v));
            let mut host = vec![0u8; layout.page_bytes()];
            for cell in 0..64 {
                let k = numbers(&mut rng, 2 * 40, 1.0);
                let v = numbers(&mut rng, 2 * 72, 1.0);
                layout.write(&mut host, cell, 1, &k, &v);
            }
            let mut there = vec![0xffu8; page_bytes(&layout)];
            page_from_host(&layout, &host, &mut there);
            let mut back = vec![0xffu8; layout.page_bytes()];
            page_to_host(&layout, &there, &mut back);
            for cell in 0..64 {
                let (mut a, mut b) = (vec![0.0; 80], vec![0.0; 144]);
                let (mut c, mut d) = (a.clone(), b.clone());
                layout.read(&host, cell, &mut a, &mut b);
                layout.read(&back, cell, &mut c, &mut d);
                assert_eq!((bits(&a), bits(&b)), (bits(&c), bits(&d)));
            }
        }
    }
}
