//! Whole models on a card against the same models on the host: an emulated card with the feature
//! `cuda-host`, the first GPU with `cuda`. Without a GPU the tests say so and pass.

#![cfg(feature = "on-card")]

mod checkpoint;

use checkpoint::{Fixture, worst};
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::ops::{Contexts, Cpu, Cuda, Device, DeviceChoice, Layers, Request, open};
use mneme_engine::sampler::{Sampler, SamplerParams};
use mneme_engine::weights::Weights;
use mneme_engine::{
    Engine, Error, Feed, LoadOptions, Model, Output, Sequence, SequenceOptions, Want,
};
use mneme_kernels::attend::KvType;
use mneme_kernels::cuda;
use std::ops::ControlFlow;

/// Fixture and memory.
const ROWS: &[(&str, &str)] = &[
    ("qwen2-tiny", "full"),
    ("qwen3-tiny", "full"),
    ("llama-tiny", "full"),
    ("qwen2-tiny-untied", "window:window=13,sinks=3"),
    ("qwen3-tiny", "layered:full=1,window=13,sinks=3"),
    ("ahn-gdn-tiny", "ahn:window=16,sinks=4"),
    ("ahn-dn-tiny", "ahn:window=11,sinks=0"),
    ("ahn-mamba2-tiny", "ahn:window=7,sinks=2"),
    ("ahn-gdn-qwen3", "ahn:window=16,sinks=4"),
    ("nodes-linear", "nodes"),
    ("nodes-linear", "nodes:position=compact,sinks=3"),
    ("nodes-linear", "nodes:top_k=2"),
    ("nodes-linear", "nodes:node_max=3,fanin=2,max=6"),
    ("nodes-linear", "nodes:decider=entropy,sigma=0.5,max=12"),
    ("nodes-llama", "nodes:window=3,sinks=2"),
    ("nodes-skip", "nodes:sees=nodes"),
    ("nodes-cosine", "nodes"),
    ("nodes-mlp", "nodes:position=compact"),
    ("nodes-sentence", "nodes"),
    ("nodes-never", "nodes"),
    ("gist-qwen2", "gist"),
];

/// Largest difference beside the largest logit, with keys and values in F32 and in F16: the card
/// multiplies in F16 with sums in F32.
const TOLERANCE: f32 = 1e-2;

/// Tokens of each test.
const N: usize = 72;
/// All layers on the card, however many there are.
const ALL: usize = usize::MAX;

/// The same model on a card and on the host.
struct Pair {
    card: Engine,
    host: Engine,
    ids: Vec<u32>,
    fixture: Fixture,
    memory: &'static str,
    options: SequenceOptions,
}

/// `None`, with words, where there is no card.
fn card() -> Option<Cuda> {
    if cuda::Device::count() == 0 {
        println!("skipped: no GPU on this machine");
        return None;
    }
    Some(Cuda::open(0, Cpu::new(1)).expect("the card opens"))
}

impl Pair {
    /// With the last `n_card` layers on the card.
    fn new(name: &str, memory: &'static str, type_kv: KvType, n_card: usize) -> Option<Pair> {
        let (ops, host) = (card()?, Cpu::new(1));
        let fixture = Fixture::open(name, &host);
        let n_layer = fixture.model.hparams().n_layer;
        let ops = ops.from_layer(n_layer.saturating_sub(n_card));
        let on_card = Fixture::open(name, &ops);
        let ids = fixture.ids("input_ids");
        Some(Pair {
            card: Engine::new(on_card.model, ops, 64),
            host: Engine::new(fixture.model.clone(), host, 64),
            ids: ids[..ids.len().min(N)].to_vec(),
            fixture,
            memory,
            options: SequenceOptions {
                n_ctx: 0,
                type_k: type_kv,
                type_v: type_kv,
            },
        })
    }

    fn n_layer(&self) -> usize {
        self.host.model.hparams().n_layer
    }

    /// Passes that were one launch of a recording.
    fn n_replays(&self) -> u64 {
        match self.card.ops().device() {
            Device::Cuda(card) => card.n_replays(),
            Device::Host => unreachable!("the verbs of a card"),
        }
    }

    fn sequence(&self) -> Sequence {
        let spec: MemorySpec = self.memory.parse().expect(self.memory);
        self.card.sequence(&spec, self.options).expect(self.memory)
    }

    fn close(&self, got: &[f32], expected: &[f32], what: &str) {
        let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
        let off = worst(got, expected) / largest;
        println!("{}, {}, {what}: {off:.1e}", self.fixture.name, self.memory);
        assert!(
            off < TOLERANCE,
            "{}, {}, {what}: off by {off}",
            self.fixture.name,
            self.memory
        );
    }
}

fn feed(engine: &mut Engine, seq: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    let want = Want::All;
    let mut logits = engine
        .step(&mut [Feed { seq, tokens, want }])
        .expect("the tokens fit");
    logits.remove(0)
}

/// Logits of all tokens: a prompt in chunks, then one at a time.
fn run(
    engine: &mut Engine,
    seq: &mut Sequence,
    ids: &[u32],
    prompt: usize,
    chunk: usize,
) -> Vec<f32> {
    let mut logits = Vec::new();
    for ids in ids[..prompt].chunks(chunk) {
        logits.extend(feed(engine, seq, ids));
    }
    for id in &ids[prompt..] {
        logits.extend(feed(engine, seq, &[*id]));
    }
    logits
}

/// A prompt and single tokens against the host's, with `n_card` layers on the card.
fn compare_with_the_host(name: &str, memory: &'static str, n_card: usize) -> Option<()> {
    let mut p = Pair::new(name, memory, KvType::F32, n_card)?;
    let ids = p.ids.clone();
    let prompt = ids.len() - 20;
    let spec = memory.parse().expect(memory);
    let mut theirs = p.host.sequence(&spec, p.options).expect(memory);
    let mut mine = p.sequence();
    let expected = run(&mut p.host, &mut theirs, &ids, prompt, 24);
    let got = run(&mut p.card, &mut mine, &ids, prompt, 24);
    p.close(&got, &expected, "logits");
    // Single tokens are recorded the second time and replayed from the third on, but for those
    // that come with slots. States lie at two addresses in turn.
    let least = if memory.starts_with("nodes") { 12 } else { 16 };
    let n = p.n_replays();
    println!("{name}, {memory}: {n} of 20 replayed");
    assert!(n >= least, "{name}, {memory}: {n} of 20 replayed");
    let cuts = |seq: &Sequence| -> Vec<_> {
        seq.nodes()
            .iter()
            .map(|n| (n.level, n.start, n.end))
            .collect()
    };
    assert_eq!(cuts(&mine), cuts(&theirs), "{name}, {memory}");
    if memory.starts_with("nodes") && name != "nodes-never" {
        let late = mine.nodes().iter().filter(|n| n.end > prompt).count();
        assert!(late > 0, "{name}, {memory}: no cut among single tokens");
    }
    let (mut mine, theirs) = (mine.stats(), theirs.stats());
    let held = mine.cell_bytes + mine.state_bytes;
    assert!(mine.card_bytes > 0 && mine.card_bytes <= held, "{name}");
    assert_eq!(theirs.card_bytes, 0, "{name}");
    if n_card < p.n_layer() {
        // All layers hold the same here. What `nodes` and `gist` keep beside cells is the host's.
        let of_layers = match memory.starts_with("ahn") {
            true => held,
            false => mine.cell_bytes,
        };
        let part = of_layers * n_card / p.n_layer();
        let even = !memory.starts_with("layered");
        assert!(!even || mine.card_bytes == part, "{name}, {memory}");
    }
    mine.card_bytes = 0;
    assert_eq!(mine, theirs, "{name}, {memory}");
    Some(())
}

#[test]
fn logits_are_those_of_the_host() {
    for &(name, memory) in ROWS {
        if compare_with_the_host(name, memory, ALL).is_none() {
            return;
        }
    }
}

/// Wherever the model is cut in two.
#[test]
fn a_split_model_has_the_logits_of_the_host() {
    for &(name, memory) in ROWS {
        let n_layer = Fixture::open(name, &Cpu::new(1)).model.hparams().n_layer;
        assert!(n_layer > 1, "{name}: nothing to split");
        for n_card in 1..n_layer {
            if compare_with_the_host(name, memory, n_card).is_none() {
                return;
            }
        }
    }
}

/// Contexts compressed on the card, wherever the model is cut in two.
#[test]
fn contexts_are_those_of_the_host() {
    for name in ["concepts-qwen2", "concepts-llama", "concepts-qwen3"] {
        for n_card in [ALL, 1] {
            let Some(mut p) = Pair::new(name, "concepts", KvType::F32, n_card) else {
                return;
            };
            let ids = p.fixture.ids("input_ids");
            let spec = p.memory.parse().expect("concepts");
            let mut theirs = p.host.sequence(&spec, p.options).expect("concepts");
            let mut mine = p.sequence();
            for tokens in [&ids[..60], &ids[60..]] {
                let want = match tokens.len() {
                    60 => Want::None,
                    _ => Want::Last,
                };
                let step = |engine: &mut Engine, seq: &mut Sequence| {
                    let logits = engine.step(&mut [Feed { seq, tokens, want }]);
                    logits.expect("the tokens fit").remove(0)
                };
                let expected = step(&mut p.host, &mut theirs);
                let got = step(&mut p.card, &mut mine);
                if want == Want::Last {
                    p.close(&got, &expected, "logits");
                }
            }
            let (mut mine, theirs) = (mine.stats(), theirs.stats());
            assert!(mine.card_bytes > 0, "{name}");
            mine.card_bytes = 0;
            assert_eq!(mine, theirs, "{name}");
        }
    }
}

#[test]
fn every_type_of_cells_works() {
    for ty in [KvType::F16, KvType::BF16, KvType::Q8_0] {
        for n_card in [ALL, 1] {
            let memory = "window:window=30,sinks=2";
            let Some(mut p) = Pair::new("qwen2-k256", memory, ty, n_card) else {
                return;
            };
            let ids = p.ids.clone();
            let spec = p.memory.parse().expect("window");
            let mut theirs = p.host.sequence(&spec, p.options).expect("window");
            let mut mine = p.sequence();
            let expected = run(&mut p.host, &mut theirs, &ids, 40, 40);
            let got = run(&mut p.card, &mut mine, &ids, 40, 40);
            p.close(&got, &expected, ty.name());
        }
    }
}

#[test]
fn greedy_text_is_the_same() {
    for name in ["qwen2-tiny", "qwen3-tiny", "llama-tiny"] {
        let Some(mut p) = Pair::new(name, "full", KvType::F32, ALL) else {
            return;
        };
        let n_vocab = p.host.model.hparams().n_vocab;
        let mut seq = p.sequence();
        // Nobody asks for the logits of the prompt's beginning, nor for any but its last.
        let prompt = p.fixture.ids("greedy.prompt_ids");
        let (head, tail) = prompt.split_at(prompt.len() / 2);
        let mut logits = Vec::new();
        for (tokens, want) in [(head, Want::None), (tail, Want::Last)] {
            let seq = &mut seq;
            let mut feeds = [Feed { seq, tokens, want }];
            logits = p.card.step(&mut feeds).expect("the tokens fit").remove(0);
        }
        for &id in &p.fixture.ids("greedy.ids") {
            let row = &logits[logits.len() - n_vocab..];
            let best = (0..n_vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            assert_eq!(best, Some(id as usize), "{name}");
            logits = feed(&mut p.card, &mut seq, &[id]);
        }
    }
}

/// Hidden states come behind the last layer's norm, on the card, from whichever layer on it runs.
#[test]
fn hidden_states_are_those_of_the_host() {
    for n_card in [ALL, 1, 2] {
        let Some(mut p) = Pair::new("qwen2-tiny", "full", KvType::F32, n_card) else {
            return;
        };
        let ids = p.ids[..40].to_vec();
        let spec = p.memory.parse().expect("full");
        let theirs = p.host.sequence(&spec, p.options).expect("full");
        let hidden = |engine: &mut Engine, mut seq: Sequence| {
            let (seq, tokens, want) = (&mut seq, &ids[..], Want::Hidden);
            let rows = engine.step(&mut [Feed { seq, tokens, want }]);
            rows.expect("the tokens fit").remove(0)
        };
        let mine = p.sequence();
        let expected = hidden(&mut p.host, theirs);
        let got = hidden(&mut p.card, mine);
        p.close(&got, &expected, "hidden states");
    }
}

/// However a prompt is cut, and whatever else is in the pass; the chunked recurrence rounds
/// differently.
#[test]
fn chunks_and_neighbours_change_nothing() {
    for (name, memory, n_card, exact) in [
        ("qwen2-tiny", "full", ALL, true),
        ("nodes-linear", "nodes:position=compact,sinks=3", ALL, true),
        ("nodes-cosine", "nodes", ALL, true),
        ("ahn-gdn-tiny", "ahn:window=16,sinks=4", ALL, false),
        ("qwen2-tiny", "full", 1, true),
        ("llama-tiny", "window:window=13,sinks=3", 2, true),
        ("nodes-linear", "nodes:position=compact,sinks=3", 1, true),
        ("nodes-cosine", "nodes", 1, true),
        ("ahn-gdn-tiny", "ahn:window=16,sinks=4", 2, false),
    ] {
        let Some(mut p) = Pair::new(name, memory, KvType::F16, n_card) else {
            return;
        };
        let ids = p.ids[..40].to_vec();
        let mut seq = p.sequence();
        let expected = run(&mut p.card, &mut seq, &ids, 40, 40);
        let same = |p: &Pair, got: &[f32], expected: &[f32], what: &str| match exact {
            true => assert_eq!(worst(got, expected), 0.0, "{name}, {what}"),
            false => p.close(got, expected, what),
        };
        for (prompt, chunk) in [(40, 7), (20, 20)] {
            let mut seq = p.sequence();
            let got = run(&mut p.card, &mut seq, &ids, prompt, chunk);
            same(&p, &got, &expected, "chunks");
        }
        // Three sequences at different places, prompts and single tokens mixed.
        let n_vocab = expected.len() / ids.len();
        let mut seqs = [p.sequence(), p.sequence(), p.sequence()];
        let (a, b, c) = (&ids[..30], &ids[..9], &ids[..1]);
        let [x, y, z] = &mut seqs;
        let want = Want::All;
        let first = [(x, a), (y, b), (z, c)].map(|(seq, tokens)| Feed { seq, tokens, want });
        let mut first = first;
        let got = p.card.step(&mut first).expect("the tokens fit");
        for (got, n) in got.iter().zip([30, 9, 1]) {
            same(&p, got, &expected[..n * n_vocab], "neighbours");
        }
        let before = p.n_replays();
        for i in 0..10 {
            let [x, y, z] = &mut seqs;
            let mut next = [(x, 30), (y, 9), (z, 1)].map(|(seq, n)| Feed {
                seq,
                tokens: &ids[n + i..n + i + 1],
                want,
            });
            let got = p.card.step(&mut next).expect("the tokens fit");
            for (got, n) in got.iter().zip([30, 9, 1]) {
                let row = (n + i) * n_vocab..(n + i + 1) * n_vocab;
                same(&p, got, &expected[row], "neighbours, one token each");
            }
        }
        // Each kind of pass is recorded the second time it comes.
        assert!(p.n_replays() > before, "{name}, {memory}: none replayed");
    }
}

#[test]
fn sessions_forks_and_marks_are_exact() {
    let dir = tempfile::tempdir().expect("a folder");
    for (i, (name, memory, n_card)) in [
        ("qwen2-tiny", "full", ALL),
        ("qwen2-tiny", "window:window=13,sinks=3", ALL),
        ("ahn-gdn-tiny", "ahn:window=16,sinks=4", ALL),
        ("nodes-linear", "nodes:node_max=3,fanin=2,max=6", ALL),
        ("nodes-cosine", "nodes:window=2", ALL),
        ("nodes-mlp", "nodes", ALL),
        ("qwen2-tiny", "full", 2),
        ("qwen2-tiny", "window:window=13,sinks=3", 1),
        ("ahn-gdn-tiny", "ahn:window=16,sinks=4", 1),
        ("nodes-linear", "nodes:node_max=3,fanin=2,max=6", 1),
        ("nodes-cosine", "nodes:window=2", 1),
        ("gist-qwen2", "gist", 1),
    ]
    .into_iter()
    .enumerate()
    {
        let Some(mut p) = Pair::new(name, memory, KvType::F16, n_card) else {
            return;
        };
        let ids = p.ids.clone();
        let t = 40;
        let mut seq = p.sequence();
        run(&mut p.card, &mut seq, &ids[..t], t, 16);
        let path = dir.path().join(i.to_string());
        seq.save(&path, b"").expect("saved");
        seq.mark();
        let mut fork = seq.fork();
        let expected = run(&mut p.card, &mut seq, &ids[t..], 8, 8);

        let (mut again, _) = Sequence::load(&p.card.model, &path, 0).expect(memory);
        let got = run(&mut p.card, &mut again, &ids[t..], 8, 8);
        assert_eq!(worst(&got, &expected), 0.0, "{memory}: a session goes on");
        assert_eq!(seq.truncate(p.card.ops(), t), t, "{memory}");
        let got = run(&mut p.card, &mut seq, &ids[t..], 8, 8);
        assert_eq!(worst(&got, &expected), 0.0, "{memory}: back to the mark");
        let got = run(&mut p.card, &mut fork, &ids[t..], 8, 8);
        assert_eq!(worst(&got, &expected), 0.0, "{memory}: a fork is its own");

        // A session made on the card goes on on the host, and the other way round.
        let (mut there, _) = Sequence::load(&p.host.model, &path, 0).expect(memory);
        let theirs = run(&mut p.host, &mut there, &ids[t..], 8, 8);
        p.close(&theirs, &expected, "a session of the card on the host");
        let spec = memory.parse().expect(memory);
        let mut there = p.host.sequence(&spec, p.options).expect(memory);
        run(&mut p.host, &mut there, &ids[..t], t, 16);
        there.save(&path, b"").expect("saved");
        let (mut here, _) = Sequence::load(&p.card.model, &path, 0).expect(memory);
        let got = run(&mut p.card, &mut here, &ids[t..], 8, 8);
        p.close(&got, &expected, "a session of the host on the card");
    }
}

/// The trunk of `nodes` on the card against the host: every probability, however many tokens there
/// are at a time.
#[test]
fn the_compressor_decides_as_on_the_host() {
    for name in ["nodes-linear", "nodes-cosine", "nodes-mlp"] {
        let Some(p) = Pair::new(name, "nodes", KvType::F32, ALL) else {
            return;
        };
        let read = |engine: &Engine| {
            let weights = &engine.model.weights;
            let tensors = weights.nodes.as_ref().expect("a compressor");
            let embd = &weights.token_embd;
            let all = tensors.boundary_probabilities(engine.ops(), embd, &p.ids);
            let all = all.expect("the trunk runs");
            let s = &mut *tensors.scratch();
            let (mut at, mut next) = (tensors.start(), tensors.start());
            let mut by_one = Vec::new();
            for id in p.ids.chunks(1) {
                let one = tensors.read(engine.ops(), s, &at, &mut next, embd, id, true);
                by_one.extend(one.expect("the trunk runs"));
                std::mem::swap(&mut at, &mut next);
            }
            assert_eq!(by_one, all, "{name}: one at a time");
            all
        };
        let (got, expected) = (read(&p.card), read(&p.host));
        assert_eq!(got.len(), p.ids.len(), "{name}");
        let spread = |p: &[f32]| {
            p.iter()
                .fold((1f32, 0f32), |(a, b), &p| (a.min(p), b.max(p)))
        };
        let (least, most) = spread(&expected);
        assert!(most - least > 0.05, "{name}: nothing to tell apart");
        p.close(&got, &expected, "probabilities");
    }
}

/// Tokens taken back: the compressor runs forward again on the card, and the text goes on with the
/// same bits.
#[test]
fn going_back_to_a_cut_is_exact() {
    for (name, memory, n_card) in [
        ("nodes-linear", "nodes", ALL),
        ("nodes-cosine", "nodes:position=compact,sinks=3", ALL),
        ("nodes-cosine", "nodes:position=compact,sinks=3", 1),
    ] {
        let Some(mut p) = Pair::new(name, memory, KvType::F16, n_card) else {
            return;
        };
        let ids = p.ids.clone();
        let mut seq = p.sequence();
        let expected = run(&mut p.card, &mut seq, &ids, 60, 16);
        let n_vocab = expected.len() / ids.len();
        let held = seq.truncate(p.card.ops(), 50);
        assert!(held > 0 && held < 50, "{name}: {held} of 50 are held");
        assert!(
            seq.nodes().iter().any(|node| node.end == held),
            "{name}: at a cut"
        );
        let got = run(&mut p.card, &mut seq, &ids[held..], 9, 4);
        assert_eq!(worst(&got, &expected[held * n_vocab..]), 0.0, "{name}");
    }
}

#[test]
fn a_refused_plan_changes_nothing() {
    let Some(mut p) = Pair::new("qwen2-tiny", "full", KvType::F32, 1) else {
        return;
    };
    p.options.n_ctx = 30;
    let ids = p.ids.clone();
    let mut seq = p.sequence();
    feed(&mut p.card, &mut seq, &ids[..20]);
    let tokens = &ids[20..40];
    let want = Want::Last;
    let seq_ref = &mut seq;
    let refused = p.card.step(&mut [Feed {
        seq: seq_ref,
        tokens,
        want,
    }]);
    assert!(refused.is_err());
    assert_eq!(seq.n_past(), 20);
    let got = feed(&mut p.card, &mut seq, &ids[20..30]);
    let mut all = p.sequence();
    let expected = feed(&mut p.card, &mut all, &ids[..30]);
    assert_eq!(worst(&got, &expected[expected.len() - got.len()..]), 0.0);
}

/// Text by whole rows of logits and by the likeliest tokens alone, from `ids` on.
fn same_text(engine: &mut Engine, empty: &Sequence, ids: &[u32], params: &SamplerParams) {
    let what = format!("{}, {}", engine.ops().name(), empty.spec().text);
    let mut by_all = Sampler::without_vocabulary(params).expect("a sampler");
    let mut by_few = by_all.clone();
    let k = by_few.n_best().expect("few tokens are enough");
    let (mut all, mut few) = (empty.fork(), empty.fork());
    let mut tokens = ids.to_vec();
    for step in 0..48 {
        // Together, so that rows and likeliest tokens come of one pass, and apart.
        let mut feeds = vec![
            Feed {
                seq: &mut all,
                tokens: &tokens,
                want: Want::Last,
            },
            Feed {
                seq: &mut few,
                tokens: &tokens,
                want: Want::Best(k),
            },
        ];
        let outputs = match step % 2 {
            0 => engine.step_or_blame(&mut feeds).expect("the tokens fit"),
            _ => feeds
                .chunks_mut(1)
                .map(|feed| engine.step_or_blame(feed).expect("it fits").remove(0))
                .collect(),
        };
        let [Output::Rows(logits), Output::Best(best)] = &outputs[..] else {
            panic!("rows and the likeliest tokens, not {outputs:?}");
        };
        let id = by_all.sample(logits);
        assert_eq!(by_few.sample_best(best), id, "{what}, step {step}");
        assert_eq!(by_few.candidates(), by_all.candidates(), "{what}");
        tokens = vec![id];
    }
    assert_eq!(by_few.save(), by_all.save(), "{what}");
}

/// Greedy, and by the default chain with its 40; on the card and on the host.
#[test]
fn the_likeliest_tokens_choose_the_same_text() {
    let greedy = SamplerParams::greedy();
    let default = SamplerParams {
        seed: 11,
        ..SamplerParams::default()
    };
    let entropy = "nodes:decider=entropy,sigma=0.5,max=12";
    for (name, memory, n_card, params) in [
        ("qwen2-tiny", "full", ALL, &greedy),
        ("qwen3-tiny", "full", ALL, &default),
        ("llama-tiny", "window:window=13,sinks=3", ALL, &default),
        ("nodes-linear", entropy, ALL, &default),
        ("qwen3-tiny", "full", 2, &default),
        ("nodes-linear", entropy, 1, &default),
    ] {
        let Some(mut p) = Pair::new(name, memory, KvType::F16, n_card) else {
            return;
        };
        let spec = memory.parse().expect(memory);
        let on_card = p.sequence();
        let on_host = p.host.sequence(&spec, p.options).expect(memory);
        let ids = p.ids[..12].to_vec();
        same_text(&mut p.card, &on_card, &ids, params);
        same_text(&mut p.host, &on_host, &ids, params);
    }
}

/// The file of a fixture's model, for as long as the folder is kept.
fn file(name: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    let options = mneme_convert::ConvertOptions::new(checkpoint::dir().join(name), &path);
    mneme_convert::convert(&options, &mut |_| ControlFlow::Continue(())).expect(name);
    (folder, path)
}

fn request(model: &std::path::Path, layers: Layers) -> Request<'_> {
    Request {
        device: DeviceChoice::Cuda(0),
        layers,
        n_threads: 1,
        model,
        adapter: None,
        contexts: Contexts::default(),
    }
}

/// Bytes of the tensors of a model without trained memories in a card's memory.
fn bytes_on_card(w: &Weights) -> usize {
    let vector = |b: &mneme_engine::ops::Buffer| 4 * b.len();
    let layers = w.layers.iter().filter(|l| !l.device.is_host());
    let layers = layers.map(|l| {
        let matrices = [
            &l.attn_q,
            &l.attn_k,
            &l.attn_v,
            &l.attn_output,
            &l.ffn_gate,
            &l.ffn_up,
            &l.ffn_down,
        ];
        let biases = [
            &l.attn_q_bias,
            &l.attn_k_bias,
            &l.attn_v_bias,
            &l.attn_output_bias,
            &l.attn_q_norm,
            &l.attn_k_norm,
        ];
        let biases = biases.into_iter().flatten().map(vector).sum::<usize>();
        let norms = vector(&l.attn_norm) + vector(&l.ffn_norm);
        matrices.iter().map(|m| m.n_bytes()).sum::<usize>() + biases + norms
    });
    layers.sum::<usize>() + w.output.n_bytes() + vector(&w.output_norm)
}

/// What decides how many layers fit is what is loaded in the end.
#[test]
fn bytes_are_counted_before_they_are_taken() {
    if card().is_none() {
        return;
    }
    for name in [
        "qwen2-tiny",
        "qwen3-tiny",
        "llama-tiny-untied",
        "qwen2-k256",
    ] {
        let (_folder, path) = file(name);
        let mut sums = Vec::new();
        for layers in [
            Layers::Some(1),
            Layers::Some(2),
            Layers::Some(99),
            Layers::Fit,
        ] {
            let placed = open(&request(&path, layers)).expect(name);
            let split = placed.split.expect("a card");
            let loaded = Model::load(&path, &LoadOptions::default(), &*placed.ops, |_, _| {});
            let loaded = loaded.expect(name);
            let w = &loaded.weights;
            let n = w.layers.iter().filter(|l| !l.device.is_host()).count();
            let asked = match layers {
                Layers::Some(n) => n.min(split.n_layer),
                Layers::Fit => split.n_layer,
            };
            assert_eq!((split.n, n), (asked, asked), "{name}");
            assert_eq!(split.card.weights, bytes_on_card(w) as u64, "{name}");
            assert!(split.card.total() < split.free, "{name}");
            sums.push(split.card.cells + split.host.cells);
        }
        sums.dedup();
        assert_eq!(sums.len(), 1, "{name}: cells of both devices add up");
    }
}

/// `-ngl 0` is the host alone, to the bit, whatever device is named.
#[test]
fn no_layer_on_the_card_is_the_host() {
    if card().is_none() {
        return;
    }
    let (_folder, path) = file("qwen3-tiny");
    let placed = open(&request(&path, Layers::Some(0))).expect("the host");
    assert!(placed.split.is_none() && placed.ops.device().is_host());
    let run_on = |ops: Box<dyn mneme_engine::ops::Ops>| {
        let model = Model::load(&path, &LoadOptions::default(), &*ops, |_, _| {});
        let mut engine = Engine::new(model.expect("loaded"), ops, 64);
        let spec = "full".parse().expect("a memory");
        let seq = engine.sequence(&spec, SequenceOptions::default());
        let ids: Vec<u32> = (0..40).collect();
        run(&mut engine, &mut seq.expect("a sequence"), &ids, 30, 16)
    };
    let (got, expected) = (run_on(placed.ops), run_on(Cpu::new(1).into()));
    assert_eq!(worst(&got, &expected), 0.0);
}

/// A model that the card has no room for, with its contexts, is refused with the numbers; so is a
/// split that leaves no layer to the card.
#[test]
fn what_has_no_room_is_refused() {
    let Some(ops) = card() else { return };
    let (_folder, path) = file("qwen2-tiny");
    for layers in [Layers::Fit, Layers::Some(2), Layers::Some(99)] {
        let mut request = request(&path, layers);
        request.contexts.n_cells = 1 << 40;
        let refused = open(&request).err().expect("a trillion cells");
        assert!(matches!(refused, Error::DeviceFull { .. }), "{refused}");
        let words = refused.to_string();
        for part in ["cuda:0", "of 3 layers", "weights", "cells", "bytes", "free"] {
            assert!(words.contains(part), "{part}: {words}");
        }
    }
    let ops = ops.from_layer(3);
    let refused = Model::load(&path, &LoadOptions::default(), &ops, |_, _| {});
    let words = refused.err().expect("nothing on the card").to_string();
    assert!(words.contains("3 layers"), "{words}");
}
