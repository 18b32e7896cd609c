//! Mixer and rank of every layer under a budget: the choice of least damage that fits, found exactly.

use std::collections::BTreeMap;

use crate::mixer::{Cost, LayerKind};

/// What a layer could become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    pub kind: LayerKind,
    pub cost: Cost,
    /// KL that the model loses when only this layer becomes so; damages are taken to add up.
    pub damage: f64,
}

/// One choice a layer, with at most `cached` scalars of KV cache and `state` scalars of recurrent state over all
/// layers, or none if nothing fits. Ties go to what a layer lists first.
pub fn fit_budget(
    layers: &[Vec<Choice>],
    cached: Option<usize>,
    state: Option<usize>,
) -> Option<Vec<Choice>> {
    let (cached_limit, state_limit) = (cached.unwrap_or(usize::MAX), state.unwrap_or(usize::MAX));
    // Of each total cost: the least damage, and how it is reached.
    let mut reached: BTreeMap<(usize, usize), (f64, Vec<Choice>)> = BTreeMap::new();
    reached.insert((0, 0), (0.0, Vec::new()));
    for choices in layers {
        let mut next: BTreeMap<(usize, usize), (f64, Vec<Choice>)> = BTreeMap::new();
        for ((cached, state), (damage, before)) in &reached {
            for choice in choices {
                let total = (cached + choice.cost.cached, state + choice.cost.state);
                let damage = damage + choice.damage;
                let known = next.get(&total).map_or(f64::INFINITY, |(d, _)| *d);
                if total.0 <= cached_limit && total.1 <= state_limit && damage < known {
                    next.insert(total, (damage, [before.as_slice(), &[*choice]].concat()));
                }
            }
        }
        reached = next;
    }
    let best = reached.into_values().min_by(|a, b| a.0.total_cmp(&b.0));
    best.map(|(_, choices)| choices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn choices(random: &mut rand_chacha::ChaCha8Rng) -> Vec<Choice> {
        let cost = |cached, state| Cost {
            cached,
            state,
            ..Cost::default()
        };
        let mut damage = || random.random_range(0.0..1.0);
        vec![
            Choice {
                kind: LayerKind::Mamba2,
                cost: cost(0, 100),
                damage: 1.0 + damage(),
            },
            Choice {
                kind: LayerKind::MLA,
                cost: cost(12, 0),
                damage: 0.5 + damage(),
            },
            Choice {
                kind: LayerKind::MLA,
                cost: cost(20, 0),
                damage: damage(),
            },
        ]
    }

    #[test]
    fn the_choice_is_the_best_of_all() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        for round in 0..30 {
            let layers: Vec<_> = (0..5).map(|_| choices(&mut random)).collect();
            let (kv, state) = (20 + 4 * (round % 15), 200 + 100 * (round % 4));
            let (mut best, mut fits) = (f64::INFINITY, false);
            for code in 0..243usize {
                let picked = (0..5).map(|i| layers[i][code / 3usize.pow(i as u32) % 3]);
                let picked: Vec<Choice> = picked.collect();
                let total = picked.iter().fold(Cost::default(), |a, c| a + c.cost);
                if total.cached <= kv && total.state <= state {
                    fits = true;
                    best = best.min(picked.iter().map(|c| c.damage).sum());
                }
            }
            let found = fit_budget(&layers, Some(kv), Some(state));
            match found {
                Some(found) => {
                    let damage: f64 = found.iter().map(|c| c.damage).sum();
                    assert!((damage - best).abs() < 1e-12, "{damage} for {best}");
                }
                None => assert!(!fits),
            }
        }
    }
}
