//! MLA fitted to the teacher's attention on real text. Against [`super::reference`]:
//!
//! - rotary pairs stay pairs, turned by the teacher's own frequencies; which pairs, the sample decides;
//! - the shared rotary key is the complex principal component over key heads of each frequency (a
//!   complex factor commutes with rotation), and each head's factor is folded into its queries;
//! - the latent comes from the un-rotated keys and the values only, by an SVD weighted on both sides: by
//!   the inputs that occur, by what queries ask of keys, by what the output projection makes of values;
//! - down- and up-projections are balanced, and YaRN's magnitude is divided out;
//! - the output projection is fitted in closed form.

use candle_core::Tensor;
use faer::Mat;

use super::{MlaConfig, Spectrum};
use crate::Result;
use crate::mixer::calibration::{Fitted, Sample, Statistics, fit_output, root};
use crate::mixer::linalg::{matrix, svd, tensor};
use crate::mixer::{AttentionWeights, MixerConfig};

/// Weights of the keys' block against the values' that are tried.
const KEY_WEIGHTS: [f64; 3] = [0.1, 0.3, 1.0];

/// The best of the candidates (pairs to rotate, weight of the keys) on the sample, and its config, which
/// says the frequencies where they are not the standard ones.
pub fn refined(
    c: &MlaConfig,
    attention: &AttentionWeights,
    statistics: &Statistics,
    sample: &Sample,
) -> Result<(MlaConfig, Fitted)> {
    let (_, hidden) = attention.q.dims2()?;
    c.fits(&attention.config, hidden)?;
    let teacher = Teacher::new(attention, statistics)?;
    let mut best: Option<(MlaConfig, Fitted)> = None;
    for pairs in teacher.choices(c.qk_rope_head_dim / 2) {
        for weight in KEY_WEIGHTS {
            let (config, tensors) = teacher.candidate(c, &pairs, weight)?;
            let fitted = fit_output(&MixerConfig::Mla(config.clone()), tensors, sample)?;
            if best.as_ref().is_none_or(|(_, b)| fitted.error < b.error) {
                best = Some((config, fitted));
            }
        }
    }
    Ok(best.expect("there is always a choice of pairs"))
}

/// The energies that ranks are chosen by: of the matrices that [`refined`] cuts, with the most energetic
/// pairs rotated and the middle weight of keys.
pub fn spectrum(
    c: &MlaConfig,
    attention: &AttentionWeights,
    statistics: &Statistics,
) -> Result<Spectrum> {
    let teacher = Teacher::new(attention, statistics)?;
    let pairs = teacher.most_energetic(c.qk_rope_head_dim / 2);
    let plain = teacher.plain_dims(&pairs, c.qk_nope_head_dim);
    let (_, factors) = teacher.shared_keys(&pairs)?;
    let queries = teacher.queries(c, &pairs, &plain, &factors);
    let (latent, _) = teacher.weighted(c, &plain, KEY_WEIGHTS[1])?;
    let energies = |m: &Mat<f64>| -> Result<Vec<f64>> {
        Ok(svd(&(m * &teacher.root))?.s.iter().map(|s| s * s).collect())
    };
    Ok(Spectrum {
        kv: energies(&latent)?,
        q: energies(&queries)?,
    })
}

/// A teacher's layer in matrices.
struct Teacher<'a> {
    attention: &'a AttentionWeights,
    q: Mat<f64>,
    k: Mat<f64>,
    v: Mat<f64>,
    o: Mat<f64>,
    statistics: &'a Statistics,
    /// `E[x xᵀ]`, its root and the root's inverse.
    moment: &'a Mat<f64>,
    root: Mat<f64>,
    unroot: Mat<f64>,
    /// Radians a position of each of the `hd/2` pairs.
    frequencies: Vec<f64>,
}

impl<'a> Teacher<'a> {
    fn new(attention: &'a AttentionWeights, statistics: &'a Statistics) -> Result<Self> {
        let moment = &statistics.input_moment;
        let (root, unroot) = root(moment)?;
        let a = &attention.config;
        Ok(Self {
            attention,
            q: matrix(&attention.q)?,
            k: matrix(&attention.k)?,
            v: matrix(&attention.v)?,
            o: matrix(&attention.o)?,
            statistics,
            moment,
            root,
            unroot,
            frequencies: match &a.rope {
                Some(rope) => rope.frequencies(a.head_dim).0,
                None => vec![0.0; a.head_dim / 2],
            },
        })
    }

    fn sizes(&self) -> (usize, usize, usize) {
        let a = &self.attention.config;
        (a.num_attention_heads, a.num_key_value_heads, a.head_dim)
    }

    /// Sets of `count` pairs worth trying: the highest frequencies, every n-th, the most energetic.
    fn choices(&self, count: usize) -> Vec<Vec<usize>> {
        let all = self.sizes().2 / 2;
        let mut choices = vec![(0..count).collect(), self.most_energetic(count)];
        if count > 0 {
            choices.push((0..count).map(|j| j * all / count).collect());
        }
        choices.dedup();
        choices
    }

    /// The pairs that contribute most to scores: mean squares of query times key.
    fn most_energetic(&self, count: usize) -> Vec<usize> {
        let (h, g, hd) = self.sizes();
        let (q, k) = (&self.statistics.query_energy, &self.statistics.key_energy);
        let energy = |pair: usize| -> f64 {
            (0..h)
                .map(|head| q[(head, pair)] * k[(head * g / h, pair)])
                .sum()
        };
        let energies: Vec<f64> = (0..hd / 2).map(energy).collect();
        let mut pairs: Vec<usize> = (0..hd / 2).collect();
        pairs.sort_by(|a, b| energies[*b].total_cmp(&energies[*a]));
        pairs.truncate(count);
        pairs.sort_unstable();
        pairs
    }

    /// `E[(a·x)(b·x)]` of two rows.
    fn product(&self, a: &Mat<f64>, i: usize, b: &Mat<f64>, j: usize) -> f64 {
        let d = self.moment.nrows();
        let weighted = |m: usize| (0..d).map(|n| self.moment[(m, n)] * b[(j, n)]).sum::<f64>();
        (0..d).map(|m| a[(i, m)] * weighted(m)).sum()
    }

    fn candidate(
        &self,
        c: &MlaConfig,
        pairs: &[usize],
        key_weight: f64,
    ) -> Result<(MlaConfig, Vec<(String, Tensor)>)> {
        let d = self.moment.nrows();
        let plain = self.plain_dims(pairs, c.qk_nope_head_dim);
        let (shared, factors) = self.shared_keys(pairs)?;
        let queries = self.queries(c, pairs, &plain, &factors);
        let (mut q_down, mut q_up) = self.factored(&queries, c.q_lora_rank)?;
        let (mut latent, mut kv_up) = self.latent(c, &plain, key_weight)?;
        balance(&mut q_down, &mut q_up);
        balance(&mut latent, &mut kv_up);
        let r = c.kv_lora_rank;
        let down = Mat::from_fn(r + 2 * pairs.len(), d, |i, n| match i < r {
            true => latent[(i, n)],
            false => shared[(i - r, n)],
        });
        let mut config = c.clone();
        let chosen: Vec<f64> = pairs.iter().map(|i| self.frequencies[*i]).collect();
        config.rope.inv_freq = None;
        let mut unscaled = config.rope.clone();
        unscaled.scaling = None;
        let standard = unscaled.frequencies(c.qk_rope_head_dim).0;
        if standard
            .iter()
            .zip(&chosen)
            .any(|(s, f)| (s - f).abs() > 1e-9 * s)
        {
            config.rope.inv_freq = Some(chosen);
        }
        let mut tensors = vec![
            ("q_a_proj.weight".to_owned(), tensor(&q_down)?),
            ("q_b_proj.weight".to_owned(), tensor(&q_up)?),
            ("kv_a_proj_with_mqa.weight".to_owned(), tensor(&down)?),
            ("kv_b_proj.weight".to_owned(), tensor(&kv_up)?),
            ("out_proj.weight".to_owned(), self.attention.o.clone()),
        ];
        tensors.extend(super::init::unit_norms(c)?);
        Ok((config, tensors))
    }

    /// The queries' rows, head by head: un-rotated dims, then the rotated pairs times the conjugate of the
    /// head's factor, scaled so that scores are the teacher's.
    fn queries(
        &self,
        c: &MlaConfig,
        pairs: &[usize],
        plain: &[usize],
        factors: &[Vec<(f64, f64)>],
    ) -> Mat<f64> {
        let (h, g, hd) = self.sizes();
        let (nope, d) = (c.qk_nope_head_dim, self.moment.nrows());
        let magnitude = c.rope.frequencies(c.qk_rope_head_dim).1;
        // The softmax scale of the student over the teacher's.
        let scale = ((nope + c.qk_rope_head_dim) as f64 / hd as f64).sqrt();
        let mut queries = Mat::zeros(h * (nope + 2 * pairs.len()), d);
        for head in 0..h {
            let base = head * (nope + 2 * pairs.len());
            for (i, dim) in plain.iter().enumerate() {
                for n in 0..d {
                    queries[(base + i, n)] = scale * self.q[(head * hd + dim, n)];
                }
            }
            for (j, pair) in pairs.iter().enumerate() {
                // (q_a + i q_b) times the conjugate of the head's factor.
                let (re, im) = factors[j][head * g / h];
                let (a, b) = (head * hd + pair, head * hd + pair + hd / 2);
                let scale = scale / (magnitude * magnitude);
                for n in 0..d {
                    let (qa, qb) = (self.q[(a, n)], self.q[(b, n)]);
                    queries[(base + nope + 2 * j, n)] = scale * (qa * re + qb * im);
                    queries[(base + nope + 2 * j + 1, n)] = scale * (qb * re - qa * im);
                }
            }
        }
        queries
    }

    /// `nope` dims that do not turn: those of the lowest frequencies among the pairs that are left.
    fn plain_dims(&self, pairs: &[usize], nope: usize) -> Vec<usize> {
        let half = self.sizes().2 / 2;
        let mut left: Vec<usize> = (0..half).filter(|i| !pairs.contains(i)).collect();
        left.sort_by(|a, b| self.frequencies[*a].total_cmp(&self.frequencies[*b]));
        left.truncate(nope / 2);
        left.sort_unstable();
        left.iter().flat_map(|i| [*i, i + half]).collect()
    }

    /// For each pair the shared key's two rows, and every key head's complex factor (re, im) of it.
    #[allow(clippy::type_complexity)]
    fn shared_keys(&self, pairs: &[usize]) -> Result<(Mat<f64>, Vec<Vec<(f64, f64)>>)> {
        let (h, g, hd) = self.sizes();
        let d = self.moment.nrows();
        let mut rows = Mat::zeros(2 * pairs.len(), d);
        let mut factors = Vec::new();
        for (j, pair) in pairs.iter().enumerate() {
            let at = |group: usize| (group * hd + pair, group * hd + pair + hd / 2);
            // A key head weighs what its queries ask of this frequency.
            let weight: Vec<f64> = (0..g)
                .map(|group| {
                    let heads = (0..h).filter(|head| head * g / h == group);
                    let asked = heads.map(|head| {
                        let (a, b) = (head * hd + pair, head * hd + pair + hd / 2);
                        self.product(&self.q, a, &self.q, a) + self.product(&self.q, b, &self.q, b)
                    });
                    asked.sum::<f64>().sqrt()
                })
                .collect();
            // E[z_m conj(z_n)] of the complex keys z = k_a + i k_b.
            let moment = |m: usize, n: usize| {
                let ((ma, mb), (na, nb)) = (at(m), at(n));
                let p = |x: usize, y: usize| self.product(&self.k, x, &self.k, y);
                (p(ma, na) + p(mb, nb), p(mb, na) - p(ma, nb))
            };
            let hermitian: Vec<Vec<(f64, f64)>> = (0..g)
                .map(|m| (0..g).map(|n| moment(m, n)).collect())
                .collect();
            // The Hermitian matrix A + iB as the symmetric [[A, −B], [B, A]].
            let embedded = Mat::from_fn(2 * g, 2 * g, |m, n| {
                let (re, im) = hermitian[m % g][n % g];
                let entry = match (m < g, n < g) {
                    (true, true) | (false, false) => re,
                    (true, false) => -im,
                    (false, true) => im,
                };
                weight[m % g] * weight[n % g] * entry
            });
            let top = svd(&embedded)?.u;
            // s = Σ conj(u) w z, and each head's least-squares factor of it.
            let mix: Vec<(f64, f64)> = (0..g)
                .map(|n| (weight[n] * top[(n, 0)], -weight[n] * top[(n + g, 0)]))
                .collect();
            let times = |(a, b): (f64, f64), (c, d): (f64, f64)| (a * c - b * d, a * d + b * c);
            let conj = |(a, b): (f64, f64)| (a, -b);
            let sum = |terms: Vec<(f64, f64)>| {
                terms
                    .into_iter()
                    .fold((0.0, 0.0), |s, t| (s.0 + t.0, s.1 + t.1))
            };
            let with_s = |m: usize| {
                sum((0..g)
                    .map(|n| times(hermitian[m][n], conj(mix[n])))
                    .collect())
            };
            let power = sum((0..g).map(|m| times(mix[m], with_s(m))).collect())
                .0
                .max(f64::MIN_POSITIVE);
            let raw: Vec<(f64, f64)> = (0..g)
                .map(with_s)
                .map(|(a, b)| (a / power, b / power))
                .collect();
            // Factors of mean square 1: the size goes into the key.
            let size = (raw.iter().map(|(a, b)| a * a + b * b).sum::<f64>() / g as f64)
                .sqrt()
                .max(f64::MIN_POSITIVE);
            for (n, (re, im)) in mix.iter().enumerate() {
                let (a, b) = at(n);
                for x in 0..d {
                    let (ka, kb) = (self.k[(a, x)], self.k[(b, x)]);
                    rows[(2 * j, x)] += size * (re * ka - im * kb);
                    rows[(2 * j + 1, x)] += size * (re * kb + im * ka);
                }
            }
            factors.push(raw.iter().map(|(a, b)| (a / size, b / size)).collect());
        }
        Ok((rows, factors))
    }

    /// `m ≈ up · down` of a rank, best on the inputs that occur, singular values split evenly.
    fn factored(&self, m: &Mat<f64>, rank: usize) -> Result<(Mat<f64>, Mat<f64>)> {
        let s = svd(&(m * &self.root))?;
        let rank_s = s.s.len().min(rank);
        let value = |j: usize| if j < rank_s { s.s[j].sqrt() } else { 0.0 };
        let up = Mat::from_fn(m.nrows(), rank, |i, j| {
            if j < rank_s {
                s.u[(i, j)] * value(j)
            } else {
                0.0
            }
        });
        let down = Mat::from_fn(rank, m.ncols(), |i, n| {
            if i < rank_s {
                value(i) * s.v[(n, i)]
            } else {
                0.0
            }
        });
        Ok((down * &self.unroot, up))
    }

    /// The latent's rows `[R, D]` and `kv_b_proj`.
    fn latent(
        &self,
        c: &MlaConfig,
        plain: &[usize],
        key_weight: f64,
    ) -> Result<(Mat<f64>, Mat<f64>)> {
        let (weighted, unweight) = self.weighted(c, plain, key_weight)?;
        let (nope, hd) = (plain.len(), self.sizes().2);
        let block = nope + hd;
        let (down, up) = self.factored(&weighted, c.kv_lora_rank)?;
        let mut plain_up = Mat::zeros(weighted.nrows(), c.kv_lora_rank);
        for (head, (key, value)) in unweight.iter().enumerate() {
            let base = head * block;
            for r in 0..c.kv_lora_rank {
                for i in 0..nope {
                    let sum: f64 = (0..nope).map(|j| key[(i, j)] * up[(base + j, r)]).sum();
                    plain_up[(base + i, r)] = sum / key_weight;
                }
                for i in 0..hd {
                    let sum: f64 = (0..hd)
                        .map(|j| value[(i, j)] * up[(base + nope + j, r)])
                        .sum();
                    plain_up[(base + nope + i, r)] = sum;
                }
            }
        }
        Ok((down, plain_up))
    }

    /// Un-rotated keys and values, each head's block weighted by what queries ask and by what the output
    /// projection makes, and each head's inverse weights.
    #[allow(clippy::type_complexity)]
    fn weighted(
        &self,
        c: &MlaConfig,
        plain: &[usize],
        key_weight: f64,
    ) -> Result<(Mat<f64>, Vec<(Mat<f64>, Mat<f64>)>)> {
        let (h, g, hd) = self.sizes();
        let (heads, nope, d) = (c.num_key_value_heads, plain.len(), self.moment.nrows());
        let block = nope + hd;
        let mut weighted = Mat::zeros(heads * block, d);
        let mut unweight = Vec::new();
        for head in 0..heads {
            // With full kv heads each query head has a copy of its group's keys and values.
            let group = head * g / heads;
            let own: Vec<usize> = (0..h).filter(|q| q * heads / h == head).collect();
            let asked = Mat::from_fn(nope, nope, |i, j| {
                let moment = |q: &usize| {
                    self.product(&self.q, q * hd + plain[i], &self.q, q * hd + plain[j])
                };
                own.iter().map(moment).sum::<f64>() / hd as f64
            });
            let made = Mat::from_fn(hd, hd, |i, j| {
                let through = |q: &usize| {
                    (0..d)
                        .map(|n| self.o[(n, q * hd + i)] * self.o[(n, q * hd + j)])
                        .sum::<f64>()
                };
                own.iter().map(through).sum::<f64>()
            });
            let keys = Mat::from_fn(nope, d, |i, n| self.k[(group * hd + plain[i], n)]);
            let values = Mat::from_fn(hd, d, |i, n| self.v[(group * hd + i, n)]);
            let (value_root, value_unroot) = root(&made)?;
            let values = value_root * values;
            let (keys, key_unroot) = match nope {
                0 => (keys, Mat::zeros(0, 0)),
                _ => {
                    let (key_root, key_unroot) = root(&asked)?;
                    (key_root * keys, key_unroot)
                }
            };
            for n in 0..d {
                for i in 0..nope {
                    weighted[(head * block + i, n)] = key_weight * keys[(i, n)];
                }
                for i in 0..hd {
                    weighted[(head * block + nope + i, n)] = values[(i, n)];
                }
            }
            unweight.push((key_unroot, value_unroot));
        }
        Ok((weighted, unweight))
    }
}

/// Gives each latent dim's row of `down` and column of `up` one root mean square: a step of the optimizer,
/// which is as long for all entries, then moves both alike.
fn balance(down: &mut Mat<f64>, up: &mut Mat<f64>) {
    for r in 0..down.nrows() {
        let (rows, columns) = (up.nrows(), down.ncols());
        let below = (0..columns).map(|n| down[(r, n)].powi(2)).sum::<f64>() / columns as f64;
        let above = (0..rows).map(|i| up[(i, r)].powi(2)).sum::<f64>() / rows as f64;
        if below > 0.0 && above > 0.0 {
            let factor = (above / below).powf(0.25);
            (0..columns).for_each(|n| down[(r, n)] *= factor);
            (0..rows).for_each(|i| up[(i, r)] /= factor);
        }
    }
}
