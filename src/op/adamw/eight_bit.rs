//! Moments of AdamW in 8 bits (Dettmers et al. 2022, arXiv 2110.02861): blocks with a scale each, and codes that are finer the larger
//! the entry (dynamic quantisation), so that small entries keep their size.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::AdamW;
use crate::op::isa::vectorised;

/// Entries that share a scale.
pub const BLOCK: usize = 256;
/// Sums and maxima are kept in so many.
const LANES: usize = 16;
/// Blocks a task: fixed, so that a step does not depend on the threads.
const TASK: usize = 64;

/// Bits of a first moment's size; the eighth is its sign.
const SIGNED: u32 = 7;
/// Bits of a second moment.
const UNSIGNED: u32 = 8;

/// First and second moments of `n` entries.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// `[2, n]`
    pub codes: Vec<u8>,
    /// `[2, blocks]`
    pub scales: Vec<f32>,
}

impl Moments {
    /// Before the first step.
    pub fn zeros(n: usize) -> Self {
        Self {
            codes: vec![0; 2 * n],
            scales: vec![0.; 2 * n.div_ceil(BLOCK)],
        }
    }

    /// Of the moments of `n` entries.
    pub fn bytes(n: usize) -> usize {
        2 * n + 2 * n.div_ceil(BLOCK) * size_of::<f32>()
    }
}

/// [`Moments`] where their parameter is.
#[derive(Debug)]
pub enum Placed {
    Host(Moments),
    /// The same entries in flat tensors, which a step updates in place.
    Device {
        codes: Tensor,
        scales: Tensor,
    },
}

impl Placed {
    /// Before the first step of a parameter of `n` entries.
    pub fn zeros(n: usize, device: &Device) -> Result<Self> {
        match device.is_cpu() {
            true => Ok(Self::Host(Moments::zeros(n))),
            false => Ok(Self::Device {
                codes: Tensor::zeros(2 * n, DType::U8, device)?,
                scales: Tensor::zeros(2 * n.div_ceil(BLOCK), DType::F32, device)?,
            }),
        }
    }

    /// Codes and scales, to be saved.
    pub fn tensors(&self) -> Result<[Tensor; 2]> {
        match self {
            Self::Host(Moments { codes, scales }) => Ok([
                Tensor::from_slice(codes, codes.len(), &Device::Cpu)?,
                Tensor::from_slice(scales, scales.len(), &Device::Cpu)?,
            ]),
            Self::Device { codes, scales } => Ok([codes.clone(), scales.clone()]),
        }
    }

    /// What [`Placed::tensors`] gave, for a parameter on `device`.
    pub fn read([codes, scales]: [&Tensor; 2], device: &Device) -> Result<Self> {
        match device.is_cpu() {
            true => Ok(Self::Host(Moments {
                codes: codes.to_vec1()?,
                scales: scales.to_vec1()?,
            })),
            // Copies: a step writes into them.
            false => Ok(Self::Device {
                codes: codes.to_device(device)?.copy()?,
                scales: scales.to_device(device)?.copy()?,
            }),
        }
    }
}

/// What code `2^i + j` of `bits` bits means, as a share of the scale: interval `j` of the `2^i` that decade `i` is cut into, its middle.
/// Decades go up to 1; code 0 is 0.
#[inline(always)]
fn decoded(code: u32, bits: u32) -> f32 {
    if code == 0 {
        return 0.;
    }
    let i = 31 - code.leading_zeros();
    let j = code - (1 << i);
    decade(i, bits) * (0.1 + 0.9 * (j as f32 + 0.5) / (1 << i) as f32)
}

#[inline(always)]
fn decade(i: u32, bits: u32) -> f32 {
    const POWERS: [f32; 8] = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.];
    POWERS[(8 - bits + i) as usize]
}

/// The code of `x` in 0 to 1, of `bits` bits; what is not 0 stays so.
#[inline(always)]
fn encoded(x: f32, bits: u32) -> u32 {
    // Of the smallest decade, and of each further one that `x` reaches.
    let (mut first, mut inverse) = (1f32, 1. / decade(0, bits));
    for i in 1..bits {
        let reached = x >= 0.1 * decade(i, bits);
        first = if reached { (1 << i) as f32 } else { first };
        inverse = if reached {
            1. / decade(i, bits)
        } else {
            inverse
        };
    }
    let j = (x * inverse - 0.1) * (first / 0.9);
    // Adding 1.5 · 2²³ rounds to an integer, which the low bits of the sum then hold.
    const ROUND: f32 = 12_582_912.;
    // Not `clamp`, which may panic, and so makes no vectors.
    let code = first + (j - 0.5).max(0.).min(first - 1.) + ROUND;
    let code = if x > 0. { code } else { ROUND };
    code.to_bits() & 255
}

/// Decodes are looked up.
type Table = [f32; 256];

fn tables() -> &'static [Table; 2] {
    static TABLES: std::sync::LazyLock<[Table; 2]> = std::sync::LazyLock::new(|| {
        let first = |code: usize| {
            let size = decoded(code as u32 & 127, SIGNED);
            if code > 127 { -size } else { size }
        };
        let second = |code: usize| decoded(code as u32, UNSIGNED);
        [std::array::from_fn(first), std::array::from_fn(second)]
    });
    &TABLES
}

/// The scale under which the largest entry has the last code, whose middle is a little below 1.
#[inline(always)]
fn scale(largest: f32, table: &Table, last: usize) -> f32 {
    largest / table[last]
}

/// Updates `param` and its moments in place, as [`super::adamw_step`].
///
/// # Panics
/// When sizes do not fit.
pub fn adamw_8bit_step(
    param: &mut [f32],
    grad: &[f32],
    moments: &mut Moments,
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) {
    let n = param.len();
    assert!(grad.len() == n && moments.codes.len() == 2 * n && step > 0);
    let factors = super::factors(step, hyper);
    let betas = [hyper.beta1 as f32, hyper.beta2 as f32];
    let rests = [(1. - hyper.beta1) as f32, (1. - hyper.beta2) as f32];
    let grad_scale = grad_scale as f32;
    let (first, second) = moments.codes.split_at_mut(n);
    let (first_scales, second_scales) = moments.scales.split_at_mut(n.div_ceil(BLOCK));
    let tasks = param
        .par_chunks_mut(TASK * BLOCK)
        .zip(grad.par_chunks(TASK * BLOCK))
        .zip(first.par_chunks_mut(TASK * BLOCK))
        .zip(second.par_chunks_mut(TASK * BLOCK))
        .zip(first_scales.par_chunks_mut(TASK))
        .zip(second_scales.par_chunks_mut(TASK));
    let [first_table, second_table] = tables();
    tasks.for_each(
        |(((((param, grad), first), second), first_scales), second_scales)| {
            vectorised!({
                let blocks = param
                    .chunks_mut(BLOCK)
                    .zip(grad.chunks(BLOCK))
                    .zip(first.chunks_mut(BLOCK).zip(second.chunks_mut(BLOCK)))
                    .zip(first_scales.iter_mut().zip(second_scales));
                for (((param, grad), (first, second)), (first_scale, second_scale)) in blocks {
                    let count = param.len();
                    // Whole blocks of a known length are what vectors are made of.
                    let (mut p, mut g) = ([0f32; BLOCK], [0f32; BLOCK]);
                    p[..count].copy_from_slice(param);
                    g[..count].copy_from_slice(grad);
                    let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
                    for i in 0..count {
                        m[i] = first_table[first[i] as usize];
                        v[i] = second_table[second[i] as usize];
                    }
                    let (m_scale, v_scale) = (*first_scale, *second_scale);
                    let (mut most_m, mut most_v) = ([0f32; LANES], [0f32; LANES]);
                    for i in 0..BLOCK {
                        let g = g[i] * grad_scale;
                        m[i] = betas[0] * (m[i] * m_scale) + rests[0] * g;
                        v[i] = betas[1] * (v[i] * v_scale) + rests[1] * g * g;
                        let deviation = v[i].sqrt() * factors.deviation + factors.eps;
                        p[i] = factors.keep * p[i] - factors.rate * m[i] / deviation;
                    }
                    for (m, v) in m
                        .as_chunks::<LANES>()
                        .0
                        .iter()
                        .zip(v.as_chunks::<LANES>().0)
                    {
                        for l in 0..LANES {
                            most_m[l] = most_m[l].max(m[l].abs());
                            most_v[l] = most_v[l].max(v[l]);
                        }
                    }
                    let most = |lanes: [f32; LANES]| lanes.iter().fold(0f32, |a, b| a.max(*b));
                    *first_scale = scale(most(most_m), first_table, 127);
                    *second_scale = scale(most(most_v), second_table, 255);
                    let inverse = |scale: f32| if scale > 0. { 1. / scale } else { 0. };
                    let (inverse_m, inverse_v) = (inverse(*first_scale), inverse(*second_scale));
                    let mut codes = [0u32; BLOCK];
                    for i in 0..BLOCK {
                        let sign = (m[i].to_bits() >> 31) << SIGNED;
                        codes[i] = encoded(m[i].abs() * inverse_m, SIGNED) | sign;
                    }
                    first
                        .iter_mut()
                        .zip(&codes)
                        .for_each(|(to, code)| *to = *code as u8);
                    for i in 0..BLOCK {
                        codes[i] = encoded(v[i] * inverse_v, UNSIGNED);
                    }
                    second
                        .iter_mut()
                        .zip(&codes)
                        .for_each(|(to, code)| *to = *code as u8);
                    param.copy_from_slice(&p[..count]);
                }
            })
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_they_were_made_of() {
        for bits in [SIGNED, UNSIGNED] {
            for code in 0..1u32 << bits {
                assert_eq!(encoded(decoded(code, bits), bits), code, "{bits} bits");
            }
            // In a decade cut into n intervals nothing is off by more than half of one.
            for i in 0..bits {
                for share in [0.1001, 0.2, 0.37, 0.55, 0.999] {
                    let x = decade(i, bits) * share;
                    let off = (decoded(encoded(x, bits), bits) - x).abs();
                    let interval = 0.9 * decade(i, bits) / (1 << i) as f32;
                    assert!(off <= 0.51 * interval, "{x}: off by {off}");
                }
            }
            assert_eq!(encoded(1., bits), (1 << bits) - 1);
            assert_eq!(encoded(1e-30, bits), 1, "what is not 0 stays so");
        }
    }

    /// A badly scaled bowl: 8 bits lead where 32 do.
    #[test]
    fn a_run_ends_where_that_in_full_ends() {
        let n = 1000;
        let hyper = AdamW {
            lr: 0.02,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
        };
        let target: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
        let stiffness = |i: usize| 10f32.powi(i as i32 % 5 - 3);
        let run = |eight: bool| -> f32 {
            let mut x = vec![0f32; n];
            let mut moments = Moments::zeros(n);
            let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
            for step in 1..=300 {
                let noise = |i: usize| ((i as u64 * 31 + step * 17) % 13) as f32 / 13. - 0.46;
                let grad: Vec<f32> = (0..n)
                    .map(|i| stiffness(i) * (x[i] - target[i] + 0.1 * noise(i)))
                    .collect();
                if eight {
                    adamw_8bit_step(&mut x, &grad, &mut moments, 1., step, &hyper);
                    continue;
                }
                let f = super::super::factors(step, &hyper);
                for i in 0..n {
                    m[i] = 0.9 * m[i] + 0.1 * grad[i];
                    v[i] = 0.95 * v[i] + 0.05 * grad[i] * grad[i];
                    x[i] = f.keep * x[i] - f.rate * m[i] / (v[i].sqrt() * f.deviation + f.eps);
                }
            }
            let off = x.iter().zip(&target).map(|(x, t)| (x - t) * (x - t));
            (off.sum::<f32>() / n as f32).sqrt()
        };
        let (full, eight) = (run(false), run(true));
        assert!(eight < 1.1 * full + 0.01, "{eight} for {full}");
    }
}
