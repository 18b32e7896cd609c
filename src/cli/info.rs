//! `zebroid info`: what a checkpoint is, from its headers alone.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::arg::hub::Model;
use super::positive;
use super::show::{bytes, print, print_json, table, thousands};
use crate::Result;
use crate::atomic::parent;
use crate::checkpoint::{Checkpoint, Format, Provenance};
use crate::data::Tokenizer;
use crate::hub::Part;
use crate::mixer::MixerConfig;
use crate::model::ModelConfig;

/// What a checkpoint is: sizes, layer plan, parameters, bytes on the disk, memory at given contexts, tokenizer and origin. Only
/// headers are read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid info ./hybrid\n  \
    zebroid info ./Llama-3.2-1B --contexts 2048,32768,131072\n  \
    zebroid info hybrid-q4_k.gguf --json")]
pub struct Args {
    /// Checkpoint folder of any format, a GGUF file, just a config.json, or a Hugging Face id (of which no weights are downloaded).
    model: Model,
    /// Tokens of a sequence whose memory is shown [default: some up to the model's context].
    #[arg(long, value_parser = positive, value_delimiter = ',', value_name = "TOKENS")]
    contexts: Vec<usize>,
    /// One JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let model = args.model.part(Part::Tokenizer)?;
    let info = Info::read(&model, &args.contexts)?;
    match args.json {
        true => print_json(&info.as_json())?,
        false => print(info.as_text())?,
    }
    Ok(())
}

/// Bytes of a cached scalar (f16, the default of `generate`) and of one of a recurrent state.
const CACHE_BYTES: usize = 2;
const STATE_BYTES: usize = 4;

/// Contexts that are shown where none are asked for, as far as the model's own goes.
const CONTEXTS: [usize; 4] = [2_048, 8_192, 32_768, 131_072];

struct Info {
    path: PathBuf,
    format: Format,
    model_type: Option<String>,
    config: ModelConfig,
    /// None of a config alone.
    opened: Option<Checkpoint>,
    memory: Vec<Memory>,
    /// What `full` is of.
    compared: String,
    tokenizer: Words,
    provenance: Option<Provenance>,
}

/// Bytes of one sequence.
struct Memory {
    tokens: usize,
    cache: usize,
    state: usize,
    /// Of a Transformer's cache.
    full: usize,
}

impl Memory {
    fn share(&self) -> f64 {
        self.cache as f64 / self.full as f64
    }
}

/// What is known of a tokenizer, or why there is none.
struct Words {
    tokenizer: Result<Tokenizer>,
    /// Whether there is a template; why it cannot be used.
    template: Result<bool>,
}

impl Info {
    fn read(path: &Path, contexts: &[usize]) -> Result<Self> {
        let (mut config, format) = Checkpoint::config_only(path)?;
        let opened = match Checkpoint::has_weights(path) {
            true => Some(Checkpoint::open(path)?),
            false => None,
        };
        if let Some(opened) = &opened {
            config = opened.config.clone();
        }
        let folder = match path.is_file() && format != Format::Gguf {
            true => parent(path),
            false => path.to_owned(),
        };
        let provenance = match folder.is_dir() {
            true => Provenance::read(&folder)?,
            false => None,
        };
        let base = provenance.as_ref().and_then(|p| p.base.as_ref());
        let cached = base.and_then(|base| Some((base.name.clone(), base.cache?)));
        let full = |tokens: usize| match &cached {
            Some((_, cache)) => tokens.saturating_mul(cache.scalars / cache.context.max(1)),
            None => config.full_cache(tokens),
        };
        let memory = shown(contexts, config.max_position_embeddings).into_iter();
        let memory = memory.map(|tokens| {
            let cost = config.cost(tokens);
            Memory {
                tokens,
                cache: CACHE_BYTES * cost.cached,
                state: STATE_BYTES * cost.state,
                full: CACHE_BYTES * full(tokens),
            }
        });
        let tokenizer = Tokenizer::open(&folder);
        let template = tokenizer.as_ref().ok().map(|t| t.chat_template());
        Ok(Self {
            path: path.to_owned(),
            format,
            model_type: Checkpoint::model_type(path)?,
            memory: memory.collect(),
            compared: cached.map_or("attention of the same heads".into(), |(name, _)| name),
            tokenizer: Words {
                tokenizer,
                template: template.transpose().map(|found| found.flatten().is_some()),
            },
            opened,
            provenance,
            config,
        })
    }

    /// Layers that follow each other and are the same: first, last, mixer.
    fn runs(&self) -> Vec<(usize, usize, &MixerConfig)> {
        let mut runs: Vec<(usize, usize, &MixerConfig)> = Vec::new();
        for (i, layer) in self.config.layers.iter().enumerate() {
            match runs.last_mut() {
                Some((_, last, mixer)) if *mixer == layer => *last = i,
                _ => runs.push((i, i, layer)),
            }
        }
        runs
    }

    fn as_text(&self) -> String {
        let c = &self.config;
        let path = self.path.display().to_string();
        let mut text = pairs(
            &path,
            &[
                ("format", name(self.format)),
                ("model type", self.model_type.clone().unwrap_or("-".into())),
                ("layers", c.layers.len().to_string()),
                ("hidden size", thousands(c.hidden_size)),
                ("MLP size", thousands(c.intermediate_size)),
                ("embedded tokens", thousands(c.vocab_size)),
                ("context", thousands(c.max_position_embeddings)),
                ("parameters", thousands(c.parameters())),
            ],
        );
        let layers = self.runs().into_iter().map(|(first, last, mixer)| {
            let cost = c.layer_cost(first, 1);
            let which = match first == last {
                true => first.to_string(),
                false => format!("{first}-{last}"),
            };
            vec![
                which,
                mixer.name().into(),
                mixer.show(),
                thousands(cost.params),
                bytes(CACHE_BYTES * cost.cached),
                bytes(STATE_BYTES * cost.state),
            ]
        });
        text += &section(
            &[
                "layer",
                "mixer",
                "sizes",
                "parameters each",
                "cache a token",
                "state",
            ],
            layers.collect(),
        );
        let all = c.parameters() as f64;
        let kinds = c.parameters_by_kind().into_iter().map(|(kind, count)| {
            let share = format!("{:.1} %", 100.0 * count as f64 / all);
            vec![kind.into(), thousands(count), share]
        });
        text += &section(&["parameters of", "", ""], kinds.collect());
        let stored = self.opened.iter().flat_map(Checkpoint::on_disk);
        let stored = stored.map(|(kind, of)| {
            vec![
                kind,
                of.tensors.to_string(),
                thousands(of.entries),
                bytes(of.bytes),
            ]
        });
        text += &section(
            &["on the disk", "tensors", "entries", "bytes"],
            stored.collect(),
        );
        if self.opened.is_none() {
            text += "\nno weights here\n";
        }
        let memory = self.memory.iter().map(|m| {
            vec![
                thousands(m.tokens),
                bytes(m.cache),
                bytes(m.state),
                bytes(m.full),
                format!("{:.2} %", 100.0 * m.share()),
            ]
        });
        text += &section(
            &[
                "tokens",
                "cache (f16)",
                "state (f32)",
                "full KV cache (f16)",
                "cache of it",
            ],
            memory.collect(),
        );
        text += &format!("the full cache is that of {}\n\n", self.compared);
        text += &self.tokenizer.as_text(c);
        if let Some(record) = &self.provenance {
            text += &history(record);
        }
        text
    }

    fn as_json(&self) -> Value {
        let c = &self.config;
        let disk = self.opened.as_ref().map(Checkpoint::on_disk);
        let kinds = c.parameters_by_kind().into_iter();
        let kinds: Map<_, _> = kinds
            .map(|(kind, n)| (kind.to_lowercase(), n.into()))
            .collect();
        let memory = self.memory.iter().map(|m| {
            json!({
                "tokens": m.tokens,
                "cache_bytes": m.cache,
                "state_bytes": m.state,
                "full_cache_bytes": m.full,
                "share": m.share(),
            })
        });
        json!({
            "model": self.path,
            "format": self.format,
            "model_type": self.model_type,
            "config": c,
            "parameters": c.parameters(),
            "parameters_by_kind": kinds,
            "bytes_on_disk": disk.as_ref().map(|d| d.values().map(|of| of.bytes).sum::<usize>()),
            "on_disk": disk,
            "memory": memory.collect::<Vec<_>>(),
            "full_cache_of": self.compared,
            "tokenizer": self.tokenizer.as_json(),
            "provenance": self.provenance,
        })
    }
}

/// The contexts that are asked for, or the usual ones up to the model's own.
fn shown(asked: &[usize], context: usize) -> Vec<usize> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let usual = CONTEXTS.into_iter().filter(|tokens| *tokens < context);
    usual.chain([context]).collect()
}

fn name(format: Format) -> String {
    match format {
        Format::Zebroid => "zebroid",
        Format::Amd => "AMD's hybrid",
        Format::Llama => "Hugging Face",
        Format::Gguf => "GGUF",
    }
    .into()
}

impl Words {
    fn as_text(&self, config: &ModelConfig) -> String {
        let tokenizer = match &self.tokenizer {
            Ok(tokenizer) => tokenizer,
            Err(error) => return format!("no tokenizer: {error}\n"),
        };
        let said = |id: u32| match tokenizer.token(id) {
            Some(token) => format!("{id} {token}"),
            None => id.to_string(),
        };
        let list = |ids: &[u32]| match ids.is_empty() {
            true => "-".to_owned(),
            false => ids
                .iter()
                .map(|id| said(*id))
                .collect::<Vec<_>>()
                .join(", "),
        };
        let special: Vec<u32> = tokenizer.special().into_keys().collect();
        // Llama 3 has 256 of them.
        const LISTED: usize = 8;
        let more = special.len().saturating_sub(LISTED);
        let mut listed = list(&special[..special.len() - more]);
        if more > 0 {
            listed += &format!(" and {more} more");
        }
        let fits = match tokenizer.check(config.vocab_size) {
            Ok(()) => thousands(tokenizer.vocab_size()),
            Err(error) => error.to_string(),
        };
        pairs(
            "tokenizer",
            &[
                ("kind", tokenizer.kind().into()),
                ("tokens", fits),
                (
                    "begin",
                    list(&tokenizer.bos().into_iter().collect::<Vec<_>>()),
                ),
                ("end", list(tokenizer.eos())),
                ("special", listed),
                (
                    "chat template",
                    match &self.template {
                        Ok(true) => "yes".into(),
                        Ok(false) => "none".into(),
                        Err(error) => error.to_string(),
                    },
                ),
            ],
        )
    }

    fn as_json(&self) -> Value {
        let tokenizer = match &self.tokenizer {
            Ok(tokenizer) => tokenizer,
            Err(error) => return json!({ "error": error.to_string() }),
        };
        json!({
            "kind": tokenizer.kind(),
            "tokens": tokenizer.vocab_size(),
            "bos": tokenizer.bos(),
            "eos": tokenizer.eos(),
            "special": tokenizer.special(),
            "chat_template": self.template.as_ref().ok(),
            "chat_template_error": self.template.as_ref().err().map(|e| e.to_string()),
        })
    }
}

/// What it began as and became.
fn history(record: &Provenance) -> String {
    let base = record.base.iter().map(|base| {
        let license = base.license.get("license").cloned();
        vec![
            "base".into(),
            base.name.clone(),
            license.unwrap_or_default(),
            String::new(),
        ]
    });
    let steps = record.steps.iter().map(|step| {
        let inputs: Vec<&str> = step
            .inputs
            .iter()
            .map(|input| input.name.as_str())
            .collect();
        let kl = step.figures.get("eval_kl").map(|kl| format!("KL {kl:.4}"));
        let tokens = step
            .tokens
            .map(|n| format!("{} tokens", thousands(n as usize)));
        vec![
            step.stage.clone(),
            inputs.join(", "),
            tokens.unwrap_or_default(),
            kl.unwrap_or_default(),
        ]
    });
    section(&["made by", "of", "", ""], base.chain(steps).collect())
}

/// Names and values.
fn pairs(title: &str, rows: &[(&str, String)]) -> String {
    let rows = rows
        .iter()
        .map(|(name, value)| vec![(*name).into(), value.clone()]);
    table(&[title, ""], &rows.collect::<Vec<_>>())
}

/// A table below what stands before it, if it has rows.
fn section(headers: &[&str], rows: Vec<Vec<String>>) -> String {
    match rows.is_empty() {
        true => String::new(),
        false => format!("\n{}", table(headers, &rows)),
    }
}
