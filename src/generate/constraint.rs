//! Answers of a given form: a JSON schema, a regular expression or a grammar, held to token by token (`llguidance`).

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};

use llguidance::api::TopLevelGrammar;
use llguidance::panic_utils::catch_unwind;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};

use crate::data::Tokenizer;
use crate::{Error, Result};

/// What a whole answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// JSON that a schema allows (draft 2020-12, as far as `llguidance` has it; `$ref` within the schema).
    JsonSchema(serde_json::Value),
    /// A regular expression over the whole answer (Rust's syntax, without look-around).
    Regex(String),
    /// A context-free grammar in Lark's syntax; its rule `start` is the answer.
    Lark(String),
}

impl Format {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(serde_json::json!({"type": "object"}))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "JSON schema",
            Self::Regex(_) => "regular expression",
            Self::Lark(_) => "grammar",
        }
    }
}

/// Between JSON's marks: a blank, or a new line and its indentation.
const WHITESPACE: &str = r" |\n[ \t]{0,32}";

/// The bytes of every token, as far as `llguidance` knows such tokenizers.
///
/// # Errors
/// Why they are not known.
pub(super) fn words(tokenizer: &Tokenizer) -> Result<Vec<Vec<u8>>, String> {
    let read = || token_bytes_from_tokenizer_json(&tokenizer.to_json()?);
    catch_unwind(AssertUnwindSafe(read)).map_err(|e| first_line(&e))
}

/// Makes constraints for the answers of one tokenizer.
pub(super) struct Constraints {
    factory: ParserFactory,
    /// Most requests ask for what others asked for: the newest first.
    kept: Mutex<VecDeque<(Format, Constraint)>>,
}

/// Compiled forms, at most.
const KEPT: usize = 32;

impl Constraints {
    /// # Errors
    /// A tokenizer whose tokens are not known by their bytes.
    pub fn new(tokenizer: &Tokenizer, words: &Result<Vec<Vec<u8>>, String>) -> Result<Self> {
        let failed = |why: &str| {
            Error::invalid(format!(
                "answers of a given form need a tokenizer whose tokens are bytes: {why}"
            ))
        };
        let words = words.as_ref().map_err(|why| failed(why))?;
        let make = || {
            let mut words = words.clone();
            // A model that names no end has a token of no bytes for it, which no model draws.
            let eos = tokenizer.eos().first().copied().unwrap_or_else(|| {
                words.push(Vec::new());
                words.len() as u32 - 1
            });
            let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words);
            let trie = match tokenizer.eos() {
                [] => trie,
                all => trie.with_eos_tokens(all),
            };
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&environment)?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(Self {
                factory,
                kept: Mutex::default(),
            })
        };
        catch_unwind(AssertUnwindSafe(make)).map_err(|e| failed(&first_line(&e)))
    }

    /// # Errors
    /// A form that cannot be compiled.
    pub fn compile(&self, format: &Format) -> Result<Constraint> {
        let kept = || self.kept.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, constraint)) = kept().iter().find(|(of, _)| of == format) {
            return Ok(constraint.own());
        }
        let failed =
            |said: String| Error::invalid(format!("the {} cannot be used: {said}", format.name()));
        let make = || {
            let grammar = match format {
                Format::JsonSchema(schema) => {
                    let mut schema = schema.clone();
                    if let Some(fields) = schema.as_object_mut() {
                        // Without a bound a model may go on in blanks for ever.
                        let options = || serde_json::json!({"whitespace_pattern": WHITESPACE});
                        fields.entry("x-guidance").or_insert_with(options);
                    }
                    TopLevelGrammar::from_json_schema(schema)
                }
                Format::Regex(text) => TopLevelGrammar::from_regex(text),
                Format::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
            };
            self.factory.create_parser(grammar)
        };
        let parser = catch_unwind(AssertUnwindSafe(make)).map_err(|e| failed(first_line(&e)))?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(said) => Err(failed(said)),
            None => {
                let made = Constraint { matcher };
                let mut kept = kept();
                kept.truncate(KEPT - 1);
                let own = made.own();
                kept.push_front((format.clone(), made));
                Ok(own)
            }
        }
    }
}

fn first_line(e: &anyhow::Error) -> String {
    let said = e.to_string();
    said.lines().next().unwrap_or_default().to_owned()
}

/// Where an answer stands in its form.
#[derive(Clone)]
pub(super) struct Constraint {
    matcher: Matcher,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl Constraint {
    /// The same with a lexer of its own: one that another answer has exhausted would fail this one too.
    fn own(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
        }
    }

    /// Takes from `logits [V]` what may not come next.
    ///
    /// # Errors
    /// A form that became too complex to follow, or of which no token can be the next.
    pub fn apply(&mut self, logits: &mut [f32]) -> Result<()> {
        let mask = self.matcher.compute_mask_or_eos().map_err(too_complex)?;
        let mut some = false;
        for (token, logit) in logits.iter_mut().enumerate() {
            match token < mask.len() && mask.is_allowed(token as u32) {
                true => some |= *logit > f32::NEG_INFINITY,
                false => *logit = f32::NEG_INFINITY,
            }
        }
        match some {
            true => Ok(()),
            false => Err(Error::invalid(
                "no token of this model's vocabulary goes on in the form that was asked for",
            )),
        }
    }

    /// `token` comes next; whether the answer is whole, and nothing can follow.
    ///
    /// # Errors
    /// A form that became too complex to follow.
    pub fn take(&mut self, token: u32) -> Result<bool> {
        self.matcher.consume_token(token).map_err(too_complex)?;
        Ok(self.matcher.is_stopped())
    }
}

fn too_complex(e: anyhow::Error) -> Error {
    Error::invalid(format!(
        "the form that was asked for cannot be followed any further: {}",
        first_line(&e)
    ))
}
