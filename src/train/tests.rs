//! A run interrupted anywhere is the run that was not.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};

use super::stage::ild::{Ild, IldLoss};
use super::stage::kd::{Kd, KdConfig};
use super::stage::pretrain::Pretrain;
use super::*;
use crate::checkpoint::Checkpoint;
use crate::convert::{Init, LayerKind, PlanOptions, compose, plan};
use crate::data::{Packing, stories};
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig};
use crate::model::{FORMAT_VERSION, Lm, ModelConfig};
use crate::weights::Weights;

fn teacher_config() -> ModelConfig {
    let attention = AttentionConfig {
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rope: Some(RopeConfig::new(10_000.0)),
    };
    ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: 32,
        intermediate_size: 48,
        vocab_size: 500,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: Some(0),
        eos_token_id: vec![1],
        layers: vec![MixerConfig::Attention(attention); 2],
    }
}

struct Setting {
    folder: tempfile::TempDir,
    corpus: Corpus,
}

impl Setting {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let data = folder.path().join("stories.jsonl");
        stories::write_jsonl(&data, 1, 60).unwrap();
        let tokenizer = crate::data::Tokenizer::open(folder.path()).unwrap();
        let corpus = Corpus::load(&data, &tokenizer, Packing::Documents).unwrap();
        Self { folder, corpus }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs until `stop_after` steps of this call are done (0: to the end).
    fn run(
        &self,
        stage: &mut Stage,
        config: &TrainConfig,
        out: &Path,
        stop_after: u64,
    ) -> Result<Vec<StepMetrics>> {
        let done = Cell::new(0);
        let options = RunOptions {
            out: out.to_owned(),
            tokenizer: self.folder.path().to_owned(),
            force: false,
            save_every: 3,
            stop: &|| stop_after > 0 && done.get() >= stop_after,
            observe: &mut |_| done.set(done.get() + 1),
        };
        train(stage, &self.corpus, config, options)
    }
}

fn config(steps: u64) -> TrainConfig {
    TrainConfig {
        steps,
        batch_size: 2,
        accumulation: 2,
        seq_len: 32,
        lr: 3e-3,
        warmup: 0.2,
        ..TrainConfig::default()
    }
}

fn teacher() -> (Lm, Weights) {
    let stage = Pretrain::new(&teacher_config(), 5, &Device::Cpu).unwrap();
    let tensors: BTreeMap<_, _> = stage
        .student
        .params
        .tensors()
        .map(|(n, t)| (n.to_owned(), t.detach()))
        .collect();
    let weights = Weights::new(tensors);
    (Lm::new(&teacher_config(), &weights).unwrap(), weights)
}

fn student(kinds: [LayerKind; 2]) -> (ModelConfig, Weights) {
    let (_, weights) = teacher();
    let student = plan(&teacher_config(), &PlanOptions::new(kinds.to_vec())).unwrap();
    let composed = compose(
        &teacher_config(),
        &weights,
        &student,
        &Init::Reference { seed: 1 },
    )
    .unwrap();
    (student, Weights::new(composed.tensors))
}

fn stages() -> Vec<(&'static str, Stage)> {
    let (mla, mamba2) = (LayerKind::Mla, LayerKind::Mamba2);
    let bank = [("mla", [mla, mla]), ("mamba2", [mamba2, mamba2])].map(|(name, kinds)| {
        let (config, weights) = student(kinds);
        (name.to_owned(), config, weights)
    });
    let (config, weights) = student([mla, mamba2]);
    let kd = KdConfig {
        temperature: 1.5,
        ce_weight: 0.25,
    };
    vec![
        (
            "pretrain",
            Stage::Pretrain(Pretrain::new(&teacher_config(), 5, &Device::Cpu).unwrap()),
        ),
        (
            "ild",
            Stage::Ild(
                Ild::new(teacher().0, "t".into(), bank.into(), IldLoss::RelativeMse).unwrap(),
            ),
        ),
        (
            "kd",
            Stage::Kd(Box::new(
                Kd::new(teacher().0, "t".into(), &config, &weights, kd).unwrap(),
            )),
        ),
    ]
}

fn stage(name: &str) -> Stage {
    let found = stages().into_iter().find(|(n, _)| *n == name);
    found.unwrap().1
}

/// Every weight file below a folder, with its bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let inner = files(&path).into_iter();
            found.extend(
                inner.map(|(name, bytes)| (Path::new(path.file_name().unwrap()).join(name), bytes)),
            );
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            found.insert(
                path.file_name().unwrap().into(),
                std::fs::read(&path).unwrap(),
            );
        }
    }
    found
}

#[test]
fn interrupted_equals_uninterrupted_bit_for_bit() {
    let setting = Setting::new();
    let config = config(8);
    for (name, mut whole) in stages() {
        let straight = setting.out(&format!("{name}-straight"));
        let metrics = setting.run(&mut whole, &config, &straight, 0).unwrap();
        let broken = setting.out(&format!("{name}-broken"));
        for _ in 0..2 {
            let stopped = setting
                .run(&mut stage(name), &config, &broken, 3)
                .unwrap_err();
            assert!(
                matches!(stopped, Error::Interrupted(_)),
                "{name}: {stopped}"
            );
            assert!(!broken.exists(), "nothing half-done under the final name");
        }
        let resumed = setting.run(&mut stage(name), &config, &broken, 0).unwrap();
        assert!(!partial_folder(&broken).exists());
        let losses = |m: &[StepMetrics]| {
            m.iter()
                .map(|m| (m.step, m.loss.to_bits()))
                .collect::<Vec<_>>()
        };
        assert_eq!(losses(&metrics), losses(&resumed), "{name}");
        assert_eq!(losses(&metrics).len(), 8);
        let (a, b) = (files(&straight), files(&broken));
        assert!(!a.is_empty() && a == b, "{name}: the weights differ");
    }
}

#[test]
fn every_stage_learns() {
    let setting = Setting::new();
    let config = config(30);
    for (name, mut stage) in stages() {
        let metrics = setting
            .run(&mut stage, &config, &setting.out(name), 0)
            .unwrap();
        let mean = |m: &[StepMetrics]| m.iter().map(|m| m.loss).sum::<f64>() / m.len() as f64;
        let (first, last) = (mean(&metrics[..3]), mean(&metrics[27..]));
        assert!(last < 0.9 * first, "{name}: {first} to {last}");
    }
    // Results are checkpoints that load.
    for folder in ["pretrain", "ild/mla", "ild/mamba2", "kd"] {
        let checkpoint = Checkpoint::open(&setting.out(folder)).unwrap();
        checkpoint.model(&Device::Cpu, DType::F32).unwrap();
    }
}

#[test]
fn accumulation_equals_one_large_batch() {
    let setting = Setting::new();
    let once = |accumulation: usize, batch_size: usize| {
        let config = TrainConfig {
            steps: 1,
            accumulation,
            batch_size,
            ..config(1)
        };
        let out = setting.out(&format!("{accumulation}"));
        let mut stage = stage("ild");
        // Normalised losses are means only of equal parts; take the un-normalised one.
        if let Stage::Ild(ild) = &mut stage {
            ild.set_loss(IldLoss::L2Norm);
        }
        setting.run(&mut stage, &config, &out, 0).unwrap()[0]
            .grad_norm
            .clone()
    };
    for (a, b) in once(1, 4).iter().zip(once(2, 2)) {
        assert!((a - b).abs() < 1e-4 * a, "{a} and {b}");
    }
}

#[test]
fn a_run_with_other_settings_is_not_resumed() {
    let setting = Setting::new();
    let out = setting.out("kd");
    setting
        .run(&mut stage("kd"), &config(8), &out, 3)
        .unwrap_err();
    let other = TrainConfig {
        lr: 1e-4,
        ..config(8)
    };
    let message = setting
        .run(&mut stage("kd"), &other, &out, 0)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("train.lr was 0.003, now 0.0001") && message.contains("--force"),
        "{message}"
    );
    assert!(partial_folder(&out).exists(), "the unfinished run is kept");
}

#[test]
fn schedule_warms_up_and_falls() {
    let config = TrainConfig {
        steps: 100,
        lr: 1.0,
        warmup: 0.1,
        min_lr: 0.1,
        ..TrainConfig::default()
    };
    assert!((config.lr_at(0) - 0.1).abs() < 1e-3);
    assert!((config.lr_at(10) - 0.9).abs() < 0.1);
    assert!(config.lr_at(99) < 0.11);
}

#[test]
fn settings_out_of_range_are_named() {
    let say = |change: fn(&mut TrainConfig)| {
        let mut config = TrainConfig::default();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    };
    assert!(say(|c| c.lr = f64::NAN).contains("lr NaN"));
    assert!(say(|c| c.beta2 = 1.0).contains("beta2 1"));
    assert!(say(|c| c.batch_size = 0).contains("batch_size"));
}
