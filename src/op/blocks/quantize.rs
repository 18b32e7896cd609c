//! Rounding weights into blocks: scales (and minima) by weighted least squares over the codes they give, tried at several
//! places, then integers of the scales chosen for the error that remains once all else is rounded.

use half::f16;

use super::BlockType;
use super::plain::half;
use crate::op::isa::vectorised;

/// Codes a row of whole blocks; `importance`, one a weight, says what a squared error there costs (the energy of the
/// activation that it is multiplied by), the same everywhere if there is none.
///
/// # Panics
/// When `row`, `importance` and `out` are not the same number of whole blocks.
pub fn quantize(kind: BlockType, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let weights = kind.weights();
    assert!(row.len().is_multiple_of(weights) && out.len() == row.len() / weights * kind.bytes());
    assert!(importance.is_none_or(|w| w.len() == row.len()));
    let energy = row.iter().map(|x| x * x).sum::<f32>() / row.len().max(1) as f32;
    let equal = vec![1.; weights];
    let blocks = row
        .chunks_exact(weights)
        .zip(out.chunks_exact_mut(kind.bytes()));
    for (i, (x, out)) in blocks.enumerate() {
        let w = importance.map_or(equal.as_slice(), |w| &w[i * weights..][..weights]);
        // Nothing to choose by where nothing counts.
        let w = match w.iter().any(|w| *w > 0.) {
            true => w,
            false => equal.as_slice(),
        };
        // Large weights count for a little more than their input says (docs/log.md).
        let size = |x: &f32| (energy + x * x).sqrt().sqrt();
        let w: Vec<f32> = x.iter().zip(w).map(|(x, w)| w * size(x)).collect();
        let w = w.as_slice();
        vectorised!(match kind {
            BlockType::Q8_0 => q8_0(x, w, out),
            BlockType::Q4_0 => q4_0(x, w, out),
            BlockType::Q4K => q4_k(x, w, out),
            BlockType::Q6K => q6_k(x, w, out),
        })
    }
}

/// Stores `x` in the first two bytes; gives what is stored.
#[inline(always)]
fn put(out: &mut [u8], x: f32) -> f32 {
    out[..2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
    half(out)
}

#[inline(always)]
fn code(x: f32, inverse: f32, low: i32, high: i32) -> i32 {
    ((x * inverse).round_ties_even() as i32).clamp(low, high)
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    match scale == 0. {
        true => 0.,
        false => 1. / scale,
    }
}

/// The `d` of least `Σ w (x − d q)²`, `q` in `low..=high`: the largest weight is put near the end of the codes in
/// several places, and each time `d` is fitted to the codes that come of it.
#[inline(always)]
fn symmetric(x: &[f32], w: &[f32], low: i32, high: i32) -> f32 {
    let largest = x
        .iter()
        .fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    if largest == 0. {
        return 0.;
    }
    let (mut best, mut gain) = (0., f64::NEG_INFINITY);
    let mut consider = |mut inverse: f32| {
        for _ in 0..3 {
            let (mut product, mut energy) = (0f64, 0f64);
            for (x, w) in x.iter().zip(w) {
                let q = code(*x, inverse, low, high) as f32;
                product += f64::from(w * x * q);
                energy += f64::from(w * q * q);
            }
            if energy == 0. {
                return;
            }
            if product * product / energy > gain {
                (best, gain) = ((product / energy) as f32, product * product / energy);
            }
            inverse = (energy / product) as f32;
            if !inverse.is_finite() {
                return;
            }
        }
    };
    for step in -12..=12 {
        // Codes reach one further below than above.
        consider((low as f32 + 0.1 * step as f32) / largest);
    }
    best
}

/// `Σ w (x − (s q − m))²`, each `q` of 0 to 15 as near as it can be.
#[inline(always)]
fn affine_error(x: &[f32], w: &[f32], s: f32, m: f32) -> f32 {
    let inverse = inverse(s);
    let pairs = x.iter().zip(w);
    pairs
        .map(|(x, w)| {
            let rest = x - (s * code(x + m, inverse, 0, 15) as f32 - m);
            w * rest * rest
        })
        .sum()
}

/// The scale and minimum, neither below 0, of least weighted error with codes of 0 to 15.
#[inline(always)]
fn affine(x: &[f32], w: &[f32]) -> (f32, f32) {
    let low = x.iter().copied().fold(0f32, f32::min);
    let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if high <= low {
        return (0., -low);
    }
    let total: f32 = w.iter().sum();
    let mut best = ((high - low) / 15., -low);
    let mut least = affine_error(x, w, best.0, best.1);
    for step in 0..=24 {
        let mut inverse = (15. - 1.2 + 0.1 * step as f32) / (high - low);
        let mut min = -low;
        for _ in 0..3 {
            // Least squares of x over q and a constant.
            let (mut q1, mut q2, mut x1, mut xq) = (0f32, 0f32, 0f32, 0f32);
            for (x, w) in x.iter().zip(w) {
                let q = code(x + min, inverse, 0, 15) as f32;
                q1 += w * q;
                q2 += w * q * q;
                x1 += w * x;
                xq += w * x * q;
            }
            let determinant = total * q2 - q1 * q1;
            if determinant <= 0. {
                break;
            }
            let mut s = (total * xq - q1 * x1) / determinant;
            let mut m = -(q2 * x1 - q1 * xq) / determinant;
            if m < 0. {
                m = 0.;
                s = xq / q2;
            }
            if !(s > 0. && s.is_finite() && m.is_finite()) {
                break;
            }
            let error = affine_error(x, w, s, m);
            if error < least {
                (best, least) = ((s, m), error);
            }
            (inverse, min) = (1. / s, m);
        }
    }
    best
}

#[inline(always)]
fn q8_0(x: &[f32], w: &[f32], out: &mut [u8]) {
    let d = put(out, symmetric(x, w, -127, 127).abs());
    let inverse = inverse(d);
    for (x, q) in x.iter().zip(&mut out[2..]) {
        *q = code(*x, inverse, -127, 127) as i8 as u8;
    }
}

#[inline(always)]
fn q4_0(x: &[f32], w: &[f32], out: &mut [u8]) {
    let d = put(out, symmetric(x, w, -8, 7));
    let inverse = inverse(d);
    let code = |x: f32| (code(x, inverse, -8, 7) + 8) as u8;
    for (i, q) in out[2..].iter_mut().enumerate() {
        *q = code(x[i]) | code(x[i + 16]) << 4;
    }
}

#[inline(always)]
fn q4_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let parts: Vec<_> = x.chunks_exact(32).zip(w.chunks_exact(32)).collect();
    let ideal: Vec<(f32, f32)> = parts.iter().map(|(x, w)| affine(x, w)).collect();
    let largest = |of: fn(&(f32, f32)) -> f32| ideal.iter().map(of).fold(0f32, f32::max);
    let d = put(out, largest(|i| i.0) / 63.);
    let min = put(&mut out[2..], largest(|i| i.1) / 63.);
    let mut integers = [(0u8, 0u8); 8];
    out[4..16].fill(0);
    for (j, ((x, w), (s, m))) in parts.iter().zip(&ideal).enumerate() {
        let near = |value: f32, unit: f32| {
            let at = code(value, inverse(unit), 0, 63);
            (at - 1).max(0)..=(at + 1).min(63)
        };
        let pairs = near(*s, d).flat_map(|s| near(*m, min).map(move |m| (s, m)));
        let error = |(s, m): &(i32, i32)| affine_error(x, w, d * *s as f32, min * *m as f32);
        let best = pairs.min_by(|a, b| error(a).total_cmp(&error(b)));
        let (s, m) = best.expect("a range of at least one");
        integers[j] = (s as u8, m as u8);
        match j < 4 {
            true => {
                out[4 + j] |= s as u8;
                out[8 + j] |= m as u8;
            }
            false => {
                out[8 + j] = s as u8 & 15 | (m as u8 & 15) << 4;
                out[j] |= s as u8 >> 4 << 6;
                out[4 + j] |= m as u8 >> 4 << 6;
            }
        }
    }
    for (i, q) in out[16..].iter_mut().enumerate() {
        let code = |high: usize| {
            let (part, at) = (2 * (i / 32) + high, i % 32);
            let (s, m) = integers[part];
            let (s, m) = (d * f32::from(s), min * f32::from(m));
            code(parts[part].0[at] + m, inverse(s), 0, 15) as u8
        };
        *q = code(0) | code(1) << 4;
    }
}

#[inline(always)]
fn q6_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let parts: Vec<_> = x.chunks_exact(16).zip(w.chunks_exact(16)).collect();
    let ideal: Vec<f32> = parts
        .iter()
        .map(|(x, w)| symmetric(x, w, -32, 31))
        .collect();
    let largest = ideal
        .iter()
        .fold(0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
    // Scales reach one further below than above too.
    let d = put(&mut out[208..], largest / -128.);
    let mut codes = [0u8; 256];
    for (j, ((x, w), s)) in parts.iter().zip(&ideal).enumerate() {
        let error = |s: &i32| -> f32 {
            let s = d * *s as f32;
            let inverse = inverse(s);
            let pairs = x.iter().zip(w.iter());
            pairs
                .map(|(x, w)| {
                    let rest = x - s * code(*x, inverse, -32, 31) as f32;
                    w * rest * rest
                })
                .sum()
        };
        let at = code(*s, inverse(d), -128, 127);
        let near = (at - 1).max(-128)..=(at + 1).min(127);
        let best = near.min_by(|a, b| error(a).total_cmp(&error(b)));
        let s = best.expect("a range of at least one");
        out[192 + j] = s as i8 as u8;
        let inverse = inverse(d * s as f32);
        for (x, q) in x.iter().zip(&mut codes[16 * j..]) {
            *q = (code(*x, inverse, -32, 31) + 32) as u8;
        }
    }
    for half in 0..2 {
        let codes = &codes[128 * half..];
        for at in 0..32 {
            let quarter = |k: usize| codes[32 * k + at];
            out[64 * half + at] = quarter(0) & 15 | (quarter(2) & 15) << 4;
            out[64 * half + 32 + at] = quarter(1) & 15 | (quarter(3) & 15) << 4;
            let high = (0..4).map(|k| quarter(k) >> 4 << (2 * k));
            out[128 + 32 * half + at] = high.fold(0, |all, bits| all | bits);
        }
    }
}
