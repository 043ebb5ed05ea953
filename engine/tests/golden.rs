//! Logits of the fixtures against PyTorch, however a prompt is fed.

mod checkpoint;

use checkpoint::{Fixture, names, worst};
use mneme_engine::engine::N_UBATCH;
use mneme_engine::ops::Cpu;
use mneme_engine::{Engine, Feed, Sequence, SequenceOptions, Want};
use mneme_kernels::attend::KvType;

/// What F32 throughout stays within (fixtures/README.md); PyTorch itself stays within 5e-5.
const TOLERANCE: f32 = 1e-4;

fn f32_cells() -> SequenceOptions {
    SequenceOptions {
        n_ctx: 0,
        type_k: KvType::F32,
        type_v: KvType::F32,
    }
}

fn feed(engine: &mut Engine, seq: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    let want = Want::All;
    let mut logits = engine
        .step(&mut [Feed { seq, tokens, want }])
        .expect("the tokens fit");
    logits.remove(0)
}

/// Logits of all tokens, fed in chunks whose sizes `chunk` gives by position.
fn run(engine: &mut Engine, memory: &str, ids: &[u32], chunk: impl Fn(usize) -> usize) -> Vec<f32> {
    let spec = memory.parse().expect("a memory");
    let mut seq = engine.sequence(&spec, f32_cells()).expect(memory);
    let mut logits = Vec::new();
    let mut at = 0;
    while at < ids.len() {
        let n = chunk(at).min(ids.len() - at);
        logits.extend(feed(engine, &mut seq, &ids[at..at + n]));
        at += n;
    }
    logits
}

fn check(name: &str, memory: &str, tolerance: f32) {
    let ops = Cpu::new(2);
    let fixture = Fixture::open(name, &ops);
    let mut engine = Engine::new(fixture.model.clone(), ops, N_UBATCH);
    let ids = fixture.ids("input_ids");
    let expected = fixture.logits("logits");
    for chunk in [usize::MAX, 1, 7, 16, 33] {
        let got = run(&mut engine, memory, &ids, |_| chunk);
        let worst = worst(&got, expected);
        assert!(
            worst < tolerance,
            "{name}, {memory}, chunks of {chunk}: off by {worst}"
        );
    }
    // Prefill of P tokens, then one at a time.
    for split in fixture.meta["splits"].as_array().into_iter().flatten() {
        let p = split.as_u64().expect("a position") as usize;
        let got = run(&mut engine, memory, &ids, |at| if at == 0 { p } else { 1 });
        let n_vocab = got.len() / ids.len();
        let key = format!("decode.{p}.logits");
        let worst = worst(&got[p * n_vocab..], fixture.logits(&key));
        assert!(worst < tolerance, "{name}, {memory}, {key}: off by {worst}");
    }
    greedy(&mut engine, memory, &fixture);
}

/// The greedy continuation, token for token.
fn greedy(engine: &mut Engine, memory: &str, fixture: &Fixture) {
    let spec = memory.parse().expect("a memory");
    let mut seq = engine.sequence(&spec, f32_cells()).expect(memory);
    let prompt = fixture.ids("greedy.prompt_ids");
    let n_vocab = fixture.model.hparams().n_vocab;
    let mut logits = feed(engine, &mut seq, &prompt);
    for &id in &fixture.ids("greedy.ids") {
        let row = &logits[logits.len() - n_vocab..];
        let best = (0..n_vocab).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        assert_eq!(best, Some(id as usize), "{}", fixture.name);
        logits = feed(engine, &mut seq, &[id]);
    }
}

#[test]
fn plain_models_match_pytorch() {
    for name in names(&["qwen2-", "qwen3-", "llama-"]) {
        check(&name, "full", TOLERANCE);
    }
}

/// Hidden states after the last norm, from PyTorch's residual stream after the last layer: alone in
/// chunks, and beside a feed that wants logits.
#[test]
fn hidden_states_match_pytorch() {
    for name in names(&["qwen2-", "qwen3-", "llama-"]) {
        let ops = Cpu::new(2);
        let fixture = Fixture::open(&name, &ops);
        let mut engine = Engine::new(fixture.model.clone(), ops, N_UBATCH);
        let ids = fixture.ids("input_ids");
        let hp = fixture.model.hparams().clone();
        let stream = fixture.logits(&format!("layer.{}.out", hp.n_layer - 1));
        let weight = &fixture.model.weights.output_norm;
        let expected: Vec<f32> = (stream.chunks_exact(hp.n_embd))
            .flat_map(|x| {
                let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
                let size = (squares / hp.n_embd as f64 + f64::from(hp.rms_eps)).sqrt();
                (x.iter().zip(weight.host())).map(move |(x, w)| (f64::from(*x) / size) as f32 * w)
            })
            .collect();
        let spec = "full".parse().expect("a memory");
        let want = Want::Hidden;
        for chunk in [usize::MAX, 1, 7] {
            let mut seq = engine.sequence(&spec, f32_cells()).expect("a sequence");
            let mut got = Vec::new();
            for tokens in ids.chunks(chunk.min(ids.len())) {
                let seq = &mut seq;
                let rows = engine.step(&mut [Feed { seq, tokens, want }]);
                got.extend(rows.expect("the tokens fit").remove(0));
            }
            let worst = worst(&got, &expected);
            assert!(
                worst < TOLERANCE,
                "{name}, chunks of {chunk}: off by {worst}"
            );
        }
        let mut seqs = [0, 1].map(|_| engine.sequence(&spec, f32_cells()).expect("a sequence"));
        let wants = [Want::Last, Want::Hidden];
        let mut feeds: Vec<Feed> = (seqs.iter_mut().zip(wants))
            .map(|(seq, want)| Feed {
                seq,
                tokens: &ids,
                want,
            })
            .collect();
        let both = engine.step(&mut feeds).expect("the tokens fit");
        let logits = fixture.logits("logits");
        assert!(worst(&both[0], &logits[logits.len() - hp.n_vocab..]) < TOLERANCE);
        assert!(worst(&both[1], &expected) < TOLERANCE);
    }
}

#[test]
fn ahn_matches_pytorch() {
    for name in names(&["ahn-"]) {
        let ops = Cpu::new(1);
        let fixture = Fixture::open(&name, &ops);
        let window = &fixture.meta["spec"]["window"];
        let sinks = fixture.meta["spec"]["sinks"].as_u64().unwrap_or(0);
        // Relative to the largest logit: where AMX tiles are at hand the chunked recurrence
        // multiplies in BF16 pairs, good to 16 bits.
        let largest = fixture
            .logits("logits")
            .iter()
            .fold(0f32, |m, x| m.max(x.abs()));
        let tolerance = 1e-4 * largest;
        check(
            &name,
            &format!("ahn:window={window},sinks={sinks}"),
            tolerance,
        );
    }
}

/// Nodes and gist: logits, cuts and entries of the reference in train/reference.py.
#[test]
fn segments_match_the_reference() {
    for name in names(&["nodes-", "gist-"]) {
        let ops = Cpu::new(1);
        let fixture = Fixture::open(&name, &ops);
        let mut engine = Engine::new(fixture.model.clone(), ops, N_UBATCH);
        let ids = fixture.ids("input_ids");
        let memory = fixture.model.default_memory();
        let expected = fixture.logits("logits");
        for chunk in [usize::MAX, 1, 5, 16, 33] {
            let got = run(&mut engine, &memory.text, &ids, |_| chunk);
            let worst = worst(&got, expected);
            assert!(worst < 5e-4, "{name}, chunks of {chunk}: off by {worst}");
        }
        let mut seq = engine.sequence(&memory, f32_cells()).expect(&name);
        feed(&mut engine, &mut seq, &ids);
        if let Some(nodes) = fixture.expected.get("nodes") {
            let expected: Vec<_> = nodes.i64.chunks(3).map(|n| (n[0], n[1], n[2])).collect();
            let got: Vec<_> = seq
                .nodes()
                .iter()
                .map(|n| (i64::from(n.level), n.start as i64, n.end as i64))
                .collect();
            assert_eq!(got, expected, "{name}");
        }
        let cuts = fixture.ids("cuts");
        if seq.nodes().iter().all(|n| n.level == 0) {
            let got: Vec<u32> = seq.nodes().iter().map(|n| n.end as u32 - 1).collect();
            assert_eq!(got, cuts, "{name}");
        }
    }
}

#[test]
fn sequences_alone_and_in_a_batch_agree_to_the_bit() {
    let ops = Cpu::new(2);
    let fixture = Fixture::open("qwen2-tiny", &ops);
    let mut engine = Engine::new(fixture.model.clone(), ops, N_UBATCH);
    let ids = fixture.ids("input_ids");
    let parts = [&ids[..40], &ids[3..20], &ids[5..6]];
    let spec = "full".parse().expect("a memory");
    let alone: Vec<Vec<f32>> = parts
        .iter()
        .map(|part| run(&mut engine, "full", part, |_| usize::MAX))
        .collect();
    let mut seqs: Vec<Sequence> = parts
        .iter()
        .map(|_| engine.sequence(&spec, f32_cells()).expect("full"))
        .collect();
    let mut feeds: Vec<Feed<'_>> = seqs
        .iter_mut()
        .zip(parts)
        .map(|(seq, tokens)| Feed {
            seq,
            tokens,
            want: Want::All,
        })
        .collect();
    let together = engine.step(&mut feeds).expect("the tokens fit");
    assert_eq!(alone, together);
}
