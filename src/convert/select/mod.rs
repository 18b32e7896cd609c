//! Which layers keep attention's memory (become MLA): from sensitivity scores to a placement.

mod budget;
pub use budget::{Choice, fit_budget};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// Zebra-Llama's: ends kept, near-uniform gaps, the largest total score (arXiv 2505.17272).
    #[default]
    Smart,
    /// Evenly spaced, whatever the scores, each in the middle of its share of the layers.
    Uniform,
    /// The largest scores, wherever they stand.
    Greedy,
}

/// `count` layers of `scores.len()`, in order. Ties go to the earlier layer.
///
/// # Errors
/// No layer or more layers than there are, or a score that is not a number.
pub fn select(selector: Selector, scores: &[f64], count: usize) -> Result<Vec<usize>> {
    let layers = scores.len();
    if count == 0 || count > layers {
        return Err(Error::invalid(format!(
            "{count} MLA layers cannot be chosen from {layers}"
        )));
    }
    if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
        return Err(Error::invalid(format!(
            "the score of layer {i} is {}",
            scores[i]
        )));
    }
    Ok(match selector {
        Selector::Smart => smart(scores, count),
        Selector::Uniform => (0..count)
            .map(|i| (2 * i + 1) * layers / (2 * count))
            .collect(),
        Selector::Greedy => {
            let mut order: Vec<usize> = (0..layers).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
            order.truncate(count);
            order.sort_unstable();
            order
        }
    })
}

/// Terminal preservation: the best layer of the first and of the last `⌊L/N⌋`. Near-uniform gaps:
/// between neighbours, as many Mamba layers as an even spread has, rounded down or up. Of all placements
/// that keep both, the one with the largest sum, found layer by layer.
fn smart(scores: &[f64], count: usize) -> Vec<usize> {
    let layers = scores.len();
    let reach = layers / count;
    let best = |range: std::ops::Range<usize>| {
        range
            .reduce(|a, b| if scores[b] > scores[a] { b } else { a })
            .expect("no range is empty")
    };
    let first = best(0..reach);
    if count == 1 {
        return vec![first];
    }
    let last = best(layers - reach..layers);
    let (low, high) = gaps(first, last, count);
    // Of each layer: the best sum of a placement that ends there, and that placement.
    let mut ends: Vec<Option<(f64, Vec<usize>)>> = vec![None; layers];
    ends[first] = Some((scores[first], vec![first]));
    for _ in 1..count {
        let mut next: Vec<Option<(f64, Vec<usize>)>> = vec![None; layers];
        for (i, end) in ends.iter().enumerate() {
            let Some((sum, placement)) = end else {
                continue;
            };
            for j in (i + low + 1..=i + high + 1).filter(|j| *j <= last) {
                let sum = sum + scores[j];
                if next[j].as_ref().is_none_or(|(best, _)| sum > *best) {
                    next[j] = Some((sum, [placement.as_slice(), &[j]].concat()));
                }
            }
        }
        ends = next;
    }
    let found = ends.swap_remove(last);
    found
        .expect("gaps of both roundings always add up to the distance")
        .1
}

/// The least and the most Mamba layers between neighbours.
fn gaps(first: usize, last: usize, count: usize) -> (usize, usize) {
    let between = (last + 1).saturating_sub(first + count);
    (between / (count - 1), between.div_ceil(count - 1))
}

/// Whether some scores would make SMART choose this placement.
pub fn smart_feasible(layers: usize, placement: &[usize]) -> bool {
    let (Some(first), Some(last)) = (placement.first(), placement.last()) else {
        return false;
    };
    let reach = layers / placement.len();
    let ends = *first < reach && *last >= layers - reach && *last < layers;
    let between = || {
        let (low, high) = gaps(*first, *last, placement.len());
        placement
            .windows(2)
            .all(|w| w[0] < w[1] && (low..=high).contains(&(w[1] - w[0] - 1)))
    };
    ends && (placement.len() == 1 || between())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    /// The placements of AMD's configs and of an independent re-implementation.
    #[test]
    fn published_placements_are_feasible() {
        let every =
            |step: usize, from: usize, to: usize| (from..to).step_by(step).collect::<Vec<_>>();
        let half = [every(2, 0, 26), vec![27, 29, 31, 33, 35]].concat();
        let published = [
            (16, vec![0, 5, 10, 14]),
            (16, vec![0, 2, 5, 8, 11, 14]),
            (28, vec![0, 5, 10, 16, 21, 26]),
            (28, vec![0, 3, 7, 10, 14, 18, 22, 26]),
            (32, vec![0, 4, 8, 12, 16, 20, 25, 30]),
            (16, every(2, 0, 16)),
            (28, every(2, 0, 28)),
            (32, every(2, 0, 32)),
            (28, vec![0, 9, 18, 26]),
            (28, vec![0, 5, 10, 14, 18, 22, 26]),
            (28, vec![0, 3, 6, 9, 12, 15, 19, 23, 26]),
            (36, vec![3, 11, 19, 27, 35]),
            (36, every(4, 3, 36)),
            (36, every(3, 2, 36)),
            (36, half),
        ];
        assert_eq!(published.len(), 15);
        for (layers, placement) in published {
            assert!(
                smart_feasible(layers, &placement),
                "{placement:?} of {layers}"
            );
        }
        for (layers, placement) in [
            (16, vec![0, 1, 2, 3]),
            (16, vec![6, 8, 10, 14]),
            (16, vec![0, 5, 10, 11]),
        ] {
            assert!(
                !smart_feasible(layers, &placement),
                "{placement:?} of {layers}"
            );
        }
    }

    /// The published rule (arXiv 2505.17272) word for word, on every set of layers there is; shares nothing with the code above.
    /// For each count (from 1): the largest total score, and a placement that has it.
    fn brute_force(scores: &[f64]) -> Vec<(f64, Vec<usize>)> {
        let layers = scores.len();
        let mut best = vec![(f64::NEG_INFINITY, Vec::new()); layers + 1];
        // For each count: the best layer of the first and of the last floor(L/N).
        let ends: Vec<(usize, usize)> = (1..=layers)
            .map(|count| {
                let reach = (layers as f64 / count as f64).floor() as usize;
                let (mut first, mut last) = (0, layers - reach);
                for i in 0..reach {
                    if scores[i] > scores[first] {
                        first = i;
                    }
                    if scores[layers - reach + i] > scores[last] {
                        last = layers - reach + i;
                    }
                }
                (first, last)
            })
            .collect();
        for set in 1u32..1 << layers {
            let placement: Vec<usize> = (0..layers).filter(|i| set & (1 << i) != 0).collect();
            let count = placement.len();
            let (first, last) = ends[count - 1];
            if placement[0] != first || count > 1 && placement[count - 1] != last {
                continue;
            }
            // Mamba layers between the ends, spread over the gaps.
            let mamba = last as f64 - first as f64 - count as f64 + 1.0;
            let even = mamba / (count as f64 - 1.0);
            let near = |pair: &[usize]| {
                let gap = (pair[1] - pair[0]) as f64 - 1.0;
                even.floor() <= gap && gap <= even.ceil()
            };
            let sum = placement.iter().map(|i| scores[*i]).sum::<f64>();
            if placement.windows(2).all(near) && sum > best[count].0 {
                best[count] = (sum, placement);
            }
        }
        best.split_off(1)
    }

    /// Every number of MLA layers in every depth up to 20.
    #[test]
    fn smart_equals_brute_force() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for layers in 1..=20 {
            // Sums of quarters are exact, and often equal.
            let coarse = layers % 3 == 0;
            let mut score = || match coarse {
                true => f64::from(random.random_range(-1..5i32)) / 4.0,
                false => random.random_range(-0.1..1.0),
            };
            let scores: Vec<f64> = (0..layers).map(|_| score()).collect();
            for (i, (best, placement)) in brute_force(&scores).into_iter().enumerate() {
                let chosen = select(Selector::Smart, &scores, i + 1).unwrap();
                let sum: f64 = chosen.iter().map(|i| scores[*i]).sum();
                assert_eq!(sum, best, "{chosen:?} for {placement:?} of {scores:?}");
                assert!(
                    coarse || chosen == placement,
                    "{chosen:?} for {placement:?}"
                );
                assert!(smart_feasible(layers, &chosen), "{chosen:?} of {layers}");
            }
        }
    }

    #[test]
    fn others_and_ties_are_determined() {
        let scores = [0.0, 3.0, 1.0, 3.0, 2.0];
        assert_eq!(select(Selector::Greedy, &scores, 2).unwrap(), [1, 3]);
        assert_eq!(select(Selector::Greedy, &scores, 3).unwrap(), [1, 3, 4]);
        assert_eq!(
            select(Selector::Uniform, &[0.0; 16], 4).unwrap(),
            [2, 6, 10, 14]
        );
        assert_eq!(select(Selector::Smart, &[1.0; 6], 2).unwrap(), [0, 3]);
        assert!(
            select(Selector::Smart, &scores, 6)
                .unwrap_err()
                .to_string()
                .contains("6 MLA layers")
        );
        assert!(
            select(Selector::Smart, &[0.0, f64::NAN], 1)
                .unwrap_err()
                .to_string()
                .contains("layer 1")
        );
    }
}
