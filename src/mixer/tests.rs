//! Laws that every mixer keeps, in every config variant.

use crate::weights::Place;
use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::mixer::cache::FIRST_CAPACITY;

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
        MixerConfig::Attention(AttentionConfig {
            num_attention_heads: 4,
            num_key_value_heads: g,
            head_dim: 6,
            rope,
        })
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
            rope,
        })
    };
    let window = |g: usize, rope: Option<RopeConfig>, size: usize, sinks: usize| {
        MixerConfig::Window(WindowConfig {
            num_attention_heads: 4,
            num_key_value_heads: g,
            head_dim: 6,
            rope,
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

#[test]
fn step_by_step_equals_forward() {
    for config in variants() {
        let (mixer, x) = case(&config);
        let whole = mixer.forward(&x, None).unwrap();
        let mut state = mixer.state(2, &Device::Cpu, DType::F32).unwrap();
        for t in 0..LEN {
            let at = Positions::even(2, t, 1);
            let y = mixer
                .step(&x.narrow(1, t, 1).unwrap(), &mut state, &at)
                .unwrap();
            let gap = difference(&y, &whole.narrow(1, t, 1).unwrap());
            assert!(gap < 1e-4, "{config:?}: position {t} differs by {gap}");
        }
    }
}

#[test]
fn any_split_into_chunks_equals_forward() {
    for config in variants() {
        let (mixer, x) = case(&config);
        let whole = mixer.forward(&x, None).unwrap();
        for split in [
            vec![LEN],
            vec![1, 12],
            vec![6, 7],
            vec![2, 3, 1, 7],
            vec![12, 1],
        ] {
            let mut state = mixer.state(2, &Device::Cpu, DType::F32).unwrap();
            let mut from = 0;
            for len in &split {
                let y = mixer
                    .prefill(
                        &x.narrow(1, from, *len).unwrap(),
                        &mut state,
                        &Positions::even(2, from, *len),
                    )
                    .unwrap();
                let gap = difference(&y, &whole.narrow(1, from, *len).unwrap());
                assert!(gap < 1e-4, "{config:?}, split {split:?}: {gap} from {from}");
                from += len;
            }
        }
    }
}

/// Rows at different lengths, with different numbers of new tokens (some with none, some filled up), one of them begun anew in
/// a place that another has used, are what each is alone.
#[test]
fn rows_at_mixed_lengths_equal_rows_alone() {
    // New tokens of three rows, turn by turn; a row of 0 in the second list starts anew before its turn.
    let turns = [
        [5, 2, 0],
        [1, 0, 3],
        [0, 1, 1],
        [4, 4, 1],
        [1, 1, 1],
        [2, 1, 5],
    ];
    let anew_at = 3;
    for config in variants() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mixer = build(&config, &weights(&config, &mut rng), DType::F32);
        let row = |rng: &mut ChaCha8Rng| {
            let x = random(&[1, 2 * LEN, HIDDEN], 1.0, rng);
            x.to_dtype(DType::F32).unwrap()
        };
        let mut rows: Vec<Tensor> = (0..3).map(|_| row(&mut rng)).collect();
        let mut wholes: Vec<Tensor> = rows
            .iter()
            .map(|x| mixer.forward(x, None).unwrap())
            .collect();
        let mut state = mixer.state(3, &Device::Cpu, DType::F32).unwrap();
        let mut past = vec![0; 3];
        for (turn, added) in turns.iter().enumerate() {
            if turn == anew_at {
                rows[1] = row(&mut rng);
                wholes[1] = mixer.forward(&rows[1], None).unwrap();
                past[1] = 0;
            }
            let len = *added.iter().max().unwrap();
            let at = Positions::new(past.clone(), added.to_vec(), len).unwrap();
            // What fills a row up is another row's.
            let x = (0..3).map(|row| {
                let own = rows[row].narrow(1, past[row], added[row]).unwrap();
                let filling = rows[(row + 1) % 3].narrow(1, 3, len - added[row]).unwrap();
                Tensor::cat(&[own, filling], 1).unwrap()
            });
            let x = Tensor::cat(&x.collect::<Vec<_>>(), 0).unwrap();
            let y = match len {
                1 => mixer.step(&x, &mut state, &at).unwrap(),
                _ => mixer.prefill(&x, &mut state, &at).unwrap(),
            };
            for row in 0..3 {
                let own = y
                    .narrow(0, row, 1)
                    .unwrap()
                    .narrow(1, 0, added[row])
                    .unwrap();
                let truth = wholes[row].narrow(1, past[row], added[row]).unwrap();
                if added[row] > 0 {
                    let gap = difference(&own, &truth);
                    assert!(gap < 1e-4, "{config:?}: turn {turn}, row {row}: {gap}");
                }
                past[row] += added[row];
            }
        }
    }
}

/// Continuations of one beginning, a step of each in turn, are what each is alone.
#[test]
fn a_cloned_state_goes_on_alone() {
    for config in variants() {
        let (mixer, x) = case(&config);
        let beginning = x.narrow(1, 0, 6).unwrap();
        let ends =
            [1.0, -1.0, 0.5].map(|scale| (x.narrow(1, 6, LEN - 6).unwrap() * scale).unwrap());
        let wholes = ends.each_ref().map(|end| {
            let whole = Tensor::cat(&[&beginning, end], 1).unwrap();
            mixer.forward(&whole, None).unwrap()
        });
        let mut first = mixer.state(2, &Device::Cpu, DType::F32).unwrap();
        mixer
            .prefill(&beginning, &mut first, &Positions::even(2, 0, 6))
            .unwrap();
        let mut states = [first.clone(), first.clone(), first];
        for t in 0..LEN - 6 {
            for (i, state) in states.iter_mut().enumerate() {
                let y = mixer
                    .step(
                        &ends[i].narrow(1, t, 1).unwrap(),
                        state,
                        &Positions::even(2, 6 + t, 1),
                    )
                    .unwrap();
                let gap = difference(&y, &wholes[i].narrow(1, 6 + t, 1).unwrap());
                assert!(gap < 1e-4, "{config:?}: continuation {i}, token {t}: {gap}");
            }
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
fn cost_formula_equals_counted_parameters_and_buffers() {
    for config in variants() {
        let counted: usize = config
            .params(HIDDEN)
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        // What is allocated first holds as many tokens.
        let cost = config.cost(HIDDEN, FIRST_CAPACITY);
        assert_eq!(cost.params, counted, "{config:?}");
        let (mixer, x) = case(&config);
        let mut state = mixer.state(2, &Device::Cpu, DType::F32).unwrap();
        let at = Positions::even(2, 0, LEN);
        mixer.prefill(&x, &mut state, &at).unwrap();
        let expected = 2 * (cost.cached + cost.state);
        assert_eq!(state.allocated(), expected, "{config:?}");
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
                .map(|(n, t)| {
                    (
                        n.clone(),
                        Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap(),
                    )
                })
                .collect();
            let tracked = vars.iter().map(|(n, v)| (n.clone(), v.as_tensor().clone()));
            let mixer = Mixer::new(&config, &Weights::new(tracked.collect())).unwrap();
            let y = mixer.forward(vars["x"].as_tensor(), None).unwrap();
            let loss = (y * probe.to_dtype(dtype).unwrap())
                .unwrap()
                .sum_all()
                .unwrap();
            let grads = loss.backward().unwrap();
            let of = |v: &Var| {
                grads
                    .get(v.as_tensor())
                    .unwrap()
                    .to_dtype(DType::F64)
                    .unwrap()
            };
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
    let attention = AttentionConfig {
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        rope: None,
    };
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
