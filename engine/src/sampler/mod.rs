//! From logits to the next token: llama.cpp's sampler chain, its names, order and defaults.
//!
//! Logit bias, penalties and DRY change logits; the other steps cut down the list of candidates or scale it; then one
//! is drawn. Tokens that are impossible (logit minus infinity, as a grammar leaves them, or NaN) are never
//! candidates.

mod candidates;
mod dry;
mod params;
mod rng;

use std::collections::VecDeque;

use ahash::AHashMap;

use crate::ops::MOST_BEST;
use crate::tokenizer::Tokenizer;

pub use candidates::Candidate;
pub use params::{Error, RANDOM_SEED, SamplerKind, SamplerParams, parse_logit_bias};

use candidates::Candidates;
use dry::Dry;
use rng::Rng;

/// How many of the likeliest tokens mirostat 1 fits its law to.
const MIROSTAT_M: usize = 100;

/// Chooses tokens for one sequence. Keeps the tokens it was told of, and the state of its generator.
#[derive(Clone)]
pub struct Sampler {
    params: SamplerParams,
    seed: u32,
    /// Logit bias, with the tokens that are never to be taken.
    bias: Vec<(u32, f32)>,
    dry: Option<Dry>,
    /// Tokens accepted, oldest first, as many as the penalties and DRY look at.
    history: VecDeque<u32>,
    n_history: usize,
    /// How often each token stands in the part of the history that the penalties look at.
    counts: AHashMap<u32, u32>,
    draw_rng: Rng,
    xtc_rng: Rng,
    mirostat_mu: f32,
    /// Copy of the logits that the first steps change.
    work: Vec<f32>,
    candidates: Candidates,
    chosen: usize,
}

impl Sampler {
    /// A sampler with fresh state. The tokenizer gives meaning to DRY's breakers and `ignore_eos`.
    pub fn new(params: &SamplerParams, tokenizer: &Tokenizer) -> Result<Sampler, Error> {
        Sampler::build(params, Some(tokenizer))
    }

    /// A sampler for bare token ids: no DRY breakers, no `ignore_eos`.
    pub fn without_vocabulary(params: &SamplerParams) -> Result<Sampler, Error> {
        Sampler::build(params, None)
    }

    fn build(params: &SamplerParams, tokenizer: Option<&Tokenizer>) -> Result<Sampler, Error> {
        params.validate()?;
        let mut bias = params.logit_bias.clone();
        if let Some(tokenizer) = tokenizer.filter(|_| params.ignore_eos) {
            let eog = tokenizer.eog_ids().into_iter();
            bias.extend(eog.map(|id| (id, f32::NEG_INFINITY)));
        }
        let seed = match params.seed {
            RANDOM_SEED => random_seed(),
            seed => seed,
        };
        let uses = |kind| params.mirostat == 0 && params.samplers.contains(&kind);
        let dry = match uses(SamplerKind::Dry) {
            true => Dry::new(params, tokenizer),
            false => None,
        };
        let n_penalties = match uses(SamplerKind::Penalties) && has_penalties(params) {
            true => last_n(params.repeat_last_n),
            false => 0,
        };
        let n_dry = dry.as_ref().map_or(0, Dry::n_history);
        Ok(Sampler {
            params: params.clone(),
            seed,
            bias,
            dry,
            history: VecDeque::new(),
            n_history: n_penalties.max(n_dry),
            counts: AHashMap::new(),
            draw_rng: Rng::new(seed),
            xtc_rng: Rng::new(seed),
            mirostat_mu: 2.0 * params.mirostat_tau,
            work: Vec::new(),
            candidates: Candidates::default(),
            chosen: 0,
        })
    }

    /// The settings.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// The seed in use: the one asked for, or the random one.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// Tells the sampler that `id` was said: prompt and generated tokens alike.
    pub fn accept(&mut self, id: u32) {
        if self.n_history == 0 {
            return;
        }
        let n_penalties = last_n(self.params.repeat_last_n);
        if n_penalties > 0 {
            *self.counts.entry(id).or_default() += 1;
            if self.history.len() >= n_penalties {
                let leaving = self.history[self.history.len() - n_penalties];
                if let Some(count) = self.counts.get_mut(&leaving) {
                    *count -= 1;
                    if *count == 0 {
                        self.counts.remove(&leaving);
                    }
                }
            }
        }
        if self.history.len() >= self.n_history {
            self.history.pop_front();
        }
        self.history.push_back(id);
    }

    /// Chooses a token. `logits` by id; they stay as they are. Does not [`Sampler::accept`] it.
    ///
    /// If no token is possible, the answer is token 0.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let mut work = std::mem::take(&mut self.work);
        work.clear();
        work.extend_from_slice(logits);
        for &(id, bias) in &self.bias {
            if let Some(logit) = work.get_mut(id as usize) {
                *logit += bias;
            }
        }
        self.chosen = match self.params.mirostat {
            0 => self.chain(&mut work, false),
            version => self.mirostat(&work, version),
        };
        self.work = work;
        self.candidates.items.get(self.chosen).map_or(0, |c| c.id)
    }

    /// How many of the likeliest tokens are enough for [`Sampler::sample_best`] to choose as
    /// [`Sampler::sample`] would; `None` where the choice depends on all logits, or on more than
    /// [`MOST_BEST`].
    pub fn n_best(&self) -> Option<usize> {
        let p = &self.params;
        if p.mirostat != 0 || !self.bias.is_empty() {
            return None;
        }
        let mut n = None;
        // Whether a step before depends on all logits, and at least keeps the likeliest token.
        let mut is_cut = false;
        for &kind in p.samplers.iter().filter(|kind| self.has_effect(**kind)) {
            match kind {
                SamplerKind::Penalties | SamplerKind::Dry => return None,
                _ if n.is_some() => {}
                SamplerKind::TopK if !is_cut => n = Some(p.top_k as usize),
                SamplerKind::TopK | SamplerKind::TopP | SamplerKind::MinP => is_cut = true,
                SamplerKind::Temperature if p.temperature <= 0.0 && p.dynatemp_range <= 0.0 => {
                    n = Some(1);
                }
                _ => return None,
            }
        }
        n.filter(|n| *n <= MOST_BEST)
    }

    /// As [`Sampler::sample`], given the [`Sampler::n_best`] likeliest tokens or more with their
    /// logits: likeliest first, of equals the lower id. Fewer say that no others are possible.
    ///
    /// # Panics
    /// When the choice depends on all logits.
    pub fn sample_best(&mut self, best: &[(u32, f32)]) -> u32 {
        let n = self.n_best().expect("the likeliest tokens are enough");
        self.candidates.fill_best(best, n);
        self.chosen = self.chain(&mut [], true);
        self.candidates.items.get(self.chosen).map_or(0, |c| c.id)
    }

    /// The candidates of the last [`Sampler::sample`] that were left when it drew, with their probabilities.
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates.items
    }

    /// Runs the steps and draws; the index of the chosen candidate. `listed` says that the
    /// candidates are there already.
    fn chain(&mut self, work: &mut [f32], mut listed: bool) -> usize {
        let kinds = std::mem::take(&mut self.params.samplers);
        for &kind in &kinds {
            match kind {
                kind if !self.has_effect(kind) => {}
                SamplerKind::Penalties | SamplerKind::Dry if !listed => self.change(kind, work),
                // A step on logits after the list was made: change the logits of the listed tokens.
                SamplerKind::Penalties | SamplerKind::Dry => {
                    let before = self.candidates.items.clone();
                    work.fill(f32::NEG_INFINITY);
                    for c in &before {
                        work[c.id as usize] = c.logit;
                    }
                    self.change(kind, work);
                    for c in &mut self.candidates.items {
                        c.logit = work[c.id as usize];
                    }
                    self.candidates.sorted = false;
                }
                SamplerKind::TopK if !listed => {
                    self.candidates.fill_top_k(work, self.params.top_k as usize);
                    listed = true;
                }
                kind => {
                    if !listed {
                        self.candidates.fill(work);
                        listed = true;
                    }
                    self.cut(kind);
                }
            }
        }
        self.params.samplers = kinds;
        if !listed {
            self.candidates.fill(work);
        }
        self.candidates.draw(&mut self.draw_rng)
    }

    /// Steps that change logits by what was said before.
    fn change(&mut self, kind: SamplerKind, work: &mut [f32]) {
        if kind == SamplerKind::Dry {
            if let Some(dry) = &mut self.dry {
                dry.apply(&self.history, work);
            }
            return;
        }
        let p = &self.params;
        for (&id, &count) in &self.counts {
            if let Some(logit) = work.get_mut(id as usize) {
                // Division would make a negative logit likelier.
                *logit = match *logit <= 0.0 {
                    true => *logit * p.repeat_penalty,
                    false => *logit / p.repeat_penalty,
                };
                *logit -= count as f32 * p.frequency_penalty + p.presence_penalty;
            }
        }
    }

    /// Whether a step does anything with these settings, so that the list need not be made for nothing.
    fn has_effect(&self, kind: SamplerKind) -> bool {
        let p = &self.params;
        match kind {
            SamplerKind::TopNSigma => p.top_n_sigma > 0.0,
            SamplerKind::TopK => p.top_k > 0,
            SamplerKind::TypicalP => p.typical_p < 1.0,
            SamplerKind::TopP => p.top_p < 1.0,
            SamplerKind::MinP => p.min_p > 0.0,
            SamplerKind::Xtc => p.xtc_probability > 0.0,
            SamplerKind::Temperature => true,
            SamplerKind::Penalties => has_penalties(p),
            SamplerKind::Dry => self.dry.is_some(),
            SamplerKind::Infill | SamplerKind::AdaptiveP => false,
        }
    }

    fn cut(&mut self, kind: SamplerKind) {
        let p = &self.params;
        let c = &mut self.candidates;
        match kind {
            SamplerKind::TopNSigma => c.top_n_sigma(p.top_n_sigma),
            SamplerKind::TopK => c.top_k(p.top_k.max(0) as usize),
            SamplerKind::TypicalP => c.typical_p(p.typical_p, p.min_keep),
            SamplerKind::TopP => c.top_p(p.top_p, p.min_keep),
            SamplerKind::MinP => c.min_p(p.min_p, p.min_keep),
            SamplerKind::Xtc => {
                let rng = &mut self.xtc_rng;
                c.xtc(p.xtc_probability, p.xtc_threshold, p.min_keep, rng);
            }
            SamplerKind::Temperature => {
                c.dynamic_temperature(p.temperature, p.dynatemp_range, p.dynatemp_exponent);
            }
            SamplerKind::Penalties
            | SamplerKind::Dry
            | SamplerKind::Infill
            | SamplerKind::AdaptiveP => {}
        }
    }

    /// Keeps the surprise of the chosen tokens near a target: version 1 cuts to the k that Zipf's law gives for it,
    /// version 2 at the surprise itself.
    fn mirostat(&mut self, work: &[f32], version: u8) -> usize {
        let n_vocab = work.len();
        let c = &mut self.candidates;
        c.fill(work);
        c.temperature(self.params.temperature);
        c.sort();
        if c.items.is_empty() {
            return 0;
        }
        c.softmax();
        if version == 1 {
            let (mut sum_tb, mut sum_tt) = (0f32, 0f32);
            let head = c.items.iter().zip(c.items.iter().skip(1));
            for (i, (a, b)) in head.take(MIROSTAT_M - 1).enumerate() {
                let t = ((i + 2) as f32 / (i + 1) as f32).ln();
                sum_tb += t * (a.p / b.p).ln();
                sum_tt += t * t;
            }
            let s = sum_tb / sum_tt;
            let epsilon = s - 1.0;
            let tail = 1.0 - (n_vocab as f32).powf(-epsilon);
            let k = (epsilon * self.mirostat_mu.exp2() / tail).powf(1.0 / s);
            // NaN (one token, or an exponent of exactly 1) becomes 0 and then 1.
            c.top_k((k as usize).max(1));
        } else {
            let mu = self.mirostat_mu;
            let n = c.items.iter().take_while(|c| -c.p.log2() <= mu).count();
            c.items.truncate(n.max(1));
        }
        // llama.cpp draws here by another function, which leaves the generator alone when there is no choice.
        let chosen = match c.items.as_mut_slice() {
            [one] => {
                one.p = 1.0;
                0
            }
            _ => c.draw(&mut self.draw_rng),
        };
        let surprise = -c.items[chosen].p.log2();
        self.mirostat_mu -= self.params.mirostat_eta * (surprise - self.params.mirostat_tau);
        chosen
    }

    /// The state as bytes, for [`Sampler::restore`] on a sampler with the same settings.
    pub fn save(&self) -> Vec<u8> {
        let mut out = vec![STATE_VERSION];
        out.extend_from_slice(&self.seed.to_le_bytes());
        out.extend_from_slice(&self.draw_rng.n_draws().to_le_bytes());
        out.extend_from_slice(&self.xtc_rng.n_draws().to_le_bytes());
        out.extend_from_slice(&self.mirostat_mu.to_le_bytes());
        for id in &self.history {
            out.extend_from_slice(&id.to_le_bytes());
        }
        out
    }

    /// Takes over a saved state; on an error nothing has changed.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let fail = |what| Error::State { what };
        let (version, rest) = bytes.split_first().ok_or(fail("no bytes"))?;
        if *version != STATE_VERSION {
            return Err(fail("unknown version"));
        }
        let (seed, rest) = rest.split_first_chunk().ok_or(fail("too short"))?;
        let (draws, rest) = rest.split_first_chunk().ok_or(fail("too short"))?;
        let (xtc_draws, rest) = rest.split_first_chunk().ok_or(fail("too short"))?;
        let (mu, rest) = rest.split_first_chunk().ok_or(fail("too short"))?;
        let (ids, ragged) = rest.as_chunks::<4>();
        if !ragged.is_empty() {
            return Err(fail("ends inside a token"));
        }
        if ids.len() > self.n_history {
            return Err(fail("has more tokens than these settings look at"));
        }
        let seed = u32::from_le_bytes(*seed);
        let replay = |n: u64| {
            // A sampler that really drew this often would have made a hundred million tokens.
            if n > 1 << 28 {
                return Err(fail("absurd number of draws"));
            }
            let mut rng = Rng::new(seed);
            (0..n).for_each(|_| {
                rng.next_u32();
            });
            Ok(rng)
        };
        let draw_rng = replay(u64::from_le_bytes(*draws))?;
        let xtc_rng = replay(u64::from_le_bytes(*xtc_draws))?;
        self.seed = seed;
        self.draw_rng = draw_rng;
        self.xtc_rng = xtc_rng;
        self.mirostat_mu = f32::from_le_bytes(*mu);
        self.history.clear();
        self.counts.clear();
        for id in ids {
            self.accept(u32::from_le_bytes(*id));
        }
        Ok(())
    }
}

const STATE_VERSION: u8 = 1;

fn last_n(n: i32) -> usize {
    match n < 0 {
        true => usize::MAX,
        false => n as usize,
    }
}

fn has_penalties(p: &SamplerParams) -> bool {
    p.repeat_last_n != 0
        && (p.repeat_penalty != 1.0 || p.frequency_penalty != 0.0 || p.presence_penalty != 0.0)
}

/// A seed from the operating system's randomness.
fn random_seed() -> u32 {
    use std::hash::{BuildHasher, Hasher};
    let hasher = std::collections::hash_map::RandomState::new().build_hasher();
    match hasher.finish() as u32 {
        RANDOM_SEED => 0,
        seed => seed,
    }
}

/// Logarithm of the sum of the exponentials of `logits`: `logits[id] - log_sum_exp(logits)` is the log-probability
/// of a token. Minus infinity if no token is possible.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let finite = logits.iter().filter(|l| !l.is_nan());
    let sum: f64 = finite.map(|&l| f64::from((l - max).exp())).sum();
    f64::from(max) + sum.ln()
}

/// The `n` likeliest tokens with their log-probabilities under the raw logits, likeliest first, into `out`.
/// Fewer only if fewer are possible.
pub fn top_logprobs(logits: &[f32], n: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    if n == 0 {
        return;
    }
    let total = log_sum_exp(logits);
    let mut candidates = Candidates::default();
    candidates.fill_top_k(logits, n.min(logits.len().max(1)));
    let items = candidates.items.iter();
    out.extend(items.map(|c| (c.id, (f64::from(c.logit) - total) as f32)));
}
