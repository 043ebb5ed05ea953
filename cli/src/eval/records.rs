//! The language of records: documents of uneven density with questions.
//!
//! Words, templates and tasks stand in `train/records.json`; the drawing here follows
//! `train/data.py` draw by draw, so that one seed gives the trainer and this program one text.

use super::random::Random;
use super::sample::{Question, Sample, Writer};
use super::score::Score;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

/// Tokens an answer in this language may take: the longest lists four things.
const N_PREDICT: usize = 32;
/// Questions drawn to choose from when a depth is asked for.
const CANDIDATES: usize = 64;

#[derive(Deserialize)]
struct Language {
    lists: HashMap<String, Vec<String>>,
    relations: Vec<Relation>,
    own: Own,
    track: Track,
    terse: Terse,
    filler: Fillers,
    tasks: BTreeMap<String, String>,
    answer: Answer,
}

#[derive(Deserialize)]
struct Relation {
    name: String,
    key: String,
    value: String,
    fact: Vec<String>,
    question: Vec<String>,
    update: Vec<String>,
    pair: Vec<String>,
}

#[derive(Deserialize)]
struct Own {
    owner: String,
    thing: String,
    fact: Vec<String>,
    list_question: Vec<String>,
    count_question: Vec<String>,
    count: String,
}

#[derive(Deserialize)]
struct Track {
    thing: String,
    holder: String,
    start: Vec<String>,
    step: Vec<String>,
    question: Vec<String>,
}

#[derive(Deserialize)]
struct Terse {
    fact: String,
    question: String,
}

#[derive(Deserialize)]
struct Fillers {
    en: Vec<String>,
    zh: Vec<String>,
}

#[derive(Deserialize)]
struct Answer {
    join: String,
}

/// The language, read once.
fn language() -> &'static Language {
    static LANGUAGE: OnceLock<Language> = OnceLock::new();
    LANGUAGE.get_or_init(|| {
        let text = include_str!("../../../train/records.json");
        serde_json::from_str(text).expect("train/records.json is part of the program")
    })
}

/// Names and one-line descriptions of the tasks.
pub fn tasks() -> impl Iterator<Item = (&'static str, &'static str)> {
    let tasks = &language().tasks;
    tasks.iter().map(|(n, about)| (n.as_str(), about.as_str()))
}

/// Which statements a text is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Relations {
    /// All English ones; people and things have several.
    English,
    /// English ones whose keys and values are all different kinds of words.
    Disjoint,
    /// The Chinese ones.
    Chinese,
}

impl Relations {
    fn names(self) -> &'static [&'static str] {
        match self {
            Relations::English => &[
                "home", "place", "date", "password", "trade", "pet", "colour",
            ],
            Relations::Disjoint => &["home", "place", "date"],
            Relations::Chinese => &["zh_home", "zh_place"],
        }
    }

    fn rows(self) -> Vec<&'static Relation> {
        let all = &language().relations;
        let find = |name: &&str| all.iter().find(|r| r.name == *name);
        self.names().iter().filter_map(find).collect()
    }
}

/// What a text is to be like.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Row of `tasks` in the file.
    pub task: String,
    /// Statements.
    pub n_facts: usize,
    /// Sentences of filler.
    pub n_filler: usize,
    /// Questions, drawn with replacement.
    pub n_questions: usize,
    /// Statements to draw from.
    pub relations: Relations,
    /// Share of statements that return later in other words.
    pub repeat: f64,
    /// Share of statements and questions in the bare form of a list.
    pub terse: f64,
}

/// A question before the text is put together: evidence by number of statement.
struct Asked {
    text: String,
    answers: Vec<String>,
    evidence: Vec<usize>,
    chance: f64,
}

/// A drawn document without filler, and the stream where its drawing left off.
struct Draft {
    /// Statements in order.
    facts: Vec<String>,
    asked: Vec<Asked>,
    rng: Random,
    chinese: bool,
}

/// The words of a list; none if there is no such list.
pub fn words(name: &str) -> &'static [String] {
    let lists = &language().lists;
    lists.get(name).map_or(&[], |l| l)
}

/// `template` with each `{name}` replaced.
fn fill(template: impl AsRef<str>, words: &[(&str, &str)]) -> String {
    let mut out = template.as_ref().to_owned();
    for (name, word) in words {
        out = out.replace(&format!("{{{name}}}"), word);
    }
    out
}

impl Draft {
    fn new(seed: &str, shape: &Shape) -> Result<Draft> {
        let lang = language();
        if !lang.tasks.contains_key(&shape.task) {
            let known: Vec<_> = lang.tasks.keys().map(String::as_str).collect();
            bail!(
                "unknown task `{}`; the records have {}",
                shape.task,
                known.join(", ")
            );
        }
        let chinese = shape.relations == Relations::Chinese;
        let mut draft = Draft {
            facts: Vec::new(),
            asked: Vec::new(),
            rng: Random::new(seed),
            chinese,
        };
        let english_only = ["multi_value", "aggregation", "tracking"];
        if chinese && english_only.contains(&shape.task.as_str()) {
            bail!("task `{}` has English templates only", shape.task);
        }
        match shape.task.as_str() {
            "multi_value" | "aggregation" => draft.own(shape),
            "tracking" => draft.tracking(shape),
            _ => draft.relations(shape),
        }
        .with_context(|| format!("task `{}` with {} facts", shape.task, shape.n_facts))?;
        Ok(draft)
    }

    fn tell(&mut self, template: &str, words: &[(&str, &str)]) {
        self.facts.push(fill(template, words));
    }

    /// Who bought what.
    fn own(&mut self, shape: &Shape) -> Result<()> {
        let own = &language().own;
        let (all, owners) = (words(&own.thing), words(&own.owner));
        let things = self.rng.sample(all, shape.n_facts.min(all.len()));
        let people = self.rng.sample(owners, (things.len() / 3).max(2));
        let mut bought: Vec<Vec<(String, usize)>> = vec![Vec::new(); people.len()];
        for (i, thing) in things.iter().enumerate() {
            let open: Vec<usize> = (0..people.len()).filter(|&p| bought[p].len() < 4).collect();
            let p = *self.rng.choice(&open);
            bought[p].push((thing.clone(), i));
            let template = self.rng.choice(&own.fact);
            self.tell(template, &[("owner", &people[p]), ("thing", thing)]);
        }
        let owners: Vec<usize> = (0..people.len())
            .filter(|&p| !bought[p].is_empty())
            .collect();
        if owners.is_empty() {
            bail!("at least one fact is needed");
        }
        for _ in 0..shape.n_questions {
            let p = *self.rng.choice(&owners);
            let n = bought[p].len();
            let (templates, answers, chance) = if shape.task == "aggregation" {
                let count = &words(&own.count)[n - 1];
                (&own.count_question, vec![count.clone()], 1.0 / 4.0)
            } else {
                let names: Vec<String> = bought[p].iter().map(|(t, _)| t.clone()).collect();
                // As many things drawn blindly hit that share of them.
                let chance = n as f64 / all.len() as f64;
                (&own.list_question, names, chance)
            };
            self.asked.push(Asked {
                text: fill(self.rng.choice(templates), &[("owner", &people[p])]),
                answers,
                evidence: bought[p].iter().map(|(_, i)| *i).collect(),
                chance,
            });
        }
        Ok(())
    }

    /// Things that pass from hand to hand.
    fn tracking(&mut self, shape: &Shape) -> Result<()> {
        let track = &language().track;
        let (all, holders) = (words(&track.thing), words(&track.holder));
        let chains = (shape.n_facts / 3).max(1);
        if chains > all.len() {
            bail!("at most {} facts", all.len() * 3 + 2);
        }
        let things = self.rng.sample(all, chains);
        let mut last = Vec::new();
        let mut steps: Vec<Vec<String>> = Vec::new();
        for thing in &things {
            let n = self.rng.between(2, 4);
            let path = self.rng.sample(holders, n);
            let words = [("holder", path[0].as_str()), ("thing", thing.as_str())];
            let mut moves = vec![fill(self.rng.choice(&track.start), &words)];
            for pair in path.windows(2) {
                let words = [
                    ("holder", pair[0].as_str()),
                    ("thing", thing.as_str()),
                    ("next", pair[1].as_str()),
                ];
                moves.push(fill(self.rng.choice(&track.step), &words));
            }
            last.push(path[path.len() - 1].clone());
            steps.push(moves);
        }
        let mut evidence: Vec<Vec<usize>> = vec![Vec::new(); chains];
        loop {
            let open: Vec<usize> = (0..chains).filter(|&c| !steps[c].is_empty()).collect();
            if open.is_empty() {
                break;
            }
            let c = *self.rng.choice(&open);
            evidence[c].push(self.facts.len());
            self.facts.push(steps[c].remove(0));
        }
        let numbers: Vec<usize> = (0..chains).collect();
        for _ in 0..shape.n_questions {
            let c = *self.rng.choice(&numbers);
            self.asked.push(Asked {
                text: fill(self.rng.choice(&track.question), &[("thing", &things[c])]),
                answers: vec![last[c].clone()],
                evidence: evidence[c].clone(),
                chance: 1.0 / holders.len() as f64,
            });
        }
        Ok(())
    }

    /// Keys with values: single, repeat, multi_key, update and multi_query.
    fn relations(&mut self, shape: &Shape) -> Result<()> {
        let relations = shape.relations.rows();
        if shape.n_facts == 0 {
            bail!("at least one fact is needed");
        }
        let rng = &mut self.rng;
        // Values by (relation, key), and the order they were first told in.
        let mut told: HashMap<(usize, String), String> = HashMap::new();
        let mut order: Vec<(usize, String)> = Vec::new();
        let mut keys: HashMap<&str, Vec<String>> = HashMap::new();
        let numbers: Vec<usize> = (0..relations.len()).collect();
        let room: usize = relations.iter().map(|r| words(&r.key).len()).sum();
        while told.len() < shape.n_facts {
            let r = *rng.choice(&numbers);
            let all = words(&relations[r].key);
            // Drawn even when the kind of key has been met before, as the trainer does.
            let shuffled = rng.sample(all, all.len());
            let pool = keys.entry(&relations[r].key).or_insert(shuffled);
            let few = match shape.task == "multi_key" {
                true => &pool[..pool.len().min((shape.n_facts / 2).max(2))],
                false => &pool[..],
            };
            let key = rng.choice(few).clone();
            if told.contains_key(&(r, key.clone())) {
                if told.len() >= room / 2 {
                    break;
                }
                continue;
            }
            let value = rng.choice(words(&relations[r].value)).clone();
            told.insert((r, key.clone()), value);
            order.push((r, key));
        }
        // (relation, key, value, which of order, whether it is an update)
        let mut tellings: Vec<(usize, String, String, usize, bool)> = (order.iter().enumerate())
            .map(|(i, (r, k))| (*r, k.clone(), told[&(*r, k.clone())].clone(), i, false))
            .collect();
        let mut later = Vec::new();
        for (i, (r, k)) in order.iter().enumerate() {
            if shape.task == "update" && rng.random() < 0.5 {
                let value = rng.choice(words(&relations[*r].value)).clone();
                told.insert((*r, k.clone()), value.clone());
                later.push((*r, k.clone(), value, i, true));
            } else if rng.random() < shape.repeat {
                let value = told[&(*r, k.clone())].clone();
                later.push((*r, k.clone(), value, i, false));
            }
        }
        for item in later {
            let first = tellings.iter().position(|t| t.3 == item.3);
            let first = first.expect("every later telling has a first one");
            let at = rng.between(first + 1, tellings.len());
            tellings.insert(at, item);
        }
        let mut texts = Vec::new();
        for (r, key, value, _, update) in &tellings {
            let row = relations[*r];
            let forms = if *update { &row.update } else { &row.fact };
            let template = match rng.random() < shape.terse {
                true => &language().terse.fact,
                false => rng.choice::<String>(forms),
            };
            texts.push(fill(template, &[("key", key), ("value", value)]));
        }
        self.facts = texts;
        // What must be remembered: the update if there is one (the latest value wins), else
        // either telling would do and the later one is nearer; both are named.
        let evidence = |i: usize| -> Vec<usize> {
            let mine = |update| {
                let those = tellings.iter().enumerate();
                those
                    .filter(|(_, t)| t.3 == i && t.4 == update)
                    .map(|(n, _)| n)
                    .collect::<Vec<_>>()
            };
            match mine(true) {
                updates if updates.is_empty() => mine(false),
                updates => updates,
            }
        };
        let which: Vec<usize> = (0..order.len()).collect();
        for _ in 0..shape.n_questions {
            let i = *self.rng.choice(&which);
            let (r, key) = &order[i];
            let row = relations[*r];
            let chance = 1.0 / words(&row.value).len() as f64;
            let value = &told[&(*r, key.clone())];
            if shape.task == "multi_query" {
                let same = |&j: &usize| order[j].0 == *r && order[j].1 != *key;
                let same: Vec<usize> = which.iter().copied().filter(same).collect();
                if !same.is_empty() {
                    let j = *self.rng.choice(&same);
                    let key2 = &order[j].1;
                    let value2 = &told[&(*r, key2.clone())];
                    let words = [("key", key.as_str()), ("key2", key2.as_str())];
                    self.asked.push(Asked {
                        text: fill(self.rng.choice(&row.pair), &words),
                        answers: vec![value.clone(), value2.clone()],
                        evidence: [evidence(i), evidence(j)].concat(),
                        chance,
                    });
                    continue;
                }
            }
            let template = match self.rng.random() < shape.terse {
                true => &language().terse.question,
                false => self.rng.choice::<String>(&row.question),
            };
            self.asked.push(Asked {
                text: fill(template, &[("key", key)]),
                answers: vec![value.clone()],
                evidence: evidence(i),
                chance,
            });
        }
        Ok(())
    }

    fn filler(&mut self) -> String {
        filler_sentence(&mut self.rng, self.chinese)
    }

    /// The facts in their order with filler at random places, in bursts so that density is uneven.
    fn spread(mut self, shape: &Shape, filler: Vec<String>) -> Sample {
        let mut gaps = vec![0; self.facts.len() + 1];
        let mut left = filler.len();
        while left > 0 {
            let burst = left.min(self.rng.between(1, 4));
            gaps[self.rng.below(self.facts.len() + 1)] += burst;
            left -= burst;
        }
        let mut out = Writer::new(if self.chinese { "" } else { " " });
        let mut filler = filler.into_iter();
        let mut ranges = Vec::new();
        for (i, gap) in gaps.into_iter().enumerate() {
            for sentence in filler.by_ref().take(gap) {
                out.push(&sentence, false);
            }
            if let Some(fact) = self.facts.get(i) {
                ranges.push(out.push(fact, true));
            }
        }
        let (text, segments) = out.finish();
        let questions = self.asked.into_iter().map(|q| Question {
            text: q.text,
            prefix: String::new(),
            answers: q.answers,
            facts: q.evidence.iter().map(|&i| ranges[i].clone()).collect(),
            chance: q.chance,
        });
        Sample {
            task: shape.task.clone(),
            questions: questions.collect(),
            text,
            segments,
            // As RULER scores several values and several queries.
            score: match shape.task.as_str() {
                "multi_value" | "multi_query" => Score::All,
                _ => Score::Exact,
            },
            n_predict: N_PREDICT,
        }
    }
}

/// `sample` with another score. Under [`Score::Exact`] several values become the one answer that
/// lists them in their order.
pub fn scored(mut sample: Sample, score: Score) -> Sample {
    if score == Score::Exact {
        for q in &mut sample.questions {
            q.answers = vec![q.answers.join(&language().answer.join)];
        }
    }
    sample.score = score;
    sample
}

/// One sentence that says nothing a question asks for.
pub fn filler_sentence(rng: &mut Random, chinese: bool) -> String {
    let templates = match chinese {
        true => &language().filler.zh,
        false => &language().filler.en,
    };
    let mut text = String::new();
    for (i, part) in rng.choice(templates).split('{').enumerate() {
        match part.split_once('}') {
            Some((name, rest)) if i > 0 => {
                text += rng.choice::<String>(words(name));
                text.push_str(rest);
            }
            _ => text.push_str(part),
        }
    }
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => text,
    }
}

/// The document of `seed`.
pub fn record(seed: &str, shape: &Shape) -> Result<Sample> {
    let mut draft = Draft::new(seed, shape)?;
    let filler = (0..shape.n_filler).map(|_| draft.filler()).collect();
    Ok(draft.spread(shape, filler))
}

/// The document of `seed` with as much filler as fits into `length` tokens, counted by `count`, and
/// how many sentences of filler that is: [`record`] with that number gives the same document.
/// Where a `depth` is given the questions are those whose facts lie nearest to it.
pub fn fitting(
    seed: &str,
    shape: &Shape,
    length: usize,
    depth: Option<f64>,
    count: &dyn Fn(&str) -> usize,
) -> Result<(Sample, usize)> {
    let mut shape = shape.clone();
    let wanted = shape.n_questions;
    if depth.is_some() {
        shape.n_questions = wanted.max(CANDIDATES);
    }
    let mut draft = Draft::new(seed, &shape)?;
    let glue = if draft.chinese { "" } else { " " };
    let size = |sentence: &str| count(&format!("{glue}{sentence}"));
    let mut n: usize = draft.facts.iter().map(|f| size(f)).sum();
    if n > length {
        bail!(
            "{} facts take {n} tokens, more than the {length} asked for",
            draft.facts.len()
        );
    }
    // Filler is drawn after everything else: the first n sentences are the same for any n.
    let mut n_filler = 0;
    loop {
        n += size(&draft.filler());
        if n > length {
            break;
        }
        n_filler += 1;
    }
    shape.n_filler = n_filler;
    let mut sample = record(seed, &shape)?;
    if let Some(depth) = depth {
        sample.keep_near(depth, wanted);
    }
    Ok((sample, n_filler))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by tools/records_golden.py from `train/data.py`.
    const GOLDEN: &str = include_str!("../../tests/records.jsonl");

    fn shape(task: &str, chinese: bool) -> Shape {
        Shape {
            task: task.into(),
            n_facts: 0,
            n_filler: 0,
            n_questions: 1,
            relations: match chinese {
                true => Relations::Chinese,
                false => Relations::English,
            },
            repeat: 0.0,
            terse: 0.0,
        }
    }

    #[test]
    fn texts_are_those_of_the_trainer() {
        let mut n = 0;
        for line in GOLDEN.lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let task = row["task"].as_str().unwrap();
            let number = |key: &str| row[key].as_u64().unwrap() as usize;
            let asked: Vec<(String, String)> =
                serde_json::from_value(row["questions"].clone()).unwrap();
            let shape = Shape {
                n_facts: number("n_facts"),
                n_filler: number("n_filler"),
                n_questions: asked.len(),
                repeat: row["repeat"].as_f64().unwrap(),
                terse: row["terse"].as_f64().unwrap(),
                ..shape(task, row["chinese"].as_bool().unwrap())
            };
            let sample = record(row["seed"].as_str().unwrap(), &shape).unwrap();
            assert_eq!(sample.text, row["text"].as_str().unwrap(), "{task}");
            let got = sample
                .questions
                .iter()
                .map(|q| (q.text.clone(), q.answers.join(&language().answer.join)));
            assert_eq!(got.collect::<Vec<_>>(), asked, "{task}");
            // Offsets there are in characters.
            let chars = |at: usize| sample.text[..at].chars().count() as u64;
            for (key, fact) in [("ends", true), ("filler_ends", false)] {
                let ends: Vec<u64> = sample.ends(fact).into_iter().map(chars).collect();
                let want: Vec<u64> = serde_json::from_value(row[key].clone()).unwrap();
                assert_eq!(ends, want, "{task} {key}");
            }
            n += 1;
        }
        assert!(n >= 20, "{n} rows");
    }

    #[test]
    fn every_answer_stands_in_its_evidence() {
        for (task, _) in tasks() {
            let shape = Shape {
                n_facts: 12,
                n_filler: 20,
                n_questions: 20,
                ..shape(task, false)
            };
            let sample = record("evidence", &shape).unwrap();
            for q in &sample.questions {
                let told: Vec<&str> = q.facts.iter().map(|f| &sample.text[f.clone()]).collect();
                assert!(!told.is_empty());
                if task == "aggregation" {
                    let numbers = words("number");
                    assert_eq!(q.answers[0], numbers[told.len() - 1]);
                    continue;
                }
                for part in &q.answers {
                    assert!(
                        told.iter().any(|t| t.contains(part)),
                        "{task}: {part} is not in {told:?}"
                    );
                }
                if task == "tracking" {
                    let (last, earlier) = told.split_last().unwrap();
                    assert!(last.contains(&q.answers[0]), "{told:?}");
                    assert!(
                        !earlier
                            .iter()
                            .any(|t| t.ends_with(&format!("to {}.", q.answers[0])))
                    );
                }
            }
        }
    }

    #[test]
    fn several_values_are_answers_of_their_own_unless_the_list_is_asked_for() {
        let shape = Shape {
            n_facts: 12,
            n_questions: 8,
            ..shape("multi_value", false)
        };
        let sample = record("several", &shape).unwrap();
        assert_eq!(sample.score, Score::All);
        let most = sample.questions.iter().map(|q| q.answers.len()).max();
        assert!(most.unwrap() > 1);
        let lists = scored(sample.clone(), Score::Exact);
        for (q, list) in sample.questions.iter().zip(&lists.questions) {
            assert_eq!(list.answers, [q.answers.join(" and ")]);
            assert_eq!(
                sample.score.of(&q.answers[0], &q.answers),
                1.0 / q.answers.len() as f64
            );
            assert_eq!(lists.score.of(&q.answers.join(" and "), &list.answers), 1.0);
        }
    }

    #[test]
    fn the_length_asked_for_is_filled() {
        let words = |s: &str| s.split_whitespace().count();
        let wanted = Shape {
            n_facts: 6,
            n_questions: 3,
            ..shape("single", false)
        };
        let (sample, n_filler) = fitting("a", &wanted, 900, None, &words).unwrap();
        let n = words(&sample.text);
        assert!((875..=900).contains(&n), "{n}");
        let again = record(
            "a",
            &Shape {
                n_filler,
                ..wanted.clone()
            },
        );
        assert_eq!(again.unwrap(), sample);
        let (other, _) = fitting("b", &wanted, 900, None, &words).unwrap();
        assert_ne!(other.text, sample.text);
        assert!(fitting("a", &wanted, 20, None, &words).is_err());
    }

    #[test]
    fn depth_moves_the_question() {
        let words = |s: &str| s.split_whitespace().count();
        let wanted = Shape {
            n_facts: 20,
            n_questions: 2,
            ..shape("single", false)
        };
        let mut last = -1.0;
        for depth in [0.0, 0.5, 1.0] {
            let (sample, _) = fitting("a", &wanted, 2000, Some(depth), &words).unwrap();
            assert_eq!(sample.questions.len(), 2);
            let at = sample.questions[0].facts[0].start as f64 / sample.text.len() as f64;
            assert!((at - depth).abs() < 0.25 && at > last, "{depth}: {at}");
            last = at;
        }
    }

    #[test]
    fn impossible_shapes_are_refused() {
        assert!(record("a", &shape("single", false)).is_err(), "no facts");
        let nine = |task, chinese| Shape {
            n_facts: 9,
            ..shape(task, chinese)
        };
        assert!(record("a", &nine("nothing", false)).is_err());
        assert!(record("a", &nine("tracking", true)).is_err());
        let chains = Shape {
            n_facts: 3000,
            ..shape("tracking", false)
        };
        assert!(record("a", &chains).is_err());
    }
}
