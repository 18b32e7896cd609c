//! `/v1/completions`: texts or token ids that are gone on with.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::error::{ApiError, apart};
use super::super::models::Model;
use super::super::state::{Client, Server};
use super::answer::{self, Answers, Prompt, Shape, token_text};
use super::fields::{Body, Common, MOST_LOGPROBS};
use crate::generate::{Finish, Logprob};

#[derive(Debug, Deserialize)]
pub struct Fields {
    prompt: Option<Prompts>,
    max_tokens: Option<usize>,
    /// So many likeliest tokens are told of every place.
    logprobs: Option<usize>,
    /// The prompt stands before the answer.
    echo: Option<bool>,
    best_of: Option<usize>,
    /// vLLM's: tokens of logprobs are `token_id:N` instead of their texts, of which several may be equal.
    return_tokens_as_token_ids: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text, token ids, or a list of either")]
enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Prompts {
    fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(all) => all.len(),
            Self::ManyTokens(all) => all.len(),
        }
    }
}

/// Entries of the lists that tell of prompts' tokens, in all choices of a request.
const MOST_SCORED: usize = 1 << 20;

/// Where nobody says how many (OpenAI's).
const MAX_TOKENS: usize = 16;

struct Text {
    id: String,
    model: String,
    created: u64,
    /// Answers to each prompt.
    n: usize,
    /// The prompts, where they stand before the answers.
    echo: Option<Vec<String>>,
    logprobs: bool,
    /// Tokens are named by their ids.
    ids: bool,
    /// Characters of each choice so far.
    said: Vec<usize>,
}

pub async fn create(
    State(server): State<Arc<Server>>,
    Extension(client): Extension<Client>,
    body: Body,
) -> Result<Response, ApiError> {
    let common: Common = body.read()?;
    let fields: Fields = body.read()?;
    let n = common.choices()?;
    let count = fields.prompt.as_ref().map_or(1, Prompts::count);
    let (model, places, mut params) =
        answer::enter(&server, &common, count.saturating_mul(n)).await?;
    let (echo, streams) = (fields.echo.unwrap_or(false), common.streams());
    if fields.best_of.is_some_and(|best| best != n) {
        return Err(ApiError::field(
            "best_of",
            "best_of must be n: all answers are given back",
        ));
    }
    if fields.logprobs.is_some_and(|count| count > MOST_LOGPROBS) {
        return Err(ApiError::field(
            "logprobs",
            format!("logprobs must be at most {MOST_LOGPROBS}"),
        ));
    }
    if echo && streams && fields.logprobs.is_some() {
        let said =
            "the prompt's logprobs are not streamed: leave one of echo, logprobs and stream out";
        return Err(ApiError::field("echo", said));
    }
    params.logprobs = fields.logprobs;
    params.prompt_logprobs = fields.logprobs.filter(|_| echo);
    let most = server.limits.tokens.unwrap_or(usize::MAX);
    params.max_tokens = Some(fields.max_tokens.unwrap_or(MAX_TOKENS).min(most));
    let (of, prompts, checked) = (model.clone(), fields.prompt, params.clone());
    let (tokens, texts) = apart(move || {
        let tokens = tokens(&of, prompts)?;
        // What there is room for behind the longest fits behind the others.
        let longest = tokens.iter().map(Vec::len).max().unwrap_or_default();
        let right = of.engine.check(longest, &checked);
        right.map_err(ApiError::failed)?;
        if let Some(top) = checked.prompt_logprobs {
            let total: usize = tokens.iter().map(Vec::len).sum();
            let entries = total.saturating_mul(n).saturating_mul(top + 1);
            if entries > MOST_SCORED {
                let said = format!(
                    "{total} tokens of prompts with {top} likeliest each, {n} times: at most {MOST_SCORED} in all are told"
                );
                return Err(ApiError::field("logprobs", said));
            }
        }
        let texts = tokens.iter().map(|prompt| match echo {
            true => of.engine.tokenizer.decode(prompt).map_err(ApiError::failed),
            false => Ok(String::new()),
        });
        let texts = texts.collect::<Result<Vec<String>, ApiError>>()?;
        Ok((tokens, texts))
    })
    .await?;
    let prompts = tokens.into_iter().map(|tokens| Prompt {
        tokens,
        stored: None,
    });
    let prompts: Vec<Prompt> = prompts.collect();
    let shape = Text {
        id: server.name("cmpl-"),
        model: model.about.name.clone(),
        created: super::now(),
        n,
        said: vec![0; prompts.len() * n],
        echo: echo.then_some(texts),
        logprobs: params.logprobs.is_some(),
        ids: fields.return_tokens_as_token_ids.unwrap_or(false),
    };
    let usage = common.include_usage();
    let answers = Answers::begin(server, client, model, places, prompts, n, &params, false).await?;
    match streams {
        true => Ok(answer::streamed(answers, shape, usage)),
        false => answer::whole(answers, shape).await,
    }
}

fn tokens(model: &Model, prompts: Option<Prompts>) -> Result<Vec<Vec<u32>>, ApiError> {
    let engine = &model.engine;
    let text = |text: &str| {
        engine
            .prompt(text)
            .map_err(|e| ApiError::field("prompt", e))
    };
    let vocab = engine.decoder.config.vocab_size;
    let ids = |ids: Vec<u32>| match ids.iter().find(|id| **id as usize >= vocab) {
        _ if ids.is_empty() => Err(ApiError::field("prompt", "a prompt has no token")),
        Some(id) => Err(ApiError::field(
            "prompt",
            format!("token {id} must be below {vocab}"),
        )),
        None => Ok(ids),
    };
    let found: Vec<Vec<u32>> = match prompts {
        None => vec![text("")?],
        Some(Prompts::Text(one)) => vec![text(&one)?],
        Some(Prompts::Tokens(one)) => vec![ids(one)?],
        Some(Prompts::Texts(all)) => all.iter().map(|one| text(one)).collect::<Result<_, _>>()?,
        Some(Prompts::ManyTokens(all)) => all.into_iter().map(ids).collect::<Result<_, _>>()?,
    };
    match found.is_empty() {
        true => Err(ApiError::field("prompt", "there is no prompt")),
        false => Ok(found),
    }
}

/// OpenAI's four lists; the text before them has `offset` characters.
#[derive(Default)]
struct Lists {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    offset: usize,
    ids: bool,
}

impl Lists {
    fn push(&mut self, model: &Model, token: u32, known: Option<&Logprob>) {
        let text = |token: u32| match self.ids {
            true => format!("token_id:{token}"),
            false => token_text(&model.engine.token_bytes(token)),
        };
        self.text_offset.push(self.offset.into());
        if !model.engine.is_special(token) {
            // Characters begin in one token and may end in another.
            let bytes = model.engine.token_bytes(token);
            self.offset += bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        }
        self.token_logprobs
            .push(known.map_or(Value::Null, |known| known.logprob.into()));
        self.top_logprobs.push(known.map_or(Value::Null, |known| {
            let mut top = Map::new();
            let all = known.top.iter().copied().chain([(token, known.logprob)]);
            for (token, logprob) in all {
                // Of two tokens of one text the likelier.
                top.entry(text(token)).or_insert_with(|| logprob.into());
            }
            Value::Object(top)
        }));
        self.tokens.push(text(token).into());
    }

    fn json(self) -> Value {
        json!({
            "tokens": self.tokens, "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs, "text_offset": self.text_offset,
        })
    }
}

impl Text {
    fn choice(&self, choice: usize, text: &str, logprobs: Value, reason: Option<&str>) -> Value {
        json!({"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason})
    }

    fn lists(&self, model: &Model, offset: usize, logprobs: &[Logprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let mut lists = Lists {
            offset,
            ids: self.ids,
            ..Lists::default()
        };
        for known in logprobs {
            lists.push(model, known.token, Some(known));
        }
        lists.json()
    }
}

impl Shape for Text {
    fn head(&self, _piece: bool) -> Value {
        json!({"id": self.id, "object": "text_completion", "created": self.created, "model": self.model})
    }

    fn begin(&mut self, choice: usize) -> Option<Value> {
        let text = self.echo.as_ref()?.get(choice / self.n)?;
        self.said[choice] = text.chars().count();
        Some(self.choice(choice, text, Value::Null, None))
    }

    fn piece(
        &mut self,
        model: &Model,
        choice: usize,
        text: &str,
        logprobs: &[Logprob],
    ) -> Vec<Value> {
        let lists = self.lists(model, self.said[choice], logprobs);
        self.said[choice] += text.chars().count();
        vec![self.choice(choice, text, lists, None)]
    }

    fn end(&mut self, _model: &Model, choice: usize, finish: &Finish) -> Vec<Value> {
        let reason = Some(finish.generation.finish_reason);
        vec![self.choice(choice, "", Value::Null, reason)]
    }

    fn whole(&mut self, model: &Model, choice: usize, finish: &Finish) -> Value {
        let of = &finish.generation;
        let before = self
            .echo
            .as_ref()
            .map_or("", |texts| &texts[choice / self.n]);
        let logprobs = match self.logprobs && self.echo.is_some() {
            true => {
                let mut lists = Lists {
                    ids: self.ids,
                    ..Lists::default()
                };
                lists.push(model, finish.tokens[0], None);
                for known in of.prompt_logprobs.iter().chain(&of.logprobs) {
                    lists.push(model, known.token, Some(known));
                }
                lists.json()
            }
            false => self.lists(model, 0, &of.logprobs),
        };
        let text = format!("{before}{}", of.text);
        self.choice(choice, &text, logprobs, Some(of.finish_reason))
    }
}
