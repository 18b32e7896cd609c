//! A tokenizer in a GGUF's metadata, to and from `tokenizer.json`: SentencePiece's BPE (`llama`) and byte-level BPE (`gpt2`).

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value as Json, json};

use super::Value;
use crate::{Error, Result};

/// The whole `tokenizer.json`, where a writer has put it in: nothing is lost then.
const WHOLE: &str = "tokenizer.huggingface.json";

/// ggml's kinds of tokens.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER: u64 = 4;
const BYTE: u64 = 6;

/// How byte-level tokenizers cut a text into words before merges, by llama.cpp's name for it: what Hugging Face's pattern is, and
/// whether a word of the vocabulary is taken whole.
const WORDS: [(&str, &str, bool); 2] = [
    (
        "llama-bpe",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        true,
    ),
    (
        "qwen2",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
    ),
];

/// `tokenizer.json`, and the ids that begin and end a text.
pub struct Found {
    pub json: Json,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
}

/// # Errors
/// Names the key that is missing, of a wrong type, or asks for what is not supported.
pub fn read(metadata: &BTreeMap<String, Value>) -> Result<Found> {
    let keys = Keys(metadata);
    let tokens = keys.texts("tokenizer.ggml.tokens")?;
    let id = |key: &str| keys.id(key, tokens.len());
    let bos = id("tokenizer.ggml.bos_token_id")?;
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        let found = id(&format!("tokenizer.ggml.{key}"))?;
        eos.extend(found.filter(|id| !eos.contains(id)));
    }
    let json = match metadata.get(WHOLE) {
        Some(Value::Text(text)) => serde_json::from_str(text)
            .map_err(|e| Error::invalid(format!("{WHOLE} is no JSON: {e}")))?,
        Some(_) => return Err(Error::invalid(format!("{WHOLE} must be a text"))),
        None => {
            let kinds = keys.numbers("tokenizer.ggml.token_type", tokens.len())?;
            let begin = match keys.flag("tokenizer.ggml.add_bos_token")? {
                // llama.cpp's default depends on the model, as ours does.
                None => keys.text("tokenizer.ggml.model")? == "llama",
                Some(flag) => flag,
            };
            let model = match keys.text("tokenizer.ggml.model")? {
                "llama" => sentence_piece(&keys, &tokens)?,
                "gpt2" => byte_level(&keys, &tokens)?,
                other => {
                    return Err(Error::invalid(format!(
                        "tokenizer.ggml.model {other} is not supported: llama and gpt2 are"
                    )));
                }
            };
            whole(model, &tokens, &kinds, bos.filter(|_| begin))
        }
    };
    Ok(Found { json, bos, eos })
}

/// `bos_token` and what else chat templates name, with their texts.
pub fn special(metadata: &BTreeMap<String, Value>) -> Vec<(String, String)> {
    let Some(Value::Array(tokens)) = metadata.get("tokenizer.ggml.tokens") else {
        return Vec::new();
    };
    // ggml's names: two are not those that templates have.
    let names = [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ];
    let found = names.into_iter().filter_map(|(name, key)| {
        let Some(Value::Unsigned(id)) = metadata.get(&format!("tokenizer.ggml.{key}")) else {
            return None;
        };
        match tokens.get(usize::try_from(*id).ok()?)? {
            Value::Text(text) => Some((name.to_owned(), text.clone())),
            _ => None,
        }
    });
    found.collect()
}

/// The parts that both kinds share.
fn whole(mut json: Json, tokens: &[&str], kinds: &[u64], begin: Option<u32>) -> Json {
    let added = tokens
        .iter()
        .zip(kinds)
        .enumerate()
        .filter(|(_, (_, kind))| [UNKNOWN, CONTROL, USER].contains(kind));
    let added = added.map(|(id, (token, kind))| {
        json!({
            "id": id, "content": token, "special": *kind != USER,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    json["version"] = json!("1.0");
    json["added_tokens"] = Json::Array(added.collect());
    if let Some(id) = begin {
        let token = tokens[id as usize];
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [
                { "SpecialToken": { "id": token, "type_id": 0 } },
                { "Sequence": { "id": "A", "type_id": 0 } },
            ],
            "pair": [
                { "Sequence": { "id": "A", "type_id": 0 } },
                { "Sequence": { "id": "B", "type_id": 1 } },
            ],
            "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
        });
    }
    json
}

fn vocabulary(tokens: &[&str]) -> serde_json::Map<String, Json> {
    let numbered = tokens.iter().enumerate();
    numbered
        .map(|(id, token)| ((*token).to_owned(), json!(id)))
        .collect()
}

/// SentencePiece joins the neighbours whose token has the highest score: a BPE whose merges are all ways of putting
/// tokens together, best token first.
fn sentence_piece(keys: &Keys, tokens: &[&str]) -> Result<Json> {
    let scores = keys.floats("tokenizer.ggml.scores", tokens.len())?;
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (*t, i)).collect();
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], *l, *r));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges = merges
        .iter()
        .map(|(_, l, r)| json!([tokens[*l], tokens[*r]]));
    let unknown = keys.id("tokenizer.ggml.unknown_token_id", tokens.len())?;
    let bytes = ids.contains_key("<0x00>");
    let prefix = keys
        .flag("tokenizer.ggml.add_space_prefix")?
        .unwrap_or(true);
    let mut normalizers =
        vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE",
            "unk_token": unknown.map(|id| tokens[id as usize]),
            "fuse_unk": true,
            "byte_fallback": bytes,
            "vocab": vocabulary(tokens),
            "merges": merges.collect::<Vec<_>>(),
        },
    }))
}

fn byte_level(keys: &Keys, tokens: &[&str]) -> Result<Json> {
    let merges = keys.texts("tokenizer.ggml.merges")?;
    let pairs = merges.iter().map(|merge| {
        let pair = merge.split_once(' ');
        let pair = pair.ok_or_else(|| Error::invalid(format!("merge {merge:?} is no pair")))?;
        Ok(json!([pair.0, pair.1]))
    });
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": regex });
    let name = match metadata_text(keys.0, "tokenizer.ggml.pre")? {
        None | Some("default") => "gpt-2",
        Some("llama3" | "llama-v3") => "llama-bpe",
        Some(name) => name,
    };
    let mut ignore_merges = false;
    let words = match name {
        "gpt-2" => bytes(true),
        "smollm" => json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Digits", "individual_digits": true }, bytes(true),
        ] }),
        _ => {
            let Some((_, pattern, whole)) = WORDS.iter().find(|(known, ..)| *known == name) else {
                return Err(Error::invalid(format!(
                    "tokenizer.ggml.pre {name} is not supported: gpt-2, llama-bpe, qwen2 and smollm are; \
                     a {WHOLE} in the file would do"
                )));
            };
            ignore_merges = *whole;
            json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
                bytes(false),
            ] })
        }
    };
    Ok(json!({
        "pre_tokenizer": words,
        "decoder": bytes(true),
        "model": {
            "type": "BPE",
            "ignore_merges": ignore_merges,
            "vocab": vocabulary(tokens),
            "merges": pairs,
        },
    }))
}

/// The metadata of a `tokenizer.json`, the file itself among them; `rows` the model embeds.
///
/// # Errors
/// A kind of tokenizer that llama.cpp has no name for.
pub fn write(
    json: &Json,
    rows: usize,
    bos: Option<u32>,
    eos: &[u32],
) -> Result<Vec<(&'static str, Value)>> {
    let model = &json["model"];
    let vocab = model["vocab"].as_object();
    let vocab = vocab.filter(|_| model["type"] == "BPE" || model["type"].is_null());
    let Some(vocab) = vocab else {
        return Err(Error::invalid(format!(
            "a tokenizer of type {} cannot be written to GGUF, only BPE",
            model["type"]
        )));
    };
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![USER; rows];
    let mut put = |id: Option<u64>, token: &str, kind: u64| {
        let id = id
            .and_then(|id| usize::try_from(id).ok())
            .filter(|id| *id < rows);
        let Some(id) = id else {
            return Err(Error::invalid(format!(
                "token {token:?} has no id below {rows}"
            )));
        };
        tokens[id] = token.to_owned();
        kinds[id] = kind;
        Ok(id)
    };
    for (token, id) in vocab {
        let byte = token.starts_with("<0x") && token.ends_with('>') && token.len() == 6;
        put(id.as_u64(), token, if byte { BYTE } else { NORMAL })?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let content = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"] == true {
            true if Some(content) == model["unk_token"].as_str() => UNKNOWN,
            true => CONTROL,
            false => USER,
        };
        put(added["id"].as_u64(), content, kind)?;
    }
    let merges: Vec<(String, String)> = (model["merges"].as_array().into_iter().flatten())
        .map(|merge| match merge {
            Json::String(text) => {
                let (left, right) = text.split_once(' ').unwrap_or((text, ""));
                (left.to_owned(), right.to_owned())
            }
            pair => {
                let part = |i: usize| pair[i].as_str().unwrap_or_default().to_owned();
                (part(0), part(1))
            }
        })
        .collect();
    let pieces = json["pre_tokenizer"].is_null();
    let mut out = vec![(
        "tokenizer.ggml.model",
        Value::Text(if pieces { "llama" } else { "gpt2" }.into()),
    )];
    if pieces {
        // The first merge that makes a token is its rank; what no merge makes is made of nothing.
        let mut ranks = HashMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry(format!("{left}{right}")).or_insert(rank);
        }
        let score = |token: &String| ranks.get(token).map_or(-1e9, |rank| -(*rank as f64));
        let scores = tokens.iter().map(|token| Value::Float(score(token)));
        out.push(("tokenizer.ggml.scores", Value::Array(scores.collect())));
        let prefix = json["normalizer"].to_string().contains("Prepend");
        out.push(("tokenizer.ggml.add_space_prefix", Value::Bool(prefix)));
        let unknown = model["unk_token"]
            .as_str()
            .and_then(|token| tokens.iter().position(|t| t == token));
        out.extend(unknown.map(|id| {
            (
                "tokenizer.ggml.unknown_token_id",
                Value::Unsigned(id as u64),
            )
        }));
    } else {
        let name = words(&json["pre_tokenizer"])?;
        let whole = WORDS
            .iter()
            .any(|(known, _, whole)| *known == name && *whole);
        let spelled = match model["ignore_merges"] == true && !whole {
            true => {
                let words = tokens
                    .iter()
                    .zip(&kinds)
                    .filter(|(_, kind)| **kind == NORMAL);
                spelled(words.map(|(word, _)| word), &merges)
            }
            false => Vec::new(),
        };
        out.push(("tokenizer.ggml.pre", Value::Text(name.into())));
        let merges = merges
            .iter()
            .chain(&spelled)
            .map(|(left, right)| Value::Text(format!("{left} {right}")));
        out.push(("tokenizer.ggml.merges", Value::Array(merges.collect())));
    }
    let texts = tokens.into_iter().map(Value::Text);
    out.push(("tokenizer.ggml.tokens", Value::Array(texts.collect())));
    // llama.cpp reads signed ones.
    let kinds = kinds.into_iter().map(|kind| Value::Signed(kind as i64));
    out.push(("tokenizer.ggml.token_type", Value::Array(kinds.collect())));
    out.extend(bos.map(|id| ("tokenizer.ggml.bos_token_id", Value::Unsigned(id.into()))));
    let ends = [
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.eom_token_id",
    ];
    out.extend(
        ends.into_iter()
            .zip(eos)
            .map(|(key, id)| (key, Value::Unsigned((*id).into()))),
    );
    let begins = json["post_processor"]["single"][0]["SpecialToken"].is_object()
        || json["post_processor"]["processors"]
            .to_string()
            .contains("SpecialToken");
    out.push(("tokenizer.ggml.add_bos_token", Value::Bool(begins)));
    out.push((WHOLE, Value::Text(json.to_string())));
    Ok(out)
}

/// Merges that put words together a character at a time: those that a tokenizer takes whole (`ignore_merges`) and no merge of its own
/// makes. llama.cpp takes words whole for llama-bpe alone. First come the words behind a space: no other begins as they do, so nothing
/// inside of them is put together before them. A text of known words is cut alike then; of an unknown one, what is a known word at its
/// beginning is one token to llama.cpp, and where it begins as one but is none (` gi` as ` girl`), llama.cpp leaves its space out: it
/// spells what no token is by bytes, and a space's letter here has two.
fn spelled<'a>(
    words: impl Iterator<Item = &'a String>,
    merges: &[(String, String)],
) -> Vec<(String, String)> {
    const SPACE: char = 'Ġ';
    let made = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let made: HashSet<String> = made.collect();
    let mut words: Vec<&String> = words.filter(|word| !made.contains(*word)).collect();
    words.sort_by_key(|word| !word.starts_with(SPACE));
    let steps = words.iter().flat_map(|word| {
        let inner = word.char_indices().skip(1);
        inner.map(|(at, c)| (&word[..at], &word[at..at + c.len_utf8()]))
    });
    let mut seen = HashSet::new();
    let new = steps.filter(|step| seen.insert(*step));
    new.map(|(left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

/// llama.cpp's name for how words are cut.
fn words(pre: &Json) -> Result<&'static str> {
    let parts = pre["pretokenizers"].as_array();
    let parts: Vec<&Json> = parts.map_or(vec![pre], |parts| parts.iter().collect());
    let name = match parts.as_slice() {
        [only] if only["type"] == "ByteLevel" => Some("gpt-2"),
        [digits, bytes] if digits["type"] == "Digits" && bytes["type"] == "ByteLevel" => {
            Some("smollm")
        }
        [split, bytes] if split["type"] == "Split" && bytes["type"] == "ByteLevel" => {
            let pattern = split["pattern"]["Regex"].as_str();
            let known = WORDS.iter().find(|(_, known, _)| Some(*known) == pattern);
            known.map(|(name, ..)| *name)
        }
        _ => None,
    };
    name.ok_or_else(|| {
        Error::invalid("the tokenizer cuts words in a way that llama.cpp has no name for here: gpt-2, llama-bpe, qwen2, smollm")
    })
}

/// Metadata by key, with errors that name it.
struct Keys<'a>(&'a BTreeMap<String, Value>);

fn metadata_text<'a>(metadata: &'a BTreeMap<String, Value>, key: &str) -> Result<Option<&'a str>> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Text(text)) => Ok(Some(text)),
        Some(_) => Err(Error::invalid(format!("{key} must be a text"))),
    }
}

impl<'a> Keys<'a> {
    fn text(&self, key: &str) -> Result<&'a str> {
        metadata_text(self.0, key)?.ok_or_else(|| Error::invalid(format!("{key} is missing")))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(Error::invalid(format!("{key} must be true or false"))),
        }
    }

    fn id(&self, key: &str, tokens: usize) -> Result<Option<u32>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(id)) if (*id as usize) < tokens => Ok(Some(*id as u32)),
            Some(other) => Err(Error::invalid(format!(
                "{key} is {other:?}, not one of {tokens} tokens"
            ))),
        }
    }

    fn array(&self, key: &str) -> Result<&'a [Value]> {
        match self.0.get(key) {
            Some(Value::Array(entries)) => Ok(entries),
            Some(_) => Err(Error::invalid(format!("{key} must be an array"))),
            None => Err(Error::invalid(format!("{key} is missing"))),
        }
    }

    fn texts(&self, key: &str) -> Result<Vec<&'a str>> {
        let texts = self.array(key)?.iter().map(|entry| match entry {
            Value::Text(text) => Ok(text.as_str()),
            _ => Err(Error::invalid(format!("{key} must hold texts"))),
        });
        texts.collect()
    }

    fn sized(&self, key: &str, count: usize) -> Result<&'a [Value]> {
        let entries = self.array(key)?;
        match entries.len() == count {
            true => Ok(entries),
            false => Err(Error::invalid(format!(
                "{key} has {} entries for {count} tokens",
                entries.len()
            ))),
        }
    }

    fn numbers(&self, key: &str, count: usize) -> Result<Vec<u64>> {
        let numbers = self.sized(key, count)?.iter().map(|entry| match entry {
            Value::Unsigned(n) => Ok(*n),
            Value::Signed(n) if *n >= 0 => Ok(*n as u64),
            _ => Err(Error::invalid(format!("{key} must hold numbers"))),
        });
        numbers.collect()
    }

    fn floats(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let floats = self.sized(key, count)?.iter().map(|entry| match entry {
            Value::Float(x) if x.is_finite() => Ok(*x),
            _ => Err(Error::invalid(format!("{key} must hold finite numbers"))),
        });
        floats.collect()
    }
}
