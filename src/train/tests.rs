//! A run interrupted anywhere is the run that was not.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;

use super::optimizer::{GaloreConfig, Roles};
use super::stage::dpo::{Dpo, DpoConfig};
use super::stage::ild::{Ild, IldConfig, IldInputs};
use super::stage::kd::{Kd, KdConfig, Labels, Schedule, Trained};
use super::stage::pretrain::{Pretrain, fresh};
use super::teacher::Teacher;
use super::*;
use crate::checkpoint::{Checkpoint, read_tensors};
use crate::convert::{Init, PlanOptions, compose, plan};
use crate::data::{Batches, Corpus, Lengths, Packing, Preferences, stories};
use crate::mixer::{AttentionConfig, LayerKind, MixerConfig, RopeConfig, Windows};
use crate::model::{FORMAT_VERSION, Lm, ModelConfig, Parts};
use crate::numerics;
use crate::op::linear::Matrix;
use crate::watch::Quiet;
use crate::weights::Place;
use crate::weights::Weights;

pub(super) fn teacher_config() -> ModelConfig {
    let attention = AttentionConfig::new(4, 2, 8, Some(RopeConfig::new(10_000.0)));
    ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: 32,
        intermediate_size: 48,
        vocab_size: 500,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: Some(0),
        eos_token_id: vec![1],
        layers: vec![MixerConfig::Attention(attention); 2],
        converted: None,
    }
}

/// How pairs are cut.
const LENGTHS: Lengths = Lengths {
    max_prompt: 64,
    max_length: 64,
};

pub(super) struct Setting {
    folder: tempfile::TempDir,
    pub(super) corpus: Corpus,
    pairs: Preferences,
}

impl Setting {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        stories::write_tokenizer(folder.path()).unwrap();
        let data = folder.path().join("stories.jsonl");
        stories::write_jsonl(&data, 1, 60).unwrap();
        let tokenizer = crate::data::Tokenizer::open(folder.path()).unwrap();
        let corpus = Corpus::load(&data, &tokenizer, Packing::Documents).unwrap();
        let path = folder.path().join("pairs.jsonl");
        std::fs::write(&path, stories::preferences_to_jsonl(2, 40)).unwrap();
        let pairs = Preferences::load(&path, &tokenizer, LENGTHS).unwrap();
        Self {
            folder,
            corpus,
            pairs,
        }
    }

    pub(super) fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs until `stop_after` steps of this call are done (0: to the end).
    pub(super) fn run(
        &self,
        stage: &mut Stage,
        config: &TrainSettings,
        out: &Path,
        stop_after: u64,
    ) -> Result<Vec<StepMetrics>> {
        self.run_with(stage, config, out, stop_after, (false, 1))
    }

    fn run_with(
        &self,
        stage: &mut Stage,
        config: &TrainSettings,
        out: &Path,
        stop_after: u64,
        (force, keep_last): (bool, usize),
    ) -> Result<Vec<StepMetrics>> {
        let done = Cell::new(0);
        let options = RunOptions {
            out: out.to_owned(),
            tokenizer: self.folder.path().to_owned(),
            sources: Sources::default(),
            force,
            save_every: 3,
            keep_last,
            validation: None,
            stop: &|| stop_after > 0 && done.get() >= stop_after,
            observe: &mut |_, _| done.set(done.get() + 1),
        };
        train(stage, &config.settle().unwrap(), options)
    }
}

pub(super) fn config(steps: u64) -> TrainSettings {
    TrainSettings {
        steps: Some(steps),
        batch_size: 2,
        accumulation: 2,
        seq_len: 32,
        lr: 3e-3,
        warmup: 0.2,
        ..TrainSettings::default()
    }
}

pub(super) fn parts() -> Parts {
    fresh(&teacher_config(), 5).unwrap()
}

fn teacher() -> Lm {
    parts().lm(&Place::cpu()).unwrap()
}

fn taught() -> Teacher {
    taught_in(&Place::cpu())
}

fn taught_in(place: &Place) -> Teacher {
    Teacher::Model {
        lm: Box::new(parts().lm(place).unwrap()),
        hash: "t".into(),
    }
}

pub(super) fn student(kinds: [LayerKind; 2]) -> Parts {
    let student = plan(
        &teacher_config(),
        &PlanOptions::default().with_layers(kinds.to_vec()),
    )
    .unwrap();
    let init = Init::Published { seed: 1 };
    compose(&parts(), &student, &init, &Quiet::default()).unwrap()
}

pub(super) const NAMES: [&str; 6] = ["pretrain", "ild", "ild-joint", "kd", "kd-stepwise", "dpo"];

pub(super) fn stage<'a>(setting: &'a Setting, name: &str) -> Stage<'a> {
    stage_in(setting, name, &Place::cpu())
}

pub(super) fn stage_in<'a>(setting: &'a Setting, name: &str, place: &Place) -> Stage<'a> {
    let text = &setting.corpus;
    let (mla, mamba2) = (LayerKind::MLA, LayerKind::Mamba2);
    let bank = || [mla, mamba2].map(|kind| (Some(kind), student([kind; 2])));
    let hybrid = student([mla, mamba2]);
    let kd = |config: KdConfig| {
        let student = student([mla, mamba2]);
        let kd = Kd::new(taught_in(place), &student, &[], config, place);
        Stage::Kd(Box::new(kd.unwrap()), text)
    };
    match name {
        "pretrain" => Stage::Pretrain(Pretrain::new(&parts(), place).unwrap(), text),
        "ild" => {
            let (bank, config) = (bank().into(), IldConfig::default());
            let teacher = parts().lm(place).unwrap();
            let ild = Ild::new(teacher, "t".into(), bank, config, None, place);
            Stage::Ild(ild.unwrap(), text)
        }
        "ild-joint" => {
            let config = IldConfig {
                inputs: IldInputs::Joint,
                ..IldConfig::default()
            };
            let (teacher, hybrid) = (parts().lm(place).unwrap(), vec![(None, hybrid)]);
            let ild = Ild::new(teacher, "t".into(), hybrid, config, None, place);
            Stage::Ild(ild.unwrap(), text)
        }
        "kd" => kd(KdConfig {
            temperature: 1.5,
            ce_weight: 0.25,
            ..KdConfig::default()
        }),
        "kd-stepwise" => kd(KdConfig {
            kl_weight: 0.1,
            ce_weight: 1.0,
            labels: Labels::Teacher,
            schedule: Schedule::Stepwise,
            trained: Trained::Mixers,
            ..KdConfig::default()
        }),
        "dpo" => {
            let config = DpoConfig {
                beta: 0.5,
                ..DpoConfig::default()
            };
            let stored = setting.out("frozen.safetensors");
            let pairs = &setting.pairs;
            let dpo = Dpo::new(&hybrid, pairs, config, &stored, place, &Quiet::default());
            Stage::Dpo(dpo.unwrap(), pairs)
        }
        _ => unreachable!("{name}"),
    }
}

/// Every file of weights, sizes and records below a folder, with its bytes.
pub(super) fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let inner = files(&path).into_iter();
            found.extend(
                inner.map(|(name, bytes)| (Path::new(path.file_name().unwrap()).join(name), bytes)),
            );
        } else if path
            .extension()
            .is_some_and(|e| e != "jsonl" && e != "zebroid")
        {
            found.insert(
                path.file_name().unwrap().into(),
                std::fs::read(&path).unwrap(),
            );
        }
    }
    found
}

/// Those of [`files`] that hold weights.
pub(super) fn weights_in(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = files(folder);
    found.retain(|path, _| path.extension().is_some_and(|e| e == "safetensors"));
    found
}

#[test]
fn interrupted_equals_uninterrupted_bit_for_bit() {
    let setting = Setting::new();
    let config = config(8);
    for name in NAMES {
        let straight = setting.out(&format!("{name}-straight"));
        let mut whole = stage(&setting, name);
        let metrics = setting.run(&mut whole, &config, &straight, 0).unwrap();
        let broken = setting.out(&format!("{name}-broken"));
        for _ in 0..2 {
            let stopped = setting
                .run(&mut stage(&setting, name), &config, &broken, 3)
                .unwrap_err();
            assert!(
                matches!(stopped, Error::Interrupted(_)),
                "{name}: {stopped}"
            );
            assert!(!broken.exists(), "nothing half-done under the final name");
        }
        let resumed = setting
            .run(&mut stage(&setting, name), &config, &broken, 0)
            .unwrap();
        assert!(!partial_folder(&broken).exists());
        let losses = |m: &[StepMetrics]| {
            m.iter()
                .map(|m| (m.step, m.loss.to_bits()))
                .collect::<Vec<_>>()
        };
        assert_eq!(losses(&metrics), losses(&resumed), "{name}");
        assert_eq!(losses(&metrics).len(), 8);
        let (a, b) = (files(&straight), files(&broken));
        assert!(!a.is_empty());
        let same = |name| a.get(name) == b.get(name);
        let other: Vec<_> = a.keys().filter(|name| !same(*name)).collect();
        assert!(other.is_empty() && a.len() == b.len(), "{name}: {other:?}");
        let steps = events::steps(&broken.join(checkpoint::EVENTS));
        assert_eq!(steps, (0..=8).collect::<Vec<_>>(), "{name}");
        let samples = read_samples(&broken.join(checkpoint::SAMPLES)).unwrap();
        let steps: Vec<u64> = samples.iter().map(|sample| sample.step).collect();
        // A bank has no one student.
        let wanted: &[u64] = if name == "ild" { &[] } else { &[3, 6, 8] };
        assert_eq!(steps, wanted, "{name}");
        for sample in &samples {
            assert_eq!(sample.prompt, samples[0].prompt);
            assert!(!sample.prompt.is_empty() && !sample.text.is_empty());
        }
    }
}

/// What runs say of themselves, on their way and when they are done; what is removed, and what is not.
#[test]
fn runs_are_found_and_removed() {
    let setting = Setting::new();
    let root = setting.out("runs");
    let deep = root.join("recipe");
    std::fs::create_dir_all(&deep).unwrap();
    let train = |name: &str, folder: &Path, steps: u64, stop_after: u64| {
        let out = folder.join(name);
        let done = setting.run(&mut stage(&setting, name), &config(steps), &out, stop_after);
        assert_eq!(done.is_ok(), stop_after == 0);
        out
    };
    let bank = train("ild", &root, 2, 0);
    let kd = train("kd", &deep, 5, 4);
    std::fs::create_dir(root.join("photos")).unwrap();
    let runs = runs::list(&root).unwrap();
    let names = |runs: &[runs::Run]| -> Vec<String> {
        let mut names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&runs), ["ild", "recipe/kd"]);
    let find = |stage: &str| {
        let run = runs.iter().find(|run| run.stage.as_deref() == Some(stage));
        run.unwrap().clone()
    };
    let (ild, partial) = (find("ild"), find("kd"));
    assert_eq!(
        (ild.state, partial.state),
        (runs::State::Finished, runs::State::Stopped)
    );
    assert_eq!(
        (ild.step, ild.steps, ild.tokens),
        (Some(2), Some(2), Some(256))
    );
    assert_eq!(
        (partial.step, partial.steps, partial.tokens),
        (Some(4), Some(5), Some(512))
    );
    assert!(ild.loss.unwrap() > 0.0 && ild.bytes > 10_000 && ild.age_seconds < 3600);
    let settings: BTreeMap<String, String> = partial.settings().unwrap().into_iter().collect();
    assert_eq!(settings["kd.train.lr"], "0.003");
    assert_eq!(settings["kd.objective.temperature"], "1.5");
    // By its result's name too, and while a process works on it, which then keeps it.
    let lock = checkpoint::lock(&kd).unwrap();
    let running = runs::Run::open(&kd).unwrap();
    assert_eq!(running.state, runs::State::Running);
    let refused = |run: &runs::Run| run.remove().unwrap_err().to_string();
    assert!(refused(&running).contains("works on"));
    drop(lock);
    let lock = checkpoint::lock(&deep).unwrap();
    assert!(
        refused(&running).contains("recipe"),
        "its recipe is carried out"
    );
    drop(lock);
    for (run, place) in [(&partial, partial_folder(&kd)), (&ild, bank.join("mla"))] {
        let mine = place.join("notes.txt");
        std::fs::write(&mine, "").unwrap();
        assert!(refused(run).contains("notes.txt: not written by zebroid"));
        std::fs::remove_file(mine).unwrap();
        run.remove().unwrap();
    }
    assert!(runs::list(&root).unwrap().is_empty());
    let left = std::fs::read_dir(&root).unwrap().count();
    assert_eq!(left, 2, "folders that are no runs stay");
    let said = runs::Run::open(&root).unwrap_err().to_string();
    assert!(said.contains("runs: no run"), "{said}");
}

#[test]
fn every_stage_learns() {
    let setting = Setting::new();
    let config = config(30);
    for name in NAMES {
        let mut stage = stage(&setting, name);
        let metrics = setting
            .run(&mut stage, &config, &setting.out(name), 0)
            .unwrap();
        let mean = |m: &[StepMetrics]| m.iter().map(|m| m.loss).sum::<f64>() / m.len() as f64;
        // A stepwise run has all its layers, and the harder task, from the middle on.
        let (from, gain) = match name {
            "kd-stepwise" => (15, 1.0),
            _ => (0, 0.9),
        };
        let (first, last) = (mean(&metrics[from..from + 3]), mean(&metrics[27..]));
        assert!(last < gain * first, "{name}: {first} to {last}");
        if name == "dpo" {
            let term = |m: &StepMetrics, name: &str| m.terms[name].as_f64().unwrap();
            let (first, last) = (&metrics[0], &metrics[29]);
            assert_eq!(term(first, "margin"), 0.0, "nothing has moved yet");
            assert!(term(last, "margin") > 0.0 && term(last, "accuracy") > 0.5);
        }
    }
    // Results are checkpoints that load.
    for folder in [
        "pretrain",
        "ild/mla",
        "ild/mamba2",
        "ild-joint",
        "kd",
        "kd-stepwise",
        "dpo",
    ] {
        let checkpoint = Checkpoint::open(&setting.out(folder)).unwrap();
        checkpoint.model(&Place::cpu()).unwrap();
    }
}

/// Also where the parts of a step count unequally: relative errors, and masks that leave out what is not learned; and where the large batch goes
/// in groups beside each other, which the parts are too small for.
#[test]
fn accumulation_equals_one_large_batch() {
    let setting = Setting::new();
    let learned = |index| {
        let batch = setting.corpus.batch(0, index, 2, 32).unwrap();
        batch.mask.iter().sum::<f32>()
    };
    assert_ne!(learned(0), learned(1), "parts of one size prove little");
    let groups = |rows| Windows { rows, len: 256 }.groups().count();
    assert_eq!([groups(4), groups(2)], [2, 1]);
    for (name, seq_len) in NAMES.iter().flat_map(|name| [(*name, 32), (*name, 256)]) {
        let once = |accumulation: usize, batch_size: usize| {
            let config = TrainSettings {
                accumulation,
                batch_size,
                seq_len,
                ..config(1)
            };
            let out = setting.out(&format!("{name}-{accumulation}-{seq_len}"));
            let mut stage = stage(&setting, name);
            let metrics = setting.run(&mut stage, &config, &out, 0).unwrap();
            let terms = metrics[0].terms.iter();
            let terms = terms.map(|(name, value)| (name.clone(), value.as_f64().unwrap()));
            let norms = metrics[0].grad_norm.iter();
            let mut found: Vec<(String, f64)> = norms.map(|n| ("norm".into(), *n)).collect();
            found.push(("loss".into(), metrics[0].loss));
            found.extend(terms);
            found
        };
        for ((term, a), (other, b)) in once(1, 4).into_iter().zip(once(2, 2)) {
            assert_eq!(term, other);
            assert!(
                (a - b).abs() <= 2e-5 * a.abs(),
                "{name} {seq_len} {term}: {a} and {b}"
            );
        }
    }
}

/// The step is not taken, the run stops by name, and what was saved goes on.
#[test]
fn a_step_that_is_not_finite_is_not_taken() {
    let setting = Setting::new();
    let (straight, out) = (setting.out("straight"), setting.out("out"));
    let config = TrainSettings {
        on_divergence: OnDivergence::Stop,
        ..config(5)
    };
    let mut whole = stage(&setting, "kd");
    setting.run(&mut whole, &config, &straight, 0).unwrap();
    setting
        .run(&mut stage(&setting, "kd"), &config, &out, 3)
        .unwrap_err();
    let saved = files(&partial_folder(&out));
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut weights = parts().weights.to_map();
    let broken = weights[name].to_tensor().unwrap().ones_like().unwrap() * f64::NAN;
    weights.insert(name.into(), broken.unwrap().into());
    let broken = Lm::new(&teacher_config(), &Weights::from(weights)).unwrap();
    let mut stopped = stage(&setting, "kd");
    let Stage::Kd(kd, _) = &mut stopped else {
        unreachable!()
    };
    kd.exchange_teacher(broken);
    let message = setting.run(&mut stopped, &config, &out, 0).unwrap_err();
    let message = message.to_string();
    for part in [
        "the loss is NaN (the MLP of layer 1 of the teacher) at step 4",
        "batches 6 to 7 of seed 0",
        "--lr",
        "the save of step 3",
    ] {
        assert!(message.contains(part), "{message}");
    }
    assert!(
        saved == files(&partial_folder(&out)),
        "the save was touched"
    );
    setting
        .run(&mut stage(&setting, "kd"), &config, &out, 0)
        .unwrap();
    assert!(files(&straight) == files(&out), "the weights differ");
}

/// A teacher whose embedding of one token, which stands in the batches of one step only, is not a number; that step, from 0.
fn poisoned(setting: &Setting, settings: &TrainSettings, steps: u64) -> (Lm, u64) {
    let config = settings.settle().unwrap();
    let tokens = |step: u64| -> std::collections::BTreeSet<u32> {
        let batch = |i| {
            setting
                .corpus
                .batch(config.seed, i, config.batch_size, config.seq_len)
        };
        let batches = config.batches_of(step).map(|i| batch(i).unwrap());
        batches.flat_map(|batch| batch.input_ids).collect()
    };
    let others = |step: u64| (0..steps).filter(move |other| *other != step);
    let mut choices = (2..steps - 2).flat_map(|step| {
        let rare = tokens(step).into_iter();
        rare.filter(move |token| others(step).all(|other| !tokens(other).contains(token)))
            .map(move |token| (step, token))
    });
    let (step, token) = choices.next().expect("some token is rare");
    let mut weights = parts().weights.to_map();
    let embedding = weights["model.embed_tokens.weight"].to_tensor().unwrap();
    let mut rows: Vec<Vec<f32>> = embedding.to_vec2().unwrap();
    rows[token as usize].fill(f32::NAN);
    let rows = Tensor::new(rows, &Device::Cpu).unwrap();
    weights.insert("model.embed_tokens.weight".into(), rows.into());
    weights.insert("lm_head.weight".into(), embedding.into());
    let untied = ModelConfig {
        tie_word_embeddings: false,
        ..teacher_config()
    };
    (Lm::new(&untied, &Weights::from(weights)).unwrap(), step)
}

/// One batch that cannot be learned from is named and left out, and a run that is interrupted ends the same.
#[test]
fn a_step_that_diverges_is_left_out() {
    let (setting, config) = (Setting::new(), config(8));
    let run = |name: &str, stop_after: u64| {
        let (teacher, step) = poisoned(&setting, &config, 8);
        let mut stage = stage(&setting, "kd");
        let Stage::Kd(kd, _) = &mut stage else {
            unreachable!()
        };
        kd.exchange_teacher(teacher);
        (
            setting.run(&mut stage, &config, &setting.out(name), stop_after),
            step,
        )
    };
    let (metrics, step) = run("straight", 0);
    for metrics in metrics.unwrap() {
        match metrics.step == step + 1 {
            true => {
                let skipped = metrics.skipped.unwrap();
                let wanted = "the loss is NaN (an embedding of the teacher)";
                assert_eq!((skipped.why.as_str(), skipped.back_to), (wanted, None));
            }
            false => assert!(metrics.skipped.is_none() && metrics.loss.is_finite()),
        }
    }
    while run("broken", 2).0.is_err() {}
    assert!(files(&setting.out("straight")) == files(&setting.out("broken")));
}

/// Steps that all diverge lead back to the last save, at lower rates, and then to the end of the run.
#[test]
fn a_run_that_diverges_goes_back_and_ends() {
    let setting = Setting::new();
    let config = TrainSettings {
        on_divergence: OnDivergence::Lower,
        warmup: 0.0,
        lr_scheduler: LrScheduler::Wsd,
        decay: Some(0.01),
        ..config(30)
    };
    let out = setting.out("out");
    setting
        .run(&mut stage(&setting, "kd"), &config, &out, 3)
        .unwrap_err();
    let state = |step: &str| {
        let name = format!("state-{step}.safetensors");
        let tensors = read_tensors(&partial_folder(&out).join(name)).unwrap();
        let values = tensors.values().map(|t| t.to_dtype(DType::F64).unwrap());
        let values = values.map(|t| t.flatten_all().unwrap().to_vec1::<f64>().unwrap());
        values.collect::<Vec<_>>()
    };
    let saved = state("00000003");
    let mut broken = stage(&setting, "kd");
    let Stage::Kd(kd, _) = &mut broken else {
        unreachable!()
    };
    let mut weights = parts().weights.to_map();
    let norm = weights["model.norm.weight"].to_tensor().unwrap();
    weights.insert(
        "model.norm.weight".into(),
        (norm * f64::NAN).unwrap().into(),
    );
    kd.exchange_teacher(Lm::new(&teacher_config(), &Weights::from(weights)).unwrap());
    let message = setting
        .run(&mut broken, &config, &out, 0)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("the loss is NaN") && message.contains("at step 15"),
        "{message}"
    );
    let metrics = std::fs::read_to_string(partial_folder(&out).join("metrics.jsonl")).unwrap();
    let metrics: Vec<StepMetrics> = metrics
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let back: Vec<u64> = (metrics.iter())
        .filter(|m| m.skipped.as_ref().is_some_and(|s| s.back_to.is_some()))
        .map(|m| m.step)
        .collect();
    // The saves between hold what the run went back to.
    assert_eq!(back, [6, 9, 12]);
    let rates: Vec<f64> = [3, 6, 9, 12].map(|i| metrics[i].lr / metrics[3].lr).into();
    assert_eq!(rates, [1.0, 0.5, 0.25, 0.125]);
    assert!(saved == state("00000012"));
}

#[test]
fn a_spike_is_far_above_the_usual_and_above_the_beginning() {
    let metrics = |losses: &[f64]| -> Vec<StepMetrics> {
        let of = |(i, loss): (usize, &f64)| StepMetrics {
            step: i as u64 + 1,
            tokens: 0,
            loss: *loss,
            lr: 0.1,
            grad_norm: vec![],
            layer_grad_norm: vec![],
            terms: Default::default(),
            tokens_per_s: 1.0,
            skipped: None,
        };
        losses.iter().enumerate().map(of).collect()
    };
    let most = |losses: &[f64], factor: f64| recovery::most(&metrics(losses), factor);
    assert_eq!(most(&[1.0; 19], 10.0), f64::INFINITY);
    assert_eq!(most(&[1.0; 20], 10.0), 10.0);
    assert_eq!(most(&[1.0; 20], 0.0), f64::INFINITY);
    let falling: Vec<f64> = [vec![2.0; 20], vec![0.01; 60]].concat();
    assert_eq!(most(&falling, 10.0), 2.0);
    let mut lost = metrics(&[1.0; 30]);
    for m in &mut lost[20..] {
        (m.loss, m.skipped) = (
            f64::NAN,
            Some(Skipped {
                why: String::new(),
                back_to: None,
            }),
        );
    }
    assert_eq!(recovery::most(&lost, 10.0), 10.0);
    let line = serde_json::to_string(&lost[25]).unwrap();
    assert!(
        serde_json::from_str::<StepMetrics>(&line)
            .unwrap()
            .loss
            .is_nan(),
        "{line}"
    );
}

/// Two saves are kept, and a damaged one is passed over for the one before.
#[test]
fn saves_rotate() {
    let setting = Setting::new();
    let (straight, out, config) = (setting.out("straight"), setting.out("out"), config(8));
    setting
        .run(&mut stage(&setting, "kd"), &config, &straight, 0)
        .unwrap();
    let run = |stop_after| {
        let mut stage = stage(&setting, "kd");
        setting.run_with(&mut stage, &config, &out, stop_after, (false, 2))
    };
    run(7).unwrap_err();
    let names: Vec<PathBuf> = weights_in(&partial_folder(&out)).into_keys().collect();
    let kept = ["state-00000006.safetensors", "state-00000007.safetensors"];
    assert_eq!(names, kept.map(PathBuf::from));
    // One bit of a weight.
    let newest = partial_folder(&out).join(kept[1]);
    let mut bytes = std::fs::read(&newest).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    let metrics = run(0).unwrap();
    assert_eq!(metrics.len(), 8);
    assert!(files(&straight) == files(&out), "the weights differ");
}

/// Finite losses can have gradients that are not: the root's slope at 0.
#[test]
fn a_gradient_that_is_not_finite_is_named() {
    for (value, problem) in [(0.0f32, "the gradient of odd"), (1e30, "finite")] {
        let tensor = |v: f32| Tensor::from_vec(vec![v; 2], 2, &Device::Cpu).unwrap();
        let tensors = [
            ("odd".to_owned(), tensor(value)),
            ("plain".to_owned(), tensor(1.0)),
        ];
        let weights = Weights::new(tensors.into_iter().collect());
        let group = ParamGroup::new(
            &weights,
            |_| true,
            &Roles::new(&teacher_config()),
            &Place::cpu(),
        );
        let (mut group, seen) = group.unwrap();
        let sum = |name: &str| seen.get(name).unwrap().sum_all().unwrap();
        let loss = (sum("odd").sqrt().unwrap() + sum("plain")).unwrap();
        assert!(loss.to_scalar::<f32>().unwrap().is_finite());
        group.add(&loss.backward().unwrap()).unwrap();
        match group.norms() {
            Err(error) => assert!(error.to_string().contains(problem), "{error}"),
            Ok(norms) => {
                assert!(value > 0.0 && norms.of_all().is_finite());
                // An update that leaves f32's range.
                let mut update = config(1).settle().unwrap().update(0, 1);
                update.rules.adamw.lr = 1e39;
                group.update(&norms, &update).unwrap();
                let error = group.check_finite().unwrap_err().to_string();
                assert!(error.contains("the trained odd"), "{error}");
            }
        }
    }
}

/// Some layers at a time, or in processes of their own: the bank is that of all at once, bit for bit.
#[test]
fn layers_are_trained_at_once_or_one_by_one() {
    let (setting, config) = (Setting::new(), config(5).settle().unwrap());
    let carry_out = |training: Training, name: &str, observe: &mut dyn FnMut(&StepMetrics, u64)| {
        let options = RunOptions {
            out: setting.out(name),
            tokenizer: setting.folder.path().to_owned(),
            sources: Sources::default(),
            force: false,
            save_every: 3,
            keep_last: 1,
            validation: None,
            stop: &|| false,
            observe,
        };
        training.carry_out(&config, options)
    };
    let students =
        || [LayerKind::MLA, LayerKind::Mamba2].map(|kind| (Some(kind), student([kind; 2])));
    let ild = |layers: Option<&[usize]>| {
        let ild = IldConfig::default();
        let ild = Ild::new(
            teacher(),
            "t".into(),
            students().into(),
            ild,
            layers,
            &Place::cpu(),
        );
        Stage::Ild(ild.unwrap(), &setting.corpus)
    };
    let run = |training: Training, name: &str| {
        let mut steps = Vec::new();
        let metrics = carry_out(training, name, &mut |m, all| steps.push((m.step, all)));
        (metrics.unwrap(), steps)
    };
    let (whole, _) = run(ild(None).into(), "whole");
    let by_layers = Training::ByLayers {
        stage: Box::new(|layers| Ok(ild(Some(layers)))),
        data: &setting.corpus,
        layers: 2,
        at_once: 1,
    };
    let (merged, steps) = run(by_layers, "by-layers");
    assert_eq!(steps.last(), Some(&(10, 10)));
    for layer in [1, 0] {
        run(ild(Some(&[layer])).into(), &format!("piece-{layer}"));
    }
    let pieces = |names: &[&str]| Training::Joined {
        stage: Box::new(ild(Some(&[]))),
        pieces: names.iter().map(|name| setting.out(name)).collect(),
    };
    run(pieces(&["piece-1", "piece-0"]), "joined");
    let expected = weights_in(&setting.out("whole"));
    assert_eq!(expected.len(), 2);
    for name in ["by-layers", "joined"] {
        assert!(weights_in(&setting.out(name)) == expected, "{name} differs");
        assert!(!partial_folder(&setting.out(name)).exists());
    }
    for (a, b) in whole.iter().zip(&merged) {
        assert!(
            (a.loss - b.loss).abs() < 1e-9 * a.loss,
            "{} for {}",
            b.loss,
            a.loss
        );
        assert_eq!(a.terms["mla.1"], b.terms["mla.1"]);
    }
    // One candidate is a student that can be measured, several are not.
    let [first, _] = students();
    let one = Ild::new(
        teacher(),
        "t".into(),
        vec![first],
        IldConfig::default(),
        None,
        &Place::cpu(),
    );
    assert!(
        Stage::Ild(one.unwrap(), &setting.corpus)
            .student()
            .is_some()
    );
    assert!(ild(None).student().is_none());
    // What is unfinished is of its settings, and dropped if that is asked.
    let stale = partial_folder(&setting.out("stale"));
    std::fs::create_dir_all(&stale).unwrap();
    let other = TrainSettings {
        lr: 1e-4,
        ..self::config(5)
    };
    let piece = stale.join("layers-0-0");
    setting
        .run(&mut ild(Some(&[0])), &other, &piece, 0)
        .unwrap();
    let by_layers = || Training::ByLayers {
        stage: Box::new(|layers| Ok(ild(Some(layers)))),
        data: &setting.corpus,
        layers: 2,
        at_once: 1,
    };
    // A piece is of a run that a process works on.
    let lock = checkpoint::lock(&setting.out("stale")).unwrap();
    let busy = runs::Run::open(&piece).unwrap().check_removal();
    assert!(
        busy.unwrap_err()
            .to_string()
            .contains("a zebroid process works on")
    );
    drop(lock);
    runs::Run::open(&piece).unwrap().check_removal().unwrap();
    let refused = carry_out(by_layers(), "stale", &mut |_, _| {}).unwrap_err();
    assert!(
        refused.to_string().contains("train.lr was 0.0001"),
        "{refused}"
    );
    for (names, part) in [
        (&["piece-0"][..], "no piece has trained mla.model.layers.1."),
        (&["piece-0", "piece-0"][..], "two pieces have trained"),
        (
            &["whole"][..],
            "no piece (train ild --only-layers makes one)",
        ),
    ] {
        let refused = carry_out(pieces(names), "refused", &mut |_, _| {});
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(part), "{refused}");
    }
}

#[test]
fn a_run_with_other_settings_is_not_resumed() {
    let setting = Setting::new();
    let out = setting.out("kd");
    setting
        .run(&mut stage(&setting, "kd"), &config(8), &out, 3)
        .unwrap_err();
    let other = TrainSettings {
        lr: 1e-4,
        ..config(8)
    };
    let message = setting
        .run(&mut stage(&setting, "kd"), &other, &out, 0)
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
    let config = TrainSettings {
        lr: 1.0,
        warmup: 0.1,
        min_lr: 0.1,
        ..TrainSettings::default()
    };
    assert!((config.settle().unwrap().lr_at(0, 100) - 0.1).abs() < 1e-3);
    assert!((config.settle().unwrap().lr_at(10, 100) - 0.9).abs() < 0.1);
    assert!(config.settle().unwrap().lr_at(99, 100) < 0.11);
    let config = TrainSettings {
        lr_scheduler: LrScheduler::Wsd,
        decay: Some(0.4),
        min_lr: 0.0,
        ..config
    };
    let rates = [20, 60, 80, 99].map(|step| config.settle().unwrap().lr_at(step, 100));
    for (rate, wanted) in rates.iter().zip([1.0, 1.0, 0.5, 0.025]) {
        assert!((rate - wanted).abs() < 1e-9, "{rates:?}");
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let say = |change: fn(&mut TrainSettings)| {
        let mut config = TrainSettings::default();
        change(&mut config);
        config.settle().unwrap_err().to_string()
    };
    assert!(say(|c| c.lr = f64::NAN).contains("lr NaN"));
    assert!(say(|c| c.beta2 = 1.0).contains("beta2 1"));
    assert!(say(|c| c.decay = Some(0.0)).contains("decay 0"));
    assert!(say(|c| c.decay = Some(0.5)).contains("decay is for lr_scheduler wsd"));
    assert!(say(|c| c.adamw_lr = Some(1e-3)).contains("adamw_lr is for optimizer muon"));
    assert!(say(|c| c.galore.rank = 7).contains("galore is for optimizer galore"));
    let say_galore = |change: fn(&mut TrainSettings)| {
        let mut config = TrainSettings {
            optimizer: OptimizerName::Galore,
            ..TrainSettings::default()
        };
        change(&mut config);
        config.settle().unwrap_err().to_string()
    };
    assert!(say_galore(|c| c.galore.rank = 0).contains("galore.rank 0 must be above 0"));
    assert!(say_galore(|c| c.galore.scale = -1.0).contains("galore.scale -1"));
    assert!(say(|c| (c.lr, c.mixer_lr) = (0.0, Some(1e-3))).contains("mixer_lr beside lr 0"));
    assert!(say(|c| c.batch_size = 0).contains("batch_size"));
    assert!(say(|c| c.epochs = Some(0.0)).contains("epochs 0"));
    assert!(say(|c| c.accumulation = usize::MAX).contains("times a step: at most 16777216"));
    assert!(say(|c| (c.steps, c.tokens) = (Some(1), Some(1))).contains("give one of them"));
    let config = TrainSettings {
        tokens: Some(100),
        ..TrainSettings::default()
    };
    let message = config.settle().unwrap().steps(50).unwrap_err().to_string();
    assert!(
        message.contains("tokens 100 is less than one step (4096"),
        "{message}"
    );
}

#[test]
fn a_run_is_as_long_as_it_is_said() {
    let config = |change: fn(&mut TrainSettings)| {
        let mut config = config(0);
        config.steps = None;
        change(&mut config);
        config.settle().unwrap().steps(40).unwrap()
    };
    assert_eq!(config(|_| {}), 10, "one epoch of 40 windows, four a step");
    assert_eq!(config(|c| c.epochs = Some(2.5)), 25);
    assert_eq!(config(|c| c.tokens = Some(1300)), 10, "128 tokens a step");
    assert_eq!(config(|c| c.steps = Some(7)), 7);
}

/// A layer that has not come yet is not trained, and what is not a mixer never is; a layer's first step is as long
/// as a run's first, in a schedule of its own.
#[test]
fn a_stepwise_schedule_converts_layer_after_layer() {
    let setting = Setting::new();
    let moves = |stage: &mut Stage, step: u64| {
        let before = tensors(stage);
        let batch = setting.corpus.ordered(0, 2, 32).unwrap();
        let turn = stage.start_step(step, 10);
        let settings = TrainSettings {
            clip: 0.0,
            ..config(1)
        };
        let settings = settings.settle().unwrap();
        let update = settings.update(step - turn.start, turn.end - turn.start);
        stage.backward(&batch, &Shares::alone()).unwrap();
        for group in stage.groups_mut() {
            let norms = group.norms().unwrap();
            group.update(&norms, &update).unwrap();
        }
        let after = tensors(stage);
        let moved = |layer: &str| {
            let own = before.iter().filter(|(name, _)| name.contains(layer));
            let by = own.flat_map(|(name, old)| {
                let pairs = old.iter().zip(&after[name]);
                pairs.map(|(old, new)| (old - new).abs())
            });
            f64::from(by.fold(0.0, f32::max)) / update.rules.adamw.lr
        };
        let names = before.keys();
        assert!({ names }.all(|n| n.contains("mla.") || n.contains("mamba.")));
        (turn, moved("layers.0.mla"), moved("layers.1.mamba"))
    };
    let full = |moved: f64| (moved - 1.0).abs() < 0.02;
    let mut first = stage(&setting, "kd-stepwise");
    let (turn, mla, mamba) = moves(&mut first, 0);
    assert!(
        turn == (0..5) && full(mla) && mamba == 0.0,
        "{turn:?} {mla} {mamba}"
    );
    for step in 1..5 {
        moves(&mut first, step);
    }
    let (turn, mla, mamba) = moves(&mut first, 5);
    assert!(
        turn == (5..10) && mla > 0.0 && full(mamba),
        "{turn:?} {mla} {mamba}"
    );

    // A layer that an earlier stage has trained stays in its place.
    let parts = student([LayerKind::MLA, LayerKind::Mamba2]);
    let stepwise = KdConfig {
        schedule: Schedule::Stepwise,
        trained: Trained::Mixers,
        ..KdConfig::default()
    };
    let kd = Kd::new(taught(), &parts, &[1], stepwise, &Place::cpu());
    let mut second = Stage::Kd(Box::new(kd.unwrap()), &setting.corpus);
    let (turn, mla, mamba) = moves(&mut second, 0);
    assert!(
        turn == (0..10) && full(mla) && full(mamba),
        "{turn:?} {mla} {mamba}"
    );
}

/// `--lr` is reached by every layer, not only by those that come first.
#[test]
fn a_stepwise_run_warms_up_again_for_every_layer() {
    let setting = Setting::new();
    let mut stage = stage(&setting, "kd-stepwise");
    let out = setting.out("stepwise");
    let metrics = setting.run(&mut stage, &config(10), &out, 0).unwrap();
    let rates: Vec<f64> = metrics.iter().map(|m| m.lr).collect();
    assert_eq!(rates[..5], rates[5..]);
    assert!(rates[5] > 2.0 * rates[4], "{rates:?}");
}

/// A save that cannot be read is named with what starts over, and `force` starts over.
#[test]
fn a_damaged_save_is_told_and_can_be_dropped() {
    let setting = Setting::new();
    let (straight, out) = (setting.out("straight"), setting.out("out"));
    let config = config(4);
    let run = |out: &Path, stop_after, force| {
        let mut stage = stage(&setting, "kd");
        setting.run_with(&mut stage, &config, out, stop_after, (force, 1))
    };
    run(&straight, 0, false).unwrap();
    run(&out, 3, false).unwrap_err();
    let state = partial_folder(&out).join("state-00000003.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    let message = run(&out, 0, false).unwrap_err().to_string();
    assert!(
        message.contains("state-00000003.safetensors") && message.contains("--force"),
        "{message}"
    );
    // What is saved then is newer than what was dropped, whatever step that was of.
    let mut other = stage(&setting, "kd");
    let slower = TrainSettings {
        lr: 1e-4,
        ..config.clone()
    };
    let dropped = setting.run_with(&mut other, &slower, &out, 2, (true, 1));
    assert!(matches!(dropped.unwrap_err(), Error::Interrupted(_)));
    let names: Vec<PathBuf> = weights_in(&partial_folder(&out)).into_keys().collect();
    assert_eq!(names, [PathBuf::from("state-00000002.safetensors")]);
    setting
        .run(&mut stage(&setting, "kd"), &slower, &out, 1)
        .unwrap_err();
    std::fs::remove_dir_all(partial_folder(&out)).unwrap();
    run(&out, 3, false).unwrap_err();
    run(&out, 0, true).unwrap();
    assert!(files(&straight) == files(&out), "the weights differ");
}

/// What another program, or another kind of device, has computed is not gone on from.
#[test]
fn a_run_says_what_computes_it() {
    let setting = Setting::new();
    for name in NAMES {
        let of = match name.split('-').next() {
            Some("pretrain") => numerics::Stage::Pretrain,
            Some("ild") => numerics::Stage::Ild,
            Some("kd") => numerics::Stage::Kd,
            _ => numerics::Stage::Dpo,
        };
        let key = stage(&setting, name).key(&config(1).settle().unwrap());
        let key = format!("{:?}", key.unwrap());
        let program = numerics::version(of, &Device::Cpu);
        assert!(key.contains(&program), "{name}: {key}");
    }
}

pub(super) fn tensors(stage: &Stage) -> BTreeMap<String, Vec<f32>> {
    let student = match stage {
        Stage::Kd(kd, _) => &kd.student,
        Stage::Pretrain(pretrain, _) => &pretrain.student,
        Stage::Dpo(dpo, _) => &dpo.student,
        Stage::Ild(..) => unreachable!("it has several"),
    };
    let values = student.params.tensors();
    values
        .map(|(n, t)| (n.to_owned(), crate::op::cpu::entries(t).unwrap()))
        .collect()
}

/// Frozen log-probabilities of this model and data are read, not computed again; others are not used.
#[test]
fn frozen_log_probabilities_are_computed_once() {
    let setting = Setting::new();
    let stored = setting.out("frozen.safetensors");
    let parts = student([LayerKind::MLA, LayerKind::Mamba2]);
    let computed = |pairs: &Preferences| {
        let watch = Quiet::default();
        let (config, place) = (DpoConfig::default(), Place::cpu());
        Dpo::new(&parts, pairs, config, &stored, &place, &watch).unwrap();
        watch.steps()
    };
    assert_eq!(computed(&setting.pairs), 5, "40 pairs, 8 a pass");
    let (_, metadata) = crate::checkpoint::read_tensors_with_metadata(&stored).unwrap();
    let program = numerics::version(numerics::Stage::Dpo, &Device::Cpu);
    assert!(metadata["key"].contains(&program), "{metadata:?}");
    assert_eq!(computed(&setting.pairs), 0);
    let path = setting.out("others.jsonl");
    std::fs::write(&path, stories::preferences_to_jsonl(3, 8)).unwrap();
    let tokenizer = crate::data::Tokenizer::open(setting.folder.path()).unwrap();
    assert_eq!(
        computed(&Preferences::load(&path, &tokenizer, LENGTHS).unwrap()),
        1
    );
}

/// Logits in pieces and activations made anew give what candle's graph of the whole gives.
#[test]
fn pieces_give_the_gradients_of_the_whole() {
    let setting = Setting::new();
    let kinds = [LayerKind::MLA, LayerKind::Mamba2];
    // The second in groups beside each other.
    let shapes = [(2, 32), (4, 256)];
    for (tied, (rows, len)) in [true, false]
        .iter()
        .flat_map(|tied| shapes.map(|s| (*tied, s)))
    {
        let count = rows * len;
        for trained in [Trained::Everything, Trained::Mixers] {
            let mut parts = student(kinds);
            if !tied {
                parts.config.tie_word_embeddings = false;
                let mut all = parts.weights.to_map();
                let head = all["model.embed_tokens.weight"].to_tensor().unwrap();
                all.insert("lm_head.weight".into(), (head * 0.5).unwrap().into());
                parts.weights = all.into();
            }
            let config = KdConfig {
                trained,
                ..KdConfig::default()
            };
            let kd = || {
                let kd = Kd::new(taught(), &parts, &[], config, &Place::cpu());
                kd.unwrap()
            };
            let batch = setting.corpus.batch(3, 0, rows, len).unwrap();
            let whole = kd();
            let ids = stage::ids(&batch, &Device::Cpu).unwrap();
            let documents = Some(&batch.documents);
            let flat = |x: Tensor| x.reshape((count, ())).unwrap();
            let taught = flat(teacher().forward(&ids, documents).unwrap());
            let logits = flat(whole.student.lm.forward(&ids, documents).unwrap());
            let loss = crate::op::loss::forward_kl(&taught, &logits, 1.0).unwrap();
            let loss = loss.mean_all().unwrap();
            let mut truth = whole.student;
            truth.params.add(&loss.backward().unwrap()).unwrap();
            let truth = truth.params.grads();
            let loss = f64::from(loss.to_scalar::<f32>().unwrap());
            let mut kept = None;
            for checkpointing in [false, true] {
                for logits in [500 * count, 500 * (count / 9)] {
                    let mut kd = kd();
                    kd.student.checkpointing = Some(checkpointing);
                    kd.student.logits = logits;
                    let terms = kd.backward(&batch, &Shares::alone()).unwrap();
                    assert!((terms.loss - loss).abs() < 1e-6 * loss);
                    let grads = kd.student.params.grads();
                    assert!(grads.keys().eq(truth.keys()));
                    for (name, grad) in &grads {
                        let [a, b] = [grad, &truth[name]]
                            .map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                        let most = b.iter().fold(0f32, |m, x| m.max(x.abs()));
                        let off = a
                            .iter()
                            .zip(&b)
                            .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                        assert!(off <= 1e-5 * most, "{name}: {off} of {most}");
                    }
                    if logits == 500 * count {
                        // Made anew they are the same bits.
                        let bits = grads.iter().map(|(n, g)| {
                            (
                                n.clone(),
                                g.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                            )
                        });
                        let bits: BTreeMap<_, _> = bits.collect();
                        assert_eq!(kept.get_or_insert_with(|| bits.clone()), &bits);
                    }
                }
            }
        }
    }
}

/// Every optimizer learns, nearly as AdamW does, and goes on bit for bit where it was stopped.
#[test]
fn every_optimizer_learns_and_goes_on() {
    let setting = Setting::new();
    let run = |optimizer: OptimizerName, name: &str, stop: u64| {
        let mut config = TrainSettings {
            optimizer,
            ..config(8)
        };
        if matches!(optimizer, OptimizerName::Galore | OptimizerName::Galore8bit) {
            // Below the model's width, and renewed before and after the stop.
            config.galore = GaloreConfig {
                rank: 8,
                interval: 3,
                scale: 1.0,
            };
        }
        let run = |stop| {
            let mut stage = stage(&setting, "kd");
            setting.run(&mut stage, &config, &setting.out(name), stop)
        };
        if stop > 0 {
            assert!(matches!(run(stop), Err(Error::Interrupted(_))));
        }
        let metrics = run(0).unwrap();
        (metrics[0].loss, metrics[7].loss)
    };
    let (first, full) = run(OptimizerName::Adamw, "adamw", 0);
    for optimizer in OptimizerName::value_variants() {
        let (straight, again) = (format!("{optimizer:?}"), format!("{optimizer:?} again"));
        let (_, last) = run(*optimizer, &straight, 0);
        let near = match optimizer {
            OptimizerName::Adamw | OptimizerName::Adamw8bit => 0.02,
            _ => 0.5,
        };
        let learned = first - full;
        assert!(
            (last - full).abs() < near * learned,
            "{optimizer:?}: {last} for {full}, from {first}"
        );
        run(*optimizer, &again, 4);
        assert!(
            files(&setting.out(&straight)) == files(&setting.out(&again)),
            "{optimizer:?}"
        );
    }
}

/// A step of what is nothing moves what decays, by its learning rate, and that is what is a map.
#[test]
fn weight_decay_and_learning_rates_go_by_groups() {
    let parts = student([LayerKind::MLA, LayerKind::Mamba2]);
    let roles = Roles::new(&parts.config);
    let is_map = |name: &str| {
        let vectors = ["norm.weight", "bias", "conv1d.weight", "A_log", "D"];
        !vectors.iter().any(|end| name.ends_with(end))
    };
    let in_mixer = |name: &str| name.contains(".mla.") || name.contains(".mamba.");
    for optimizer in OptimizerName::value_variants() {
        let settings = TrainSettings {
            optimizer: *optimizer,
            lr: 0.1,
            mixer_lr: Some(0.4),
            weight_decay: 0.5,
            warmup: 0.0,
            ..config(8)
        };
        let update = settings.settle().unwrap().update(0, 8);
        let all = Place::cpu();
        let (mut group, _) = ParamGroup::new(&parts.weights, |_| true, &roles, &all).unwrap();
        assert!(group.has_mixers());
        let before: BTreeMap<String, Tensor> = group
            .tensors()
            .map(|(n, t)| (n.to_owned(), t.copy().unwrap()))
            .collect();
        for (name, value) in &before {
            group.add_to(name, value.zeros_like().unwrap()).unwrap();
        }
        let norms = group.norms().unwrap();
        group.update(&norms, &update).unwrap();
        for (name, after) in group.tensors() {
            let lr = if in_mixer(name) { 0.4 } else { 0.1 };
            let kept = if is_map(name) { 1.0 - lr * 0.5 } else { 1.0 };
            let gap = (after - (&before[name] * kept).unwrap())
                .unwrap()
                .abs()
                .unwrap();
            let gap = gap
                .flatten_all()
                .unwrap()
                .max(0)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            assert!(gap < 1e-6, "{optimizer:?} {name}: {gap}");
        }
    }
}

/// The first step of AdamW is as long as the learning rate: a share of how large the layers' matrices are.
#[test]
fn learning_rates_are_shares_of_the_weights() {
    let parts = student([LayerKind::MLA, LayerKind::Mamba2]);
    let roles = Roles::new(&parts.config);
    let settings = TrainSettings {
        lr: 0.1,
        scale_parameter: true,
        warmup: 0.0,
        eps: 0.0,
        ..config(8)
    };
    let update = settings.settle().unwrap().update(0, 8);
    let steps = [1.0, 3.0].map(|factor| {
        let weights = parts.weights.to_map().into_iter();
        let weights = weights.map(|(name, weight)| {
            let value = weight.to_tensor().unwrap().to_dtype(DType::F32).unwrap();
            (name, (value * factor).unwrap().into())
        });
        let weights = Weights::from(weights.collect::<BTreeMap<_, Matrix>>());
        let (mut group, _) = ParamGroup::new(&weights, |_| true, &roles, &Place::cpu()).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut sizes = Vec::new();
        let before: BTreeMap<String, Vec<f32>> = group
            .tensors()
            .map(|(name, t)| {
                if name.starts_with("model.layers.") && t.dims().len() == 2 {
                    let square = flat(t).iter().map(|x| f64::from(x * x)).sum::<f64>();
                    sizes.push((square / t.elem_count() as f64).sqrt());
                }
                (name.to_owned(), flat(t))
            })
            .collect();
        sizes.sort_by(f64::total_cmp);
        let size = sizes[sizes.len() / 2];
        let ones: Vec<_> = (group.tensors())
            .map(|(name, t)| (name.to_owned(), t.ones_like().unwrap()))
            .collect();
        for (name, ones) in ones {
            group.add_to(&name, ones).unwrap();
        }
        let norms = group.norms().unwrap();
        group.update(&norms, &update).unwrap();
        for (name, after) in group.tensors() {
            for (before, after) in before[name].iter().zip(flat(after)) {
                let moved = f64::from(before - after);
                assert!((moved - 0.1 * size).abs() < 1e-5, "{name}: {moved} {size}");
            }
        }
        size
    });
    assert!((steps[1] / steps[0] - 3.0).abs() < 1e-4, "{steps:?}");
}

/// The first step of AdamW is as long as the learning rate, whatever the gradient.
#[test]
fn new_mixers_learn_at_a_rate_of_their_own() {
    let setting = Setting::new();
    let moved = |stage: &mut Stage, mixer_lr: Option<f64>| {
        let settings = TrainSettings {
            lr: 1e-3,
            mixer_lr,
            warmup: 0.0,
            ..config(100)
        };
        let update = settings.settle().unwrap().update(0, 100);
        let before = tensors(stage);
        let batch = stage.data().batch(0, 0, 2, 32).unwrap();
        take_step(stage, &[batch], &update, f64::INFINITY).unwrap();
        let after = tensors(stage).into_iter();
        let most = after.map(|(name, after)| {
            let gaps = after.iter().zip(&before[&name]).map(|(a, b)| (a - b).abs());
            (name, gaps.fold(0f32, f32::max))
        });
        most.collect::<BTreeMap<String, f32>>()
    };
    let plain = moved(&mut stage(&setting, "kd"), None);
    let fast = moved(&mut stage(&setting, "kd"), Some(4e-3));
    for (name, length) in &plain {
        let wanted = if name.contains(".mla.") || name.contains(".mamba.") {
            4.0
        } else {
            1.0
        };
        assert!((length / 1e-3 - 1.0).abs() < 0.05, "{name}: {length}");
        assert!(
            (fast[name] / length - wanted).abs() < 0.05,
            "{name}: {} for {length}",
            fast[name]
        );
    }
    let settings = TrainSettings {
        mixer_lr: Some(1e-3),
        ..config(2)
    };
    let refused = setting.run(
        &mut stage(&setting, "pretrain"),
        &settings,
        &setting.out("none"),
        0,
    );
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("mixer_lr") && message.contains("none is trained"),
        "{message}"
    );
}

/// Gradients that are applied as they appear give the bits of those that wait for each other; a spike is found before any is.
#[test]
fn gradients_are_applied_as_they_appear() {
    let setting = Setting::new();
    for name in NAMES {
        let run = |clip: f64, clip_by: ClipBy| {
            let settings = TrainSettings {
                accumulation: 1,
                clip,
                clip_by,
                ..config(4)
            };
            let out = setting.out(&format!("{name}-{clip}-{clip_by:?}"));
            let mut stage = stage(&setting, name);
            let metrics = setting.run(&mut stage, &settings, &out, 0).unwrap();
            (metrics, weights_in(&out))
        };
        let (waiting, weights) = run(1e9, ClipBy::All);
        for (clip, by) in [(0.0, ClipBy::All), (1e9, ClipBy::Layer)] {
            let (metrics, others) = run(clip, by);
            assert!(weights == others, "{name}, {clip} {by:?}");
            for (a, b) in waiting.iter().zip(&metrics) {
                assert_eq!(a.layer_grad_norm, b.layer_grad_norm);
                assert_eq!(a.grad_norm.len(), b.grad_norm.len());
                for (a, b) in a.grad_norm.iter().zip(&b.grad_norm) {
                    assert!((a / b - 1.0).abs() < 1e-12, "{name}: {a} {b}");
                }
            }
        }
        let (_, clipped) = run(1e-3, ClipBy::Layer);
        assert!(clipped != weights);
        let mut stage = stage(&setting, name);
        let settings = TrainSettings {
            clip_by: ClipBy::Layer,
            ..config(4)
        };
        let batch = stage.data().batch(0, 0, 2, 32).unwrap();
        let update = settings.settle().unwrap().update(0, 4);
        let before = (!name.starts_with("ild")).then(|| tensors(&stage));
        let refused = take_step(&mut stage, &[batch], &update, 1e-9);
        assert!(matches!(refused, Err(Error::Diverged(why)) if why.contains("spike")));
        let begun = stage.at_once().take().expect("a step was begun");
        // ILD's loss is known when its last layer has learned.
        assert_eq!(begun.is_begun(), before.is_none(), "{name}");
        if let Some(before) = before {
            assert_eq!(tensors(&stage), before);
        }
    }
}

/// Layers' norms make up that of all, with those of the weights that stand in none.
#[test]
fn norms_are_recorded_by_layer() {
    let setting = Setting::new();
    for name in NAMES {
        let out = setting.out(name);
        let mut stage = stage(&setting, name);
        let metrics = setting.run(&mut stage, &config(2), &out, 0).unwrap();
        let StepMetrics {
            grad_norm,
            layer_grad_norm,
            ..
        } = &metrics[1];
        let squares = |norms: &[f64]| norms.iter().map(|norm| norm * norm).sum::<f64>();
        let (all, layers) = (squares(grad_norm), squares(layer_grad_norm));
        assert_eq!(layer_grad_norm.len(), 2, "{name}");
        match name {
            "ild" | "ild-joint" | "kd-stepwise" => {
                assert!((layers / all - 1.0).abs() < 0.02, "{name}")
            }
            _ => assert!(layers > 0.0 && layers < 1.01 * all, "{name}"),
        }
    }
}

/// What is trained is what computes: the model that learns, its snapshot and the checkpoint that is written are one.
#[test]
fn the_model_that_learns_is_the_one_that_is_written() {
    let setting = Setting::new();
    let kinds = [LayerKind::Mamba2, LayerKind::MLA];
    let config = KdConfig::default();
    let kd = Kd::new(taught(), &student(kinds), &[], config, &Place::cpu());
    let mut stage = Stage::Kd(Box::new(kd.unwrap()), &setting.corpus);
    let train = TrainSettings {
        lr: 0.05,
        ..self::config(4)
    };
    let out = setting.out("learned");
    setting.run(&mut stage, &train, &out, 0).unwrap();
    let written = Checkpoint::open(&out)
        .unwrap()
        .model(&Place::cpu())
        .unwrap();
    let batch = setting.corpus.batch(3, 0, 2, 32).unwrap();
    let ids = stage::ids(&batch, &Device::Cpu).unwrap();
    let logits = |lm: &Lm| {
        let logits = lm.forward(&ids, Some(&batch.documents)).unwrap();
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(logits(stage.student().unwrap()), logits(&written));
    let Stage::Kd(kd, _) = &stage else {
        unreachable!()
    };
    assert_eq!(logits(&kd.student.lm), logits(&written));
}
