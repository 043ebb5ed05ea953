//! A text with questions about it: what every task, generated or read from a file, comes down to.

use super::score::Score;
use std::ops::Range;

/// A stretch of the text whose end the generator knows.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Bytes of the text.
    pub range: Range<usize>,
    /// Whether it states a fact that a question may ask for; filler otherwise.
    pub fact: bool,
}

/// A question with its answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// The question in words.
    pub text: String,
    /// How an answer begins, given to the model; often empty.
    pub prefix: String,
    /// What counts as right, by [`Sample::score`].
    pub answers: Vec<String>,
    /// Bytes of the text that hold the answer; empty where nobody knows.
    pub facts: Vec<Range<usize>>,
    /// Share that guessing among the possible answers gets right; 0 where the set is open.
    pub chance: f64,
}

/// A text with questions.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Which task this is.
    pub task: String,
    /// What is read before the questions.
    pub text: String,
    /// Sentences of the text in order; empty where nobody knows.
    pub segments: Vec<Segment>,
    /// What is asked, each on its own after the text.
    pub questions: Vec<Question>,
    /// How answers are scored.
    pub score: Score,
    /// Most tokens an answer may take.
    pub n_predict: usize,
}

impl Sample {
    /// Bytes after each segment that is (or is not) a fact.
    pub fn ends(&self, fact: bool) -> Vec<usize> {
        let those = self.segments.iter().filter(|s| s.fact == fact);
        those.map(|s| s.range.end).collect()
    }

    /// Keeps the `n` questions whose facts lie nearest to `depth` (0 the beginning of the text, 1
    /// its end).
    pub fn keep_near(&mut self, depth: f64, n: usize) {
        let at = depth * self.text.len() as f64;
        let far = |q: &Question| {
            q.facts.first().map_or(f64::INFINITY, |f| {
                ((f.start + f.end) as f64 / 2.0 - at).abs()
            })
        };
        self.questions.sort_by(|a, b| far(a).total_cmp(&far(b)));
        self.questions.truncate(n);
    }
}

/// Joins sentences into a text and tells where each one lies.
pub struct Writer {
    /// What stands between two sentences.
    glue: &'static str,
    text: String,
    segments: Vec<Segment>,
}

impl Writer {
    /// An empty text.
    pub fn new(glue: &'static str) -> Writer {
        Writer {
            glue,
            text: String::new(),
            segments: Vec::new(),
        }
    }

    /// Adds a sentence and returns where it lies.
    pub fn push(&mut self, sentence: &str, fact: bool) -> Range<usize> {
        if !self.text.is_empty() {
            self.text.push_str(self.glue);
        }
        let start = self.text.len();
        self.text.push_str(sentence);
        let range = start..self.text.len();
        self.segments.push(Segment {
            range: range.clone(),
            fact,
        });
        range
    }

    /// The text and its sentences.
    pub fn finish(self) -> (String, Vec<Segment>) {
        (self.text, self.segments)
    }
}
