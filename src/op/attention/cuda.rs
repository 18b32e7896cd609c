//! Launches of attention.

use candle_core::{DType, Layout, Result, bail};

use super::Sight;
use crate::op::cuda::{Arg, Array, Gpu, Launch, named, pack, starts};

/// Threads of a block, and its warps.
const THREADS: usize = 128;
const WARPS: usize = 4;

/// How a size of heads is computed: the table at the end of `kernel.cuh`.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    /// Entries of keys and values, at most.
    dims: [usize; 2],
    /// Of the forward pass and of the gradient of q: 16 rows a warp so many times, and keys at a time.
    forward: [usize; 2],
    dq: [usize; 2],
    /// Of the gradients of k and v: queries at a time.
    queries: usize,
    /// Tiles that are on their way or worked on.
    stages: usize,
}

const fn tiles(dims: [usize; 2], forward: [usize; 2], dq: [usize; 2], queries: usize) -> Tiles {
    Tiles {
        dims,
        forward,
        dq,
        queries,
        stages: 2,
    }
}

const SIZES: [Tiles; 4] = [
    tiles([32, 32], [2, 64], [2, 64], 64),
    tiles([64, 64], [2, 64], [2, 32], 64),
    tiles([128, 128], [2, 32], [2, 32], 64),
    tiles([192, 128], [2, 32], [1, 64], 32),
];

impl Tiles {
    fn holds(&self, k: usize, v: usize) -> bool {
        k <= self.dims[0] && v <= self.dims[1]
    }

    /// The smallest that holds such heads.
    fn of(k: usize, v: usize, dtype: DType) -> Result<Self> {
        let Some(&size) = SIZES.iter().find(|size| size.holds(k, v)) else {
            bail!("attention: no kernel for keys of {k} entries and values of {v}");
        };
        Ok(match dtype {
            DType::F32 => Self {
                forward: [1, 32],
                dq: [1, 32],
                queries: 32,
                stages: 1,
                ..size
            },
            _ => size,
        })
    }

    /// Bytes of shared memory of `own` rows of keys and, where `both`, of values, of `passing` rows of both, and of the room that
    /// products of f32 need; `Shared` there.
    fn shared(&self, dtype: DType, rows: usize, both: bool, passing: usize) -> usize {
        let [k, v] = self.dims.map(|dim| dim + pack(dtype));
        let room = match dtype {
            DType::F32 => rows * (passing + 4),
            _ => 0,
        };
        let own = rows * if both { k + v } else { k };
        (own + self.stages * passing * (k + v) + room) * dtype.size_in_bytes()
    }

    fn name(&self, kernel: &str, dtype: DType) -> String {
        let [k, v] = self.dims;
        named(&format!("{kernel}_{k}_{v}"), dtype)
    }
}

/// Keys or values `[B, S, G, X]`, which may lie apart, heads contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Heads<'a, A> {
    pub entries: &'a A,
    pub dims: [usize; 4],
    /// Of batch, position and head.
    pub strides: [usize; 3],
}

impl<'a, A> Heads<'a, A> {
    pub fn of(entries: &'a A, layout: &Layout) -> Result<Self> {
        let (b, s, g, x) = layout.shape().dims4()?;
        match layout.stride() {
            &[batch, position, head, 1] => Ok(Self {
                entries,
                dims: [b, s, g, x],
                strides: [batch, position, head],
            }),
            _ => bail!("attention: heads of contiguous dims are wanted, not {layout:?}"),
        }
    }
}

pub struct Attention<'a, G: Gpu> {
    pub gpu: &'a G,
    /// Contiguous.
    pub q: &'a G::Array,
    /// `[B, T, H, K]`
    pub q_dims: [usize; 4],
    pub k: Heads<'a, G::Array>,
    pub v: Heads<'a, G::Array>,
    pub scale: f32,
    pub sight: &'a Sight,
}

impl<G: Gpu> Attention<'_, G> {
    fn dtype(&self) -> DType {
        self.q.dtype()
    }

    fn tiles(&self) -> Result<Tiles> {
        Tiles::of(self.k.dims[3], self.v.dims[3], self.dtype())
    }

    /// What all kernels but that of the inner products begin with.
    fn operands<'a>(&'a self, starts: Option<&'a G::Array>) -> Result<Vec<Arg<'a, G::Array>>> {
        let [_, t, h, k_dim] = self.q_dims;
        let [_, s, g, v_dim] = self.v.dims;
        let (window, sinks) = self.sight.window.map_or((0, 0), |w| (w.size, w.sinks));
        // None is the same as all, and counts as none there.
        let window = if window >= s { 0 } else { window };
        let mut args = vec![
            self.q.into(),
            self.k.entries.into(),
            self.v.entries.into(),
            Arg::or_null(starts),
        ];
        let strides = self.k.strides.iter().chain(&self.v.strides);
        args.extend(strides.map(|stride| Arg::long(*stride)));
        for size in [t, s, h, g, k_dim, v_dim, window, sinks.min(s)] {
            args.push(Arg::int(size)?);
        }
        args.push(self.scale.into());
        Ok(args)
    }

    fn launch(&self, kernel: String, positions: usize, rows: usize, heads: usize) -> Launch {
        Launch {
            kernel,
            grid: [positions.div_ceil(rows), heads, self.q_dims[0]],
            threads: THREADS as u32,
            shared: 0,
        }
    }

    /// `y [B, T, H, V]`, and the logarithm of each query's sum of exponentials, `[B, H, T]` in f32.
    pub fn forward(&self) -> Result<[G::Array; 2]> {
        let ([b, t, h, _], dtype, tiles) = (self.q_dims, self.dtype(), self.tiles()?);
        let y = self.gpu.empty(dtype, b * t * h * self.v.dims[3])?;
        let sums = self.gpu.empty(DType::F32, b * h * t)?;
        let starts = starts(self.gpu, self.sight.documents.as_ref())?;
        let mut args = self.operands(starts.as_ref())?;
        args.extend([(&y).into(), (&sums).into()]);
        let [times, keys] = tiles.forward;
        let rows = 64 * times;
        let launch = self.launch(tiles.name("attention", dtype), t, rows, h);
        let shared = tiles.shared(dtype, rows, false, keys);
        Launch { shared, ..launch }.run(self.gpu, &args)?;
        Ok([y, sums])
    }

    /// Gradients of q, k and v, contiguous, from those of `y`, which as `dy` is contiguous, and the `sums` of the forward pass.
    pub fn backward(&self, y: &G::Array, dy: &G::Array, sums: &G::Array) -> Result<[G::Array; 3]> {
        let ([b, t, h, k_dim], dtype, tiles) = (self.q_dims, self.dtype(), self.tiles()?);
        let [_, s, g, v_dim] = self.v.dims;
        let along = self.gpu.empty(DType::F32, b * h * t)?;
        let launch = Launch {
            kernel: named("attention_along", dtype),
            grid: [(b * h * t).div_ceil(WARPS), 1, 1],
            threads: THREADS as u32,
            shared: 0,
        };
        let mut args = vec![y.into(), dy.into(), (&along).into()];
        for size in [t, h, v_dim, b * h * t] {
            args.push(Arg::int(size)?);
        }
        launch.run(self.gpu, &args)?;

        let starts = starts(self.gpu, self.sight.documents.as_ref())?;
        let dq = self.gpu.empty(dtype, b * t * h * k_dim)?;
        let mut args = self.operands(starts.as_ref())?;
        args.extend([dy.into(), sums.into(), (&along).into(), (&dq).into()]);
        let [times, keys] = tiles.dq;
        let rows = 64 * times;
        let launch = self.launch(tiles.name("attention_dq", dtype), t, rows, h);
        let shared = tiles.shared(dtype, rows, true, keys) + 2 * rows * size_of::<f32>();
        Launch { shared, ..launch }.run(self.gpu, &args)?;

        let dk = self.gpu.empty(dtype, b * s * g * k_dim)?;
        let dv = self.gpu.empty(dtype, b * s * g * v_dim)?;
        let mut args = self.operands(starts.as_ref())?;
        args.extend([dy.into(), sums.into(), (&along).into()]);
        args.extend([(&dk).into(), (&dv).into()]);
        let launch = self.launch(tiles.name("attention_dkv", dtype), s, 64, g);
        let columns = 2 * tiles.stages * tiles.queries * size_of::<f32>();
        let shared = tiles.shared(dtype, 64, true, tiles.queries) + columns;
        Launch { shared, ..launch }.run(self.gpu, &args)?;
        Ok([dq, dk, dv])
    }
}
