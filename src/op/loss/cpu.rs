//! The losses over slices: rows in parallel, a row in lanes that the compiler turns into vectors.

use super::{ABSENT, Divergence, NO_TOKEN};
use crate::op::cpu::exp;
use crate::op::isa::vectorised;
use rayon::prelude::*;

const LANES: usize = 16;
/// Entries summed in f32 before the sum moves to f64: long rows lose nothing, short ones pay nothing.
const BLOCK: usize = 1024;
/// Entries a task should have for threads to pay.
const TASK: usize = 1 << 14;

/// A row's probabilities `exp(scale · x − log_sum)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    scale: f32,
    log_sum: f32,
}

impl Softmax {
    #[inline(always)]
    fn of(row: &[f32], scale: f32) -> Self {
        let max = scale * max(row);
        let [sum] = sums(row, row, |[sum], x, _| {
            for l in 0..LANES {
                sum[l] += exp(scale * x[l] - max);
            }
        });
        let log_sum = max + sum.ln() as f32;
        Self { scale, log_sum }
    }

    #[inline(always)]
    fn probability(self, logit: f32) -> f32 {
        exp(self.scale * logit - self.log_sum)
    }
}

/// The loss and the softmax of every row.
pub(super) fn cross_entropy(logits: &[f32], v: usize, targets: &[u32]) -> (Vec<f32>, Vec<Softmax>) {
    let rows = logits
        .par_chunks_exact(v)
        .zip(targets)
        .with_min_len(TASK / v + 1);
    rows.map(|(row, &target)| {
        let softmax = vectorised!(Softmax::of(row, 1.));
        (softmax.log_sum - row[target as usize], softmax)
    })
    .unzip()
}

/// `(softmax − onehot(target)) · dloss`, `[M, V]`.
pub(super) fn cross_entropy_backward(
    logits: &[f32],
    v: usize,
    targets: &[u32],
    softmaxes: &[Softmax],
    dloss: &[f32],
) -> Vec<f32> {
    let mut dlogits = vec![0f32; logits.len()];
    dlogits
        .par_chunks_exact_mut(v)
        .zip(logits.par_chunks_exact(v))
        .zip(targets.par_iter().zip(softmaxes).zip(dloss))
        .with_min_len(TASK / v + 1)
        .for_each(|((drow, row), ((&target, softmax), &dloss))| {
            vectorised!(for (d, &x) in drow.iter_mut().zip(row) {
                *d = softmax.probability(x) * dloss;
            });
            drow[target as usize] -= dloss;
        });
    dlogits
}

/// The logits of `k` tokens of every row and that of the others together, and the softmax of these.
pub(super) fn with_rest(
    logits: &[f32],
    v: usize,
    tokens: &[u32],
    k: usize,
) -> (Vec<f32>, Vec<Softmax>) {
    let mut out = vec![ABSENT; tokens.len() / k * (k + 1)];
    let rows = logits.par_chunks_exact(v).zip(tokens.par_chunks_exact(k));
    let rests = out
        .par_chunks_exact_mut(k + 1)
        .zip(rows)
        .with_min_len(TASK / v + 1)
        .map_init(Vec::new, |others, (out, (row, tokens))| {
            others.clear();
            others.extend_from_slice(row);
            for (out, token) in out.iter_mut().zip(tokens) {
                if *token != NO_TOKEN {
                    *out = std::mem::replace(&mut others[*token as usize], ABSENT);
                }
            }
            let rest = vectorised!(Softmax::of(others, 1.));
            out[k] = rest.log_sum;
            rest
        });
    let rests = rests.collect();
    (out, rests)
}

/// By the logits, `[M, V]`: a token's own, or its share of the others'.
pub(super) fn with_rest_backward(
    logits: &[f32],
    v: usize,
    tokens: &[u32],
    k: usize,
    rests: &[Softmax],
    dout: &[f32],
) -> Vec<f32> {
    let mut dlogits = vec![0f32; logits.len()];
    let rows = logits.par_chunks_exact(v).zip(tokens.par_chunks_exact(k));
    dlogits
        .par_chunks_exact_mut(v)
        .zip(rows)
        .zip(rests.par_iter().zip(dout.par_chunks_exact(k + 1)))
        .with_min_len(TASK / v + 1)
        .for_each(|((drow, (row, tokens)), (rest, dout))| {
            let drest = dout[k];
            vectorised!(for (d, &x) in drow.iter_mut().zip(row) {
                *d = rest.probability(x) * drest;
            });
            for (token, dout) in tokens.iter().zip(dout) {
                if *token != NO_TOKEN {
                    drow[*token as usize] = *dout;
                }
            }
        });
    dlogits
}

/// The divergence and both softmaxes (teacher, student) of every row.
pub(super) fn forward_kl(
    teacher: &[f32],
    student: &[f32],
    v: usize,
    temperature: f32,
) -> (Vec<f32>, Vec<[Softmax; 2]>) {
    let scale = 1. / temperature;
    let rows = teacher.par_chunks_exact(v).zip(student.par_chunks_exact(v));
    rows.with_min_len(TASK / v + 1)
        .map(|(teacher, student)| {
            vectorised!({
                let (max_t, max_s) = (scale * max(teacher), scale * max(student));
                // Σp(ln p − ln q), each logit relative to its row's greatest: small numbers stay exact.
                let [sum_t, sum_s, difference] =
                    sums(teacher, student, |[sum_t, sum_s, difference], t, s| {
                        for l in 0..LANES {
                            let (t, s) = (scale * t[l] - max_t, scale * s[l] - max_s);
                            let p = exp(t);
                            sum_t[l] += p;
                            sum_s[l] += exp(s);
                            difference[l] += p * (t - s);
                        }
                    });
                let kl = difference / sum_t - sum_t.ln() + sum_s.ln();
                let softmax = |max: f32, sum: f64| Softmax {
                    scale,
                    log_sum: max + sum.ln() as f32,
                };
                (kl as f32, [softmax(max_t, sum_t), softmax(max_s, sum_s)])
            })
        })
        .unzip()
}

/// `(softmax(student / τ) − softmax(teacher / τ)) / τ · dloss`, `[M, V]`.
pub(super) fn forward_kl_backward(
    teacher: &[f32],
    student: &[f32],
    v: usize,
    softmaxes: &[[Softmax; 2]],
    dloss: &[f32],
) -> Vec<f32> {
    let mut dstudent = vec![0f32; student.len()];
    dstudent
        .par_chunks_exact_mut(v)
        .zip(teacher.par_chunks_exact(v).zip(student.par_chunks_exact(v)))
        .zip(softmaxes.par_iter().zip(dloss))
        .with_min_len(TASK / v + 1)
        .for_each(|((drow, (teacher, student)), ([p, q], &dloss))| {
            let factor = dloss * q.scale;
            vectorised!(
                for ((d, &t), &s) in drow.iter_mut().zip(teacher).zip(student) {
                    *d = (q.probability(s) - p.probability(t)) * factor;
                }
            )
        });
    dstudent
}

/// The divergences that are not worth lanes of their own: value and both softmaxes of every row.
pub(super) fn divergence(
    kind: Divergence,
    teacher: &[f32],
    student: &[f32],
    v: usize,
    temperature: f32,
) -> (Vec<f32>, Vec<[Softmax; 2]>) {
    let scale = 1. / temperature;
    let rows = teacher.par_chunks_exact(v).zip(student.par_chunks_exact(v));
    rows.with_min_len(TASK / v + 1)
        .map(|(teacher, student)| {
            vectorised!({
                let both = [Softmax::of(teacher, scale), Softmax::of(student, scale)];
                let mut sum = 0f64;
                for (p, q, log_ratio) in pairs(teacher, student, both) {
                    sum += f64::from(term(kind, p, q, log_ratio));
                }
                (sum as f32, both)
            })
        })
        .unzip()
}

/// By the student's logits, `[M, V]`: `q (f − Σ q f) / τ · dloss` with `f = ∂D/∂q`.
pub(super) fn divergence_backward(
    kind: Divergence,
    teacher: &[f32],
    student: &[f32],
    v: usize,
    softmaxes: &[[Softmax; 2]],
    dloss: &[f32],
) -> Vec<f32> {
    let mut dstudent = vec![0f32; student.len()];
    dstudent
        .par_chunks_exact_mut(v)
        .zip(teacher.par_chunks_exact(v).zip(student.par_chunks_exact(v)))
        .zip(softmaxes.par_iter().zip(dloss))
        .with_min_len(TASK / v + 1)
        .for_each(|((drow, (teacher, student)), (both, &dloss))| {
            vectorised!({
                let (mut sum, mut mass) = (0f64, 0f64);
                for (d, (p, q, log_ratio)) in drow.iter_mut().zip(pairs(teacher, student, *both)) {
                    *d = slope(kind, p, q, log_ratio);
                    sum += f64::from(q) * f64::from(*d);
                    mass += f64::from(q);
                }
                // Where the mean is all but one slope, what is left is as exact as the probabilities.
                let mean = sum / mass;
                let factor = dloss * both[1].scale;
                for (d, (_, q, _)) in drow.iter_mut().zip(pairs(teacher, student, *both)) {
                    *d = q * (f64::from(*d) - mean) as f32 * factor;
                }
            })
        });
    dstudent
}

/// `(p, q, ln q − ln p)` of every entry.
#[inline(always)]
fn pairs(
    teacher: &[f32],
    student: &[f32],
    [p, q]: [Softmax; 2],
) -> impl Iterator<Item = (f32, f32, f32)> {
    teacher.iter().zip(student).map(
        #[inline(always)]
        move |(&t, &s)| {
            let (log_p, log_q) = (p.scale * t - p.log_sum, q.scale * s - q.log_sum);
            (exp(log_p), exp(log_q), log_q - log_p)
        },
    )
}

/// `ln((1 + eʳ) / 2)`.
#[inline(always)]
fn log_mean(r: f32) -> f32 {
    r.max(0.) + (-r.abs()).exp().ln_1p() - std::f32::consts::LN_2
}

/// An entry's part of the divergence.
#[inline(always)]
fn term(kind: Divergence, p: f32, q: f32, log_ratio: f32) -> f32 {
    match kind {
        Divergence::ForwardKl => -p * log_ratio,
        Divergence::ReverseKl => q * log_ratio,
        Divergence::Jsd => {
            // ln(m/p) and ln(m/q) of the mean m of both, from the ratio alone.
            let over_p = log_mean(log_ratio);
            let over_q = log_mean(-log_ratio);
            -0.5 * (p * over_p + q * over_q)
        }
        Divergence::Tvd => 0.5 * (p - q).abs(),
    }
}

/// `∂D/∂q` of an entry, up to a constant that the softmax takes out.
#[inline(always)]
fn slope(kind: Divergence, p: f32, q: f32, log_ratio: f32) -> f32 {
    match kind {
        Divergence::ForwardKl => -(-log_ratio).exp(),
        Divergence::ReverseKl => log_ratio,
        Divergence::Jsd => -0.5 * log_mean(-log_ratio),
        Divergence::Tvd if q > p => 0.5,
        Divergence::Tvd if q < p => -0.5,
        Divergence::Tvd => 0.,
    }
}

/// `Σ(x − target)²` and `Σ target²` of every row.
pub(super) fn squared_errors(x: &[f32], target: &[f32], d: usize) -> Vec<[f64; 2]> {
    let rows = x.par_chunks_exact(d).zip(target.par_chunks_exact(d));
    rows.with_min_len(TASK / d + 1)
        .map(|(x, target)| {
            vectorised!(sums(x, target, |[error, size], x, t| {
                for l in 0..LANES {
                    error[l] += (x[l] - t[l]) * (x[l] - t[l]);
                    size[l] += t[l] * t[l];
                }
            }))
        })
        .collect()
}

/// `(x − target)` times the factor of its row, `[M, D]`.
pub(super) fn scaled_difference(x: &[f32], target: &[f32], d: usize, factors: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    out.par_chunks_exact_mut(d)
        .zip(x.par_chunks_exact(d).zip(target.par_chunks_exact(d)))
        .zip(factors)
        .with_min_len(TASK / d + 1)
        .for_each(|((out, (x, target)), &factor)| {
            vectorised!(for ((out, &x), &t) in out.iter_mut().zip(x).zip(target) {
                *out = (x - t) * factor;
            })
        });
    out
}

#[inline(always)]
fn max(row: &[f32]) -> f32 {
    let (blocks, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = lane.max(x);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

/// `K` sums over the entries of two equally long rows; `add` adds the terms of lanes of both.
#[inline(always)]
fn sums<const K: usize>(
    a: &[f32],
    b: &[f32],
    add: impl Fn(&mut [[f32; LANES]; K], [f32; LANES], [f32; LANES]),
) -> [f64; K] {
    let mut totals = [0f64; K];
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let (full_a, rest_a) = a.as_chunks::<LANES>();
        let (full_b, rest_b) = b.as_chunks::<LANES>();
        let mut lanes = [[0f32; LANES]; K];
        for (&a, &b) in full_a.iter().zip(full_b) {
            add(&mut lanes, a, b);
        }
        let (mut last_a, mut last_b) = ([0f32; LANES], [0f32; LANES]);
        last_a[..rest_a.len()].copy_from_slice(rest_a);
        last_b[..rest_b.len()].copy_from_slice(rest_b);
        let mut last = [[0f32; LANES]; K];
        add(&mut last, last_a, last_b);
        for ((total, lanes), last) in totals.iter_mut().zip(lanes).zip(last) {
            let entries = lanes.iter().chain(&last[..rest_a.len()]);
            *total += entries.map(|&x| x as f64).sum::<f64>();
        }
    }
    totals
}
