use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::checkpoint::Checkpoint;
use crate::convert::{Init, PlanOptions, compose, plan};
use crate::data::chat::Message;
use crate::watch::Quiet;
use crate::weights::Place;

/// The embedded teacher, and an untrained hybrid of all kinds of layer.
pub(super) fn models() -> [Lm; 2] {
    let folder = Path::new("assets/teacher");
    let teacher = Checkpoint::open(folder).unwrap().parts().unwrap();
    let kinds = ["mla:16", "mamba2", "window:8:2", "attention"];
    let kinds = kinds.map(|kind| kind.parse().unwrap()).to_vec();
    let student = plan(&teacher.config, &PlanOptions::default().with_layers(kinds)).unwrap();
    let init = Init::Published { seed: 1 };
    let hybrid = compose(&teacher, &student, &init, &Quiet::default()).unwrap();
    [teacher, hybrid].map(|parts| parts.lm(&Place::cpu()).unwrap())
}

pub(super) fn engine(lm: &Lm, change: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions::default();
    change(&mut options);
    let tokenizer = Tokenizer::open(Path::new("assets/teacher")).unwrap();
    Engine::with(lm, tokenizer, options).unwrap()
}

fn engines() -> [Engine; 2] {
    models().map(|lm| engine(&lm, |_| ()))
}

pub(super) fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

/// All requests to their end; what they remember goes.
pub(super) fn ended(scheduler: &mut Scheduler) -> BTreeMap<u64, Generation> {
    let mut found = BTreeMap::new();
    while !scheduler.is_idle() {
        for event in scheduler.step().unwrap() {
            if let Event::Done { id, finish } = event {
                found.insert(id, finish.generation);
            }
        }
    }
    found
}

/// All requests to their end.
fn drain(scheduler: &mut Scheduler) -> BTreeMap<u64, Finish> {
    let mut found = BTreeMap::new();
    while !scheduler.is_idle() {
        for event in scheduler.step().unwrap() {
            if let Event::Done { id, finish } = event {
                found.insert(id, *finish);
            }
        }
    }
    found
}

pub(super) const PROMPTS: [&str; 3] = [
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
                .generate(&PROMPTS, 1, &params(0), &mut |_, _| true)
                .unwrap();
            for (i, prompt) in PROMPTS.iter().enumerate() {
                let own = SamplingParams {
                    seed: 5 + i as u64,
                    ..params(0)
                };
                let alone = engine
                    .generate(&[prompt], 1, &own, &mut |_, _| true)
                    .unwrap();
                assert_eq!(
                    together[i][0].text, alone[0][0].text,
                    "{prompt} at {temperature}"
                );
                assert_eq!(together[i][0].prompt_tokens, alone[0][0].prompt_tokens);
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
        .generate(&PROMPTS, 1, &params, &mut |_, _| true)
        .unwrap();
    let mut pieces = vec![String::new(); 3];
    let cut = engine
        .generate(&PROMPTS, 1, &params, &mut |i, piece| {
            pieces[i].push_str(piece);
            i != 1
        })
        .unwrap();
    assert!(cut[1][0].completion_tokens < whole[1][0].completion_tokens);
    for i in 0..3 {
        assert_eq!(pieces[i], cut[i][0].text);
        assert!(whole[i][0].text.starts_with(&cut[i][0].text));
        assert_eq!(i == 1, cut[i][0].text.len() < whole[i][0].text.len());
    }
    let nothing = SamplingParams {
        max_tokens: Some(0),
        ..params
    };
    let none = engine
        .generate(&PROMPTS[..1], 1, &nothing, &mut |_, _| true)
        .unwrap();
    assert_eq!(
        (none[0][0].completion_tokens, none[0][0].text.as_str()),
        (0, "")
    );
}

/// The law of the engine: a text does not depend on how its prompt was cut, on what was read beside it, before it, or twice.
#[test]
fn greedy_texts_do_not_depend_on_chunks_batches_prefixes_or_room() {
    let long = PROMPTS[1].repeat(6);
    let prompts = [PROMPTS[0], &long, PROMPTS[2], PROMPTS[1]];
    for lm in models() {
        let plain = engine(&lm, |_| ());
        let alone = prompts.map(|prompt| {
            let found = plain.generate(&[prompt], 1, &greedy(40), &mut |_, _| true);
            found.unwrap()[0][0].text.clone()
        });
        let one = plain.pool.bytes(plain.prompt(&long).unwrap().len() + 41);
        for (chunk, batch, prefix, memory) in [
            (512, 64, false, None),
            (7, 64, false, None),
            (33, 2, true, None),
            (512, 64, true, None),
            // Room for little more than the longest: the others are let go of and read again.
            (64, 64, true, Some(one + one / 3)),
        ] {
            let engine = engine(&lm, |options| {
                options.prefill_chunk = chunk;
                options.max_batch = batch;
                options.prefix_cache = prefix;
                options.cache_memory = memory;
            });
            let mut scheduler = Scheduler::new(&engine);
            for round in 0..2 {
                for (i, prompt) in prompts.iter().enumerate() {
                    let prompt = engine.prompt(prompt).unwrap();
                    scheduler
                        .submit(Request::new(i as u64, prompt, greedy(40)))
                        .unwrap();
                }
                let found = ended(&mut scheduler);
                for (i, text) in alone.iter().enumerate() {
                    let generation = &found[&(i as u64)];
                    assert_eq!(
                        &generation.text, text,
                        "{chunk} {batch} {prefix} {memory:?} {round}"
                    );
                    // The second time what was read serves, a hybrid's too.
                    if prefix && memory.is_none() && round == 1 && i == 1 {
                        assert!(
                            generation.cached_tokens >= 64,
                            "{}",
                            generation.cached_tokens
                        );
                    }
                }
            }
            let statistics = scheduler.statistics();
            assert_eq!(statistics.preempted > 0, memory.is_some(), "{statistics:?}");
            let roomy = prefix && memory.is_none();
            assert!(statistics.prefix.hits > 0 || !roomy, "{statistics:?}");
            drop(scheduler);
            assert_eq!(engine.pool.used(), 0);
        }
    }
}

#[test]
fn several_answers_to_a_prompt_are_those_of_their_seeds() {
    for engine in engines() {
        let params = SamplingParams {
            temperature: 1.0,
            seed: 3,
            ..greedy(15)
        };
        let together = engine
            .generate(&PROMPTS[..2], 3, &params, &mut |_, _| true)
            .unwrap();
        for (i, found) in together.iter().flatten().enumerate() {
            let own = SamplingParams {
                seed: 3 + i as u64,
                ..params.clone()
            };
            let alone = engine
                .generate(&[PROMPTS[i / 3]], 1, &own, &mut |_, _| true)
                .unwrap();
            assert_eq!(found.text, alone[0][0].text, "answer {i}");
        }
        let nothing = engine
            .generate(&PROMPTS[..2], 3, &greedy(0), &mut |_, _| true)
            .unwrap();
        assert_eq!(nothing.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3]);
    }
}

#[test]
fn a_stop_text_ends_the_answer_and_is_never_shown() {
    let [engine, _] = engines();
    let whole = engine
        .generate(&PROMPTS[1..2], 1, &greedy(40), &mut |_, _| true)
        .unwrap();
    let whole = &whole[0][0].text;
    let stop: String = whole.chars().skip(20).take(6).collect();
    let end = whole.find(&stop).unwrap();
    let params = SamplingParams {
        stop: vec!["never said".into(), stop],
        logprobs: Some(1),
        ..greedy(40)
    };
    let mut shown = String::new();
    let found = engine.generate(&PROMPTS[1..2], 1, &params, &mut |_, piece| {
        shown += piece;
        true
    });
    let found = &found.unwrap()[0][0];
    assert_eq!(
        (found.text.as_str(), found.finish_reason),
        (&whole[..end], "stop")
    );
    assert_eq!(shown, found.text);
    assert_eq!(found.logprobs.len(), found.completion_tokens);
    assert!(
        found
            .logprobs
            .iter()
            .all(|l| l.top[0] == (l.token, l.logprob))
    );
}

#[test]
fn a_cancelled_request_frees_all_it_had_at_once() {
    let [engine, _] = engines();
    let mut scheduler = Scheduler::new(&engine);
    for id in 0..2 {
        let prompt = engine.prompt(PROMPTS[1]).unwrap();
        scheduler
            .submit(Request::new(id, prompt, greedy(30)))
            .unwrap();
    }
    for _ in 0..4 {
        scheduler.step().unwrap();
    }
    let used = engine.pool.used();
    scheduler.cancel(1);
    assert_eq!(engine.pool.used(), used / 2);
    let found = drain(&mut scheduler);
    assert_eq!(found[&1].generation.finish_reason, "cancelled");
    assert_eq!(found[&0].generation.completion_tokens, 30);
}

#[test]
fn what_there_is_no_room_for_is_said() {
    let [lm, _] = models();
    let engine = engine(&lm, |options| options.cache_memory = Some(80_000));
    let said = engine
        .generate(&PROMPTS[..1], 1, &greedy(400), &mut |_, _| true)
        .unwrap_err();
    assert!(said.to_string().contains("--cache-memory"), "{said}");
    let tokenizer = Tokenizer::open(Path::new("assets/teacher")).unwrap();
    let options = EngineOptions {
        cache_memory: Some(10),
        ..EngineOptions::default()
    };
    let said = Engine::with(&lm, tokenizer, options).err().unwrap();
    assert!(said.to_string().contains("too small"), "{said}");
}

#[test]
fn a_session_goes_on_where_it_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    for lm in models() {
        let path = folder.path().join("talk");
        let first = engine(&lm, |_| ());
        let whole = first
            .generate(&PROMPTS[1..2], 1, &greedy(30), &mut |_, _| true)
            .unwrap();
        let mut scheduler = Scheduler::new(&first);
        let prompt = first.prompt(PROMPTS[1]).unwrap();
        scheduler
            .submit(Request::new(0, prompt, greedy(12)))
            .unwrap();
        let finish = drain(&mut scheduler).remove(&0).unwrap();
        let beginning = finish.generation.text.clone();
        let session = Session {
            messages: vec![Message {
                role: "user".into(),
                content: "Hi".into(),
            }],
            text: "Hi".into(),
            tokens: finish.tokens,
            memory: finish.memory,
        };
        session.save(&first, &path).unwrap();
        let second = engine(&lm, |_| ());
        let opened = Session::open(&second, &path).unwrap();
        assert_eq!(opened.messages, session.messages);
        assert!(opened.memory.len() + 1 == opened.tokens.len());
        let mut scheduler = Scheduler::new(&second);
        scheduler
            .submit(Request {
                memory: Some(opened.memory),
                ..Request::new(0, opened.tokens, greedy(18))
            })
            .unwrap();
        let rest = drain(&mut scheduler).remove(&0).unwrap().generation;
        assert_eq!(beginning + &rest.text, whole[0][0].text);
        assert!(rest.cached_tokens > 12);
        // Where what others began with has filled the cache, it makes room.
        let stored = StoredSession::open(&first, &path).unwrap();
        let room = first.pool.bytes(32) * 3 + first.pool.bytes(64) + first.pool.bytes(0);
        let full = engine(&lm, |options| {
            options.prefix_cache = true;
            options.cache_memory = Some(room);
        });
        let mut scheduler = Scheduler::new(&full);
        for i in 0..12 {
            let prompt = full.prompt(&format!("{i} {}", PROMPTS[0])).unwrap();
            scheduler
                .submit(Request::new(i, prompt, greedy(2)))
                .unwrap();
            ended(&mut scheduler);
        }
        assert!(full.pool.limit() - full.pool.used() < full.pool.bytes(stored.read));
        scheduler
            .submit(Request {
                stored: Some((stored.read, stored.bytes)),
                ..Request::new(0, stored.tokens, greedy(18))
            })
            .unwrap();
        let again = drain(&mut scheduler).remove(&0).unwrap().generation;
        assert_eq!((again.text, again.cached_tokens), (rest.text, stored.read));
        // What is no session of this model says so.
        let bytes = std::fs::read(&path).unwrap();
        let [teacher, hybrid] = models();
        let other = match lm.config == teacher.config {
            true => hybrid,
            false => teacher,
        };
        let refused = |engine: &Engine| Session::open(engine, &path).err().unwrap().to_string();
        assert!(refused(&engine(&other, |_| ())).contains("another model"));
        let int8 = engine(&lm, |options| options.cache_type = CacheType::Int8);
        assert!(refused(&int8).contains("--cache-type f16"));
        for cut in [3, 20, 200, bytes.len() - 5] {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            refused(&second);
        }
        std::fs::write(
            &path,
            [b"something else, and long enough".as_slice(), &bytes].concat(),
        )
        .unwrap();
        assert!(refused(&second).contains("not a session"));
    }
}

/// Guesses change when a text is there, never what it says: drawn greedily or by chance, alone or together, in a narrow room or a wide one.
#[test]
fn texts_do_not_depend_on_who_guesses() {
    let [teacher, hybrid] = models();
    let long = PROMPTS[1].repeat(6);
    let prompts = [PROMPTS[0], &long, PROMPTS[2], PROMPTS[1]];
    let tokenizer = Tokenizer::open(Path::new("assets/teacher")).unwrap();
    let drafter =
        |lm: &Lm| Drafter::model(lm, &tokenizer, &tokenizer, CacheType::F16, 1 << 28).unwrap();
    for (lm, other) in [(&teacher, &hybrid), (&hybrid, &teacher)] {
        for temperature in [0.0, 0.8] {
            let params = |i: u64| SamplingParams {
                temperature,
                seed: i,
                ..greedy(60)
            };
            let plain = engine(lm, |_| ());
            let mut scheduler = Scheduler::new(&plain);
            submit(&mut scheduler, &prompts, params);
            let texts = ended(&mut scheduler);
            let one = plain.pool.bytes(plain.prompt(&long).unwrap().len() + 61);
            for (name, guesses, chunk, batch, memory) in [
                ("ngrams", Drafter::Ngrams, 512, 64, None),
                ("other", drafter(other), 512, 64, None),
                ("itself", drafter(lm), 33, 2, None),
                ("narrow", Drafter::Ngrams, 64, 64, Some(one + one / 3)),
                ("alone", drafter(lm), 512, 1, None),
            ] {
                let mut engine = engine(lm, |options| {
                    options.prefill_chunk = chunk;
                    options.max_batch = batch;
                    options.prefix_cache = batch == 2;
                    options.cache_memory = memory;
                });
                engine.drafter = Some(guesses);
                let mut scheduler = Scheduler::new(&engine);
                scheduler.guess_always();
                submit(&mut scheduler, &prompts, params);
                let found = ended(&mut scheduler);
                for (id, generation) in &found {
                    let text = &texts[id].text;
                    assert_eq!(&generation.text, text, "{name} {temperature} {id}");
                    assert_eq!(
                        generation.completion_tokens, texts[id].completion_tokens,
                        "{name} {temperature}"
                    );
                }
                let Statistics {
                    drafted, accepted, ..
                } = scheduler.statistics();
                assert!(drafted > 0 && accepted <= drafted, "{name}");
                if name == "alone" {
                    // A model guesses all that it would say itself.
                    assert_eq!(accepted, drafted, "{temperature}");
                }
                drop(scheduler);
                assert_eq!(engine.pool.used(), 0, "{name}");
            }
        }
    }
}

fn submit(scheduler: &mut Scheduler, prompts: &[&str], params: impl Fn(u64) -> SamplingParams) {
    for (i, prompt) in prompts.iter().enumerate() {
        let prompt = scheduler.engine().prompt(prompt).unwrap();
        let request = Request::new(i as u64, prompt, params(i as u64));
        scheduler.submit(request).unwrap();
    }
}

#[test]
fn a_draft_model_of_other_tokens_is_refused() {
    let [lm, _] = models();
    let tokenizer = Tokenizer::open(Path::new("assets/teacher")).unwrap();
    let mut json = tokenizer.to_json().unwrap();
    json["added_tokens"]
        .as_array_mut()
        .unwrap()
        .push(serde_json::json!({
            "id": tokenizer.vocab_size(), "content": "<more>", "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        }));
    let other = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
    let refused = Drafter::model(&lm, &other, &tokenizer, CacheType::F16, 1 << 20);
    let said = refused.err().unwrap().to_string();
    assert!(said.contains("same vocabulary"), "{said}");
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let schema = serde_json::json!({
        "type": "object",
        "properties": {
            "name": {"enum": ["Tom", "Mia"]},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    for mut engine in engines() {
        let answers = |engine: &Engine, format: Format, temperature: f64| {
            let params = SamplingParams {
                temperature,
                format: Some(format),
                logprobs: Some(0),
                ..greedy(300)
            };
            let found = engine.generate(&PROMPTS[1..2], 3, &params, &mut |_, _| true);
            found.unwrap().remove(0)
        };
        for temperature in [0.0, 1.0] {
            for answer in answers(&engine, Format::JsonSchema(schema.clone()), temperature) {
                let json: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
                assert!(["Tom", "Mia"].contains(&json["name"].as_str().unwrap()));
                assert!((1..100).contains(&json["age"].as_i64().unwrap()));
                assert_eq!(answer.finish_reason, "stop");
                assert_eq!(answer.logprobs.len(), answer.completion_tokens);
            }
            let form = Format::Regex("(red|blue) [0-9]{3}".into());
            for answer in answers(&engine, form, temperature) {
                let (color, number) = answer.text.split_once(' ').unwrap();
                assert!(["red", "blue"].contains(&color) && number.len() == 3);
                number.parse::<u32>().unwrap();
            }
            let lark = "start: \"(\" start \")\" | \"x\"".to_owned();
            for answer in answers(&engine, Format::Lark(lark), temperature) {
                let depth = answer.text.len() / 2;
                let whole = format!("{}x{}", "(".repeat(depth), ")".repeat(depth));
                let cut = answer.finish_reason == "length" && answer.text.starts_with("((");
                assert!(answer.text == whole || cut, "{}", answer.text);
            }
        }
        let plain = answers(&engine, Format::JsonSchema(schema.clone()), 1.0);
        engine.drafter = Some(Drafter::Ngrams);
        let guessed = answers(&engine, Format::JsonSchema(schema.clone()), 1.0);
        assert_eq!(plain[1].text, guessed[1].text);
    }
}

#[test]
fn a_form_that_cannot_be_compiled_is_an_error() {
    let [engine, _] = engines();
    for (format, wanted) in [
        (
            Format::JsonSchema(serde_json::json!({"type": "ghost"})),
            "JSON schema",
        ),
        (
            Format::JsonSchema(serde_json::json!({"$ref": "#/nowhere"})),
            "JSON schema",
        ),
        (Format::Regex("(".into()), "regular expression"),
        (Format::Lark("start: nothing".into()), "grammar"),
        (Format::Lark("\u{0}".into()), "grammar"),
    ] {
        let params = SamplingParams {
            format: Some(format),
            ..greedy(5)
        };
        let said = engine.generate(&PROMPTS[..1], 1, &params, &mut |_, _| true);
        let said = said.unwrap_err().to_string();
        assert!(said.contains(wanted) && !said.contains('\n'), "{said}");
    }
}

#[test]
fn one_sequence_that_fails_leaves_the_others_alone() {
    let [engine, _] = engines();
    let mut scheduler = Scheduler::new(&engine);
    submit(&mut scheduler, &PROMPTS[..2], |i| SamplingParams {
        // Nothing is left that may come next.
        format: (i == 0).then(|| Format::Regex("a+".into())),
        logit_bias: match i {
            0 => (0..1000).map(|token| (token, f32::NEG_INFINITY)).collect(),
            _ => Vec::new(),
        },
        ..greedy(10)
    });
    let (mut failed, mut done) = (Vec::new(), Vec::new());
    while !scheduler.is_idle() {
        for event in scheduler.step().unwrap() {
            match event {
                Event::Failed { id, .. } => failed.push(id),
                Event::Done { id, .. } => done.push(id),
                Event::Text { .. } => (),
            }
        }
    }
    assert_eq!((failed, done), (vec![0], vec![1]));
}
