//! What must always hold, for every memory (docs/memory.md, "What must always hold"). A new memory
//! is tested by adding its row.

mod checkpoint;

use checkpoint::{Fixture, worst};
use mneme_engine::ops::Cpu;
use mneme_engine::ops::live_page_bytes;
use mneme_engine::{Engine, Feed, Sequence, SequenceOptions, Want};
use mneme_kernels::attend::KvType;
use std::sync::Mutex;

/// Fixture, memory, and whether chunking may change rounding (the chunked recurrence does).
const ROWS: &[(&str, &str, f32)] = &[
    ("qwen2-tiny", "full", 0.0),
    ("qwen3-tiny", "full", 0.0),
    ("llama-tiny", "full", 0.0),
    ("qwen2-tiny", "window:window=13,sinks=3", 0.0),
    ("llama-tiny", "window:window=1,sinks=0", 0.0),
    ("qwen3-tiny-tied", "window:window=20,sinks=1", 0.0),
    ("qwen2-tiny", "layered:full=0,window=13,sinks=3", 0.0),
    ("qwen3-tiny-tied", "layered:full=1,window=5,sinks=0", 0.0),
    ("ahn-gdn-tiny", "ahn:window=16,sinks=4", 5e-4),
    ("ahn-dn-tiny", "ahn:window=11,sinks=0", 5e-4),
    ("ahn-mamba2-tiny", "ahn:window=7,sinks=2", 5e-4),
    ("ahn-gdn-qwen3", "ahn:window=16,sinks=4", 5e-4),
    ("nodes-linear", "nodes", 0.0),
    ("nodes-linear", "nodes:position=compact", 0.0),
    ("nodes-linear", "nodes:position=compact,sinks=3", 0.0),
    ("nodes-linear", "nodes:decider=stride,stride=5", 0.0),
    ("nodes-linear", "nodes:decider=random,rate=0.2,seed=3", 0.0),
    ("nodes-linear", "nodes:decider=sentence,max=9", 0.0),
    (
        "nodes-linear",
        "nodes:decider=entropy,sigma=0.5,max=12",
        0.0,
    ),
    ("nodes-linear", "nodes:target_rate=6", 0.0),
    ("nodes-linear", "nodes:top_k=2", 0.0),
    ("nodes-linear", "nodes:node_max=3,fanin=2,max=6", 0.0),
    (
        "nodes-linear",
        "nodes:node_max=3,fanin=3,max=6,position=compact",
        0.0,
    ),
    ("nodes-linear", "nodes:reset=never", 0.0),
    ("nodes-mlp", "nodes:window=9", 0.0),
    ("nodes-cosine", "nodes", 0.0),
    ("nodes-llama", "nodes:window=3,sinks=2", 0.0),
    ("nodes-qwen3", "nodes:position=compact", 0.0),
    ("nodes-skip", "nodes:sees=nodes", 0.0),
    (
        "nodes-skip",
        "nodes:sees=nodes,position=compact,node_max=4,fanin=2",
        0.0,
    ),
    ("gist-qwen2", "gist", 0.0),
    ("gist-llama", "gist", 0.0),
];

struct Bench {
    engine: Engine,
    ids: Vec<u32>,
    memory: &'static str,
    slack: f32,
    type_kv: KvType,
}

/// Every row, with K/V in F32 and in F16.
fn rows() -> impl Iterator<Item = Bench> {
    ROWS.iter().flat_map(|&(name, memory, slack)| {
        [KvType::F32, KvType::F16].map(|type_kv| {
            let ops = Cpu::new(1);
            let fixture = Fixture::open(name, &ops);
            let ids = fixture.ids("input_ids");
            Bench {
                engine: Engine::new(fixture.model.clone(), ops, 64),
                ids: ids[..ids.len().min(96)].to_vec(),
                memory,
                slack: match type_kv {
                    KvType::F32 => slack,
                    _ => slack * 10.0,
                },
                type_kv,
            }
        })
    })
}

impl Bench {
    fn sequence(&self) -> Sequence {
        self.sequence_with(self.memory)
    }

    fn sequence_with(&self, memory: &str) -> Sequence {
        let options = SequenceOptions {
            n_ctx: 0,
            type_k: self.type_kv,
            type_v: self.type_kv,
        };
        let spec = memory.parse().expect(memory);
        self.engine.sequence(&spec, options).expect(memory)
    }

    fn feed(&mut self, seq: &mut Sequence, tokens: &[u32], want: Want) -> Vec<f32> {
        let mut logits = self
            .engine
            .step(&mut [Feed { seq, tokens, want }])
            .expect("the tokens fit");
        logits.remove(0)
    }

    /// Logits of every token, fed in chunks.
    fn run(&mut self, ids: &[u32], chunk: usize) -> (Vec<f32>, Sequence) {
        let mut seq = self.sequence();
        let mut logits = Vec::new();
        for ids in ids.chunks(chunk) {
            logits.extend(self.feed(&mut seq, ids, Want::All));
        }
        (logits, seq)
    }

    /// What a difference in the order of a sum may grow to: a last bit in F32; in F16, where it
    /// may push a key or value to the next representable one, 2^-11 of it.
    fn rounding(&self) -> f32 {
        match self.type_kv {
            KvType::F32 => 1e-4,
            _ => 5e-3,
        }
    }

    fn same(&self, got: &[f32], expected: &[f32], slack: f32, what: &str) {
        let off = worst(got, expected);
        assert!(off <= slack, "{}, {what}: off by {off}", self.memory);
    }
}

#[test]
fn nothing_dropped_means_full() {
    for mut b in rows() {
        let wide = match b.memory.split(':').next() {
            Some("nodes") => "nodes:decider=stride,stride=100000,max=100000,window=0,sinks=0",
            Some("window") => "window:window=1000,sinks=3",
            Some("layered") => "layered:full=0,window=1000,sinks=3",
            Some("ahn") => "ahn:window=1000,sinks=5",
            Some("gist") => "gist",
            _ => "full",
        };
        let gists: Vec<u32> = (512..514).collect();
        let ids: Vec<u32> = b
            .ids
            .iter()
            .copied()
            .filter(|id| !gists.contains(id))
            .collect();
        let mut full = b.sequence_with("full");
        let expected = b.feed(&mut full, &ids, Want::All);
        let mut seq = b.sequence_with(wide);
        let got = b.feed(&mut seq, &ids, Want::All);
        // Sinks lie in another region, which changes the order of a sum.
        b.same(&got, &expected, b.rounding(), "equality");
    }
}

#[test]
fn the_future_changes_nothing_before_it() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let (expected, _) = b.run(&ids, usize::MAX);
        let n_vocab = expected.len() / ids.len();
        for t in [1, ids.len() / 3, ids.len() / 2, ids.len() - 2] {
            let mut other = ids.clone();
            other[t..].reverse();
            let (got, _) = b.run(&other, usize::MAX);
            b.same(
                &got[..t * n_vocab],
                &expected[..t * n_vocab],
                b.slack,
                "causality",
            );
        }
    }
}

#[test]
fn freeing_a_cell_equals_masking_it() {
    for mut b in rows() {
        let ids = b.ids.clone();
        for chunk in [1, 16] {
            let (expected, _) = b.run(&ids, chunk);
            let mut seq = b.sequence();
            seq.hold_all();
            let mut got = Vec::new();
            for ids in ids.chunks(chunk) {
                got.extend(b.feed(&mut seq, ids, Want::All));
            }
            b.same(&got, &expected, 0.0, "drop = mask");
        }
    }
}

#[test]
fn chunks_of_any_size_give_the_same_logits_and_cuts() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let (expected, one) = b.run(&ids, usize::MAX);
        for chunk in [1, 2, 3, 17, 64, 65] {
            let (got, seq) = b.run(&ids, chunk);
            b.same(&got, &expected, b.slack, &format!("chunks of {chunk}"));
            assert_eq!(seq.nodes(), one.nodes(), "{}", b.memory);
            let (mine, theirs) = (seq.stats(), one.stats());
            assert_eq!(mine, theirs, "{}", b.memory);
        }
    }
}

/// Single tokens of sequences at different places in one pass, and a prompt beside them: the bits each
/// has alone.
#[test]
fn neighbours_in_a_pass_change_nothing() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let (expected, one) = b.run(&ids, 1);
        let n_vocab = expected.len() / ids.len();
        let at = [0, 7, 20, 21];
        let mut seqs = at.map(|n| b.run(&ids[..n], 1).1);
        let mut late = b.sequence();
        let n_steps = ids.len() - 21;
        for i in 0..n_steps {
            let want = Want::All;
            let feeds = seqs.iter_mut().zip(at).map(|(seq, n)| Feed {
                seq,
                tokens: &ids[n + i..n + i + 1],
                want,
            });
            let mut feeds: Vec<_> = feeds.collect();
            if i % 3 == 0 {
                let n = late.n_past();
                feeds.push(Feed {
                    seq: &mut late,
                    tokens: &ids[n..(n + 2).min(ids.len())],
                    want,
                });
            }
            let got = b.engine.step(&mut feeds).expect("the tokens fit");
            for (got, n) in got.iter().zip(at) {
                let row = (n + i) * n_vocab..(n + i + 1) * n_vocab;
                b.same(got, &expected[row], b.slack, "neighbours");
            }
        }
        let stats = (seqs[3].stats(), seqs[3].nodes());
        assert_eq!(stats, (one.stats(), one.nodes()), "{}", b.memory);
    }
}

/// A pass that one sequence has no room for: the others have read nothing of it.
#[test]
fn a_neighbour_without_room_changes_nothing() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let (expected, _) = b.run(&ids, 1);
        let n_vocab = expected.len() / ids.len();
        let options = SequenceOptions {
            n_ctx: 1,
            type_k: b.type_kv,
            type_v: b.type_kv,
        };
        let full = "full".parse().expect("full");
        let mut small = b.engine.sequence(&full, options).expect("full");
        b.feed(&mut small, &ids[..1], Want::None);
        let mut seq = b.sequence();
        for (i, id) in ids.iter().enumerate().take(40) {
            let token = std::slice::from_ref(id);
            let want = Want::All;
            let feeds = [&mut seq, &mut small].map(|seq| Feed {
                seq,
                tokens: token,
                want,
            });
            let mut feeds = feeds;
            assert!(b.engine.step(&mut feeds).is_err(), "no room for two");
            assert_eq!(seq.n_past(), i);
            let got = b.feed(&mut seq, token, want);
            let row = i * n_vocab..(i + 1) * n_vocab;
            b.same(&got, &expected[row], b.slack, "after a refusal");
        }
    }
}

/// Without logits of every token closed segments may be skipped; the last logits are the same.
#[test]
fn skipping_closed_segments_is_exact() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let (expected, _) = b.run(&ids, usize::MAX);
        let n_vocab = expected.len() / ids.len();
        for chunk in [ids.len(), 31, 8] {
            let mut seq = b.sequence();
            let mut last = Vec::new();
            for ids in ids.chunks(chunk) {
                last = b.feed(&mut seq, ids, Want::Last);
            }
            let expected = &expected[expected.len() - n_vocab..];
            b.same(&last, expected, b.slack, "skip");
        }
    }
}

#[test]
fn saving_and_loading_is_going_on() {
    let dir = tempfile::tempdir().expect("a folder");
    for (i, mut b) in rows().enumerate() {
        let ids = b.ids.clone();
        for t in [0, 1, ids.len() / 2, ids.len() - 1] {
            let (_, mut seq) = b.run(&ids[..t], 16);
            let path = dir.path().join(format!("{i}-{t}"));
            seq.save(&path, b"sampler").expect("saved");
            let expected = b.feed(&mut seq, &ids[t..], Want::All);
            let (mut again, extra) = Sequence::load(&b.engine.model, &path, 0).expect(b.memory);
            assert_eq!(extra, b"sampler");
            let got = b.feed(&mut again, &ids[t..], Want::All);
            b.same(&got, &expected, 0.0, "save = continue");
            assert_eq!(seq.nodes(), again.nodes());
        }
    }
}

#[test]
fn a_packed_sequence_and_a_twin_go_on_as_the_first() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let t = ids.len() / 2;
        let (_, mut seq) = b.run(&ids[..t], 16);
        seq.mark();
        let bytes = seq.pack().expect("packed");
        b.feed(&mut seq, &ids[t..t + 3], Want::None);
        let mut twin = seq.twin();
        let mut packed = Sequence::unpack(&b.engine.model, &bytes, 0).expect(b.memory);
        assert!(Sequence::unpack(&b.engine.model, &bytes[..bytes.len() - 1], 0).is_err());
        assert!(twin.n_bytes() >= seq.stats().cell_bytes + seq.stats().state_bytes);
        // The first one goes elsewhere, which the others must not notice.
        b.feed(&mut seq, &ids[..9], Want::None);
        let held = seq.truncate(b.engine.ops(), t);
        assert_eq!(held, t, "{}", b.memory);
        assert_eq!(twin.truncate(b.engine.ops(), t), t, "{}", b.memory);
        let expected = b.feed(&mut seq, &ids[t..], Want::All);
        let got = b.feed(&mut twin, &ids[t..], Want::All);
        b.same(&got, &expected, 0.0, "twin");
        let got = b.feed(&mut packed, &ids[t..], Want::All);
        b.same(&got, &expected, 0.0, "packed");
    }
}

#[test]
fn a_broken_session_file_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("session");
    for mut b in rows() {
        let ids = b.ids.clone();
        let (_, seq) = b.run(&ids[..40.min(ids.len())], 16);
        seq.save(&path, b"").expect("saved");
        let whole = std::fs::read(&path).expect("readable");
        for n in [0, 7, 20, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..n]).expect("writable");
            assert!(Sequence::load(&b.engine.model, &path, 0).is_err());
        }
        for at in (0..whole.len()).step_by(whole.len() / 23 + 1) {
            let mut bent = whole.clone();
            bent[at] ^= 0x5a;
            std::fs::write(&path, &bent).expect("writable");
            assert!(
                Sequence::load(&b.engine.model, &path, 0).is_err(),
                "byte {at}"
            );
        }
    }
}

#[test]
fn going_back_to_a_mark_is_exact_and_a_fork_is_its_own() {
    for mut b in rows() {
        let ids = b.ids.clone();
        let t = ids.len() / 2;
        let (_, mut seq) = b.run(&ids[..t], 16);
        seq.mark();
        let mut fork = seq.fork();
        let expected = b.feed(&mut seq, &ids[t..], Want::All);
        let held = seq.truncate(b.engine.ops(), t);
        assert_eq!(held, t, "{}: a mark is returned to exactly", b.memory);
        // Another future first, so that the way back must undo it.
        b.feed(&mut seq, &ids[..t.min(20)], Want::None);
        assert_eq!(seq.truncate(b.engine.ops(), t), t);
        let got = b.feed(&mut seq, &ids[t..], Want::All);
        b.same(&got, &expected, 0.0, "rollback");
        let got = b.feed(&mut fork, &ids[t..], Want::All);
        b.same(&got, &expected, 0.0, "fork");
        // Anywhere else: what is held is a prefix, and feeding the rest again is exact.
        let held = seq.truncate(b.engine.ops(), t + 3);
        assert!(held <= t + 3 && seq.n_past() == held);
        let rest = b.feed(&mut seq, &ids[held..], Want::All);
        let tail = expected.len().min(rest.len());
        let slack = b.slack;
        b.same(
            &rest[rest.len() - tail..],
            &expected[expected.len() - tail..],
            slack,
            "truncate",
        );
    }
}

/// Rows of [`ROWS`] that go back to a cut without having marked it.
fn rewinds(memory: &str) -> bool {
    let never = ["entropy", "node_max", "reset=never", "window"];
    let segments = memory.starts_with("nodes") || memory.starts_with("gist");
    segments && !never.iter().any(|word| memory.contains(word))
}

#[test]
fn going_back_anywhere_reads_one_segment_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("session");
    for mut b in rows().filter(|b| rewinds(b.memory)) {
        let ids = b.ids.clone();
        let (expected, seq) = b.run(&ids, 16);
        let width = expected.len() / ids.len();
        let nodes = seq.nodes();
        let longest = seq.stats().longest_segment;
        seq.save(&path, b"").expect("saved");
        for n in [1, 9, ids.len() / 3, ids.len() / 2, ids.len() - 1] {
            let (mut again, _) = Sequence::load(&b.engine.model, &path, 0).expect("readable");
            let held = again.truncate(b.engine.ops(), n);
            assert!(held <= n && again.n_past() == held, "{}", b.memory);
            // The gist tokens of a group are read again with their segment.
            const GROUP: usize = 4;
            assert!(
                n - held <= longest + GROUP,
                "{}: {} tokens to read again for {n}, segments of {longest}",
                b.memory,
                n - held
            );
            // Another future first, so that the way back must undo it.
            b.feed(&mut again, &ids[held..n], Want::None);
            b.feed(&mut again, &ids[..9], Want::None);
            let held = again.truncate(b.engine.ops(), n);
            let got = b.feed(&mut again, &ids[held..], Want::All);
            b.same(&got, &expected[held * width..], 0.0, "rewind");
            assert_eq!(again.nodes(), nodes, "{}", b.memory);
            let (a, e) = (again.stats(), seq.stats());
            assert_eq!(
                (a.n_entries, a.n_cells, a.rate, a.rate_spread, a.tau),
                (e.n_entries, e.n_cells, e.rate, e.rate_spread, e.tau),
                "{}",
                b.memory
            );
        }
    }
}

#[test]
fn going_back_in_a_long_text_runs_from_a_checkpoint() {
    for memory in ["nodes:position=compact,sinks=3", "nodes:target_rate=6"] {
        let rows = rows().filter(|b| b.memory.starts_with("nodes") && b.type_kv == KvType::F16);
        let mut b = rows.into_iter().next().expect("a row of nodes");
        let n_vocab = b.engine.model.hparams().n_vocab as u32;
        let ids: Vec<u32> = (0..20_000u32).map(|i| i * i * 7 % n_vocab).collect();
        let options = SequenceOptions {
            n_ctx: ids.len(),
            ..SequenceOptions::default()
        };
        let spec = memory.parse().expect(memory);
        let mut seq = b.engine.sequence(&spec, options).expect(memory);
        b.feed(&mut seq, &ids, Want::None);
        let mut whole = seq.fork();
        let expected = b.feed(&mut whole, &ids[..20], Want::All);
        for n in [19_999, 18_000, 16_000] {
            let held = seq.truncate(b.engine.ops(), n);
            let longest = whole.stats().longest_segment;
            assert!(n - held <= longest, "{memory}: back to {held} for {n}");
            b.feed(&mut seq, &ids[held..n], Want::None);
            let mut again = seq.fork();
            b.feed(&mut again, &ids[n..], Want::None);
            let got = b.feed(&mut again, &ids[..20], Want::All);
            b.same(&got, &expected, 0.0, memory);
            assert_eq!(again.nodes(), whole.nodes(), "{memory}");
        }
    }
}

/// Allocation is counted per process: one test at a time may look.
static COUNTING: Mutex<()> = Mutex::new(());

#[test]
fn bytes_stay_below_the_bound_and_come_back() {
    let _alone = COUNTING.lock();
    for mut b in rows() {
        let ids = b.ids.clone();
        let mut seq = b.sequence();
        for id in &ids {
            let bound = seq.stats().bound_bytes;
            b.feed(&mut seq, &[*id], Want::None);
            let stats = seq.stats();
            let held = stats.cell_bytes + stats.state_bytes;
            assert!(held <= bound, "{}: {held} bytes, bound {bound}", b.memory);
            assert_eq!(stats.n_tokens, seq.n_past());
        }
        assert!(live_page_bytes() >= seq.stats().cell_bytes);
    }
}

#[test]
fn bounded_memories_stay_bounded() {
    for mut b in rows() {
        let bounded = ["window", "ahn", "node_max"]
            .iter()
            .any(|w| b.memory.contains(w));
        if !bounded || b.memory.contains("nodes:window") || b.memory.contains("layered") {
            continue;
        }
        let ids: Vec<u32> = b.ids.iter().copied().cycle().take(3400).collect();
        let mut seq = b.sequence();
        let mut sizes = Vec::new();
        for chunk in ids.chunks(50) {
            b.feed(&mut seq, chunk, Want::None);
            let stats = seq.stats();
            sizes.push(stats.cell_bytes);
        }
        // Steps of 50 meet pages of 64 in the same way every 32 steps.
        let early = sizes[4..36].iter().max();
        let late = sizes[sizes.len() - 32..].iter().max();
        assert!(late <= early, "{}: {sizes:?}", b.memory);
    }
}

#[test]
fn a_refused_plan_changes_nothing() {
    let ops = Cpu::new(1);
    let fixture = Fixture::open("qwen2-tiny", &ops);
    let mut engine = Engine::new(fixture.model.clone(), ops, 64);
    let ids = fixture.ids("input_ids");
    let options = SequenceOptions {
        n_ctx: 30,
        ..SequenceOptions::default()
    };
    let mut seq = engine
        .sequence(&"full".parse().expect("full"), options)
        .expect("full");
    let mut step = |seq: &mut Sequence, tokens: &[u32]| {
        engine.step(&mut [Feed {
            seq,
            tokens,
            want: Want::All,
        }])
    };
    step(&mut seq, &ids[..20]).expect("fits");
    assert!(step(&mut seq, &ids[20..40]).is_err());
    assert_eq!(seq.n_past(), 20);
    assert!(step(&mut seq, &[9999]).is_err());
    let got = step(&mut seq, &ids[20..30]).expect("fits").remove(0);
    let n_vocab = got.len() / 10;
    let expected = &fixture.logits("logits")[20 * n_vocab..30 * n_vocab];
    assert!(worst(&got, expected) < 0.05, "F16 cells");
}
