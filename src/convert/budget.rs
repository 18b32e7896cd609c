//! Mixer and rank of every layer under a budget: the choice of least damage that fits, found exactly.

use std::collections::BTreeMap;

use crate::mixer::{Cost, LayerKind};
use crate::{Error, Result};

/// What a layer could become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    pub kind: LayerKind,
    pub cost: Cost,
    /// KL that the model loses when only this layer becomes so; damages are taken to add up.
    pub damage: f64,
}

/// One choice a layer, with at most `kv_per_token` cached scalars a token and `state` scalars a sequence
/// over all layers. Ties go to what a layer lists first.
///
/// # Errors
/// When nothing fits: the least that the choices need.
pub fn fit_budget(
    layers: &[Vec<Choice>],
    kv_per_token: Option<usize>,
    state: Option<usize>,
) -> Result<Vec<Choice>> {
    let (kv_limit, state_limit) = (
        kv_per_token.unwrap_or(usize::MAX),
        state.unwrap_or(usize::MAX),
    );
    // Of each total cost: the least damage, and how it is reached.
    let mut reached: BTreeMap<(usize, usize), (f64, Vec<Choice>)> = BTreeMap::new();
    reached.insert((0, 0), (0.0, Vec::new()));
    for choices in layers {
        let mut next: BTreeMap<(usize, usize), (f64, Vec<Choice>)> = BTreeMap::new();
        for ((kv, state), (damage, before)) in &reached {
            for choice in choices {
                let total = (kv + choice.cost.kv_per_token, state + choice.cost.state);
                let damage = damage + choice.damage;
                let known = next.get(&total).map_or(f64::INFINITY, |(d, _)| *d);
                if total.0 <= kv_limit && total.1 <= state_limit && damage < known {
                    next.insert(total, (damage, [before.as_slice(), &[*choice]].concat()));
                }
            }
        }
        reached = next;
    }
    let best = reached.into_values().min_by(|a, b| a.0.total_cmp(&b.0));
    best.map(|(_, choices)| choices).ok_or_else(|| {
        let least = |of: fn(&Cost) -> usize| -> usize {
            let layer = |choices: &Vec<Choice>| choices.iter().map(|c| of(&c.cost)).min();
            layers.iter().filter_map(layer).sum()
        };
        Error::invalid(format!(
            "no choice of mixers fits {} bytes a token (bf16) and {} bytes of state (f32): alone, the least are {} and {}",
            kv_per_token.map_or("any".into(), |n| (2 * n).to_string()),
            state.map_or("any".into(), |n| (4 * n).to_string()),
            2 * least(|c| c.kv_per_token),
            4 * least(|c| c.state)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn choices(random: &mut rand_chacha::ChaCha8Rng) -> Vec<Choice> {
        let cost = |kv_per_token, state| Cost {
            kv_per_token,
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
                if total.kv_per_token <= kv && total.state <= state {
                    fits = true;
                    best = best.min(picked.iter().map(|c| c.damage).sum());
                }
            }
            let found = fit_budget(&layers, Some(kv), Some(state));
            match found {
                Ok(found) => {
                    let damage: f64 = found.iter().map(|c| c.damage).sum();
                    assert!((damage - best).abs() < 1e-12, "{damage} for {best}");
                }
                Err(error) => {
                    assert!(!fits);
                    assert!(
                        error.to_string().contains("the least are 0 and 0"),
                        "{error}"
                    );
                }
            }
        }
    }
}
