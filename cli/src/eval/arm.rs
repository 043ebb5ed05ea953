//! One memory on one sample: read the text, ask every question from there, and see what it took.

use super::boundary::{self, Tally};
use super::budget::{self, Given, Target};
use super::prompt::{Document, Form};
use super::sample::{Question, Sample};
use crate::interrupt;
use anyhow::{Context, Result};
use mneme_engine::memory::spec::MemorySpec;
use mneme_engine::memory::{NodeInfo, Stats};
use mneme_engine::{Engine, Feed, Sequence, SequenceOptions, Want};
use std::ops::Range;
use std::time::Instant;

/// Where the facts of a question lie when its answer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// All of them are still held token by token.
    InWindow,
    /// At least one is no longer, and none was cut.
    Evicted,
    /// A cut, or the window's edge, runs through at least one.
    AcrossCut,
    /// Nobody knows where the answer stands.
    Unknown,
}

/// Every place, in the order of reports.
pub const PLACES: [Place; 4] = [
    Place::InWindow,
    Place::Evicted,
    Place::AcrossCut,
    Place::Unknown,
];

/// One question put to one arm.
#[derive(Clone, Debug)]
pub struct Reply {
    /// What the model said.
    pub text: String,
    /// How right that is, 0 to 1.
    pub score: f64,
    /// Where the facts were.
    pub place: Place,
}

/// Bytes held after the text was read, before the first question.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Held {
    /// Tokens of the text.
    pub n_tokens: f64,
    /// Cells held per layer.
    pub n_cells: f64,
    /// Bytes of these cells in all layers.
    pub cell_bytes: f64,
    /// Bytes of the pages they lie in.
    pub page_bytes: f64,
    /// Bytes of recurrent states.
    pub state_bytes: f64,
    /// Bytes of the cells of a full cache.
    pub full_bytes: f64,
    /// Nodes held.
    pub n_nodes: f64,
    /// Tokens per node slot over the closed segments.
    pub rate: f64,
    /// Threshold in use at the end, of memories that have one.
    pub tau: Option<f64>,
}

impl Held {
    /// Cells and states.
    pub fn bytes(&self) -> f64 {
        self.cell_bytes + self.state_bytes
    }

    fn new(stats: &Stats, uneven: bool) -> Held {
        let per_cell = stats.full_bytes as f64 / stats.n_tokens.max(1) as f64;
        let page_bytes = stats.cell_bytes as f64;
        Held {
            n_tokens: stats.n_tokens as f64,
            n_cells: stats.n_cells as f64,
            // Layers that hold different numbers of cells are known by their pages only.
            cell_bytes: match uneven {
                true => page_bytes,
                false => per_cell * stats.n_cells as f64,
            },
            page_bytes,
            state_bytes: stats.state_bytes as f64,
            full_bytes: stats.full_bytes as f64,
            n_nodes: stats.n_nodes as f64,
            rate: stats.rate,
            tau: stats.tau.map(f64::from),
        }
    }
}

/// What an arm did with a sample.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One per question.
    pub replies: Vec<Reply>,
    /// After the text.
    pub held: Held,
    /// Seconds to read the text.
    pub read_seconds: f64,
    /// Seconds for all questions and answers.
    pub ask_seconds: f64,
    /// Cuts against the ends the generator knows; `None` without nodes or ends.
    pub tally: Option<Tally>,
}

/// A text that was read, to be asked about.
pub struct Opened {
    /// The state after the last token.
    pub seq: Sequence,
    /// The tokens.
    pub doc: Document,
    /// What is held.
    pub held: Held,
    /// Seconds it took.
    pub read_seconds: f64,
    /// First tokens never dropped.
    n_sinks: usize,
}

/// What all arms of a run share.
pub struct Rig {
    /// The model on its threads.
    pub engine: Engine,
    /// Types of keys and values; an `n_ctx` of 0 stands for what each sample needs.
    pub options: SequenceOptions,
    /// How questions are put.
    pub form: Form,
    /// Most tokens per answer, whatever the sample says.
    pub n_predict: Option<usize>,
}

impl Rig {
    /// A sequence with room for `n` tokens and as many again.
    pub fn sequence(&self, spec: &MemorySpec, n: usize) -> Result<Sequence> {
        let options = SequenceOptions {
            n_ctx: match self.options.n_ctx {
                // Slots and questions come on top of the text.
                0 => n.saturating_mul(2).saturating_add(4096),
                n => n,
            },
            ..self.options
        };
        Ok(self.engine.sequence(spec, options)?)
    }

    /// The tokens of `sample` as the arm reads them: gist tokens after every sentence, or context tokens
    /// around the text, if that is the memory.
    pub fn document(&self, spec: &MemorySpec, sample: &Sample) -> Result<Document> {
        let model = &self.engine.model;
        let doc = Document::new(&model.tokenizer, self.form, sample);
        match (spec.name.as_str(), &model.weights.concepts) {
            ("gist", _) => {}
            ("concepts", Some(concepts)) => {
                let [begin, end] = concepts.tokens;
                let n = doc.ids.len();
                return Ok(doc.with(&[begin], &[0]).with(&[end], &[n + 1]));
            }
            _ => return Ok(doc),
        }
        let file = model.weights.memory_file_of("gist");
        let ids = file.opt_arr_u32("tokenizer.ggml.gist_token_ids")?;
        let ends = match sample.segments.is_empty() {
            true => doc.sentence_ends(&model.tokenizer),
            false => {
                let ends: Vec<usize> = sample.segments.iter().map(|s| s.range.end).collect();
                doc.boundaries(&ends)
            }
        };
        Ok(doc.with(&ids.unwrap_or_default(), &ends))
    }

    /// Feeds `ids`, telling `progress` how many tokens were read after each pass.
    pub fn read(
        &mut self,
        seq: &mut Sequence,
        ids: &[u32],
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        for chunk in ids.chunks(self.engine.n_ubatch()) {
            let want = Want::None;
            let tokens = chunk;
            self.engine.step(&mut [Feed { seq, tokens, want }])?;
            progress(chunk.len());
            interrupt::check()?;
        }
        Ok(())
    }

    /// The most likely continuation of `seq` after `prompt`, at most `n_predict` tokens. `asked`
    /// is called once the prompt is read.
    pub fn answer(
        &mut self,
        seq: &mut Sequence,
        prompt: &[u32],
        n_predict: usize,
        mut asked: impl FnMut(&Sequence),
    ) -> Result<String> {
        let model = self.engine.model.clone();
        let tokenizer = &model.tokenizer;
        let mut out: Vec<u32> = Vec::new();
        let mut next: Vec<u32> = prompt.to_vec();
        while out.len() < n_predict {
            let (tokens, want) = (&next[..], Want::Last);
            let logits = self.engine.step(&mut [Feed { seq, tokens, want }])?;
            if out.is_empty() {
                asked(seq);
            }
            let best = (logits[0].iter().zip(0u32..)).max_by(|a, b| a.0.total_cmp(b.0));
            let id = match (seq.forced_next(), best) {
                (Some(id), _) | (None, Some((_, id))) => id,
                (None, None) => break,
            };
            if tokenizer.is_eog(id) {
                break;
            }
            out.push(id);
            if self.form.one_line() {
                let so_far = tokenizer.decode(&out, true);
                if so_far.trim_start().contains('\n') {
                    break;
                }
            }
            next = vec![id];
        }
        let text = tokenizer.decode(&out, true);
        let text = text.trim();
        Ok(match self.form.one_line() {
            true => text.lines().next().unwrap_or("").trim_end().to_owned(),
            false => text.to_owned(),
        })
    }

    /// Reads the text of `sample` with the memory `spec`.
    pub fn open(
        &mut self,
        spec: &MemorySpec,
        sample: &Sample,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Opened> {
        let doc = self.document(spec, sample)?;
        let mut seq = self.sequence(spec, doc.ids.len())?;
        let start = Instant::now();
        self.read(&mut seq, &doc.ids, progress)
            .with_context(|| format!("memory `{spec}`, {} tokens", doc.ids.len()))?;
        let read_seconds = start.elapsed().as_secs_f64();
        let weights = &self.engine.model.weights;
        let full_layers = weights
            .memory_file_of("ahn")
            .opt_arr_i64(&weights.memory_key("ahn.full_layers"))?;
        let uneven = spec.name == "ahn" && full_layers.is_some_and(|l| !l.is_empty());
        Ok(Opened {
            held: Held::new(&seq.stats(), uneven),
            n_sinks: self.n_sinks(spec)?,
            seq,
            doc,
            read_seconds,
        })
    }

    /// Puts one question to a fork of what was read.
    pub fn ask(
        &mut self,
        text: &Opened,
        q: &Question,
        n_predict: usize,
    ) -> Result<(String, Place)> {
        let facts: Vec<Range<usize>> = q.facts.iter().map(|f| text.doc.tokens(f)).collect();
        let prompt = self.form.question(&self.engine.model.tokenizer, q);
        let mut place = Place::Unknown;
        let mut fork = text.seq.fork();
        let answer = self.answer(&mut fork, &prompt, n_predict, |seq| {
            let (stats, nodes) = (seq.stats(), seq.nodes());
            place = place_of(&facts, seq.spec(), &stats, &nodes, text.n_sinks);
        })?;
        Ok((answer, place))
    }

    /// Reads the text of `sample` with the memory `spec` and asks its questions, each from the
    /// same state.
    pub fn run(
        &mut self,
        spec: &MemorySpec,
        sample: &Sample,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(Opened, Outcome)> {
        let text = self.open(spec, sample, progress)?;
        let tally = boundary::tally(&self.engine, &text.seq, &text.doc, sample);
        let start = Instant::now();
        let n_predict = self.n_predict.unwrap_or(sample.n_predict);
        let mut replies = Vec::new();
        for q in &sample.questions {
            let (answer, place) = self.ask(&text, q, n_predict)?;
            replies.push(Reply {
                score: sample.score.of(&answer, &q.answers),
                text: answer,
                place,
            });
        }
        let outcome = Outcome {
            replies,
            held: text.held,
            read_seconds: text.read_seconds,
            ask_seconds: start.elapsed().as_secs_f64(),
            tally,
        };
        Ok((text, outcome))
    }

    /// `spec` sized to hold as many bytes as `held` after reading `sample`; see [`budget`].
    pub fn equal(&self, spec: &MemorySpec, held: &Held, sample: &Sample) -> Result<MemorySpec> {
        if !budget::is_sized(spec) {
            return Ok(spec.clone());
        }
        let model = &self.engine.model;
        let (weights, hp) = (&model.weights, model.hparams());
        let number = |suffix: &str, default: usize| -> Result<usize> {
            let in_file = weights
                .memory_file_of(&spec.name)
                .opt_u32(&weights.memory_key(suffix))?;
            Ok(in_file.map_or(default, |n| n as usize))
        };
        let doc = self.document(spec, sample)?;
        let empty = self.sequence(spec, 1)?.stats();
        let given = Given {
            n_tokens: doc.ids.len(),
            sentence_ends: doc.sentence_ends(&model.tokenizer),
            cell_bytes: held.full_bytes / held.n_tokens.max(1.0),
            n_sinks: self.n_sinks(spec)?,
            segment: (
                spec.get("min", number("decider.min_segment", 1)?)?,
                spec.get("max", number("decider.max_segment", 64)?)?,
            ),
            state_bytes: match spec.name.as_str() {
                // Gates of the tokens in the window: two numbers per head and layer.
                "ahn" => (
                    empty.state_bytes as f64,
                    (2 * hp.n_head * size_of::<f32>() * hp.n_layer) as f64,
                ),
                _ => (0.0, 0.0),
            },
        };
        let target = Target {
            bytes: held.bytes(),
            n_nodes: held.n_nodes,
        };
        Ok(budget::equal(spec, &target, &given))
    }

    /// First tokens the memory never drops.
    pub fn n_sinks(&self, spec: &MemorySpec) -> Result<usize> {
        let weights = &self.engine.model.weights;
        let in_file = weights
            .memory_file_of(&spec.name)
            .opt_u32(&weights.memory_key("sinks"))?
            .map(|n| n as usize);
        let default = match spec.name.as_str() {
            "full" | "gist" | "concepts" => 0,
            "window" | "layered" => 4,
            "ahn" => in_file.unwrap_or(128),
            _ => in_file.unwrap_or(0),
        };
        match spec.name.as_str() {
            "window" | "layered" | "ahn" | "nodes" => Ok(spec.get("sinks", default)?),
            _ => Ok(default),
        }
    }
}

/// Where facts (token ranges) lie for a memory in the given state.
fn place_of(
    facts: &[Range<usize>],
    spec: &MemorySpec,
    stats: &Stats,
    nodes: &[NodeInfo],
    n_sinks: usize,
) -> Place {
    // Tokens from here on are held as they are.
    let raw_from = match spec.name.as_str() {
        "full" => 0,
        "gist" | "concepts" => nodes.last().map_or(0, |n| n.end),
        _ if stats.n_dropped == 0 => 0,
        _ => n_sinks + stats.n_dropped,
    };
    let has_nodes = !nodes.is_empty();
    let one = |f: &Range<usize>| {
        if f.start >= raw_from || f.end <= n_sinks {
            return Place::InWindow;
        }
        let cut = match has_nodes {
            true => nodes.iter().any(|n| n.end > f.start && n.end < f.end),
            false => raw_from > f.start && raw_from < f.end,
        };
        match cut {
            true => Place::AcrossCut,
            false => Place::Evicted,
        }
    };
    facts.iter().map(one).max().unwrap_or(Place::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(start: usize, end: usize) -> NodeInfo {
        NodeInfo {
            id: 0,
            level: 0,
            start,
            end,
            p: 1.0,
            children: Vec::new(),
            bytes: 0,
        }
    }

    #[test]
    fn places() {
        let stats = |n_dropped| Stats {
            n_tokens: 100,
            n_dropped,
            ..Stats::default()
        };
        let place = |memory: &str, n_dropped, nodes: &[NodeInfo], sinks, facts: &[[usize; 2]]| {
            let facts: Vec<Range<usize>> = facts.iter().map(|&[a, b]| a..b).collect();
            let spec: MemorySpec = memory.parse().unwrap();
            place_of(&facts, &spec, &stats(n_dropped), nodes, sinks)
        };
        assert_eq!(place("full", 0, &[], 0, &[[3, 9]]), Place::InWindow);
        // Sinks 0..4, tokens from 84 on.
        let window = |fact| place("window", 80, &[], 4, &[fact]);
        assert_eq!(window([0, 4]), Place::InWindow);
        assert_eq!(window([90, 95]), Place::InWindow);
        assert_eq!(window([40, 45]), Place::Evicted);
        assert_eq!(window([82, 86]), Place::AcrossCut);
        let nodes = [node(0, 10), node(10, 30), node(30, 90)];
        let of = |facts: &[[usize; 2]]| place("nodes", 90, &nodes, 0, facts);
        assert_eq!(of(&[[12, 30]]), Place::Evicted);
        assert_eq!(of(&[[5, 12]]), Place::AcrossCut);
        assert_eq!(of(&[[88, 93]]), Place::AcrossCut);
        assert_eq!(of(&[[90, 95]]), Place::InWindow);
        assert_eq!(of(&[[90, 95], [12, 20]]), Place::Evicted);
        assert_eq!(of(&[[90, 95], [12, 20], [29, 31]]), Place::AcrossCut);
        assert_eq!(of(&[]), Place::Unknown);
    }
}
