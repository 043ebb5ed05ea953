//! `concepts`: against the reference in train/reference.py, and the invariants of all memories where a
//! context has no logits of its own (docs/memory.md, "`concepts`").

mod checkpoint;

use checkpoint::{Fixture, names, worst};
use mneme_convert::ConvertOptions;
use mneme_engine::gguf::{Gguf, GgufWriter, Value};
use mneme_engine::memory::concepts::cache::ConceptCache;
use mneme_engine::ops::Cpu;
use mneme_engine::{Engine, Feed, LoadOptions, Model, Sequence, SequenceOptions, Want};
use mneme_kernels::attend::KvType;
use std::ops::ControlFlow;
use std::path::PathBuf;

struct Bench {
    engine: Engine,
    ids: Vec<u32>,
    /// Whether a token has logits.
    answers: Vec<bool>,
    fixture: Fixture,
}

fn open(name: &str, n_ubatch: usize) -> Bench {
    let ops = Cpu::new(2);
    let fixture = Fixture::open(name, &ops);
    Bench {
        engine: Engine::new(fixture.model.clone(), ops, n_ubatch),
        ids: fixture.ids("input_ids"),
        answers: fixture.ids("answers").iter().map(|&a| a == 1).collect(),
        fixture,
    }
}

impl Bench {
    fn sequence(&self, memory: &str) -> Sequence {
        let options = SequenceOptions {
            n_ctx: 0,
            type_k: KvType::F32,
            type_v: KvType::F32,
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

    /// Feeds tokens `from..to` in pieces of at most `chunk` and returns the logits of those that have
    /// some.
    fn run(&mut self, seq: &mut Sequence, from: usize, to: usize, chunk: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        let mut at = from;
        while at < to {
            let most = to.min(at.saturating_add(chunk));
            let answered = self.answers[at..most].iter().take_while(|&&a| a).count();
            // Text outside contexts, or a part of a context up to the token that closes it.
            let (n, want) = match answered {
                0 => {
                    let silent = self.answers[at..most].iter().take_while(|&&a| !a).count();
                    match at + silent < most && self.closes(at + silent) {
                        true => (silent + 1, Want::Last),
                        false => (silent, Want::None),
                    }
                }
                n => (n, Want::All),
            };
            let tokens = self.ids[at..at + n].to_vec();
            logits.extend(self.feed(seq, &tokens, want));
            at += n;
        }
        logits
    }

    /// Whether token `i` ends a context.
    fn closes(&self, i: usize) -> bool {
        let tokens = self.fixture.model.weights.concepts.as_ref();
        self.ids[i] == tokens.expect("a compressor").tokens[1]
    }

    /// Logits of all tokens that have some, in chunks.
    fn all(&mut self, memory: &str, chunk: usize) -> (Vec<f32>, Sequence) {
        let mut seq = self.sequence(memory);
        let n = self.ids.len();
        let logits = self.run(&mut seq, 0, n, chunk);
        (logits, seq)
    }

    fn expected(&self) -> Vec<f32> {
        let n_vocab = self.fixture.model.hparams().n_vocab;
        let rows = self.fixture.logits("logits").chunks_exact(n_vocab);
        let rows = rows.zip(&self.answers).filter(|(_, a)| **a);
        rows.flat_map(|(row, _)| row.to_vec()).collect()
    }
}

fn fixtures() -> Vec<String> {
    names(&["concepts-"])
}

#[test]
fn concepts_match_the_reference() {
    for name in fixtures() {
        for n_ubatch in [512, 32] {
            let mut b = open(&name, n_ubatch);
            let expected = b.expected();
            for chunk in [usize::MAX, 1, 5, 16, 33] {
                let (got, seq) = b.all("concepts", chunk);
                let worst = worst(&got, &expected);
                assert!(worst < 5e-4, "{name}, chunks of {chunk}: off by {worst}");
                let segments: Vec<_> = (seq.nodes().iter())
                    .flat_map(|n| [n.start as u32, n.end as u32])
                    .collect();
                assert_eq!(segments, b.fixture.ids("segments"), "{name}");
            }
        }
    }
}

/// To the bit: chunks, what is in the cache already, and neighbours in a pass change nothing.
#[test]
fn how_a_text_is_fed_changes_nothing() {
    for name in fixtures() {
        let mut fresh = open(&name, 512);
        let (expected, one) = fresh.all("concepts", usize::MAX);
        for chunk in [1, 7, 64] {
            let mut other = open(&name, 40);
            let (got, seq) = other.all("concepts", chunk);
            assert_eq!(got, expected, "{name}, chunks of {chunk}");
            assert_eq!(seq.stats(), one.stats(), "{name}");
        }
        let (_, made) = fresh.engine.concepts.counts();
        let (again, _) = fresh.all("concepts", 16);
        assert_eq!(again, expected, "{name}, from the cache");
        assert_eq!(fresh.engine.concepts.counts().1, made, "nothing made twice");

        let ids = fresh.ids.clone();
        let cut = ids.len() - 2;
        let mut seqs = [0, 1, 2].map(|_| fresh.sequence("concepts"));
        let mut alone = fresh.sequence("concepts");
        let last = fresh.feed(&mut alone, &ids[..cut], Want::Last);
        let lens = [cut, 12, cut];
        let mut feeds: Vec<Feed> = (seqs.iter_mut().zip(lens))
            .map(|(seq, n)| Feed {
                seq,
                tokens: &ids[..n],
                want: if n == cut { Want::Last } else { Want::None },
            })
            .collect();
        fresh.engine.concepts = ConceptCache::default();
        let got = fresh.engine.step(&mut feeds).expect("the tokens fit");
        assert_eq!([&got[0], &got[2]], [&last, &last], "{name}, neighbours");
    }
}

#[test]
fn a_text_without_contexts_is_full() {
    for name in fixtures() {
        let mut b = open(&name, 512);
        let ids: Vec<u32> = (0..60).map(|i| (i * 37 + 11) % 500).collect();
        let [mut full, mut seq] = ["full", "concepts"].map(|memory| b.sequence(memory));
        let expected = b.feed(&mut full, &ids, Want::All);
        assert_eq!(b.feed(&mut seq, &ids, Want::All), expected, "{name}");
        assert_eq!(seq.stats().n_cells, full.stats().n_cells);
    }
}

/// Other words in a later context, or behind it, change no logits before.
#[test]
fn the_future_changes_nothing_before_it() {
    for name in fixtures() {
        let mut b = open(&name, 512);
        let (expected, _) = b.all("concepts", usize::MAX);
        let n_vocab = b.fixture.model.hparams().n_vocab;
        let ids = b.ids.clone();
        // In the long context, in the short one, in the last words.
        for t in [60, 133, ids.len() - 2] {
            b.ids = ids.clone();
            b.ids[t] = (ids[t] + 1) % 500;
            let before = b.answers[..t].iter().filter(|&&a| a).count() * n_vocab;
            let (got, _) = b.all("concepts", usize::MAX);
            assert_eq!(got[..before], expected[..before], "{name}, token {t}");
            assert_ne!(got[before..], expected[before..], "{name}, token {t}");
        }
    }
}

/// From every place in the text, in a context too: saved and loaded, gone back to, forked.
#[test]
fn going_on_and_going_back_are_exact() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in fixtures() {
        let mut b = open(&name, 512);
        let (expected, mut whole) = b.all("concepts", usize::MAX);
        let n_vocab = b.fixture.model.hparams().n_vocab;
        let n = b.ids.len();
        for at in [0, 3, 6, 17, 30, 63, 128, 130, 137, 139, n - 1] {
            let before = b.answers[..at].iter().filter(|&&a| a).count();
            let rest = &expected[before * n_vocab..];
            let mut seq = b.sequence("concepts");
            b.run(&mut seq, 0, at, 16);
            let path = folder.path().join("session");
            seq.save(&path, b"mine").expect("saved");
            let mut fork = seq.fork();
            let held = whole.truncate(b.engine.ops(), at);
            assert_eq!(held, at, "{name}");
            let model = b.fixture.model.clone();
            let (mut loaded, _) = Sequence::load(&model, &path, 0).expect("loaded");
            assert_eq!(loaded.stats(), seq.stats(), "{name} at {at}");
            assert_eq!(whole.stats(), seq.stats(), "{name} at {at}");
            for (what, seq) in [
                ("loaded", &mut loaded),
                ("fork", &mut fork),
                ("back", &mut whole),
            ] {
                assert_eq!(b.run(seq, at, n, 9), rest, "{name} at {at}: {what}");
            }
        }
    }
}

#[test]
fn bytes_stay_below_what_was_said() {
    for name in fixtures() {
        let mut b = open(&name, 512);
        let mut seq = b.sequence("concepts");
        for i in 0..b.ids.len() {
            let bound = seq.stats().bound_bytes;
            b.run(&mut seq, i, i + 1, 1);
            let stats = seq.stats();
            let held = stats.cell_bytes + stats.state_bytes;
            assert!(held <= bound, "{name}, token {i}: {held} > {bound}");
        }
        let stats = seq.stats();
        assert!(stats.n_cells < stats.n_tokens * 2 / 3, "{stats:?}");
    }
}

#[test]
fn what_has_no_logits_is_refused_in_words() {
    let mut b = open("concepts-qwen2", 512);
    let ids = b.ids.clone();
    let mut seq = b.sequence("concepts");
    for (tokens, want, word) in [
        (&ids[..30], Want::Last, "open or empty"),
        (&ids[..129], Want::All, "token 4"),
        (&ids[..30], Want::Best(3), "open or empty"),
        // An empty context.
        (&ids[..140], Want::Last, "open or empty"),
    ] {
        let feed = Feed {
            seq: &mut seq,
            tokens,
            want,
        };
        let Err(e) = b.engine.step_or_blame(&mut [feed]) else {
            panic!("{want:?} of {} tokens", tokens.len())
        };
        assert!(e.to_string().contains(word), "{e}");
        assert_eq!(seq.n_past(), 0);
    }
    for (memory, word) in [
        ("concepts:ratio=3", "2"),
        ("concepts:segment=21", "1 to 20"),
        ("concepts:segment=0", "1 to 20"),
    ] {
        let spec = memory.parse().expect(memory);
        let Err(e) = b.engine.sequence(&spec, SequenceOptions::default()) else {
            panic!("{memory}")
        };
        assert!(e.to_string().contains(word), "{e}");
    }
    let plain = Fixture::open("qwen2-tiny", b.engine.ops());
    let spec = "concepts".parse().expect("a memory");
    let Err(e) = Sequence::new(&plain.model, &spec, SequenceOptions::default()) else {
        panic!("no compressor")
    };
    assert!(e.to_string().contains("mem.ce_proj.weight"), "{e}");
}

/// Another process finds what this one has compressed; a broken entry is made again.
#[test]
fn segments_outlive_the_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let place = folder.path().display().to_string();
    let with_folder = || {
        let mut b = open("concepts-llama", 512);
        b.engine.concepts = ConceptCache::open(&place).expect("the folder");
        b
    };
    let mut first = with_folder();
    let (expected, _) = first.all("concepts", usize::MAX);
    assert_eq!(first.engine.concepts.counts(), (0, 14));
    let mut second = with_folder();
    assert_eq!(second.all("concepts", 16).0, expected);
    assert_eq!(second.engine.concepts.counts(), (14, 0));
    let entries: Vec<PathBuf> = std::fs::read_dir(folder.path())
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(entries.len(), 14);
    std::fs::write(&entries[3], b"mnemece\x01 and then nothing of use").expect("written");
    let mut third = with_folder();
    assert_eq!(third.all("concepts", 16).0, expected);
    assert_eq!(third.engine.concepts.counts(), (13, 1));
    // Segments of another size are other segments.
    let mut other = with_folder();
    let mut seq = other.sequence("concepts:segment=7");
    let n = other.ids.len();
    assert_ne!(other.run(&mut seq, 0, n, 16), expected);
    let (found, made) = other.engine.concepts.counts();
    assert!(made > 0 && found + made > 14, "{found} found, {made} made");
}

/// An edit costs the segments it touches: behind the next end of a sentence all are known.
#[test]
fn an_edit_compresses_only_what_it_touches() {
    let mut b = open("concepts-llama", 512);
    let mut seq = b.sequence("concepts");
    let ids = b.ids[..129].to_vec();
    b.feed(&mut seq, &ids, Want::Last);
    let (_, before) = b.engine.concepts.counts();
    for (at, most) in [(6, 2), (70, 2), (125, 2)] {
        // Another letter in a word, and a word more.
        for edited in [
            [&ids[..at], &[50], &ids[at + 1..]].concat(),
            [&ids[..at], &[50], &ids[at..]].concat(),
        ] {
            let made = b.engine.concepts.counts().1;
            let mut seq = b.sequence("concepts");
            b.feed(&mut seq, &edited, Want::Last);
            let made = b.engine.concepts.counts().1 - made;
            assert!((1..=most).contains(&made), "at {at}: {made} of {before}");
        }
    }
}

/// Keys and tensors of a compressor that cannot be.
#[test]
fn broken_compressors_are_refused_in_words() {
    let tmp = tempfile::tempdir().expect("a folder");
    let whole = tmp.path().join("whole.gguf");
    let options = ConvertOptions::new(checkpoint::dir().join("concepts-qwen2"), &whole);
    mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect("converted");
    let whole = Gguf::open(&whole).expect("just written");
    let n = |n: u32| Value::U32(n);
    let list = |ids: &[i32]| Value::from(ids.to_vec());
    let tokens = "tokenizer.ggml.context_token_ids";
    let (segment, ratio) = (
        "qwen2.memory.concepts.segment",
        "qwen2.memory.concepts.ratio",
    );
    let a = "mem.lora.0.attn_q.a.weight";
    for (key, value, left_out, words) in [
        (segment, None, "", "not found"),
        (segment, Some(n(0)), "", "outside"),
        (segment, Some(n(100_000)), "", "outside"),
        (segment, Some(n(60)), "", "takes 30 queries"),
        (ratio, Some(n(21)), "", "1 to 20"),
        (tokens, None, "", "two different tokens"),
        (tokens, Some(list(&[5, 5])), "", "two different tokens"),
        (tokens, Some(list(&[5, 514])), "", "below 514"),
        (tokens, Some(list(&[5, 6, 7])), "", "two different tokens"),
        (
            tokens,
            Some(list(&[512, 513])),
            "mem.query.weight",
            "mem.query.weight",
        ),
        (tokens, Some(list(&[512, 513])), a, a),
    ] {
        let path = tmp.path().join("broken.gguf");
        let mut writer = GgufWriter::new();
        for (k, v) in whole.keys().iter().filter(|(k, _)| k != key) {
            writer.set(k, v.clone());
        }
        if let Some(value) = &value {
            writer.set(key, value.clone());
        }
        let tensors: Vec<_> = (whole.tensors().iter())
            .filter(|t| t.name != left_out)
            .collect();
        for t in &tensors {
            writer.tensor(&t.name, &t.dims, t.ty).expect("a tensor");
        }
        let mut sink = writer.create(&path, true).expect("a file");
        for t in &tensors {
            sink.tensor(&t.name, whole.data(t)).expect("written");
        }
        sink.finish().expect("written");
        let Err(e) = Model::load(&path, &LoadOptions::default(), &Cpu::new(1), |_, _| {}) else {
            panic!("{key} = {value:?}, {left_out} left out: loaded")
        };
        assert!(e.to_string().contains(words), "{key} = {value:?}: {e}");
    }
}
