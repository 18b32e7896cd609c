//! Steps that diverge: what is wrong is said by name, the step is not taken, and the run goes on by policy.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::config::OnDivergence;
use super::stage::{Stage, ids};
use super::state::Run;
use super::{StepMetrics, TrainConfig};
use crate::data::Batch;
use crate::model::Lm;
use crate::{Error, Result};

/// Steps in a row that are left out before the run goes back to its last save.
const PATIENCE: usize = 3;
/// Times that a run goes back before it ends.
const RETURNS: usize = 3;
/// Steps whose median is the usual loss, and steps without which there is none.
const WINDOW: usize = 50;
const ENOUGH: usize = 20;

/// Why a step was not taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Skipped {
    pub why: String,
    /// The step of the save whose weights are the run's again, if it went back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_to: Option<u64>,
}

/// The loss above which a step is a spike: `factor` times the usual one and above what it was at first. `metrics`: of the steps before
/// that have one schedule with it. 0 is no factor: then, and in the beginning, no loss is one.
pub(super) fn most(metrics: &[StepMetrics], factor: f64) -> f64 {
    let taken = metrics.iter().filter(|m| m.skipped.is_none());
    let losses: Vec<f64> = taken.map(|m| m.loss).collect();
    if factor == 0.0 || losses.len() < ENOUGH {
        return f64::INFINITY;
    }
    let usual = median(&losses[losses.len().saturating_sub(WINDOW)..]);
    (factor * usual).max(median(&losses[..ENOUGH]))
}

fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// What the learning rate is multiplied by after these steps.
pub(super) fn slowed(metrics: &[StepMetrics], policy: OnDivergence) -> f64 {
    match policy {
        OnDivergence::Lower => 0.5f64.powi(returns(metrics) as i32),
        OnDivergence::Stop | OnDivergence::Skip => 1.0,
    }
}

fn returns(metrics: &[StepMetrics]) -> usize {
    let back = metrics.iter().filter_map(|m| m.skipped.as_ref()?.back_to);
    back.count()
}

/// Leaves out step `step` (from 0), of whose batches `error` came. `ruined`: the weights are not finite, so that there is no going on from them.
///
/// # Errors
/// `error`, with where it came up and what can be done, by policy or where there is nothing to go back to.
pub(super) fn skip(
    run: &Run,
    stage: &mut Stage,
    batches: &[Batch],
    (error, ruined): (Error, bool),
    config: &TrainConfig,
) -> Result<Skipped> {
    let why = match &error {
        Error::Diverged(why) => format!("{why}{}", place(stage, batches)?),
        _ => return Err(error),
    };
    let end = |why: &str| Err(run.diverged(why, config));
    if config.on_divergence == OnDivergence::Stop {
        return end(&why);
    }
    for group in stage.groups_mut() {
        group.forget()?;
    }
    let before = run.metrics.iter().rev();
    let row = before.take_while(|m| m.skipped.as_ref().is_some_and(|s| s.back_to.is_none()));
    if row.count() + 1 < PATIENCE && !ruined {
        return Ok(Skipped { why, back_to: None });
    }
    if run.saved == 0 || returns(&run.metrics) >= RETURNS {
        return end(&why);
    }
    run.go_back(stage)?;
    Ok(Skipped {
        why,
        back_to: Some(run.saved),
    })
}

/// Where it is that something is wrong, as far as it can be found.
fn place(stage: &mut Stage, batches: &[Batch]) -> Result<String> {
    for group in stage.groups_mut() {
        if let Err(Error::Diverged(tensor)) = group.check_finite() {
            return Ok(format!(" ({tensor})"));
        }
    }
    for (whose, lm) in stage.models() {
        for batch in batches {
            if let Some(what) = first_not_finite(lm, batch)? {
                return Ok(format!(" ({what} of the {whose})"));
            }
        }
    }
    let groups = stage.groups_mut().into_iter();
    let steepest = groups.filter_map(|group| group.steepest().transpose());
    let steepest = steepest.collect::<Result<Vec<_>>>()?;
    let steepest = steepest.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
    Ok(match steepest {
        Some((name, norm)) => format!(" (the largest gradient is that of {name}: {norm:.3e})"),
        None => String::new(),
    })
}

/// The first layer of which something comes that is not finite.
fn first_not_finite(lm: &Lm, batch: &Batch) -> Result<Option<String>> {
    let finite = |x: &candle_core::Tensor| -> Result<bool> {
        let sum: f64 = x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?;
        Ok(sum.is_finite())
    };
    let mut x = lm.embed(&ids(batch, lm.device())?)?;
    if !finite(&x)? {
        return Ok(Some("an embedding".into()));
    }
    for (i, layer) in lm.layers.iter().enumerate() {
        let given = layer.forward(&x, Some(&batch.documents))?;
        let name = lm.config.layers[i].name();
        if !finite(&given.mixed)? {
            return Ok(Some(format!("the {name} mixer of layer {i}")));
        }
        x = given.hidden;
        if !finite(&x)? {
            return Ok(Some(format!("the MLP of layer {i}")));
        }
    }
    Ok(None)
}
