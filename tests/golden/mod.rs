//! Outputs of other implementations: Hugging Face transformers (`llama/`, shipped with its script) and
//! lm-evaluation-harness (`harness/`, likewise) and the reference implementation of the method (shared material).

mod chat;
mod gguf;
mod harness;
mod numerics;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use zebroid::checkpoint::{Checkpoint, Format, Provenance, read_tensors, save};
use zebroid::convert::{CalibrationConfig, Init, PlanOptions, calibrate, compose, plan};
use zebroid::data::{Corpus, Packing};
use zebroid::eval::kl::evaluate;
use zebroid::eval::parity::{max_difference, parity};
use zebroid::generate::score::{Tokens, log_likelihoods};
use zebroid::mixer::mla::rank::RankRule;
use zebroid::mixer::{MixerConfig, MixerOptions};
use zebroid::model::{Lm, Trace};
use zebroid::op::loss::{cross_entropy, forward_kl};
use zebroid::op::rms_norm::rms_norm;
use zebroid::train::stage::ild::{Goal, IldLoss};
use zebroid::watch::Quiet;
use zebroid::weights::Weights;

use crate::shared;
use zebroid::model::{LayerOutput, Parts};
use zebroid::op::linear::Matrix;
use zebroid::weights::Place;

const GOLDENS: [&str; 2] = ["zebra-2mla3m2", "zebra-1mla4m2-repeat"];

fn model(folder: &Path) -> Lm {
    let checkpoint = Checkpoint::open(folder).unwrap();
    checkpoint.model(&Place::cpu()).unwrap()
}

/// Llamas with RoPE plain, linear, llama3 (with its own head_dim) and YaRN, heads tied and untied; the other families.
const TRANSFORMERS: [&str; 9] = [
    "plain", "linear", "llama3", "yarn", "mistral", "qwen2", "qwen3", "smollm3", "granite",
];

#[test]
fn logits_equal_transformers() {
    for name in TRANSFORMERS {
        let folder = Path::new("tests/golden/transformers").join(name);
        let (lm, expected) = (model(&folder), folder.join("expected.safetensors"));
        let report = parity(&lm, &expected).unwrap();
        assert!(report.logits.unwrap() < 1e-4, "{name}: {report:?}");
        // And as it decodes.
        let recorded = read_tensors(&expected).unwrap();
        let ids = recorded["input_ids"].to_dtype(DType::U32).unwrap();
        let ids: Vec<u32> = ids.get(0).unwrap().to_vec1().unwrap();
        let (context, continuation) = ids.split_at(10);
        let request = Tokens {
            context: context.to_vec(),
            continuation: continuation.to_vec(),
            cut: 0,
        };
        let found = log_likelihoods(&lm, &[request], 64, "", &Quiet::default()).unwrap();
        let logits = recorded["logits"].get(0).unwrap().narrow(0, 9, 40).unwrap();
        let targets = Tensor::new(&ids[10..], &Device::Cpu).unwrap();
        let losses: Vec<f32> = cross_entropy(&logits, &targets).unwrap().to_vec1().unwrap();
        let wanted = -losses.into_iter().map(f64::from).sum::<f64>();
        assert!(
            (found[0].0 - wanted).abs() < 1e-3,
            "{name}: {} for {wanted}",
            found[0].0
        );
    }
}

/// Every family becomes a hybrid, as published and refined, is written, read and written again as it was.
#[test]
fn all_families_are_composed_and_written() {
    for name in TRANSFORMERS {
        let folder = Path::new("tests/golden/transformers").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let teacher = checkpoint.parts().unwrap();
        let root = tempfile::tempdir().unwrap();
        let copy = root.path().join("copy");
        save(
            &copy,
            Format::Llama,
            &teacher.config,
            checkpoint.stored().unwrap(),
            None,
            &Provenance::default(),
            false,
        )
        .unwrap();
        let copied = Checkpoint::open(&copy).unwrap();
        assert_eq!(copied.config, teacher.config, "{name}");
        let type_of = |folder: &Path| {
            let config = std::fs::read(folder.join("config.json")).unwrap();
            let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
            config["model_type"].as_str().unwrap().to_owned()
        };
        // What a Mistral says a Llama can say.
        if name != "mistral" {
            assert_eq!(type_of(&copy), type_of(&folder));
        }
        assert!(
            copied.parts().unwrap().hash().unwrap() == teacher.hash().unwrap(),
            "{name}"
        );

        let mla = (0..teacher.config.layers.len()).step_by(3).collect();
        let options = PlanOptions {
            mla,
            ..PlanOptions::default()
        };
        let student = plan(&teacher.config, &options).unwrap();
        let documents: Vec<Vec<u32>> = (0..40)
            .map(|i| (0..33).map(|j| (i * 7 + j * j * 3 + i * j) % 40).collect())
            .collect();
        let corpus = Corpus::new(&documents, Packing::Documents);
        let config = CalibrationConfig {
            tokens: 1024,
            fit_tokens: 1024,
            held_out_tokens: 32,
            seq_len: 32,
        };
        let calibration = calibrate(
            &teacher,
            &Place::cpu(),
            &corpus,
            &config,
            &root.path().join("statistics"),
            &Quiet::default(),
        )
        .unwrap();
        let inits = [
            Init::Published { seed: 1 },
            Init::Refined {
                calibration: &calibration,
                own_inputs: true,
            },
        ];
        let divergences = inits.iter().enumerate().map(|(i, init)| {
            let hybrid = compose(&teacher, &student, init, &Quiet::default()).unwrap();
            let out = root.path().join(format!("hybrid{i}"));
            save(
                &out,
                Format::Zebroid,
                &hybrid.config,
                &hybrid.weights,
                None,
                &Provenance::default(),
                false,
            )
            .unwrap();
            let (theirs, ours) = (teacher.lm(&Place::cpu()).unwrap(), model(&out));
            let report = evaluate(&theirs, &ours, &corpus, 8, 32, &Quiet::default());
            report.unwrap().kl
        });
        let divergences: Vec<f64> = divergences.collect();
        assert!(divergences[1] < divergences[0], "{name}: {divergences:?}");
    }
}

#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn hybrids_equal_the_reference_implementation() {
    let shared = shared();
    for name in GOLDENS {
        let folder = shared.join("golden").join(name);
        let report = parity(&model(&folder), &folder.join("expected.safetensors")).unwrap();
        assert_eq!(report.first_departure(1e-4), None, "{name}: {report:?}");
        assert!(
            report
                .layers
                .iter()
                .all(|l| l.input.is_some() && l.mixer_out.is_some())
        );
    }
}

#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn amd_to_ours_to_amd_is_bit_exact() {
    let shared = shared();
    for name in GOLDENS {
        let folder = shared.join("golden").join(name);
        let out = tempfile::tempdir().unwrap();
        let step = |from: &Path, format: Format, to: &str| -> PathBuf {
            let source = Checkpoint::open(from).unwrap();
            let to = out.path().join(to);
            save(
                &to,
                format,
                &source.config,
                source.stored().unwrap(),
                Some(from),
                &Provenance::default(),
                false,
            )
            .unwrap();
            to
        };
        let ours = step(&folder, Format::Zebroid, "ours");
        let back = step(&ours, Format::Amd, "amd");
        assert_eq!(
            Checkpoint::open(&ours).unwrap().config,
            Checkpoint::open(&folder).unwrap().config
        );
        let json = |folder: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(folder.join("hybrid_config.json")).unwrap())
                .unwrap()
        };
        assert_eq!(json(&back), json(&folder), "{name}");
        let tensors = |folder: &Path| read_tensors(&folder.join("model.safetensors")).unwrap();
        let (before, after) = (tensors(&folder), tensors(&back));
        assert!(before.keys().eq(after.keys()));
        for (name, tensor) in &before {
            let bits = |t: &Tensor| {
                t.flatten_all()
                    .unwrap()
                    .to_vec1::<f32>()
                    .unwrap()
                    .into_iter()
                    .map(f32::to_bits)
            };
            assert!(bits(tensor).eq(bits(&after[name])), "{name}");
        }
    }
}

/// The reference read its teacher in bf16 (its `init.*` tensors are the bf16-rounded weights, its
/// teacher's logits carry bf16's steps), so initialisation starts from rounded weights here too.
struct Initialised {
    expected: BTreeMap<String, Tensor>,
    rounded: Parts,
    student: zebroid::model::ModelConfig,
    weights: Weights,
}

fn initialise(shared: &Path, name: &str) -> Initialised {
    let folder = shared.join("golden").join(name);
    let teacher = Checkpoint::open(&shared.join("teachers/stories260K")).unwrap();
    let bf16 = |w: &Matrix| w.to_tensor()?.to_dtype(DType::BF16)?.to_dtype(DType::F32);
    let weights = teacher.parts().unwrap().weights;
    let rounded = weights
        .iter()
        .map(|(name, w)| (name.to_owned(), bf16(w).unwrap()));
    let rounded = Parts::new(teacher.config.clone(), &rounded.collect::<BTreeMap<_, _>>());
    let golden = Checkpoint::open(&folder).unwrap().config;
    let mla: Vec<usize> = (0..5)
        .filter(|i| golden.layers[*i].name() == "mla")
        .collect();
    let (yarn, repeat) = match name {
        "zebra-2mla3m2" => ((4.0, 128), false),
        _ => ((32.0, 512), true),
    };
    let student = plan(
        &teacher.config,
        &PlanOptions {
            mla,
            sizes: MixerOptions {
                kv_lora_rank: Some(RankRule::Fixed(16)),
                q_lora_rank: Some(RankRule::Fixed(48)),
                yarn: Some(yarn),
                repeat_kv_before_conv: repeat,
                ..MixerOptions::default()
            },
            ..PlanOptions::default()
        },
    )
    .unwrap();
    assert_eq!(student.layers, golden.layers, "the plan is the golden's");
    Initialised {
        expected: read_tensors(&folder.join("init_expected.safetensors")).unwrap(),
        weights: compose(
            &rounded,
            &student,
            &Init::Published { seed: 0 },
            &Quiet::default(),
        )
        .unwrap()
        .weights,
        rounded,
        student,
    }
}

#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn reference_initialisation_equals_the_reference() {
    let shared = shared();
    for name in GOLDENS {
        let init = initialise(&shared, name);
        let theirs = |name: &str| &init.expected[&format!("init.{name}")];
        let close = |a: &Tensor, b: &Tensor, what: &str| {
            let gap = max_difference(a, b).unwrap();
            assert!(gap < 1e-4, "{what}: {gap}");
        };
        for (i, layer) in init.student.layers.iter().enumerate() {
            let at = format!("model.layers.{i}.{}.", layer.prefix());
            let ours = |name: &str| init.weights.get(&format!("{at}{name}")).unwrap();
            let theirs = |name: &str| theirs(&format!("{at}{name}"));
            match layer {
                MixerConfig::Mla(c) => {
                    let (r, rope) = (c.kv_lora_rank, c.qk_rope_head_dim);
                    let product =
                        |of: &dyn Fn(&str) -> Tensor, up: &str, down: &str, rank: usize| {
                            of(up)
                                .matmul(&of(down).narrow(0, 0, rank).unwrap())
                                .unwrap()
                        };
                    for (up, down, rank) in [
                        ("q_b_proj.weight", "q_a_proj.weight", c.q_lora_rank),
                        ("kv_b_proj.weight", "kv_a_proj_with_mqa.weight", r),
                    ] {
                        let a = product(&ours, up, down, rank);
                        let b = product(&|n| theirs(n).clone(), up, down, rank);
                        close(&a, &b, &format!("{at}{up} times {down}"));
                    }
                    // Their mean over heads was rounded to bf16.
                    let key = |t: &Tensor| t.narrow(0, r, rope).unwrap();
                    let down = "kv_a_proj_with_mqa.weight";
                    let mean = key(&ours(down)).to_dtype(DType::BF16).unwrap();
                    close(&mean, &key(theirs(down)), &format!("{at}rotary key"));
                    close(
                        &ours("out_proj.weight"),
                        theirs("out_proj.weight"),
                        &format!("{at}out_proj"),
                    );
                }
                MixerConfig::Mamba2(c) => {
                    let copied = 2 * c.num_kv_heads * c.head_dim + c.num_heads * c.d_state;
                    let rows = |t: &Tensor| t.narrow(0, c.d_inner(), copied).unwrap();
                    let name = "in_proj.weight";
                    close(
                        &rows(&ours(name)),
                        &rows(theirs(name)),
                        &format!("{at}x, B and C"),
                    );
                    close(
                        &ours("out_proj.weight"),
                        theirs("out_proj.weight"),
                        &format!("{at}out_proj"),
                    );
                    // What is drawn at random lies in the reference's ranges.
                    let range = |name: &str, low: f32, high: f32| {
                        for t in [&ours(name), theirs(name)] {
                            let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                            assert!(
                                values.iter().all(|v| (low..=high).contains(v)),
                                "{at}{name}: {values:?}"
                            );
                        }
                    };
                    range("A_log", 0.0, 16f32.ln());
                    range("dt_bias", -9.3, -2.2);
                    range("conv1d.weight", -0.5, 0.5);
                    range("D", 1.0, 1.0);
                }
                _ => unreachable!("goldens have none"),
            }
        }
        for copied in [
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.1.mlp.up_proj.weight",
        ] {
            close(&init.weights.get(copied).unwrap(), theirs(copied), copied);
        }
    }
}

/// Their initialised hybrid, on the teacher's recorded states: both ILD terms of every layer, and the KL.
#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn ild_terms_and_kl_equal_the_reference() {
    let shared = shared();
    for name in GOLDENS {
        let init = initialise(&shared, name);
        let get = |name: &str| init.expected[name].to_dtype(DType::F32).unwrap();
        let weights = init
            .expected
            .iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("init.")?.to_owned(), t.clone())));
        let student = Lm::new(&init.student, &Weights::new(weights.collect())).unwrap();
        let teacher = init.rounded.lm(&Place::cpu()).unwrap();
        let each = |t: Tensor| {
            (0..t.dim(0).unwrap())
                .map(|i| t.get(i).unwrap())
                .collect::<Vec<_>>()
        };
        let trace = Trace {
            hidden: each(get("teacher_hidden_states")),
            mixer_out: each(get("teacher_mixer_out")),
        };
        let relative = |ours: f32, theirs: f32| (ours - theirs).abs() / theirs.abs();
        let (hidden_terms, mixer_terms) = (get("ild_hidden_term"), get("ild_mixer_term"));
        let mixed_on_teacher = get("init_mixer_out_on_teacher_input");
        for (i, layer) in student.layers.iter().enumerate() {
            // The states are bf16, and Hugging Face's norm rounds to its input's dtype before its weight.
            let x = &trace.hidden[i];
            let norm = format!("init.model.layers.{i}.input_layernorm.weight");
            let ones = init.expected[&norm].ones_like().unwrap();
            let unit = rms_norm(x, &ones, init.student.rms_norm_eps).unwrap();
            let unit = unit
                .to_dtype(DType::BF16)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap();
            let input = unit.broadcast_mul(&init.expected[&norm]).unwrap();
            let mixed = layer.mixer.forward(&input, None).unwrap();
            let out = layer.finish(x, &mixed).unwrap();
            // The reference's Mamba2 rounds more of its inside when its input is bf16, its MLA does not.
            let expected = mixed_on_teacher.get(i).unwrap();
            let gap = max_difference(&mixed, &expected).unwrap();
            let size = max_difference(&expected, &expected.zeros_like().unwrap()).unwrap();
            let bound = if student.config.layers[i].name() == "mla" {
                1e-4
            } else {
                1e-2 * size
            };
            assert!(
                gap < bound,
                "{name}, mixer {i} on the teacher's input: {gap}"
            );
            let (hidden, mixer) = Goal::new(&teacher, IldLoss::L2Norm, &trace.hidden[i + 1], i)
                .terms(&LayerOutput { hidden: out, mixed }, &trace.mixer_out[i])
                .unwrap();
            for (ours, theirs) in [(hidden, &hidden_terms), (mixer, &mixer_terms)] {
                let (ours, theirs) = (
                    ours.to_scalar().unwrap(),
                    theirs.get(i).unwrap().to_scalar().unwrap(),
                );
                assert!(
                    relative(ours, theirs) < 1e-3,
                    "{name}, layer {i}: {ours} for {theirs}"
                );
            }
        }
        let ids = init.expected["input_ids"].to_dtype(DType::U32).unwrap();
        let logits = student.forward(&ids, None).unwrap();
        let gap = max_difference(&logits, &get("init_logits")).unwrap();
        assert!(
            gap < 1e-3,
            "{name}: logits at initialisation differ by {gap}"
        );
        let rows = |t: &Tensor| t.squeeze(0).unwrap();
        let kl = forward_kl(&rows(&get("teacher_logits")), &rows(&logits), 1.0).unwrap();
        let kl = kl.mean_all().unwrap().to_scalar::<f32>().unwrap();
        let theirs = get("kl_per_token")
            .get(0)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(relative(kl, theirs) < 1e-3, "{name}: KL {kl} for {theirs}");
    }
}

/// The recorded teacher ran in bf16: ours, in f32, agrees as far as bf16 can say.
#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn teacher_logits_agree_with_the_bf16_recording() {
    let shared = shared();
    for name in GOLDENS {
        let init = initialise(&shared, name);
        let recorded = init.expected["teacher_logits"]
            .to_dtype(DType::F32)
            .unwrap();
        let steps = recorded
            .to_dtype(DType::BF16)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        assert_eq!(
            max_difference(&recorded, &steps).unwrap(),
            0.0,
            "the recording is bf16"
        );
        let ids = init.expected["input_ids"].to_dtype(DType::U32).unwrap();
        let teacher = init.rounded.lm(&Place::cpu()).unwrap();
        let logits = teacher.forward(&ids, None).unwrap();
        let rows = |t: &Tensor| t.squeeze(0).unwrap();
        let kl = forward_kl(&rows(&logits), &rows(&recorded), 1.0)
            .unwrap()
            .mean_all()
            .unwrap();
        assert!(kl.to_scalar::<f32>().unwrap() < 2e-3, "{name}: {kl}");
    }
}

#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn stories260k_tells_its_story() {
    let shared = shared();
    let folder = shared.join("teachers/stories260K");
    let tokenizer = zebroid::data::Tokenizer::open(&folder).unwrap();
    let engine = zebroid::generate::Engine::new(&model(&folder), tokenizer).unwrap();
    let params = zebroid::generate::SamplingParams {
        max_tokens: Some(60),
        ..Default::default()
    };
    let mut streamed = String::new();
    let generation = engine.generate(&[""], 1, &params, &mut |_, piece| {
        streamed += piece;
        true
    });
    assert_eq!(generation.unwrap()[0][0].text, streamed);
    let beginning = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
                     One day, she saw a big, red ball.";
    assert!(streamed.starts_with(beginning), "{streamed}");
}

/// Whole and piece by piece.
#[test]
#[cfg_attr(not(shared), ignore = "no reference material: set ZEBROID_SHARED")]
fn stories260k_texts_survive_its_tokenizer() {
    const TEXT: &str = "Once upon a time, there was a café.\nZoë ate 3 jalapeños 🌶 — “hot”!";
    let tokenizer = zebroid::data::Tokenizer::open(&shared().join("teachers/stories260K")).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), &[2][..]));
    assert_eq!(tokenizer.vocab_size(), 512);
    let ids = tokenizer.encode(TEXT).unwrap();
    assert_eq!(ids[0], 1);
    assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
    let mut stream = tokenizer.decode_stream(&[]);
    let mut text: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    text += &stream.finish().unwrap();
    assert_eq!(text, TEXT);
}
