//! Laws of the fitted initialisations, on a random teacher.

use candle_core::{DType, Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::calibration::{Sample, Statistics, fit_output};
use super::*;

const HIDDEN: usize = 16;

fn random(shape: &[usize], scale: f64, rng: &mut ChaCha8Rng) -> Tensor {
    let n = shape.iter().product();
    let data: Vec<f32> = (0..n)
        .map(|_| rng.random_range(-scale..scale) as f32)
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// A teacher's layer with `g` key heads of 8 dims, and a sample of it.
pub(super) fn teacher(g: usize) -> (AttentionWeights, Sample) {
    turning_teacher(g, RopeConfig::new(100.0))
}

fn turning_teacher(g: usize, rope: RopeConfig) -> (AttentionWeights, Sample) {
    teacher_of(AttentionConfig::new(2, g, 8, Some(rope)))
}

fn teacher_of(config: AttentionConfig) -> (AttentionWeights, Sample) {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let params = MixerConfig::Attention(config.clone()).params(HIDDEN);
    let tensors = params
        .into_iter()
        .map(|(name, shape)| (name, random(&shape, 0.6, &mut rng)));
    let weights = Weights::new(tensors.collect());
    let mixer = Mixer::new(&MixerConfig::Attention(config.clone()), &weights).unwrap();
    let input = random(&[8, 48, HIDDEN], 1.0, &mut rng);
    let documents = Documents::new((0..8 * 48).map(|i| i % 48 / 30 * 30).collect(), 48);
    let sample = Sample {
        output: mixer.forward(&input, Some(&documents)).unwrap(),
        input,
        documents,
    };
    (AttentionWeights::new(&config, &weights).unwrap(), sample)
}

fn alone(sample: &Sample) -> &[Sample] {
    std::slice::from_ref(sample)
}

fn one(sample: &Sample) -> impl Iterator<Item = Result<Sample>> {
    std::iter::once(Ok(sample.clone()))
}

fn mla(g: usize, rope: usize, rank: usize) -> MlaConfig {
    MlaConfig {
        num_attention_heads: 2,
        num_key_value_heads: g,
        use_full_kv_head: false,
        q_lora_rank: HIDDEN,
        kv_lora_rank: rank,
        qk_nope_head_dim: 8 - rope,
        qk_rope_head_dim: rope,
        v_head_dim: 8,
        use_lora_layer_norm: false,
        attention_bias: false,
        rope: RopeConfig::new(100.0),
    }
}

fn yarn(factor: f64, attention_factor: Option<f64>) -> Option<RopeScaling> {
    Some(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: 64,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor,
    })
}

/// No scaling, and each that moves frequencies or the magnitude.
fn scalings() -> [Option<RopeScaling>; 6] {
    let llama3 = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    let linear = RopeScaling::Linear { factor: 2.0 };
    [
        None,
        yarn(1.0, Some(1.3)),
        yarn(4.0, None),
        yarn(32.0, None),
        Some(llama3),
        Some(linear),
    ]
}

fn scaled(theta: f64, scaling: Option<RopeScaling>) -> RopeConfig {
    RopeConfig {
        scaling,
        ..RopeConfig::new(theta)
    }
}

/// One key head, every pair rotated, full ranks: nothing is lost, so MLA is the attention, rotation and
/// all, however the teacher's or its own frequencies and magnitude are scaled.
#[test]
fn full_rank_mla_of_one_key_head_equals_the_attention() {
    for of_teacher in scalings() {
        let (attention, sample) = turning_teacher(1, scaled(100.0, of_teacher.clone()));
        let statistics = Statistics::of(&attention, &sample).unwrap();
        for own in scalings() {
            let mut config = mla(1, 8, 8);
            config.rope = scaled(100.0, own);
            let (_, fitted) =
                mla::refined(&config, &attention, &statistics, alone(&sample)).unwrap();
            let error = fitted.error;
            assert!(error < 1e-5, "{of_teacher:?}, {:?}: {error}", config.rope);
        }
    }
}

/// Biases and a scale of scores are taken over whole, with one key head and full ranks.
#[test]
fn full_rank_mla_has_biases_and_scale_of_the_attention() {
    let (attention, sample) = teacher_of(AttentionConfig {
        attention_bias: true,
        attention_multiplier: Some(0.7),
        ..AttentionConfig::new(2, 1, 8, Some(RopeConfig::new(100.0)))
    });
    let statistics = Statistics::of(&attention, &sample).unwrap();
    let config = MlaConfig {
        attention_bias: true,
        ..mla(1, 8, 9)
    };
    let (_, fitted) = mla::refined(&config, &attention, &statistics, alone(&sample)).unwrap();
    assert!(fitted.error < 1e-5, "{}", fitted.error);
    let without = mla::refined(&mla(1, 8, 8), &attention, &statistics, alone(&sample)).unwrap_err();
    assert!(without.to_string().contains("attention_bias"), "{without}");
}

/// Norms on heads become factors: most of such an attention is there with full ranks.
#[test]
fn norms_on_heads_become_factors() {
    let (attention, sample) = teacher_of(AttentionConfig {
        qk_norm_eps: Some(1e-6),
        ..AttentionConfig::new(2, 1, 8, Some(RopeConfig::new(100.0)))
    });
    let error = |attention: &AttentionWeights| {
        let statistics = Statistics::of(attention, &sample).unwrap();
        let (_, fitted) =
            mla::refined(&mla(1, 8, 8), attention, &statistics, alone(&sample)).unwrap();
        fitted.error
    };
    let bare = AttentionWeights {
        config: AttentionConfig {
            qk_norm_eps: None,
            ..attention.config.clone()
        },
        norms: None,
        ..attention.clone()
    };
    let (folded, bare) = (error(&attention), error(&bare));
    assert!(folded < 0.5 * bare, "{folded} for {bare} without them");
}

/// Cut ranks and pairs: the start is the same with as without a scaling of its own.
#[test]
fn refined_starts_as_well_with_as_without_scaling() {
    for of_teacher in scalings() {
        let (attention, sample) = turning_teacher(2, scaled(100.0, of_teacher.clone()));
        let statistics = Statistics::of(&attention, &sample).unwrap();
        let start = |theta: f64, own: Option<RopeScaling>| {
            let mut config = mla(2, 4, 6);
            config.rope = scaled(theta, own);
            let (config, fitted) =
                mla::refined(&config, &attention, &statistics, alone(&sample)).unwrap();
            (config.rope.frequencies(4).0, fitted.error)
        };
        let (turns, without) = start(100.0, None);
        for (theta, own) in scalings()
            .into_iter()
            .map(|own| (100.0, own))
            .chain([(7.0, None)])
        {
            let (own_turns, with) = start(theta, own.clone());
            assert_eq!(own_turns.len(), turns.len());
            for (a, b) in own_turns.iter().zip(&turns) {
                assert!((a - b).abs() <= 1e-9 * b, "{own:?}: {a} for {b}");
            }
            assert!(
                (with - without).abs() < 1e-4 * without,
                "{own:?}: {with} for {without}"
            );
        }
    }
}

#[test]
fn refined_beats_reference_with_the_same_fit() {
    let (attention, sample) = teacher(2);
    let config = mla(2, 4, 6);
    let reference = mla::published(&config, &attention).unwrap();
    let reference = fit_output(&MixerConfig::Mla(config.clone()), reference, one(&sample))
        .unwrap()
        .error;
    let statistics = Statistics::of(&attention, &sample).unwrap();
    let (chosen, fitted) = mla::refined(&config, &attention, &statistics, alone(&sample)).unwrap();
    assert!(
        fitted.error < 0.9 * reference,
        "mla: {} for {reference}",
        fitted.error
    );
    MixerConfig::Mla(chosen).validate().unwrap();
}

/// On a random teacher there is little to explain; that the hybrid gains is for `tests/pipeline.rs`.
#[test]
fn refined_mamba2_has_all_its_tensors() {
    for (repeat_kv_before_conv, attention_bias) in
        [(false, false), (true, false), (false, true), (true, true)]
    {
        let config = Mamba2Config {
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 8,
            d_state: 8,
            d_conv: 4,
            repeat_kv_before_conv,
            chunk_size: 64,
        };
        let (attention, sample) = teacher_of(AttentionConfig {
            attention_bias,
            ..AttentionConfig::new(2, 1, 8, Some(RopeConfig::new(100.0)))
        });
        let statistics = Statistics::of(&attention, &sample).unwrap();
        let fitted = mamba2::refined(&config, &attention, &statistics, alone(&sample)).unwrap();
        assert!(fitted.error < 1.0, "{}", fitted.error);
        let shapes = config.params(HIDDEN).into_iter();
        assert!(
            shapes.eq(fitted
                .tensors
                .iter()
                .map(|(n, t)| (n.clone(), t.dims().to_vec())))
        );
    }
}

/// Statistics of two halves, added up, are those of the whole.
#[test]
fn statistics_add_up() {
    let (attention, sample) = teacher(2);
    let whole = Statistics::of(&attention, &sample).unwrap();
    let half = |from: usize| {
        let part = |t: &Tensor| t.narrow(0, from, 4).unwrap();
        super::calibration::sums(&part(&sample.input), &part(&sample.output)).unwrap()
    };
    let (a, b) = (half(0), half(4));
    let added = [0, 1, 2, 3].map(|i| (&a[i] + &b[i]).unwrap());
    let added = Statistics::new(&attention, 8 * 48, added.each_ref()).unwrap();
    let gap = |a: &faer::Mat<f64>, b: &faer::Mat<f64>| (a - b).norm_l2() / b.norm_l2();
    assert!(gap(&added.input_moment, &whole.input_moment) < 1e-6);
    assert!(gap(&added.key_energy, &whole.key_energy) < 1e-6);
    // The energies are those of the queries themselves.
    let x = sample.input.reshape((8 * 48, HIDDEN)).unwrap();
    let q = x.matmul(&attention.q.t().unwrap()).unwrap();
    let of = |row: usize| -> f64 {
        let column = q.narrow(1, row, 1).unwrap().sqr().unwrap();
        column
            .mean_all()
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .to_scalar()
            .unwrap()
    };
    let direct = of(8 + 1) + of(8 + 1 + 4);
    assert!((whole.query_energy[(1, 1)] - direct).abs() < 1e-5 * direct);
}

/// Samples of parts of a text give what one of the whole gives.
#[test]
fn samples_add_up() {
    let (attention, sample) = teacher(2);
    let statistics = Statistics::of(&attention, &sample).unwrap();
    let part = |from: usize, rows: usize| {
        let of = |t: &Tensor| t.narrow(0, from, rows).unwrap();
        let starts = (from..from + rows).flat_map(|row| sample.documents.row(row).iter().copied());
        Sample {
            input: of(&sample.input),
            output: of(&sample.output),
            documents: Documents::new(starts.collect(), sample.documents.len()),
        }
    };
    let (whole, parts) = ([sample.clone()], [part(0, 5), part(5, 3)]);
    let mamba2 = Mamba2Config {
        num_heads: 2,
        num_kv_heads: 2,
        head_dim: 8,
        d_state: 8,
        d_conv: 4,
        repeat_kv_before_conv: false,
        chunk_size: 64,
    };
    let configs = [MixerConfig::Mla(mla(2, 4, 4)), MixerConfig::Mamba2(mamba2)];
    for config in configs {
        let born = |samples: &[Sample]| {
            let statistics = &statistics;
            let birth = Birth::Refined {
                statistics,
                samples,
            };
            config.born(&attention, &birth).unwrap()
        };
        let (a, b) = (born(&whole), born(&parts));
        assert_eq!(a.config, b.config);
        let [a, b] = [a, b].map(|born| {
            let weights = Weights::new(born.tensors.into_iter().collect());
            let mixer = Mixer::new(&born.config, &weights).unwrap();
            mixer
                .forward(&sample.input, Some(&sample.documents))
                .unwrap()
        });
        let gap = crate::op::laws::distance(&a, &b);
        assert!(gap < 1e-4, "{}: {gap}", config.name());
    }
}

/// The fit is the least-squares optimum: no small change of the projection does better.
#[test]
fn fitted_output_is_a_minimum() {
    let (attention, sample) = teacher(2);
    let config = MixerConfig::Mla(mla(2, 4, 6));
    let MixerConfig::Mla(c) = &config else {
        unreachable!()
    };
    let fitted = fit_output(
        &config,
        mla::published(c, &attention).unwrap(),
        one(&sample),
    )
    .unwrap();
    let error = |tensors: &[(String, Tensor)]| -> f64 {
        let mixer = Mixer::new(&config, &Weights::new(tensors.iter().cloned().collect())).unwrap();
        let y = mixer
            .forward(&sample.input, Some(&sample.documents))
            .unwrap();
        let square = |t: Tensor| {
            t.sqr()
                .unwrap()
                .to_dtype(DType::F64)
                .unwrap()
                .sum_all()
                .unwrap()
        };
        let gap: f64 = square((y - &sample.output).unwrap()).to_scalar().unwrap();
        gap / square(sample.output.clone()).to_scalar::<f64>().unwrap()
    };
    assert!((error(&fitted.tensors) - fitted.error).abs() < 1e-4 * fitted.error);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..5 {
        let mut moved = fitted.tensors.clone();
        let out = moved
            .iter_mut()
            .find(|(n, _)| n == "out_proj.weight")
            .unwrap();
        out.1 = (&out.1 + random(out.1.dims(), 0.03, &mut rng)).unwrap();
        assert!(error(&moved) > fitted.error);
    }
}
