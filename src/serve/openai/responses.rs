//! `/v1/responses`: the plain-text part of OpenAI's newer interface. Nothing is kept between requests.

use std::sync::Arc;

use axum::extract::State;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::error::{ApiError, apart};
use super::super::state::{Client, Server};
use super::super::worker::Told;
use super::answer::{self, Answers, Speaker, Usage};
use super::chat::{Said, conversation, fit};
use super::fields::{Body, Common, ResponseFormat};

#[derive(Debug, Deserialize)]
pub struct Fields {
    input: Input,
    /// Said before all else, as the system.
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    text: Option<TextOptions>,
    previous_response_id: Option<Value>,
    tools: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a text or a list of messages")]
enum Input {
    Text(String),
    Messages(Vec<Map<String, Value>>),
}

#[derive(Debug, Deserialize)]
struct TextOptions {
    format: Option<Value>,
}

impl TextOptions {
    /// As chat completions have it, where schemas lie one deeper.
    fn format(self) -> Result<Option<ResponseFormat>, ApiError> {
        let Some(mut format) = self.format else {
            return Ok(None);
        };
        if format["type"] == "json_schema" {
            format = json!({"type": "json_schema", "json_schema": {"schema": format["schema"]}});
        }
        let read = serde_json::from_value(format);
        read.map(Some)
            .map_err(|e| ApiError::field("text.format", e))
    }
}

/// An answer as far as it has come.
struct Answer {
    id: String,
    item: String,
    model: String,
    created: u64,
    text: String,
    /// Of events so far.
    sequence: usize,
}

pub async fn create(
    State(server): State<Arc<Server>>,
    Extension(client): Extension<Client>,
    body: Body,
) -> Result<Response, ApiError> {
    let mut common: Common = body.read()?;
    let fields: Fields = body.read()?;
    if fields.previous_response_id.is_some() {
        let said = "responses are not kept: send the whole conversation as input";
        return Err(ApiError::field("previous_response_id", said));
    }
    if fields.tools.is_some_and(|tools| !tools.is_empty()) {
        return Err(ApiError::field(
            "tools",
            "tools are known to /v1/chat/completions only",
        ));
    }
    if let Some(text) = fields.text {
        common.response_format = text.format()?;
    }
    let (model, places, mut params) = answer::enter(&server, &common, 1).await?;
    let mut messages = Vec::new();
    let message = |role: &str, text: String| {
        let fields = [("role", role.into()), ("content", text.into())];
        fields
            .map(|(name, value): (&str, Value)| (name.to_owned(), value))
            .into_iter()
            .collect()
    };
    messages.extend(fields.instructions.map(|text| message("system", text)));
    match fields.input {
        Input::Text(text) => messages.push(message("user", text)),
        Input::Messages(all) => {
            let all = all.into_iter().map(texts_only);
            messages.extend(all.collect::<Result<Vec<_>, _>>()?);
        }
    }
    let said = Said {
        messages,
        ..Said::default()
    };
    let (of, asked, most) = (
        model.clone(),
        fields.max_output_tokens,
        server.limits.tokens,
    );
    let (prompt, params) = apart(move || {
        let prompt = conversation(&of, said, None)?.prompt;
        fit(&of, prompt.tokens.len(), asked, most, &mut params)?;
        Ok((prompt, params))
    })
    .await?;
    let answer = Answer {
        id: server.name("resp_"),
        item: server.name("msg_"),
        model: model.about.name.clone(),
        created: super::now(),
        text: String::new(),
        sequence: 0,
    };
    let answers = Answers::begin(
        server,
        client,
        model,
        places,
        vec![prompt],
        1,
        &params,
        false,
    )
    .await?;
    match common.streams() {
        true => Ok(answer::events(answers, answer)),
        false => whole(answers, answer).await,
    }
}

/// Parts of a message, which are named apart here (`input_text`, `output_text`), as one text.
///
/// # Errors
/// Parts that are no text.
fn texts_only(mut message: Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    if let Some(Value::Array(parts)) = message.get("content") {
        let text = |part: &Value| {
            let text = part["text"].as_str().map(str::to_owned);
            text.ok_or_else(|| {
                let said = format!("a part of type {}: only texts are read", part["type"]);
                ApiError::field("input", said)
            })
        };
        let text = parts.iter().map(text).collect::<Result<String, _>>()?;
        message.insert("content".into(), text.into());
    }
    Ok(message)
}

async fn whole(mut answers: Answers, mut answer: Answer) -> Result<Response, ApiError> {
    let mut reason = "stop";
    while let Some(told) = answers.next().await? {
        if let Told::Done(_, finish) = told {
            reason = finish.generation.finish_reason;
            answer.text = finish.generation.text;
        }
    }
    Ok(Json(answer.response(Some(reason), Some(answers.usage()))).into_response())
}

impl Answer {
    fn part(&self) -> Value {
        json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": []})
    }

    fn item(&self, status: &str) -> Value {
        let content = match status {
            "in_progress" => json!([]),
            _ => json!([self.part()]),
        };
        json!({"type": "message", "id": self.item, "status": status, "role": "assistant", "content": content})
    }

    fn response(&self, reason: Option<&str>, usage: Option<&Usage>) -> Value {
        let (status, details) = match reason {
            None => ("in_progress", Value::Null),
            Some("length") => ("incomplete", json!({"reason": "max_output_tokens"})),
            Some(_) => ("completed", Value::Null),
        };
        let output = match reason {
            None => json!([]),
            Some(_) => json!([self.item(status)]),
        };
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "model": self.model,
            "status": status, "incomplete_details": details, "error": null, "output": output,
            "parallel_tool_calls": false, "tool_choice": "none", "tools": [],
            "usage": usage.map(Usage::of_response),
        })
    }

    fn event(&mut self, kind: &str, mut fields: Value) -> Event {
        fields["type"] = kind.into();
        fields["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        Event::default().event(kind).data(fields.to_string())
    }

    /// An event about the answer's only part.
    fn of_part(&mut self, kind: &str, field: &str, value: Value) -> Event {
        let fields = json!({"item_id": self.item, "output_index": 0, "content_index": 0, "logprobs": [], field: value});
        self.event(kind, fields)
    }
}

impl Speaker for Answer {
    fn begin(&mut self, _: &Answers) -> Vec<Event> {
        let begun = json!({"response": self.response(None, None)});
        let item = json!({"output_index": 0, "item": self.item("in_progress")});
        let part = self.part();
        vec![
            self.event("response.created", begun.clone()),
            self.event("response.in_progress", begun),
            self.event("response.output_item.added", item),
            self.of_part("response.content_part.added", "part", part),
        ]
    }

    async fn say(&mut self, answers: &Answers, told: Option<Told>) -> Result<Vec<Event>, ApiError> {
        Ok(match told {
            Some(Told::Text(_, text, _)) => {
                self.text.push_str(&text);
                vec![self.of_part("response.output_text.delta", "delta", text.into())]
            }
            Some(Told::Done(_, finish)) => {
                let reason = finish.generation.finish_reason;
                let (text, part) = (self.text.clone().into(), self.part());
                let response = self.response(Some(reason), Some(answers.usage()));
                let (status, last) = match reason {
                    "length" => ("incomplete", "response.incomplete"),
                    _ => ("completed", "response.completed"),
                };
                let item = json!({"output_index": 0, "item": self.item(status)});
                vec![
                    self.of_part("response.output_text.done", "text", text),
                    self.of_part("response.content_part.done", "part", part),
                    self.event("response.output_item.done", item),
                    self.event(last, json!({"response": response})),
                ]
            }
            Some(Told::Accepted | Told::Failed(_)) | None => Vec::new(),
        })
    }

    fn fail(&mut self, error: &ApiError) -> Event {
        let said = json!({"message": error.message, "code": "server_error", "param": null});
        self.event("error", said)
    }
}
