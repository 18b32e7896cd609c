//! Laws that every mixer keeps, in every config variant.

use crate::op::laws::{placed, truth};
use crate::weights::Place;
use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const HIDDEN: usize = 16;
const LEN: usize = 13;

/// Every mixer in every variant that takes another path through its code.
fn variants() -> Vec<MixerConfig> {
    let rope = |theta: f64| RopeConfig::new(theta);
    let yarn = RopeConfig {
        scaling: Some(RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 32,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        }),
        ..rope(100.0)
    };
    let attention = |g: usize, rope: Option<RopeConfig>| {
        MixerConfig::Attention(AttentionConfig::new(4, g, 6, rope))
    };
    let mla = |g: usize, nope: usize, rope_dims: usize, norm: bool, rope: RopeConfig| {
        MixerConfig::Mla(MlaConfig {
            num_attention_heads: 4,
            num_key_value_heads: 2,
            use_full_kv_head: g == 4,
            q_lora_rank: 10,
            kv_lora_rank: 8,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope_dims,
            v_head_dim: 6,
            use_lora_layer_norm: norm,
            attention_bias: false,
            rope,
        })
    };
    let biased_mla = || match mla(2, 2, 4, true, rope(100.0)) {
        MixerConfig::Mla(c) => MixerConfig::Mla(MlaConfig {
            attention_bias: true,
            ..c
        }),
        _ => unreachable!(),
    };
    let window = |g: usize, rope: Option<RopeConfig>, size: usize, sinks: usize| {
        MixerConfig::Window(WindowConfig {
            attention: AttentionConfig::new(4, g, 6, rope),
            sliding_window: size,
            num_sink_tokens: sinks,
        })
    };
    let mamba2 = |g: usize, repeat: bool, chunk: usize, state: usize| {
        MixerConfig::Mamba2(Mamba2Config {
            num_heads: 4,
            num_kv_heads: g,
            head_dim: 6,
            d_state: state,
            d_conv: 4,
            repeat_kv_before_conv: repeat,
            chunk_size: chunk,
        })
    };
    vec![
        attention(4, Some(rope(10_000.0))),
        attention(2, Some(yarn.clone())),
        attention(1, None),
        // As Qwen2, Qwen3 and Granite have it.
        MixerConfig::Attention(AttentionConfig {
            attention_bias: true,
            qk_norm_eps: Some(1e-6),
            attention_multiplier: Some(0.3),
            ..AttentionConfig::new(4, 2, 6, Some(rope(100.0)))
        }),
        biased_mla(),
        mla(2, 2, 4, false, yarn),
        mla(4, 4, 2, true, rope(100.0)),
        mla(2, 6, 0, false, rope(100.0)),
        mla(2, 0, 6, false, rope(100.0)),
        window(2, Some(rope(100.0)), 3, 2),
        window(4, Some(rope(100.0)), 4, 0),
        window(1, None, 64, 1),
        mamba2(2, false, 256, 6),
        mamba2(2, true, 5, 6),
        mamba2(4, false, 1, 4),
    ]
}

fn random(shape: &[usize], scale: f64, rng: &mut ChaCha8Rng) -> Tensor {
    let n = shape.iter().product();
    let data: Vec<f64> = (0..n).map(|_| rng.random_range(-scale..scale)).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Random f64 weights; `A_log` and `dt_bias` where real ones lie.
fn weights(config: &MixerConfig, rng: &mut ChaCha8Rng) -> BTreeMap<String, Tensor> {
    let params = config.params(HIDDEN);
    let draw = |(name, shape): (String, Vec<usize>)| {
        let t = random(&shape, 0.6, rng);
        let t = if name.ends_with("norm.weight") {
            (t + 1.0).unwrap()
        } else {
            t
        };
        (name, t)
    };
    params.into_iter().map(draw).collect()
}

fn build(config: &MixerConfig, weights: &BTreeMap<String, Tensor>, dtype: DType) -> Mixer {
    let place = Place {
        compute: dtype,
        ..Place::cpu()
    };
    let weights = Weights::new(weights.clone()).to(&place).unwrap();
    Mixer::new(config, &weights).unwrap()
}

fn case(config: &MixerConfig) -> (Mixer, Tensor) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mixer = build(config, &weights(config, &mut rng), DType::F32);
    let x = random(&[2, LEN, HIDDEN], 1.0, &mut rng)
        .to_dtype(DType::F32)
        .unwrap();
    (mixer, x)
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let difference = || -> Result<f64> {
        (a - b)?
            .abs()?
            .to_dtype(DType::F64)?
            .flatten_all()?
            .max(0)?
            .to_scalar()
    };
    difference().unwrap()
}

/// One layer and the memory of its sequences.
struct Decoding {
    decoder: Decoder,
    pool: Pool,
    work: Work,
}

impl Decoding {
    fn of(mixer: &Mixer) -> Self {
        let decoder = mixer.decoder().unwrap();
        let pool = Pool::new(&[decoder.keeps()], CacheType::F32, 1 << 24, 1).unwrap();
        Self {
            decoder,
            pool,
            work: Work::default(),
        }
    }

    /// The next tokens of each sequence, rows of `HIDDEN`.
    fn read(&mut self, sequences: &mut [(&mut Memory, &[f32])]) -> Vec<Vec<f32>> {
        let x: Vec<f32> = sequences.iter().flat_map(|(_, x)| *x).copied().collect();
        let mut out = vec![f32::NAN; x.len()];
        let mut from = 0;
        let spans = sequences.iter_mut().map(|(memory, x)| {
            memory.reserve(x.len() / HIDDEN).unwrap();
            let rows = from..from + x.len() / HIDDEN;
            from = rows.end;
            Span { memory, rows }
        });
        let mut spans: Vec<Span> = spans.collect();
        self.decoder
            .mix(0, &x, &mut spans, &mut out, &mut self.work);
        let found = spans.iter_mut().map(|span| {
            span.memory.advance(span.rows.len());
            out[span.rows.start * HIDDEN..span.rows.end * HIDDEN].to_vec()
        });
        found.collect()
    }

    fn alone(&mut self, memory: &mut Memory, x: &[f32]) -> Vec<f32> {
        self.read(&mut [(memory, x)]).remove(0)
    }
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0., |m, (a, b)| m.max((a - b).abs()))
}

/// A long text too, over several pages.
#[test]
fn any_split_into_chunks_equals_forward_and_each_other() {
    for config in variants() {
        for len in [LEN, 75] {
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            let mixer = build(&config, &weights(&config, &mut rng), DType::F32);
            let x = random(&[1, len, HIDDEN], 1.0, &mut rng);
            let x = x.to_dtype(DType::F32).unwrap();
            let whole = flat(&mixer.forward(&x, None).unwrap());
            let x = flat(&x);
            let mut decoding = Decoding::of(&mixer);
            let at_once = decoding.alone(&mut decoding.pool.sequence(), &x);
            let off = gap(&at_once, &whole);
            assert!(off < 1e-4, "{config:?}: {off}");
            for split in [vec![1; len], vec![1, len - 1], vec![6, 3, len - 10, 1]] {
                let mut memory = decoding.pool.sequence();
                let (mut from, mut found) = (0, Vec::new());
                for count in &split {
                    let piece = &x[from * HIDDEN..(from + count) * HIDDEN];
                    found.extend(decoding.alone(&mut memory, piece));
                    from += count;
                }
                assert_eq!(found, at_once, "{config:?}, split {split:?}");
            }
        }
    }
}

/// Sequences at different lengths, with different numbers of new tokens, read together, are what each is alone.
#[test]
fn sequences_read_together_equal_each_alone() {
    let turns = [
        [5, 2, 0],
        [1, 0, 3],
        [0, 1, 1],
        [4, 4, 1],
        [1, 1, 1],
        [2, 1, 5],
    ];
    for config in variants() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mixer = build(&config, &weights(&config, &mut rng), DType::F32);
        let mut decoding = Decoding::of(&mixer);
        let texts: [Vec<f32>; 3] = std::array::from_fn(|_| {
            let x = random(&[LEN, HIDDEN], 1.0, &mut rng);
            flat(&x.to_dtype(DType::F32).unwrap())
        });
        let wholes = texts
            .each_ref()
            .map(|x| decoding.alone(&mut decoding.pool.sequence(), x));
        let mut memories: [Memory; 3] = std::array::from_fn(|_| decoding.pool.sequence());
        let mut past = [0; 3];
        for added in turns {
            let rows = |i: usize| past[i] * HIDDEN..(past[i] + added[i]) * HIDDEN;
            let sequences = memories.iter_mut().zip(&texts).enumerate();
            let mut sequences: Vec<(&mut Memory, &[f32])> = sequences
                .filter(|(i, _)| added[*i] > 0)
                .map(|(i, (memory, x))| (memory, &x[rows(i)]))
                .collect();
            let mut found = decoding.read(&mut sequences).into_iter();
            for i in (0..3).filter(|i| added[*i] > 0) {
                assert_eq!(
                    found.next().unwrap(),
                    wholes[i][rows(i)],
                    "{config:?} {added:?} {i}"
                );
            }
            (0..3).for_each(|i| past[i] += added[i]);
        }
    }
}

/// Continuations of one beginning, a step of each in turn, are what each is alone.
#[test]
fn a_cloned_memory_goes_on_alone() {
    for config in variants() {
        let (mixer, x) = case(&config);
        let mut decoding = Decoding::of(&mixer);
        let x = flat(&x);
        let (beginning, rest) = (&x[..6 * HIDDEN], &x[6 * HIDDEN..LEN * HIDDEN]);
        let ends = [1.0, -1.0, 0.5].map(|s| rest.iter().map(|x| x * s).collect::<Vec<f32>>());
        let wholes = ends.each_ref().map(|end| {
            let whole = [beginning, end].concat();
            decoding.alone(&mut decoding.pool.sequence(), &whole)
        });
        let mut first = decoding.pool.sequence();
        decoding.alone(&mut first, beginning);
        let mut memories = [first.clone(), first.clone(), first];
        for t in 0..LEN - 6 {
            for (i, memory) in memories.iter_mut().enumerate() {
                let token = t * HIDDEN..(t + 1) * HIDDEN;
                let found = decoding.alone(memory, &ends[i][token.clone()]);
                assert_eq!(found, wholes[i][6 * HIDDEN..][token], "{config:?} {i} {t}");
            }
        }
    }
}

/// Latents, keys and values in fewer bits give nearly the same.
#[test]
fn shorter_cache_types_are_close() {
    for config in variants() {
        let (mixer, x) = case(&config);
        let mut decoding = Decoding::of(&mixer);
        let x = flat(&x);
        let x = &x[..LEN * HIDDEN];
        let exact = decoding.alone(&mut decoding.pool.sequence(), x);
        let size = exact.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (kind, bound) in [(CacheType::F16, 1e-3), (CacheType::Int8, 3e-2)] {
            let keeps = [decoding.decoder.keeps()];
            decoding.pool = Pool::new(&keeps, kind, 1 << 24, 1).unwrap();
            let found = decoding.alone(&mut decoding.pool.sequence(), x);
            let off = gap(&found, &exact) / size;
            assert!(off < bound, "{config:?} {kind}: {off}");
        }
    }
}

#[test]
fn chunk_size_never_changes_the_answer() {
    for config in variants() {
        let MixerConfig::Mamba2(base) = &config else {
            continue;
        };
        let (mixer, x) = case(&config);
        let whole = mixer.forward(&x, None).unwrap();
        for chunk_size in [1, 2, 7, LEN, 64] {
            let other = MixerConfig::Mamba2(Mamba2Config {
                chunk_size,
                ..base.clone()
            });
            let gap = difference(&case(&other).0.forward(&x, None).unwrap(), &whole);
            assert!(gap < 1e-4, "{config:?}, chunk {chunk_size}: {gap}");
        }
    }
}

#[test]
fn packed_documents_equal_each_alone() {
    for config in variants() {
        let (mixer, x) = case(&config);
        // Row 0: documents of 5 and 8 tokens; row 1: 1, 2 and 10.
        let cuts = [vec![0, 5, LEN], vec![0, 1, 3, LEN]];
        let starts = cuts
            .iter()
            .flat_map(|cuts| cuts.windows(2).flat_map(|w| vec![w[0] as u32; w[1] - w[0]]));
        let documents = Documents::new(starts.collect(), LEN);
        let packed = mixer.forward(&x, Some(&documents)).unwrap();
        for (row, cuts) in cuts.iter().enumerate() {
            for w in cuts.windows(2) {
                let piece = |t: &Tensor| {
                    let row = t.narrow(0, row, 1).unwrap();
                    row.narrow(1, w[0], w[1] - w[0])
                        .unwrap()
                        .contiguous()
                        .unwrap()
                };
                let alone = mixer.forward(&piece(&x), None).unwrap();
                let gap = difference(&alone, &piece(&packed));
                assert!(gap < 1e-4, "{config:?}, row {row}, document {w:?}: {gap}");
            }
        }
    }
}

#[test]
fn cost_formula_equals_counted_parameters_and_what_is_kept() {
    for config in variants() {
        let counted: usize = config
            .params(HIDDEN)
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let (cost, longer) = (config.cost(HIDDEN, 1000), config.cost(HIDDEN, 1001));
        assert_eq!(cost.params, counted, "{config:?}");
        let keeps = case(&config).0.decoder().unwrap().keeps();
        assert_eq!(
            keeps.planes * keeps.dim,
            longer.cached - cost.cached,
            "{config:?}"
        );
        // A ring is cached; a scan's state is filled up to whole vectors.
        let state = match &config {
            MixerConfig::Window(_) => cost.cached,
            _ => cost.state,
        };
        assert!(
            state <= keeps.state && (state > 0) == (keeps.state > 0),
            "{config:?}"
        );
    }
}

#[test]
fn stacked_matrices_fill_their_tensors() {
    for config in variants() {
        let params: BTreeMap<String, Vec<usize>> = config.params(HIDDEN).into_iter().collect();
        for (name, rows) in config.stacked() {
            let total: usize = rows.iter().sum();
            assert_eq!(total, params[name][0], "{config:?}: {name}");
        }
    }
}

/// In f64 through the plain versions: every parameter's gradient and the input's.
#[test]
fn gradients_agree_with_finite_differences() {
    for config in variants() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mut tensors = weights(&config, &mut rng);
        tensors.insert("x".into(), random(&[1, 7, HIDDEN], 1.0, &mut rng));
        let probe = random(&[1, 7, HIDDEN], 1.0, &mut rng);
        let documents = Documents::new(vec![0, 0, 0, 3, 3, 3, 3], 7);
        let loss = |tensors: &BTreeMap<String, Tensor>| {
            let mixer = Mixer::new(&config, &Weights::new(tensors.clone())).unwrap();
            let y = mixer.forward(&tensors["x"], Some(&documents)).unwrap();
            (y * &probe).unwrap().sum_all().unwrap()
        };
        let vars: BTreeMap<String, Var> = tensors
            .iter()
            .map(|(n, t)| (n.clone(), Var::from_tensor(t).unwrap()))
            .collect();
        let tracked = vars.iter().map(|(n, v)| (n.clone(), v.as_tensor().clone()));
        let grads = loss(&tracked.collect()).backward().unwrap();
        for (name, tensor) in &tensors {
            let grad = grads
                .get(vars[name].as_tensor())
                .unwrap_or_else(|| panic!("{name} has no gradient"));
            let grad = grad.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let flat = tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for at in [0, flat.len() / 3, flat.len() - 1] {
                let moved = |step: f64| {
                    let mut flat = flat.clone();
                    flat[at] += step;
                    let mut tensors = tensors.clone();
                    let t = Tensor::from_vec(flat, tensor.shape(), &Device::Cpu).unwrap();
                    tensors.insert(name.clone(), t);
                    loss(&tensors).to_scalar::<f64>().unwrap()
                };
                let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                let gap = (numeric - grad[at]).abs() / (1.0 + numeric.abs());
                assert!(
                    gap < 1e-6,
                    "{config:?}: {name}[{at}] {} vs {numeric}",
                    grad[at]
                );
            }
        }
    }
}

/// The f32 kernels' gradients against those of the plain versions in f64, through the whole mixer.
#[test]
fn kernel_gradients_agree_with_plain_ones() {
    for config in variants() {
        let mut rng = ChaCha8Rng::seed_from_u64(13);
        let mut tensors = weights(&config, &mut rng);
        tensors.insert("x".into(), random(&[2, LEN, HIDDEN], 1.0, &mut rng));
        let probe = random(&[2, LEN, HIDDEN], 1.0, &mut rng);
        let grads = |dtype: DType| -> BTreeMap<String, Tensor> {
            let vars: BTreeMap<String, Var> = tensors
                .iter()
                .map(|(n, t)| (n.clone(), Var::from_tensor(&placed(t, dtype)).unwrap()))
                .collect();
            let tracked = vars.iter().map(|(n, v)| (n.clone(), v.as_tensor().clone()));
            let mixer = Mixer::new(&config, &Weights::new(tracked.collect())).unwrap();
            let y = mixer.forward(vars["x"].as_tensor(), None).unwrap();
            let loss = (y * placed(&probe, dtype)).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            let of = |v: &Var| truth(grads.get(v.as_tensor()).unwrap());
            vars.iter().map(|(n, v)| (n.clone(), of(v))).collect()
        };
        let (fast, slow) = (grads(DType::F32), grads(DType::F64));
        for (name, slow) in &slow {
            let size = difference(slow, &slow.zeros_like().unwrap());
            let gap = difference(&fast[name], slow) / (1.0 + size);
            assert!(
                gap < 1e-4,
                "{config:?}: the gradient of {name} is off by {gap}"
            );
        }
    }
}

/// With every singular value kept and nothing rotated, the published initialisation is the attention.
#[test]
fn full_rank_mla_without_rotary_dims_equals_attention_without_rope() {
    let attention = AttentionConfig::new(4, 2, 6, None);
    let config = MixerConfig::Attention(attention.clone());
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let tensors = weights(&config, &mut rng);
    let teacher = build(&config, &tensors, DType::F32);
    let weights = Weights::new(tensors).to(&Place::cpu()).unwrap();
    let source = AttentionWeights::new(&attention, &weights).unwrap();
    let mla = MlaConfig {
        num_attention_heads: 4,
        num_key_value_heads: 2,
        use_full_kv_head: false,
        q_lora_rank: HIDDEN,
        kv_lora_rank: HIDDEN,
        qk_nope_head_dim: 6,
        qk_rope_head_dim: 0,
        v_head_dim: 6,
        use_lora_layer_norm: false,
        attention_bias: false,
        rope: RopeConfig::new(10_000.0),
    };
    let born = mla::published(&mla, &source).unwrap().into_iter().collect();
    let student = Mixer::new(&MixerConfig::Mla(mla), &Weights::new(born)).unwrap();
    let x = random(&[2, LEN, HIDDEN], 1.0, &mut rng)
        .to_dtype(DType::F32)
        .unwrap();
    let gap = difference(
        &student.forward(&x, None).unwrap(),
        &teacher.forward(&x, None).unwrap(),
    );
    assert!(gap < 1e-4, "{gap}");
}
