//! How large the latents are where the teacher's weights decide: by a share of the energy, or by a budget of cache
//! over all layers.

use super::calibrate::Calibration;
use super::plan::{LayerPlan, PlanOptions};
use crate::mixer::mla::rank::{RANK_STEP, RankRule, energy_rank};
use crate::mixer::mla::{Spectrum, published_spectrum, spectrum};
use crate::mixer::{LayerKind, MixerConfig, MixerOptions};
use crate::model::{ModelConfig, Parts};
use crate::{Error, Result};

/// The plan with every rank a number. Spectra are weighted by the calibration's text if there is one,
/// and the weights' own otherwise.
///
/// # Errors
/// A budget that the MLA layers' least latents already exceed; a budget for queries.
pub fn settle_ranks(
    base: &Parts,
    options: &PlanOptions,
    calibration: Option<&Calibration>,
) -> Result<LayerPlan> {
    let teacher = &base.config;
    if !options.needs_weights() {
        return options.settle(teacher);
    }
    let budget = check_ranks(teacher, options)?;
    let rules = &options.sizes;
    let mut kinds = options.kinds(teacher.layers.len())?;
    let sized = any_ranks(teacher, options)?;
    let mut spectra: Vec<(usize, Spectrum)> = Vec::new();
    for (i, layer) in sized.layers.iter().enumerate() {
        let MixerConfig::Mla(config) = layer else {
            continue;
        };
        let attention = base.attention(i)?;
        let found = match calibration {
            Some(calibration) => spectrum(config, &attention, &calibration.layers[i])?,
            None => published_spectrum(&attention)?,
        };
        spectra.push((i, found));
    }
    // No latent is wider than what it is made from.
    let limit = |energies: &[f64]| energies.len().min(teacher.hidden_size);
    let kv: Option<Vec<usize>> = match (rules.kv_lora_rank, budget) {
        (Some(RankRule::Energy(share)), _) => {
            let rank = |(_, s): &(usize, Spectrum)| energy_rank(&s.kv, share).min(limit(&s.kv));
            Some(spectra.iter().map(rank).collect())
        }
        (_, Some(scalars)) => {
            let open: Vec<&Vec<f64>> = spectra.iter().map(|(_, s)| &s.kv).collect();
            Some(distribute(&open, scalars))
        }
        _ => None,
    };
    for (at, (i, spectrum)) in spectra.iter().enumerate() {
        if let LayerKind::Mla(own) = &mut kinds[*i] {
            // What a layer says of itself stays.
            own.kv_lora_rank = own.kv_lora_rank.or_else(|| match rules.kv_lora_rank {
                Some(RankRule::Fixed(rank)) => Some(rank),
                _ => kv.as_ref().map(|ranks| ranks[at]),
            });
            if let Some(RankRule::Energy(share)) = rules.q_lora_rank {
                let rank = energy_rank(&spectrum.q, share).min(limit(&spectrum.q));
                own.q_lora_rank = own.q_lora_rank.or(Some(rank));
            }
        }
    }
    let mut settled = options.with_layers(kinds);
    settled.sizes = settled.sizes.without_open_ranks();
    settled.settle(teacher)
}

/// The sizes that do not depend on ranks: with some that every teacher can give.
fn any_ranks(teacher: &ModelConfig, options: &PlanOptions) -> Result<LayerPlan> {
    let options = PlanOptions {
        sizes: MixerOptions {
            kv_lora_rank: Some(RankRule::Fixed(1)),
            q_lora_rank: Some(RankRule::Fixed(1)),
            ..options.sizes.clone()
        },
        ..options.clone()
    };
    options.settle(teacher)
}

/// What can be said of the ranks before weights are read. Gives a budget's scalars a token for all latents together, the
/// rotary keys taken off.
///
/// # Errors
/// A budget that the MLA layers' least latents already exceed; a budget for queries.
pub fn check_ranks(teacher: &ModelConfig, options: &PlanOptions) -> Result<Option<usize>> {
    if let Some(rule) = options.sizes.q_lora_rank.filter(RankRule::is_budget) {
        return Err(Error::invalid(format!(
            "the queries' rank {rule}: queries are not cached; give a number or energy:SHARE"
        )));
    }
    let scalars = match options.sizes.kv_lora_rank {
        Some(RankRule::Share(share)) => (share * teacher.cost(1).cached as f64) as usize,
        Some(RankRule::Bytes(bytes)) => bytes / 2,
        None | Some(RankRule::Fixed(_) | RankRule::Energy(_)) => return Ok(None),
    };
    let rope = |layer: &MixerConfig| match layer {
        MixerConfig::Mla(c) => Some(c.qk_rope_head_dim),
        _ => None,
    };
    let sized = any_ranks(teacher, options)?;
    let ropes: Vec<usize> = sized.layers.iter().filter_map(rope).collect();
    let (rotary, open) = (ropes.iter().sum::<usize>(), ropes.len());
    let least = rotary + open * RANK_STEP;
    match scalars < least {
        true => Err(Error::invalid(format!(
            "a budget of {scalars} cached scalars a token ({} bytes in bf16) is below the {least} that {open} MLA layers of rank {RANK_STEP} need with their rotary keys",
            2 * scalars,
        ))),
        false => Ok(Some(scalars - rotary)),
    }
}

/// Ranks in steps of 8 that add up to at most `total` and cut off the least energy. Energies fall, so
/// always taking the step that saves most is optimal; ties go to the earlier layer.
fn distribute(spectra: &[&Vec<f64>], total: usize) -> Vec<usize> {
    let mut ranks = vec![RANK_STEP; spectra.len()];
    let mut left = total - ranks.iter().sum::<usize>();
    while left >= RANK_STEP {
        let saved = |i: usize| -> f64 {
            let next = spectra[i].iter().skip(ranks[i]).take(RANK_STEP);
            next.sum()
        };
        let best = (0..ranks.len())
            .filter(|i| ranks[*i] + RANK_STEP <= spectra[*i].len())
            .reduce(|a, b| if saved(b) > saved(a) { b } else { a });
        let Some(best) = best else {
            break;
        };
        ranks[best] += RANK_STEP;
        left -= RANK_STEP;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn distribution_is_optimal() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        for round in 0..50 {
            let mut spectra: Vec<Vec<f64>> = (0..3)
                .map(|_| {
                    (0..32)
                        .map(|_| random.random_range(0.0f64..1.0).powi(3))
                        .collect()
                })
                .collect();
            for s in &mut spectra {
                s.sort_by(|a, b| b.total_cmp(a));
            }
            let tail = |ranks: &[usize]| -> f64 {
                let of = |(s, r): (&Vec<f64>, &usize)| s[*r..].iter().sum::<f64>();
                spectra.iter().zip(ranks).map(of).sum()
            };
            let total = 24 + 8 * (round % 9);
            let found = distribute(&spectra.iter().collect::<Vec<_>>(), total);
            let mut best = f64::MAX;
            for code in 0..64usize {
                let ranks = [code % 4, code / 4 % 4, code / 16].map(|n| 8 * (n + 1));
                if ranks.iter().sum::<usize>() <= total {
                    best = best.min(tail(&ranks));
                }
            }
            assert!(found.iter().sum::<usize>() <= total);
            assert!((tail(&found) - best).abs() < 1e-12, "{found:?}");
        }
    }
}
