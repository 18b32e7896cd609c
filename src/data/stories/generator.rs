//! The story writer: a few facts, told once, that later sentences need again.

use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::Story;

pub(super) const NAMES: [&str; 16] = [
    "Lily", "Mia", "Anna", "Lucy", "Sue", "Emma", "Amy", "Kate", "Tom", "Ben", "Sam", "Tim", "Max",
    "Jack", "Leo", "Bob",
];
pub(super) const COLOURS: [&str; 10] = [
    "red", "blue", "green", "yellow", "pink", "brown", "white", "black", "purple", "golden",
];
pub(super) const TOYS: [&str; 16] = [
    "ball", "kite", "doll", "boat", "drum", "hat", "book", "cup", "car", "bell", "scarf", "train",
    "lamp", "ring", "bag", "coat",
];
pub(super) const PLACES: [&str; 10] = [
    "park", "river", "forest", "lake", "school", "beach", "market", "farm", "bridge", "hill",
];

/// Templates: `{n}` `{c}` `{t}` a character's name, colour and toy, `{m}` `{d}` `{u}` the other's,
/// `{p}` the place; `[x]` is the same, but to be recalled.
const OPENINGS: [&str; 4] = [
    "Once upon a time {n} and {m} met at the {p}.",
    "One day {n} and {m} walked to the {p}.",
    "It was a sunny day at the {p}, and {n} saw {m}.",
    "{n} and {m} were good friends who lived near the {p}.",
];
pub(super) const FACTS: [&str; 5] = [
    "{n} had a {c} {t}.",
    "{n} found a {c} {t}.",
    "{n} got a {c} {t} from a friend.",
    "{n} made a {c} {t}.",
    "{n} was holding a {c} {t}.",
];
const FILLERS: [&str; 10] = [
    "The sun was warm.",
    "They sang a happy song.",
    "It began to rain a little.",
    "A bird sat in a tree and looked at them.",
    "They ran and laughed for a long time.",
    "Then they sat down to rest.",
    "They were hungry, so they ate some cake.",
    "The wind was very strong.",
    "They told each other a funny story.",
    "A small dog came to say hello.",
];
const RECALLS: [&str; 9] = [
    "{n} played with the [c] [t].",
    "{n} loved the [c] [t] very much.",
    "{m} wanted to see the {c} [t].",
    "{n} dropped the [c] [t], but {m} helped.",
    "{n} gave {m} the [c] [t] for a while.",
    "{m} said that the {c} [t] was lovely.",
    "They had fun at the [p].",
    "{n} put the [c] [t] down and took the {d} [u].",
    "\"I like it here at the [p],\" said {n}.",
];
const ENDINGS: [&str; 3] = [
    "At last {n} went home with the [c] [t], and {m} went home with the [d] [u].",
    "They left the [p]. {n} carried the [c] [t] and {m} carried the [d] [u].",
    "When night came, {n} slept next to the [c] [t] and {m} next to the [d] [u].",
];

/// An endless source of stories; the seed decides all of them.
#[derive(Debug, Clone)]
pub struct StoryGenerator(ChaCha8Rng);

impl StoryGenerator {
    /// Different seeds give unrelated stories: one for training, another to hold out.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }
}

/// Who has what: name, colour, toy.
type Character = [&'static str; 3];

impl Iterator for StoryGenerator {
    type Item = Story;

    fn next(&mut self) -> Option<Story> {
        let random = &mut self.0;
        let mut two = |list: &'static [&'static str]| -> [&'static str; 2] {
            let picked: Vec<_> = list.sample(random, 2).copied().collect();
            [picked[0], picked[1]]
        };
        let (names, colours, toys) = (two(&NAMES), two(&COLOURS), two(&TOYS));
        let place = two(&PLACES)[0];
        let characters: [Character; 2] = [0, 1].map(|i| [names[i], colours[i], toys[i]]);
        let mut told = Teller {
            place,
            text: String::new(),
            recall: Vec::new(),
        };
        let either = |random: &mut ChaCha8Rng| {
            let first = usize::from(random.random_bool(0.5));
            [characters[first], characters[1 - first]]
        };
        told.tell(pick(&OPENINGS, random), either(random));
        for pair in [characters, [characters[1], characters[0]]] {
            told.tell(pick(&FACTS, random), pair);
        }
        let mut middle: Vec<&str> = (0..random.random_range(3..=5))
            .map(|_| pick(&RECALLS, random))
            .collect();
        middle.extend((0..random.random_range(1..=2)).map(|_| pick(&FILLERS, random)));
        middle.shuffle(random);
        for template in middle {
            told.tell(template, either(random));
        }
        told.tell(pick(&ENDINGS, random), either(random));
        Some(Story {
            text: told.text,
            recall: told.recall,
        })
    }
}

/// What a word of the generator's lists stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Name,
    Colour,
    Toy,
    Place,
}

impl Kind {
    const LISTS: [(Kind, &[&str]); 4] = [
        (Kind::Name, &NAMES),
        (Kind::Colour, &COLOURS),
        (Kind::Toy, &TOYS),
        (Kind::Place, &PLACES),
    ];

    /// `None` for the words of the templates.
    pub fn of(word: &str) -> Option<Self> {
        let found = Self::LISTS.iter().find(|(_, list)| list.contains(&word));
        found.map(|(kind, _)| *kind)
    }
}

/// Another word of the same kind, for an answer that is wrong.
pub(super) fn another(word: &str) -> Option<&'static str> {
    Kind::LISTS.into_iter().find_map(|(_, list)| {
        let at = list.iter().position(|w| *w == word)?;
        Some(list[(at + 1) % list.len()])
    })
}

fn pick(list: &[&'static str], random: &mut ChaCha8Rng) -> &'static str {
    list.choose(random).expect("no list is empty")
}

struct Teller {
    place: &'static str,
    text: String,
    recall: Vec<(usize, usize)>,
}

impl Teller {
    fn tell(&mut self, template: &str, [[n, c, t], [m, d, u]]: [Character; 2]) {
        if !self.text.is_empty() {
            self.text.push(' ');
        }
        let mut rest = template;
        while let Some(at) = rest.find(['{', '[']) {
            self.text.push_str(&rest[..at]);
            let word = match &rest[at + 1..at + 2] {
                "n" => n,
                "c" => c,
                "t" => t,
                "m" => m,
                "d" => d,
                "u" => u,
                _ => self.place,
            };
            if &rest[at..=at] == "[" {
                // The space before the word belongs to its token.
                let from = self.text.len() - 1;
                self.recall.push((from, from + 1 + word.len()));
            }
            self.text.push_str(word);
            rest = &rest[at + 3..];
        }
        self.text.push_str(rest);
    }
}
