//! How a latent's rank is said.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Ranks that are found are multiples of this, as AMD's must be.
pub const RANK_STEP: usize = 8;

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

impl RankRule {
    /// Whether it needs the teacher's weights to become a number.
    pub fn is_open(&self) -> bool {
        !matches!(self, RankRule::Fixed(_))
    }

    /// Whether it is for the layers of one hybrid together.
    pub fn is_budget(&self) -> bool {
        matches!(self, RankRule::Share(_) | RankRule::Bytes(_))
    }
}

/// The largest rank whose energies, which fall, add up to at most `share` of all (X-EcoMLA, arXiv 2503.11132), at
/// least 1, rounded up to a multiple of 8.
pub fn energy_rank(energies: &[f64], share: f64) -> usize {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
