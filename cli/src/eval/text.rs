//! Which texts a run is about: the flags that `generate` and `run` share.

use super::records::{self, Relations, Shape};
use super::ruler;
use super::sample::Sample;
use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

/// Language of generated texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Lang {
    /// English.
    En,
    /// Chinese.
    Zh,
}

/// Flags for generated texts.
#[derive(Parser, Clone)]
pub struct Texts {
    /// Tasks, separated by commas; `mneme eval tasks` lists them.
    #[arg(long, value_delimiter = ',', default_value = "single", value_parser = known_task)]
    pub task: Vec<String>,
    /// Tokens of a text, separated by commas; 4k is 4096.
    #[arg(long, value_delimiter = ',', default_value = "1024", value_parser = parse_length)]
    pub length: Vec<usize>,
    /// Texts per task and length [default: 50; of files all].
    #[arg(short, long)]
    pub n: Option<usize>,
    /// Seed: the same number gives the same texts anywhere.
    #[arg(short, long, default_value_t = 1)]
    pub seed: u64,
    /// Language.
    #[arg(long, value_enum, default_value = "en")]
    pub lang: Lang,
    /// Statements to draw from [default: by language].
    #[arg(long, value_enum)]
    pub relations: Option<Relations>,
    /// Statements per text [default: a 64th of the length, 2 to 96].
    #[arg(long)]
    pub facts: Option<usize>,
    /// Sentences of filler per text, whatever length that makes [default: as fits --length].
    #[arg(long)]
    pub filler: Option<usize>,
    /// Questions per text of the language of records, drawn with replacement.
    #[arg(long, default_value_t = 4)]
    pub questions: usize,
    /// Share of statements that return later in other words [default: 0.5 for the task repeat].
    #[arg(long, value_parser = parse_share)]
    pub repeat: Option<f64>,
    /// Share of statements and questions in the bare form of a list.
    #[arg(long, default_value_t = 0.0, value_parser = parse_share)]
    pub terse: f64,
    /// Where the facts asked for should lie, 0 (beginning) to 1 (end); of several, separated by
    /// commas, texts take turns. Multi-needle tasks of RULER's shapes ignore it.
    #[arg(long, value_delimiter = ',', value_parser = parse_share)]
    pub depth: Vec<f64>,
}

/// Texts per task and length unless told otherwise.
const N_TEXTS: usize = 50;

fn parse_length(text: &str) -> Result<usize> {
    let (digits, times) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text, 1),
    };
    match digits.parse::<usize>() {
        Ok(n) if n > 0 && n <= 100_000_000 / times => Ok(n * times),
        _ => bail!("expected a number of tokens such as 4096 or 4k"),
    }
}

fn parse_share(text: &str) -> Result<f64> {
    match text.parse::<f64>() {
        Ok(d) if (0.0..=1.0).contains(&d) => Ok(d),
        _ => bail!("expected a number from 0 to 1"),
    }
}

fn known_task(text: &str) -> Result<String> {
    let mut known = records::tasks().map(|(n, _)| n).chain(ruler::tasks());
    match known.any(|n| n == text) {
        true => Ok(text.into()),
        false => bail!("unknown task; `mneme eval tasks` lists them"),
    }
}

/// Words and punctuation marks: a count of tokens for want of a tokenizer. Every Chinese character
/// counts.
pub fn count_words(text: &str) -> usize {
    let (mut n, mut inside) = (0, false);
    for c in text.chars() {
        let word = c.is_ascii_alphanumeric();
        n += usize::from(if word { !inside } else { !c.is_whitespace() });
        inside = word;
    }
    n
}

impl Texts {
    /// Every task at every length.
    pub fn groups(&self) -> Vec<(String, usize)> {
        let lengths = |task: &String| {
            let task = task.clone();
            self.length.iter().map(move |&l| (task.clone(), l))
        };
        self.task.iter().flat_map(lengths).collect()
    }

    /// Texts per group.
    pub fn n(&self) -> usize {
        self.n.unwrap_or(N_TEXTS)
    }

    /// Seed of text `i`. The trainer's own evaluation spells it the same way.
    pub fn seed_of(&self, i: usize) -> String {
        format!("eval:{}:{i}", self.seed)
    }

    /// Text `i` of a group, and its shape if it is in the language of records. `count` counts
    /// tokens.
    pub fn sample(
        &self,
        (task, length): &(String, usize),
        i: usize,
        count: &dyn Fn(&str) -> usize,
    ) -> Result<(Sample, Option<Shape>)> {
        let depth = match self.depth.len() {
            0 => None,
            n => Some(self.depth[i % n]),
        };
        let seed = self.seed_of(i);
        let here = || format!("--task {task} --length {length}, text {i}");
        if !records::tasks().any(|(name, _)| name == task) {
            let sample = ruler::sample(task, &seed, *length, depth, count).with_context(here)?;
            return Ok((sample, None));
        }
        let relations = match (self.relations, self.lang) {
            (Some(relations), _) => relations,
            (None, Lang::En) => Relations::English,
            (None, Lang::Zh) => Relations::Chinese,
        };
        let most = match relations {
            Relations::English => 96,
            Relations::Disjoint => 48,
            Relations::Chinese => 12,
        };
        let mut shape = Shape {
            task: task.clone(),
            n_facts: self.facts.unwrap_or((length / 64).clamp(2, most)),
            n_filler: self.filler.unwrap_or(0),
            n_questions: self.questions.max(1),
            relations,
            repeat: self
                .repeat
                .unwrap_or(if task == "repeat" { 0.5 } else { 0.0 }),
            terse: self.terse,
        };
        if self.filler.is_some() {
            let mut sample = records::record(&seed, &shape).with_context(here)?;
            if let Some(depth) = depth {
                sample.keep_near(depth, shape.n_questions);
            }
            return Ok((sample, Some(shape)));
        }
        let (sample, n_filler) =
            records::fitting(&seed, &shape, *length, depth, count).with_context(here)?;
        shape.n_filler = n_filler;
        Ok((sample, Some(shape)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_depths() {
        assert_eq!(parse_length("4k").unwrap(), 4096);
        assert_eq!(parse_length("1000").unwrap(), 1000);
        for bad in ["0", "-1", "k", "4m", "99999999999k", ""] {
            assert!(parse_length(bad).is_err(), "{bad}");
        }
        assert!(parse_share("1.5").is_err() && parse_share("nan").is_err());
    }

    #[test]
    fn words_are_counted() {
        assert_eq!(count_words("Anna lives in Oslo."), 5);
        assert_eq!(count_words("小明住在北京。"), 7);
        assert_eq!(count_words(" a-b  7f "), 4);
    }

    #[test]
    fn flags_make_texts() {
        let texts = |args: &[&str]| {
            let all = [&["x"], args].concat();
            Texts::try_parse_from(all).unwrap()
        };
        let t = texts(&[
            "--task",
            "single,vt",
            "--length",
            "300,1k",
            "--depth",
            "0,1",
        ]);
        assert_eq!(t.groups().len(), 4);
        let group = &t.groups()[1];
        let (first, shape) = t.sample(group, 0, &count_words).unwrap();
        let (second, _) = t.sample(group, 1, &count_words).unwrap();
        assert_eq!(shape.unwrap().n_facts, 16);
        assert!(first.questions[0].facts[0].start < 1000);
        assert!(second.questions[0].facts[0].start > 3000);
        assert_eq!(first, t.sample(group, 0, &count_words).unwrap().0);
        let zh = texts(&["--lang", "zh", "--length", "500"]);
        let (sample, _) = zh.sample(&zh.groups()[0], 0, &count_words).unwrap();
        assert!(!sample.text.contains(' '));
        let fixed = texts(&["--facts", "5", "--filler", "9"]);
        let (sample, _) = fixed.sample(&fixed.groups()[0], 3, &count_words).unwrap();
        assert_eq!((sample.ends(true).len(), sample.ends(false).len()), (5, 9));
        assert!(Texts::try_parse_from(["x", "--task", "none"]).is_err());
    }
}
