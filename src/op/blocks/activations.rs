//! Activations rounded to 8 bits, as products with blocks take them.

use crate::op::isa::{Isa, Level, vectorised};
use crate::op::team::fill;

/// Entries that share a scale.
pub(super) const GROUP: usize = 32;
/// Rows are filled up with zeros to whole numbers of this, which the vector paths read at once.
pub(super) const PADDED: usize = 512;
/// Rows of a tile, which they are filled up to whole numbers of with rows of zeros.
pub(super) const TILE: usize = 16;
/// Rows from which on weights are unpacked in panels for all of them.
pub(super) const MANY: usize = 4;

/// Entries below which other threads are not worth waking.
const ALONE: usize = 1 << 14;

/// 1.5 · 2²³: adding it rounds to an integer (ties to even), which the low bits of the sum then hold.
const ROUND: f32 = 12_582_912.;

/// Rows of a matrix `[M, K]` as `scale · q`, `q` in −127 to 127, a scale for every 32 entries of a row. Rows are filled up with zeros to
/// a whole number of [`PADDED`], their number to one of [`TILE`].
#[derive(Default)]
pub struct Activations {
    pub width: usize,
    rows: usize,
    codes: Vec<i8>,
    /// One a group.
    scales: Vec<f32>,
    /// One a group: `scale · Σ q`, what a weight's constant part is multiplied by.
    sums: Vec<f32>,
    /// One for every four codes: `−Σ q`, what an offset of unsigned codes is multiplied by.
    negated: Vec<i32>,
    /// The same of a whole group.
    negated_groups: Vec<i32>,
    /// The codes in 16 bits where there are [`MANY`] rows, of every four in the order 0, 2, 1, 3.
    wide: Vec<i16>,
    /// The codes once more where tiles multiply them: `[rows / TILE, groups, TILE, GROUP]`.
    tiles: Vec<i8>,
}

/// A row that is being filled.
struct Coded<'a> {
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    negated: &'a mut [i32],
    negated_groups: &'a mut [i32],
    wide: &'a mut [i16],
}

/// One row of [`Activations`].
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub codes: &'a [i8],
    pub scales: &'a [f32],
    pub sums: &'a [f32],
    /// Only where vector paths ask for it.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub negated: &'a [i32],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub negated_groups: &'a [i32],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub wide: &'a [i16],
}

impl<'a> Row<'a> {
    /// From `entry` on, the first of a group.
    #[inline]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub fn from(self, entry: usize) -> Self {
        Self {
            codes: &self.codes[entry..],
            scales: &self.scales[entry / GROUP..],
            sums: &self.sums[entry / GROUP..],
            negated: &self.negated[entry / 4..],
            negated_groups: &self.negated_groups[entry / GROUP..],
            wide: self.wide.get(entry..).unwrap_or(&[]),
        }
    }
}

impl Activations {
    /// # Panics
    /// When `x` is not whole rows, or `width` not whole groups.
    pub fn new(x: &[f32], width: usize) -> Self {
        let mut found = Self::default();
        found.set(x, width);
        found
    }

    /// Other rows in the place of these.
    ///
    /// # Panics
    /// As [`Activations::new`].
    pub fn set(&mut self, x: &[f32], width: usize) {
        fn clear<T: Copy + Default>(list: &mut Vec<T>, len: usize) {
            list.clear();
            list.resize(len, T::default());
        }
        assert!(width > 0 && x.len().is_multiple_of(width) && width.is_multiple_of(GROUP));
        self.width = width;
        self.rows = x.len() / width;
        let (stride, groups) = (self.stride(), self.groups());
        let rows = self.rows.next_multiple_of(TILE);
        clear(&mut self.codes, rows * stride);
        clear(&mut self.scales, rows * groups);
        clear(&mut self.sums, rows * groups);
        clear(&mut self.negated, rows * stride / 4);
        clear(&mut self.negated_groups, rows * groups);
        clear(
            &mut self.wide,
            if self.rows >= MANY { rows * stride } else { 0 },
        );
        let mut wide = self.wide.chunks_exact_mut(stride);
        let mut places: Vec<Coded> = (self.codes.chunks_exact_mut(stride))
            .zip(self.scales.chunks_exact_mut(groups))
            .zip(self.sums.chunks_exact_mut(groups))
            .zip(self.negated.chunks_exact_mut(stride / 4))
            .zip(self.negated_groups.chunks_exact_mut(groups))
            .take(self.rows)
            .map(
                |((((codes, scales), sums), negated), negated_groups)| Coded {
                    codes,
                    scales,
                    sums,
                    negated,
                    negated_groups,
                    wide: wide.next().unwrap_or_default(),
                },
            )
            .collect();
        let task = |row: usize, coded: &mut [Coded]| coded[0].set(&x[row * width..][..width]);
        fill(x.len() >= ALONE, &mut places, 1, task);
        let in_tiles = self.rows >= MANY && Isa::widest().level() == Level::Amx;
        clear(&mut self.tiles, if in_tiles { rows * stride } else { 0 });
        let tiles = self.tiles.chunks_exact_mut(TILE * stride);
        for (codes, tile) in self.codes.chunks_exact(TILE * stride).zip(tiles) {
            let places = tile.as_chunks_mut::<GROUP>().0;
            for (at, code) in codes.as_chunks::<GROUP>().0.iter().enumerate() {
                places[at % groups * TILE + at / groups] = *code;
            }
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Codes of a row.
    pub(super) fn stride(&self) -> usize {
        self.width.next_multiple_of(PADDED)
    }

    /// Groups of a row.
    pub(super) fn groups(&self) -> usize {
        self.stride() / GROUP
    }

    /// Where there are [`MANY`] rows and tiles.
    pub(super) fn tiles(&self) -> &[i8] {
        &self.tiles
    }

    pub(super) fn scales(&self) -> &[f32] {
        &self.scales
    }

    pub(super) fn sums(&self) -> &[f32] {
        &self.sums
    }

    #[inline]
    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let (stride, groups) = (self.stride(), self.groups());
        Row {
            codes: &self.codes[row * stride..][..stride],
            scales: &self.scales[row * groups..][..groups],
            sums: &self.sums[row * groups..][..groups],
            negated: &self.negated[row * stride / 4..][..stride / 4],
            negated_groups: &self.negated_groups[row * groups..][..groups],
            wide: self
                .wide
                .get(row * stride..)
                .map_or(&[], |rest| &rest[..stride.min(rest.len())]),
        }
    }

    /// What the codes stand for, `[M, K]`.
    pub fn dequantized(&self) -> Vec<f32> {
        let rows = (0..self.rows()).map(|row| self.row(row));
        rows.flat_map(|row| {
            let value = move |i: usize| row.scales[i / GROUP] * f32::from(row.codes[i]);
            (0..self.width).map(value)
        })
        .collect()
    }
}

impl Coded<'_> {
    fn set(&mut self, x: &[f32]) {
        vectorised!(for (g, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            // By lanes: a chain of all would wait for every step.
            let mut lanes = [0f32; 8];
            let mut finite = true;
            for x in x.as_chunks::<8>().0 {
                for i in 0..8 {
                    lanes[i] = lanes[i].max(x[i].abs());
                    finite &= x[i].is_finite();
                }
            }
            let largest = lanes.into_iter().fold(0f32, f32::max);
            let inverse = match largest > 0. {
                true => 127. / largest,
                false => 0.,
            };
            let mut q = [0i32; GROUP];
            for i in 0..GROUP {
                let rounded = (x[i] * inverse + ROUND).to_bits();
                q[i] = i32::from(rounded.wrapping_sub(ROUND.to_bits()) as i8);
            }
            let codes = &mut self.codes[g * GROUP..][..GROUP];
            for i in 0..GROUP {
                codes[i] = q[i] as i8;
            }
            let negated = &mut self.negated[g * GROUP / 4..][..GROUP / 4];
            let mut sum = 0;
            for i in 0..GROUP / 4 {
                negated[i] = -(q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3]);
                sum -= negated[i];
            }
            if !self.wide.is_empty() {
                let wide = &mut self.wide[g * GROUP..][..GROUP];
                for i in (0..GROUP).step_by(4) {
                    wide[i] = q[i] as i16;
                    wide[i + 1] = q[i + 2] as i16;
                    wide[i + 2] = q[i + 1] as i16;
                    wide[i + 3] = q[i + 3] as i16;
                }
            }
            self.negated_groups[g] = -sum;
            // What is no number must not end as one.
            self.scales[g] = match finite {
                true => largest / 127.,
                false => f32::NAN,
            };
            self.sums[g] = self.scales[g] * sum as f32;
        });
    }
}
