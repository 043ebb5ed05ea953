//! The tokens still in play, and the steps that cut them down.

use super::rng::Rng;
use crate::ops::best_of;

/// A token in play.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Token.
    pub id: u32,
    /// Logit after the steps so far.
    pub logit: f32,
    /// Probability among the tokens still in play; set by the steps that need it and by the draw.
    pub p: f32,
}

/// Candidates; always the possible ones only (no logit is minus infinity or NaN).
#[derive(Clone, Default)]
pub(super) struct Candidates {
    pub items: Vec<Candidate>,
    /// Descending by logit.
    pub sorted: bool,
    /// What [`Candidates::fill_top_k`] finds.
    best: Vec<(u32, f32)>,
}

/// Likeliest first; the smaller id on a tie.
fn by_logit(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Candidates {
    /// All possible tokens.
    pub fn fill(&mut self, logits: &[f32]) {
        self.items.clear();
        let possible = (logits.iter().zip(0u32..)).filter(|(l, _)| **l > f32::NEG_INFINITY);
        let items = possible.map(|(&logit, id)| Candidate { id, logit, p: 0.0 });
        self.items.extend(items);
        self.sorted = false;
    }

    /// The `k` likeliest tokens straight from the logits, without listing all.
    pub fn fill_top_k(&mut self, logits: &[f32], k: usize) {
        let mut best = std::mem::take(&mut self.best);
        best_of(logits, k, &mut best);
        self.fill_best(&best, k);
        self.best = best;
    }

    /// The first `k` of the likeliest tokens with their logits, likeliest first.
    pub fn fill_best(&mut self, best: &[(u32, f32)], k: usize) {
        self.items.clear();
        let best = best.iter().take(k);
        let items = best.map(|&(id, logit)| Candidate { id, logit, p: 0.0 });
        self.items.extend(items);
        self.sorted = true;
    }

    pub fn sort(&mut self) {
        if !self.sorted {
            self.items.sort_unstable_by(by_logit);
            self.sorted = true;
        }
    }

    fn max_logit(&self) -> f32 {
        match (self.sorted, self.items.first()) {
            (true, Some(first)) => first.logit,
            _ => (self.items.iter()).fold(f32::NEG_INFINITY, |m, c| m.max(c.logit)),
        }
    }

    /// Sets `p`, sums to 1.
    pub fn softmax(&mut self) {
        let max = self.max_logit();
        let mut sum = 0f64;
        for c in &mut self.items {
            c.p = (c.logit - max).exp();
            sum += f64::from(c.p);
        }
        for c in &mut self.items {
            c.p = (f64::from(c.p) / sum) as f32;
        }
    }

    pub fn top_k(&mut self, k: usize) {
        if k == 0 || k >= self.items.len() {
            return;
        }
        if !self.sorted {
            self.items.select_nth_unstable_by(k - 1, by_logit);
            self.items.truncate(k);
            self.items.sort_unstable_by(by_logit);
            self.sorted = true;
        }
        self.items.truncate(k);
    }

    pub fn top_p(&mut self, p: f32, min_keep: usize) {
        if p >= 1.0 || self.items.is_empty() {
            return;
        }
        self.softmax();
        // Mostly few tokens reach p: sort a short head first, and more only when it does not.
        let mut head = 256;
        while !self.sorted {
            if head >= self.items.len() {
                self.sort();
                break;
            }
            self.items.select_nth_unstable_by(head - 1, by_logit);
            self.items[..head].sort_unstable_by(by_logit);
            if let Some(n) = reach(&self.items[..head], p, min_keep) {
                self.items.truncate(n);
                self.sorted = true;
                return;
            }
            head *= 8;
        }
        if let Some(n) = reach(&self.items, p, min_keep) {
            self.items.truncate(n);
        }
    }

    pub fn min_p(&mut self, p: f32, min_keep: usize) {
        if p <= 0.0 || self.items.is_empty() {
            return;
        }
        let least = self.max_logit() + p.ln();
        let n = self.items.iter().filter(|c| c.logit >= least).count();
        if n >= min_keep.max(1) {
            self.items.retain(|c| c.logit >= least);
        } else {
            self.sort();
            self.items.truncate(min_keep.max(1));
        }
    }

    pub fn typical_p(&mut self, p: f32, min_keep: usize) {
        if p >= 1.0 || self.items.is_empty() {
            return;
        }
        self.sort();
        self.softmax();
        // A probability that underflows to 0 adds nothing to the entropy and is as untypical as can be.
        let information = |c: &Candidate| match c.p > 0.0 {
            true => -c.p.ln(),
            false => f32::MAX,
        };
        let entropy: f32 = (self.items.iter())
            .filter(|c| c.p > 0.0)
            .map(|c| c.p * information(c))
            .sum();
        let distance = |c: &Candidate| (information(c) - entropy).abs();
        self.items
            .sort_by(|a, b| distance(a).total_cmp(&distance(b)));
        self.sorted = false;
        let mut sum = 0f32;
        let n = self.items.iter().zip(1..).find_map(|(c, n)| {
            sum += c.p;
            (sum > p && n >= min_keep).then_some(n)
        });
        self.items.truncate(n.unwrap_or(usize::MAX));
    }

    pub fn top_n_sigma(&mut self, n: f32) {
        if n <= 0.0 || self.items.len() <= 1 {
            return;
        }
        let count = self.items.len() as f64;
        let mean = self.items.iter().map(|c| f64::from(c.logit)).sum::<f64>() / count;
        let square = |c: &Candidate| (f64::from(c.logit) - mean).powi(2);
        let sigma = (self.items.iter().map(square).sum::<f64>() / count).sqrt();
        let least = f64::from(self.max_logit()) - f64::from(n) * sigma;
        self.items.retain(|c| f64::from(c.logit) >= least);
    }

    /// Takes the top choices out: with the given chance, all tokens of at least `threshold` but the least likely of them.
    pub fn xtc(&mut self, probability: f32, threshold: f32, min_keep: usize, rng: &mut Rng) {
        if probability <= 0.0 || threshold > 0.5 || self.items.len() < 2 {
            return;
        }
        if rng.next_f32() > probability {
            return;
        }
        self.sort();
        self.softmax();
        let n_above = self.items.iter().take_while(|c| c.p >= threshold).count();
        let n_out = n_above.saturating_sub(1);
        if n_out > 0 && self.items.len() - n_out >= min_keep {
            self.items.drain(..n_out);
        }
    }

    /// A temperature of 0 leaves the likeliest token alone.
    pub fn temperature(&mut self, temperature: f32) {
        if temperature <= 0.0 {
            if let Some(best) = self.items.iter().copied().min_by(by_logit) {
                self.items.clear();
                self.items.push(best);
            }
            self.sorted = true;
            return;
        }
        for c in &mut self.items {
            c.logit /= temperature;
        }
    }

    /// A temperature between `temperature - range` and `temperature + range` by the entropy, as a share of its
    /// maximum, to the power of `exponent`.
    pub fn dynamic_temperature(&mut self, temperature: f32, range: f32, exponent: f32) {
        if range <= 0.0 {
            return self.temperature(temperature);
        }
        if self.items.len() <= 1 {
            return;
        }
        self.sort();
        self.softmax();
        let max_entropy = (self.items.len() as f32).ln();
        let entropy: f32 = (self.items.iter())
            .filter(|c| c.p > 0.0)
            .map(|c| -c.p * c.p.ln())
            .sum();
        let least = (temperature - range).max(0.0);
        let span = temperature + range - least;
        self.temperature(least + span * (entropy / max_entropy).powf(exponent));
    }

    /// Draws one by probability and returns its index. One draw of the generator, even if there is one token only.
    pub fn draw(&mut self, rng: &mut Rng) -> usize {
        let r = rng.next_f64();
        let max = self.max_logit();
        let mut sum = 0f64;
        for c in &mut self.items {
            c.p = (c.logit - max).exp();
            sum += f64::from(c.p);
        }
        let target = sum * r;
        let mut run = 0f64;
        let mut drawn = None;
        for (i, c) in self.items.iter_mut().enumerate() {
            if drawn.is_none() {
                run += f64::from(c.p);
                if run >= target {
                    drawn = Some(i);
                }
            }
            c.p = (f64::from(c.p) / sum) as f32;
        }
        drawn.unwrap_or(self.items.len().saturating_sub(1))
    }
}

/// How many leading candidates it takes to reach `p`, at least `min_keep`; `None` if these do not reach it.
fn reach(items: &[Candidate], p: f32, min_keep: usize) -> Option<usize> {
    let mut sum = 0f32;
    items.iter().zip(1..).find_map(|(c, n)| {
        sum += c.p;
        (sum >= p && n >= min_keep).then_some(n)
    })
}
