//! Launches of attention over pages.

use candle_core::{DType, Result, bail};

use crate::op::cuda::{Arg, Array, Gpu, Launch, Places};

/// Positions of a page.
const PAGE: usize = 32;
/// Of a block: the most for which it has shared memory.
const WARPS: [usize; 2] = [4, 2];
/// Blocks that a launch is split into: some for each multiprocessor of the largest devices.
const BLOCKS: usize = 512;
/// Parts into which positions are split, at most, and the pages that a part has at least.
const SPLITS: usize = 64;
const PAGES: usize = 8;

/// How a row of a page is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    F32,
    F16,
    Int8,
}

impl Kept {
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// A kernel's sizes: entries of keys and of values, tiles of 16 queries.
#[derive(Debug, Clone, Copy)]
struct Size {
    name: &'static str,
    k: usize,
    v: usize,
    tiles: usize,
    latent: bool,
}

const fn size(name: &'static str, k: usize, v: usize, tiles: usize, latent: bool) -> Size {
    Size {
        name,
        k,
        v,
        tiles,
        latent,
    }
}

/// The table at the end of `kernel.cuh`.
const SIZES: [Size; 4] = [
    size("paged_attention_64_64", 64, 64, 1, false),
    size("paged_attention_128_128", 128, 128, 1, false),
    size("paged_latents_160_128", 160, 128, 2, true),
    size("paged_latents_224_160", 224, 160, 2, true),
];

impl Size {
    /// Bytes of shared memory of so many warps; `Shared` there.
    fn shared(&self, kept: Kept, warps: usize) -> usize {
        let (bytes, stages) = match kept {
            Kept::F32 => (4, 1),
            Kept::F16 | Kept::Int8 => (2, 2),
        };
        let rows = 16 * self.tiles;
        let pitch = |dim: usize| dim + 16 / bytes;
        let values = if self.latent { 0 } else { pitch(self.v) };
        let room = match kept {
            Kept::F32 => rows * (PAGE + 4),
            Kept::F16 | Kept::Int8 => 0,
        };
        let own = stages * PAGE * (pitch(self.k) + values) + room;
        let loaded = bytes * (rows * pitch(self.k) + warps * own);
        loaded.max(4 * rows * self.v) + 4 * 2 * WARPS[0] * rows
    }
}

/// Heads that read pages.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// `H`
    pub heads: usize,
    /// Groups of heads; group `g` reads its keys from plane `g`, or all from the only one.
    pub groups: usize,
    pub dim: usize,
    pub v_dim: usize,
    /// The plane of the first group's values; none: a value is the beginning of its key, and there is one plane.
    pub values: Option<usize>,
    pub scale: f32,
}

impl Heads {
    fn size(&self) -> Result<Size> {
        let fits = |size: &&Size| {
            size.latent == self.values.is_none() && self.dim <= size.k && self.v_dim <= size.v
        };
        match SIZES.iter().find(fits) {
            Some(size) => Ok(*size),
            None => bail!(
                "cuda: no kernel for a cache of keys of {} entries and values of {}{}: choose --device cpu",
                self.dim,
                self.v_dim,
                if self.values.is_none() {
                    " in them"
                } else {
                    ""
                }
            ),
        }
    }

    /// Neighbouring tokens of a sequence that a block has together.
    ///
    /// # Errors
    /// Heads that no kernel has room for.
    pub fn together(&self) -> Result<usize> {
        let rows = 16 * self.size()?.tiles;
        Ok((rows * self.groups / self.heads).max(1))
    }
}

/// Rows of planes as they are kept.
#[derive(Debug, Clone, Copy)]
pub struct Planes {
    pub kept: Kept,
    pub row_bytes: usize,
}

/// Every token's row of the planes from `first` on: `a [N, planes, A]`, and behind it `b [N, planes, B]`.
pub fn write<G: Gpu>(
    gpu: &G,
    places: &Places<G::Array>,
    planes: Planes,
    [first, count]: [usize; 2],
    a: &G::Array,
    b: Option<&G::Array>,
) -> Result<()> {
    let rows = places.lengths.len() * count;
    let width = |x: &G::Array| x.len() / rows.max(1);
    let launch = Launch {
        kernel: format!("paged_write_{}", planes.kept.name()),
        grid: [places.lengths.len(), count, 1],
        threads: 32,
        shared: 0,
    };
    let args = [
        places.memory.into(),
        places.pages.into(),
        places.owners.into(),
        places.lengths.into(),
        a.into(),
        Arg::or_null(b),
        Arg::int(places.width())?,
        Arg::long(places.unit),
        Arg::int(places.layer_at)?,
        Arg::int(planes.row_bytes)?,
        Arg::int(first)?,
        Arg::int(width(a))?,
        Arg::int(b.map_or(0, width))?,
    ];
    launch.run(gpu, &args)
}

/// `q [N, H, K]` → `[N, H, V]`: what every token sees, its own row among it. `tiles [Z, 3]` has the tokens that a block has together, at
/// most [`Heads::together`]: the sequence, the first token, their number.
///
/// # Errors
/// Heads that no kernel has room for.
pub fn attend<G: Gpu>(
    gpu: &G,
    places: &Places<G::Array>,
    tiles: &G::Array,
    planes: Planes,
    heads: &Heads,
    q: &G::Array,
) -> Result<G::Array> {
    let size = heads.size()?;
    let tokens = places.lengths.len();
    let blocks = {
        let rows = 16 * size.tiles;
        let own = (heads.heads / heads.groups).div_ceil(rows);
        [heads.groups * own, tiles.len() / 3]
    };
    // As long as there are blocks to be had, and pages for them.
    let wanted = BLOCKS.div_ceil((blocks[0] * blocks[1]).max(1));
    let splits = wanted.min(places.width().div_ceil(PAGES)).clamp(1, SPLITS);
    let parts = gpu.empty(DType::F32, tokens * heads.heads * splits * heads.v_dim)?;
    let sums = gpu.empty(DType::F32, tokens * heads.heads * splits * 2)?;
    let fits = |warps: &usize| size.shared(planes.kept, *warps) <= gpu.shared_memory();
    let [_, fewest] = WARPS;
    let warps = WARPS.into_iter().find(fits).unwrap_or(fewest);
    let launch = Launch {
        kernel: format!("{}_{}_f32", size.name, planes.kept.name()),
        grid: [splits, blocks[0], blocks[1]],
        threads: 32 * warps as u32,
        shared: size.shared(planes.kept, warps),
    };
    let args = [
        places.memory.into(),
        places.pages.into(),
        tiles.into(),
        places.lengths.into(),
        q.into(),
        (&parts).into(),
        (&sums).into(),
        Arg::int(places.width())?,
        Arg::long(places.unit),
        Arg::int(places.layer_at)?,
        Arg::int(planes.row_bytes)?,
        Arg::int(heads.values.unwrap_or(0))?,
        Arg::int(heads.heads)?,
        Arg::int(heads.groups)?,
        Arg::int(heads.dim)?,
        Arg::int(heads.v_dim)?,
        heads.scale.into(),
    ];
    launch.run(gpu, &args)?;
    let y = gpu.empty(DType::F32, tokens * heads.heads * heads.v_dim)?;
    let combine = Launch {
        kernel: "paged_combine_f32".into(),
        grid: [tokens * heads.heads, 1, 1],
        threads: heads.v_dim.next_multiple_of(32).min(128) as u32,
        shared: 0,
    };
    let args = [
        (&parts).into(),
        (&sums).into(),
        (&y).into(),
        Arg::int(splits)?,
        Arg::int(heads.v_dim)?,
    ];
    combine.run(gpu, &args)?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::cuda::emulated::SMALLER;

    /// Text is generated on every device since Ampere.
    #[test]
    fn fewer_warps_fit_where_there_is_little_shared_memory() {
        let [most, fewest] = WARPS;
        for size in SIZES {
            for kept in [Kept::F32, Kept::F16, Kept::Int8] {
                let bytes = size.shared(kept, fewest);
                assert!(
                    bytes <= SMALLER && bytes < size.shared(kept, most),
                    "{size:?} {kept:?}: {bytes}"
                );
            }
        }
    }
}
