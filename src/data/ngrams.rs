//! Decontamination: texts that share a run of words with an evaluation set are not learned from (GPT-3, arXiv 2005.14165, appendix C:
//! runs of 13 words).

use std::collections::{HashSet, VecDeque};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::hash::Hash;
use crate::{Error, Result};

/// Runs of `n` words of evaluation sets. A word is of letters and digits, whatever their case; what stands between words is nothing.
#[derive(Debug, Clone)]
pub struct Ngrams {
    n: usize,
    runs: HashSet<u64>,
    /// The factor with which a run's first word leaves its sum.
    last: u64,
    /// Tasks and files that they are of, and the folder of the tasks.
    of: (Vec<String>, Option<String>),
}

/// What texts were held against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decontamination {
    /// Tasks and files.
    pub against: Vec<String>,
    /// Folder of the tasks' datasets.
    pub data_dir: Option<String>,
    /// Words of a run.
    pub ngram: usize,
    /// Of all runs.
    pub hash: String,
}

/// Odd, so that no word loses its bits.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

impl Ngrams {
    /// Runs of what `against` names, of which none is added yet.
    ///
    /// # Errors
    /// Runs of no word.
    pub fn new(n: usize, against: &[String], data_dir: Option<String>) -> Result<Self> {
        match n {
            0 => Err(Error::invalid("ngram must not be 0")),
            n => Ok(Self {
                n,
                runs: HashSet::new(),
                last: (0..n).fold(1, |power: u64, _| power.wrapping_mul(FACTOR)),
                of: (against.to_vec(), data_dir),
            }),
        }
    }

    /// For a manifest.
    pub(super) fn about(&self) -> Decontamination {
        let (against, data_dir) = self.of.clone();
        Decontamination {
            against,
            data_dir,
            ngram: self.n,
            hash: self.hash().to_string(),
        }
    }

    /// Different runs.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Adds every text inside a record; those of fewer words have no run.
    pub fn add(&mut self, record: &Value) {
        match record {
            Value::String(text) => {
                let runs: Vec<u64> = self.runs_of(text).map(|(run, _)| run).collect();
                self.runs.extend(runs);
            }
            Value::Array(all) => all.iter().for_each(|value| self.add(value)),
            Value::Object(fields) => fields.values().for_each(|value| self.add(value)),
            _ => {}
        }
    }

    /// The first run of a text that is one of these.
    pub fn find<'t>(&self, text: &'t str) -> Option<&'t str> {
        let mut runs = self.runs_of(text);
        let (_, place) = runs.find(|(run, _)| self.runs.contains(run))?;
        Some(&text[place])
    }

    /// Of all runs, in whatever order they came.
    pub fn hash(&self) -> Hash {
        let sum = (self.runs.iter()).fold(0u64, |sum, run| sum.wrapping_add(*run));
        let numbers = [self.n as u64, self.runs.len() as u64, sum];
        numbers
            .iter()
            .fold(Hash::new(), |hash, n| hash.with(&n.to_le_bytes()))
    }

    /// Hashes of a text's runs, and where they stand: a sum in which each word counts by its place, so that the next run's takes one
    /// step.
    fn runs_of(&self, text: &str) -> impl Iterator<Item = (u64, Range<usize>)> {
        let mut run: VecDeque<(u64, usize)> = VecDeque::with_capacity(self.n + 1);
        let mut sum = 0u64;
        words(text).filter_map(move |word| {
            let lower = text[word.clone()].chars().flat_map(char::to_lowercase);
            let hash = lower.fold(Hash::new(), |hash, c| {
                hash.with(&u32::from(c).to_le_bytes())
            });
            run.push_back((hash.bits(), word.start));
            sum = sum.wrapping_mul(FACTOR).wrapping_add(hash.bits());
            if run.len() > self.n
                && let Some((first, _)) = run.pop_front()
            {
                sum = sum.wrapping_sub(first.wrapping_mul(self.last));
            }
            let (_, start) = *run.front()?;
            (run.len() == self.n).then_some((sum, start..word.end))
        })
    }
}

/// Where the words of a text stand.
fn words(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + text[from..].find(char::is_alphanumeric)?;
        let rest = &text[start..];
        let end = rest.find(|c: char| !c.is_alphanumeric());
        from = start + end.unwrap_or(rest.len());
        Some(start..from)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const QUESTION: &str =
        "Which of the following is the best example of a physical change that a person can see?";

    #[test]
    fn a_planted_run_is_found() {
        let mut ngrams = Ngrams::new(13, &[], None).unwrap();
        let choices = json!({ "text": ["ice melts", "paper burns"], "label": ["A", "B"] });
        ngrams.add(&json!({ "question": QUESTION, "choices": choices, "answerKey": "A" }));
        // 17 words have five runs of 13; the choices have none.
        assert_eq!(ngrams.len(), 5);
        let planted = "He asked: which of THE following is the best\n example of a 'physical' change, that a boy saw.";
        let found = ngrams.find(planted).unwrap();
        assert!(
            found.starts_with("which of THE") && found.ends_with("change, that"),
            "{found}"
        );
        for clean in [
            "Which of the following is the best example of a physical thing that a person can see?",
            "the following of which is the best example of a physical change that a",
            "ice melts, paper burns",
            "",
        ] {
            assert_eq!(ngrams.find(clean), None, "{clean}");
        }
    }

    /// Every run of a text is one of its own, and the first is given, wherever words stand.
    #[test]
    fn runs_are_of_their_words_alone() {
        let text = "Ä b, c! 12 d-e  f\tg h i j";
        for n in 1..=10 {
            let mut ngrams = Ngrams::new(n, &[], None).unwrap();
            ngrams.add(&json!(text));
            assert_eq!(ngrams.len(), 12 - n);
            assert!(
                ngrams
                    .find(&format!("x y {text}"))
                    .unwrap()
                    .starts_with('Ä')
            );
            assert_eq!(ngrams.find("x y z"), None);
            let mut again = Ngrams::new(n, &[], None).unwrap();
            again.add(&json!([text.to_lowercase(), { "a": text }]));
            assert_eq!(again.hash(), ngrams.hash());
        }
        assert!(
            Ngrams::new(0, &[], None)
                .unwrap_err()
                .to_string()
                .contains("ngram")
        );
    }
}
