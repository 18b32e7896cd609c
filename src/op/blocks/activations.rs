//! Activations rounded to 8 bits, as products with blocks take them.

use crate::op::isa::vectorised;

/// Entries that share a scale.
pub(super) const GROUP: usize = 32;
/// Rows are filled up with zeros to whole numbers of this, which the vector paths read at once.
pub(super) const PADDED: usize = 64;

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
                // What is no number must not end as one.
                self.scales[at] = match x.iter().all(|x| x.is_finite()) {
                    true => largest / 127.,
                    false => f32::NAN,
                };
                self.sums[at] = self.scales[at] * sum as f32;
            }
        });
    }

    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let (codes, groups) = (self.padded, self.padded / GROUP);
        Row {
            codes: &self.codes[row * codes..][..codes],
            scales: &self.scales[row * groups..][..groups],
            sums: &self.sums[row * groups..][..groups],
            negated: &self.negated[row * codes / 4..][..codes / 4],
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
