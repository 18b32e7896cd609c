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

/// A whole number that a vector of numbers holds as well.
#[inline(always)]
fn code(x: f32, inverse: f32, low: i32, high: i32) -> f32 {
    let q = (x * inverse).round_ties_even();
    match q.is_nan() {
        true => 0.,
        false => q.max(low as f32).min(high as f32),
    }
}

/// Candidates that are tried side by side, a lane each: sums over weights need no addition across lanes then.
const LANES: usize = 16;

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    match scale == 0. {
        true => 0.,
        false => 1. / scale,
    }
}

/// Where the largest weight is put beside the end of the codes, by tenths of a code to either side; the last lanes repeat the last.
const STARTS: [[f32; LANES]; 2] = {
    let mut starts = [[1.2; LANES]; 2];
    let mut i = 0;
    while i < 25 {
        starts[i / LANES][i % LANES] = 0.1 * (i as f32 - 12.);
        i += 1;
    }
    starts
};

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
    for starts in STARTS {
        let mut inverses = [0f32; LANES];
        for i in 0..LANES {
            // Codes reach one further below than above.
            inverses[i] = (low as f32 + starts[i]) / largest;
        }
        for _ in 0..3 {
            let (mut product, mut energy) = ([0f32; LANES], [0f32; LANES]);
            for (x, w) in x.iter().zip(w) {
                for i in 0..LANES {
                    let q = code(*x, inverses[i], low, high);
                    product[i] += w * x * q;
                    energy[i] += w * q * q;
                }
            }
            for i in 0..LANES {
                // Of no codes but 0 there is no number, which is no gain.
                let reached = f64::from(product[i]) * f64::from(product[i]) / f64::from(energy[i]);
                if reached > gain {
                    (best, gain) = (product[i] / energy[i], reached);
                }
                inverses[i] = energy[i] / product[i];
            }
        }
    }
    best
}

/// `Σ w (x − s q)²` of every `s`, each `q` in `low..=high` as near as it can be.
#[inline(always)]
fn symmetric_errors(x: &[f32], w: &[f32], s: &[f32; LANES], low: i32, high: i32) -> [f32; LANES] {
    let (mut inverses, mut errors) = ([0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        inverses[i] = inverse(s[i]);
    }
    for (x, w) in x.iter().zip(w) {
        for i in 0..LANES {
            let rest = x - s[i] * code(*x, inverses[i], low, high);
            errors[i] += w * rest * rest;
        }
    }
    errors
}

/// `Σ w (x − (s q − m))²` of every `s` and `m`, each `q` of 0 to 15 as near as it can be.
#[inline(always)]
fn affine_errors(x: &[f32], w: &[f32], s: &[f32; LANES], m: &[f32; LANES]) -> [f32; LANES] {
    let (mut inverses, mut errors) = ([0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        inverses[i] = inverse(s[i]);
    }
    for (x, w) in x.iter().zip(w) {
        for i in 0..LANES {
            let rest = x - (s[i] * code(x + m[i], inverses[i], 0, 15) - m[i]);
            errors[i] += w * rest * rest;
        }
    }
    errors
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
    let x1: f32 = x.iter().zip(w).map(|(x, w)| w * x).sum();
    let mut best = ((high - low) / 15., -low);
    let mut least = affine_errors(x, w, &[best.0; LANES], &[best.1; LANES])[0];
    for starts in STARTS {
        let (mut s, mut m) = ([0f32; LANES], [-low; LANES]);
        for i in 0..LANES {
            s[i] = (high - low) / (15. + starts[i]);
        }
        for _ in 0..3 {
            // Least squares of x over q and a constant.
            let mut inverses = [0f32; LANES];
            for i in 0..LANES {
                inverses[i] = inverse(s[i]);
            }
            let [mut q1, mut q2, mut xq] = [[0f32; LANES]; 3];
            for (x, w) in x.iter().zip(w) {
                for i in 0..LANES {
                    let q = code(x + m[i], inverses[i], 0, 15);
                    q1[i] += w * q;
                    q2[i] += w * q * q;
                    xq[i] += w * x * q;
                }
            }
            for i in 0..LANES {
                let determinant = total * q2[i] - q1[i] * q1[i];
                let scale = (total * xq[i] - q1[i] * x1) / determinant;
                let min = -(q2[i] * x1 - q1[i] * xq[i]) / determinant;
                (s[i], m[i]) = match min < 0. {
                    true => (xq[i] / q2[i], 0.),
                    false => (scale, min),
                };
                // What cannot be fitted has no codes, and an error that is not the least.
                if !(determinant > 0. && s[i] > 0. && s[i].is_finite() && m[i].is_finite()) {
                    (s[i], m[i]) = (0., -low);
                }
            }
            let errors = affine_errors(x, w, &s, &m);
            for i in 0..LANES {
                if s[i] > 0. && errors[i] < least {
                    (best, least) = ((s[i], m[i]), errors[i]);
                }
            }
        }
    }
    best
}

/// The first of the `count` smallest.
#[inline(always)]
fn least(errors: &[f32; LANES], count: usize) -> usize {
    let mut found = 0;
    for i in 1..count {
        if errors[i] < errors[found] {
            found = i;
        }
    }
    found
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
    let code = |x: f32| (code(x, inverse, -8, 7) + 8.) as u8;
    for (i, q) in out[2..].iter_mut().enumerate() {
        *q = code(x[i]) | code(x[i + 16]) << 4;
    }
}

#[inline(always)]
fn q4_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let parts: Vec<_> = x.chunks_exact(32).zip(w.chunks_exact(32)).collect();
    // A loop: within `map` it would not be compiled for these vectors.
    let mut ideal = [(0., 0.); 8];
    for (ideal, (x, w)) in ideal.iter_mut().zip(&parts) {
        *ideal = affine(x, w);
    }
    let largest = |of: fn(&(f32, f32)) -> f32| ideal.iter().map(of).fold(0f32, f32::max);
    let d = put(out, largest(|i| i.0) / 63.);
    let min = put(&mut out[2..], largest(|i| i.1) / 63.);
    let mut integers = [(0u8, 0u8); 8];
    out[4..16].fill(0);
    for (j, ((x, w), (s, m))) in parts.iter().zip(&ideal).enumerate() {
        let near = |value: f32, unit: f32| {
            let at = code(value, inverse(unit), 0, 63) as i32;
            (at - 1).max(0)..=(at + 1).min(63)
        };
        let (mut pairs, mut count) = ([(0, 0); LANES], 0);
        for s in near(*s, d) {
            for m in near(*m, min) {
                pairs[count] = (s, m);
                count += 1;
            }
        }
        let (mut scales, mut mins) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..LANES {
            (scales[i], mins[i]) = (d * pairs[i].0 as f32, min * pairs[i].1 as f32);
        }
        let (s, m) = pairs[least(&affine_errors(x, w, &scales, &mins), count)];
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
    let mut ideal = [0.; 16];
    for (ideal, (x, w)) in ideal.iter_mut().zip(&parts) {
        *ideal = symmetric(x, w, -32, 31);
    }
    let largest = ideal
        .iter()
        .fold(0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
    // Scales reach one further below than above too.
    let d = put(&mut out[208..], largest / -128.);
    let mut codes = [0u8; 256];
    for (j, ((x, w), s)) in parts.iter().zip(&ideal).enumerate() {
        let at = code(*s, inverse(d), -128, 127) as i32;
        let (first, last) = ((at - 1).max(-128), (at + 1).min(127));
        let mut scales = [0f32; LANES];
        for (s, scale) in (first..).zip(&mut scales) {
            *scale = d * s as f32;
        }
        let errors = symmetric_errors(x, w, &scales, -32, 31);
        let s = first + least(&errors, (last - first + 1) as usize) as i32;
        out[192 + j] = s as i8 as u8;
        let inverse = inverse(d * s as f32);
        for (x, q) in x.iter().zip(&mut codes[16 * j..]) {
            *q = (code(*x, inverse, -32, 31) + 32.) as u8;
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
