//! Guesses from the text itself: what followed its last tokens where they stood before (prompt lookup decoding).

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// Lengths of what must stand there again, the longest first.
const LENGTHS: [usize; 3] = [4, 3, 2];

/// Where each run of tokens last went on.
#[derive(Clone, Default)]
pub(super) struct Ngrams {
    hasher: RandomState,
    /// From a run's hash to the position behind it.
    places: HashMap<u64, usize>,
    /// Positions that are in the map.
    seen: usize,
}

impl Ngrams {
    /// The tokens, at most so many, that follow where the last ones of `tokens` stood before; a text only ever grows.
    pub fn follow(&mut self, tokens: &[u32], most: usize) -> Vec<u32> {
        for end in self.seen..tokens.len() {
            for n in LENGTHS.into_iter().filter(|n| *n <= end) {
                let run = self.hasher.hash_one(&tokens[end - n..end]);
                self.places.insert(run, end);
            }
        }
        self.seen = tokens.len();
        for n in LENGTHS.into_iter().filter(|n| *n <= tokens.len()) {
            let last = &tokens[tokens.len() - n..];
            let place = self.places.get(&self.hasher.hash_one(last));
            if let Some(&place) = place
                && place >= n
                && tokens[place - n..place] == *last
            {
                // Behind its end the text goes on as it did since then.
                let period = tokens.len() - place;
                return (0..most).map(|i| tokens[place + i % period]).collect();
            }
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_same_tokens_follows_again() {
        let mut ngrams = Ngrams::default();
        let mut text = vec![1, 2, 3, 4, 5, 9, 1, 2];
        assert_eq!(ngrams.follow(&text, 3), [3, 4, 5]);
        text.extend([3, 7]);
        assert!(ngrams.follow(&text, 3).is_empty());
        text.extend([2, 3]);
        assert_eq!(ngrams.follow(&text, 2), [7, 2], "the newest place");
        text = vec![8, 6, 7, 6, 7];
        let mut ngrams = Ngrams::default();
        assert_eq!(ngrams.follow(&text, 5), [6, 7, 6, 7, 6]);
        assert!(ngrams.follow(&text, 0).is_empty());
        assert!(Ngrams::default().follow(&[], 4).is_empty());
    }
}
