//! Training with matrices in bf16 that are rounded stochastically: the gradients, runs and results of f32, but for the rounding.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;

use super::optimizer::{GaloreConfig, Roles, overwrite};
use super::tests::{
    NAMES, Setting, config, files, stage, stage_in, student, teacher_config, tensors, weights_in,
};
use super::*;
use crate::checkpoint::{Checkpoint, read_tensors};
use crate::mixer::LayerKind;
use crate::op::cpu::entries;
use crate::weights::{Place, Precision, Weights};

/// As a command makes it.
fn rounded() -> Place {
    Place::cpu().training(Precision::Bf16)
}

/// What a GPU computes in, in plain operations.
fn all_in_bf16() -> Place {
    Place {
        compute: DType::BF16,
        ..rounded()
    }
}

fn in_bf16(steps: u64) -> TrainSettings {
    TrainSettings {
        weights: Precision::Bf16,
        ..config(steps)
    }
}

/// The gradients of a batch, by group and name, and the loss.
fn gradients(stage: &mut Stage, batch: &Batch) -> (Vec<BTreeMap<String, Vec<f32>>>, f64) {
    let loss = stage.backward(batch, &Shares::alone()).unwrap().loss;
    let groups = stage.groups_mut().into_iter();
    let each = groups.map(|group| {
        let grads = group.grads().into_iter();
        let grads = grads.map(|(name, grad)| {
            assert_eq!(grad.dtype(), DType::F32, "{name}");
            (name, entries(&grad).unwrap())
        });
        grads.collect()
    });
    (each.collect(), loss)
}

/// A stage in f32 whose weights are what `other` has.
fn widened<'a>(setting: &'a Setting, name: &str, other: &mut Stage) -> Stage<'a> {
    let mut full = stage(setting, name);
    let groups = full.groups_mut().into_iter().zip(other.groups_mut());
    for (full, other) in groups {
        for ((name, to), (of, from)) in full.tensors().zip(other.tensors()) {
            assert_eq!(name, of);
            overwrite(to, &from.to_dtype(DType::F32).unwrap()).unwrap();
        }
    }
    full
}

#[test]
fn a_gpu_computes_in_the_type_of_its_matrices() {
    let cpu = rounded();
    assert_eq!((cpu.trained, cpu.compute), (Precision::Bf16, DType::F32));
    assert_eq!(Place::cpu().training(Precision::F32).compute, DType::F32);
}

/// Products widen the weights that they read, and nothing else is rounded.
#[test]
fn gradients_are_those_of_the_same_weights_in_f32() {
    let setting = Setting::new();
    // DPO's frozen model is that of its own weights.
    for name in NAMES.into_iter().filter(|name| *name != "dpo") {
        let mut half = stage_in(&setting, name, &rounded());
        let mut full = widened(&setting, name, &mut half);
        let batch = half.data().batch(3, 0, 2, 32).unwrap();
        let (found, loss) = gradients(&mut half, &batch);
        let (truth, full_loss) = gradients(&mut full, &batch);
        assert!(
            (loss / full_loss - 1.0).abs() < 1e-5,
            "{name}: {loss} for {full_loss}"
        );
        for (found, truth) in found.iter().zip(&truth) {
            assert!(found.keys().eq(truth.keys()), "{name}");
            for (weight, found) in found {
                let most = truth[weight].iter().fold(0f32, |m, x| m.max(x.abs()));
                let pairs = found.iter().zip(&truth[weight]);
                let off = pairs.fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(off <= 1e-5 * most, "{name} {weight}: {off} of {most}");
            }
        }
    }
}

/// Activations in bf16 as well, as on a GPU: the residual stream, norms, states and losses are not, so that gradients point where those
/// of f32 do.
#[test]
fn gradients_in_bf16_point_where_those_of_f32_do() {
    let setting = Setting::new();
    for name in NAMES.into_iter().filter(|name| *name != "dpo") {
        let mut half = stage_in(&setting, name, &all_in_bf16());
        let mut full = widened(&setting, name, &mut half);
        let batch = half.data().batch(3, 0, 2, 32).unwrap();
        let (found, loss) = gradients(&mut half, &batch);
        let (truth, full_loss) = gradients(&mut full, &batch);
        assert!(
            (loss / full_loss - 1.0).abs() < 0.02,
            "{name}: {loss} for {full_loss}"
        );
        for (found, truth) in found.iter().zip(&truth) {
            assert!(found.keys().eq(truth.keys()), "{name}");
            for (weight, found) in found {
                let dot = |a: &[f32], b: &[f32]| -> f64 {
                    let terms = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    terms.sum()
                };
                let truth = &truth[weight];
                let size = dot(truth, truth).sqrt();
                let cosine = dot(found, truth) / (size * dot(found, found).sqrt());
                // Few sums of many terms that cancel out are rough.
                let (least, bound) = match truth.len() < 16 {
                    true => (0.9, 0.1),
                    false => (0.99, 0.05),
                };
                assert!(cosine > least, "{name} {weight}: {cosine}");
                let length = dot(found, found).sqrt() / size;
                assert!((length - 1.0).abs() < bound, "{name} {weight}: {length}");
            }
        }
    }
}

/// Steps far below half of a weight's last bit move the mean of many weights as they should.
#[test]
fn small_steps_are_not_lost() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let ones = Tensor::ones((64, 64), DType::F32, &Device::Cpu).unwrap();
    let weights = Weights::new([(name.to_owned(), ones.clone())].into());
    let roles = Roles::new(&teacher_config());
    let (mut group, _) = ParamGroup::new(&weights, |_| true, &roles, &rounded()).unwrap();
    let settings = TrainSettings {
        lr: 1e-4,
        clip: 0.0,
        ..in_bf16(1000)
    };
    let mut update = settings.settle().unwrap().update(500, 1000);
    update.rules.adamw.lr = 1e-4;
    for _ in 0..300 {
        group.add_to(name, ones.clone()).unwrap();
        let norms = group.norms().unwrap();
        group.update(&norms, &update).unwrap();
    }
    let (_, value) = group.tensors().next().unwrap();
    assert_eq!(value.dtype(), DType::BF16);
    let moved = entries(value)
        .unwrap()
        .into_iter()
        .map(|x| 1.0 - f64::from(x));
    let mean = moved.sum::<f64>() / 4096.0;
    assert!((mean / 0.03 - 1.0).abs() < 0.02, "{mean}");
}

/// A run is decided by its seed: stopped and gone on with it is the same, under every optimizer; with another seed it rounds otherwise.
#[test]
fn runs_go_on_bit_for_bit() {
    let setting = Setting::new();
    let run = |name: &str, settings: &TrainSettings, to: &str, stop| {
        let mut stage = stage_in(&setting, name, &rounded());
        setting.run(&mut stage, settings, &setting.out(to), stop)
    };
    let twice = |name: &str, settings: &TrainSettings, to: &str| {
        let broken = format!("{to}-broken");
        let metrics = run(name, settings, to, 0).unwrap();
        assert!(matches!(
            run(name, settings, &broken, 4),
            Err(Error::Interrupted(_))
        ));
        run(name, settings, &broken, 0).unwrap();
        assert!(
            files(&setting.out(to)) == files(&setting.out(&broken)),
            "{to}"
        );
        metrics
    };
    for name in NAMES {
        twice(name, &in_bf16(6), name);
    }
    let full = |optimizer| {
        let settings = TrainSettings {
            optimizer,
            ..config(8)
        };
        let mut stage = stage(&setting, "kd");
        let out = setting.out(&format!("full {optimizer:?}"));
        let metrics = setting.run(&mut stage, &settings, &out, 0).unwrap();
        (metrics[0].loss, metrics[7].loss)
    };
    for optimizer in OptimizerName::value_variants() {
        let mut settings = TrainSettings {
            optimizer: *optimizer,
            ..in_bf16(8)
        };
        let galore = matches!(optimizer, OptimizerName::Galore | OptimizerName::Galore8bit);
        if galore {
            settings.galore = GaloreConfig {
                rank: 8,
                interval: 3,
                scale: 1.0,
            };
        }
        let metrics = twice("kd", &settings, &format!("{optimizer:?}"));
        if !galore {
            let (first, last) = full(*optimizer);
            let off = (metrics[7].loss - last).abs() / (first - last);
            assert!(off < 0.02, "{optimizer:?}: {off} of what f32 learns");
        }
    }
    let other = TrainSettings {
        seed: 1,
        ..in_bf16(6)
    };
    run("kd", &other, "other", 0).unwrap();
    assert!(weights_in(&setting.out("kd")) != weights_in(&setting.out("other")));
}

/// Gradients that are applied as they appear draw what those draw that wait.
#[test]
fn gradients_applied_as_they_appear_round_alike() {
    let setting = Setting::new();
    for name in NAMES {
        let run = |clip_by: ClipBy| {
            let settings = TrainSettings {
                accumulation: 1,
                clip: 1e9,
                clip_by,
                ..in_bf16(4)
            };
            let out = setting.out(&format!("{name}-{clip_by:?}"));
            let mut stage = stage_in(&setting, name, &rounded());
            setting.run(&mut stage, &settings, &out, 0).unwrap();
            weights_in(&out)
        };
        assert!(run(ClipBy::All) == run(ClipBy::Layer), "{name}");
    }
}

/// The student that learns, its snapshot and what is written are one; matrices are written in two bytes, what is no matrix in four.
#[test]
fn what_is_written_is_what_learned() {
    let setting = Setting::new();
    for place in [rounded(), all_in_bf16()] {
        let mut stage = stage_in(&setting, "kd", &place);
        let before = tensors(&stage);
        let out = setting.out(&format!("{:?}", place.compute));
        setting.run(&mut stage, &in_bf16(3), &out, 0).unwrap();
        let written = read_tensors(&out.join("model.safetensors")).unwrap();
        let learned = tensors(&stage);
        let roles = Roles::new(&stage.student().unwrap().config);
        for (name, tensor) in &written {
            assert_eq!(entries(tensor).unwrap(), learned[name], "{name}");
            let rounds = roles.of(name, tensor.dims()).may_be_rounded();
            let wanted = if rounds { DType::BF16 } else { DType::F32 };
            assert_eq!(tensor.dtype(), wanted, "{name}");
            assert!(
                name.ends_with("bias") || before[name] != learned[name],
                "{name} did not move"
            );
        }
        let batch = setting.corpus.batch(3, 0, 2, 32).unwrap();
        let ids = stage::ids(&batch, &Device::Cpu).unwrap();
        let logits = |lm: &Lm| entries(&lm.forward(&ids, Some(&batch.documents)).unwrap()).unwrap();
        let loaded = Checkpoint::open(&out).unwrap().model(&place).unwrap();
        let gaps = logits(stage.student().unwrap());
        let gaps = gaps.iter().zip(logits(&loaded)).map(|(a, b)| (a - b).abs());
        let bound = if place.compute == DType::F32 {
            1e-5
        } else {
            0.05
        };
        assert!(gaps.fold(0f32, f32::max) < bound);
    }
}

/// What diverged is undone, bit for bit.
#[test]
fn a_save_brings_rounded_weights_back() {
    let setting = Setting::new();
    let out = setting.out("out");
    let mut first = stage_in(&setting, "kd", &rounded());
    setting.run(&mut first, &in_bf16(9), &out, 3).unwrap_err();
    let saved = tensors(&first);
    let mut stage = stage_in(&setting, "kd", &rounded());
    let mut groups = stage.groups_mut();
    let state = partial_folder(&out).join("state-00000003.safetensors");
    let state = read_tensors(&state).unwrap();
    let read = groups[0].saved("group0", &state).unwrap();
    groups[0].restore(read).unwrap();
    assert_eq!(tensors(&stage), saved);
    assert!(state["group0.param.model.layers.0.mlp.up_proj.weight"].dtype() == DType::BF16);
}

/// A mixer that takes a matrix apart is not given one in bf16, whose parts would not move.
#[test]
fn a_rounded_matrix_is_no_tensor() {
    let parts = student([LayerKind::MLA, LayerKind::Mamba2]);
    let roles = Roles::new(&parts.config);
    let (_, seen) = ParamGroup::new(&parts.weights, |_| true, &roles, &rounded()).unwrap();
    seen.get("model.layers.0.mla.kv_b_proj.weight").unwrap();
    let error = seen.get("model.layers.0.mla.q_b_proj.weight").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("q_b_proj.weight is trained in bf16"),
        "{error}"
    );
}
