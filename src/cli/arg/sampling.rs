//! How the next token is drawn.

use std::path::{Path, PathBuf};

use crate::generate::{Format, SamplingParams};
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub struct SamplingArg {
    /// 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the K likeliest tokens; 0: all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Only the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Only tokens with at least this share of the likeliest's probability.
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Seed of what is sampled.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Most tokens to add [default: 200, or what the model's context leaves].
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Text that ends the answer (several times: any of them).
    #[arg(long)]
    stop: Vec<String>,
    /// Divides the logits of tokens that were there before; 1: not.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Taken from the logits of tokens that the answer has, -2 to 2.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f64,
    /// The same for every time that it has them, -2 to 2.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f64,
    /// Tell each token's log-probability (with --json), and those of so many likeliest.
    #[arg(long)]
    logprobs: Option<usize>,
    /// The answer is JSON that the schema in this file allows; a text that begins with { is the schema itself.
    #[arg(long, value_name = "FILE", group = "form")]
    json_schema: Option<String>,
    /// The whole answer matches this regular expression.
    #[arg(long, group = "form")]
    regex: Option<String>,
    /// The whole answer is of the grammar in this file, in Lark's syntax, from its rule start.
    #[arg(long, value_name = "FILE", group = "form")]
    grammar: Option<PathBuf>,
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(Error::io("cannot read", path))
}

impl SamplingArg {
    fn format(&self) -> Result<Option<Format>> {
        if let Some(schema) = &self.json_schema {
            let bad =
                |e: serde_json::Error| Error::invalid(format!("the JSON schema is no JSON: {e}"));
            if schema.trim_start().starts_with('{') {
                return Ok(Some(Format::JsonSchema(
                    serde_json::from_str(schema).map_err(bad)?,
                )));
            }
            let path = Path::new(schema);
            let json = serde_json::from_str(&text(path)?);
            let json = json.map_err(|e| Error::file(path, bad(e).to_string()))?;
            return Ok(Some(Format::JsonSchema(json)));
        }
        if let Some(path) = &self.grammar {
            return Ok(Some(Format::Lark(text(path)?)));
        }
        Ok(self.regex.clone().map(Format::Regex))
    }

    /// # Errors
    /// A setting out of range, or a file that cannot be read.
    pub fn params(&self) -> Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: Vec::new(),
            logprobs: self.logprobs,
            prompt_logprobs: None,
            shown_tokens: Vec::new(),
            format: self.format()?,
        };
        params.validate()?;
        Ok(params)
    }
}
