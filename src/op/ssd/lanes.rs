//! The one loop of the recurrence, forward and backward: a decaying state in vector registers.

use crate::op::cpu::fma;
use crate::op::isa::vectorised;

pub(super) const LANES: usize = 16;

#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Lanes(pub [f32; LANES]);

impl Lanes {
    pub(super) const ZERO: Self = Lanes([0.; LANES]);

    #[inline(always)]
    pub(super) fn with(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Lanes(std::array::from_fn(|l| f(self.0[l], other.0[l])))
    }

    /// `self · other + sum`
    #[inline(always)]
    fn times(self, other: Self, sum: Self) -> Self {
        Lanes(std::array::from_fn(|l| {
            fma(self.0[l], other.0[l], sum.0[l])
        }))
    }

    #[inline(always)]
    pub(super) fn scaled(self, factor: f32) -> Self {
        Lanes(self.0.map(|x| factor * x))
    }

    /// The sum of the entries, by halves.
    #[inline(always)]
    pub(super) fn sum(self) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|l| self.0[l] + self.0[l + 8]);
        let four: [f32; 4] = std::array::from_fn(|l| eight[l] + eight[l + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
}

/// 16 × 16 entries of a state: what a register file holds.
pub(super) type Tile = [Lanes; LANES];

/// Rows `[T, K]` in whole lanes, zeros behind `K`.
#[derive(Debug)]
pub(super) struct Panel {
    lanes: Vec<Lanes>,
    /// Lanes a row.
    pub width: usize,
}

impl Panel {
    pub(super) fn zeros(rows: usize, k: usize) -> Self {
        let width = k.div_ceil(LANES);
        Self {
            lanes: vec![Lanes::ZERO; rows * width],
            width,
        }
    }

    #[inline(always)]
    pub(super) fn row(&self, t: usize) -> &[Lanes] {
        &self.lanes[t * self.width..][..self.width]
    }

    #[inline(always)]
    pub(super) fn row_mut(&mut self, t: usize) -> &mut [Lanes] {
        &mut self.lanes[t * self.width..][..self.width]
    }

    /// Rows of `k` entries, whatever stood there before.
    pub(super) fn resize(&mut self, rows: usize, k: usize) {
        self.width = k.div_ceil(LANES);
        self.lanes.clear();
        self.lanes.resize(rows * self.width, Lanes::ZERO);
    }

    pub(super) fn clear(&mut self) {
        self.lanes.fill(Lanes::ZERO);
    }

    /// Row `t` ← `values [K]`.
    #[inline(always)]
    pub(super) fn load(&mut self, t: usize, values: &[f32]) {
        let (full, rest) = values.as_chunks::<LANES>();
        let row = self.row_mut(t);
        for (lanes, full) in row.iter_mut().zip(full) {
            lanes.0 = *full;
        }
        if !rest.is_empty() {
            row[full.len()].0[..rest.len()].copy_from_slice(rest);
        }
    }

    /// `values [K]` ← row `t`.
    #[inline(always)]
    pub(super) fn store(&self, t: usize, values: &mut [f32]) {
        let (full, rest) = values.as_chunks_mut::<LANES>();
        let row = self.row(t);
        for (lanes, full) in row.iter().zip(full.iter_mut()) {
            *full = lanes.0;
        }
        if !rest.is_empty() {
            rest.copy_from_slice(&row[full.len()].0[..rest.len()]);
        }
    }

    /// The product of row `t` of two panels.
    #[inline(always)]
    pub(super) fn dot(&self, other: &Self, t: usize) -> f32 {
        let pairs = self.row(t).iter().zip(other.row(t));
        pairs
            .fold(Lanes::ZERO, |sum, (&a, &b)| a.times(b, sum))
            .sum()
    }

    #[inline(always)]
    fn at(&self, t: usize, i: usize) -> Lanes {
        self.lanes[t * self.width + i]
    }
}

/// What a sweep reads: for every position the state's factor and three vectors.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub decay: &'a [f32],
    pub outer: &'a Panel,
    pub spread: &'a Panel,
    pub read: &'a Panel,
}

/// Over the positions in their order: `S ← decay S + outer ⊗ spread`, then `out += readᵀ S`, for the
/// tile of `S` at lanes `i` of `outer` and `read`, lanes `j` of `spread` and `out`. `visit` sees every
/// new state.
///
/// The rows of the tile belong to entries of `outer` and `read`, its lanes run along `spread` and `out`:
/// no sum runs across a vector. The output and the gradients of C, of x and of B are all this loop with
/// the roles exchanged.
#[inline(always)]
fn sweep(
    tile: &mut Tile,
    [i, j]: [usize; 2],
    positions: impl Iterator<Item = usize>,
    Inputs {
        decay,
        outer,
        spread,
        read,
    }: Inputs,
    out: &mut Panel,
    mut visit: impl FnMut(usize, &Tile),
) {
    let mut s = *tile;
    for t in positions {
        let decay = decay[t];
        let (outer, read, spread) = (outer.at(t, i), read.at(t, i), spread.at(t, j));
        let out = &mut out.row_mut(t)[j];
        // Two sums, so that an addition need not wait for the one before.
        let mut sums = [*out, Lanes::ZERO];
        for row in 0..LANES {
            let (outer, read) = (outer.0[row], read.0[row]);
            s[row] = s[row].with(spread, |s, spread| fma(s, decay, outer * spread));
            sums[row % 2] = s[row].with(sums[row % 2], |s, sum| fma(read, s, sum));
        }
        visit(t, &s);
        *out = sums[0].with(sums[1], |a, b| a + b);
    }
    *tile = s;
}

// The sweeps in use, each compiled alone: inlined side by side they lose their registers.

pub(super) fn forward(
    tile: &mut Tile,
    at: [usize; 2],
    len: usize,
    inputs: Inputs,
    out: &mut Panel,
) {
    vectorised!(sweep(tile, at, 0..len, inputs, out, |_, _| {}))
}

/// Keeps the states: `trace[t + 1]` after position `t`, with the first `trace[0]` before it.
pub(super) fn forward_tracing(trace: &mut [Tile], at: [usize; 2], inputs: Inputs, out: &mut Panel) {
    let Some((first, trace)) = trace.split_first_mut() else {
        return;
    };
    let mut state = *first;
    vectorised!(sweep(
        &mut state,
        at,
        0..trace.len(),
        inputs,
        out,
        #[inline(always)]
        |t, state| trace[t] = *state
    ))
}

pub(super) fn backward(
    tile: &mut Tile,
    at: [usize; 2],
    len: usize,
    inputs: Inputs,
    out: &mut Panel,
) {
    vectorised!(sweep(tile, at, (0..len).rev(), inputs, out, |_, _| {}))
}

/// Adds to `products[t]` the product of the tile with `trace[t]`, in lanes.
pub(super) fn backward_against(
    trace: &[Tile],
    products: &mut [Lanes],
    tile: &mut Tile,
    at: [usize; 2],
    inputs: Inputs,
    out: &mut Panel,
) {
    vectorised!(sweep(
        tile,
        at,
        (0..products.len()).rev(),
        inputs,
        out,
        #[inline(always)]
        |t, state| {
            let mut sums = [products[t], Lanes::ZERO];
            for row in 0..LANES {
                sums[row % 2] = state[row].times(trace[t][row], sums[row % 2]);
            }
            products[t] = sums[0].with(sums[1], |a, b| a + b);
        },
    ))
}

#[inline(always)]
pub(super) fn transposed(tile: &Tile) -> Tile {
    std::array::from_fn(|i| Lanes(std::array::from_fn(|j| tile[j].0[i])))
}
