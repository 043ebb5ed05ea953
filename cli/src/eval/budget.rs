//! Memories that hold as many bytes as another one: what makes a comparison fair.
//!
//! Bytes are those of cells and recurrent states after the text was read, counted per sample. A
//! window gets as many cells as fit; stride, random and sentence cuts get the dial that leaves the
//! number of nodes nearest to the target's. What is left of the open segment then differs by a few
//! cells, which the report shows; matching it too would reward odd dials that leave it empty.

use mneme_engine::memory::decider::splitmix64;
use mneme_engine::memory::spec::MemorySpec;

/// What is known before a memory reads a text.
#[derive(Clone, Debug)]
pub struct Given {
    /// Tokens of the text.
    pub n_tokens: usize,
    /// Numbers of tokens up to the end of each sentence.
    pub sentence_ends: Vec<usize>,
    /// Bytes of one cell in all layers.
    pub cell_bytes: f64,
    /// First tokens never dropped.
    pub n_sinks: usize,
    /// Shortest and longest segment.
    pub segment: (usize, usize),
    /// Bytes of the memory's states before it reads, and more per token held.
    pub state_bytes: (f64, f64),
}

/// Bytes to be matched.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Cells and states together.
    pub bytes: f64,
    /// Nodes, for memories with the same states.
    pub n_nodes: f64,
}

/// `spec` with options set; later ones win.
pub fn with(spec: &MemorySpec, options: &[(&str, String)]) -> MemorySpec {
    let mut out = spec.clone();
    for (key, value) in options {
        out.options.retain(|(k, _)| k != key);
        out.options.push(((*key).to_owned(), value.clone()));
    }
    let list: Vec<String> = (out.options.iter())
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    out.text = match list.is_empty() {
        true => out.name.clone(),
        false => format!("{}:{}", out.name, list.join(",")),
    };
    out
}

/// Whether `spec` has a dial that [`equal`] turns.
pub fn is_sized(spec: &MemorySpec) -> bool {
    let rule = spec.options.iter().rev().find(|(k, _)| k == "decider");
    matches!(
        (spec.name.as_str(), rule.map(|(_, v)| v.as_str())),
        ("window" | "ahn", _) | ("nodes", Some("stride" | "random" | "sentence"))
    )
}

/// `spec` sized to hold what `target` says; a memory without a dial for it is returned as it is.
pub fn equal(spec: &MemorySpec, target: &Target, given: &Given) -> MemorySpec {
    if !is_sized(spec) {
        return spec.clone();
    }
    if spec.name != "nodes" {
        let window = window(target, given);
        return with(spec, &[("window", window.to_string())]);
    }
    let rule = spec.options.iter().rev().find(|(k, _)| k == "decider");
    let (min, max) = given.segment;
    let far = |n_nodes: usize| (n_nodes as f64 - target.n_nodes).abs();
    let nearest = |a: usize, b: usize| far(a).total_cmp(&far(b));
    match rule.map(|(_, v)| v.as_str()) {
        Some("stride") => {
            let strides = min.max(1)..=given.n_tokens.max(min).max(1);
            let n_nodes = |n: usize| given.n_tokens.saturating_sub(1) / n;
            let best = strides.min_by(|&a, &b| nearest(n_nodes(a), n_nodes(b)));
            let n = best.unwrap_or(1);
            let mut options = vec![("stride", n.to_string())];
            if n > max {
                options.push(("max", n.to_string()));
            }
            with(spec, &options)
        }
        Some("random") => {
            let seed = spec.get("seed", 0u64).unwrap_or(0);
            // Cuts are forced where a segment grows too long: leave four times the mean.
            let mean = given.n_tokens as f64 / target.n_nodes.max(1.0);
            let segment = (min, max.max((4.0 * mean).ceil() as usize));
            let n_nodes =
                |rate: f64| n_cuts(given, segment, |at| splitmix64(seed, at as u64 - 1) < rate);
            let (mut low, mut high) = (0.0, 1.0);
            for _ in 0..32 {
                let rate = (low + high) / 2.0;
                match n_nodes(rate) as f64 > target.n_nodes {
                    true => high = rate,
                    false => low = rate,
                }
            }
            let rate = match nearest(n_nodes(low), n_nodes(high)) {
                std::cmp::Ordering::Greater => high,
                _ => low,
            };
            with(
                spec,
                &[("rate", rate.to_string()), ("max", segment.1.to_string())],
            )
        }
        _ => {
            let ends: std::collections::HashSet<usize> =
                given.sentence_ends.iter().copied().collect();
            let n_nodes = |min| n_cuts(given, (min, max), |at| ends.contains(&at));
            let mins = min.max(1)..=max;
            let best = mins.min_by(|&a, &b| nearest(n_nodes(a), n_nodes(b)));
            with(spec, &[("min", best.unwrap_or(min).to_string())])
        }
    }
}

/// The window that leaves at most the target's bytes; at least 1.
fn window(target: &Target, given: &Given) -> usize {
    let (fixed, per_token) = given.state_bytes;
    let left = target.bytes - fixed - given.n_sinks as f64 * given.cell_bytes;
    let cells = (left / (given.cell_bytes + per_token)).floor();
    // The token to come takes a place in the window: one fewer cell is held before it.
    (cells.max(0.0) as usize).saturating_add(1)
}

/// Number of cuts a rule makes; the one due at the end of the text waits for more.
fn n_cuts(given: &Given, (min, max): (usize, usize), wants: impl Fn(usize) -> bool) -> usize {
    let (mut n, mut start) = (0, 0);
    for at in 1..given.n_tokens {
        let len = at - start;
        if len >= max || (len >= min && wants(at)) {
            n += 1;
            start = at;
        }
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Given {
        Given {
            n_tokens: 1000,
            sentence_ends: (1..=100).map(|i| i * 10).collect(),
            cell_bytes: 256.0,
            n_sinks: 0,
            segment: (1, 64),
            state_bytes: (0.0, 0.0),
        }
    }

    fn target(n_nodes: f64, states: f64) -> Target {
        Target {
            bytes: n_nodes * 256.0 + states,
            n_nodes,
        }
    }

    fn sized(spec: &str, target: &Target, given: &Given) -> String {
        let spec: MemorySpec = spec.parse().unwrap();
        let out = equal(&spec, target, given);
        let again: MemorySpec = out.text.parse().unwrap();
        assert_eq!(again.options, out.options, "the text is the description");
        out.text
    }

    #[test]
    fn a_window_gets_the_states_bytes_too() {
        // 50 cells and 2560 bytes of states are 60 cells; the next token takes the 61st.
        let text = sized("window:sinks=0", &target(50.0, 2560.0), &given());
        assert_eq!(text, "window:sinks=0,window=61");
        let with_sinks = Given {
            n_sinks: 4,
            ..given()
        };
        let text = sized("window:window=9", &target(50.0, 2600.0), &with_sinks);
        assert_eq!(
            text, "window:window=57",
            "what does not make a cell is left over"
        );
        let ahn = Given {
            state_bytes: (1024.0, 64.0),
            ..given()
        };
        // 12800 - 1024 = 11776 bytes at 320 a token are 36.8 tokens.
        let text = sized("ahn", &target(50.0, 0.0), &ahn);
        assert_eq!(text, "ahn:window=37");
        let text = sized("window:sinks=0", &target(0.0, 0.0), &given());
        assert_eq!(text, "window:sinks=0,window=1");
    }

    /// Nodes that `spec` makes of the text given.
    fn made(spec: &str, given: &Given) -> usize {
        let spec: MemorySpec = spec.parse().unwrap();
        let min = spec.get("min", given.segment.0).unwrap();
        let max = spec.get("max", given.segment.1).unwrap();
        let seed = spec.get("seed", 0).unwrap();
        let rate = spec.get("rate", -1.0).unwrap();
        let stride = spec.get("stride", 0).unwrap();
        let (mut n, mut len) = (0, 0);
        for at in 1..given.n_tokens {
            len += 1;
            let wanted = match (stride, rate) {
                (0, -1.0) => at % 10 == 0,
                (0, rate) => splitmix64(seed, at as u64 - 1) < rate,
                (stride, _) => len >= stride,
            };
            if len >= max || (len >= min && wanted) {
                n += 1;
                len = 0;
            }
        }
        n
    }

    #[test]
    fn rules_make_as_many_nodes() {
        let long = Given {
            n_tokens: 100_000,
            sentence_ends: (1..=10_000).map(|i| i * 10).collect(),
            ..given()
        };
        for (given, spec, want, slack) in [
            (given(), "nodes:decider=stride", 40, 1),
            (given(), "nodes:decider=stride", 250, 1),
            (given(), "nodes:decider=stride,min=3", 100, 1),
            (given(), "nodes:decider=random,seed=3", 100, 0),
            (given(), "nodes:decider=random", 40, 0),
            (given(), "nodes:decider=sentence", 49, 0),
            (given(), "nodes:decider=sentence", 33, 0),
            // More than there are sentences: all of them.
            (given(), "nodes:decider=sentence", 500, 401),
            // Segments beyond the longest allowed: that is raised as well.
            (long.clone(), "nodes:decider=stride", 1000, 1),
            (long.clone(), "nodes:decider=random", 1000, 0),
        ] {
            let text = sized(spec, &target(want as f64, 0.0), &given);
            let got = made(&text, &given);
            assert!(got.abs_diff(want) <= slack, "{text}: {got} for {want}");
        }
        // Strides of 3 and 4 give 333 and 249 nodes: the nearer is taken.
        let text = sized("nodes:decider=stride", &target(250.0, 0.0), &given());
        assert_eq!(made(&text, &given()), 249);
    }

    #[test]
    fn others_stay_as_they_are() {
        for spec in [
            "full",
            "gist",
            "concepts",
            "nodes",
            "nodes:tau=0.3",
            "nodes:decider=learned",
        ] {
            assert_eq!(sized(spec, &target(10.0, 0.0), &given()), spec);
        }
    }
}
