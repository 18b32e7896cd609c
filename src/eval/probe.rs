//! Long-context and recall probes: what hybrids and Transformers differ in. A seeded generator writes a
//! text of a wanted length with one answer in it, at a wanted depth; the model is right if it continues with
//! the answer, token by token.
//!
//! Needle in a haystack; multi-query associative recall (MQAR, arXiv 2312.04927); phonebook lookup and
//! copying (arXiv 2402.01032, 2406.07887); variable tracking (RULER, arXiv 2404.06654).

use rand::seq::IndexedRandom;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::data::Tokenizer;
use crate::generate::score::{Tokens, log_likelihoods, tokens};
use crate::model::Lm;
use crate::watch::Watch;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// One sentence with a number among others without.
    Needle,
    /// Pairs of words; one is asked for again.
    Mqar,
    /// Names and numbers; one number is asked for.
    Phonebook,
    /// Words, to be said again in order.
    Copying,
    /// A value handed on from variable to variable.
    Variables,
}

/// A text that ends where the answer begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub text: String,
    /// With the space before it.
    pub answer: String,
}

impl Question {
    fn tokens(&self, tokenizer: &Tokenizer) -> Result<Tokens> {
        tokens(tokenizer, &self.text, &self.answer, usize::MAX - 1)
    }
}

const WORDS: [&str; 24] = [
    "ball", "kite", "doll", "boat", "drum", "hat", "book", "cup", "car", "bell", "scarf", "train",
    "lamp", "ring", "bag", "coat", "park", "river", "forest", "lake", "school", "beach", "farm",
    "hill",
];
const NAMES: [&str; 16] = [
    "Lily", "Mia", "Anna", "Lucy", "Sue", "Emma", "Amy", "Kate", "Tom", "Ben", "Sam", "Tim", "Max",
    "Jack", "Leo", "Bob",
];
const FILLERS: [&str; 6] = [
    "The sun was warm.",
    "They ran and laughed for a long time.",
    "A bird sat in a tree and looked at them.",
    "The wind was very strong.",
    "Then they sat down to rest.",
    "It began to rain a little.",
];

impl Probe {
    pub const ALL: [Probe; 5] = [
        Probe::Needle,
        Probe::Mqar,
        Probe::Phonebook,
        Probe::Copying,
        Probe::Variables,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Probe::Needle => "needle",
            Probe::Mqar => "mqar",
            Probe::Phonebook => "phonebook",
            Probe::Copying => "copying",
            Probe::Variables => "variables",
        }
    }

    /// Accuracy of guessing among the answers that the text could have.
    pub fn chance(self) -> f64 {
        match self {
            // A number of four digits; a long sequence.
            Probe::Needle | Probe::Phonebook | Probe::Copying => 0.0,
            Probe::Mqar => 1.0 / WORDS.len() as f64,
            Probe::Variables => 1.0 / 90.0,
        }
    }

    /// Whether the answer can stand at different depths of the text.
    pub fn has_depth(self) -> bool {
        self != Probe::Copying
    }

    /// A question of `parts` parts (sentences, pairs, entries, words) whose answer stands at `depth`, from 0
    /// (the beginning) to 1.
    pub fn question(self, parts: usize, depth: f64, random: &mut ChaCha8Rng) -> Question {
        let parts = parts.max(2);
        let at = (depth.clamp(0.0, 1.0) * (parts - 1) as f64).round() as usize;
        let pick = |list: &[&'static str], random: &mut ChaCha8Rng| -> &'static str {
            list.choose(random).copied().unwrap_or_default()
        };
        let digits = |random: &mut ChaCha8Rng| random.random_range(1000..10_000).to_string();
        match self {
            Probe::Needle => {
                let (name, number) = (pick(&NAMES, random), digits(random));
                let mut lines: Vec<String> = (0..parts - 1)
                    .map(|_| pick(&FILLERS, random).to_owned())
                    .collect();
                lines.insert(at, format!("The secret number of {name} is {number}."));
                Question {
                    text: format!("{} The secret number of {name} is", lines.join(" ")),
                    answer: format!(" {number}"),
                }
            }
            Probe::Mqar => {
                let keys = keys(&WORDS, parts, random);
                let values: Vec<&str> = (0..parts).map(|_| pick(&WORDS, random)).collect();
                lookup(&keys, &values, at)
            }
            Probe::Phonebook => {
                let names = keys(&NAMES, parts, random);
                let numbers: Vec<String> = (0..parts).map(|_| digits(random)).collect();
                lookup(&names, &numbers, at)
            }
            Probe::Copying => {
                let words: Vec<&str> = (0..parts).map(|_| pick(&WORDS, random)).collect();
                let (first, rest) = (words[0], &words[1..]);
                Question {
                    text: format!("Words: {}. Again: {first}", words.join(" ")),
                    answer: format!(" {}", rest.join(" ")),
                }
            }
            Probe::Variables => {
                let value = random.random_range(10..100);
                let name = |i: usize| format!("X{i}");
                let hops = 3.min(parts - 1);
                let mut chain = vec![format!("{} = {value}.", name(1))];
                chain.extend((1..hops).map(|i| format!("{} = {}.", name(i + 1), name(i))));
                // The chain keeps its order; its beginning stands at the depth.
                let spare = parts.saturating_sub(chain.len());
                let begin = at.min(spare);
                let mut lines: Vec<String> = (0..spare)
                    .map(|_| pick(&FILLERS, random).to_owned())
                    .collect();
                let end = name(chain.len());
                for (i, line) in chain.into_iter().enumerate() {
                    lines.insert(begin + i, line);
                }
                Question {
                    text: format!("{} {end} =", lines.join(" ")),
                    answer: format!(" {value}"),
                }
            }
        }
    }

    /// Reads the answer off the text, as an exact copier would.
    pub fn oracle(self, text: &str) -> Option<String> {
        match self {
            Probe::Copying => {
                let words = text.strip_prefix("Words: ")?.split('.').next()?;
                Some(format!(" {}", words.split_once(' ')?.1))
            }
            Probe::Variables => {
                let mut wanted = text.rsplit(". ").next()?.strip_suffix(" =")?.to_owned();
                loop {
                    let at = text.find(&format!("{wanted} = "))?;
                    let value = text[at..].split(" = ").nth(1)?.split('.').next()?;
                    match value.starts_with('X') {
                        true => wanted = value.to_owned(),
                        false => return Some(format!(" {value}")),
                    }
                }
            }
            _ => {
                let question = text.rsplit(". ").next()?;
                let at = text.find(question)? + question.len();
                Some(text[at..].split('.').next()?.to_owned())
            }
        }
    }
}

/// `count` different keys in random order. All have as many words, two or, for more keys than there are pairs,
/// as many as are needed: so no key ends another one.
fn keys(words: &[&str], count: usize, random: &mut ChaCha8Rng) -> Vec<String> {
    let (mut length, mut all) = (2, words.len() * words.len());
    while all < count {
        (length, all) = (length + 1, all * words.len());
    }
    let key = |number: usize| {
        let place = |i: u32| words[number / words.len().pow(i) % words.len()];
        (0..length).map(place).collect::<Vec<_>>().join(" ")
    };
    sample(random, all, count).iter().map(key).collect()
}

/// Keys with their values, and the question for one of them.
fn lookup(keys: &[String], values: &[impl AsRef<str>], at: usize) -> Question {
    let line = |i: usize| format!("{}: {}.", keys[i], values[i].as_ref());
    let lines: Vec<String> = (0..keys.len()).map(line).collect();
    Question {
        text: format!("{} {}:", lines.join(" "), keys[at]),
        answer: format!(" {}", values[at].as_ref()),
    }
}

/// Accuracy of one probe at one length and depth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cell {
    pub probe: Probe,
    /// Tokens asked for.
    pub length: usize,
    pub depth: f64,
    pub accuracy: f64,
    /// Mean log-likelihood of an answer's token, in nats: tells more than a row of zeros.
    pub log_likelihood: f64,
    pub count: usize,
    /// Tokens of the texts, on average.
    pub tokens: f64,
}

/// What is swept.
#[derive(Debug, Clone)]
pub struct Sweep {
    pub probes: Vec<Probe>,
    pub lengths: Vec<usize>,
    pub depths: usize,
    /// Questions a cell.
    pub count: usize,
    pub seed: u64,
    pub batch_tokens: usize,
}

/// # Errors
/// A length that the model's context cannot hold, or that no question is as short as, or
/// [`Error::Interrupted`].
pub fn sweep(
    lm: &Lm,
    tokenizer: &Tokenizer,
    sweep: &Sweep,
    watch: &dyn Watch,
) -> Result<Vec<Cell>> {
    let most = lm.config.max_position_embeddings;
    if let Some(length) = sweep.lengths.iter().find(|l| **l > most) {
        return Err(Error::invalid(format!(
            "length {length} is above the model's context of {most}"
        )));
    }
    let mut wanted = Vec::new();
    for probe in &sweep.probes {
        for length in &sweep.lengths {
            let depths = if probe.has_depth() {
                sweep.depths.max(1)
            } else {
                1
            };
            for d in 0..depths {
                let depth = if depths == 1 {
                    0.5
                } else {
                    d as f64 / (depths - 1) as f64
                };
                wanted.push((*probe, *length, depth));
            }
        }
    }
    let all = wanted.len();
    let mut cells = Vec::with_capacity(all);
    for (probe, length, depth) in wanted {
        let mut random = ChaCha8Rng::seed_from_u64(sweep.seed);
        random.set_stream(cells.len() as u64);
        let stage = format!(
            "{} of {length} tokens, cell {} of {all}",
            probe.name(),
            cells.len() + 1
        );
        let questions: Vec<Tokens> = (0..sweep.count.max(1))
            .map(|_| {
                let question = fitting(tokenizer, probe, length, depth, &mut random)?;
                question.tokens(tokenizer)
            })
            .collect::<Result<_>>()?;
        let found = log_likelihoods(lm, &questions, sweep.batch_tokens, &stage, watch)?;
        let right = found.iter().filter(|(_, greedy)| *greedy).count();
        let answers: usize = questions.iter().map(|q| q.continuation.len()).sum();
        cells.push(Cell {
            probe,
            length,
            depth,
            accuracy: right as f64 / questions.len() as f64,
            log_likelihood: found.iter().map(|(sum, _)| sum).sum::<f64>() / answers as f64,
            count: questions.len(),
            tokens: questions.iter().map(Tokens::size).sum::<usize>() as f64
                / questions.len() as f64,
        });
    }
    Ok(cells)
}

/// The longest question of that kind within `length` tokens, answer included.
fn fitting(
    tokenizer: &Tokenizer,
    probe: Probe,
    length: usize,
    depth: f64,
    random: &mut ChaCha8Rng,
) -> Result<Question> {
    // The same draws for every size that is tried.
    let of = |parts: usize| probe.question(parts, depth, &mut random.clone());
    let size = |parts: usize| -> Result<usize> { Ok(of(parts).tokens(tokenizer)?.size()) };
    let (mut low, mut high) = (2, 4);
    if size(low)? > length {
        return Err(Error::invalid(format!(
            "no {} question fits into {length} tokens: the shortest has {}",
            probe.name(),
            size(low)?
        )));
    }
    while size(high)? <= length && high < 1 << 20 {
        (low, high) = (high, 2 * high);
    }
    while high - low > 1 {
        let middle = low.midpoint(high);
        match size(middle)? <= length {
            true => low = middle,
            false => high = middle,
        }
    }
    let found = of(low);
    // The next question draws anew.
    random.random::<u64>();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Every answer is in its text, at its depth: an exact copier is always right.
    #[test]
    fn a_copying_oracle_is_always_right() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for probe in Probe::ALL {
            for parts in [2, 5, 40] {
                for depth in [0.0, 0.5, 1.0] {
                    let question = probe.question(parts, depth, &mut random);
                    let found = probe.oracle(&question.text);
                    assert_eq!(found.as_ref(), Some(&question.answer), "{}", question.text);
                }
            }
        }
    }

    /// At the lengths of the README's sweep too, where there are thousands of keys.
    #[test]
    fn a_copying_oracle_is_right_at_every_length() {
        let tokenizer = Tokenizer::open(Path::new("assets/teacher")).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(4);
        for probe in Probe::ALL {
            for length in [1024, 4096, 16_384] {
                for depth in [0.0, 0.5, 1.0] {
                    let question = fitting(&tokenizer, probe, length, depth, &mut random).unwrap();
                    let found = probe.oracle(&question.text);
                    assert_eq!(
                        found.as_ref(),
                        Some(&question.answer),
                        "{probe:?} of {length} tokens, depth {depth}"
                    );
                }
            }
        }
    }

    #[test]
    fn keys_are_different_however_many_there_are() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        for (count, words) in [(2, 2), (256, 2), (257, 3), (5000, 4)] {
            let keys = keys(&NAMES, count, &mut random);
            let different: std::collections::BTreeSet<_> = keys.iter().collect();
            assert_eq!(different.len(), count);
            assert!(
                keys.iter().all(|k| k.split(' ').count() == words),
                "{count}"
            );
        }
    }

    #[test]
    fn depth_moves_the_answer() {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        let mut place = |depth: f64| {
            let question = Probe::Needle.question(30, depth, &mut random);
            let number = question.answer.trim().to_owned();
            question.text.find(&number).unwrap() as f64 / question.text.len() as f64
        };
        let places = [0.0, 0.5, 1.0].map(&mut place);
        assert!(
            places[0] < 0.1 && (0.3..0.7).contains(&places[1]) && places[2] > 0.8,
            "{places:?}"
        );
    }

    #[test]
    fn questions_fill_the_length_that_is_asked_for() {
        let tokenizer = Tokenizer::open(Path::new("assets/teacher")).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for probe in Probe::ALL {
            for length in [80, 200] {
                let found = fitting(&tokenizer, probe, length, 0.5, &mut random).unwrap();
                let size = found.tokens(&tokenizer).unwrap().size();
                assert!(
                    size <= length && size + 40 > length,
                    "{probe:?}: {size} of {length}"
                );
            }
            let error = fitting(&tokenizer, probe, 4, 0.5, &mut random).unwrap_err();
            assert!(error.to_string().contains("fits into 4 tokens"), "{error}");
        }
    }
}
