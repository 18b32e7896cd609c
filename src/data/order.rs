//! The order in which examples are learned from.

use std::sync::{Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// Permutes examples; every stream of a seed has its own way.
pub(super) fn permute(examples: &mut [u32], seed: u64, stream: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    examples.shuffle(&mut random);
}

/// # Errors
/// More examples than an order can name.
pub(super) fn check_count(examples: usize) -> Result<()> {
    match u32::try_from(examples) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::invalid(format!(
            "the data has {examples} examples, and at most 2^32 are ordered: raise --seq-len"
        ))),
    }
}

/// The order of an epoch's examples, of which the last few that fill no batch are left out. The last epoch's is kept.
#[derive(Debug, Default)]
pub(super) struct Shuffle(Mutex<Option<Epoch>>);

#[derive(Debug)]
struct Epoch {
    /// Tokens an example, examples, seed, number.
    of: (usize, usize, u64, u64),
    order: Vec<u32>,
}

impl Shuffle {
    /// The examples of batch `index`; `all` gives the `count` examples of an epoch, which are of `len` tokens.
    pub fn batch(
        &self,
        (rows, len): (usize, usize),
        count: usize,
        seed: u64,
        index: u64,
        all: impl FnOnce(u64) -> Vec<u32>,
    ) -> Vec<usize> {
        let per_epoch = (count / rows) as u64;
        let epoch = index / per_epoch;
        let of = (len, count, seed, epoch);
        // A thread that panicked with it has left a whole epoch, or none.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.as_ref().is_none_or(|kept| kept.of != of) {
            let mut order = all(epoch);
            permute(&mut order, seed, epoch);
            *kept = Some(Epoch { of, order });
        }
        let order = kept.as_ref().map_or(&[][..], |kept| &kept.order);
        let at = (index % per_epoch) as usize * rows;
        order[at..at + rows].iter().map(|i| *i as usize).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order of batches is part of what kept results are of: as `rand` shuffles all numbers at once.
    #[test]
    fn orders_are_those_of_one_permutation_an_epoch() {
        let shuffle = Shuffle::default();
        let batch = |seed, index, rows, count: u32| {
            shuffle.batch((rows, 1), count as usize, seed, index, |_| {
                (0..count).collect()
            })
        };
        for (seed, epoch) in [(9, 0), (9, 1), (2, 1), (9, 0)] {
            let mut order: Vec<usize> = (0..50).collect();
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(epoch);
            order.shuffle(&mut random);
            for index in 0..7 {
                let at = index as usize * 7;
                assert_eq!(batch(seed, epoch * 7 + index, 7, 50), order[at..at + 7]);
            }
        }
        assert_eq!(batch(0, 0, 5, 5), [2, 0, 4, 1, 3]);
    }
}
