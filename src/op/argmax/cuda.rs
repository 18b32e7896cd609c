//! The launch.

use candle_core::{DType, Result};

use crate::op::cuda::{Arg, Array, Gpu, Launch};

const THREADS: u32 = 512;

/// `x [M, N]` in f32 → `[M]`: the first of the largest of every row.
pub fn argmax<G: Gpu>(gpu: &G, x: &G::Array, n: usize) -> Result<G::Array> {
    let rows = x.len() / n;
    let found = gpu.empty(DType::U32, rows)?;
    let launch = Launch {
        kernel: "argmax_f32".into(),
        grid: [rows, 1, 1],
        threads: THREADS,
        shared: 0,
    };
    launch.run(gpu, &[x.into(), (&found).into(), Arg::int(n)?])?;
    Ok(found)
}

/// What [`argmax`] left, on the host; none where a row has an entry that is infinite or no number.
pub fn read<G: Gpu>(gpu: &G, found: &G::Array) -> Result<Vec<Option<u32>>> {
    let mut places = vec![0u32; found.len()];
    gpu.read(found, 0, bytemuck::cast_slice_mut(&mut places))?;
    let known = |place: u32| (place != u32::MAX).then_some(place);
    Ok(places.into_iter().map(known).collect())
}
