//! Tasks in the shapes of RULER (arXiv 2404.06654) at any length, generated offline.
//!
//! Counts, kinds of keys and values, haystacks and scores are the benchmark's; the wording is ours,
//! and where it takes essays for hay there is plain filler here. Files of the benchmark itself can
//! be read with `--jsonl`.

use super::random::Random;
use super::records::{filler_sentence, words};
use super::sample::{Question, Sample, Writer};
use super::score::Score;
use anyhow::{Result, bail};
use std::collections::HashSet;
use std::ops::Range;

/// What a key or a value looks like.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Words,
    Number,
    Uuid,
}

/// What surrounds the needles.
#[derive(Clone, Copy, PartialEq)]
enum Hay {
    /// The same few sentences over and over.
    Noise,
    /// Filler of the language of records.
    Filler,
    /// Needles nobody asks for.
    Needles,
}

/// A needle task: how many keys, values of a key, and keys asked for.
struct Niah {
    name: &'static str,
    hay: Hay,
    key: Form,
    value: Form,
    n_keys: usize,
    n_values: usize,
    n_asked: usize,
}

const fn niah(
    name: &'static str,
    hay: Hay,
    key: Form,
    value: Form,
    [n_keys, n_values, n_asked]: [usize; 3],
) -> Niah {
    Niah {
        name,
        hay,
        key,
        value,
        n_keys,
        n_values,
        n_asked,
    }
}

/// Table of RULER's appendix: the needle tasks of its default set.
const NIAH: &[Niah] = &[
    niah(
        "niah_single_1",
        Hay::Noise,
        Form::Words,
        Form::Number,
        [1, 1, 1],
    ),
    niah(
        "niah_single_2",
        Hay::Filler,
        Form::Words,
        Form::Number,
        [1, 1, 1],
    ),
    niah(
        "niah_single_3",
        Hay::Filler,
        Form::Words,
        Form::Uuid,
        [1, 1, 1],
    ),
    niah(
        "niah_multikey_1",
        Hay::Filler,
        Form::Words,
        Form::Number,
        [4, 1, 1],
    ),
    niah(
        "niah_multikey_2",
        Hay::Needles,
        Form::Words,
        Form::Number,
        [1, 1, 1],
    ),
    niah(
        "niah_multikey_3",
        Hay::Needles,
        Form::Uuid,
        Form::Uuid,
        [1, 1, 1],
    ),
    niah(
        "niah_multivalue",
        Hay::Filler,
        Form::Words,
        Form::Number,
        [1, 4, 1],
    ),
    niah(
        "niah_multiquery",
        Hay::Filler,
        Form::Words,
        Form::Number,
        [4, 1, 4],
    ),
];

/// Names of the tasks here.
pub fn tasks() -> impl Iterator<Item = &'static str> {
    NIAH.iter().map(|t| t.name).chain(["vt", "cwe", "fwe"])
}

/// The sentences of a noise haystack.
const NOISE: [&str; 4] = [
    "Grass grows and clouds go by.",
    "A road runs up the hill.",
    "The sea is wide.",
    "People come and go.",
];

/// The sample of `seed` with as much hay as fits into `length` tokens, counted by `count`. `depth`
/// places a single needle (0 the beginning, 1 the end).
pub fn sample(
    task: &str,
    seed: &str,
    length: usize,
    depth: Option<f64>,
    count: &dyn Fn(&str) -> usize,
) -> Result<Sample> {
    let mut rng = Random::new(seed);
    let sample = match task {
        "vt" => variable_tracking(&mut rng, length, count),
        "cwe" => common_words(&mut rng, length, count),
        "fwe" => frequent_words(&mut rng, length, count),
        _ => {
            let Some(row) = NIAH.iter().find(|t| t.name == task) else {
                let known: Vec<_> = tasks().collect();
                bail!("unknown task `{task}`; RULER's are {}", known.join(", "));
            };
            needles(row, &mut rng, length, depth, count)
        }
    }?;
    Ok(Sample {
        task: task.into(),
        ..sample
    })
}

/// Pieces of hay until `length` tokens are full, `used` being taken already; at most two per token.
fn fill_up(
    length: usize,
    used: usize,
    count: &dyn Fn(&str) -> usize,
    mut piece: impl FnMut() -> String,
) -> Result<Vec<String>> {
    if used > length {
        bail!("the task itself takes {used} tokens, more than the {length} asked for");
    }
    let (mut n, mut out) = (used, Vec::new());
    loop {
        let next = piece();
        n += count(&format!(" {next}")).max(1);
        if n > length {
            return Ok(out);
        }
        out.push(next);
    }
}

fn token(rng: &mut Random, form: Form) -> String {
    match form {
        Form::Words => {
            let first = rng.choice(words("f_adj")).clone();
            format!("{first}-{}", rng.choice(words("word")))
        }
        Form::Number => rng.between(1_000_000, 9_999_999).to_string(),
        Form::Uuid => {
            let group = |rng: &mut Random, n| -> String {
                (0..n).map(|_| format!("{:x}", rng.below(16))).collect()
            };
            let groups = [8, 4, 4, 4, 12].map(|n| group(rng, n));
            groups.join("-")
        }
    }
}

fn distinct(rng: &mut Random, form: Form, n: usize) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    while out.len() < n {
        let next = token(rng, form);
        if seen.insert(next.clone()) {
            out.push(next);
        }
    }
    out
}

fn kind(form: Form) -> &'static str {
    match form {
        Form::Words => "word",
        Form::Number => "number",
        Form::Uuid => "uuid",
    }
}

/// `a`, `a and b`, `a, b and c`.
fn enumerate(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

fn needles(
    task: &Niah,
    rng: &mut Random,
    length: usize,
    depth: Option<f64>,
    count: &dyn Fn(&str) -> usize,
) -> Result<Sample> {
    let what = kind(task.value);
    let sentence = |key: &str, value: &str| format!("The secret {what} of {key} is {value}.");
    let keys = distinct(rng, task.key, task.n_keys);
    let values = distinct(rng, task.value, task.n_keys * task.n_values);
    let mut straws: Vec<(String, usize)> = Vec::new(); // sentence, index of the key
    for (k, key) in keys.iter().enumerate() {
        for value in &values[k * task.n_values..(k + 1) * task.n_values] {
            straws.push((sentence(key, value), k));
        }
    }
    let intro = format!(
        "Somewhere in the text below a secret {what} is told, or several. Remember them: there \
         will be questions."
    );
    let asked = enumerate(&keys[..task.n_asked]);
    let many = task.n_asked * task.n_values > 1;
    let (question, prefix) = match many {
        true => (
            format!("What are all the secret {what}s of {asked} told in the text?"),
            format!(" The secret {what}s of {asked} told in the text are"),
        ),
        false => (
            format!("What is the secret {what} of {asked} told in the text?"),
            format!(" The secret {what} of {asked} told in the text is"),
        ),
    };
    let used = count(&intro)
        + straws
            .iter()
            .map(|(s, _)| count(&format!(" {s}")))
            .sum::<usize>()
        + count(&question)
        + count(&prefix);
    let taken: HashSet<String> = keys.iter().cloned().collect();
    let mut noise = NOISE.iter().cycle();
    let hay = fill_up(length, used, count, || match task.hay {
        Hay::Noise => (*noise.next().expect("a cycle has no end")).to_owned(),
        Hay::Filler => filler_sentence(rng, false),
        Hay::Needles => loop {
            let key = token(rng, task.key);
            if !taken.contains(&key) {
                return sentence(&key, &token(rng, task.value));
            }
        },
    })?;
    // A place in the hay for every needle, in order of place; needles of one key keep no order.
    let mut places: Vec<usize> = match (depth, straws.len()) {
        (Some(depth), 1) => vec![(depth * hay.len() as f64).round() as usize],
        _ => straws.iter().map(|_| rng.below(hay.len() + 1)).collect(),
    };
    places.sort_unstable();
    let straws = rng.sample(&straws, straws.len());
    let mut out = Writer::new(" ");
    out.push(&intro, false);
    let mut facts = Vec::new();
    let mut at = 0;
    for (place, (straw, key)) in places.into_iter().zip(straws) {
        for sentence in &hay[at..place] {
            out.push(sentence, false);
        }
        at = place;
        let range = out.push(&straw, true);
        if key < task.n_asked {
            facts.push(range);
        }
    }
    for sentence in &hay[at..] {
        out.push(sentence, false);
    }
    Ok(finish(
        out,
        question,
        prefix,
        values[..task.n_asked * task.n_values].to_vec(),
        facts,
        Score::All,
        128,
    ))
}

fn finish(
    out: Writer,
    question: String,
    prefix: String,
    answers: Vec<String>,
    facts: Vec<Range<usize>>,
    score: Score,
    n_predict: usize,
) -> Sample {
    let (text, segments) = out.finish();
    Sample {
        task: String::new(),
        text,
        segments,
        questions: vec![Question {
            text: question,
            prefix,
            answers,
            facts,
            chance: 0.0,
        }],
        score,
        n_predict,
    }
}

/// One chain of assignments, four hops long, in noise; all variables of the value are asked for.
fn variable_tracking(
    rng: &mut Random,
    length: usize,
    count: &dyn Fn(&str) -> usize,
) -> Result<Sample> {
    const HOPS: usize = 4;
    let mut seen = HashSet::new();
    let mut names = Vec::new();
    while names.len() < HOPS + 1 {
        let name: String = (0..5)
            .map(|_| (b'A' + rng.below(26) as u8) as char)
            .collect();
        if seen.insert(name.clone()) {
            names.push(name);
        }
    }
    let value = rng.between(10_000, 99_999).to_string();
    let mut steps = vec![format!("VAR {} = {value}", names[0])];
    for pair in names.windows(2) {
        steps.push(format!("VAR {} = VAR {}", pair[1], pair[0]));
    }
    let intro = "Variables are assigned in the text below. Keep track of their values.";
    let question = format!("Which variables have the value {value} in the text?");
    let prefix = format!(
        " {} variables of the text have the value {value}:",
        HOPS + 1
    );
    let used = count(intro)
        + steps.iter().map(|s| count(&format!(" {s}"))).sum::<usize>()
        + count(&question)
        + count(&prefix);
    let mut noise = NOISE.iter().cycle();
    let hay = fill_up(length, used, count, || {
        (*noise.next().expect("a cycle has no end")).to_owned()
    })?;
    let mut places: Vec<usize> = steps.iter().map(|_| rng.below(hay.len() + 1)).collect();
    places.sort_unstable();
    let mut out = Writer::new(" ");
    out.push(intro, false);
    let (mut at, mut facts) = (0, Vec::new());
    for (place, step) in places.into_iter().zip(&steps) {
        for sentence in &hay[at..place] {
            out.push(sentence, false);
        }
        at = place;
        facts.push(out.push(step, true));
    }
    for sentence in &hay[at..] {
        out.push(sentence, false);
    }
    Ok(finish(out, question, prefix, names, facts, Score::All, 30))
}

/// An invented word of two to four syllables.
fn invented(rng: &mut Random) -> String {
    let (heads, tails) = (b"bdfghjklmnprstvwz", b"aeiou");
    let n = rng.between(2, 4);
    (0..n)
        .flat_map(|_| [*rng.choice(heads) as char, *rng.choice(tails) as char])
        .collect()
}

fn invented_words(rng: &mut Random, n: usize) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    while out.len() < n {
        let word = invented(rng);
        if seen.insert(word.clone()) {
            out.push(word);
        }
    }
    out
}

/// A numbered list of words in which ten occur thirty times and all others three times.
fn common_words(rng: &mut Random, length: usize, count: &dyn Fn(&str) -> usize) -> Result<Sample> {
    const COMMON: usize = 10;
    let (often, seldom) = if length < 2048 { (10, 2) } else { (30, 3) };
    let intro = "Below is a numbered list of words. Some occur more often than the others.";
    let question = "Which ten words are the most common in the list?".to_owned();
    let prefix = " The ten most common words are:".to_owned();
    let common = invented_words(rng, COMMON);
    let mut seen: HashSet<String> = common.iter().cloned().collect();
    let mut list: Vec<&String> = common.iter().flat_map(|w| vec![w; often]).collect();
    // Numbers grow with the list: each item is counted with the longest number it may get.
    let size = |word: &str| count(&format!(" {length}. {word}"));
    let used = count(intro)
        + count(&question)
        + count(&prefix)
        + common.iter().map(|w| often * size(w)).sum::<usize>();
    if used > length {
        bail!("the task itself takes {used} tokens, more than the {length} asked for");
    }
    let (mut n, mut rare) = (used, Vec::new());
    loop {
        let word = invented(rng);
        if !seen.insert(word.clone()) {
            continue;
        }
        n += seldom * size(&word).max(1);
        if n > length {
            break;
        }
        rare.push(word);
    }
    list.extend(rare.iter().flat_map(|w| vec![w; seldom]));
    let mut out = Writer::new(" ");
    out.push(intro, false);
    for (i, word) in rng.sample(&list, list.len()).into_iter().enumerate() {
        out.push(&format!("{}. {word}", i + 1), false);
    }
    Ok(finish(
        out,
        question,
        prefix,
        common,
        Vec::new(),
        Score::All,
        120,
    ))
}

/// A text of invented words whose frequencies fall as 1/rank^2; the three most frequent are asked
/// for, the very first being padding.
fn frequent_words(
    rng: &mut Random,
    length: usize,
    count: &dyn Fn(&str) -> usize,
) -> Result<Sample> {
    const ALPHA: f64 = 2.0;
    let intro =
        "Find the words that occur most often in the coded text below; the dots mean nothing.";
    let question = "Which three words, dots aside, occur most often in the coded text?".to_owned();
    let prefix = " The three words that occur most often are:".to_owned();
    let used = count(intro) + count(&question) + count(&prefix);
    let words: Vec<String> = std::iter::once("...".to_owned())
        .chain(invented_words(rng, 200))
        .collect();
    let zeta: f64 = (1..=words.len()).map(|r| (r as f64).powf(-ALPHA)).sum();
    // The text must hold `n` words of which word r takes n / r^2 / zeta; n is the most that fits.
    let sizes: Vec<usize> = words
        .iter()
        .map(|w| count(&format!(" {w}")).max(1))
        .collect();
    let times = |n: usize, r: usize| (n as f64 / zeta / ((r + 1) as f64).powf(ALPHA)) as usize;
    let total = |n: usize| {
        used + (0..words.len())
            .map(|r| times(n, r) * sizes[r])
            .sum::<usize>()
    };
    let (mut low, mut high) = (0, length + 1);
    while high - low > 1 {
        let middle = (low + high) / 2;
        match total(middle) <= length {
            true => low = middle,
            false => high = middle,
        }
    }
    if times(low, 3) <= times(low, 4) || times(low, 3) == 0 {
        bail!("{length} tokens are too few for this task");
    }
    let list: Vec<&String> = (words.iter().enumerate())
        .flat_map(|(r, w)| vec![w; times(low, r)])
        .collect();
    let mut out = Writer::new(" ");
    out.push(intro, false);
    for word in rng.sample(&list, list.len()) {
        out.push(word, false);
    }
    Ok(finish(
        out,
        question,
        prefix,
        words[1..4].to_vec(),
        Vec::new(),
        Score::All,
        50,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str) -> usize {
        // Word pieces of four letters, so that long words and numbers cost more.
        text.split_whitespace().map(|w| w.len().div_ceil(4)).sum()
    }

    #[test]
    fn every_task_fills_its_length_and_holds_its_answers() {
        for task in tasks() {
            for length in [1500, 4000] {
                let s = sample(task, "1:0", length, None, &count).unwrap();
                let n = count(&s.text);
                // Frequencies are whole numbers; list numbers are counted at their longest.
                let slack = if task.ends_with("we") { 0.7 } else { 0.9 };
                assert!(
                    n <= length && n as f64 > slack * length as f64,
                    "{task}: {n} of {length}"
                );
                assert_eq!(s, sample(task, "1:0", length, None, &count).unwrap());
                assert_ne!(
                    s.text,
                    sample(task, "1:1", length, None, &count).unwrap().text
                );
                let q = &s.questions[0];
                for answer in &q.answers {
                    assert!(s.text.contains(answer.as_str()), "{task}: {answer}");
                }
                for fact in &q.facts {
                    let told = &s.text[fact.clone()];
                    assert!(
                        q.answers.iter().any(|a| told.contains(a.as_str())),
                        "{task}: {told}"
                    );
                }
                let right = format!("I think {}", q.answers.join(", "));
                assert_eq!(s.score.of(&right, &q.answers), 1.0);
            }
        }
    }

    #[test]
    fn counts_are_the_benchmarks() {
        let get = |task| sample(task, "2:0", 3000, None, &count).unwrap();
        let facts = |s: &Sample| (s.ends(true).len(), s.questions[0].facts.len());
        assert_eq!(facts(&get("niah_single_1")), (1, 1));
        assert_eq!(facts(&get("niah_multikey_1")), (4, 1));
        assert_eq!(facts(&get("niah_multivalue")), (4, 4));
        assert_eq!(facts(&get("niah_multiquery")), (4, 4));
        assert_eq!(facts(&get("vt")), (5, 5));
        assert_eq!(get("niah_multivalue").questions[0].answers.len(), 4);
        let needles = get("niah_multikey_3");
        assert!(needles.text.matches("The secret uuid").count() > 20);
        let cwe = get("cwe");
        let words: Vec<&str> = cwe.text.split_whitespace().collect();
        let times = |w: &String| words.iter().filter(|x| **x == w).count();
        assert!(cwe.questions[0].answers.iter().all(|w| times(w) == 30));
        let fwe = get("fwe");
        let words: Vec<&str> = fwe.text.split_whitespace().collect();
        let of = |w: &str| words.iter().filter(|x| **x == w).count();
        let top: Vec<usize> = fwe.questions[0].answers.iter().map(|w| of(w)).collect();
        assert!(
            of("...") > top[0] && top[0] > top[1] && top[1] > top[2],
            "{top:?}"
        );
        let others = words
            .iter()
            .filter(|w| !fwe.questions[0].answers.iter().any(|a| a == *w) && **w != "...");
        assert!(others.into_iter().all(|w| of(w) < top[2]));
    }

    #[test]
    fn depth_places_the_needle() {
        for depth in [0.0, 0.5, 1.0] {
            let s = sample("niah_single_2", "3:0", 2000, Some(depth), &count).unwrap();
            let at = s.questions[0].facts[0].start as f64 / s.text.len() as f64;
            assert!((at - depth).abs() < 0.06, "{depth}: {at}");
        }
    }

    #[test]
    fn too_short_is_refused() {
        for task in tasks() {
            assert!(sample(task, "1:0", 12, None, &count).is_err(), "{task}");
        }
        assert!(sample("niah_single_9", "1:0", 1000, None, &count).is_err());
    }
}
