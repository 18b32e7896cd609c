//! Whether a model remembers what a story told it, beside what answers that ignore names would get.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{D, DType, Tensor};
use serde::Serialize;

use crate::Result;
use crate::data::Tokenizer;
use crate::data::stories::{Kind, Story};
use crate::model::Lm;
use crate::watch::Watch;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecallReport {
    /// Share of answers that are the likeliest token, given the story before them.
    pub accuracy: f64,
    /// The same, of the answers that are a colour, a toy, a place.
    pub kinds: BTreeMap<Kind, f64>,
    /// Answers asked for.
    pub answers: usize,
    pub shortcuts: Shortcuts,
}

impl RecallReport {
    /// Accuracies, each with the words that tell it in a table.
    pub fn rows(&self) -> Vec<(&'static str, f64)> {
        let named = |(kind, share): (&Kind, &f64)| {
            let name = match kind {
                Kind::Name => "- of names",
                Kind::Colour => "- of colours",
                Kind::Toy => "- of toys",
                Kind::Place => "- of places",
            };
            (name, *share)
        };
        let whole = ("recall accuracy", self.accuracy);
        [whole]
            .into_iter()
            .chain(self.kinds.iter().map(named))
            .collect()
    }
}

/// Share of right answers that ways of answering get that never look whose thing it is. A recall that is not above
/// them does not show that a name was bound to anything.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Shortcuts {
    /// The word of the answer's kind that was mentioned last.
    pub last: f64,
    /// Any of the words of the answer's kind that were mentioned, all as likely.
    pub any: f64,
    /// After a colour what followed that colour before, otherwise as `any`.
    pub follower: f64,
}

impl Shortcuts {
    /// Each with the words that tell it in a table.
    pub fn rows(&self) -> [(&'static str, f64); 3] {
        [
            ("shortcut: the last word of its kind", self.last),
            ("shortcut: any mentioned word of its kind", self.any),
            (
                "shortcut: what followed the colour, else any",
                self.follower,
            ),
        ]
    }
}

/// Reads every story once and looks at each of its answers.
///
/// # Errors
/// A tokenizer that cannot say the stories, or [`crate::Error::Interrupted`].
pub fn recall(
    lm: &Lm,
    tokenizer: &Tokenizer,
    stories: &[Story],
    watch: &dyn Watch,
) -> Result<RecallReport> {
    let mut kinds: BTreeMap<Kind, (usize, usize)> = BTreeMap::new();
    let (mut right, mut answers) = (0, 0);
    watch.start("recall", stories.len());
    for (done, story) in stories.iter().enumerate() {
        let (ids, asked) = story.encode(tokenizer)?;
        let input = Tensor::from_slice(&ids, (1, ids.len()), lm.device())?;
        let logits = lm.forward(&input, None)?.squeeze(0)?;
        let likeliest = logits
            .argmax(D::Minus1)?
            .to_dtype(DType::U32)?
            .to_vec1::<u32>()?;
        for (at, (start, end)) in asked.iter().zip(&story.recall) {
            let hit = usize::from(likeliest[at - 1] == ids[*at]);
            (right, answers) = (right + hit, answers + 1);
            if let Some(kind) = Kind::of(story.text[*start..*end].trim_start()) {
                let (right, answers) = kinds.entry(kind).or_default();
                (*right, *answers) = (*right + hit, *answers + 1);
            }
        }
        watch.reached(done + 1, stories.len(), "stories")?;
    }
    let share = |right: usize, answers: usize| right as f64 / (answers as f64).max(1.0);
    Ok(RecallReport {
        accuracy: share(right, answers),
        kinds: kinds
            .into_iter()
            .map(|(k, (r, n))| (k, share(r, n)))
            .collect(),
        answers,
        shortcuts: shortcuts(stories),
    })
}

/// The expected accuracy of each shortcut on these stories.
pub fn shortcuts(stories: &[Story]) -> Shortcuts {
    let mut sums = Shortcuts {
        last: 0.0,
        any: 0.0,
        follower: 0.0,
    };
    let mut answers: f64 = 0.0;
    for story in stories {
        for (start, end) in &story.recall {
            let answer = story.text[*start..*end].trim_start();
            let before = story.text[..*start].split(|c: char| !c.is_alphabetic());
            let before: Vec<&str> = before.filter(|word| !word.is_empty()).collect();
            let kind = Kind::of(answer);
            let mut mentioned = before.iter().filter(|word| Kind::of(word) == kind);
            let different: BTreeSet<&&str> = mentioned.clone().collect();
            let hit = |right: bool| f64::from(u8::from(right));
            let any = hit(different.contains(&answer)) / (different.len() as f64).max(1.0);
            sums.any += any;
            sums.last += hit(mentioned.next_back() == Some(&answer));
            let colour = before.last().filter(|w| Kind::of(w) == Some(Kind::Colour));
            let mut pairs = before.windows(2).rev();
            let followed = colour.and_then(|colour| pairs.find(|pair| pair[0] == *colour));
            sums.follower += followed.map_or(any, |pair| hit(pair[1] == answer));
            answers += 1.0;
        }
    }
    let share = |sum: f64| sum / answers.max(1.0);
    Shortcuts {
        last: share(sums.last),
        any: share(sums.any),
        follower: share(sums.follower),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn story(text: &str) -> Story {
        // `[word]` is an answer.
        let (mut plain, mut recall) = (String::new(), Vec::new());
        for piece in text.split_inclusive(['[', ']']) {
            match piece.strip_suffix(']') {
                Some(answer) => {
                    recall.push((plain.len() - 1, plain.len() + answer.len()));
                    plain += answer;
                }
                None => plain += piece.trim_end_matches('['),
            }
        }
        Story {
            text: plain,
            recall,
        }
    }

    /// By hand: the colour is one of two and not the last; the toy is one of two, not the last, and followed red
    /// before; there is one place. The second story's last toy is the answer; green has not been told before.
    #[test]
    fn shortcuts_by_hand() {
        let first = story(
            "Tom met Mia at the park. Tom had a red ball. Mia had a blue kite. Tom loved the [red] [ball]. \
             They liked the [park].",
        );
        assert_eq!(&first.text[first.recall[1].0..first.recall[1].1], " ball");
        let found = shortcuts(std::slice::from_ref(&first));
        assert_eq!(found.last, 1.0 / 3.0);
        assert_eq!(found.any, (0.5 + 0.5 + 1.0) / 3.0);
        assert_eq!(found.follower, (0.5 + 1.0 + 1.0) / 3.0);
        let second = story("Tom had a red ball. Mia had a kite. Mia took the green [kite].");
        let found = shortcuts(&[first, second]);
        assert_eq!(found.last, (1.0 + 1.0) / 4.0);
        assert_eq!(found.any, (2.0 + 0.5) / 4.0);
        assert_eq!(found.follower, (2.5 + 0.5) / 4.0);
    }

    /// All kinds that the generator asks for are counted, and the whole is their mean by size.
    #[test]
    fn kinds_make_the_whole() {
        let folder = std::path::Path::new("assets/teacher");
        let lm = crate::checkpoint::Checkpoint::open(folder).unwrap();
        let lm = lm.model(&crate::weights::Place::cpu()).unwrap();
        let tokenizer = Tokenizer::open(folder).unwrap();
        let stories: Vec<Story> = crate::data::stories::StoryGenerator::new(3)
            .take(20)
            .collect();
        let found = recall(&lm, &tokenizer, &stories, &crate::watch::Quiet::default()).unwrap();
        let kinds: Vec<Kind> = found.kinds.keys().copied().collect();
        assert_eq!(kinds, [Kind::Colour, Kind::Toy, Kind::Place]);
        let count = |kind: Kind| {
            let texts = stories
                .iter()
                .flat_map(|s| s.recall.iter().map(|(a, b)| &s.text[*a..*b]));
            texts
                .filter(|t| Kind::of(t.trim_start()) == Some(kind))
                .count() as f64
        };
        let whole: f64 = found
            .kinds
            .iter()
            .map(|(kind, share)| share * count(*kind))
            .sum();
        assert!(
            (whole / found.answers as f64 - found.accuracy).abs() < 1e-12,
            "{found:?}"
        );
        let rows = found.rows();
        assert_eq!(rows[0], ("recall accuracy", found.accuracy));
        assert_eq!(rows[3], ("- of places", found.kinds[&Kind::Place]));
    }

    /// On the generator's stories, in which every place is the only one and every colour has one toy.
    #[test]
    fn the_generators_stories_allow_shortcuts() {
        let stories: Vec<Story> = crate::data::stories::StoryGenerator::new(3)
            .take(400)
            .collect();
        let found = shortcuts(&stories);
        assert!((found.any - 0.556).abs() < 0.01, "{found:?}");
        assert!(
            found.last < found.any && found.any < found.follower,
            "{found:?}"
        );
    }
}
