//! Activations rounded to 8 bits, as products with blocks take them.

use super::BlockType;
use crate::op::isa::{Isa, Level, vectorised};
use crate::op::team::fill;

/// Entries that share a scale.
pub(super) const GROUP: usize = 32;
/// Rows are filled up with zeros to whole numbers of this, which the vector paths read at once.
pub(super) const PADDED: usize = 512;
/// Rows of a tile, which many are filled up to whole numbers of with rows of zeros.
pub(super) const TILE: usize = 16;
/// Rows from which on weights are unpacked in panels for all of them.
pub(super) const MANY: usize = 4;

/// Entries below which other threads are not worth waking.
const ALONE: usize = 1 << 14;

/// 1.5 · 2²³: adding it rounds to an integer (ties to even), which the low bits of the sum then hold.
const ROUND: f32 = 12_582_912.;

/// Rows of a matrix `[M, K]` as `scale · q`, `q` in −127 to 127, a scale for every 32 entries of a row. Rows are filled up with zeros to
/// a whole number of [`PADDED`], their number, where there are [`MANY`], to one of [`TILE`].
#[derive(Default)]
pub struct Activations {
    pub width: usize,
    rows: usize,
    codes: Vec<i8>,
    /// One a group.
    scales: Vec<f32>,
    /// One a group: `scale · Σ q`, what a weight's constant part is multiplied by.
    sums: Vec<f32>,
    /// One for every four codes: `−Σ q`, what an offset of unsigned codes is multiplied by, where there are fewer than [`MANY`] rows.
    negated: Vec<i32>,
    /// The same of a whole group.
    negated_groups: Vec<i32>,
    /// The codes in 16 bits where they are asked for and there are [`MANY`] rows, of every four in the order 0, 2, 1, 3.
    wide: Vec<i16>,
    /// The codes once more where tiles multiply them: `[rows / TILE, groups, TILE, GROUP]`.
    tiles: Vec<i8>,
    /// The rows once more, `[stride / PADDED, rows]`.
    spans: Vec<Span>,
}

/// What [`MANY`] rows are kept as besides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forms {
    words: bool,
    tiles: bool,
    spans: bool,
}

impl Forms {
    pub const ALL: Self = Self {
        words: true,
        tiles: true,
        spans: true,
    };

    /// What products with `kind` by `isa` read.
    pub fn of(isa: Isa, kind: BlockType) -> Self {
        let (level, six) = (isa.level(), kind == BlockType::Q6K);
        let tiles = level == Level::Amx && !six;
        Self {
            words: six || level < Level::Avx512 && kind == BlockType::Q8_0,
            tiles,
            spans: level >= Level::Avx512 && !tiles,
        }
    }

    pub fn and(self, other: Self) -> Self {
        Self {
            words: self.words || other.words,
            tiles: self.tiles || other.tiles,
            spans: self.spans || other.spans,
        }
    }
}

/// [`PADDED`] entries of a row side by side, for paths that read many rows of them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Span {
    pub codes: [i8; PADDED],
    pub scales: [f32; PADDED / GROUP],
    pub sums: [f32; PADDED / GROUP],
    pub negated: [i32; PADDED / GROUP],
}

impl Default for Span {
    fn default() -> Self {
        let groups = [0.; PADDED / GROUP];
        Self {
            codes: [0; PADDED],
            scales: groups,
            sums: groups,
            negated: [0; PADDED / GROUP],
        }
    }
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
#[derive(Clone, Copy, Default)]
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
            negated: self.negated.get(entry / 4..).unwrap_or(&[]),
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
        found.set(x, width, Forms::ALL);
        found
    }

    /// Other rows in the place of these.
    ///
    /// # Panics
    /// As [`Activations::new`].
    pub fn set(&mut self, x: &[f32], width: usize, forms: Forms) {
        /// What stands there is written anew, or filled up with zeros below.
        fn room<T: Copy + Default>(list: &mut Vec<T>, len: usize) {
            list.resize(len, T::default());
        }
        assert!(width > 0 && x.len().is_multiple_of(width) && width.is_multiple_of(GROUP));
        self.width = width;
        self.rows = x.len() / width;
        let (stride, groups) = (self.stride(), self.groups());
        let many = self.rows >= MANY;
        let rows = match many {
            true => self.rows.next_multiple_of(TILE),
            false => self.rows,
        };
        let given = |there: bool| if there { rows * stride } else { 0 };
        room(&mut self.codes, rows * stride);
        room(&mut self.scales, rows * groups);
        room(&mut self.sums, rows * groups);
        room(&mut self.negated, given(!many) / 4);
        room(&mut self.negated_groups, rows * groups);
        room(&mut self.wide, given(many && forms.words));
        let mut negated = self.negated.chunks_exact_mut(stride / 4);
        let mut wide = self.wide.chunks_exact_mut(stride);
        let mut places: Vec<Coded> = (self.codes.chunks_exact_mut(stride))
            .zip(self.scales.chunks_exact_mut(groups))
            .zip(self.sums.chunks_exact_mut(groups))
            .zip(self.negated_groups.chunks_exact_mut(groups))
            .map(|(((codes, scales), sums), negated_groups)| Coded {
                codes,
                scales,
                sums,
                negated: negated.next().unwrap_or_default(),
                negated_groups,
                wide: wide.next().unwrap_or_default(),
            })
            .collect();
        let task = |row: usize, coded: &mut [Coded]| {
            let x = x.get(row * width..).unwrap_or_default();
            coded[0].set(&x[..width.min(x.len())]);
        };
        fill(x.len() >= ALONE, &mut places, 1, task);
        room(&mut self.tiles, given(many && forms.tiles));
        let tiles = self.tiles.chunks_exact_mut(TILE * stride);
        for (codes, tile) in self.codes.chunks_exact(TILE * stride).zip(tiles) {
            let places = tile.as_chunks_mut::<GROUP>().0;
            for (at, code) in codes.as_chunks::<GROUP>().0.iter().enumerate() {
                places[at % groups * TILE + at / groups] = *code;
            }
        }
        let spans = match many && forms.spans {
            true => self.rows * stride / PADDED,
            false => 0,
        };
        room(&mut self.spans, spans);
        let mut spans = std::mem::take(&mut self.spans);
        fill(x.len() >= ALONE, &mut spans, TILE, |task, spans| {
            for (i, span) in spans.iter_mut().enumerate() {
                let i = task * TILE + i;
                let row = self.row(i % self.rows).from(i / self.rows * PADDED);
                let groups = PADDED / GROUP;
                span.codes.copy_from_slice(&row.codes[..PADDED]);
                span.scales.copy_from_slice(&row.scales[..groups]);
                span.sums.copy_from_slice(&row.sums[..groups]);
                span.negated.copy_from_slice(&row.negated_groups[..groups]);
            }
        });
        self.spans = spans;
    }

    /// `count` rows from `row` on, their [`PADDED`] entries from `from` on, where there are [`MANY`] rows and [`Forms`] had them.
    #[inline]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn spans(&self, row: usize, count: usize, from: usize) -> &[Span] {
        &self.spans[from / PADDED * self.rows..][..self.rows][row..][..count]
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
        /// Of a form that may not be there.
        fn given<T>(list: &[T], row: usize, width: usize) -> &[T] {
            list.get(row * width..(row + 1) * width).unwrap_or(&[])
        }
        Row {
            codes: &self.codes[row * stride..][..stride],
            scales: &self.scales[row * groups..][..groups],
            sums: &self.sums[row * groups..][..groups],
            negated: given(&self.negated, row, stride / 4),
            negated_groups: &self.negated_groups[row * groups..][..groups],
            wide: given(&self.wide, row, stride),
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
        self.codes[x.len()..].fill(0);
        self.scales[x.len() / GROUP..].fill(0.);
        self.sums[x.len() / GROUP..].fill(0.);
        self.negated_groups[x.len() / GROUP..].fill(0);
        if !self.negated.is_empty() {
            self.negated[x.len() / 4..].fill(0);
        }
        if !self.wide.is_empty() {
            self.wide[x.len()..].fill(0);
        }
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
            let mut sum = 0;
            for q in q {
                sum += q;
            }
            if !self.negated.is_empty() {
                let negated = &mut self.negated[g * GROUP / 4..][..GROUP / 4];
                for i in 0..GROUP / 4 {
                    negated[i] = -(q[4 * i] + q[4 * i + 1] + q[4 * i + 2] + q[4 * i + 3]);
                }
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
