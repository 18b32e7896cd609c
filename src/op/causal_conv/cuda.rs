//! Launches of the convolution.

use candle_core::{DType, Result};

use super::Documents;
use crate::op::cuda::{Arg, Array, Gpu, Launch, named, starts, sum_rows};

/// Neighbouring channels of a thread (`N` there).
const CHANNELS: usize = 2;
/// Positions that a thread walks down.
const POSITIONS: usize = 64;
/// The most threads of a block, which are those of neighbouring channels.
const THREADS: usize = 128;

/// What is convolved: rows `[C]` of `x [B, T, C]`, which may lie apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, A> {
    pub x: &'a A,
    /// `[B, T, C]`
    pub dims: [usize; 3],
    /// Of batch and row.
    pub strides: [usize; 2],
}

/// The convolution with its taps `[W, C]` and bias `[C]`.
#[derive(Debug)]
pub struct Conv<'a, G: Gpu> {
    pub gpu: &'a G,
    pub rows: Rows<'a, G::Array>,
    pub taps: &'a G::Array,
    pub bias: &'a G::Array,
    pub silu: bool,
    pub documents: Option<&'a Documents>,
}

impl<G: Gpu> Conv<'_, G> {
    fn width(&self) -> usize {
        self.taps.len() / self.bias.len().max(1)
    }

    fn launch(&self, kernel: &str) -> Launch {
        let [b, t, c] = self.rows.dims;
        let packs = c.div_ceil(CHANNELS);
        let threads = packs.next_multiple_of(32).clamp(32, THREADS);
        Launch {
            kernel: named(kernel, self.taps.dtype()),
            grid: [packs.div_ceil(threads), t.div_ceil(POSITIONS), b],
            threads: threads as u32,
            shared: 0,
        }
    }

    /// The sizes that both kernels end with.
    fn sizes<'a>(&self) -> Result<[Arg<'a, G::Array>; 7]> {
        let [_, t, c] = self.rows.dims;
        let [batch, row] = self.rows.strides;
        Ok([
            Arg::int(t)?,
            Arg::int(c)?,
            Arg::int(self.width())?,
            Arg::long(batch),
            Arg::long(row),
            Arg::int(POSITIONS)?,
            Arg::I32(self.silu.into()),
        ])
    }

    /// `[B, T, C]`
    pub fn forward(&self) -> Result<G::Array> {
        let starts = starts(self.gpu, self.documents)?;
        let entries = self.rows.dims.iter().product();
        let y = self.gpu.empty(self.taps.dtype(), entries)?;
        let mut args = vec![
            self.rows.x.into(),
            self.taps.into(),
            self.bias.into(),
            Arg::or_null(starts.as_ref()),
            (&y).into(),
        ];
        args.extend(self.sizes()?);
        self.launch("causal_conv").run(self.gpu, &args)?;
        Ok(y)
    }

    /// From `dy [B, T, C]` the gradients of x (if it is wanted) and of taps and bias (`[W + 1, C]`, the bias last).
    pub fn backward(&self, dy: &G::Array, want_x: bool) -> Result<(Option<G::Array>, G::Array)> {
        let starts = starts(self.gpu, self.documents)?;
        let [_, _, c] = self.rows.dims;
        let launch = self.launch("causal_conv_back");
        let dtype = self.taps.dtype();
        let dx = want_x
            .then(|| self.gpu.empty(dtype, dy.len()))
            .transpose()?;
        let sums = (self.width() + 1) * c;
        let parts = self
            .gpu
            .empty(DType::F32, launch.grid[1] * launch.grid[2] * sums)?;
        let mut args = vec![
            self.rows.x.into(),
            self.taps.into(),
            self.bias.into(),
            Arg::or_null(starts.as_ref()),
            dy.into(),
            Arg::or_null(dx.as_ref()),
            (&parts).into(),
        ];
        args.extend(self.sizes()?);
        launch.run(self.gpu, &args)?;
        Ok((dx, sum_rows(self.gpu, &parts, sums, dtype)?))
    }
}
