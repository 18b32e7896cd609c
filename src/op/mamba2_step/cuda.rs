//! The launch of Mamba2's steps.

use candle_core::{DType, Result, bail};

use crate::op::cuda::{Arg, Array, Gpu, Launch, Places};

/// Warps of a block, at most: each has a head at a time.
const WARPS: usize = 16;
/// Bytes of shared memory that a block has on every device since Ampere.
const SHARED: usize = 99 << 10;

/// Sizes of the layer.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// `H`
    pub heads: usize,
    /// `G`: heads of x and B in the convolution and the state.
    pub groups: usize,
    /// The same as they are projected.
    pub projected: usize,
    pub p: usize,
    pub n: usize,
    /// Taps of the convolution.
    pub width: usize,
    pub eps: f32,
}

/// What is projected of tokens: `z [N, H·P]`, `xbc [N, ..]`, `dt [N, H]`, in f32.
#[derive(Debug)]
pub struct Projected<'a, A> {
    pub z: &'a A,
    pub xbc: &'a A,
    pub dt: &'a A,
}

/// The layer's own, in f32: `taps [W, C]`, `bias [C]`, `params [3, H]` (A_log, dt_bias, D), `norm [H·P]`.
#[derive(Debug)]
pub struct Own<'a, A> {
    pub taps: &'a A,
    pub bias: &'a A,
    pub params: &'a A,
    pub norm: &'a A,
}

/// → `[N, H·P]`
///
/// # Errors
/// Heads that are too large for a block.
pub fn step<G: Gpu>(
    gpu: &G,
    places: &Places<G::Array>,
    tokens: &Projected<G::Array>,
    own: &Own<G::Array>,
    sizes: Sizes,
) -> Result<G::Array> {
    let Sizes { heads, p, n, .. } = sizes;
    let rep = heads / sizes.groups;
    let warps = rep.min(WARPS);
    let shared = size_of::<f32>() * (p + n + rep * n + warps * (4 * 32 + p));
    if shared > SHARED {
        bail!(
            "cuda: Mamba2 with {rep} heads a group of {p} channels and {n} states needs {shared} bytes of shared memory, where a block has \
             {SHARED}: choose --device cpu"
        );
    }
    let y = gpu.empty(DType::F32, tokens.z.len())?;
    let launch = Launch {
        kernel: "mamba2_step_f32".into(),
        grid: [sizes.groups, places.sequences(), 1],
        threads: 32 * warps as u32,
        shared,
    };
    let args = [
        tokens.z.into(),
        tokens.xbc.into(),
        tokens.dt.into(),
        own.taps.into(),
        own.bias.into(),
        own.params.into(),
        own.norm.into(),
        places.memory.into(),
        places.states.into(),
        places.ends.into(),
        (&y).into(),
        Arg::long(places.unit),
        Arg::long(places.layer_at),
        Arg::int(heads)?,
        Arg::int(sizes.groups)?,
        Arg::int(sizes.projected)?,
        Arg::int(p)?,
        Arg::int(n)?,
        Arg::int(sizes.width)?,
        sizes.eps.into(),
    ];
    launch.run(gpu, &args)?;
    Ok(y)
}
