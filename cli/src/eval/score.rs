//! Scores of answers, and how far to trust their mean.

/// How an answer is compared with what is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// Equal to one of the answers, but for case, white space and a final full stop.
    Exact,
    /// Share of the answers that occur in it (RULER's "string match all").
    All,
    /// Whether one of the answers occurs in it (RULER's "string match part").
    Part,
    /// Harmonic mean of precision and recall of words, the best over the answers (LongBench's QA
    /// score); characters of Chinese and Japanese count as words.
    F1,
}

/// Letter case and white space evened out.
fn plain(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    words.join(" ")
}

/// Without the full stops and spaces at its end.
fn unstopped(text: &str) -> String {
    plain(text).trim_end_matches(['.', '。', ' ']).to_owned()
}

/// Words without punctuation and English articles.
fn words(text: &str) -> Vec<String> {
    let wide = |c: char| matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}');
    let mut spaced = String::with_capacity(text.len());
    for c in text.to_lowercase().chars() {
        match c {
            c if wide(c) => spaced.extend([' ', c, ' ']),
            c if c.is_alphanumeric() || c.is_whitespace() => spaced.push(c),
            // Wide punctuation separates words, narrow punctuation ("don't") does not.
            c if !c.is_ascii() => spaced.push(' '),
            _ => {}
        }
    }
    let words = spaced.split_whitespace();
    words
        .filter(|w| !matches!(*w, "a" | "an" | "the"))
        .map(str::to_owned)
        .collect()
}

/// F1 over words counted with their multiplicity.
fn f1(got: &str, want: &str) -> f64 {
    let (got, mut want) = (words(got), words(want));
    let (n_got, n_want) = (got.len(), want.len());
    if n_got == 0 || n_want == 0 {
        return f64::from(u8::from(n_got == n_want));
    }
    let mut common = 0;
    for word in got {
        if let Some(at) = want.iter().position(|w| *w == word) {
            want.swap_remove(at);
            common += 1;
        }
    }
    2.0 * f64::from(common) / (n_got + n_want) as f64
}

impl Score {
    /// Between 0 and 1: how right `got` is. Without answers nothing is right.
    pub fn of(self, got: &str, answers: &[String]) -> f64 {
        let inside = |a: &String| plain(got).contains(&plain(a));
        match self {
            _ if answers.is_empty() => 0.0,
            Score::Exact => {
                let got = unstopped(got);
                f64::from(u8::from(answers.iter().any(|a| unstopped(a) == got)))
            }
            Score::All => {
                let n = answers.iter().filter(|a| inside(a)).count();
                n as f64 / answers.len() as f64
            }
            Score::Part => f64::from(u8::from(answers.iter().any(inside))),
            Score::F1 => answers.iter().map(|a| f1(got, a)).fold(0.0, f64::max),
        }
    }
}

/// A mean of scores with its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Mean {
    /// Number of scores.
    pub n: usize,
    /// Their mean; 0 without any.
    pub mean: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// The mean of `scores` with Wilson's interval (1927) at z = 1.96. For scores between 0 and 1 that
/// are not only 0 or 1 the interval is wider than need be: their variance is at most p(1 - p).
pub fn mean(scores: impl IntoIterator<Item = f64>) -> Mean {
    let (mut n, mut sum) = (0usize, 0.0);
    for score in scores {
        n += 1;
        sum += score;
    }
    if n == 0 {
        return Mean {
            high: 1.0,
            ..Mean::default()
        };
    }
    let (p, m, z2) = (sum / n as f64, n as f64, 1.96f64 * 1.96);
    let middle = p + z2 / (2.0 * m);
    let half = (z2 * (p * (1.0 - p) / m + z2 / (4.0 * m * m))).sqrt();
    Mean {
        n,
        mean: p,
        low: ((middle - half) / (1.0 + z2 / m)).max(0.0),
        high: ((middle + half) / (1.0 + z2 / m)).min(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn hand_made_cases() {
        let oslo = answers(&["Oslo"]);
        assert_eq!(Score::Exact.of(" oslo.\n", &oslo), 1.0);
        assert_eq!(Score::Exact.of("in Oslo", &oslo), 0.0);
        assert_eq!(Score::Exact.of("", &oslo), 0.0);
        assert_eq!(Score::Exact.of("厨房。", &answers(&["书房", "厨房"])), 1.0);
        let numbers = answers(&["123", "456", "789", "1000"]);
        assert_eq!(Score::All.of("They are 456, 789 and 123.", &numbers), 0.75);
        assert_eq!(Score::Part.of("They are 456.", &numbers), 1.0);
        assert_eq!(Score::Part.of("I do not know", &numbers), 0.0);
        assert_eq!(
            Score::All.of("New  York city", &answers(&["new york"])),
            1.0
        );
        for score in [Score::Exact, Score::All, Score::Part, Score::F1] {
            assert_eq!(score.of("anything", &[]), 0.0);
        }
    }

    #[test]
    fn f1_of_words() {
        // got: {big, red, dog}, want: {red, dog, house, here}: 2 in common.
        let f = Score::F1.of("The big red dog!", &answers(&["a red dog, house here"]));
        assert!((f - 4.0 / 7.0).abs() < 1e-12, "{f}");
        // The same word twice counts once where the answer has it once.
        let f = Score::F1.of("no no", &answers(&["no"]));
        assert!((f - 2.0 / 3.0).abs() < 1e-12, "{f}");
        let f = Score::F1.of("在北京", &answers(&["北京市"]));
        assert!((f - 2.0 / 3.0).abs() < 1e-12, "{f}");
        assert_eq!(Score::F1.of("don't", &answers(&["dont"])), 1.0);
        assert_eq!(Score::F1.of("", &answers(&["word"])), 0.0);
    }

    #[test]
    fn wilson_values() {
        // From Newcombe (1998), table 1, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (right, n, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let m = mean((0..n).map(|i| f64::from(u8::from(i < right))));
            assert_eq!(m.n, n);
            assert!((m.low - low).abs() < 6e-5, "{right}/{n}: {m:?}");
            assert!((m.high - high).abs() < 6e-5, "{right}/{n}: {m:?}");
        }
        let all = mean([1.0; 20]);
        assert!((all.low - (1.0 - 0.1611)).abs() < 1e-4 && all.high > 1.0 - 1e-12);
        let none = mean([]);
        assert_eq!((none.n, none.low, none.high), (0, 0.0, 1.0));
    }
}
