//! MLA fitted to the teacher's attention on real text. Against [`super::published`]:
//!
//! - rotary pairs stay pairs, turned by the teacher's own frequencies (its scaling in them, and no other: what
//!   the config asks for would turn them otherwise than the teacher); which pairs, the sample decides;
//! - the shared rotary key is the complex principal component over key heads of each frequency (a
//!   complex factor commutes with rotation), and each head's factor is folded into its queries;
//! - the latent comes from the un-rotated keys and the values only, by an SVD weighted on both sides: by
//!   the inputs that occur, by what queries ask of keys, by what the output projection makes of values;
//! - down- and up-projections are balanced, and a magnitude of cos and sin is divided out;
//! - the output projection is fitted in closed form.

use candle_core::Tensor;
use faer::prelude::ReborrowMut;
use faer::{Mat, MatRef, Scale};

use super::init::named;
use super::{MlaConfig, Spectrum};
use crate::Result;
use crate::mixer::calibration::{Fitted, Sample, Statistics, fit_output};
use crate::mixer::linalg::{eigen, floor, matrix, root, svd};
use crate::mixer::{AttentionWeights, MixerConfig, RopeConfig};

/// Weights of the keys' block against the values' that are tried.
const KEY_WEIGHTS: [f64; 3] = [0.1, 0.3, 1.0];

/// The best of the candidates (pairs to rotate, weight of the keys) on the samples, and its config, which
/// says the frequencies where they are not the standard ones.
pub fn refined(
    c: &MlaConfig,
    attention: &AttentionWeights,
    statistics: &Statistics,
    samples: &[Sample],
) -> Result<(MlaConfig, Fitted)> {
    let (_, hidden) = attention.q.dims2()?;
    c.fits(&attention.config, hidden)?;
    let teacher = Teacher::new(attention, statistics)?;
    let mut best: Option<(MlaConfig, Fitted)> = None;
    for pairs in teacher.choices(c.qk_rope_head_dim / 2) {
        for weight in KEY_WEIGHTS {
            let (config, tensors) = teacher.candidate(c, &pairs, weight)?;
            let samples = samples.iter().cloned().map(Ok);
            let fitted = fit_output(&MixerConfig::Mla(config.clone()), tensors, samples)?;
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
    let rope = teacher.rope(c, &pairs);
    let queries = teacher.queries(c, &rope, &pairs, &plain, &factors);
    let (latent, _) = teacher.weighted(c, &plain, KEY_WEIGHTS[1])?;
    let energies = |m: &Mat<f64>| -> Result<Vec<f64>> {
        let mut energies = eigen(&teacher.covariance(m))?.values;
        // A matrix has no more of them than columns.
        energies.truncate(m.ncols());
        Ok(energies)
    };
    Ok(Spectrum {
        kv: energies(&latent)?,
        q: energies(&queries)?,
    })
}

/// A matrix whose rows belong to heads, `dim` rows each.
struct Heads {
    rows: Mat<f64>,
    dim: usize,
}

impl Heads {
    fn head(&self, head: usize) -> MatRef<'_, f64> {
        self.rows.as_ref().subrows(head * self.dim, self.dim)
    }

    fn each(&self) -> impl Iterator<Item = MatRef<'_, f64>> {
        (0..self.rows.nrows() / self.dim).map(|head| self.head(head))
    }
}

/// A teacher's layer in matrices, and what all candidates need of them. Where it has biases they are the last column of queries, keys and
/// values, and every input `x` has a 1 behind it.
struct Teacher<'a> {
    attention: AttentionWeights,
    q: Heads,
    k: Heads,
    v: Heads,
    statistics: &'a Statistics,
    /// `E[x xᵀ]`, rare directions lifted ([`floor`]).
    moment: Mat<f64>,
    /// `E[q qᵀ]` of every query head, `[hd, hd]`.
    asked: Vec<Mat<f64>>,
    /// `E[k kᵀ]` of all key heads, `[G·hd, G·hd]`.
    keys: Mat<f64>,
    /// `Oᵀ O` of every query head's columns of the output projection, `[hd, hd]`.
    made: Vec<Mat<f64>>,
    /// Radians a position of each of the `hd/2` pairs.
    frequencies: Vec<f64>,
    /// Of cos and sin.
    magnitude: f64,
}

impl<'a> Teacher<'a> {
    fn new(attention: &'a AttentionWeights, statistics: &'a Statistics) -> Result<Self> {
        let moment = &statistics.moment(attention);
        let attention = attention.linear(Some(moment))?;
        let a = &attention.config;
        let heads = |rows: Mat<f64>| Heads {
            rows,
            dim: a.head_dim,
        };
        let [q, k, v] = attention.matrices()?.map(heads);
        let o = heads(matrix(&attention.o.t()?.contiguous()?)?);
        let spread = heads(&q.rows * moment);
        let mut lifted = moment.clone();
        let floor = floor(moment);
        (0..lifted.nrows()).for_each(|i| lifted[(i, i)] += floor);
        let (frequencies, magnitude) = match &a.rope {
            Some(rope) => rope.frequencies(a.head_dim),
            None => (vec![0.0; a.head_dim / 2], 1.0),
        };
        Ok(Self {
            asked: (spread.each().zip(q.each()))
                .map(|(spread, q)| spread * q.transpose())
                .collect(),
            keys: &k.rows * moment * k.rows.transpose(),
            made: o.each().map(|o| o * o.transpose()).collect(),
            q,
            k,
            v,
            statistics,
            moment: lifted,
            frequencies,
            magnitude,
            attention,
        })
    }

    /// `E[(M x)(M x)ᵀ]`
    fn covariance(&self, m: &Mat<f64>) -> Mat<f64> {
        m * &self.moment * m.transpose()
    }

    /// `D`, and one more where there are biases.
    fn inputs(&self) -> usize {
        self.moment.nrows()
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

    fn candidate(
        &self,
        c: &MlaConfig,
        pairs: &[usize],
        key_weight: f64,
    ) -> Result<(MlaConfig, Vec<(String, Tensor)>)> {
        let d = self.inputs();
        let plain = self.plain_dims(pairs, c.qk_nope_head_dim);
        let (shared, factors) = self.shared_keys(pairs)?;
        let mut config = c.clone();
        config.rope = self.rope(c, pairs);
        let queries = self.queries(c, &config.rope, pairs, &plain, &factors);
        let (mut q_down, mut q_up) = self.factored(&queries, c.q_lora_rank)?;
        let (mut latent, mut kv_up) = self.latent(c, &plain, key_weight)?;
        balance(&mut q_down, &mut q_up);
        balance(&mut latent, &mut kv_up);
        let r = c.kv_lora_rank;
        let down = Mat::from_fn(r + 2 * pairs.len(), d, |i, n| match i < r {
            true => latent[(i, n)],
            false => shared[(i - r, n)],
        });
        let tensors = named(c, [&q_down, &q_up, &down, &kv_up], &self.attention)?;
        Ok((config, tensors))
    }

    /// The chosen pairs turn as the teacher's.
    fn rope(&self, c: &MlaConfig, pairs: &[usize]) -> RopeConfig {
        let chosen = pairs.iter().map(|i| self.frequencies[*i]).collect();
        let asked = RopeConfig {
            inv_freq: None,
            ..c.rope.clone()
        };
        asked.turning(chosen)
    }

    /// The queries' rows, head by head: un-rotated dims, then the rotated pairs times the conjugate of the
    /// head's factor, scaled so that scores are the teacher's.
    fn queries(
        &self,
        c: &MlaConfig,
        rope: &RopeConfig,
        pairs: &[usize],
        plain: &[usize],
        factors: &[Vec<(f64, f64)>],
    ) -> Mat<f64> {
        let (h, g, hd) = self.sizes();
        let (nope, d) = (c.qk_nope_head_dim, self.inputs());
        let magnitude = rope.frequencies(c.qk_rope_head_dim).1;
        // The teacher's scale of scores over the student's; of the teacher all dims turn.
        let scale = self.attention.config.scale() / c.scale();
        let scale = scale * self.magnitude * self.magnitude;
        let mut queries = Mat::zeros(h * (nope + 2 * pairs.len()), d);
        for head in 0..h {
            let own = self.q.head(head);
            let base = head * (nope + 2 * pairs.len());
            for (i, dim) in plain.iter().enumerate() {
                for n in 0..d {
                    queries[(base + i, n)] = scale * own[(*dim, n)];
                }
            }
            for (j, pair) in pairs.iter().enumerate() {
                // (q_a + i q_b) times the conjugate of the head's factor.
                let (re, im) = factors[j][head * g / h];
                let scale = scale / (magnitude * magnitude);
                for n in 0..d {
                    let (qa, qb) = (own[(*pair, n)], own[(pair + hd / 2, n)]);
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
        let d = self.inputs();
        let mut rows = Mat::zeros(2 * pairs.len(), d);
        let mut factors = Vec::new();
        for (j, pair) in pairs.iter().enumerate() {
            let at = |group: usize| (group * hd + pair, group * hd + pair + hd / 2);
            // A key head weighs what its queries ask of this frequency.
            let weight: Vec<f64> = (0..g)
                .map(|group| {
                    let heads = (0..h).filter(|head| head * g / h == group);
                    let asked = heads.map(|head| {
                        let (asked, other) = (&self.asked[head], pair + hd / 2);
                        asked[(*pair, *pair)] + asked[(other, other)]
                    });
                    asked.sum::<f64>().sqrt()
                })
                .collect();
            // E[z_m conj(z_n)] of the complex keys z = k_a + i k_b.
            let moment = |m: usize, n: usize| {
                let ((ma, mb), (na, nb)) = (at(m), at(n));
                let p = &self.keys;
                (p[(ma, na)] + p[(mb, nb)], p[(mb, na)] - p[(ma, nb)])
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
                let key = self.k.head(n);
                for x in 0..d {
                    let (ka, kb) = (key[(*pair, x)], key[(pair + hd / 2, x)]);
                    rows[(2 * j, x)] += size * (re * ka - im * kb);
                    rows[(2 * j + 1, x)] += size * (re * kb + im * ka);
                }
            }
            factors.push(raw.iter().map(|(a, b)| (a / size, b / size)).collect());
        }
        Ok((rows, factors))
    }

    /// `m ≈ up · down` of a rank, best on the inputs that occur, singular values `S` split evenly.
    ///
    /// With `m C^½ = U S Vᵀ`, `C` the inputs' moment: `up = U S^½` and `down = S^½ Vᵀ C^-½ = S^-½ Uᵀ m`, so that
    /// the eigenvectors `U` of `m C mᵀ` are all that is needed.
    fn factored(&self, m: &Mat<f64>, rank: usize) -> Result<(Mat<f64>, Mat<f64>)> {
        let eigen = eigen(&self.covariance(m))?;
        // The root of a singular value; 0 where `m` has no more of them.
        let root = |r: usize| eigen.values.get(r).map_or(0.0, |value| value.powf(0.25));
        let leading = Mat::from_fn(m.nrows(), rank, |i, r| match root(r) > 0.0 {
            true => eigen.vectors[(i, r)],
            false => 0.0,
        });
        let mut down = leading.transpose() * m;
        let mut up = leading;
        for r in (0..rank).filter(|r| root(*r) > 0.0) {
            up.col_mut(r).iter_mut().for_each(|u| *u *= root(r));
            down.row_mut(r).iter_mut().for_each(|d| *d /= root(r));
        }
        Ok((down, up))
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
            let rows = up.subrows(head * block, block);
            let mut own = plain_up.subrows_mut(head * block, block);
            let keys = key * rows.subrows(0, nope);
            own.rb_mut()
                .subrows_mut(0, nope)
                .copy_from(keys * Scale(1.0 / key_weight));
            own.subrows_mut(nope, hd)
                .copy_from(value * rows.subrows(nope, hd));
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
        let (heads, nope) = (c.kv_heads(), plain.len());
        let block = nope + hd;
        let mut weighted = Mat::zeros(heads * block, self.inputs());
        let mut unweight = Vec::new();
        for head in 0..heads {
            // With full kv heads each query head has a copy of its group's keys and values.
            let group = head * g / heads;
            let own = || (0..h).filter(|q| q * heads / h == head);
            let asked = Mat::from_fn(nope, nope, |i, j| {
                let moment = |q: usize| self.asked[q][(plain[i], plain[j])];
                own().map(moment).sum::<f64>() / hd as f64
            });
            let made = own().fold(Mat::zeros(hd, hd), |sum, q| sum + &self.made[q]);
            let (key, value) = (self.k.head(group), self.v.head(group));
            let (key_root, key_unroot) = root(&asked)?;
            let (value_root, value_unroot) = root(&made)?;
            // What a query makes of the bias of keys that do not turn is the same for all of them, and nothing to the softmax.
            let bias = c.attention_bias.then(|| key.ncols() - 1);
            let keys = Mat::from_fn(nope, key.ncols(), |i, n| match Some(n) == bias {
                true => 0.0,
                false => key_weight * key[(plain[i], n)],
            });
            let mut rows = weighted.subrows_mut(head * block, block);
            rows.rb_mut()
                .subrows_mut(0, nope)
                .copy_from(key_root * keys);
            rows.subrows_mut(nope, hd).copy_from(value_root * value);
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::mixer::AttentionConfig;
    use crate::op::laws::random;

    /// Sums entry by entry, as the formulas have them, beside the products of matrices.
    #[test]
    fn moments_of_heads_are_sums_over_entries() {
        let (h, g, hd, d) = (4, 2, 4, 6);
        let inputs = random(
            &[
                &[h * hd, d],
                &[g * hd, d],
                &[g * hd, d],
                &[d, h * hd],
                &[9, d],
            ],
            3,
        );
        let inputs = inputs
            .iter()
            .map(|t| t.to_dtype(candle_core::DType::F32).unwrap());
        let [q, k, v, o, x] = inputs.collect::<Vec<_>>().try_into().unwrap();
        let rope = Some(RopeConfig::new(100.0));
        let attention = AttentionWeights {
            config: AttentionConfig::new(h, g, hd, rope),
            q,
            k,
            v,
            o,
            biases: None,
            norms: None,
        };
        let zeros = Tensor::zeros((9, d), candle_core::DType::F32, &Device::Cpu).unwrap();
        let [x, zeros] = [x, zeros].map(|t| t.unsqueeze(0).unwrap());
        let sums = crate::mixer::calibration::sums(&x, &zeros).unwrap();
        let statistics = Statistics::new(&attention, 9, sums.each_ref()).unwrap();
        let teacher = Teacher::new(&attention, &statistics).unwrap();
        let product = |a: &Mat<f64>, i: usize, b: &Mat<f64>, j: usize| -> f64 {
            let moment = &statistics.input_moment;
            let row = |m: usize| (0..d).map(|n| moment[(m, n)] * b[(j, n)]).sum::<f64>();
            (0..d).map(|m| a[(i, m)] * row(m)).sum()
        };
        let near = |found: f64, wanted: f64| {
            assert!((found - wanted).abs() < 1e-9, "{found} for {wanted}")
        };
        for (i, j) in [(0, 0), (1, 3), (2, 1)] {
            for head in 0..h {
                let (a, b) = (head * hd + i, head * hd + j);
                near(
                    teacher.asked[head][(i, j)],
                    product(&teacher.q.rows, a, &teacher.q.rows, b),
                );
                let o = matrix(&attention.o).unwrap();
                near(
                    teacher.made[head][(i, j)],
                    (0..d).map(|n| o[(n, a)] * o[(n, b)]).sum(),
                );
            }
            let (a, b) = (i, hd + j);
            near(
                teacher.keys[(a, b)],
                product(&teacher.k.rows, a, &teacher.k.rows, b),
            );
        }
    }

    /// Of full rank a factored matrix is the matrix; of a lower one its error is the energy cut off.
    #[test]
    fn factors_keep_the_largest_energies() {
        let (attention, sample) = crate::mixer::calibration_tests::teacher(2);
        let statistics = Statistics::of(&attention, &sample).unwrap();
        let teacher = Teacher::new(&attention, &statistics).unwrap();
        let m = &teacher.q.rows;
        let energies = eigen(&teacher.covariance(m)).unwrap().values;
        for rank in [3, m.nrows().min(m.ncols())] {
            let (down, up) = teacher.factored(m, rank).unwrap();
            let gap = teacher.covariance(&(m - up * down));
            let cut: f64 = energies.iter().skip(rank).sum();
            let left: f64 = (0..m.nrows()).map(|i| gap[(i, i)]).sum();
            assert!(
                (left - cut).abs() < 1e-9 * energies[0],
                "rank {rank}: {left} for {cut}"
            );
        }
    }
}
