//! Texts in the stories' words that train what the stories ask for, each of them far more often than a story does: to
//! copy what followed a word before, and to find what was said of a name. On stories alone a small model stays at answers that
//! never look whose thing it is (docs/log.md).

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::generator::{COLOURS, FACTS, NAMES, PLACES, TOYS};

const RECALLS: [&str; 5] = [
    "{n} played with the {c} {t}.",
    "{n} loved the {c} {t} very much.",
    "{n} slept next to the {c} {t}.",
    "{n} carried the {c} {t}.",
    "{n} went home with the {c} {t}.",
];

/// A fact without the words around it, where a colour follows its name at once.
const PLAIN: [&str; 1] = ["{n} {c} {t}."];

/// Words of a list or of a people's list, about as many as a story's.
const WORDS: usize = 90;
/// Sentences of a telling.
const SENTENCES: usize = 16;

/// An endless source of exercises, half of them lists; the seed decides all of them.
#[derive(Debug, Clone)]
pub struct Exercises(ChaCha8Rng);

impl Exercises {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }
}

impl Iterator for Exercises {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let random = &mut self.0;
        Some(match random.random_range(0..4) {
            0 => list(random),
            1 => people_again(random),
            _ => telling(random),
        })
    }
}

/// A few words of all kinds, said again and again in one order.
fn list(random: &mut ChaCha8Rng) -> String {
    let all = [&NAMES[..], &COLOURS, &TOYS, &PLACES].concat();
    let count = random.random_range(3..=12);
    let words: Vec<&str> = all.sample(random, count).copied().collect();
    let said = words.iter().cycle().take(WORDS.next_multiple_of(count));
    joined(said.copied())
}

/// Name, colour and toy of some characters, said again and again in any order.
fn people_again(random: &mut ChaCha8Rng) -> String {
    let people = people(random, 3..=9);
    let mut said = people.concat();
    while said.len() < WORDS {
        said.extend(people.choose(random).expect("there are some"));
    }
    joined(said.into_iter())
}

/// What each of some characters has, and then sentences of any of them; either, in half of the tellings, without the words around it. So
/// whose a colour is, and whose is asked for, are learned beside each other before they are together.
fn telling(random: &mut ChaCha8Rng) -> String {
    let people = people(random, 2..=8);
    let asked = (people.len()..SENTENCES).map(|_| *people.choose(random).expect("there are some"));
    let asked: Vec<_> = asked.collect();
    let mut plain_or = |whole| if random.random() { &PLAIN[..] } else { whole };
    let (facts, recalls) = (plain_or(&FACTS), plain_or(&RECALLS));
    let facts = people.iter().map(|of| (facts, of));
    let recalls = asked.iter().map(|of| (recalls, of));
    let mut sentences = Vec::with_capacity(SENTENCES);
    for (templates, [name, colour, toy]) in facts.chain(recalls) {
        let template = templates.choose(random).expect("no list is empty");
        let told = template.replace("{n}", name).replace("{c}", colour);
        sentences.push(told.replace("{t}", toy));
    }
    sentences.join(" ")
}

fn people(
    random: &mut ChaCha8Rng,
    count: std::ops::RangeInclusive<usize>,
) -> Vec<[&'static str; 3]> {
    let count = random.random_range(count);
    let mut some = |list: &'static [&'static str]| -> Vec<&'static str> {
        list.sample(random, count).copied().collect()
    };
    let (names, colours, toys) = (some(&NAMES), some(&COLOURS), some(&TOYS));
    (0..count)
        .map(|i| [names[i], colours[i], toys[i]])
        .collect()
}

fn joined<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::data::stories::Kind;

    /// In every text a colour follows one name only, and no text is cut off in the middle.
    #[test]
    fn what_is_somebodys_stays_so() {
        let mut tellings = 0;
        for text in Exercises::new(4).take(400) {
            tellings += usize::from(text.ends_with('.'));
            if !text.ends_with('.') {
                assert!(text.split(' ').count() >= WORDS, "{text}");
                continue;
            }
            let mut owners = BTreeMap::new();
            for sentence in text.split_inclusive('.') {
                let words = sentence.split(|c: char| !c.is_alphabetic());
                let words: Vec<&str> = words.filter(|w| !w.is_empty()).collect();
                let colour = words.iter().find(|w| Kind::of(w) == Some(Kind::Colour));
                assert_eq!(Kind::of(words[0]), Some(Kind::Name), "{text}");
                let owner = owners.entry(colour.copied()).or_insert(words[0]);
                assert_eq!(*owner, words[0], "{text}");
            }
            assert_eq!(text.matches('.').count(), SENTENCES);
            assert!(!text.contains(['{', '}']), "{text}");
        }
        assert!((150..250).contains(&tellings), "{tellings}");
    }
}
