//! What a request may say, in OpenAI's words, with vLLM's and llama.cpp's where OpenAI has none.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use rand::TryRng;
use rand::rngs::SysRng;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::super::error::ApiError;
use super::super::models::Defaults;
use super::super::state::Server;
use crate::generate::{Format, SamplingParams};

/// What all kinds of answers have in common.
#[derive(Debug, Deserialize)]
pub struct Common {
    pub model: Option<String>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    /// Negative or 0: all.
    top_k: Option<i64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    seed: Option<i64>,
    n: Option<usize>,
    stop: Option<Texts>,
    logit_bias: Option<BTreeMap<String, f64>>,
    pub response_format: Option<ResponseFormat>,
    // What would change the answer and is not done here.
    functions: Option<Json>,
    suffix: Option<Json>,
    audio: Option<Json>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
pub enum Texts {
    One(String),
    Many(Vec<String>),
}

impl Texts {
    pub fn list(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema {
        json_schema: NamedSchema,
    },
    /// Over the whole answer.
    Regex {
        regex: String,
    },
    /// In Lark's syntax.
    Grammar {
        grammar: String,
    },
}

#[derive(Debug, Clone, Deserialize)]
pub struct NamedSchema {
    schema: Option<Json>,
}

/// Answers to one prompt, at most (OpenAI's).
const MOST_CHOICES: usize = 128;
const MOST_STOPS: usize = 64;
/// Of all stop texts; every answer has a copy.
const MOST_STOP_BYTES: usize = 4 << 10;
/// Of a schema, an expression or a grammar; every answer has a copy.
const MOST_FORMAT_BYTES: usize = 128 << 10;
/// Of likeliest tokens that are told.
pub const MOST_LOGPROBS: usize = 128;
const MOST_BIAS: f64 = 100.0;

impl Common {
    /// Whether the last event of a stream tells how much was used.
    pub fn include_usage(&self) -> bool {
        let options = self.stream_options.as_ref();
        options.and_then(|o| o.include_usage).unwrap_or(false)
    }

    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// # Errors
    /// More choices than anybody needs, or none.
    pub fn choices(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n if (1..=MOST_CHOICES).contains(&n) => Ok(n),
            n => Err(ApiError::field(
                "n",
                format!("n {n} must lie between 1 and {MOST_CHOICES}"),
            )),
        }
    }

    /// How its answers are drawn; `vocab` tokens are known.
    ///
    /// # Errors
    /// A setting out of range, or one that is not known here.
    pub fn params(&self, defaults: &Defaults, vocab: usize) -> Result<SamplingParams, ApiError> {
        for (name, value, said) in [
            (
                "functions",
                &self.functions,
                "functions are gone from OpenAI's interface: use tools",
            ),
            ("suffix", &self.suffix, "a suffix is not known here"),
            ("audio", &self.audio, "there is no audio here"),
        ] {
            if value.is_some() {
                return Err(ApiError::field(name, said));
            }
        }
        let stop = self.stop.clone().map_or_else(Vec::new, Texts::list);
        let bytes: usize = stop.iter().map(String::len).sum();
        if stop.len() > MOST_STOPS || bytes > MOST_STOP_BYTES {
            let said = format!(
                "{} stop texts of {bytes} bytes: at most {MOST_STOPS} of {MOST_STOP_BYTES}",
                stop.len()
            );
            return Err(ApiError::field("stop", said));
        }
        let params = SamplingParams {
            temperature: self.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: match self.top_k {
                Some(k) => usize::try_from(k).unwrap_or(0),
                None => defaults.top_k.unwrap_or(0),
            },
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            seed: match self.seed {
                Some(seed) => seed as u64,
                None => SysRng.try_next_u64().unwrap_or_default(),
            },
            logit_bias: self.logit_bias(vocab)?,
            format: self.format()?,
            stop,
            ..SamplingParams::default()
        };
        params.validate().map_err(|e| {
            let said = e.to_string();
            // It begins with the setting's name.
            let name = said.split(' ').next().unwrap_or_default().to_owned();
            ApiError::field(name, said)
        })?;
        Ok(params)
    }

    fn logit_bias(&self, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let bad = |said: String| ApiError::field("logit_bias", said);
        let all = self.logit_bias.iter().flatten();
        all.map(|(token, bias)| {
            let id = token
                .parse::<u32>()
                .ok()
                .filter(|id| (*id as usize) < vocab);
            let id =
                id.ok_or_else(|| bad(format!("token {token:?} must be an id below {vocab}")))?;
            match bias.abs() <= MOST_BIAS {
                true => Ok((id, *bias as f32)),
                false => Err(bad(format!(
                    "{bias} of token {id} must lie between -100 and 100"
                ))),
            }
        })
        .collect()
    }

    fn format(&self) -> Result<Option<Format>, ApiError> {
        let format = self.written_format();
        let bytes = match &format {
            None => 0,
            Some(Format::JsonSchema(schema)) => schema.to_string().len(),
            Some(Format::Regex(text) | Format::Lark(text)) => text.len(),
        };
        match bytes > MOST_FORMAT_BYTES {
            true => Err(ApiError::field(
                "response_format",
                format!("{bytes} bytes: at most {MOST_FORMAT_BYTES}"),
            )),
            false => Ok(format),
        }
    }

    fn written_format(&self) -> Option<Format> {
        match self.response_format.clone() {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(Format::json_object()),
            Some(ResponseFormat::JsonSchema { json_schema }) => match json_schema.schema {
                Some(schema) => Some(Format::JsonSchema(schema)),
                None => Some(Format::json_object()),
            },
            Some(ResponseFormat::Regex { regex }) => Some(Format::Regex(regex)),
            Some(ResponseFormat::Grammar { grammar }) => Some(Format::Lark(grammar)),
        }
    }
}

/// A body, under the server's limits.
pub struct Body(Bytes);

impl FromRequest<Arc<Server>> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, server: &Arc<Server>) -> Result<Self, ApiError> {
        let limit = server.limits.body;
        let read = axum::body::to_bytes(request.into_body(), limit);
        let read = tokio::time::timeout(server.limits.body_timeout, read).await;
        let Ok(read) = read else {
            let seconds = server.limits.body_timeout.as_secs();
            let said = format!("the body did not come within {seconds} s");
            return Err(ApiError::status(StatusCode::REQUEST_TIMEOUT, said));
        };
        match read {
            Ok(bytes) => Ok(Self(bytes)),
            Err(error) if is_too_large(&error) => {
                let said = format!("the body is larger than {limit} bytes");
                Err(ApiError::status(StatusCode::PAYLOAD_TOO_LARGE, said))
            }
            Err(error) => Err(ApiError::bad(format!(
                "the body did not come whole: {error}"
            ))),
        }
    }
}

fn is_too_large(error: &axum::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Body {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Bytes::copy_from_slice(bytes))
    }

    /// # Errors
    /// What is no JSON, or not what it should be: where.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let mut json = serde_json::Deserializer::from_slice(&self.0);
        let found = serde_path_to_error::deserialize(&mut json);
        let found = found.map_err(|e| {
            let path = e.path().to_string();
            match path.as_str() {
                "." | "?" => ApiError::bad(format!("the body cannot be read: {}", e.inner())),
                _ => ApiError::field(&path, format!("{path}: {}", e.inner())),
            }
        })?;
        let end = json.end();
        end.map_err(|e| ApiError::bad(format!("the body cannot be read: {e}")))?;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn params(body: Json) -> Result<SamplingParams, ApiError> {
        let common: Common = Body(body.to_string().into()).read()?;
        common.choices()?;
        common.params(&Defaults::default(), 100)
    }

    #[test]
    fn settings_are_read_in_openais_words() {
        let found = params(json!({
            "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": -3, "stop": "x", "n": 2,
            "logit_bias": {"7": -100}, "presence_penalty": null, "user": "me",
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        }));
        let found = found.unwrap();
        assert_eq!(
            (found.temperature, found.top_k, found.seed, found.logit_bias),
            (0.5, 0, -3i64 as u64, vec![(7, -100.0)])
        );
        assert_eq!(found.stop, ["x"]);
        assert_eq!(
            found.format,
            Some(Format::JsonSchema(json!({"type": "object"})))
        );
        assert_eq!(params(json!({})).unwrap().temperature, 1.0);
        let of_model = Defaults {
            temperature: Some(0.6),
            ..Defaults::default()
        };
        let common: Common = Body("{}".into()).read().unwrap();
        assert_eq!(common.params(&of_model, 9).unwrap().temperature, 0.6);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"temperature": -1}), "temperature"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"n": 0}), "n"),
            (json!({"n": 1000000}), "n"),
            (json!({"n": -1}), "n"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"stop": 3}), "stop"),
            (json!({"stop": vec!["x"; 100]}), "stop"),
            (json!({"logit_bias": {"100": 1}}), "logit_bias"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 1000}}), "logit_bias"),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
            ),
            (json!({"functions": []}), "functions"),
            (json!({"frequency_penalty": 3}), "frequency_penalty"),
        ] {
            let error = params(body.clone()).unwrap_err();
            assert_eq!(error.status, StatusCode::BAD_REQUEST);
            assert_eq!(
                error.body()["error"]["param"],
                param,
                "{body}: {}",
                error.message
            );
        }
        for bad in [
            "",
            "{",
            "[]",
            "{} {}",
            "{\"temperature\": NaN}",
            "{\"temperature\": 1e999}",
            "\u{0}",
        ] {
            let error = Body(bad.to_owned().into()).read::<Common>().unwrap_err();
            assert_eq!(error.status, StatusCode::BAD_REQUEST, "{bad}");
        }
        let deep = "[".repeat(100_000);
        assert!(
            Body(format!("{{\"stop\": {deep}").into())
                .read::<Common>()
                .is_err()
        );
        assert!(
            Body(Bytes::from_static(b"{\"model\": \"\xff\"}"))
                .read::<Common>()
                .is_err()
        );
    }
}
