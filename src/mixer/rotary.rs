//! Rotary frequencies: the base, Hugging Face's scalings, and the cos/sin tables made from them.

use std::sync::{Arc, Mutex};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::sizes::{MAX_POSITIONS, bounded};
use crate::{Error, Result};

/// `rope_theta` with an optional scaling, or frequencies given one by one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    pub theta: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<RopeScaling>,
    /// Replaces `theta^(−2i/dim)` (radians a position, before scaling), one a rotated pair. Written without a
    /// scaling ([`RopeConfig::turning`]); hybrids of zebroid 0.1 may have both and were trained so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inv_freq: Option<Vec<f64>>,
}

/// Hugging Face's `rope_scaling`, by `rope_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Positions divided by `factor`.
    Linear { factor: f64 },
    /// Llama 3.1's: low frequencies divided by `factor`, a smooth passage between the two bounds.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023): ramp between interpolated and kept frequencies, cos and sin multiplied
    /// by `attention_factor` (default `0.1 ln(factor) + 1`).
    Yarn {
        factor: f64,
        original_max_position_embeddings: usize,
        #[serde(default = "beta_fast")]
        beta_fast: f64,
        #[serde(default = "beta_slow")]
        beta_slow: f64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        attention_factor: Option<f64>,
    },
}

fn beta_fast() -> f64 {
    32.0
}

fn beta_slow() -> f64 {
    1.0
}

impl RopeConfig {
    pub fn new(theta: f64) -> Self {
        Self {
            theta,
            scaling: None,
            inv_freq: None,
        }
    }

    /// With pairs that turn by `wanted` radians a position, whatever this config asks for: its own spelling where
    /// it gives just these, else the frequencies one by one, as they are, without a scaling of theirs.
    pub fn turning(&self, wanted: Vec<f64>) -> Self {
        let gives = |config: &Self| {
            let (found, _) = config.frequencies(2 * wanted.len());
            let mut pairs = found.iter().zip(&wanted);
            pairs.all(|(found, wanted)| (found - wanted).abs() <= 1e-9 * wanted.abs())
        };
        let (theta, plain) = (self.theta, Self::new(self.theta));
        match (gives(self), gives(&plain)) {
            (true, _) => self.clone(),
            (false, true) => plain,
            (false, false) => Self {
                theta,
                scaling: None,
                inv_freq: Some(wanted),
            },
        }
    }

    /// # Errors
    /// Names the field whose value no table can be made from. `dim` is the number of rotated dims.
    pub fn validate(&self, dim: usize) -> Result<()> {
        let bad = |what: String| Err(Error::invalid(what));
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return bad(format!(
                "rope theta {} must be a number above 1",
                self.theta
            ));
        }
        if !dim.is_multiple_of(2) {
            return bad(format!(
                "{dim} rotary dims cannot be paired: use an even number"
            ));
        }
        if let Some(f) = &self.inv_freq
            && (f.len() != dim / 2 || f.iter().any(|f| !f.is_finite()))
        {
            return bad(format!(
                "inv_freq has {} entries; {dim} rotary dims need {} finite ones",
                f.len(),
                dim / 2
            ));
        }
        let (factor, window) = match &self.scaling {
            None => (1.0, 1),
            Some(RopeScaling::Linear { factor }) => (*factor, 1),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                if low_freq_factor.partial_cmp(high_freq_factor) != Some(std::cmp::Ordering::Less) {
                    return bad(format!(
                        "rope_scaling: low_freq_factor {low_freq_factor} must be below high_freq_factor {high_freq_factor}"
                    ));
                }
                (*factor, *original_max_position_embeddings)
            }
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
            }) => {
                if !(*beta_slow > 0.0 && beta_slow < beta_fast) {
                    return bad(format!(
                        "rope_scaling: beta_slow {beta_slow} must be above 0 and below beta_fast {beta_fast}"
                    ));
                }
                if let Some(m) = attention_factor.filter(|m| !(m.is_finite() && *m > 0.0)) {
                    return bad(format!(
                        "rope_scaling: attention_factor {m} must be a number above 0"
                    ));
                }
                (*factor, *original_max_position_embeddings)
            }
        };
        if !(factor.is_finite() && factor >= 1.0) {
            return bad(format!("rope_scaling: factor {factor} must be at least 1"));
        }
        bounded(
            "rope_scaling: original_max_position_embeddings",
            window,
            MAX_POSITIONS,
        )
    }

    /// Radians a position for each of the `dim / 2` pairs, and the factor on cos and sin.
    pub fn frequencies(&self, dim: usize) -> (Vec<f64>, f64) {
        use std::f64::consts::PI;
        let base: Vec<f64> = match &self.inv_freq {
            Some(given) => given.clone(),
            None => (0..dim / 2)
                .map(|i| self.theta.powf(-2.0 * i as f64 / dim as f64))
                .collect(),
        };
        match &self.scaling {
            None => (base, 1.0),
            Some(RopeScaling::Linear { factor }) => {
                (base.iter().map(|f| f / factor).collect(), 1.0)
            }
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let window = *original_max_position_embeddings as f64;
                let scaled = base.iter().map(|&f| {
                    let turns = window * f / (2.0 * PI);
                    let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                        .clamp(0.0, 1.0);
                    (1.0 - keep) * f / factor + keep * f
                });
                (scaled.collect(), 1.0)
            }
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
            }) => {
                let window = *original_max_position_embeddings as f64;
                let dim_of = |turns: f64| {
                    dim as f64 * (window / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let low = dim_of(*beta_fast).floor().max(0.0);
                let high = dim_of(*beta_slow).ceil().min(dim as f64 - 1.0);
                let span = (high - low).max(0.001);
                let scaled = base.iter().enumerate().map(|(i, f)| {
                    let ramp = ((i as f64 - low) / span).clamp(0.0, 1.0);
                    f / factor * ramp + f * (1.0 - ramp)
                });
                let magnitude = attention_factor.unwrap_or(if *factor > 1.0 {
                    0.1 * factor.ln() + 1.0
                } else {
                    1.0
                });
                (scaled.collect(), magnitude)
            }
        }
    }
}

/// Tables of cos and sin for the first positions, made once and doubled when a sequence outgrows them.
/// The first `still` pairs of every head do not turn (cos 1, sin 0), so that a head with rotated and
/// plain dims takes one pass.
#[derive(Debug)]
pub struct Rotary {
    inv_freq: Vec<f32>,
    magnitude: f32,
    still: usize,
    table: Mutex<Arc<Table>>,
}

/// `cos, sin [positions, still/2 + dim/2]`
#[derive(Debug, Default)]
pub struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
    width: usize,
}

impl Table {
    /// cos and sin of a position.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let row = position * self.width..(position + 1) * self.width;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

impl Rotary {
    /// `dim` rotated dims after `still` plain ones (both even).
    pub fn new(config: &RopeConfig, dim: usize, still: usize) -> Self {
        let (inv_freq, magnitude) = config.frequencies(dim);
        Self {
            inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(),
            magnitude: magnitude as f32,
            still: still / 2,
            table: Mutex::default(),
        }
    }

    /// Of at least the first `len` positions.
    pub fn table(&self, len: usize) -> Arc<Table> {
        // Whoever panicked while it held this has left a whole table behind.
        let mut table = self.table.lock().unwrap_or_else(|e| e.into_inner());
        if table.cos.len() < len * table.width || table.width == 0 {
            *table = Arc::new(self.build(len.next_power_of_two().max(64)));
        }
        table.clone()
    }

    /// `cos, sin [T, still/2 + dim/2]` of the first `len` positions, in the dtype and on the device of `like`.
    pub fn tables(&self, len: usize, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let table = self.table(len);
        let of = |entries: &[f32]| -> Result<Tensor> {
            let entries = &entries[..len * table.width];
            let found = Tensor::from_slice(entries, (len, table.width), like.device())?;
            Ok(found.to_dtype(like.dtype())?)
        };
        Ok((of(&table.cos)?, of(&table.sin)?))
    }

    fn build(&self, len: usize) -> Table {
        let width = self.still + self.inv_freq.len();
        let (mut cos, mut sin) = (vec![1f32; len * width], vec![0f32; len * width]);
        for t in 0..len {
            for (i, f) in self.inv_freq.iter().enumerate() {
                let angle = t as f32 * f;
                let at = t * width + self.still + i;
                cos[at] = angle.cos() * self.magnitude;
                sin[at] = angle.sin() * self.magnitude;
            }
        }
        Table { cos, sin, width }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Figures computed from the spec's formulas (1.2): the YaRN ramp runs over dims 4..9 for 32 rotary
    /// dims and 9..18 for 64, and the magnitudes are 1.3466 and 1.2079.
    #[test]
    fn yarn_ramp_and_magnitude() {
        for (dim, factor, low, high, magnitude) in
            [(32, 32.0, 4, 9, 1.3466), (64, 8.0, 9, 18, 1.2079)]
        {
            let config = RopeConfig {
                theta: 500_000.0,
                scaling: Some(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: 8192,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    attention_factor: None,
                }),
                inv_freq: None,
            };
            let plain = RopeConfig::new(500_000.0).frequencies(dim).0;
            let (scaled, m) = config.frequencies(dim);
            assert!((m - magnitude).abs() < 5e-5, "{m}");
            let ratio = |i: usize| plain[i] / scaled[i];
            assert!((ratio(low) - 1.0).abs() < 1e-9 && ratio(low + 1) > 1.0 + 1e-6);
            if high < dim / 2 {
                assert!((ratio(high) - factor).abs() < 1e-9 && ratio(high - 1) < factor - 1e-6);
            }
        }
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let config = RopeConfig {
            theta: 500_000.0,
            scaling: Some(RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            }),
            inv_freq: None,
        };
        let plain = RopeConfig::new(500_000.0).frequencies(64).0;
        let scaled = config.frequencies(64).0;
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[31] - plain[31] / 32.0).abs() < 1e-15);
    }

    /// A hybrid of zebroid 0.1 with frequencies of its own and a scaling turns as it was trained.
    #[test]
    fn older_files_turn_as_they_did() {
        let text = r#"{"theta": 10000.0, "inv_freq": [0.5, 0.25, 0.125, 0.0625], "scaling":
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}"#;
        let config: RopeConfig = serde_json::from_str(text).unwrap();
        config.validate(8).unwrap();
        // The ramp runs over pairs 0 to 2.
        let (found, magnitude) = config.frequencies(8);
        let wanted = [0.5, 0.25 * 0.625, 0.125 / 4.0, 0.0625 / 4.0];
        assert!(
            found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-12),
            "{found:?}"
        );
        assert!((magnitude - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    }

    #[test]
    fn wanted_frequencies_are_spelled_shortly() {
        let scaled = RopeConfig {
            scaling: Some(RopeScaling::Linear { factor: 2.0 }),
            ..RopeConfig::new(100.0)
        };
        let plain = RopeConfig::new(100.0);
        let turns = |config: &RopeConfig| config.frequencies(8).0;
        assert_eq!(scaled.turning(turns(&scaled)), scaled);
        assert_eq!(scaled.turning(turns(&plain)), plain);
        let own = scaled.turning(vec![0.5, 0.25]);
        assert_eq!((own.scaling, own.inv_freq), (None, Some(vec![0.5, 0.25])));
    }

    #[test]
    fn tables_grow_without_changing() {
        let rotary = Rotary::new(&RopeConfig::new(10_000.0), 8, 0);
        let like = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        let short = rotary.tables(5, &like).unwrap().0;
        rotary.tables(500, &like).unwrap();
        let again = rotary.tables(5, &like).unwrap().0;
        assert_eq!(
            short.to_vec2::<f32>().unwrap(),
            again.to_vec2::<f32>().unwrap()
        );
    }
}
