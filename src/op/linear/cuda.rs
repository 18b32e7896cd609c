//! Matrices on a GPU as decoding reads them, and launches of their products. Activations are f32.

use candle_core::{DType, Result};
use half::bf16;

use super::{Storage, Stored};
use crate::op::blocks::BlockType;
use crate::op::cuda::{Arg, Array, Gpu, Launch};

/// How entries stand on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    Bf16,
    F8,
    Q8_0,
    Q4K,
}

impl Kind {
    /// As they are stored; what has no kernel is widened to bf16.
    fn of(storage: Storage) -> Self {
        match storage {
            Storage::F32 => Self::F32,
            Storage::F8E4M3 => Self::F8,
            Storage::Blocks(BlockType::Q8_0) => Self::Q8_0,
            Storage::Blocks(BlockType::Q4K) => Self::Q4K,
            Storage::Bf16 | Storage::F16 | Storage::Blocks(_) => Self::Bf16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F8 => "f8_e4m3",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }

    fn entry(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F8 | Self::Q8_0 | Self::Q4K => DType::U8,
        }
    }

    /// Rows of activations up to which the matrix is read as it stands, by our kernel; more go to the device's own products.
    fn few(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => ROWS,
            // Widened it would be written and read once more.
            Self::F8 | Self::Q8_0 | Self::Q4K => 4 * ROWS,
        }
    }
}

/// Rows of activations that share one reading of the matrix.
const ROWS: usize = 8;
/// Entries of a row that a warp takes at once (`STEP` there), and warps of a block.
const STEP: usize = 256;
const WARPS: usize = 4;
/// Entries that are widened on the host at a time.
const PIECE: usize = 1 << 22;

/// Bytes before a row of 8 bits, which begin with its scale, and of which it is a multiple.
const SCALE: usize = 16;

/// Rows of 8 bits as the kernels read them: each behind its scale, in f32.
fn with_scales(w: &Stored) -> Vec<u8> {
    let width = w.width();
    let row = SCALE + width.next_multiple_of(SCALE);
    let mut bytes = vec![0; w.rows() * row];
    for (i, (to, codes)) in (bytes
        .chunks_exact_mut(row)
        .zip(w.bytes().chunks_exact(width)))
    .enumerate()
    {
        let scale = w.scales().map_or(1., |scales| scales[i]);
        to[..4].copy_from_slice(&scale.to_le_bytes());
        to[SCALE..][..width].copy_from_slice(codes);
    }
    bytes
}

/// `[N, K]`
#[derive(Debug)]
pub struct Weight<A> {
    entries: A,
    kind: Kind,
    rows: usize,
    width: usize,
}

impl<A: Array> Weight<A> {
    pub fn new<G: Gpu<Array = A>>(gpu: &G, w: &Stored) -> Result<Self> {
        let (kind, rows, width) = (Kind::of(w.storage()), w.rows(), w.width());
        let same = kind.name() == w.storage().name();
        let each = (PIECE / width).clamp(1, rows.max(1));
        let pieces = (0..rows).step_by(each);
        let pieces = pieces.map(|first| (first, each.min(rows - first)));
        let entries = match (kind, same) {
            (Kind::F8, _) => {
                let row = SCALE + width.next_multiple_of(SCALE);
                let entries = gpu.empty(DType::U8, rows * row)?;
                for (first, count) in pieces {
                    gpu.write(&entries, first * row, &with_scales(&w.slice(first, count)?))?;
                }
                entries
            }
            (_, true) => gpu.upload_bytes(kind.entry(), w.bytes())?,
            (_, false) => {
                let entries = gpu.empty(DType::BF16, rows * width)?;
                for (first, count) in pieces {
                    let mut wide = vec![0.; count * width];
                    w.storage().widen(w.slice(first, count)?.bytes(), &mut wide);
                    let bytes = wide.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes());
                    let bytes: Vec<u8> = bytes.collect();
                    gpu.write(&entries, 2 * first * width, &bytes)?;
                }
                entries
            }
        };
        Ok(Self {
            entries,
            kind,
            rows,
            width,
        })
    }

    /// `x [M, K]` → `x wᵀ [M, N]`. Up to [`ROWS`] rows (of block types four times as many) a row's entries are the same whatever is
    /// multiplied beside it.
    pub fn product<G: Gpu<Array = A>>(&self, gpu: &G, x: &A) -> Result<A> {
        let m = x.len() / self.width;
        if m > self.kind.few() {
            let rounded = || rounded(gpu, x, self.width);
            return match self.kind {
                Kind::F32 => gpu.product(x, &self.entries, self.width),
                Kind::Bf16 => gpu.product(&rounded()?, &self.entries, self.width),
                Kind::F8 | Kind::Q8_0 | Kind::Q4K => {
                    gpu.product(&rounded()?, &self.to_bf16(gpu)?, self.width)
                }
            };
        }
        let y = gpu.empty(DType::F32, m * self.rows)?;
        let rows = m.next_power_of_two().min(ROWS);
        let outs = if rows == 1 { 2 } else { 4 };
        let launch = Launch {
            kernel: format!("product_{rows}_{}", self.kind.name()),
            grid: [self.rows.div_ceil(WARPS * outs), m.div_ceil(rows), 1],
            threads: 32 * WARPS as u32,
            shared: 0,
        };
        let args = [
            (&self.entries).into(),
            x.into(),
            (&y).into(),
            Arg::int(m)?,
            Arg::int(self.rows)?,
            Arg::int(self.width)?,
        ];
        launch.run(gpu, &args)?;
        Ok(y)
    }

    /// Rows `ids [M]`, all of which are there, times `factor`: `[M, K]`.
    pub fn gather<G: Gpu<Array = A>>(&self, gpu: &G, ids: &A, factor: f32) -> Result<A> {
        self.as_rows()
            .gather(gpu, Some(ids), ids.len(), DType::F32, factor)
    }

    fn to_bf16<G: Gpu<Array = A>>(&self, gpu: &G) -> Result<A> {
        self.as_rows().gather(gpu, None, self.rows, DType::BF16, 1.)
    }

    fn as_rows(&self) -> Rows<'_, A> {
        Rows {
            entries: &self.entries,
            kind: self.kind,
            width: self.width,
        }
    }
}

/// Rows `ids [M]` of `x [.., K]` in f32, all of which are there: `[M, K]`.
pub fn gather<G: Gpu>(gpu: &G, x: &G::Array, ids: &G::Array, width: usize) -> Result<G::Array> {
    let rows = Rows {
        entries: x,
        kind: Kind::F32,
        width,
    };
    rows.gather(gpu, Some(ids), ids.len(), DType::F32, 1.)
}

/// Activations in bf16.
fn rounded<G: Gpu>(gpu: &G, x: &G::Array, width: usize) -> Result<G::Array> {
    let rows = Rows {
        entries: x,
        kind: Kind::F32,
        width,
    };
    rows.gather(gpu, None, x.len() / width, DType::BF16, 1.)
}

/// Rows of a matrix, however it is kept.
struct Rows<'a, A> {
    entries: &'a A,
    kind: Kind,
    width: usize,
}

impl<A: Array> Rows<'_, A> {
    fn gather<G: Gpu<Array = A>>(
        &self,
        gpu: &G,
        ids: Option<&A>,
        count: usize,
        dtype: DType,
        factor: f32,
    ) -> Result<A> {
        let y = gpu.empty(dtype, count * self.width)?;
        let warps = self.width.div_ceil(STEP);
        let launch = Launch {
            kernel: format!("gather_{}_{}", self.kind.name(), dtype.as_str()),
            grid: [count, warps.div_ceil(WARPS), 1],
            threads: 32 * warps.min(WARPS) as u32,
            shared: 0,
        };
        let args = [
            self.entries.into(),
            Arg::or_null(ids),
            (&y).into(),
            Arg::int(self.width)?,
            factor.into(),
        ];
        launch.run(gpu, &args)?;
        Ok(y)
    }
}

/// Matrices `[G, I, O]` in f32, of which every group of heads has one.
#[derive(Debug)]
pub struct Groups<A> {
    pub entries: A,
    /// `G`, `I`, `O`
    pub dims: [usize; 3],
}

impl<A: Array> Groups<A> {
    /// The first `I` entries of `x [N, H, X]` times their group's matrix, and behind them the next `tail` of `x` as they are:
    /// `[N, H, O + tail]`.
    pub fn product<G: Gpu<Array = A>>(
        &self,
        gpu: &G,
        x: &A,
        [heads, width]: [usize; 2],
        tail: usize,
    ) -> Result<A> {
        /// Rows that read a matrix together, and columns of a block.
        const TOGETHER: usize = 8;
        const COLUMNS: usize = 128;
        let [groups, ins, outs] = self.dims;
        let n = x.len() / (heads * width);
        let y = gpu.empty(DType::F32, n * heads * (outs + tail))?;
        let columns = (outs + tail).min(COLUMNS).next_multiple_of(32);
        let launch = Launch {
            kernel: "group_product".into(),
            grid: [(outs + tail).div_ceil(columns), heads, n.div_ceil(TOGETHER)],
            threads: columns as u32,
            shared: 0,
        };
        let args = [
            x.into(),
            (&self.entries).into(),
            (&y).into(),
            Arg::int(n)?,
            Arg::int(heads / groups)?,
            Arg::int(width)?,
            Arg::int(ins)?,
            Arg::int(outs)?,
            Arg::int(tail)?,
        ];
        launch.run(gpu, &args)?;
        Ok(y)
    }
}

/// `x += factor · y`, where it stands.
pub fn add_scaled<G: Gpu>(gpu: &G, x: &G::Array, y: &G::Array, factor: f32) -> Result<()> {
    let args = [x.into(), y.into(), Arg::long(x.len()), factor.into()];
    Launch::elements("add_scaled", x.len(), 1).run(gpu, &args)
}

/// Adds `bias` to every row of `x`, where it stands.
pub fn add_bias<G: Gpu>(gpu: &G, x: &G::Array, bias: &G::Array) -> Result<()> {
    let args = [
        x.into(),
        bias.into(),
        Arg::long(x.len()),
        Arg::int(bias.len())?,
    ];
    Launch::elements("add_bias", x.len(), 1).run(gpu, &args)
}
