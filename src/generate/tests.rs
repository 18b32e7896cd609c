use std::path::Path;

use super::*;
use crate::checkpoint::Checkpoint;
use crate::convert::{Init, PlanOptions, compose, plan};
use crate::watch::Quiet;
use crate::weights::Place;

/// The embedded teacher, and an untrained hybrid of all kinds of layer.
fn engines() -> [Engine; 2] {
    let folder = Path::new("assets/teacher");
    let teacher = Checkpoint::open(folder).unwrap().parts().unwrap();
    let kinds = ["mla:16", "mamba2", "window:8:2", "attention"];
    let kinds = kinds.map(|kind| kind.parse().unwrap()).to_vec();
    let student = plan(&teacher.config, &PlanOptions::default().with_layers(kinds)).unwrap();
    let init = Init::Published { seed: 1 };
    let hybrid = compose(&teacher, &student, &init, &Quiet::default()).unwrap();
    let tokenizer = Tokenizer::open(folder).unwrap();
    [teacher, hybrid]
        .map(|parts| Engine::new(&parts.lm(&Place::cpu()).unwrap(), tokenizer.clone()).unwrap())
}

const PROMPTS: [&str; 3] = [
    "Tom",
    "One day Tom and Mia walked to the park. Tom had a red ball and Mia had a",
    "Mia had a blue kite.",
];

#[test]
fn texts_do_not_depend_on_what_they_are_continued_beside() {
    for engine in engines() {
        for temperature in [0.0, 0.9] {
            let params = |index: usize| SamplingParams {
                temperature,
                max_tokens: Some(12 + 7 * index),
                seed: 5,
                ..SamplingParams::default()
            };
            let together = engine
                .generate(&PROMPTS, &params(0), &mut |_, _| true)
                .unwrap();
            for (i, prompt) in PROMPTS.iter().enumerate() {
                let own = SamplingParams {
                    seed: 5 + i as u64,
                    ..params(0)
                };
                let alone = engine.generate(&[prompt], &own, &mut |_, _| true).unwrap();
                assert_eq!(together[i].text, alone[0].text, "{prompt} at {temperature}");
                assert_eq!(together[i].prompt_tokens, alone[0].prompt_tokens);
            }
        }
    }
}

#[test]
fn a_sequence_that_ends_leaves_the_others_alone() {
    let [engine, _] = engines();
    let params = SamplingParams {
        max_tokens: Some(20),
        ..SamplingParams::default()
    };
    let whole = engine
        .generate(&PROMPTS, &params, &mut |_, _| true)
        .unwrap();
    let mut pieces = vec![String::new(); 3];
    let cut = engine
        .generate(&PROMPTS, &params, &mut |i, piece| {
            pieces[i].push_str(piece);
            i != 1
        })
        .unwrap();
    assert!(cut[1].completion_tokens < whole[1].completion_tokens);
    for i in 0..3 {
        assert_eq!(pieces[i], cut[i].text);
        assert!(whole[i].text.starts_with(&cut[i].text));
        assert_eq!(i == 1, cut[i].text.len() < whole[i].text.len());
    }
    let nothing = SamplingParams {
        max_tokens: Some(0),
        ..params
    };
    let none = engine
        .generate(&PROMPTS[..1], &nothing, &mut |_, _| true)
        .unwrap();
    assert_eq!((none[0].completion_tokens, none[0].text.as_str()), (0, ""));
}
