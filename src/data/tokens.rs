//! Shards one after the other: the tokens of a text, wherever they stand.

use std::sync::OnceLock;

use super::shard::{Dropped, Header, Shard};
use super::text::Document;
use crate::hash::Hash;

/// Tokens of documents, with places counted from the first.
#[derive(Debug)]
pub(super) struct Tokens {
    shards: Vec<Shard>,
    /// The first token of each shard.
    firsts: Vec<usize>,
    len: usize,
    /// Documents before each shard, and all of them.
    documents: Vec<usize>,
    hash: OnceLock<Hash>,
}

/// Tokens in a row, each with whether it is to be learned and where its document begins in its window.
#[derive(Default)]
pub(super) struct Windows {
    pub ids: Vec<u32>,
    pub learned: Vec<bool>,
    pub starts: Vec<u32>,
}

impl Tokens {
    /// `hash`: as [`Tokens::hash`] found it before.
    pub fn new(shards: Vec<Shard>, hash: Option<Hash>) -> Self {
        let (mut firsts, mut len) = (Vec::with_capacity(shards.len()), 0);
        let mut documents = vec![0];
        for shard in &shards {
            firsts.push(len);
            len += shard.header.tokens;
            documents.push(documents[documents.len() - 1] + shard.starts().len());
        }
        Self {
            shards,
            firsts,
            len,
            documents,
            hash: hash.map_or_else(OnceLock::new, OnceLock::from),
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Documents, where each begins in the shard that holds it.
    pub fn documents(&self) -> usize {
        self.documents.last().copied().unwrap_or(0)
    }

    /// A document's tokens, and whether each is to be learned. Until [`Tokens::release`] what was looked at is this process's memory.
    ///
    /// # Panics
    /// Where there is no such document.
    pub fn document(&self, number: usize) -> Document {
        let shard = self.documents.partition_point(|before| *before <= number) - 1;
        let (here, number) = (&self.shards[shard], number - self.documents[shard]);
        let start = |number: usize| here.starts().get(number).map(|start| *start as usize);
        let from = start(number).expect("one of its documents");
        let range = from..start(number + 1).unwrap_or(here.header.tokens);
        let mut ids = Vec::with_capacity(range.len());
        here.each(range.clone(), |id| ids.push(id));
        ids.into_iter().zip(here.learned(range)).collect()
    }

    /// What was looked at counts as this process's memory no more.
    pub fn release(&self) {
        self.shards.iter().for_each(Shard::release);
    }

    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    fn headers(&self) -> impl Iterator<Item = &Header> {
        self.shards.iter().map(|shard| &shard.header)
    }

    /// Records that they stand for, those that were dropped among them.
    pub fn records(&self) -> usize {
        self.headers().map(|header| header.records).sum()
    }

    pub fn dropped(&self) -> usize {
        self.headers().map(|header| header.dropped).sum()
    }

    /// Some of the dropped records.
    pub fn examples(&self) -> impl Iterator<Item = &Dropped> {
        self.headers().flat_map(|header| &header.examples)
    }

    /// A fingerprint of tokens, borders and what is learned, whatever they stand in.
    pub fn hash(&self) -> Hash {
        *self.hash.get_or_init(|| self.find_hash())
    }

    fn find_hash(&self) -> Hash {
        let with = |hash: Hash, place: usize| hash.with(&(place as u64).to_le_bytes());
        let starts = self.shards.iter().map(|shard| shard.starts().len()).sum();
        let mut hash = with(with(Hash::new(), self.len), starts);
        for shard in &self.shards {
            shard.each(0..shard.header.tokens, |id| {
                hash = hash.with(&id.to_le_bytes());
            });
            shard.release();
        }
        for (shard, first) in self.shards.iter().zip(&self.firsts) {
            let starts = shard.starts().iter();
            hash = starts.fold(hash, |hash, start| with(hash, first + *start as usize));
            shard.release();
        }
        for (shard, first) in self.shards.iter().zip(&self.firsts) {
            // Learning is on to the end of what turns it off last.
            for off in shard.turns().chunks(2) {
                let end = off.get(1).map_or(shard.header.tokens, |on| *on as usize);
                hash = (off[0] as usize..end).fold(hash, |hash, at| with(hash, first + at));
            }
            shard.release();
        }
        hash
    }

    /// Adds `len` tokens from token `from` on as a window.
    pub fn window(&self, from: usize, len: usize, to: &mut Windows) {
        let row = to.starts.len();
        to.starts.resize(row + len, 0);
        let within = &mut to.starts[row..];
        let mut shard = self.firsts.partition_point(|first| *first <= from) - 1;
        let mut at = from;
        while at < from + len {
            let (here, first) = (&self.shards[shard], self.firsts[shard]);
            let end = (first + here.header.tokens).min(from + len);
            here.each(at - first..end - first, |id| to.ids.push(id));
            to.learned.extend(here.learned(at - first..end - first));
            mark_starts(here.starts(), first, from, within);
            // At once: the system maps up to some MB around what is looked at.
            here.release();
            (at, shard) = (end, shard + 1);
        }
    }
}

/// For each token of a window from token `from` on, where its document begins in that window: what was there if it began before.
/// `starts`: where documents begin, counted from token `first`, in order.
fn mark_starts(starts: &[u64], first: usize, from: usize, within: &mut [u32]) {
    let next = starts.partition_point(|start| first + *start as usize <= from);
    for start in starts[next..]
        .iter()
        .map(|start| first + *start as usize - from)
    {
        if start >= within.len() {
            break;
        }
        within[start..].fill(start as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::super::shard::Draft;
    use super::*;

    /// Five documents on both sides of token 2^32, where 32 bits end.
    #[test]
    fn documents_keep_their_borders_past_four_billion_tokens() {
        let far = 1usize << 32;
        let starts = [0, far - 3, far, far + 2, far + 9];
        for first in [0, far] {
            let starts = starts.map(|start| start as u64);
            let within = |from: usize| {
                let mut within = [0; 6];
                mark_starts(&starts, first, first + from, &mut within);
                within
            };
            assert_eq!(within(far - 4), [0, 1, 1, 1, 4, 4]);
            assert_eq!(within(far), [0, 0, 2, 2, 2, 2]);
            assert_eq!(within(far + 3), [0; 6]);
            assert_eq!(within(far - 10), [0; 6]);
        }
    }

    /// Windows and hash do not depend on where one shard ends and the next begins.
    #[test]
    fn borders_of_shards_are_not_seen() {
        let document = |n: u32| (0..5 + n % 7).map(move |i| (100 * n + i, i % 3 != n % 3));
        let cut = |every: usize| {
            let (mut shards, mut draft) = (Vec::new(), Draft::default());
            for n in 0..40 {
                draft.push(document(n), true);
                if draft.records() == every {
                    shards.push(std::mem::take(&mut draft).shard());
                }
            }
            shards.push(draft.shard());
            Tokens::new(shards, None)
        };
        let windows = |tokens: &Tokens, len: usize| {
            let mut found = Windows::default();
            for window in 0..tokens.len() / len {
                tokens.window(window * len, len, &mut found);
            }
            (found.ids, found.learned, found.starts)
        };
        let whole = cut(usize::MAX);
        for every in [1, 3, 17] {
            let cut = cut(every);
            assert_eq!(cut.hash(), whole.hash());
            assert_eq!(cut.documents(), 40);
            for n in [0, 2, 3, 16, 17, 39] {
                let want: Vec<_> = document(n).collect();
                assert_eq!(cut.document(n as usize), want, "{every} {n}");
            }
            for len in [1, 8, 50] {
                assert_eq!(windows(&cut, len), windows(&whole, len), "{every} {len}");
            }
        }
    }
}
