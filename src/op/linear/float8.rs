//! E4M3 (OCP's, safetensors' `F8_E4M3`): a sign, four bits of exponent, three of fraction; nothing is infinite, and all ones is no number.
//! The entries of a row are its codes times one scale.

use rayon::prelude::*;

use crate::op::isa::vectorised;

/// The largest there is.
const MOST: f32 = 448.;

/// Entries that a thread rounds at a time.
const PIECE: usize = 1 << 16;

/// Whether no code is that which means no number.
pub fn finite(codes: &[u8]) -> bool {
    vectorised!({
        let mut found = 0;
        for code in codes {
            found |= u8::from(code & 0x7f == 0x7f);
        }
        found == 0
    })
}

/// What [`finite`] codes mean without their scale. Not multiplied as they are read, as other types are: a piece of a row is widened
/// first.
pub fn widen(codes: &[u8], out: &mut [f32]) {
    vectorised!(for (x, code) in out.iter_mut().zip(codes) {
        let code = u32::from(*code);
        let size = match code & 0x78 {
            // Fractions alone, which f32's bits could only say with its own smallest exponent.
            0 => (code & 7) as f32 / 512.,
            _ => f32::from_bits(((code & 0x7f) << 20) + ((127 - 7) << 23)),
        };
        *x = f32::from_bits(size.to_bits() | (code & 0x80) << 24);
    })
}

/// Every row of `out` times its scale.
pub fn scale(out: &mut [f32], scales: &[f32]) {
    let width = out.len() / scales.len().max(1);
    let rows = out.chunks_exact_mut(width.max(1));
    vectorised!(for (row, scale) in rows.zip(scales) {
        row.iter_mut().for_each(|x| *x *= scale);
    })
}

/// The nearest code, the even one of two; what is larger than [`MOST`] becomes that.
fn code(x: f32) -> u8 {
    let size = x.abs().min(MOST);
    let code = match size < 2f32.powi(-6) {
        // 8, where the fraction is full, is the smallest exponent's first.
        true => (size * 512.).round_ties_even() as u32,
        false => {
            let bits = size.to_bits();
            ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3)
        }
    };
    (x.to_bits() >> 24 & 0x80 | code) as u8
}

/// Rows of `width` finite entries: their codes and scales. A row's largest entry becomes the largest that there is: what is rounded is
/// rounded by its own exponent, so that no other scale would serve the rest better.
pub fn quantize(entries: &[f32], width: usize) -> (Vec<u8>, Vec<f32>) {
    let of_row = |row: &[f32]| {
        let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        (most / MOST).max(f32::MIN_POSITIVE)
    };
    let rows = entries
        .par_chunks_exact(width)
        .with_min_len(PIECE / width + 1);
    let scales: Vec<f32> = rows.map(of_row).collect();
    let mut codes = vec![0; entries.len()];
    let all = codes
        .par_chunks_exact_mut(width)
        .zip(entries.par_chunks_exact(width))
        .zip(&scales);
    all.with_min_len(PIECE / width + 1)
        .for_each(|((codes, row), scale)| {
            codes
                .iter_mut()
                .zip(row)
                .for_each(|(to, x)| *to = code(x / scale));
        });
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the standard says it.
    fn meant(code: u8) -> f32 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let size = match exponent {
            0 => fraction / 8. * 2f32.powi(-6),
            _ => (1. + fraction / 8.) * 2f32.powi(exponent - 7),
        };
        if code >> 7 == 1 { -size } else { size }
    }

    fn numbers() -> Vec<u8> {
        (0..=255).filter(|code| finite(&[*code])).collect()
    }

    #[test]
    fn codes_mean_what_the_standard_says() {
        let codes = numbers();
        assert_eq!(codes.len(), 254);
        let mut wide = vec![0.; codes.len()];
        widen(&codes, &mut wide);
        for (code, x) in codes.iter().zip(&wide) {
            assert_eq!(x.to_bits(), meant(*code).to_bits(), "{code:#x}");
            assert_eq!(super::code(*x), *code);
        }
        let most = wide.iter().fold(0f32, |most, x| most.max(*x));
        assert_eq!(most, MOST);
    }

    /// Against a search over all codes.
    #[test]
    fn the_nearest_is_taken_and_the_even_one_of_two() {
        let mut positive: Vec<u8> = numbers()
            .into_iter()
            .filter(|code| code >> 7 == 0)
            .collect();
        positive.sort_by(|a, b| meant(*a).total_cmp(&meant(*b)));
        for pair in positive.windows(2) {
            let [low, high] = [meant(pair[0]), meant(pair[1])];
            let middle = (low + high) / 2.;
            let even = pair.iter().find(|code| *code % 2 == 0).unwrap();
            for (x, wanted) in [
                (middle, *even),
                (middle.next_down(), pair[0]),
                (middle.next_up(), pair[1]),
            ] {
                assert_eq!(code(x), wanted, "{x}");
                assert_eq!(code(-x), wanted | 0x80, "{x}");
            }
        }
        assert_eq!(code(1e9), code(MOST));
    }

    #[test]
    fn rows_are_rounded_by_their_own_scale() {
        let row = [0.1f32, -3., 0.7, 1e-3];
        let rows = [row, row.map(|x| x * 1e-20), [0.; 4]].concat();
        let (codes, scales) = quantize(&rows, 4);
        let mut wide = vec![0.; rows.len()];
        widen(&codes, &mut wide);
        scale(&mut wide, &scales);
        for (row, wide) in rows.chunks(4).zip(wide.chunks(4)) {
            let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (x, y) in row.iter().zip(wide) {
                // Half of the last of three bits, or of the smallest fraction that there is.
                let bound = (x.abs() / 16.).max(most / MOST / 1024.);
                assert!((x - y).abs() <= bound * 1.001, "{x} {y}");
            }
        }
        assert_eq!(codes[..4], codes[4..8]);
    }
}
