//! The one loop of the recurrence, forward and backward: a decaying state in vector registers.

use crate::op::cpu::fma;

pub(super) const LANES: usize = 16;

#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(super) struct Lanes(pub [f32; LANES]);

impl Lanes {
    pub(super) const ZERO: Self = Lanes([0.; LANES]);

    /// The sum of the entries, by halves.
    #[inline(always)]
    pub(super) fn sum(mut self) -> f32 {
        for half in [8, 4, 2, 1] {
            for l in 0..half {
                self.0[l] += self.0[l + half];
            }
        }
        self.0[0]
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

    /// The product of two rows.
    #[inline(always)]
    pub(super) fn dot(&self, other: &Self, t: usize) -> f32 {
        let mut sum = Lanes::ZERO;
        for (a, b) in self.row(t).iter().zip(other.row(t)) {
            for l in 0..LANES {
                sum.0[l] = fma(a.0[l], b.0[l], sum.0[l]);
            }
        }
        sum.sum()
    }
}

/// Over `positions` in their order: `S ← decay S + outer ⊗ spread`, then `out += readᵀ S`.
///
/// The state has a row of lanes per entry of `outer` and `read`; its lanes run along `spread` and
/// `out`. So all products are down the rows and no sum runs across a vector: forward, the gradients of
/// C, of x and of B are this loop with the roles exchanged.
#[inline(always)]
pub(super) fn sweep(
    state: &mut [Tile],
    positions: impl Iterator<Item = usize> + Clone,
    decay: &[f32],
    [outer, read]: [&Panel; 2],
    spread: &Panel,
    out: &mut Panel,
) {
    for (i, tiles) in state.chunks_exact_mut(spread.width).enumerate() {
        for (j, tile) in tiles.iter_mut().enumerate() {
            let mut s = *tile;
            for t in positions.clone() {
                let decay = decay[t];
                let (outer, read) = (&outer.row(t)[i], &read.row(t)[i]);
                let spread = &spread.row(t)[j];
                // Two sums, so that an addition need not wait for the one before.
                let mut sums = [Lanes::ZERO; 2];
                for row in 0..LANES {
                    let sum = &mut sums[row % 2];
                    for l in 0..LANES {
                        let next = fma(s[row].0[l], decay, outer.0[row] * spread.0[l]);
                        s[row].0[l] = next;
                        sum.0[l] = fma(read.0[row], next, sum.0[l]);
                    }
                }
                let out = &mut out.row_mut(t)[j];
                for l in 0..LANES {
                    out.0[l] += sums[0].0[l] + sums[1].0[l];
                }
            }
            *tile = s;
        }
    }
}

/// `Σ a · b` over all entries, in f64 across tiles.
pub(super) fn inner_product(a: &[Tile], b: &[Tile]) -> f64 {
    let products = a.as_flattened().iter().zip(b.as_flattened());
    products
        .map(|(a, b)| Lanes(std::array::from_fn(|l| a.0[l] * b.0[l])).sum() as f64)
        .sum()
}
