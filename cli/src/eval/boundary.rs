//! Cuts against the sentence ends that the generator knows.

use super::prompt::Document;
use super::sample::Sample;
use mneme_engine::{Engine, Sequence};
use std::collections::HashSet;

/// Counts over one text or, added up, over several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Cuts inside the text.
    pub n_cuts: usize,
    /// Sentences that state facts, and those that do not, but the last of the text, whose cut
    /// would be due only when the text went on.
    pub n_ends: [usize; 2],
    /// Cuts that fall on those ends.
    pub n_hits: [usize; 2],
    /// Tokens inside facts and inside filler.
    pub n_tokens: [usize; 2],
    /// Cuts inside or at the end of facts and of filler.
    pub n_cuts_in: [usize; 2],
    /// Times p rose above tau, and tokens whose p was above; without a learned decider `None`.
    pub above: Option<(usize, usize)>,
}

/// Index of facts in the pairs above; filler is the other.
const FACT: usize = 0;
const FILLER: usize = 1;

impl Tally {
    /// Adds the counts of another text.
    pub fn add(&mut self, other: &Tally) {
        self.n_cuts += other.n_cuts;
        for i in [FACT, FILLER] {
            self.n_ends[i] += other.n_ends[i];
            self.n_hits[i] += other.n_hits[i];
            self.n_tokens[i] += other.n_tokens[i];
            self.n_cuts_in[i] += other.n_cuts_in[i];
        }
        if let Some((rises, tokens)) = other.above {
            let (r, t) = self.above.unwrap_or_default();
            self.above = Some((r + rises, t + tokens));
        }
    }

    /// Harmonic mean of precision and recall of cuts against the ends of facts.
    pub fn f1_facts(&self) -> f64 {
        f1(self.n_hits[FACT], self.n_cuts, self.n_ends[FACT])
    }

    /// The same against the ends of all sentences.
    pub fn f1_sentences(&self) -> f64 {
        let both = |n: [usize; 2]| n[FACT] + n[FILLER];
        f1(both(self.n_hits), self.n_cuts, both(self.n_ends))
    }

    /// Share of fact ends that have a cut.
    pub fn recall_facts(&self) -> f64 {
        self.n_hits[FACT] as f64 / self.n_ends[FACT].max(1) as f64
    }

    /// Tokens per cut inside facts; where there is no cut at all, all the tokens.
    pub fn rate_facts(&self) -> f64 {
        self.n_tokens[FACT] as f64 / self.n_cuts_in[FACT].max(1) as f64
    }

    /// Tokens per cut inside filler.
    pub fn rate_filler(&self) -> f64 {
        self.n_tokens[FILLER] as f64 / self.n_cuts_in[FILLER].max(1) as f64
    }

    /// Times p rose above tau, per cut.
    pub fn crossings(&self) -> Option<f64> {
        let (rises, _) = self.above?;
        Some(rises as f64 / self.n_cuts.max(1) as f64)
    }

    /// Tokens with p above tau, per cut.
    pub fn tokens_above(&self) -> Option<f64> {
        let (_, tokens) = self.above?;
        Some(tokens as f64 / self.n_cuts.max(1) as f64)
    }
}

fn f1(hits: usize, got: usize, want: usize) -> f64 {
    match got + want {
        0 => 1.0,
        n => 2.0 * hits as f64 / n as f64,
    }
}

/// Counts for `seq`, which has read `doc` and nothing more. `None` where the memory makes no nodes
/// or nobody knows where sentences end.
pub fn tally(engine: &Engine, seq: &Sequence, doc: &Document, sample: &Sample) -> Option<Tally> {
    let name = seq.spec().name.as_str();
    if sample.segments.is_empty() || !matches!(name, "nodes" | "gist") {
        return None;
    }
    let cuts: Vec<usize> = seq.nodes().iter().map(|n| n.end).collect();
    let ends: Vec<usize> = sample.segments.iter().map(|s| s.range.end).collect();
    let facts: Vec<bool> = sample.segments.iter().map(|s| s.fact).collect();
    let mut out = count(&cuts, &doc.boundaries(&ends), &facts, doc.ids.len());
    let decider: String = seq.spec().get("decider", "learned".into()).ok()?;
    let learned = ["learned", "linear", "mlp", "cosine"].contains(&decider.as_str());
    if let (true, true, Some(tau)) = (name == "nodes", learned, seq.stats().tau) {
        out.above = probabilities(engine, &doc.ids).map(|p| rises(&p, tau));
    }
    Some(out)
}

/// Counts cuts (numbers of tokens before each) against `ends` of sentences.
fn count(cuts: &[usize], ends: &[usize], facts: &[bool], n_tokens: usize) -> Tally {
    let mut out = Tally {
        n_cuts: cuts.len(),
        ..Tally::default()
    };
    let set: HashSet<usize> = cuts.iter().copied().collect();
    let mut start = 0;
    for (&end, &fact) in ends.iter().zip(facts) {
        let i = if fact { FACT } else { FILLER };
        out.n_tokens[i] += end - start;
        out.n_cuts_in[i] += (start + 1..=end).filter(|at| set.contains(at)).count();
        if end < n_tokens {
            out.n_ends[i] += 1;
            out.n_hits[i] += usize::from(set.contains(&end));
        }
        start = end;
    }
    out
}

/// How often `p` rises above `tau`, and how many tokens lie above.
fn rises(p: &[f32], tau: f32) -> (usize, usize) {
    let mut n = (0, 0);
    let mut before = false;
    for &p in p {
        let above = p > tau;
        n.0 += usize::from(above && !before);
        n.1 += usize::from(above);
        before = above;
    }
    n
}

/// Boundary probability after every token: the trunk reads embeddings only, whatever is cut.
fn probabilities(engine: &Engine, ids: &[u32]) -> Option<Vec<f32>> {
    let weights = &engine.model.weights;
    let tensors = weights.nodes.as_ref()?;
    tensors.head.as_ref()?;
    let p = tensors.boundary_probabilities(engine.ops(), &weights.token_embd, ids);
    p.inspect_err(|e| tracing::warn!("boundary probabilities: {e}"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_counted_where_they_fall() {
        // fact 0..8, filler 8..18, fact 18..25, filler 25..40 (the last).
        let ends = [8, 18, 25, 40];
        let facts = [true, false, true, false];
        let t = count(&[8, 12, 25, 31], &ends, &facts, 40);
        assert_eq!((t.n_ends, t.n_hits), ([2, 1], [2, 0]));
        assert_eq!((t.n_tokens, t.n_cuts_in), ([15, 25], [2, 2]));
        // Two of four cuts are right, of two ends: 2 * 2 / (4 + 2).
        assert!((t.f1_facts() - 2.0 / 3.0).abs() < 1e-12);
        assert!((t.f1_sentences() - 4.0 / 7.0).abs() < 1e-12);
        assert_eq!((t.rate_facts(), t.rate_filler()), (7.5, 12.5));
        assert_eq!(t.recall_facts(), 1.0);
        let mut sum = t;
        sum.above = Some((4, 5));
        sum.add(&Tally {
            above: Some((4, 7)),
            ..t
        });
        assert_eq!((sum.n_cuts, sum.n_ends), (8, [4, 2]));
        assert_eq!(sum.crossings(), Some(1.0));
        assert_eq!(sum.tokens_above(), Some(1.5));
        assert_eq!(t.crossings(), None);
    }

    #[test]
    fn no_cuts_at_all() {
        let t = count(&[], &[8, 18], &[true, false], 18);
        assert_eq!(
            (t.f1_facts(), t.rate_facts(), t.rate_filler()),
            (0.0, 8.0, 10.0)
        );
    }

    #[test]
    fn a_run_above_tau_is_one_crossing() {
        let p = [0.1, 0.6, 0.7, 0.2, 0.5, 0.9];
        assert_eq!(rises(&p, 0.5), (2, 3));
        assert_eq!(rises(&[], 0.5), (0, 0));
    }
}
