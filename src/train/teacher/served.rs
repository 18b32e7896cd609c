//! A teacher behind OpenAI's `/v1/completions`, as zebroid and vLLM serve it: prompts of token ids are echoed with the log-probabilities
//! of the likeliest tokens at every place, and one token more is drawn for the sake of those behind the last. Tokens are named by their
//! ids (vLLM's `return_tokens_as_token_ids`): several may have one text.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use super::record::Targets;
use crate::data::{Batch, Tokenizer};
use crate::op::loss::ABSENT;
use crate::watch::Watch;
use crate::{Error, Result};

/// Of one request, the first included.
const ATTEMPTS: u32 = 6;
/// Before the second; doubled before each further one.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest pause that a server can ask for.
const LONGEST: Duration = Duration::from_secs(60);
/// Prompts of a request.
const PROMPTS: usize = 16;
/// Tokens whose texts are compared with ours.
const PROBED: usize = 256;
/// Of the others together, at the least: sums of rounded probabilities are no more exact.
const LEAST: f64 = 1e-7;

pub struct Served {
    agent: ureq::Agent,
    /// With `/v1`.
    address: String,
    pub model: String,
    key: Option<String>,
    vocab_size: usize,
}

impl Served {
    /// The teacher at `address` (`http://host:port/v1`); the only one there, where nobody says which `model`. That its tokens are
    /// those of `tokenizer` is looked at.
    ///
    /// # Errors
    /// A server that cannot be reached, refuses, or has another vocabulary.
    pub fn open(
        address: &str,
        model: Option<&str>,
        key: Option<String>,
        tokenizer: &Tokenizer,
        watch: &dyn Watch,
    ) -> Result<Self> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(600)));
        let mut served = Self {
            agent: config.build().into(),
            address: address.trim_end_matches('/').to_owned(),
            model: model.unwrap_or_default().to_owned(),
            key,
            vocab_size: tokenizer.vocab_size(),
        };
        if model.is_none() {
            served.model = served.only_model(watch)?;
        }
        served.check(tokenizer, watch)?;
        Ok(served)
    }

    /// What records call it.
    pub fn name(&self) -> String {
        format!("{} {}", self.address, self.model)
    }

    fn says(&self, what: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}: {what}", self.address))
    }

    fn only_model(&self, watch: &dyn Watch) -> Result<String> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Named>,
        }
        #[derive(Deserialize)]
        struct Named {
            id: String,
        }
        let found: Models = self.ask("models", None, watch)?;
        let names: Vec<&str> = found.data.iter().map(|model| model.id.as_str()).collect();
        match names[..] {
            [only] => Ok(only.to_owned()),
            _ => Err(self.says(format!(
                "it serves {} models ({}): choose one with --model",
                names.len(),
                names.join(", ")
            ))),
        }
    }

    /// # Errors
    /// Tokens that are spelled otherwise there.
    fn check(&self, tokenizer: &Tokenizer, watch: &dyn Watch) -> Result<()> {
        let special = tokenizer.special();
        let step = self.vocab_size.div_ceil(PROBED).max(1);
        let ids = (0..self.vocab_size as u32).step_by(step);
        let ids: Vec<u32> = ids
            .filter(|id| tokenizer.token(*id).is_some() && !special.contains_key(id))
            .collect();
        let body = self.body(std::slice::from_ref(&ids), 1, false);
        let said = self.choices(body, 1, watch)?.pop().unwrap_or_default();
        let mut compared = 0;
        for (id, theirs) in ids.iter().zip(&said.tokens) {
            let ours = tokenizer.decode(&[*id])?;
            // Parts of characters are spelled in many ways, and spaces before words.
            let partial = |text: &str| {
                text.trim().is_empty() || text.contains('\u{FFFD}') || text.starts_with("bytes:")
            };
            if partial(&ours) || partial(theirs) {
                continue;
            }
            if ours.trim() != theirs.trim() {
                return Err(self.says(format!(
                    "its vocabulary is not that of the tokenizer: token {id} is {theirs:?} there and {ours:?} here; name the tokenizer \
                     that {} has with --tokenizer",
                    self.model
                )));
            }
            compared += 1;
        }
        match 4 * compared >= ids.len() {
            true => Ok(()),
            false => Err(self.says(format!(
                "of {} tokens that were asked for it spells {compared} in whole characters: its vocabulary cannot be compared",
                ids.len()
            ))),
        }
    }

    fn body(&self, prompts: &[Vec<u32>], k: usize, ids: bool) -> Value {
        json!({
            "model": self.model, "prompt": prompts, "echo": true, "max_tokens": 1, "logprobs": k, "temperature": 0,
            "return_tokens_as_token_ids": ids,
        })
    }

    /// What is said of `count` prompts, in their order.
    fn choices(&self, body: Value, count: usize, watch: &dyn Watch) -> Result<Vec<Lists>> {
        let mut answer: Answer = self.ask("completions", Some(body), watch)?;
        answer.choices.sort_by_key(|choice| choice.index);
        let lists = answer.choices.into_iter().map(|choice| choice.logprobs);
        let lists: Vec<Lists> = lists.map(Option::unwrap_or_default).collect();
        match lists.len() == count {
            true => Ok(lists),
            false => Err(self.says(format!("{count} prompts have {} answers", lists.len()))),
        }
    }

    /// The `k` likeliest tokens behind every position. A document reads nothing of those before it.
    pub(super) fn targets(&self, batch: &Batch, k: usize, watch: &dyn Watch) -> Result<Targets> {
        let mut prompts: Vec<Vec<u32>> = Vec::new();
        for (row, ids) in batch.input_ids.chunks(batch.len).enumerate() {
            let starts = batch.documents.row(row);
            let same = |a: &(u32, u32), b: &(u32, u32)| a.1 == b.1;
            let tokens: Vec<(u32, u32)> = ids.iter().copied().zip(starts.iter().copied()).collect();
            let documents = tokens.chunk_by(same);
            prompts.extend(documents.map(|document| document.iter().map(|(id, _)| *id).collect()));
        }
        let mut found = Targets::new(k);
        for prompts in prompts.chunks(PROMPTS) {
            let said = self.choices(self.body(prompts, k, true), prompts.len(), watch)?;
            for (prompt, lists) in prompts.iter().zip(said) {
                self.add(prompt, &lists, &mut found)?;
            }
        }
        Ok(found)
    }

    fn add(&self, prompt: &[u32], lists: &Lists, found: &mut Targets) -> Result<()> {
        if lists.top_logprobs.len() < prompt.len() + 1 {
            return Err(self.says(format!(
                "{} lists of log-probabilities for a prompt of {} tokens and one more: a teacher must tell those of its prompts (echo with \
                 logprobs), as zebroid and vLLM do",
                lists.top_logprobs.len(),
                prompt.len()
            )));
        }
        for (id, named) in prompt.iter().zip(&lists.tokens) {
            match token_id(named) {
                Some(theirs) if theirs == *id => {}
                Some(theirs) => {
                    return Err(self.says(format!("token {id} of a prompt comes back as {theirs}")));
                }
                None => {
                    return Err(self.says(format!(
                        "it names tokens by their texts ({named:?}), of which several may be equal: a teacher must know \
                         return_tokens_as_token_ids, as zebroid and vLLM do"
                    )));
                }
            }
        }
        for at in 1..=prompt.len() {
            let known = lists.top_logprobs[at].iter().flatten();
            let known = known.filter_map(|(name, logprob)| Some((token_id(name)?, *logprob)));
            let within = known.filter(|(id, _)| (*id as usize) < self.vocab_size);
            let mut known: Vec<(u32, f64)> = within.filter(|(_, l)| l.is_finite()).collect();
            if known.is_empty() {
                return Err(self.says(format!("no likeliest token behind token {at} of a prompt")));
            }
            known.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            known.truncate(found.k);
            let mass: f64 = known.iter().map(|(_, logprob)| logprob.exp()).sum();
            let rest = match known.len() == self.vocab_size {
                true => ABSENT,
                false => (1.0 - mass).max(LEAST).ln() as f32,
            };
            let ids: Vec<u32> = known.iter().map(|(id, _)| *id).collect();
            found.push(&ids, known.iter().map(|(_, logprob)| *logprob as f32), rest);
        }
        Ok(())
    }

    /// An answer, once there is one.
    fn ask<T: for<'de> Deserialize<'de>>(
        &self,
        path: &str,
        body: Option<Value>,
        watch: &dyn Watch,
    ) -> Result<T> {
        let mut attempt = 1;
        loop {
            let (why, asked) = match self.once(path, body.as_ref()) {
                Ok((200..300, _, text)) => {
                    return serde_json::from_str(&text)
                        .map_err(|e| self.says(format!("no answer of OpenAI's interface ({e})")));
                }
                Ok((status @ (408 | 429 | 500..), wait, text)) => {
                    (format!("it answers {status} ({})", message(&text)), wait)
                }
                Ok((401 | 403, _, text)) => {
                    let said = message(&text);
                    return Err(
                        self.says(format!("it wants another key ({said}): set OPENAI_API_KEY"))
                    );
                }
                Ok((status, _, text)) => {
                    return Err(self.says(format!("it answers {status} ({})", message(&text))));
                }
                Err(error) => (error.to_string(), None),
            };
            if attempt >= ATTEMPTS {
                let said = format!(
                    "{}: {why}, {attempt} times; is it served there?",
                    self.address
                );
                return Err(Error::Unreachable(said));
            }
            tracing::info!("{}: {why}; asking again", self.address);
            let pause = asked.unwrap_or(PAUSE * 2u32.pow(attempt - 1)).min(LONGEST);
            let until = Instant::now() + pause;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                if watch.stop() {
                    let said = "what is written is kept; run the same command again to go on";
                    return Err(Error::Interrupted(said.into()));
                }
                sleep(left.min(Duration::from_millis(100)));
            }
            attempt += 1;
        }
    }

    /// Status, the pause that is asked for, and what is said.
    fn once(
        &self,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Option<Duration>, String), ureq::Error> {
        let url = format!("{}/{path}", self.address);
        let bearer = self.key.as_ref().map(|key| format!("Bearer {key}"));
        let mut response = match body {
            Some(body) => {
                let mut request = self
                    .agent
                    .post(&url)
                    .header("content-type", "application/json");
                if let Some(bearer) = &bearer {
                    request = request.header("authorization", bearer);
                }
                request.send(body.to_string())?
            }
            None => {
                let mut request = self.agent.get(&url);
                if let Some(bearer) = &bearer {
                    request = request.header("authorization", bearer);
                }
                request.call()?
            }
        };
        let wait = response.headers().get("retry-after");
        let wait = wait.and_then(|wait| wait.to_str().ok()?.parse().ok());
        // Lists of many tokens are long.
        let text = response
            .body_mut()
            .with_config()
            .limit(1 << 30)
            .read_to_string()?;
        Ok((
            response.status().as_u16(),
            wait.map(Duration::from_secs),
            text,
        ))
    }
}

#[derive(Deserialize)]
struct Answer {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    index: usize,
    logprobs: Option<Lists>,
}

/// OpenAI's lists; there is nothing before the first token.
#[derive(Default, Deserialize)]
struct Lists {
    #[serde(default)]
    tokens: Vec<String>,
    #[serde(default)]
    top_logprobs: Vec<Option<BTreeMap<String, f64>>>,
}

/// vLLM's name of a token.
fn token_id(name: &str) -> Option<u32> {
    name.strip_prefix("token_id:")?.parse().ok()
}

/// What a server says went wrong, or the beginning of it.
fn message(text: &str) -> String {
    let json: Value = serde_json::from_str(text).unwrap_or_default();
    let said = json["error"]["message"]
        .as_str()
        .or(json["message"].as_str());
    said.unwrap_or(text).trim().chars().take(300).collect()
}
