//! Simple English stories that can only be continued by remembering how they began: who has which toy
//! of which colour, and where. Made by the program itself, so that a small teacher can be pretrained,
//! distilled and examined for recall without any download.
//!
//! Associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927) in the clothes of TinyStories
//! (Eldan & Li 2023, arXiv 2305.07759).

mod exercises;
mod generator;
mod vocabulary;

use std::io::{BufWriter, Write};
use std::path::Path;

use serde::Serialize;

use super::{Preference, Tokenizer};
use crate::atomic::write_atomic_with;
use crate::{Error, Result};

pub use exercises::Exercises;
pub use generator::{Kind, StoryGenerator};
pub use vocabulary::{tokenizer, write_tokenizer};

/// A text with the places where an earlier fact decides the next word.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Story {
    pub text: String,
    /// Byte spans `(start, end)` of the answers, each with the space before its word.
    pub recall: Vec<(usize, usize)>,
}

impl Story {
    /// The story's tokens, and the index of the token that is each answer.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<usize>)> {
        let tokens = tokenizer.encode_with_offsets(&self.text, true)?;
        let index = |start: usize| {
            tokens
                .iter()
                .position(|(_, range)| range.start == start && range.end > start)
        };
        let answers = self.recall.iter().map(|(start, end)| {
            index(*start).ok_or_else(|| {
                Error::invalid(format!(
                    "no token begins with {:?} at byte {start}",
                    &self.text[*start..*end]
                ))
            })
        });
        let answers = answers.collect::<Result<_>>()?;
        Ok((tokens.into_iter().map(|(id, _)| id).collect(), answers))
    }
}

impl Story {
    /// The story up to its answer `index`; the right word is chosen over another of its kind.
    ///
    /// # Panics
    /// When the story has no such answer.
    pub fn preference(&self, index: usize) -> Preference {
        let (start, end) = self.recall[index];
        let word = self.text[start..end].trim_start();
        let wrong = generator::another(word).expect("answers are words of the generator");
        let rest = &self.text[end..];
        let sentence = rest.find('.').map_or(rest, |stop| &rest[..=stop]);
        Preference {
            prompt: self.text[..start].to_owned(),
            chosen: format!(" {word}{sentence}"),
            rejected: format!(" {wrong}{sentence}"),
        }
    }
}

fn preference_lines(seed: u64, count: usize) -> impl Iterator<Item = String> {
    let stories = StoryGenerator::new(seed).take(count);
    let pairs = stories.map(|story| story.preference(story.recall.len() - 1));
    pairs.map(|pair| serde_json::to_string(&pair).expect("texts serialise") + "\n")
}

fn lines(seed: u64, count: usize) -> impl Iterator<Item = String> {
    let stories = StoryGenerator::new(seed).take(count);
    stories.map(|story| serde_json::to_string(&story).expect("texts and numbers serialise") + "\n")
}

/// A preference of every story of `seed`, about its last answer, as JSON lines.
pub fn preferences_to_jsonl(seed: u64, count: usize) -> String {
    preference_lines(seed, count).collect()
}

/// Stories of `seed` as JSON lines with `text` and `recall`.
pub fn to_jsonl(seed: u64, count: usize) -> String {
    lines(seed, count).collect()
}

/// Writes [`to_jsonl`] to a file, line by line.
///
/// # Errors
/// A file that cannot be written.
pub fn write_jsonl(path: &Path, seed: u64, count: usize) -> Result<()> {
    write(path, lines(seed, count))
}

/// The same of [`preferences_to_jsonl`].
///
/// # Errors
/// A file that cannot be written.
pub fn write_preferences(path: &Path, seed: u64, count: usize) -> Result<()> {
    write(path, preference_lines(seed, count))
}

/// Writes exercises in the stories' words ([`Exercises`]) as JSON lines with `text`.
///
/// # Errors
/// A file that cannot be written.
pub fn write_exercises(path: &Path, seed: u64, count: usize) -> Result<()> {
    let lines = Exercises::new(seed).take(count);
    write(
        path,
        lines.map(|text| serde_json::json!({ "text": text }).to_string() + "\n"),
    )
}

fn write(path: &Path, mut lines: impl Iterator<Item = String>) -> Result<()> {
    write_atomic_with(path, |file| {
        let mut file = BufWriter::new(file);
        lines.try_for_each(|line| file.write_all(line.as_bytes()))?;
        file.flush()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stories(seed: u64, count: usize) -> Vec<Story> {
        StoryGenerator::new(seed).take(count).collect()
    }

    /// The embedded teacher and published numbers depend on these texts.
    #[test]
    fn a_seed_gives_one_text() {
        assert_eq!(stories(1, 20), stories(1, 20));
        assert_ne!(stories(1, 3), stories(2, 3));
        let tells = |c: char| stories(1, 200).iter().any(|s| s.text.contains(c));
        assert!(!tells('{') && !tells('[') && !tells('}') && !tells(']'));
    }

    #[test]
    fn every_answer_was_told_before() {
        let mut answers = 0;
        for story in stories(3, 500) {
            for (start, end) in &story.recall {
                let answer = &story.text[*start..*end];
                assert!(
                    story.text[..*start].contains(answer),
                    "{answer:?} in {}",
                    story.text
                );
                answers += 1;
            }
        }
        assert!(answers > 6 * 500, "{answers}");
    }

    #[test]
    fn answers_are_single_tokens_and_texts_decode_exactly() {
        let tokenizer = tokenizer().unwrap();
        for story in stories(5, 300) {
            let (ids, answers) = story.encode(&tokenizer).unwrap();
            assert_eq!(ids, tokenizer.encode(&story.text).unwrap());
            assert_eq!(tokenizer.decode(&ids).unwrap(), story.text);
            for (index, (start, end)) in answers.iter().zip(&story.recall) {
                assert_eq!(
                    tokenizer.decode(&ids[*index..index + 1]).unwrap(),
                    story.text[*start..*end]
                );
            }
        }
    }

    #[test]
    fn preferences_hold_the_truth_against_another_word() {
        for story in stories(4, 100) {
            for i in 0..story.recall.len() {
                let pair = story.preference(i);
                assert!(
                    story
                        .text
                        .starts_with(&(pair.prompt.clone() + &pair.chosen))
                );
                assert_ne!(pair.chosen, pair.rejected);
            }
        }
    }

    #[test]
    fn foreign_text_goes_through_bytes() {
        let tokenizer = tokenizer().unwrap();
        let text = "Zoë saw 3 zebras 🦓.\n\tHello  world";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}
