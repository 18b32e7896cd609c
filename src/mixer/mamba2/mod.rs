//! Mamba2 (Dao & Gu 2024, arXiv 2405.21060) in the MambaInLlama form: x, B and C come from the places of
//! V, K and Q, with grouped heads for x and B, a depthwise convolution with SiLU, and a gated per-head
//! RMSNorm (Mamba2, arXiv 2405.21060; as MambaInLlama has it, arXiv 2408.15237).

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::attention::{AttentionConfig, validate_heads};
use super::sizes::{MAX_HEADS, MAX_POSITIONS, MAX_WIDTH, at_most, bounded, bounded_heads};
use super::{Cost, MixerOptions, Param, Pass, Windows};
use crate::op::Documents;
use crate::op::causal_conv::causal_conv;
use crate::op::linear::{Matrix, linear};
use crate::op::rms_norm::gated_rms_norm;
use crate::op::ssd::{SsdShape, ssd};
use crate::weights::Weights;
use crate::{Error, Result};

mod cuda;
mod decode;
mod init;
mod refined;
pub use cuda::OnGpu;
pub use decode::Decoder;
pub use init::published;
pub use refined::refined;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba2Config {
    /// `H`
    pub num_heads: usize,
    /// `G`: heads of x and B before they are repeated to `H`.
    pub num_kv_heads: usize,
    /// `P`
    pub head_dim: usize,
    /// `N`
    pub d_state: usize,
    /// Taps of the convolution.
    pub d_conv: usize,
    /// Repeat x and B to `H` heads before the convolution instead of after it.
    #[serde(default)]
    pub repeat_kv_before_conv: bool,
    /// Positions a chunk of the scan; never changes the answer.
    pub chunk_size: usize,
}

/// Of the gated norm.
const NORM_EPS: f64 = 1e-5;

impl Mamba2Config {
    /// Channels of z and of the output, `H·P`.
    pub fn d_inner(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Channels of x, B and C as projected.
    fn widths(&self) -> [usize; 3] {
        [
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.d_state,
            self.num_heads * self.d_state,
        ]
    }

    /// Heads of x and B inside the convolution and the scan.
    fn groups(&self) -> usize {
        match self.repeat_kv_before_conv {
            true => self.num_heads,
            false => self.num_kv_heads,
        }
    }

    /// `C`: channels of the convolution.
    fn conv_channels(&self) -> usize {
        self.groups() * (self.head_dim + self.d_state) + self.num_heads * self.d_state
    }

    fn ssd_shape(&self) -> SsdShape {
        SsdShape {
            heads: self.num_heads,
            groups: self.groups(),
            head_dim: self.head_dim,
            d_state: self.d_state,
            chunk: self.chunk_size,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        at_most("num_heads", self.num_heads, MAX_HEADS)?;
        validate_heads(self.num_heads, self.num_kv_heads)?;
        bounded("head_dim", self.head_dim, MAX_WIDTH)?;
        bounded("d_state", self.d_state, MAX_WIDTH)?;
        bounded("d_conv", self.d_conv, MAX_WIDTH)?;
        bounded("chunk_size", self.chunk_size, MAX_POSITIONS)?;
        bounded_heads("head_dim", self.num_heads, self.head_dim)?;
        bounded_heads("d_state", self.num_heads, self.d_state)
    }

    /// In the place of attention `a`.
    pub(super) fn settle(a: &AttentionConfig, options: &MixerOptions) -> Self {
        Self {
            num_heads: a.num_attention_heads,
            num_kv_heads: a.num_key_value_heads,
            head_dim: a.head_dim,
            d_state: a.head_dim,
            d_conv: 4,
            repeat_kv_before_conv: options.repeat_kv_before_conv,
            chunk_size: options.chunk_size,
        }
    }

    pub(super) fn show(&self) -> String {
        format!(
            "{} heads x {} state {}",
            self.num_heads, self.head_dim, self.d_state
        )
    }

    /// # Errors
    /// When this mixer's heads are not those of the attention it should be born from.
    pub fn fits(&self, a: &AttentionConfig) -> Result<()> {
        let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
        if (
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.d_state,
        ) == (h, g, hd, hd)
        {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a mamba2 layer of {} heads ({} for x and B), head_dim {} and d_state {} cannot take the \
             teacher's {h} heads ({g} for keys and values) of {hd}",
            self.num_heads, self.num_kv_heads, self.head_dim, self.d_state
        )))
    }

    pub(super) fn params(&self, hidden: usize) -> Vec<Param> {
        let (h, di, channels) = (self.num_heads, self.d_inner(), self.conv_channels());
        let projected = di + self.widths().iter().sum::<usize>() + h;
        vec![
            ("in_proj.weight".into(), vec![projected, hidden]),
            ("conv1d.weight".into(), vec![channels, 1, self.d_conv]),
            ("conv1d.bias".into(), vec![channels]),
            ("dt_bias".into(), vec![h]),
            ("A_log".into(), vec![h]),
            ("D".into(), vec![h]),
            ("norm.weight".into(), vec![di]),
            ("out_proj.weight".into(), vec![hidden, di]),
        ]
    }

    pub(super) fn stacked(&self) -> Vec<(&'static str, Vec<usize>)> {
        let [x, b, c] = self.widths();
        vec![(
            "in_proj.weight",
            vec![self.d_inner(), x, b, c, self.num_heads],
        )]
    }

    pub(super) fn full_cache(&self) -> usize {
        2 * self.num_kv_heads * self.head_dim
    }

    pub(super) fn cost(&self, hidden: usize) -> Cost {
        let (h, g, p, n) = (
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.d_state,
        );
        let channels = self.conv_channels();
        let projected = 2 * h * p + h * n + g * (p + n) + h;
        Cost {
            params: hidden * projected + channels * (self.d_conv + 1) + 3 * h + h * p,
            cached: 0,
            state: h * p * n + channels * (self.d_conv - 1),
        }
    }

    pub(super) fn pass(&self, windows: Windows) -> Pass {
        let (h, p, n) = (self.num_heads, self.head_dim, self.d_state);
        let (inner, channels) = (self.d_inner(), self.conv_channels());
        let projected: usize = self.widths().iter().sum();
        // x and B with their heads apart, then repeated; all of it side by side.
        let repeated = match channels > projected {
            true => (h + self.num_kv_heads) * (p + n) + channels,
            false => 0,
        };
        let tokens = windows.tokens();
        let states =
            windows.rows * windows.len.div_ceil(self.chunk_size) * self.ssd_shape().chunk_states();
        Pass {
            // Before and after the convolution, steps; the scan's output, the gate, the norm's output.
            kept: tokens * (projected + repeated + channels + h + 3 * inner) + states,
            back: tokens * (5 * inner).max(2 * inner + 3 * channels),
            // Of every entry of the state: decay, product, sum; product and sum as it is read.
            flops: 5.0 * (h * p * n) as f64 * tokens as f64,
        }
    }
}

#[derive(Debug)]
pub struct Mamba2 {
    config: Mamba2Config,
    /// Rows of `in_proj`: the gate, then x, B and C side by side, then the steps.
    z_proj: Matrix,
    xbc_proj: Matrix,
    dt_proj: Matrix,
    conv_weight: Tensor,
    conv_bias: Tensor,
    /// `A_log`, `dt_bias`, `D`, `[H]` each: apart, as they are trained.
    per_head: [Tensor; 3],
    norm: Tensor,
    out_proj: Matrix,
}

impl Mamba2 {
    pub(super) fn new(c: &Mamba2Config, weights: &Weights) -> Result<Self> {
        let in_proj = weights.matrix("in_proj.weight")?;
        let (di, h) = (c.d_inner(), c.num_heads);
        let xbc: usize = c.widths().iter().sum();
        let [a_log, dt_bias, d] = ["A_log", "dt_bias", "D"].map(|name| weights.get(name));
        Ok(Self {
            z_proj: in_proj.rows(0, di)?,
            xbc_proj: in_proj.rows(di, xbc)?,
            dt_proj: in_proj.rows(di + xbc, h)?,
            conv_weight: weights.get("conv1d.weight")?.squeeze(1)?,
            conv_bias: weights.get("conv1d.bias")?,
            per_head: [a_log?, dt_bias?, d?],
            norm: weights.get("norm.weight")?,
            out_proj: weights.matrix("out_proj.weight")?,
            config: c.clone(),
        })
    }

    /// `A_log`, `dt_bias`, `D` as they are now, `[3, H]`; in f32 unless the model is in f64.
    fn params(&self) -> Result<Tensor> {
        let dtype = match self.z_proj.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        Ok(Tensor::stack(&self.per_head, 0)?.to_dtype(dtype)?)
    }

    /// x, B and C before the convolution, `[B, T, C]`.
    fn project(&self, u: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let xbc = linear(u, &self.xbc_proj)?;
        if !c.repeat_kv_before_conv || c.num_heads == c.num_kv_heads {
            return Ok(xbc);
        }
        let [x_width, b_width, c_width] = c.widths();
        let x = self.repeat(&xbc.narrow(2, 0, x_width)?)?;
        let b = self.repeat(&xbc.narrow(2, x_width, b_width)?)?;
        Ok(Tensor::cat(
            &[&x, &b, &xbc.narrow(2, x_width + b_width, c_width)?],
            2,
        )?)
    }

    /// Each of the `G` heads of `x [B, T, G·I]` `H/G` times in a row: `[B, T, H·I]`.
    fn repeat(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, width) = x.dims3()?;
        let (h, g) = (self.config.num_heads, self.config.num_kv_heads);
        let i = width / g;
        Ok(x.reshape((b, t, g, 1, i))?
            .broadcast_as((b, t, g, h / g, i))?
            .reshape((b, t, h * i))?)
    }

    /// The gate before SiLU, `[B, T, H·P]`.
    fn gate(&self, u: &Tensor) -> Result<Tensor> {
        Ok(linear(u, &self.z_proj)?)
    }

    /// The steps before their bias, `[B, T, H]`.
    fn steps(&self, u: &Tensor) -> Result<Tensor> {
        Ok(linear(u, &self.dt_proj)?)
    }

    /// Convolution and scan of what [`Mamba2::project`] and [`Mamba2::steps`] gave: `[B, T, H·P]`.
    fn scan(&self, xbc: &Tensor, dt: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let xbc = causal_conv(xbc, &self.conv_weight, &self.conv_bias, true, documents)?;
        let shape = self.config.ssd_shape();
        Ok(ssd(&xbc, dt, &self.params()?, shape, documents)?)
    }

    /// What the output projection reads: the scan's `y` through the gate `z` and the norm, `[B, T, H·P]`.
    fn gated(&self, y: &Tensor, z: &Tensor) -> Result<Tensor> {
        let y = y.to_dtype(z.dtype())?;
        let group = self.config.head_dim;
        Ok(gated_rms_norm(&y, z, &self.norm, group, NORM_EPS)?)
    }

    pub(super) fn forward(&self, u: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let y = self.scan(&self.project(u)?, &self.steps(u)?, documents)?;
        let y = self.gated(&y, &self.gate(u)?)?;
        Ok(linear(&y, &self.out_proj)?)
    }
}
