//! How large the latents are: a number, a share of the energy, or a budget of cache over all layers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::calibrate::Calibration;
use super::plan::{LayerKind, PlanOptions, RANK_STEP, plan};
use crate::mixer::mla::{Spectrum, reference_spectrum, spectrum};
use crate::mixer::{AttentionWeights, MixerConfig};
use crate::model::ModelConfig;
use crate::weights::Weights;
use crate::{Error, Result};

/// As text: `16`, `energy:0.95`, `budget:3.75%` or `budget:48` (bytes a token, bf16).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub enum RankRule {
    Fixed(usize),
    /// The largest rank whose energies add up to at most this share, rounded up to a multiple of 8
    /// (X-EcoMLA, arXiv 2503.11132), layer by layer.
    Energy(f64),
    /// A share of the teacher's KV cache, rotary keys included, spread over all MLA layers so that the
    /// energy cut off is least.
    Share(f64),
    /// The same in bytes a token.
    Bytes(usize),
}

/// In TOML and JSON a rule is a number or a text.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Text {
    Number(usize),
    Text(String),
}

impl TryFrom<Text> for RankRule {
    type Error = Error;
    fn try_from(text: Text) -> Result<Self> {
        match text {
            Text::Number(rank) => Ok(RankRule::Fixed(rank)),
            Text::Text(text) => text.parse(),
        }
    }
}

impl From<RankRule> for Text {
    fn from(rule: RankRule) -> Text {
        match rule {
            RankRule::Fixed(rank) => Text::Number(rank),
            rule => Text::Text(rule.to_string()),
        }
    }
}

impl FromStr for RankRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(format!(
                "rank {text:?}: give a number, energy:SHARE (0.95), budget:P% (3.75%) or budget:BYTES (48)"
            ))
        };
        let share = |text: &str, limit: f64| {
            let share: f64 = text.parse().map_err(|_| wrong())?;
            match share > 0.0 && share <= limit {
                true => Ok(share),
                false => Err(wrong()),
            }
        };
        if let Some(text) = text.strip_prefix("energy:") {
            return Ok(RankRule::Energy(share(text, 1.0)?));
        }
        match text.strip_prefix("budget:") {
            Some(budget) => match budget.strip_suffix('%') {
                Some(percent) => Ok(RankRule::Share(share(percent, 100.0)? / 100.0)),
                None => Ok(RankRule::Bytes(budget.parse().map_err(|_| wrong())?)),
            },
            None => Ok(RankRule::Fixed(text.parse().map_err(|_| wrong())?)),
        }
    }
}

impl fmt::Display for RankRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RankRule::Fixed(rank) => write!(f, "{rank}"),
            RankRule::Energy(share) => write!(f, "energy:{share}"),
            RankRule::Share(share) => write!(f, "budget:{}%", 100.0 * share),
            RankRule::Bytes(bytes) => write!(f, "budget:{bytes}"),
        }
    }
}

/// The same plan with every rank a number. Spectra are weighted by the calibration's text if there is one,
/// and the weights' own otherwise.
///
/// # Errors
/// A budget that the MLA layers' least latents already exceed; a budget for queries.
pub fn settle_ranks(
    teacher: &ModelConfig,
    weights: &Weights,
    options: &PlanOptions,
    calibration: Option<&Calibration>,
) -> Result<PlanOptions> {
    if !options.needs_weights() {
        return Ok(options.clone());
    }
    let budget = check_ranks(teacher, options)?;
    let mut kinds = options.kinds(teacher.layers.len())?;
    let sized = any_ranks(teacher, options)?;
    let mut spectra: Vec<(usize, Spectrum)> = Vec::new();
    for (i, layer) in sized.layers.iter().enumerate() {
        let MixerConfig::Mla(config) = layer else {
            continue;
        };
        let source = weights.at(format!("model.layers.{i}"));
        let source = source.at(teacher.layers[i].prefix());
        let attention = AttentionWeights::new(teacher.attention(i)?, &source)?;
        let found = match calibration {
            Some(calibration) => spectrum(config, &attention, &calibration.layers[i])?,
            None => reference_spectrum(&attention)?,
        };
        spectra.push((i, found));
    }
    // No latent is wider than what it is made from.
    let limit = |energies: &[f64]| energies.len().min(teacher.hidden_size);
    let kv: Option<Vec<usize>> = match (options.kv_lora_rank, budget) {
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
        if let LayerKind::Mla {
            kv_lora_rank,
            q_lora_rank,
        } = &mut kinds[*i]
        {
            // What a layer says of itself stays.
            *kv_lora_rank = kv_lora_rank.or_else(|| match options.kv_lora_rank {
                Some(RankRule::Fixed(rank)) => Some(rank),
                _ => kv.as_ref().map(|ranks| ranks[at]),
            });
            if let Some(RankRule::Energy(share)) = options.q_lora_rank {
                let rank = energy_rank(&spectrum.q, share).min(limit(&spectrum.q));
                *q_lora_rank = q_lora_rank.or(Some(rank));
            }
        }
    }
    let number = |rule: Option<RankRule>| rule.filter(|r| matches!(r, RankRule::Fixed(_)));
    let mut settled = options.with_layers(kinds);
    settled.kv_lora_rank = number(options.kv_lora_rank);
    settled.q_lora_rank = number(options.q_lora_rank);
    Ok(settled)
}

/// The sizes that do not depend on ranks: with some that every teacher can give.
fn any_ranks(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    let options = PlanOptions {
        kv_lora_rank: Some(RankRule::Fixed(1)),
        q_lora_rank: Some(RankRule::Fixed(1)),
        ..options.clone()
    };
    plan(teacher, &options)
}

/// What can be said of the ranks before weights are read. Gives a budget's scalars a token for all latents together, the
/// rotary keys taken off.
///
/// # Errors
/// A budget that the MLA layers' least latents already exceed; a budget for queries.
pub fn check_ranks(teacher: &ModelConfig, options: &PlanOptions) -> Result<Option<usize>> {
    if let Some(rule @ (RankRule::Share(_) | RankRule::Bytes(_))) = options.q_lora_rank {
        return Err(Error::invalid(format!(
            "the queries' rank {rule}: queries are not cached; give a number or energy:SHARE"
        )));
    }
    let scalars = match options.kv_lora_rank {
        Some(RankRule::Share(share)) => (share * teacher.cost().kv_per_token as f64) as usize,
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

/// X-EcoMLA's rule (spec systems 2.3).
fn energy_rank(energies: &[f64], share: f64) -> usize {
    let total: f64 = energies.iter().sum();
    let mut sum = 0.0;
    let kept = energies
        .iter()
        .take_while(|e| {
            sum += **e;
            sum <= share * total
        })
        .count();
    kept.max(1).div_ceil(RANK_STEP) * RANK_STEP
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
    fn rules_are_read_as_they_are_written() {
        for text in ["16", "energy:0.95", "budget:3.75%", "budget:48"] {
            assert_eq!(text.parse::<RankRule>().unwrap().to_string(), text);
        }
        for text in ["", "energy:2", "budget:0%", "budget:x", "-1"] {
            let message = text.parse::<RankRule>().unwrap_err().to_string();
            assert!(message.contains("give a number"), "{message}");
        }
        let number: RankRule = serde_json::from_str("16").unwrap();
        assert_eq!(number, RankRule::Fixed(16));
        assert_eq!(
            serde_json::to_string(&RankRule::Energy(0.5)).unwrap(),
            "\"energy:0.5\""
        );
    }

    #[test]
    fn energy_rule_is_x_eco_mlas() {
        let mut energies = vec![4.0, 3.0, 2.0, 1.0];
        energies.extend([0.0; 20]);
        assert_eq!(energy_rank(&energies, 0.7), 8, "two, rounded up");
        assert_eq!(energy_rank(&energies, 0.1), 8, "at least one");
        let flat = [1.0; 32];
        assert_eq!(energy_rank(&flat, 0.5), 16);
        assert_eq!(energy_rank(&flat, 0.54), 24, "17 of 32, rounded up");
    }

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
