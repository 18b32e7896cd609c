//! Several data sets as one: what each gives to an epoch.
//!
//! Without weights an epoch has all windows. With them the data set that is scarcest for its weight gives all of its windows and the
//! others their share; what they did not give comes in the epochs after, so that no window of a data set comes again before all of it
//! were seen.

use std::path::{Path, PathBuf};

use super::order::permute;
use crate::{Error, Result};

/// A file of texts, and its part in a mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct DataSet {
    /// As people call it.
    pub name: String,
    pub path: PathBuf,
    /// What its windows are to the others'.
    pub weight: Option<f64>,
    /// Tokens of its beginning that are used [default: all].
    pub tokens: Option<usize>,
}

impl DataSet {
    /// All of a file.
    pub fn of(path: &Path) -> Self {
        Self {
            name: path.display().to_string(),
            path: path.to_owned(),
            weight: None,
            tokens: None,
        }
    }
}

/// # Errors
/// Names the data set whose weight or number of tokens is none, or that has no weight where others have.
pub(super) fn check(sets: &[DataSet]) -> Result<()> {
    let weighted = sets.iter().any(|set| set.weight.is_some());
    for DataSet {
        name,
        weight,
        tokens,
        ..
    } in sets
    {
        if *tokens == Some(0) {
            return Err(Error::invalid(format!("data {name}: tokens must not be 0")));
        }
        match weight {
            Some(weight) if !(weight.is_finite() && *weight > 0.0) => {
                return Err(Error::invalid(format!(
                    "data {name}: weight {weight} must be above 0"
                )));
            }
            None if weighted => {
                return Err(Error::invalid(format!(
                    "data {name} has no weight: give one to every data set (NAME#weight=W), or to none"
                )));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Windows of data sets, numbered one set after the other, and how many of each an epoch takes.
pub(super) struct Shares {
    /// The first window of each.
    firsts: Vec<usize>,
    pub windows: Vec<usize>,
    pub taken: Vec<usize>,
}

impl Shares {
    /// Of data sets with so many windows and such weights: all have one, or none.
    pub fn new(sets: impl Iterator<Item = (usize, Option<f64>)>) -> Self {
        let sets: Vec<(usize, Option<f64>)> = sets.collect();
        let scarce = |(windows, weight): &(usize, Option<f64>)| Some(*windows as f64 / (*weight)?);
        let each = sets.iter().filter_map(scarce).min_by(f64::total_cmp);
        let taken = sets.iter().map(|(windows, weight)| match (weight, each) {
            (Some(weight), Some(each)) => ((each * weight).round() as usize).min(*windows),
            _ => *windows,
        });
        let first = |next: &mut usize, windows: usize| {
            let first = *next;
            *next += windows;
            Some(first)
        };
        let windows: Vec<usize> = sets.iter().map(|(windows, _)| *windows).collect();
        Self {
            taken: taken.collect(),
            firsts: windows.iter().copied().scan(0, first).collect(),
            windows,
        }
    }

    /// Windows of an epoch.
    pub fn len(&self) -> usize {
        self.taken.iter().sum()
    }

    /// The data set of a window, and its number there.
    pub fn place(&self, window: usize) -> (usize, usize) {
        let set = self.firsts.partition_point(|first| *first <= window) - 1;
        (set, window - self.firsts[set])
    }

    /// The windows of an epoch, set by set.
    pub fn epoch(&self, seed: u64, epoch: u64) -> Vec<u32> {
        let mut all = Vec::with_capacity(self.len());
        for (set, (&windows, &taken)) in self.windows.iter().zip(&self.taken).enumerate() {
            let first = self.firsts[set];
            let from = all.len();
            if taken == windows {
                all.extend((first..first + windows).map(|window| window as u32));
                continue;
            }
            // The next of an endless row of permutations, each from a stream that no epoch has.
            let (mut at, end) = (epoch * taken as u64, (epoch + 1) * taken as u64);
            while at < end {
                let turn = at / windows as u64;
                let mut order: Vec<u32> = (first..first + windows).map(|w| w as u32).collect();
                permute(&mut order, seed, (set as u64 + 1) << 40 | turn);
                let begin = turn * windows as u64;
                let stop = end.min(begin + windows as u64);
                all.extend(&order[(at - begin) as usize..(stop - begin) as usize]);
                at = stop;
            }
            all[from..].sort_unstable();
        }
        all
    }

    /// The first windows of each set, in its order, spread evenly.
    pub fn spread(&self) -> Vec<u32> {
        let mut given = vec![0; self.taken.len()];
        // The middle of a set's next window on its way through the epoch.
        let next =
            |given: &[usize], set: usize| (2 * given[set] + 1) as f64 / self.taken[set] as f64;
        let spread = (0..self.len()).map(|_| {
            let open = (0..given.len()).filter(|set| given[*set] < self.taken[*set]);
            let ahead = |a: &usize, b: &usize| next(&given, *a).total_cmp(&next(&given, *b));
            let set = open.min_by(ahead).expect("as many as are taken");
            given[set] += 1;
            (self.firsts[set] + given[set] - 1) as u32
        });
        spread.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn shares(sets: &[(usize, f64)]) -> Shares {
        Shares::new(
            sets.iter()
                .map(|(windows, weight)| (*windows, Some(*weight))),
        )
    }

    #[test]
    fn weights_are_kept_within_a_window() {
        for (sets, taken) in [
            (&[(100, 0.7), (100, 0.3)][..], &[100, 43][..]),
            (&[(1000, 1.0), (10, 1.0)], &[10, 10]),
            (&[(50, 3.0), (50, 2.0), (7, 1.0)], &[21, 14, 7]),
            (&[(9, 0.1)], &[9]),
            (&[(100, 1e-9), (3, 1.0)], &[0, 3]),
        ] {
            assert_eq!(shares(sets).taken, taken);
        }
        let plain = Shares::new([(5, None), (0, None), (2, None)].into_iter());
        assert_eq!(plain.taken, [5, 0, 2]);
        let places = (0..7).map(|window| plain.place(window));
        let expected = (0..5).map(|w| (0, w)).chain((0..2).map(|w| (2, w)));
        assert!(places.eq(expected));
        assert_eq!(plain.epoch(3, 4), (0..7).collect::<Vec<u32>>());
    }

    /// Through seven epochs: after k windows of a set each was seen k / n times, or once more.
    #[test]
    fn no_window_comes_again_before_all_were_seen() {
        let shares = shares(&[(20, 1.0), (9, 0.8), (33, 1.0)]);
        assert_eq!(shares.taken, [11, 9, 11]);
        let mut seen = BTreeMap::new();
        for epoch in 0..7 {
            let windows = shares.epoch(5, epoch);
            assert_eq!(windows, shares.epoch(5, epoch));
            assert_eq!(windows.len(), shares.len());
            for window in windows {
                *seen.entry(window as usize).or_insert(0) += 1;
            }
            for (set, (first, windows)) in shares.firsts.iter().zip(&shares.windows).enumerate() {
                let times = |w: usize| seen.get(&w).copied().unwrap_or(0);
                let all: Vec<usize> = (*first..first + windows).map(times).collect();
                let whole = (epoch as usize + 1) * shares.taken[set] / windows;
                assert!(
                    all.iter().all(|n| *n == whole || *n == whole + 1),
                    "{all:?}"
                );
            }
        }
        assert_ne!(shares.epoch(5, 0), shares.epoch(6, 0));
    }

    #[test]
    fn sets_are_spread_evenly() {
        let shares = shares(&[(8, 1.0), (2, 0.25)]);
        assert_eq!(shares.spread(), [0, 1, 8, 2, 3, 4, 5, 9, 6, 7]);
    }

    #[test]
    fn weights_that_cannot_be_meant_are_named() {
        let set = |name: &str, weight, tokens| DataSet {
            weight,
            tokens,
            ..DataSet::of(Path::new(name))
        };
        let said = |sets: &[DataSet]| check(sets).unwrap_err().to_string();
        let half = set("a", Some(0.5), None);
        assert!(said(&[half.clone(), set("b", Some(-1.0), None)]).contains("data b: weight -1"));
        assert!(said(&[half.clone(), set("b", None, None)]).contains("data b has no weight"));
        assert!(said(&[set("c", None, Some(0))]).contains("data c: tokens"));
        check(&[half, set("b", Some(7.0), Some(9))]).unwrap();
    }
}
