use super::*;

const TEXT: &str = "Once upon a time, there was a café.\nZoë ate 3 jalapeños 🌶 — “hot”!";

/// A byte-fallback tokenizer of the Llama kind: `▁` for spaces, first space stripped, `<s>` added.
pub(crate) fn llama_json() -> Value {
    let mut vocab = serde_json::Map::new();
    let words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁ab"];
    let bytes = (0..=255).map(|b| format!("<0x{b:02X}>"));
    for token in words.map(String::from).into_iter().chain(bytes) {
        let id = vocab.len();
        vocab.insert(token, id.into());
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
    };
    serde_json::json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"], ["▁a", "b"]]},
    })
}

fn llama() -> Tokenizer {
    Tokenizer::from_json(llama_json().to_string().as_bytes()).unwrap()
}

fn streamed(tokenizer: &Tokenizer, context: &[u32], ids: &[u32]) -> String {
    let mut stream = tokenizer.decode_stream(context);
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text += &stream.finish().unwrap();
    text
}

#[test]
fn encode_adds_bos_and_ignores_truncation() {
    let tokenizer = llama();
    assert_eq!(tokenizer.encode("ab ab").unwrap(), [1, 7, 7]);
    assert_eq!(tokenizer.encode_plain("ab").unwrap(), [7]);
    assert_eq!(tokenizer.encode("a a a a a a a").unwrap().len(), 8);
    let offsets = tokenizer.encode_with_offsets("ab ab", true).unwrap();
    assert_eq!(offsets, [(1, 0..0), (7, 0..2), (7, 2..5)]);
}

#[test]
fn stream_equals_decode_and_never_splits_a_character() {
    let tokenizer = llama();
    let ids = tokenizer.encode(TEXT).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
    assert_eq!(streamed(&tokenizer, &[], &ids), TEXT);
    let mut stream = tokenizer.decode_stream(&[]);
    for &id in &ids {
        assert!(!stream.push(id).unwrap().contains('\u{FFFD}'));
    }
}

#[test]
fn streams_show_the_special_tokens_that_are_asked_for() {
    let tokenizer = llama();
    let ids = [7, 0, 2, 7];
    assert_eq!(streamed(&tokenizer, &[1], &ids), "ab ab");
    let mut stream = tokenizer.decode_stream(&[1]).showing(&["</s>", "none"]);
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["ab", "", "</s>", " ab"]);
}

#[test]
fn stream_after_a_prompt_keeps_the_first_space() {
    let tokenizer = llama();
    assert_eq!(streamed(&tokenizer, &[1, 7], &[6, 6]), " a a");
    assert_eq!(streamed(&tokenizer, &[1], &[6, 6]), "a a");
}

#[test]
fn stream_survives_stray_bytes() {
    let tokenizer = llama();
    let byte = |b: u32| 8 + b;
    // "é", then a lead byte that is never continued, then plain text.
    let ids = [byte(0xC3), byte(0xA9), byte(0xE2), 4];
    assert_eq!(streamed(&tokenizer, &[7], &ids), "é\u{FFFD}a");
    let garbage = vec![byte(0xE2); 40];
    let text = streamed(&tokenizer, &[7], &garbage);
    assert!(text.chars().count() >= 40 && text.chars().all(|c| c == '\u{FFFD}'));
}

#[test]
fn special_ids_come_from_the_configs() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("tokenizer.json", &llama_json().to_string());
    assert!(Tokenizer::open(folder.path()).unwrap().eos().is_empty());
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#,
    );
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), &[2][..]));
    write(
        "config.json",
        r#"{"bos_token_id": 3, "eos_token_id": [4, 5]}"#,
    );
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(3), &[4, 5][..]));
    write("generation_config.json", r#"{"eos_token_id": 2}"#);
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(3), &[2][..]));
}

#[test]
fn errors_name_file_and_field() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let message = || Tokenizer::open(folder.path()).unwrap_err().to_string();
    assert!(message().contains("tokenizer.json: not found"));
    write("tokenizer.json", "{\"model\": 3");
    assert!(message().contains("tokenizer.json: not a tokenizer"));
    write("tokenizer.json", &llama_json().to_string());
    write("config.json", "{");
    assert!(message().contains("config.json: not JSON"));
    write("config.json", r#"{"eos_token_id": "2"}"#);
    assert!(message().contains("config.json: eos_token_id is \"2\", not a token id"));
    write("config.json", r#"{"eos_token_id": 999}"#);
    assert!(message().contains("999"));
}

#[test]
fn two_tokens_with_one_id_are_named() {
    let mut json = llama_json();
    json["model"]["vocab"]["b"] = 4.into();
    let read = Tokenizer::from_json(json.to_string().as_bytes());
    let message = read.unwrap_err().to_string();
    assert!(
        message.contains(r#"tokens "a" and "b" both have id 4"#),
        "{message}"
    );
    // A token of the vocabulary that is added as well is one token.
    assert_eq!(llama().id("</s>"), Some(2));
}

/// What llama.cpp's keys alone say makes the same ids, for both kinds of tokenizer.
#[test]
fn a_gguf_says_the_same_tokenizer() {
    let embedded = include_bytes!("../../../assets/teacher/tokenizer.json");
    let mut byte_level: Value = serde_json::from_slice(embedded).unwrap();
    // Merges, as GPT-2 has them; whole words are not taken.
    byte_level["model"]["ignore_merges"] = false.into();
    let mut llama = llama_json();
    llama["truncation"] = Value::Null;
    let texts = [TEXT, "ab ab a  b", "", " a", "ba<s>ab"];
    for (json, bos, eos) in [(llama, 1, 2), (byte_level, 0, 1)] {
        let plain = Tokenizer::from_json(json.to_string().as_bytes()).unwrap();
        let rows = plain.vocab_size();
        let written = gguf::tokenizer::write(&json, rows, Some(bos), &[eos]).unwrap();
        let mut metadata: std::collections::BTreeMap<_, _> = written
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        for whole in [true, false] {
            if !whole {
                metadata.remove("tokenizer.huggingface.json");
            }
            let found = gguf::tokenizer::read(&metadata).unwrap();
            assert_eq!((found.bos, found.eos.as_slice()), (Some(bos), &[eos][..]));
            let read = Tokenizer::from_json(found.json.to_string().as_bytes()).unwrap();
            for text in texts {
                let ids = plain.encode(text).unwrap();
                assert_eq!(read.encode(text).unwrap(), ids, "{text:?} {}", found.json);
                assert_eq!(read.decode(&ids).unwrap(), plain.decode(&ids).unwrap());
            }
        }
    }
}

/// llama.cpp puts together what its merges say, here best first; it takes no word whole.
#[test]
fn a_gguf_spells_words_that_no_merge_makes() {
    let embedded = include_bytes!("../../../assets/teacher/tokenizer.json");
    let json: Value = serde_json::from_slice(embedded).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let written = gguf::tokenizer::write(&json, vocab.len(), None, &[]).unwrap();
    let merges = written
        .iter()
        .find(|(key, _)| *key == "tokenizer.ggml.merges");
    let Some((_, gguf::Value::Array(merges))) = merges else {
        panic!("no merges");
    };
    let place = |left: &str, right: &str| {
        let merge = gguf::Value::Text(format!("{left} {right}"));
        merges.iter().position(|known| *known == merge)
    };
    let special = |word: &&String| word.starts_with('<') && word.ends_with('>');
    for word in vocab.keys().filter(|word| !special(word)) {
        let mut parts: Vec<String> = word.chars().map(String::from).collect();
        let best = |parts: &[String]| {
            let pairs = parts.windows(2).enumerate();
            let ranked = pairs.filter_map(|(at, pair)| Some((place(&pair[0], &pair[1])?, at)));
            ranked.min().map(|(_, at)| at)
        };
        while let Some(at) = best(&parts) {
            let right = parts.remove(at + 1);
            parts[at] += &right;
        }
        assert_eq!(parts, [word.as_str()]);
    }
}

#[test]
fn what_a_gguf_cannot_say_is_named() {
    let say = |change: fn(&mut Value)| {
        let mut json = llama_json();
        change(&mut json);
        gguf::tokenizer::write(&json, 300, None, &[])
            .unwrap_err()
            .to_string()
    };
    assert!(say(|j| j["model"]["type"] = "Unigram".into()).contains("Unigram"));
    assert!(
        say(|j| j["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"}))
            .contains("cuts words")
    );
    assert!(say(|j| j["model"]["vocab"]["c"] = 300.into()).contains("\"c\" has no id below 300"));
}

/// The parser panics at the first.
#[test]
fn files_that_the_parser_panics_at_are_refused() {
    for text in [
        r#"{"version": "1.0", "decoder": {"type": "Sequence" "decoders": []}}"#,
        r#"{"version": "1.0", "decoder": {"type": "Sequence"}, "model": {"type": "BPE", "vocab": {}, "merges": []}}"#,
    ] {
        let said = Tokenizer::from_json(text.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(said.contains("not a tokenizer"), "{said}");
    }
}
