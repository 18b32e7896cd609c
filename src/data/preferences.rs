//! Preference pairs, tokenised.

use std::path::Path;

use super::Tokenizer;
use super::batch::{Batch, Batches};
use super::order::{Shuffle, check_count};
use super::pair::Lengths;
use super::text::Document;
use super::tokenize::{Form, Reading, tokens};
use super::tokens::Tokens;
use crate::op::Documents;
use crate::watch::Quiet;
use crate::{Error, Result};

/// Tokenised pairs.
#[derive(Debug)]
pub struct Preferences {
    /// Chosen, rejected, chosen, rejected, ..: of each the answer is learned, and not the prompt.
    answers: Tokens,
    shuffle: Shuffle,
}

impl Preferences {
    /// Each answer ends with the tokenizer's first end token, if it has one and no template has written the end. Of a prompt the last
    /// `max_prompt` tokens are kept (TRL's `max_prompt_length`); a pair that is still longer than `max_length`
    /// tokens loses more of its prompt's beginning, then the end of its answer. Of `reading` the tokenizer counts, and where tokens of large
    /// files are kept.
    ///
    /// # Errors
    /// Names the line that cannot be used: other fields, an empty answer, twice the same answer. A length without room;
    /// [`Error::Interrupted`].
    pub fn open(path: &Path, lengths: Lengths, reading: &Reading) -> Result<Self> {
        if lengths.max_length < 2 {
            return Err(Error::invalid(format!(
                "max_length {} has no room for a prompt and an answer",
                lengths.max_length
            )));
        }
        let reading = Reading {
            form: Form::Pair(lengths),
            cache: reading.cache,
            ..Reading::plain(reading.tokenizer, reading.watch)
        };
        let (answers, _) = tokens(path, None, &reading)?;
        Ok(Self {
            answers,
            shuffle: Shuffle::default(),
        })
    }

    /// Reads a file of pairs into memory.
    ///
    /// # Errors
    /// As [`Preferences::open`].
    pub fn load(path: &Path, tokenizer: &Tokenizer, lengths: Lengths) -> Result<Self> {
        Self::open(path, lengths, &Reading::plain(tokenizer, &Quiet::default()))
    }

    /// Pairs.
    pub fn len(&self) -> usize {
        self.answers.documents() / 2
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows chosen, rejected, chosen, rejected, .. of the given pairs, filled up at their ends to one length
    /// with a token that nothing learns and, since all mixers are causal, nothing sees.
    pub fn rows(&self, pairs: &[usize]) -> Batch {
        let answers = pairs.iter().flat_map(|pair| [2 * pair, 2 * pair + 1]);
        let answers: Vec<Document> = answers.map(|at| self.answers.document(at)).collect();
        self.answers.release();
        let len = answers.iter().map(Vec::len).max().unwrap_or(1);
        let mut batch = Batch {
            input_ids: vec![0; answers.len() * len],
            targets: vec![0; answers.len() * len],
            mask: vec![0.0; answers.len() * len],
            documents: Documents::new(vec![0; answers.len() * len], len),
            examples: pairs.iter().flat_map(|i| [*i, *i]).collect(),
            rows: answers.len(),
            len,
        };
        for (row, answer) in answers.iter().enumerate() {
            for (at, (id, learned)) in answer.iter().enumerate() {
                batch.input_ids[row * len + at] = *id;
                if at > 0 {
                    batch.targets[row * len + at - 1] = *id;
                    batch.mask[row * len + at - 1] = f32::from(u8::from(*learned));
                }
            }
        }
        batch
    }
}

impl Batches for Preferences {
    fn check(&self, rows: usize, _len: usize) -> Result<()> {
        match self.len() < rows.max(1) {
            true => Err(Error::invalid(format!(
                "the data has {} pairs, a batch needs {rows}: give more data, or lower --batch-size",
                self.len()
            ))),
            false => check_count(self.len()),
        }
    }

    fn examples(&self, _len: usize) -> usize {
        self.len()
    }

    fn hash(&self) -> String {
        self.answers.hash().to_string()
    }

    /// `rows` pairs, twice as many rows.
    fn batch(&self, seed: u64, index: u64, rows: usize, len: usize) -> Result<Batch> {
        self.check(rows, len)?;
        let pairs = self.len();
        let all = |_| (0..pairs as u32).collect();
        let order = self.shuffle.batch((rows, len), pairs, seed, index, all);
        Ok(self.rows(&order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::stories;

    fn lengths(max_prompt: usize, max_length: usize) -> Lengths {
        Lengths {
            max_prompt,
            max_length,
        }
    }

    fn load(lines: &str, max_length: usize) -> Result<(Preferences, Tokenizer)> {
        load_with(lines, (max_length, max_length))
    }

    fn load_with(
        lines: &str,
        (prompt, length): (usize, usize),
    ) -> Result<(Preferences, Tokenizer)> {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let path = folder.path().join("pairs.jsonl");
        std::fs::write(&path, lines).unwrap();
        let pairs = Preferences::load(&path, &tokenizer, lengths(prompt, length))?;
        Ok((pairs, tokenizer))
    }

    const PAIR: &str = r#"{"prompt": "Tom had a red ball. Tom loved the", "chosen": " red ball.", "rejected": " blue ball. He"}"#;

    #[test]
    fn answers_are_learned_and_prompts_are_not() {
        let (pairs, tokenizer) = load(PAIR, 100).unwrap();
        let batch = pairs.rows(&[0]);
        assert_eq!((batch.rows, batch.examples.as_slice()), (2, &[0, 0][..]));
        for (row, answer) in [" red ball.", " blue ball. He"].iter().enumerate() {
            let learned: Vec<u32> = (row * batch.len..(row + 1) * batch.len)
                .filter(|at| batch.mask[*at] == 1.0)
                .map(|at| batch.targets[at])
                .collect();
            let mut expected = tokenizer.encode_plain(answer).unwrap();
            expected.extend(tokenizer.eos().first());
            assert_eq!(learned, expected);
        }
    }

    #[test]
    fn pairs_of_messages_are_written_by_the_template() {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let template = "{% for m in messages %}{{ m.content }} {% endfor %}";
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let path = folder.path().join("pairs.jsonl");
        let said = |role: &str, text: &str| format!(r#"{{"role":"{role}","content":"{text}"}}"#);
        let (user, good, bad) = (
            said("user", "Tom had a"),
            said("assistant", "ball."),
            said("assistant", "kite."),
        );
        let apart = format!(r#"{{"prompt":[{user}],"chosen":[{good}],"rejected":[{bad}]}}"#);
        let whole = format!(r#"{{"chosen":[{user},{good}],"rejected":[{user},{bad}]}}"#);
        std::fs::write(&path, [apart, whole].join("\n")).unwrap();
        let pairs = Preferences::load(&path, &tokenizer, lengths(100, 100)).unwrap();
        for pair in 0..2 {
            let batch = pairs.rows(&[pair]);
            let words = ["ball. ", "kite. "].map(|text| tokenizer.encode_plain(text).unwrap());
            for (row, words) in words.iter().enumerate() {
                let places = row * batch.len..(row + 1) * batch.len;
                let learned = places.filter(|at| batch.mask[*at] == 1.0);
                let learned: Vec<u32> = learned.map(|at| batch.targets[at]).collect();
                let text = tokenizer.decode(&learned).unwrap();
                assert_eq!(text.trim(), tokenizer.decode(words).unwrap().trim());
            }
        }
        let same = r#"{"chosen":[{"role":"user","content":"a"}],"rejected":[{"role":"user","content":"a"}]}"#;
        std::fs::write(&path, same).unwrap();
        let said = Preferences::load(&path, &tokenizer, lengths(100, 100)).unwrap_err();
        assert!(said.to_string().contains("line 1"), "{said}");
    }

    #[test]
    fn long_prompts_lose_their_beginning() {
        let (whole, _) = load(PAIR, 100).unwrap();
        let (short, _) = load(PAIR, 8).unwrap();
        let count = |b: &Batch| b.mask.iter().sum::<f32>();
        let (whole, short) = (whole.rows(&[0]), short.rows(&[0]));
        assert_eq!(short.len, 8);
        assert_eq!(count(&whole), count(&short));
    }

    /// Whatever room there is for them.
    #[test]
    fn of_a_prompt_the_last_tokens_are_kept() {
        let (whole, tokenizer) = load(PAIR, 100).unwrap();
        let (short, _) = load_with(PAIR, (3, 100)).unwrap();
        let prompt = tokenizer
            .encode("Tom had a red ball. Tom loved the")
            .unwrap();
        for at in [0, 1] {
            let [whole, short] = [&whole, &short].map(|pairs| pairs.answers.document(at));
            let led = |answer: &Document| answer.iter().take_while(|(_, learned)| !learned).count();
            assert_eq!((led(&whole), led(&short)), (prompt.len(), 3));
            assert_eq!(short, whole[prompt.len() - 3..]);
        }
        // A shorter prompt stays whole.
        let (same, _) = load_with(PAIR, (prompt.len(), 100)).unwrap();
        assert_eq!(same.hash(), whole.hash());
    }

    /// A large file's pairs stand in shards, which end between pairs; the second time they are found there.
    #[test]
    fn pairs_of_a_large_file_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let path = folder.path().join("pairs.jsonl");
        let lines = stories::preferences_to_jsonl(2, 40);
        let lines = lines.repeat((5 << 20) / lines.len());
        std::fs::write(&path, &lines).unwrap();
        let cache = folder.path().join("cache");
        let quiet = Quiet::default();
        let reading = Reading {
            cache: Some(&cache),
            // Of texts, not of pairs.
            eos: super::super::Eos::Never,
            ..Reading::plain(&tokenizer, &quiet)
        };
        let open = |lengths| Preferences::open(&path, lengths, &reading).unwrap();
        let in_memory = Preferences::load(&path, &tokenizer, lengths(64, 64)).unwrap();
        assert_eq!(in_memory.len(), lines.lines().count());
        let last = in_memory.len() - 1;
        for time in 0..2 {
            let kept = open(lengths(64, 64));
            assert_eq!(kept.hash(), in_memory.hash(), "{time}");
            let rows = [&kept, &in_memory].map(|pairs| pairs.rows(&[0, 17, last]).input_ids);
            assert_eq!(rows[0], rows[1]);
            assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
        }
        assert_ne!(open(lengths(8, 64)).hash(), in_memory.hash());
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
    }

    #[test]
    fn bad_lines_are_named() {
        for (line, word) in [
            (r#"{"prompt": "a", "chosen": "b"}"#, "rejected"),
            (
                r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#,
                "chosen answer is",
            ),
            (
                r#"{"prompt": "a", "chosen": "", "rejected": "b"}"#,
                "empty answer",
            ),
        ] {
            let message = load(line, 10).unwrap_err().to_string();
            assert!(
                message.contains("line 1:") && message.contains(word),
                "{message}"
            );
        }
    }
}
