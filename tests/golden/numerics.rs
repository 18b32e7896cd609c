//! What the program computes, against what it computed when `assets/numerics.json` was recorded. The record is part of
//! every key of a kept result (`src/numerics.rs`): code that changes results cannot pass here without changing keys.
//!
//! To record: `ZEBROID_RECORD=numerics cargo test --release numerics`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use zebroid::checkpoint::{self, Checkpoint, Format, Provenance};
use zebroid::convert::{Calibration, CalibrationConfig, Init, PlanOptions, calibrate};
use zebroid::data::{Corpus, Lengths, Packing, Preferences, Tokenizer, stories};
use zebroid::eval::harness::run_task;
use zebroid::eval::sensitivity::sensitivity;
use zebroid::eval::{kl, task};
use zebroid::mixer::mla::rank::RankRule;
use zebroid::mixer::{LayerKind, MixerOptions};
use zebroid::model::Lm;
use zebroid::numerics::Stage as Name;
use zebroid::op::isa::{self, Isa, Level};
use zebroid::op::loss::Divergence;
use zebroid::pipeline::Base;
use zebroid::pipeline::stage::ild::IldStage;
use zebroid::pipeline::stage::kd::KdStage;
use zebroid::train::optimizer::GaloreConfig;
use zebroid::train::stage::dpo::{Dpo, DpoConfig, DpoLoss};
use zebroid::train::stage::ild::{IldConfig, IldInputs, IldLoss};
use zebroid::train::stage::kd::{KdConfig, Labels, Schedule, Trained};
use zebroid::train::stage::pretrain::{Pretrain, fresh};
use zebroid::train::{
    LrScheduler, OptimizerName, RunOptions, Sources, Stage, TrainSettings, train,
};
use zebroid::watch::Quiet;
use zebroid::weights::Place;

use super::harness;

const RECORD: &str = "assets/numerics.json";
const TEACHER: &str = "assets/teacher";

/// Of one stage, by name.
type Figures = BTreeMap<String, f64>;
type Record = BTreeMap<String, Figures>;

/// How far other machines and numbers of threads may be away.
fn equal(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-3 * b.abs().max(0.01)
}

/// In f32: what tiles leave of a factor, 17 bits, AdamW's first steps carry to the third digit of a gradient.
#[test]
fn numerics_are_as_recorded() {
    if Isa::here().level() == Level::Amx {
        let mut tests = std::process::Command::new(std::env::current_exe().unwrap());
        tests.args(["--exact", "golden::numerics::numerics_are_as_recorded"]);
        let output = tests.env(isa::VARIABLE, "avx512").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let text = std::fs::read_to_string(RECORD).unwrap();
    let recorded: Record = serde_json::from_str(&text).unwrap();
    let found = Bench::new().all();
    let known = |stage: &str, name: &str| recorded.get(stage).and_then(|f| f.get(name)).copied();
    let mut moved = Vec::new();
    let mut next = Record::new();
    for (stage, figures) in &found {
        for (name, value) in figures {
            let before = known(stage, name);
            let value = match before.filter(|before| equal(*value, *before)) {
                Some(before) => before,
                None => {
                    moved.push(format!("{stage}, {name}: {value}, was {before:?}"));
                    format!("{value:.5e}").parse().unwrap()
                }
            };
            next.entry(stage.clone())
                .or_default()
                .insert(name.clone(), value);
        }
    }
    for (stage, figures) in &recorded {
        let gone = figures
            .keys()
            .filter(|name| !found.get(stage).is_some_and(|f| f.contains_key(*name)));
        moved.extend(gone.map(|name| format!("{stage}, {name}: is not measured any more")));
    }
    if std::env::var("ZEBROID_RECORD").is_ok_and(|what| what == "numerics") {
        std::fs::write(RECORD, serde_json::to_string_pretty(&next).unwrap() + "\n").unwrap();
        return;
    }
    assert!(
        moved.is_empty(),
        "figures moved, so what earlier programs kept is not what this one makes:\n  {}\nIf that is meant, record \
         them (the keys of kept results move with the record) and commit {RECORD}:\n  \
         ZEBROID_RECORD=numerics cargo test --release numerics",
        moved.join("\n  ")
    );
    let names: Vec<&str> = recorded.keys().map(String::as_str).collect();
    let mut stages = Name::ALL.map(Name::name);
    stages.sort();
    assert_eq!(names, stages);
}

/// Results are kept by keys (`Key`), which are of what the program computes, not of its version.
#[test]
fn keys_are_of_what_is_computed() {
    let source = std::fs::read_to_string("src/checkpoint/store.rs").unwrap();
    assert!(source.contains("numerics::version("));
    assert!(!source.contains("CARGO_PKG_VERSION"));
}

/// The embedded teacher, a few stories, and where things are kept.
struct Bench {
    base: Base,
    text: Corpus,
    /// A little of it.
    short: Corpus,
    folder: tempfile::TempDir,
}

fn plan() -> PlanOptions {
    PlanOptions {
        mla: vec![1, 2],
        sizes: MixerOptions {
            kv_lora_rank: Some(RankRule::Fixed(16)),
            q_lora_rank: Some(RankRule::Fixed(64)),
            qk_rope_head_dim: Some(8),
            ..MixerOptions::default()
        },
        ..PlanOptions::default()
    }
}

/// [`plan`] with other sizes.
fn plan_with(change: impl FnOnce(&mut MixerOptions)) -> PlanOptions {
    let mut options = plan();
    change(&mut options.sizes);
    options
}

fn settings() -> TrainSettings {
    TrainSettings {
        steps: Some(4),
        batch_size: 2,
        seq_len: 64,
        lr: 3e-3,
        ..TrainSettings::default()
    }
}

/// How the command line writes it.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().unwrap().get_name().to_owned()
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::open(Path::new(TEACHER)).unwrap();
        let load = |seed: u64, count: usize| {
            let path = folder.path().join("text.jsonl");
            stories::write_jsonl(&path, seed, count).unwrap();
            Corpus::load(&path, &tokenizer, Packing::Documents).unwrap()
        };
        Self {
            base: Base::open(Path::new(TEACHER), Place::cpu()).unwrap(),
            text: load(7, 60),
            short: load(8, 6),
            folder,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn all(&self) -> Record {
        let config = CalibrationConfig {
            tokens: 2048,
            fit_tokens: 1024,
            held_out_tokens: 512,
            seq_len: 64,
        };
        let (parts, place, quiet) = (&self.base.parts, &self.base.place, Quiet::default());
        let folder = self.folder.path();
        let calibration = calibrate(parts, place, &self.text, &config, folder, &quiet).unwrap();
        let stages = [
            (Name::Calibration, calibrated(&calibration)),
            (Name::Init, self.init(&calibration)),
            (Name::Ild, self.ild()),
            (Name::Kd, self.kd()),
            (Name::Dpo, self.dpo()),
            (Name::Pretrain, self.pretrain()),
            (Name::Scores, self.scores()),
            (Name::Kl, self.kl()),
            (Name::Harness, self.harness()),
        ];
        stages
            .map(|(name, figures)| (name.name().to_owned(), figures))
            .into()
    }

    /// An untrained hybrid, as published.
    fn published(&self, options: &PlanOptions) -> (Lm, PathBuf) {
        let init = Init::Published { seed: 1 };
        let student = self.base.plan(options, &init).unwrap();
        let composed = self
            .base
            .compose(&student, &init, &Quiet::default())
            .unwrap();
        let path = self.at("hybrid");
        let _ = std::fs::remove_dir_all(&path);
        let (config, weights) = (&composed.config, &composed.weights);
        let teacher = Some(Path::new(TEACHER));
        let record = Provenance::default();
        checkpoint::save(
            &path,
            Format::Zebroid,
            config,
            weights,
            teacher,
            &record,
            false,
        )
        .unwrap();
        (composed.lm(&Place::cpu()).unwrap(), path)
    }

    fn untrained_kl(&self, options: &PlanOptions, init: &Init) -> f64 {
        let student = self.base.plan(options, init).unwrap();
        let composed = self
            .base
            .compose(&student, init, &Quiet::default())
            .unwrap();
        let lm = composed.lm(&Place::cpu()).unwrap();
        let teacher = self.base.lm().unwrap();
        kl::evaluate(&teacher, &lm, &self.short, 8, 64, &Quiet::default())
            .unwrap()
            .kl
    }

    fn init(&self, calibration: &Calibration) -> Figures {
        let refined = |own_inputs| Init::Refined {
            calibration,
            own_inputs,
        };
        let special = plan_with(|sizes| {
            sizes.use_lora_layer_norm = true;
            sizes.use_full_kv_head = true;
            sizes.repeat_kv_before_conv = true;
            sizes.yarn = Some((4.0, 128));
        });
        let mut figures = Figures::new();
        for (options, sizes) in [(plan(), ""), (special, ", special sizes")] {
            for (init, name) in [
                (refined(true), "refined"),
                (refined(false), "refined for a bank"),
                (Init::Published { seed: 1 }, "reference"),
            ] {
                let kl = self.untrained_kl(&options, &init);
                figures.insert(format!("{name}{sizes}: KL"), kl);
            }
        }
        for rule in ["energy:0.9", "budget:5%"] {
            let options = plan_with(|sizes| sizes.kv_lora_rank = Some(rule.parse().unwrap()));
            let student = self.base.plan(&options, &refined(true)).unwrap();
            let cached = student.cost(1).cached;
            figures.insert(format!("{rule}: scalars a token"), cached as f64);
        }
        figures
    }

    /// Loss and gradient of the last step.
    fn trained(&self, figures: &mut Figures, what: &str, stage: Stage, config: &TrainSettings) {
        let mut stage = stage;
        let options = RunOptions {
            out: self.at("trained"),
            tokenizer: TEACHER.into(),
            sources: Sources::default(),
            force: true,
            save_every: 100,
            keep_last: 1,
            stop: &|| false,
            validation: None,
            observe: &mut |_, _| {},
        };
        let _ = std::fs::remove_dir_all(self.at("trained"));
        let metrics = train(&mut stage, &config.settle().unwrap(), options).unwrap();
        let last = metrics.last().unwrap();
        figures.insert(format!("{what}: loss"), last.loss);
        figures.insert(format!("{what}: gradient"), last.grad_norm.iter().sum());
    }

    fn ild(&self) -> Figures {
        let mut figures = Figures::new();
        let (_, hybrid) = self.published(&plan());
        let hybrid = vec![(None, Checkpoint::open(&hybrid).unwrap().parts().unwrap())];
        for loss in IldLoss::value_variants() {
            for inputs in IldInputs::value_variants() {
                let config = IldConfig {
                    loss: *loss,
                    inputs: *inputs,
                };
                let what = format!("{}, inputs {}", name(*loss), name(*inputs));
                let ild = IldStage {
                    objective: config,
                    ..IldStage::default()
                };
                let stage = ild.align(&self.base, &hybrid, None, &self.text).unwrap();
                self.trained(&mut figures, &what, stage, &settings());
            }
        }
        let init = Init::Published { seed: 1 };
        let (ild, quiet) = (IldStage::default(), Quiet::default());
        let bank = ild.bank(&self.base, &plan(), &init, &quiet).unwrap();
        let stage = ild.align(&self.base, &bank, None, &self.text).unwrap();
        self.trained(&mut figures, "bank", stage, &settings());
        figures
    }

    fn kd(&self) -> Figures {
        let mut figures = Figures::new();
        let (_, hybrid) = self.published(&plan());
        let hybrid = Checkpoint::open(&hybrid).unwrap();
        let mut run = |what: &str, kd: KdConfig, config: &TrainSettings| {
            let kd = KdStage {
                objective: kd,
                ..KdStage::default()
            };
            let stage = kd.distil(&self.base, &hybrid, &[], &self.text).unwrap();
            self.trained(&mut figures, what, stage, config);
        };
        for divergence in Divergence::value_variants() {
            let kd = KdConfig {
                divergence: *divergence,
                temperature: 2.0,
                mask_prompts: true,
                ..KdConfig::default()
            };
            run(&name(*divergence), kd, &settings());
        }
        for labels in Labels::value_variants() {
            let kd = KdConfig {
                top_k: Some(8),
                ce_weight: 0.5,
                labels: *labels,
                ..KdConfig::default()
            };
            run(&format!("top k, labels {}", name(*labels)), kd, &settings());
        }
        let stepwise = KdConfig {
            schedule: Schedule::Stepwise,
            trained: Trained::Mixers,
            ..KdConfig::default()
        };
        run(
            "stepwise",
            stepwise,
            &TrainSettings {
                steps: Some(8),
                ..settings()
            },
        );
        for optimizer in OptimizerName::value_variants() {
            for scheduler in LrScheduler::value_variants() {
                let config = TrainSettings {
                    optimizer: *optimizer,
                    lr_scheduler: *scheduler,
                    accumulation: 2,
                    warmup: 0.5,
                    weight_decay: 0.1,
                    // Below the teacher's width.
                    galore: match optimizer {
                        OptimizerName::Galore | OptimizerName::Galore8bit => GaloreConfig {
                            rank: 16,
                            interval: 2,
                            ..GaloreConfig::default()
                        },
                        _ => GaloreConfig::default(),
                    },
                    ..settings()
                };
                let what = format!("{}, {}", name(*optimizer), name(*scheduler));
                run(&what, KdConfig::default(), &config);
            }
        }
        figures
    }

    fn dpo(&self) -> Figures {
        let mut figures = Figures::new();
        let (_, hybrid) = self.published(&plan());
        let hybrid = Checkpoint::open(&hybrid).unwrap();
        let parts = hybrid.parts().unwrap();
        let path = self.at("pairs.jsonl");
        std::fs::write(&path, stories::preferences_to_jsonl(9, 12)).unwrap();
        let lengths = Lengths {
            max_prompt: 48,
            max_length: 64,
        };
        let pairs = Preferences::load(&path, &self.base.tokenizer, lengths).unwrap();
        for loss in DpoLoss::value_variants() {
            let config = DpoConfig {
                loss: *loss,
                beta: 0.1,
                ..DpoConfig::default()
            };
            let stored = self.at("reference.safetensors");
            let place = Place::cpu();
            let dpo = Dpo::new(&parts, &pairs, config, &stored, &place, &Quiet::default());
            let stage = Stage::Dpo(dpo.unwrap(), &pairs);
            let config = TrainSettings {
                lr: 1e-4,
                ..settings()
            };
            self.trained(&mut figures, &name(*loss), stage, &config);
        }
        figures
    }

    fn pretrain(&self) -> Figures {
        let mut figures = Figures::new();
        let parts = fresh(self.base.config(), 1).unwrap();
        let stage = Pretrain::new(&parts, &Place::cpu()).unwrap();
        self.trained(
            &mut figures,
            "fresh",
            Stage::Pretrain(stage, &self.text),
            &settings(),
        );
        figures
    }

    fn scores(&self) -> Figures {
        let model = |kind| self.published(&plan().with_layers(vec![kind; 4])).0;
        let (mamba2, mla) = (model(LayerKind::Mamba2), model(LayerKind::MLA));
        let teacher = self.base.lm().unwrap();
        let found = sensitivity(
            &teacher,
            &mamba2,
            &mla,
            &self.short,
            4,
            64,
            &Quiet::default(),
        )
        .unwrap();
        let layers = found.layers.iter().enumerate();
        let mut figures: Figures = layers
            .map(|(i, s)| (format!("layer {i}"), s.score))
            .collect();
        figures.insert("KL".into(), found.kl);
        figures
    }

    fn kl(&self) -> Figures {
        let (student, _) = self.published(&plan());
        let teacher = self.base.lm().unwrap();
        let found =
            kl::evaluate(&teacher, &student, &self.short, 8, 64, &Quiet::default()).unwrap();
        let figures = [
            ("KL", found.kl),
            ("cross-entropy of the teacher", found.ce_teacher),
            ("cross-entropy of the student", found.ce_student),
        ];
        figures.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// Of every task the log-likelihoods that its requests get together.
    fn harness(&self) -> Figures {
        let text = std::fs::read_to_string(format!("{}/recorded/embedded.json", harness::FOLDER));
        let recorded: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(&text.unwrap()).unwrap();
        let lm = self.base.lm().unwrap();
        let data = Path::new(harness::FOLDER).join("data");
        let length = lm.config.max_position_embeddings;
        let config = harness::config(&data, Some(2), &self.at("harness"), length);
        let mut figures = Figures::new();
        for (name, shots) in harness::recorded_tasks(&recorded) {
            let (task, tokenizer) = (task::find(name).unwrap(), &self.base.tokenizer);
            let found = run_task(&lm, tokenizer, task, shots, &config, &Quiet::default()).unwrap();
            let samples = found.parts.iter().flat_map(|p| &p.samples);
            let sum = samples.flat_map(|s| &s.found).map(|(sum, _)| sum).sum();
            figures.insert(format!("{name}, {shots} examples"), sum);
        }
        figures
    }
}

fn calibrated(calibration: &Calibration) -> Figures {
    let mut figures = Figures::new();
    for (i, layer) in calibration.layers.iter().enumerate() {
        let d = layer.input_mean.len();
        let input: f64 = (0..d).map(|n| layer.input_moment[(n, n)]).sum();
        let sum = |m: &faer::Mat<f64>| -> f64 {
            (0..m.nrows())
                .flat_map(|r| (0..m.ncols()).map(move |c| m[(r, c)]))
                .sum()
        };
        for (name, value) in [
            ("input", input),
            ("output", layer.output_square.iter().sum()),
            ("queries", sum(&layer.query_energy)),
            ("keys", sum(&layer.key_energy)),
        ] {
            figures.insert(format!("layer {i}, {name}"), value);
        }
    }
    figures
}
