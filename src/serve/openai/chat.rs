//! `/v1/chat/completions`: conversations, written as the checkpoint's chat template says.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::error::{ApiError, apart};
use super::super::models::Model;
use super::super::sessions::{NO_SESSIONS, Turn};
use super::super::state::{Client, Server};
use super::answer::{self, Answers, Prompt, Shape, token_text};
use super::fields::{Body, Common, MOST_LOGPROBS};
use crate::data::chat::{ChatTemplate, End, Message, Piece, Rendering, ToolFormat, ToolReader};
use crate::generate::{Finish, Format, Logprob, SamplingParams};

#[derive(Debug, Deserialize)]
pub struct Fields {
    messages: Vec<Map<String, Value>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    /// For templates that retrieve.
    documents: Option<Value>,
    /// Further variables of the template (`enable_thinking`, ..).
    chat_template_kwargs: Option<Map<String, Value>>,
    /// The last message is gone on with, instead of answered.
    continue_final_message: Option<bool>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    /// A name under which the server keeps the conversation.
    session: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "none, auto, required or a function")]
enum ToolChoice {
    Mode(ToolMode),
    Function { function: Named },
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ToolMode {
    None,
    Auto,
    Required,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

/// What a conversation is rendered from.
#[derive(Default)]
pub struct Said {
    pub messages: Vec<Map<String, Value>>,
    pub tools: Value,
    pub documents: Value,
    pub variables: Value,
    pub goes_on: bool,
}

/// A conversation, ready to be read.
pub struct Conversation {
    pub prompt: Prompt,
    /// As the template has written it.
    pub text: String,
}

struct Chat {
    id: String,
    model: String,
    created: u64,
    logprobs: bool,
    kept: Option<Kept>,
    /// How each choice's calls of tools are read, where there are tools.
    readers: Vec<ToolReader>,
    /// Calls of each choice so far.
    calls: Vec<usize>,
    /// Names of calls.
    server: Arc<Server>,
}

/// Where the conversation is kept, and what was said before the answer.
struct Kept {
    turn: Turn,
    messages: Vec<Message>,
    text: String,
}

pub async fn create(
    State(server): State<Arc<Server>>,
    Extension(client): Extension<Client>,
    body: Body,
) -> Result<Response, ApiError> {
    let common: Common = body.read()?;
    let fields: Fields = body.read()?;
    let n = common.choices()?;
    let (model, places, mut params) = answer::enter(&server, &common, n).await?;
    params.logprobs = match (fields.logprobs.unwrap_or(false), fields.top_logprobs) {
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::field(
                "top_logprobs",
                "top_logprobs needs logprobs: true",
            ));
        }
        (true, top) => Some(top.unwrap_or(0)),
    };
    if params.logprobs.is_some_and(|top| top > MOST_LOGPROBS) {
        let said = format!("top_logprobs must be at most {MOST_LOGPROBS}");
        return Err(ApiError::field("top_logprobs", said));
    }
    let asked = fields.max_completion_tokens.or(fields.max_tokens);
    if asked == Some(0) {
        return Err(ApiError::field(
            "max_completion_tokens",
            "an answer has one token at least",
        ));
    }
    let turn = match (&fields.session, &server.sessions) {
        (None, _) => None,
        (Some(_), None) => {
            return Err(ApiError::field("session", NO_SESSIONS));
        }
        (Some(_), Some(_)) if n > 1 => {
            return Err(ApiError::field("n", "a session goes on with one answer"));
        }
        (Some(name), Some(sessions)) => {
            let owner = client.key.as_deref();
            Some(sessions.turn(owner, &model.about.name, name).await?)
        }
    };
    let most = server.limits.tokens;
    let format = match model.about.template.as_ref() {
        Some(template) => tools(&fields, template, &mut params)?,
        None => None,
    };
    let said = Said {
        messages: fields.messages,
        tools: match (&format, fields.tools) {
            (Some(_), Some(tools)) => tools.into(),
            _ => Value::Null,
        },
        documents: fields.documents.unwrap_or_default(),
        variables: fields
            .chat_template_kwargs
            .map_or(Value::Null, Value::Object),
        goes_on: fields.continue_final_message.unwrap_or(false),
    };
    let of = model.clone();
    let (read, params, kept) = apart(move || {
        let plain = turn.is_some().then(|| plain(&said.messages)).transpose()?;
        let read = conversation(&of, said, turn.as_ref())?;
        fit(&of, read.prompt.tokens.len(), asked, most, &mut params)?;
        let kept = turn.zip(plain).map(|(turn, messages)| Kept {
            text: read.text.clone(),
            turn,
            messages,
        });
        Ok((read, params, kept))
    })
    .await?;
    let keeps = kept.is_some();
    let shape = Chat {
        id: server.name("chatcmpl-"),
        model: model.about.name.clone(),
        created: super::now(),
        logprobs: params.logprobs.is_some(),
        kept,
        readers: format.map_or(Vec::new(), |format| vec![ToolReader::new(format); n]),
        calls: vec![0; n],
        server: server.clone(),
    };
    let (streams, usage) = (common.streams(), common.include_usage());
    let answers = Answers::begin(
        server,
        client,
        model,
        places,
        vec![read.prompt],
        n,
        &params,
        keeps,
    )
    .await?;
    match streams {
        true => Ok(answer::streamed(answers, shape, usage)),
        false => answer::whole(answers, shape).await,
    }
}

/// How calls of tools are written, where there are tools that may be called; where one must be, the answer is held to that.
///
/// # Errors
/// A template that knows no tools, or a choice that cannot be made.
fn tools(
    fields: &Fields,
    template: &ChatTemplate,
    params: &mut SamplingParams,
) -> Result<Option<ToolFormat>, ApiError> {
    let tools = fields.tools.as_deref().unwrap_or_default();
    let only = match &fields.tool_choice {
        Some(ToolChoice::Function { function }) => Some(function.name.as_str()),
        _ => None,
    };
    let must = only.is_some()
        || matches!(
            fields.tool_choice,
            Some(ToolChoice::Mode(ToolMode::Required))
        );
    if matches!(fields.tool_choice, Some(ToolChoice::Mode(ToolMode::None)))
        || (tools.is_empty() && !must)
    {
        return Ok(None);
    }
    let Some(format) = ToolFormat::of(template) else {
        let said = "the model's chat template knows no tools (in a format that is known here)";
        return Err(ApiError::field("tools", said));
    };
    if must {
        if params.format.is_some() {
            let said = "an answer is a call or of a response_format: leave one of both out";
            return Err(ApiError::field("tool_choice", said));
        }
        let several = only.is_none() && fields.parallel_tool_calls.unwrap_or(true);
        let grammar = format.grammar(&tools.into(), only, several);
        let grammar = grammar.map_err(|e| ApiError::field("tool_choice", e))?;
        params.format = Some(Format::Lark(grammar));
    }
    params.shown_tokens = format.marks().to_vec();
    Ok(Some(format))
}

/// What a conversation is to the model; where a session has read its beginning, it is not read again.
///
/// # Errors
/// A model without a template, or what the template refuses.
pub fn conversation(
    model: &Model,
    said: Said,
    turn: Option<&Turn>,
) -> Result<Conversation, ApiError> {
    let Some(template) = &model.about.template else {
        let said = format!(
            "model {} has no chat template: use /v1/completions, or start the server with --chat-template FILE (or chatml)",
            model.about.name
        );
        return Err(ApiError::bad(said));
    };
    if said.messages.is_empty() {
        return Err(ApiError::field("messages", "there is no message"));
    }
    for (i, message) in said.messages.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            let said = format!("message {i} has no role");
            return Err(ApiError::field(format!("messages[{i}].role"), said));
        }
    }
    let rendering = Rendering {
        tools: &said.tools,
        documents: &said.documents,
        variables: &said.variables,
        end: match said.goes_on {
            true => End::Continued,
            false => End::Answer,
        },
    };
    let messages = said.messages.into_iter().map(Value::Object).collect();
    let text = template
        .of_openai(&messages)
        .and_then(|messages| template.render_with(&messages, &rendering));
    let text = text.map_err(|e| ApiError::field("messages", e))?;
    let engine = &model.engine;
    let session = turn.map(|turn| turn.open(engine)).transpose();
    let session = session
        .map_err(|e| ApiError::field("session", e))?
        .flatten();
    let (tokens, stored) = match session {
        None => {
            let tokens = engine.tokenizer.encode_plain(&text);
            (tokens.map_err(ApiError::failed)?, None)
        }
        Some(session) => {
            let tokens = session.prompt(engine, &text).map_err(ApiError::failed)?;
            let read = session.read;
            let serves = read > 0 && tokens.starts_with(&session.tokens[..read]);
            (tokens, serves.then_some((read, session.bytes)))
        }
    };
    if tokens.is_empty() {
        return Err(ApiError::field("messages", "the conversation has no token"));
    }
    Ok(Conversation {
        prompt: Prompt { tokens, stored },
        text,
    })
}

/// Gives an answer the tokens that it may have behind a prompt, of those `asked` for and the `most` that the server allows.
///
/// # Errors
/// A prompt that leaves no room, or what the engine refuses.
pub fn fit(
    model: &Model,
    prompt: usize,
    asked: Option<usize>,
    most: Option<usize>,
    params: &mut SamplingParams,
) -> Result<(), ApiError> {
    let room = model.engine.room(prompt);
    if room == 0 {
        let said = format!(
            "the conversation has {prompt} tokens, for which there is no room: the context has {}, the cache {} bytes",
            model.about.context,
            model.engine.pool.limit()
        );
        return Err(ApiError::field("messages", said));
    }
    params.max_tokens = asked.into_iter().chain(most).chain([room]).min();
    let checked = model.engine.check(prompt, params);
    checked.map_err(ApiError::failed)
}

/// Messages as sessions keep them.
fn plain(messages: &[Map<String, Value>]) -> Result<Vec<Message>, ApiError> {
    let all = messages.iter().map(|message| {
        let text = |field: &str| message.get(field)?.as_str().map(str::to_owned);
        let said = "a session keeps messages whose content is a text";
        let bad = || ApiError::field("messages", said);
        Ok(Message {
            role: text("role").ok_or_else(bad)?,
            content: text("content").ok_or_else(bad)?,
        })
    });
    all.collect()
}

impl Chat {
    fn call(&self, name: String, arguments: String) -> Value {
        let id = self.server.call_id();
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
    }

    fn deltas(&mut self, choice: usize, pieces: Vec<Piece>) -> Vec<Value> {
        let pieces = pieces.into_iter().map(|piece| match piece {
            Piece::Text(text) => delta(choice, json!({"content": text}), Value::Null, None),
            Piece::Call { name, arguments } => {
                let mut call = self.call(name, arguments);
                call["index"] = self.calls[choice].into();
                self.calls[choice] += 1;
                delta(choice, json!({"tool_calls": [call]}), Value::Null, None)
            }
        });
        pieces.collect()
    }

    fn reason(&self, choice: usize, finish: &Finish) -> &'static str {
        match finish.generation.finish_reason {
            "stop" if self.calls[choice] > 0 => "tool_calls",
            reason => reason,
        }
    }

    fn lists(&self, model: &Model, logprobs: &[Logprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let one = |token: u32, logprob: f64| {
            let bytes = model.engine.token_bytes(token);
            json!({"token": token_text(&bytes), "logprob": logprob, "bytes": bytes})
        };
        let all = logprobs.iter().map(|known| {
            let mut of = one(known.token, known.logprob);
            let top = known
                .top
                .iter()
                .map(|(token, logprob)| one(*token, *logprob));
            of["top_logprobs"] = top.collect();
            of
        });
        json!({"content": all.collect::<Vec<Value>>(), "refusal": null})
    }
}

fn delta(choice: usize, delta: Value, logprobs: Value, reason: Option<&str>) -> Value {
    json!({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
}

impl Shape for Chat {
    fn head(&self, piece: bool) -> Value {
        let object = match piece {
            true => "chat.completion.chunk",
            false => "chat.completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model})
    }

    fn begin(&mut self, choice: usize) -> Option<Value> {
        let begin = json!({"role": "assistant", "content": ""});
        Some(delta(choice, begin, Value::Null, None))
    }

    fn piece(
        &mut self,
        model: &Model,
        choice: usize,
        text: &str,
        logprobs: &[Logprob],
    ) -> Vec<Value> {
        let lists = self.lists(model, logprobs);
        let Some(reader) = self.readers.get_mut(choice) else {
            return vec![delta(choice, json!({"content": text}), lists, None)];
        };
        let pieces = reader.push(text);
        let mut said = self.deltas(choice, pieces);
        // Of a text that is held back too.
        match said.first_mut() {
            Some(first) => first["logprobs"] = lists,
            None if self.logprobs => said.push(delta(choice, json!({}), lists, None)),
            None => {}
        }
        said
    }

    fn end(&mut self, _model: &Model, choice: usize, finish: &Finish) -> Vec<Value> {
        let rest = self
            .readers
            .get(choice)
            .map(|reader| reader.clone().finish());
        let mut said = self.deltas(choice, rest.unwrap_or_default());
        let reason = self.reason(choice, finish);
        said.push(delta(choice, json!({}), Value::Null, Some(reason)));
        said
    }

    fn whole(&mut self, model: &Model, choice: usize, finish: &Finish) -> Value {
        let of = &finish.generation;
        let mut message = json!({"role": "assistant", "content": of.text, "refusal": null});
        if let Some(reader) = self.readers.get(choice) {
            let mut reader = reader.clone();
            let mut pieces = reader.push(&of.text);
            pieces.extend(reader.finish());
            let (mut text, mut calls) = (String::new(), Vec::new());
            for piece in pieces {
                match piece {
                    Piece::Text(more) => text.push_str(&more),
                    Piece::Call { name, arguments } => calls.push(self.call(name, arguments)),
                }
            }
            self.calls[choice] = calls.len();
            message["content"] = match (text.is_empty(), calls.is_empty()) {
                (true, false) => Value::Null,
                _ => text.into(),
            };
            if !calls.is_empty() {
                message["tool_calls"] = calls.into();
            }
        }
        json!({
            "index": choice,
            "message": message,
            "logprobs": self.lists(model, &of.logprobs),
            "finish_reason": self.reason(choice, finish),
        })
    }

    fn after(&mut self, model: &Model, _choice: usize, finish: &Finish) -> Result<(), ApiError> {
        let Some(kept) = self.kept.take() else {
            return Ok(());
        };
        let mut messages = kept.messages;
        messages.push(Message {
            role: "assistant".into(),
            content: finish.generation.text.clone(),
        });
        let saved = kept.turn.save(&model.engine, messages, kept.text, finish);
        saved.map_err(|e| {
            ApiError::bug(format!(
                "the answer is whole, the session was not kept: {e}"
            ))
        })
    }
}
