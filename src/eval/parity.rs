//! A model against recorded outputs, layer by layer.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Serialize;

use crate::checkpoint::read_tensors;
use crate::model::Lm;
use crate::{Error, Result};

/// Maximum absolute differences.
#[derive(Debug, Clone, Serialize)]
pub struct ParityReport {
    /// One a layer; `None` where nothing was recorded.
    pub layers: Vec<LayerDifference>,
    /// Of the final-normed output.
    pub final_hidden: Option<f64>,
    pub logits: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct LayerDifference {
    /// Of the layer's input.
    pub input: Option<f64>,
    /// Of the mixer's output.
    pub mixer_out: Option<f64>,
}

impl ParityReport {
    /// The first place, in the order of computation, that differs by more than `tolerance` (or is not a
    /// number), and by how much.
    pub fn first_departure(&self, tolerance: f64) -> Option<(String, f64)> {
        let layers = self.layers.iter().enumerate().flat_map(|(i, l)| {
            [
                (format!("input of layer {i}"), l.input),
                (format!("mixer of layer {i}"), l.mixer_out),
            ]
        });
        let end = [
            ("final norm".to_owned(), self.final_hidden),
            ("logits".to_owned(), self.logits),
        ];
        layers
            .chain(end)
            .filter_map(|(name, gap)| gap.map(|gap| (name, gap)))
            .find(|(_, gap)| gap.is_nan() || *gap > tolerance)
    }
}

/// Runs `lm` on `input_ids` of the file and compares `hidden_states [L + 1, B, T, D]`,
/// `mixer_out [L, B, T, D]` and `logits [B, T, V]`, whichever are there.
///
/// # Errors
/// A file without `input_ids` or without anything to compare, or shapes that are not the model's.
pub fn parity(lm: &Lm, expected: &Path) -> Result<ParityReport> {
    let tensors = read_tensors(expected)?;
    let Some(ids) = tensors.get("input_ids") else {
        return Err(Error::file(expected, "no tensor input_ids"));
    };
    let ids = ids.to_dtype(DType::U32)?.to_device(lm.device())?;
    let trace = lm.trace(&ids, None)?;
    let last = trace.hidden.last().expect("the output is always there");
    let logits = lm.head(last)?;
    let hidden = Tensor::stack(&trace.hidden, 0)?;
    let mixers = Tensor::stack(&trace.mixer_out, 0)?;
    let recorded = Recorded {
        path: expected,
        tensors: &tensors,
    };
    let layers = lm.layers.len();
    let report = ParityReport {
        layers: (0..layers)
            .map(|i| {
                Ok(LayerDifference {
                    input: recorded.part("hidden_states", &hidden, i)?,
                    mixer_out: recorded.part("mixer_out", &mixers, i)?,
                })
            })
            .collect::<Result<_>>()?,
        final_hidden: recorded.part("hidden_states", &hidden, layers)?,
        logits: recorded.whole("logits", &logits)?,
    };
    if report.first_departure(-1.0).is_none() {
        return Err(Error::file(
            expected,
            "none of hidden_states, mixer_out, logits is there: nothing to compare",
        ));
    }
    Ok(report)
}

struct Recorded<'a> {
    path: &'a Path,
    tensors: &'a BTreeMap<String, Tensor>,
}

impl Recorded<'_> {
    fn find(&self, name: &str, ours: &Tensor) -> Result<Option<Tensor>> {
        let Some(t) = self.tensors.get(name) else {
            return Ok(None);
        };
        if t.dims() != ours.dims() {
            return Err(Error::file(
                self.path,
                format!(
                    "{name} is {:?}, the model gives {:?}",
                    t.dims(),
                    ours.dims()
                ),
            ));
        }
        Ok(Some(t.to_device(ours.device())?))
    }

    fn whole(&self, name: &str, ours: &Tensor) -> Result<Option<f64>> {
        let found = self.find(name, ours)?;
        found.map(|t| max_difference(&t, ours)).transpose()
    }

    /// Entry `index` of the first axis.
    fn part(&self, name: &str, ours: &Tensor, index: usize) -> Result<Option<f64>> {
        let found = self.find(name, ours)?;
        found
            .map(|t| max_difference(&t.get(index)?, &ours.get(index)?))
            .transpose()
    }
}

/// `max |a − b|`, NaN when either holds one.
pub fn max_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let f64s = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (a, b) = (f64s(a)?, f64s(b)?);
    let gaps = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    Ok(gaps.fold(
        0.0,
        |max: f64, gap| if gap.is_nan() || gap > max { gap } else { max },
    ))
}
