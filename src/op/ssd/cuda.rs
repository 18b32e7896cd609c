//! Launches of the state-space dual.

use candle_core::{DType, Layout, Result, bail};

use super::{Documents, LARGEST, SsdShape};
use crate::op::cuda::{Arg, Array, Gpu, Launch, named, pack, starts, sum_rows};

/// Positions of a chunk, whatever the shape says.
const CHUNK: usize = 64;
/// Threads of a block.
const THREADS: usize = 128;
/// Entries of x and of B and C that kernels are compiled for; smaller ones are filled up.
const SIZES: [usize; 3] = [32, 64, LARGEST];
/// Columns of a state that are worked on at a time.
const PIECE: usize = 64;

/// A view `[B, T, C]`, rows contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, A> {
    pub entries: &'a A,
    /// `[B, T, C]`
    pub dims: [usize; 3],
    /// Of batch and row.
    pub strides: [usize; 2],
}

impl<'a, A> Rows<'a, A> {
    pub fn of(entries: &'a A, layout: &Layout) -> Result<Self> {
        let (b, t, c) = layout.shape().dims3()?;
        match layout.stride() {
            &[batch, row, 1] => Ok(Self {
                entries,
                dims: [b, t, c],
                strides: [batch, row],
            }),
            _ => bail!("an operand with a contiguous last axis is wanted, not {layout:?}"),
        }
    }
}

pub struct Ssd<'a, G: Gpu> {
    pub gpu: &'a G,
    /// `[B, T, G·P + G·N + H·N]`
    pub xbc: Rows<'a, G::Array>,
    /// `[B, T, H]`, in f32.
    pub dt: Rows<'a, G::Array>,
    /// `[3, H]`, in f32.
    pub params: &'a G::Array,
    pub shape: SsdShape,
    pub documents: Option<&'a Documents>,
}

/// Kernels by the rows that they keep in shared memory, of 64 positions each.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    States,
    Outputs,
    BackStates,
    BackReads,
    BackX,
    BackB,
}

impl<G: Gpu> Ssd<'_, G> {
    fn chunks(&self) -> usize {
        self.xbc.dims[1].div_ceil(CHUNK)
    }

    /// Entries of the states of all chunks.
    fn states(&self) -> usize {
        let SsdShape {
            heads,
            head_dim,
            d_state,
            ..
        } = self.shape;
        self.xbc.dims[0] * self.chunks() * heads * head_dim * d_state
    }

    fn launch(&self, kernel: Kernel) -> Result<Launch> {
        let dtype = self.xbc.entries.dtype();
        let SsdShape {
            heads,
            groups,
            head_dim,
            d_state,
            ..
        } = self.shape;
        let widest = head_dim.max(d_state);
        let Some(size) = SIZES.into_iter().find(|size| widest <= *size) else {
            bail!("ssd: no kernel for {head_dim} entries of x and {d_state} of a state");
        };
        // `Shared` there.
        let rows = CHUNK * (size + pack(dtype));
        let pieces = rows.max(size * (size.min(PIECE) + pack(dtype)));
        let room = match dtype {
            DType::F32 => CHUNK * (CHUNK + 4),
            _ => 0,
        };
        let (stem, heads, entries) = match kernel {
            Kernel::States => ("ssd_states", heads, 2 * rows),
            Kernel::Outputs => ("ssd", heads, 3 * rows + room),
            Kernel::BackStates => ("ssd_back_states", heads, 2 * rows),
            Kernel::BackReads => ("ssd_back_reads", heads, 2 * rows + pieces + room),
            Kernel::BackX => ("ssd_back_x", groups, 3 * rows + room),
            Kernel::BackB => ("ssd_back_b", groups, 4 * rows + room),
        };
        Ok(Launch {
            kernel: named(&format!("{stem}_{size}"), dtype),
            grid: [self.chunks(), heads, self.xbc.dims[0]],
            threads: THREADS as u32,
            shared: entries * dtype.size_in_bytes(),
        })
    }

    /// What all kernels but `pass` begin with.
    fn operands<'a>(&'a self, starts: Option<&'a G::Array>) -> Result<Vec<Arg<'a, G::Array>>> {
        let s = self.shape;
        let mut args = vec![
            self.xbc.entries.into(),
            self.dt.entries.into(),
            self.params.into(),
            Arg::or_null(starts),
        ];
        let strides = self.xbc.strides.iter().chain(&self.dt.strides);
        args.extend(strides.map(|stride| Arg::long(*stride)));
        for size in [self.xbc.dims[1], s.heads, s.groups, s.head_dim, s.d_state] {
            args.push(Arg::int(size)?);
        }
        Ok(args)
    }

    /// What every chunk adds becomes what enters it, or, back, what leaves it.
    fn pass(&self, kernel: &str, states: &G::Array, through: &G::Array) -> Result<()> {
        let SsdShape {
            heads,
            head_dim,
            d_state,
            ..
        } = self.shape;
        let mut launch = Launch::elements(kernel, head_dim * d_state, 1);
        launch.grid[1..].copy_from_slice(&[heads, self.xbc.dims[0]]);
        let mut args = vec![states.into(), through.into(), Arg::Null, Arg::Null];
        for size in [self.chunks(), heads, head_dim * d_state] {
            args.push(Arg::int(size)?);
        }
        launch.run(self.gpu, &args)
    }

    /// `y [B, T, H·P]`, and the states that enter the chunks, `[B, chunks, H, P, N]` in f32.
    pub fn forward(&self) -> Result<[G::Array; 2]> {
        let (gpu, [b, t, _], heads) = (self.gpu, self.xbc.dims, self.shape.heads);
        let starts = starts(gpu, self.documents)?;
        let entering = gpu.empty(DType::F32, self.states())?;
        let through = gpu.empty(DType::F32, b * self.chunks() * heads)?;
        let mut args = self.operands(starts.as_ref())?;
        args.extend([(&entering).into(), (&through).into()]);
        self.launch(Kernel::States)?.run(gpu, &args)?;
        self.pass("ssd_pass", &entering, &through)?;
        let y = gpu.empty(
            self.xbc.entries.dtype(),
            b * t * heads * self.shape.head_dim,
        )?;
        let mut args = self.operands(starts.as_ref())?;
        args.extend([(&entering).into(), (&y).into()]);
        self.launch(Kernel::Outputs)?.run(gpu, &args)?;
        Ok([y, entering])
    }

    /// Gradients of `xbc [B, T, channels]`, of dt `[B, T, H]` and of params `[3, H]` from `dy [B, T, H·P]`, contiguous, and the states that
    /// entered the chunks.
    pub fn backward(&self, dy: &G::Array, entering: &G::Array) -> Result<[G::Array; 3]> {
        let (gpu, [b, t, _], heads) = (self.gpu, self.xbc.dims, self.shape.heads);
        let starts = starts(gpu, self.documents)?;
        let leaving = gpu.empty(DType::F32, self.states())?;
        let through = gpu.empty(DType::F32, b * self.chunks() * heads)?;
        let run = |kernel: Kernel, more: &[&G::Array]| -> Result<()> {
            let mut args = self.operands(starts.as_ref())?;
            args.push(dy.into());
            args.extend(more.iter().map(|array| Arg::from(*array)));
            self.launch(kernel)?.run(gpu, &args)
        };
        run(Kernel::BackStates, &[&leaving, &through])?;
        self.pass("ssd_back_pass", &leaving, &through)?;
        let dxbc = gpu.empty(self.xbc.entries.dtype(), b * t * self.shape.channels())?;
        let reads = gpu.empty(DType::F32, b * heads * t)?;
        run(Kernel::BackReads, &[entering, &dxbc, &reads])?;
        run(Kernel::BackX, &[&leaving, &dxbc])?;
        let ddt = gpu.empty(DType::F32, b * t * heads)?;
        let parts = gpu.empty(DType::F32, b * self.chunks() * 3 * heads)?;
        let more = [entering, &leaving, &reads, &dxbc, &ddt, &parts];
        run(Kernel::BackB, &more)?;
        let dparams = sum_rows(gpu, &parts, 3 * heads, DType::F32)?;
        Ok([dxbc, ddt, dparams])
    }
}
