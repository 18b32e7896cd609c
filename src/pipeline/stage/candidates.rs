//! The candidates of a bank, and which of two stands where.

use serde::{Deserialize, Serialize};

use crate::convert::PlanOptions;
use crate::mixer::LayerKind;
use crate::mixer::mla::rank::RankRule;
use crate::{Error, Result};

/// Where none are named.
pub const CANDIDATES: [LayerKind; 2] = [LayerKind::MLA, LayerKind::Mamba2];

/// Each kind in all layers; what the plan says of sizes, and of single layers of that kind, holds.
///
/// # Errors
/// No kind, one that is named twice, attention (there is nothing to train), or a budget for ranks: it is for one
/// hybrid, not for all layers.
pub fn bank_plans(
    options: &PlanOptions,
    kinds: &[LayerKind],
    layers: usize,
) -> Result<Vec<(LayerKind, PlanOptions)>> {
    check(kinds)?;
    if kinds.contains(&LayerKind::Attention) {
        return Err(Error::invalid(
            "attention is the teacher's own, there is nothing to train: leave it out of the bank's candidates",
        ));
    }
    if let Some(rule) = options.sizes.kv_lora_rank.filter(RankRule::is_budget) {
        return Err(Error::invalid(format!(
            "the rank {rule} is for the layers of one hybrid, a bank has all of them as MLA: compose the hybrid first and \
             train it (ild of a student, [ild] target = \"hybrid\"), or give a number or energy:SHARE"
        )));
    }
    let planned = options.kinds(layers)?;
    let everywhere = |kind: &LayerKind| {
        let layers = planned.iter().map(|planned| kind.specified(*planned));
        (*kind, options.with_layers(layers.collect()))
    };
    Ok(kinds.iter().map(everywhere).collect())
}

/// # Errors
/// No candidate, or one that is named twice.
pub(super) fn check(kinds: &[LayerKind]) -> Result<()> {
    if kinds.is_empty() {
        return Err(Error::invalid("no candidates to choose from"));
    }
    let twice = (1..kinds.len()).find(|i| kinds[..*i].contains(&kinds[*i]));
    match twice {
        Some(i) => Err(Error::invalid(format!(
            "candidate {} is named twice",
            kinds[i]
        ))),
        None => Ok(()),
    }
}

/// Which candidate places are chosen for, and which stands everywhere else. The same on the command line and in a
/// recipe's `[select]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(default)]
pub struct Pair {
    /// Candidate of the bank whose places are chosen [default: the first of two].
    #[arg(long, value_name = "KIND")]
    pub place: Option<LayerKind>,
    /// Candidate that stands everywhere else [default: the second of two].
    #[arg(long, value_name = "KIND")]
    pub elsewhere: Option<LayerKind>,
}

impl Pair {
    /// The places of both among `candidates`.
    ///
    /// # Errors
    /// One that is not there, the same twice, or a choice that only a name can make.
    pub fn of(&self, candidates: &[LayerKind]) -> Result<[usize; 2]> {
        let names = || {
            let names: Vec<_> = candidates.iter().map(LayerKind::to_string).collect();
            names.join(", ")
        };
        let find = |kind: Option<LayerKind>, default: usize, setting: &str| match kind {
            None if candidates.len() == 2 => Ok(default),
            None => Err(Error::invalid(format!(
                "say which candidate is meant with {setting}: the bank has {}",
                names()
            ))),
            Some(kind) => {
                let at = candidates.iter().position(|candidate| *candidate == kind);
                at.ok_or_else(|| {
                    Error::invalid(format!(
                        "{setting} {kind} is not in the bank: it has {}",
                        names()
                    ))
                })
            }
        };
        let found = [
            find(self.place, 0, "place")?,
            find(self.elsewhere, 1, "elsewhere")?,
        ];
        match found[0] == found[1] {
            true => Err(Error::invalid(format!(
                "place and elsewhere are both {}: there is nothing to choose",
                candidates[found[0]]
            ))),
            false => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_named_or_two() {
        let kinds = |text: &str| -> Vec<LayerKind> {
            text.split(',').map(|k| k.parse().unwrap()).collect()
        };
        let pair = |place: &str, elsewhere: &str| Pair {
            place: place.parse().ok(),
            elsewhere: elsewhere.parse().ok(),
        };
        let three = kinds("mla:16,mla:32,mamba2");
        assert_eq!(pair("", "").of(&CANDIDATES).unwrap(), [0, 1]);
        assert_eq!(pair("mamba2", "mla").of(&CANDIDATES).unwrap(), [1, 0]);
        assert_eq!(pair("mla:32", "mamba2").of(&three).unwrap(), [1, 2]);
        let say = |p: Pair, kinds: &[LayerKind]| p.of(kinds).unwrap_err().to_string();
        assert!(
            say(pair("mla:32", ""), &three)
                .contains("with elsewhere: the bank has mla:16, mla:32, mamba2")
        );
        assert!(say(pair("mla:8", "mamba2"), &three).contains("place mla:8 is not in the bank"));
        assert!(say(pair("mamba2", "mamba2"), &three).contains("nothing to choose"));
        let options = PlanOptions::default();
        let say = |text: &str| {
            bank_plans(&options, &kinds(text), 3)
                .unwrap_err()
                .to_string()
        };
        assert!(say("mla,mamba2,mla").contains("mla is named twice"));
        assert!(say("mla,attention").contains("nothing to train"));
    }

    /// A plan's own ranks go to the candidate of that mixer that has none of its own.
    #[test]
    fn a_plan_specifies_its_candidates() {
        let layers = ["mla:16", "mamba2", "mla:8"].map(|k| k.parse().unwrap());
        let options = PlanOptions::default().with_layers(layers.into());
        let kinds = ["mla", "mamba2", "mla:4"].map(|k| k.parse().unwrap());
        let plans = bank_plans(&options, &kinds, 3).unwrap();
        let shown = plans.iter().map(|(_, plan)| {
            let kinds = plan.layers.iter().flatten().map(LayerKind::to_string);
            kinds.collect::<Vec<_>>().join(",")
        });
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [
                "mla:16,mla,mla:8",
                "mamba2,mamba2,mamba2",
                "mla:4,mla:4,mla:4"
            ]
        );
    }
}
