//! Activations rounded to 8 bits, as products with blocks take them.

use crate::op::isa::vectorised;

/// Entries that share a scale.
pub(super) const GROUP: usize = 32;
/// Rows are filled up with zeros to whole numbers of this, which the vector paths read at once.
pub(super) const PADDED: usize = 256;
/// Rows from which on weights are unpacked in panels for all of them.
pub(super) const MANY: usize = 4;

/// Rows of a matrix `[M, K]` as `scale · q`, `q` in −127 to 127, a scale for every 32 entries of a row.
#[derive(Default)]
pub struct Activations {
    pub rows: usize,
    pub width: usize,
    padded: usize,
    codes: Vec<i8>,
    /// One a group.
    scales: Vec<f32>,
    /// One a group: `scale · Σ q`, what a weight's constant part is multiplied by.
    sums: Vec<f32>,
    /// One for every four codes: `−Σ q`, what an offset of unsigned codes is multiplied by.
    negated: Vec<i32>,
    /// The codes in 16 bits where there are [`MANY`] rows, of every four in the order 0, 2, 1, 3.
    wide: Vec<i16>,
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
    pub wide: &'a [i16],
}

impl<'a> Row<'a> {
    /// From `entry` on, the first of a group.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub fn from(self, entry: usize) -> Self {
        Self {
            codes: &self.codes[entry..],
            scales: &self.scales[entry / GROUP..],
            sums: &self.sums[entry / GROUP..],
            negated: &self.negated[entry / 4..],
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
        assert!(width > 0 && x.len().is_multiple_of(width) && width.is_multiple_of(GROUP));
        let rows = x.len() / width;
        let padded = width.next_multiple_of(PADDED);
        (self.rows, self.width, self.padded) = (rows, width, padded);
        fn clear<T: Copy + Default>(list: &mut Vec<T>, len: usize) {
            list.clear();
            list.resize(len, T::default());
        }
        clear(&mut self.codes, rows * padded);
        clear(&mut self.scales, rows * padded / GROUP);
        clear(&mut self.sums, rows * padded / GROUP);
        clear(&mut self.negated, rows * padded / 4);
        clear(&mut self.wide, if rows < MANY { 0 } else { rows * padded });
        vectorised!(for (row, x) in x.chunks_exact(width).enumerate() {
            for (g, x) in x.chunks_exact(GROUP).enumerate() {
                let at = row * padded / GROUP + g;
                let codes = &mut self.codes[at * GROUP..][..GROUP];
                let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                let inverse = match largest > 0. {
                    true => 127. / largest,
                    false => 0.,
                };
                for (q, x) in codes.iter_mut().zip(x) {
                    *q = (x * inverse).round_ties_even() as i8;
                }
                let mut sum = 0;
                let fours = self.negated[at * GROUP / 4..].iter_mut();
                for (four, codes) in fours.zip(codes.chunks_exact(4)) {
                    let part: i32 = codes.iter().map(|q| i32::from(*q)).sum();
                    *four = -part;
                    sum += part;
                }
                let fours = self.wide.chunks_exact_mut(4).skip(at * GROUP / 4);
                for (four, codes) in fours.zip(codes.chunks_exact(4)) {
                    four.copy_from_slice(&[codes[0], codes[2], codes[1], codes[3]].map(i16::from));
                }
                // What is no number must not end as one.
                self.scales[at] = match x.iter().all(|x| x.is_finite()) {
                    true => largest / 127.,
                    false => f32::NAN,
                };
                self.sums[at] = self.scales[at] * sum as f32;
            }
        });
    }

    #[inline]
    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let (codes, groups) = (self.padded, self.padded / GROUP);
        Row {
            codes: &self.codes[row * codes..][..codes],
            scales: &self.scales[row * groups..][..groups],
            sums: &self.sums[row * groups..][..groups],
            negated: &self.negated[row * codes / 4..][..codes / 4],
            wide: match self.rows < MANY {
                true => &[],
                false => &self.wide[row * codes..][..codes],
            },
        }
    }

    /// What the codes stand for, `[M, K]`.
    pub fn dequantized(&self) -> Vec<f32> {
        let rows = (0..self.rows).map(|row| self.row(row));
        rows.flat_map(|row| {
            let value = move |i: usize| row.scales[i / GROUP] * f32::from(row.codes[i]);
            (0..self.width).map(value)
        })
        .collect()
    }
}
