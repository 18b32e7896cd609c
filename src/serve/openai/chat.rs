//! `/v1/chat/completions`: conversations, written as the checkpoint's chat template says.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::models::Model;
use super::super::sessions::Turn;
use super::super::state::{Client, Server};
use super::answer::{self, Answers, Prompt, Shape, token_text};
use super::fields::{Body, Common, MOST_LOGPROBS};
use crate::data::chat::Message;
use crate::generate::{Finish, Logprob, SamplingParams};

#[derive(Debug, Deserialize)]
struct Fields {
    messages: Vec<Map<String, Value>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    /// A name under which the server keeps the conversation.
    session: Option<String>,
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
    let model = server.models.get(common.model.as_deref()).await?;
    let mut params = common.params(
        &model.about.defaults,
        model.engine.decoder.config.vocab_size,
    )?;
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
            let said = "this server keeps no sessions: start it with --sessions FOLDER";
            return Err(ApiError::field("session", said));
        }
        (Some(_), Some(_)) if n > 1 => {
            return Err(ApiError::field("n", "a session goes on with one answer"));
        }
        (Some(name), Some(sessions)) => Some(sessions.turn(&model.about.name, name).await?),
    };
    let tools = match fields.tool_choice.as_ref().and_then(Value::as_str) {
        Some("none") => None,
        _ => fields.tools,
    };
    let most = server.limits.tokens;
    let (of, messages) = (model.clone(), fields.messages);
    let prepare = move || -> Result<(Conversation, SamplingParams, Option<Kept>), ApiError> {
        let plain = turn.is_some().then(|| plain(&messages)).transpose()?;
        let read = conversation(&of, messages, tools, turn.as_ref())?;
        params.max_tokens = Some(room(&of, read.prompt.tokens.len(), asked, most)?);
        of.engine
            .check(read.prompt.tokens.len(), &params)
            .map_err(ApiError::failed)?;
        let kept = turn.zip(plain).map(|(turn, messages)| Kept {
            text: read.text.clone(),
            turn,
            messages,
        });
        Ok((read, params, kept))
    };
    let prepared = tokio::task::spawn_blocking(prepare)
        .await
        .map_err(ApiError::bug)?;
    let (read, params, kept) = prepared?;
    let shape = Chat {
        id: server.name("chatcmpl-"),
        model: model.about.name.clone(),
        created: super::now(),
        logprobs: params.logprobs.is_some(),
        kept,
    };
    let (streams, usage) = (common.streams(), common.include_usage());
    let answers = Answers::begin(server, client, model, vec![read.prompt], n, &params).await?;
    match streams {
        true => Ok(answer::streamed(answers, shape, usage)),
        false => answer::whole(answers, shape).await,
    }
}

/// What a conversation is to the model; where a session has read its beginning, it is not read again.
///
/// # Errors
/// A model without a template, or what the template refuses.
pub fn conversation(
    model: &Model,
    messages: Vec<Map<String, Value>>,
    tools: Option<Vec<Value>>,
    turn: Option<&Turn>,
) -> Result<Conversation, ApiError> {
    let Some(template) = &model.about.template else {
        let said = format!(
            "model {} has no chat template: use /v1/completions, or start the server with --chat-template FILE (or chatml)",
            model.about.name
        );
        return Err(ApiError::bad(said));
    };
    if messages.is_empty() {
        return Err(ApiError::field("messages", "there is no message"));
    }
    for (i, message) in messages.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            let said = format!("message {i} has no role");
            return Err(ApiError::field(format!("messages[{i}].role"), said));
        }
    }
    let messages = messages.into_iter().map(Value::Object).collect();
    let tools = tools
        .filter(|tools| !tools.is_empty())
        .map_or(Value::Null, Value::Array);
    let text = template.render_json(&messages, &tools, true);
    let text = text.map_err(|e| ApiError::field("messages", e))?;
    let engine = &model.engine;
    let session = turn.map(|turn| turn.open(engine)).transpose();
    let session = session.map_err(|e| ApiError::field("session", e))?;
    let (tokens, memory) = match session {
        None => (
            engine
                .tokenizer
                .encode_plain(&text)
                .map_err(ApiError::failed)?,
            None,
        ),
        Some(session) => {
            let tokens = session.prompt(engine, &text).map_err(ApiError::failed)?;
            let read = session.memory.len();
            let serves = tokens.starts_with(&session.tokens[..read]);
            (tokens, serves.then_some(session.memory))
        }
    };
    if tokens.is_empty() {
        return Err(ApiError::field("messages", "the conversation has no token"));
    }
    Ok(Conversation {
        prompt: Prompt { tokens, memory },
        text,
    })
}

/// Tokens that an answer may have behind a prompt.
///
/// # Errors
/// A prompt that leaves no room.
pub fn room(
    model: &Model,
    prompt: usize,
    asked: Option<usize>,
    most: Option<usize>,
) -> Result<usize, ApiError> {
    let room = model.engine.room(prompt);
    if room == 0 {
        let said = format!(
            "the conversation has {prompt} tokens, for which there is no room: the context has {}, the cache {} bytes",
            model.about.context,
            model.engine.pool.limit()
        );
        return Err(ApiError::field("messages", said));
    }
    Ok(room
        .min(asked.unwrap_or(usize::MAX))
        .min(most.unwrap_or(usize::MAX)))
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
        vec![delta(choice, json!({"content": text}), lists, None)]
    }

    fn end(&mut self, _model: &Model, choice: usize, finish: &Finish) -> Vec<Value> {
        let reason = Some(finish.generation.finish_reason);
        vec![delta(choice, json!({}), Value::Null, reason)]
    }

    fn whole(&mut self, model: &Model, choice: usize, finish: &Finish) -> Value {
        let of = &finish.generation;
        json!({
            "index": choice,
            "message": {"role": "assistant", "content": of.text, "refusal": null},
            "logprobs": self.lists(model, &of.logprobs),
            "finish_reason": of.finish_reason,
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
