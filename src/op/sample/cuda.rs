//! Launches.

use candle_core::{DType, Result};

use crate::op::cuda::{Arg, Array, Gpu, Launch};

const THREADS: u32 = 512;

/// How a token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Above 0.
    pub temperature: f32,
    /// Only the `k` likeliest, and those as likely as the last of them; 0: all.
    pub top_k: u32,
    /// Of these only the likeliest that together reach this share; 1: all.
    pub top_p: f32,
    /// Only those at least this share of the likeliest's probability; 0: all.
    pub min_p: f32,
    /// From 0 to 1: how far down the vocabulary, by weight, the token stands.
    pub uniform: f32,
}

/// `x [M, N]` in f32 → of every row the first of the largest; none where a row has an entry that is infinite or no number.
pub fn argmax<G: Gpu>(gpu: &G, x: &G::Array, n: usize) -> Result<Vec<Option<u32>>> {
    let rows = x.len() / n;
    let found = gpu.empty(DType::U32, rows)?;
    launch("argmax_f32", rows).run(gpu, &[x.into(), (&found).into(), Arg::int(n)?])?;
    read(gpu, &found)
}

/// A token for each of some rows of `x [.., N]` in f32; none where a row has an entry that is infinite or no number.
pub fn draw<G: Gpu>(
    gpu: &G,
    x: &G::Array,
    n: usize,
    rows: &[(usize, Draw)],
) -> Result<Vec<Option<u32>>> {
    let numbers: Vec<u32> = rows.iter().map(|(row, _)| *row as u32).collect();
    let numbers = gpu.upload(&numbers)?;
    let limits = rows.iter();
    let limits = limits.flat_map(|(_, d)| [d.temperature, d.top_p, d.min_p, d.uniform]);
    let limits = gpu.upload_f32(&limits.collect::<Vec<f32>>())?;
    let top_k: Vec<u32> = rows.iter().map(|(_, draw)| draw.top_k).collect();
    let top_k = gpu.upload(&top_k)?;
    let found = gpu.empty(DType::U32, rows.len())?;
    let args = [
        x.into(),
        (&numbers).into(),
        (&limits).into(),
        (&top_k).into(),
        (&found).into(),
        Arg::int(n)?,
    ];
    launch("draw_f32", rows.len()).run(gpu, &args)?;
    read(gpu, &found)
}

fn launch(kernel: &str, rows: usize) -> Launch {
    Launch {
        kernel: kernel.into(),
        grid: [rows, 1, 1],
        threads: THREADS,
        shared: 0,
    }
}

fn read<G: Gpu>(gpu: &G, found: &G::Array) -> Result<Vec<Option<u32>>> {
    let mut places = vec![0u32; found.len()];
    gpu.read(found, 0, bytemuck::cast_slice_mut(&mut places))?;
    let known = |place: u32| (place != u32::MAX).then_some(place);
    Ok(places.into_iter().map(known).collect())
}
