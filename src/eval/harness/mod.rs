//! Tasks on a model, as lm-evaluation-harness 0.4 carries them out: the same prompts, few-shot examples,
//! tokens, scores and standard errors, item by item.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::random::PythonRandom;
use super::task::{Document, EXAMPLE, Examples, Metric, Parts, Row, Task};
use crate::checkpoint::{Key, Store};
use crate::data::Tokenizer;
use crate::generate::score::{Tokens, log_likelihoods, survives, tokens};
use crate::model::Lm;
use crate::numerics;
use crate::watch::Watch;
use crate::{Error, Result};

mod data;
mod random;
mod results;
#[cfg(test)]
mod tests;

pub use data::{Dataset, Source};
pub use results::{markdown, to_json};

/// How tasks are run.
#[derive(Debug, Clone)]
pub struct HarnessConfig {
    pub data: Source,
    /// Documents a part of a task (`None`: all).
    pub limit: Option<usize>,
    /// Tokens read at once.
    pub batch_tokens: usize,
    /// Longest input; what is longer loses its beginning.
    pub max_length: usize,
    /// Score what the tokenizer makes of a text that it cannot say.
    pub lossy: bool,
    /// Where results of parts are kept, so that an interrupted evaluation goes on.
    pub cache: PathBuf,
    /// Score again what is kept there.
    pub fresh: bool,
    /// A fingerprint of model and tokenizer.
    pub model: String,
}

/// What one document got.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub doc_id: usize,
    /// Log-likelihood of each request, and whether it is the likeliest token by token.
    pub found: Vec<(f64, bool)>,
    /// One a metric of the task.
    pub scores: Vec<f64>,
}

/// A part of a task: a subject, a paradigm, or the whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartResult {
    /// As lm-evaluation-harness names it.
    pub name: String,
    /// Documents there are; the samples may be fewer.
    pub documents: usize,
    pub samples: Vec<Sample>,
    /// Of all requests, shared contexts counted each time.
    pub tokens: usize,
    pub seconds: f64,
}

#[derive(Clone)]
pub struct TaskResult {
    pub task: &'static Task,
    pub num_fewshot: usize,
    pub parts: Vec<PartResult>,
    /// Of the dataset's files.
    pub data_hash: String,
    pub data_files: Vec<PathBuf>,
    pub revision: Option<String>,
}

/// A figure with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    pub value: f64,
    pub standard_error: f64,
    pub count: usize,
}

/// Of the few-shot samples, as the peer's default.
pub const FEWSHOT_SEED: u32 = 1234;

/// Runs one task; parts that an earlier call finished are read from the cache.
///
/// # Errors
/// A dataset, row or field that is missing, a tokenizer that cannot split a request, a few-shot number that the
/// task cannot give, or [`Error::Interrupted`] (finished parts are kept).
pub fn run_task(
    lm: &Lm,
    tokenizer: &Tokenizer,
    task: &'static Task,
    num_fewshot: usize,
    config: &HarnessConfig,
    watch: &dyn Watch,
) -> Result<TaskResult> {
    // It may have to be downloaded.
    watch.start(&format!("{} data", task.name), 0);
    let opened = Opened::new(task, num_fewshot, &config.data, watch)?;
    let parts = opened
        .parts()
        .map(|part| part.run(lm, tokenizer, config, watch))
        .collect::<Result<_>>()?;
    Ok(TaskResult {
        task,
        num_fewshot,
        parts,
        data_hash: opened.dataset.hash,
        data_files: opened.dataset.files,
        revision: opened.dataset.revision,
    })
}

/// A task's documents, where its examples come from, and its parts.
struct Opened {
    task: &'static Task,
    num_fewshot: usize,
    dataset: Dataset,
    examples: Option<Dataset>,
    /// Name, row numbers in `dataset`, row numbers in `examples`.
    parts: Vec<(String, Vec<usize>, Vec<usize>)>,
}

impl Opened {
    fn new(
        task: &'static Task,
        num_fewshot: usize,
        source: &Source,
        watch: &dyn Watch,
    ) -> Result<Self> {
        let dataset = Dataset::open(source, task, task.split, watch)?;
        let examples = match (task.examples, num_fewshot) {
            (_, 0) => None,
            (Examples::None, n) => {
                return Err(Error::invalid(format!(
                    "{} has its examples in its prompt: {n} more cannot be given",
                    task.name
                )));
            }
            (Examples::Random(split) | Examples::First(split), _) => {
                Some(Dataset::open(source, task, split, watch)?)
            }
        };
        let (rows, names) = divide(task, &dataset)?;
        let parts = names.into_iter().zip(rows).map(|(name, rows)| {
            let shots = match &examples {
                None => Vec::new(),
                Some(examples) => fewshot_rows(task, examples, &name)?,
            };
            Ok((name, rows, shots))
        });
        let parts = parts.collect::<Result<_>>()?;
        Ok(Self {
            task,
            num_fewshot,
            dataset,
            examples,
            parts,
        })
    }

    fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        self.parts.iter().map(|(name, rows, shots)| Part {
            task: self.task,
            name,
            dataset: &self.dataset,
            rows,
            examples: self.examples.as_ref(),
            shots,
            num_fewshot: self.num_fewshot,
        })
    }
}

/// Row numbers of every part, and the parts' names.
fn divide(task: &Task, dataset: &Dataset) -> Result<(Vec<Vec<usize>>, Vec<String>)> {
    let Parts::Field { field, .. } = task.parts else {
        return Ok((
            vec![(0..dataset.rows.len()).collect()],
            vec![task.name.to_owned()],
        ));
    };
    let mut parts: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let name = dataset.name();
    for (index, value) in dataset.rows.iter().enumerate() {
        let row = Row {
            dataset: &name,
            index,
            value,
        };
        let part = format!("{}_{}", task.name, row.text(field)?);
        parts.entry(part).or_default().push(index);
    }
    let (names, rows) = parts.into_iter().unzip();
    Ok((rows, names))
}

/// The rows that a part's examples come from.
fn fewshot_rows(task: &Task, examples: &Dataset, part: &str) -> Result<Vec<usize>> {
    let (rows, names) = divide(task, examples)?;
    let found = names
        .iter()
        .position(|n| n == part)
        .map(|at| rows[at].clone());
    found.ok_or_else(|| Error::invalid(format!("{}: no examples for {part}", examples.name())))
}

struct Part<'a> {
    task: &'static Task,
    name: &'a str,
    dataset: &'a Dataset,
    rows: &'a [usize],
    examples: Option<&'a Dataset>,
    shots: &'a [usize],
    num_fewshot: usize,
}

impl Part<'_> {
    fn run(
        &self,
        lm: &Lm,
        tokenizer: &Tokenizer,
        config: &HarnessConfig,
        watch: &dyn Watch,
    ) -> Result<PartResult> {
        let (store, key) = (
            Store::new(&config.cache),
            self.key(config, lm.decoding_device()),
        );
        let score = || self.score(lm, tokenizer, config, watch);
        match config.fresh {
            true => store.make("part", &key, score),
            false => store.get("part", &key, score),
        }
    }

    fn score(
        &self,
        lm: &Lm,
        tokenizer: &Tokenizer,
        config: &HarnessConfig,
        watch: &dyn Watch,
    ) -> Result<PartResult> {
        let started = std::time::Instant::now();
        let documents = self.documents(config.limit)?;
        let mut requests = Vec::new();
        for (doc_id, (prefix, document)) in documents.iter().enumerate() {
            for (context, continuation) in &document.requests {
                if !config.lossy && !survives(tokenizer, continuation)? {
                    return Err(Error::invalid(format!(
                        "{}, document {doc_id}: the tokenizer cannot say {continuation:?}, so another text would be \
                         scored; --lossy does so",
                        self.name
                    )));
                }
                let context = format!("{prefix}{context}");
                let request = tokens(tokenizer, &context, continuation, config.max_length)?;
                requests.push(request);
            }
        }
        let cut = requests.iter().filter(|r| r.cut > 0).count();
        if cut > 0 {
            tracing::warn!(
                "{}: {cut} of {} contexts lost their beginning to the model's length of {} tokens",
                self.name,
                requests.len(),
                config.max_length
            );
        }
        let found = log_likelihoods(lm, &requests, config.batch_tokens, self.name, watch)?;
        let mut rest = found.as_slice();
        let samples = documents.iter().enumerate().map(|(doc_id, (_, document))| {
            let (own, others) = rest.split_at(document.requests.len());
            rest = others;
            let scores = self.task.metrics.iter().map(|m| document.score(*m, own));
            Sample {
                doc_id,
                found: own.to_vec(),
                scores: scores.collect(),
            }
        });
        Ok(PartResult {
            name: self.name.to_owned(),
            documents: self.rows.len(),
            samples: samples.collect(),
            tokens: requests.iter().map(Tokens::size).sum(),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// All that decides the part's result.
    fn key(&self, config: &HarnessConfig, device: &Device) -> Key {
        let inputs = json!({
            "model": config.model,
            "max_length": config.max_length,
            "part": self.name,
            "version": self.task.version,
            "data": self.dataset.hash,
            "examples": self.examples.map(|e| &e.hash),
            "num_fewshot": self.num_fewshot,
            "limit": config.limit,
            "lossy": config.lossy,
        });
        Key::new(numerics::Stage::Harness, device, inputs)
    }

    /// Documents with what stands before their contexts: description and examples.
    fn documents(&self, limit: Option<usize>) -> Result<Vec<(String, Document)>> {
        let name = self.dataset.name();
        let mut random = PythonRandom::new(FEWSHOT_SEED);
        let count = limit.unwrap_or(usize::MAX).min(self.rows.len());
        let one = |index: &usize| {
            let row = Row {
                dataset: &name,
                index: *index,
                value: &self.dataset.rows[*index],
            };
            let examples = self.sample(row.value, &mut random)?;
            let mut prefix = (self.task.description)(&row)?;
            for example in examples {
                prefix += &(example + EXAMPLE);
            }
            Ok((prefix, (self.task.document)(&row)?))
        };
        self.rows[..count].iter().map(one).collect()
    }

    /// The examples of a document, as text. As lm-evaluation-harness draws them: tasks without a test split
    /// draw one more and leave out the document itself (and draw again among all others where its doubles leave
    /// too few); the others may draw it (RACE, LAMBADA).
    fn sample(&self, document: &Value, random: &mut PythonRandom) -> Result<Vec<String>> {
        let (Some(examples), n) = (self.examples, self.num_fewshot) else {
            return Ok(Vec::new());
        };
        let pool = self.shots;
        let spare = usize::from(self.task.split == "validation");
        let wanted = match self.task.examples {
            Examples::First(_) => n,
            _ => n + spare,
        };
        let enough = |there: usize, wanted: usize| match there < wanted {
            true => Err(Error::invalid(format!(
                "{n} examples for {} asked for, {} has {there}",
                self.name,
                examples.name()
            ))),
            false => Ok(()),
        };
        enough(pool.len(), wanted)?;
        let picked: Vec<usize> = match self.task.examples {
            Examples::First(_) => (0..n).collect(),
            _ => {
                let drawn = random.sample(pool.len(), wanted).into_iter();
                let other = |at: &usize| spare == 0 || examples.rows[pool[*at]] != *document;
                let kept: Vec<usize> = drawn.filter(other).take(n).collect();
                match kept.len() == n {
                    true => kept,
                    false => {
                        let others: Vec<usize> = (0..pool.len()).filter(other).collect();
                        enough(others.len(), n)?;
                        let drawn = random.sample(others.len(), n).into_iter();
                        drawn.map(|at| others[at]).collect()
                    }
                }
            }
        };
        let name = examples.name();
        let text = |at: usize| {
            let row = Row {
                dataset: &name,
                index: pool[at],
                value: &examples.rows[pool[at]],
            };
            Ok((self.task.document)(&row)?.example)
        };
        picked.into_iter().map(text).collect()
    }
}

impl PartResult {
    /// A metric over the samples.
    pub fn figure(&self, task: &Task, metric: Metric) -> Figure {
        let Some(at) = task.metrics.iter().position(|m| *m == metric) else {
            return Figure {
                value: f64::NAN,
                standard_error: f64::NAN,
                count: 0,
            };
        };
        let values: Vec<f64> = self.samples.iter().map(|s| s.scores[at]).collect();
        let (mean, standard_error) = mean(&values);
        match metric {
            // By the slope of `exp`; lm-evaluation-harness draws bootstrap samples.
            Metric::Perplexity => Figure {
                value: (-mean).exp(),
                standard_error: (-mean).exp() * standard_error,
                count: values.len(),
            },
            _ => Figure {
                value: mean,
                standard_error,
                count: values.len(),
            },
        }
    }
}

impl TaskResult {
    /// A metric over all parts (weighed by size where the task says so), with the pooled standard error of
    /// lm-evaluation-harness.
    pub fn figure(&self, metric: Metric) -> Figure {
        let parts: Vec<Figure> = self
            .parts
            .iter()
            .map(|p| p.figure(self.task, metric))
            .collect();
        if let [one] = parts.as_slice() {
            return *one;
        }
        let count: usize = parts.iter().map(|p| p.count).sum();
        let (n, k) = (count as f64, parts.len() as f64);
        let by_size = matches!(
            self.task.parts,
            Parts::Field {
                weigh_by_size: true,
                ..
            }
        );
        let (value, variance) = match by_size {
            true => {
                let value = parts.iter().map(|p| p.value * p.count as f64).sum::<f64>() / n;
                let squares = parts.iter().map(|p| {
                    let size = p.count as f64;
                    (size - 1.0) * p.standard_error.powi(2) * size
                });
                (value, squares.sum::<f64>() / (n - k) / n)
            }
            false => {
                let value = parts.iter().map(|p| p.value).sum::<f64>() / k;
                let squares = parts.iter().map(|p| p.standard_error.powi(2));
                (value, squares.sum::<f64>() / (k * k))
            }
        };
        Figure {
            value,
            standard_error: variance.sqrt(),
            count,
        }
    }

    pub fn tokens(&self) -> usize {
        self.parts.iter().map(|p| p.tokens).sum()
    }

    pub fn seconds(&self) -> f64 {
        self.parts.iter().map(|p| p.seconds).sum()
    }

    pub fn samples(&self) -> usize {
        self.parts.iter().map(|p| p.samples.len()).sum()
    }
}

/// Mean and standard error (of the sample's deviation).
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0)).sqrt() / n.sqrt())
}

/// The longest input that the model was made for.
pub fn max_length(lm: &Lm, asked: Option<usize>) -> Result<usize> {
    match asked {
        Some(0) => Err(Error::invalid("--max-length must not be 0")),
        Some(length) => Ok(length),
        None => Ok(lm.config.max_position_embeddings),
    }
}
