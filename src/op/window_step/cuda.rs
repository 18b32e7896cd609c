//! The launch of a window's steps.

use candle_core::{DType, Result, bail};

use crate::op::attention::Window;
use crate::op::cuda::{Arg, Array, Gpu, Launch, Places};

/// Places of a ring whose scores a block's 99 KB of shared memory hold on every device since Ampere, beside 1 KB of sums.
const MOST: usize = 24_576;
const THREADS: u32 = 128;

/// `q [N, H, K]`, `k, v [N, G, K]` → `[N, H, K]`.
///
/// # Errors
/// A window that is too long.
pub fn step<G: Gpu>(
    gpu: &G,
    places: &Places<G::Array>,
    [q, k, v]: [&G::Array; 3],
    [heads, groups, dim]: [usize; 3],
    reach: Window,
    scale: f32,
) -> Result<G::Array> {
    let slots = reach.size + reach.sinks;
    if slots > MOST {
        bail!(
            "cuda: a window of {slots} positions, where the kernel holds up to {MOST}: choose --device cpu"
        );
    }
    let y = gpu.empty(DType::F32, q.len())?;
    let launch = Launch {
        kernel: "window_step_f32".into(),
        grid: [groups, places.sequences(), 1],
        threads: THREADS,
        shared: 4 * slots,
    };
    let args = [
        places.memory.into(),
        places.states.into(),
        places.ends.into(),
        places.lengths.into(),
        q.into(),
        k.into(),
        v.into(),
        (&y).into(),
        Arg::long(places.unit),
        Arg::long(places.layer_at),
        Arg::int(reach.size)?,
        Arg::int(reach.sinks)?,
        Arg::int(heads)?,
        Arg::int(dim)?,
        scale.into(),
    ];
    launch.run(gpu, &args)?;
    Ok(y)
}
