//! Answers under way: told whole when they are done, or piece by piece as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::super::error::{ApiError, apart};
use super::super::models::Model;
use super::super::state::{Client, Server};
use super::super::worker::{Job, Ticket, Told};
use super::fields::Common;
use crate::generate::{Finish, Logprob, SamplingParams};

/// Between events of a stream that has nothing to say, so that nobody on the way takes it for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A prompt, and what a session remembers of its beginning: tokens, and their bytes.
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub stored: Option<(usize, Vec<u8>)>,
}

/// Answers that a model takes now, waiting or under way.
pub struct Places(OwnedSemaphorePermit);

impl Places {
    /// # Errors
    /// A queue that is full, or a server that ends.
    fn take(server: &Server, model: &Model, total: usize) -> Result<Self, ApiError> {
        if server.is_closing() {
            return Err(ApiError::busy("the server is being stopped"));
        }
        let most = model.engine.options.max_batch + server.limits.queue;
        if total > most {
            let said = format!("{total} answers at once: this server takes at most {most}");
            return Err(ApiError::bad(said));
        }
        let places = model.places.clone().try_acquire_many_owned(total as u32);
        places.map(Self).map_err(|_| {
            let name = &model.about.name;
            let said = format!("model {name} has {most} answers under way and waiting");
            ApiError::too_many(said, 1)
        })
    }
}

/// The model that a request names, `total` places in its queue (before anything else is done for the request), and how its answers are
/// drawn.
///
/// # Errors
/// An unknown model, a queue that is full, or a setting out of range.
pub async fn enter(
    server: &Server,
    common: &Common,
    total: usize,
) -> Result<(Arc<Model>, Places, SamplingParams), ApiError> {
    let model = server.models.get(common.model.as_deref()).await?;
    let places = Places::take(server, &model, total)?;
    let vocab = model.engine.decoder.config.vocab_size;
    let params = common.params(&model.about.defaults, vocab)?;
    Ok((model, places, params))
}

/// Answers to one request. Dropping it cancels them.
pub struct Answers {
    server: Arc<Server>,
    client: Client,
    pub model: Arc<Model>,
    told: UnboundedReceiver<Told>,
    /// What came before all prompts were accepted.
    early: VecDeque<Told>,
    _tickets: Vec<Ticket>,
    /// Seconds from the request's first byte to the model.
    waited: f64,
    /// Pieces of text of each answer, until it is done.
    pieces: Vec<usize>,
    /// Tokens of all prompts.
    asked: usize,
    /// Answers to each prompt.
    n: usize,
    left: usize,
    constrained: bool,
    usage: Usage,
}

/// What a request has used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
    drafted: usize,
    accepted: usize,
    /// Of its first answer.
    ttft_s: f64,
    decode_tokens_per_s: f64,
    cache_bytes: usize,
}

impl Usage {
    fn add(&mut self, choice: usize, n: usize, finish: &Finish, waited: f64) {
        let of = &finish.generation;
        // Answers to one prompt share it.
        if choice.is_multiple_of(n) {
            self.prompt += of.prompt_tokens;
            self.cached += of.cached_tokens;
        }
        if choice == 0 {
            (self.ttft_s, self.decode_tokens_per_s) = (waited + of.ttft_s, of.decode_tokens_per_s);
        }
        self.completion += of.completion_tokens;
        self.drafted += of.drafted_tokens;
        self.accepted += of.accepted_tokens;
        self.cache_bytes += of.cache_bytes;
    }

    pub fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }

    /// In OpenAI's newer words.
    pub fn of_response(&self) -> Value {
        json!({
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt + self.completion,
        })
    }

    /// What OpenAI does not tell.
    pub fn timings(&self) -> Value {
        json!({
            "ttft_s": self.ttft_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "cached_tokens": self.cached,
            "cache_bytes": self.cache_bytes,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        })
    }
}

impl Answers {
    /// Hands the prompts in, `n` answers to each, and waits until the model has accepted them; `keeps`: what it remembers is wanted at
    /// the end.
    ///
    /// # Errors
    /// What the model refuses.
    pub async fn begin(
        server: Arc<Server>,
        client: Client,
        model: Arc<Model>,
        Places(mut places): Places,
        prompts: Vec<Prompt>,
        n: usize,
        params: &SamplingParams,
        keeps: bool,
    ) -> Result<Self, ApiError> {
        let total = prompts.len() * n;
        let asked = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let waited = client.begun.elapsed().as_secs_f64();
        let (tell, mut told) = unbounded_channel();
        let mut tickets = Vec::new();
        let (count, mut early) = (prompts.len(), VecDeque::new());
        for (i, prompt) in prompts.into_iter().enumerate() {
            tickets.push(
                model.worker.submit(Job {
                    prompt: prompt.tokens,
                    stored: prompt.stored,
                    keeps,
                    places: places
                        .split(n)
                        .ok_or_else(|| ApiError::bug("a place too few"))?,
                    params: SamplingParams {
                        seed: params.seed.wrapping_add((i * n) as u64),
                        ..params.clone()
                    },
                    choices: i * n..(i + 1) * n,
                    tell: tell.clone(),
                }),
            );
        }
        drop(tell);
        let mut accepted = 0;
        while accepted < count {
            match told.recv().await {
                Some(Told::Accepted) => accepted += 1,
                Some(Told::Failed(error)) => return Err(ApiError::failed(error)),
                Some(other) => early.push_back(other),
                None => return Err(ApiError::bug("the model's thread has ended")),
            }
        }
        Ok(Self {
            server,
            client,
            model,
            told,
            early,
            _tickets: tickets,
            waited,
            pieces: vec![0; total],
            asked,
            n,
            left: total,
            constrained: params.format.is_some(),
            usage: Usage::default(),
        })
    }

    pub fn count(&self) -> usize {
        self.left
    }

    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// What comes next; nothing when all answers are done.
    ///
    /// # Errors
    /// An answer that cannot go on.
    pub async fn next(&mut self) -> Result<Option<Told>, ApiError> {
        if self.left == 0 {
            return Ok(None);
        }
        let told = match self.early.pop_front() {
            Some(told) => Some(told),
            None => self.told.recv().await,
        };
        match told {
            None => Err(ApiError::bug("the model's thread has ended")),
            // A form that nothing can follow is the request's own.
            Some(Told::Failed(error)) if self.constrained => Err(ApiError::failed(error)),
            Some(Told::Failed(error)) => Err(ApiError::bug(error)),
            Some(told) => {
                match &told {
                    Told::Done(choice, finish) => {
                        self.left -= 1;
                        self.pieces[*choice] = 0;
                        self.note(*choice, finish);
                    }
                    Told::Text(choice, ..) => self.pieces[*choice] += 1,
                    Told::Accepted | Told::Failed(_) => {}
                }
                Ok(Some(told))
            }
        }
    }

    fn note(&mut self, choice: usize, finish: &Finish) {
        self.usage.add(choice, self.n, finish, self.waited);
        let of = &finish.generation;
        let first = choice.is_multiple_of(self.n);
        self.server
            .metrics
            .answer(&self.model.about.name, of, self.waited, first);
        let prompt = if first { of.prompt_tokens } else { 0 };
        if let Some(key) = &self.client.key {
            key.charge(prompt + of.completion_tokens);
        }
        tracing::info!(
            request = self.client.request,
            key = self.client.key.as_ref().map(|key| key.name.as_str()),
            model = self.model.about.name,
            choice,
            prompt_tokens = of.prompt_tokens,
            cached_tokens = of.cached_tokens,
            completion_tokens = of.completion_tokens,
            ttft_s = self.waited + of.ttft_s,
            tokens_per_s = of.decode_tokens_per_s,
            finish_reason = of.finish_reason,
            "answered"
        );
    }
}

impl Drop for Answers {
    /// Who leaves early is charged for what came, and counted.
    fn drop(&mut self) {
        if self.left == 0 {
            return;
        }
        let prompt = self.asked - self.usage.prompt;
        let answer = self.pieces.iter().sum();
        if let Some(key) = &self.client.key {
            key.charge(prompt + answer);
        }
        let name = &self.model.about.name;
        self.server.metrics.left(name, self.left, prompt, answer);
        tracing::info!(
            request = self.client.request,
            model = name,
            answers = self.left,
            "left"
        );
    }
}

/// How a kind of answer is written.
pub trait Shape: Send + 'static {
    /// `id`, `object`, `created`, `model`; of a piece, or of the whole.
    fn head(&self, piece: bool) -> Value;
    /// What a stream begins a choice with.
    fn begin(&mut self, choice: usize) -> Option<Value>;
    /// More text of a choice.
    fn piece(
        &mut self,
        model: &Model,
        choice: usize,
        text: &str,
        logprobs: &[Logprob],
    ) -> Vec<Value>;
    /// What a stream ends a choice with.
    fn end(&mut self, model: &Model, choice: usize, finish: &Finish) -> Vec<Value>;
    /// A choice as a whole.
    fn whole(&mut self, model: &Model, choice: usize, finish: &Finish) -> Value;
    /// When all is said.
    ///
    /// # Errors
    /// What could not be kept of it.
    fn after(&mut self, model: &Model, choice: usize, finish: &Finish) -> Result<(), ApiError> {
        let _ = (model, choice, finish);
        Ok(())
    }
}

/// All of it at once.
///
/// # Errors
/// An answer that cannot go on.
pub async fn whole(mut answers: Answers, mut shape: impl Shape) -> Result<Response, ApiError> {
    let mut choices = vec![Value::Null; answers.count()];
    while let Some(told) = answers.next().await? {
        if let Told::Done(choice, finish) = told {
            choices[choice] = shape.whole(&answers.model, choice, &finish);
            shape = kept(shape, &answers.model, choice, finish).await?;
        }
    }
    let mut body = shape.head(false);
    body["choices"] = choices.into();
    body["usage"] = answers.usage.json();
    body["timings"] = answers.usage.timings();
    Ok(Json(body).into_response())
}

/// Calls [`Shape::after`] where it may wait for a disk.
async fn kept<S: Shape>(
    mut shape: S,
    model: &Arc<Model>,
    choice: usize,
    finish: Box<Finish>,
) -> Result<S, ApiError> {
    let model = model.clone();
    apart(move || shape.after(&model, choice, &finish).map(|()| shape)).await
}

/// What is said of answers while they come.
pub trait Speaker: Send + 'static {
    /// Before the first of them.
    fn begin(&mut self, answers: &Answers) -> Vec<Event>;
    /// Of what came; `None`: all has come.
    fn say(
        &mut self,
        answers: &Answers,
        told: Option<Told>,
    ) -> impl Future<Output = Result<Vec<Event>, ApiError>> + Send;
    /// That it ends here.
    fn fail(&mut self, error: &ApiError) -> Event;
}

/// Server-sent events, until all is said or something failed.
pub fn events(answers: Answers, mut speaker: impl Speaker) -> Response {
    let begun = VecDeque::from(speaker.begin(&answers));
    let events = stream::unfold(
        (answers, speaker, begun, false),
        |(mut answers, mut speaker, mut events, mut over)| async move {
            while events.is_empty() && !over {
                let said = match answers.next().await {
                    Ok(told) => {
                        over = told.is_none();
                        speaker.say(&answers, told).await
                    }
                    Err(error) => Err(error),
                };
                match said {
                    Ok(said) => events.extend(said),
                    Err(error) => {
                        over = true;
                        tracing::warn!("a stream ended early: {}", error.message);
                        events.push_back(speaker.fail(&error));
                    }
                }
            }
            let event = events.pop_front()?;
            Some((Ok::<_, Infallible>(event), (answers, speaker, events, over)))
        },
    );
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    Sse::new(events).keep_alive(keep_alive).into_response()
}

/// Piece by piece.
pub fn streamed(answers: Answers, shape: impl Shape, include_usage: bool) -> Response {
    let shape = Some(shape);
    events(
        answers,
        Pieces {
            shape,
            include_usage,
        },
    )
}

/// Chat's and completions' events, of one shape.
struct Pieces<S> {
    /// Away while what is to be kept of an answer is.
    shape: Option<S>,
    include_usage: bool,
}

impl<S: Shape> Speaker for Pieces<S> {
    fn begin(&mut self, answers: &Answers) -> Vec<Event> {
        let shape = self.shape.iter_mut();
        let begun = shape.flat_map(|shape| (0..answers.count()).filter_map(|i| shape.begin(i)));
        let begun: Vec<Value> = begun.collect();
        self.pieces(begun)
    }

    async fn say(&mut self, answers: &Answers, told: Option<Told>) -> Result<Vec<Event>, ApiError> {
        let lost = || ApiError::bug("what was to be kept of the answer is lost");
        let (mut shape, model) = (self.shape.take().ok_or_else(lost)?, &answers.model);
        let mut last = Vec::new();
        let choices = match told {
            Some(Told::Text(choice, text, logprobs)) => {
                shape.piece(model, choice, &text, &logprobs)
            }
            Some(Told::Done(choice, finish)) => {
                let said = shape.end(model, choice, &finish);
                shape = kept(shape, model, choice, finish).await?;
                said
            }
            Some(Told::Accepted | Told::Failed(_)) => Vec::new(),
            None => {
                if self.include_usage {
                    let mut usage = shape.head(true);
                    usage["choices"] = json!([]);
                    usage["usage"] = answers.usage.json();
                    usage["timings"] = answers.usage.timings();
                    last.push(data(&usage));
                }
                last.push(Event::default().data("[DONE]"));
                Vec::new()
            }
        };
        self.shape = Some(shape);
        Ok(self.pieces(choices).into_iter().chain(last).collect())
    }

    fn fail(&mut self, error: &ApiError) -> Event {
        data(&error.body())
    }
}

impl<S: Shape> Pieces<S> {
    /// An event for each piece of a choice.
    fn pieces(&self, choices: Vec<Value>) -> Vec<Event> {
        let event = |choice| {
            let mut piece = self.shape.as_ref()?.head(true);
            piece["choices"] = json!([choice]);
            if self.include_usage {
                piece["usage"] = Value::Null;
            }
            Some(data(&piece))
        };
        choices.into_iter().filter_map(event).collect()
    }
}

fn data(body: &Value) -> Event {
    Event::default().data(body.to_string())
}

/// A token as text: its bytes, where they are no text alone.
pub fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let bytes = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
            format!("bytes:{}", bytes.collect::<String>())
        }
    }
}
