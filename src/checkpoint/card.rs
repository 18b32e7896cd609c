//! The model card (`README.md`) of a checkpoint: its config and its record in words, with the metadata that the Hugging Face
//! hub reads. Nothing is in it that is not in these two.

use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};

use super::provenance::{CARD, Input, Provenance, Step};
use super::{Checkpoint, Format, write_atomic};
use crate::Result;
use crate::model::ModelConfig;

/// Figures of evaluations, and what the hub is told that they are.
const RESULTS: [(&str, &str, &str); 3] = [
    (
        "eval_kl",
        "kl_divergence",
        "KL to the teacher (nats a token)",
    ),
    ("eval_ce", "cross_entropy", "Cross-entropy (nats a token)"),
    (
        "eval_agreement",
        "agreement",
        "Top-1 agreement with the teacher",
    ),
];

/// Writes the record and the card of a checkpoint of these sizes.
pub(super) fn write(
    folder: &Path,
    record: &Provenance,
    config: &ModelConfig,
    format: Format,
) -> Result<()> {
    record.write(folder)?;
    let card = card(record, config, format);
    write_atomic(&folder.join(CARD), card.as_bytes())
}

/// Adds figures that were measured on `input` to the last step of the checkpoint in `folder`, and to its card. One that has
/// no record is left as it is.
///
/// # Errors
/// A folder that cannot be read or written.
pub fn measured(
    folder: &Path,
    input: Input,
    figures: impl IntoIterator<Item = (String, f64)>,
) -> Result<()> {
    let Some(before) = Provenance::read(folder)? else {
        return Ok(());
    };
    let mut record = before.clone();
    if let Some(step) = record.steps.last_mut() {
        step.inputs.retain(|known| known.role != input.role);
        step.inputs.push(input);
        step.figures.extend(figures);
    }
    if record == before {
        return Ok(());
    }
    let (config, format) = Checkpoint::config_only(folder)?;
    write(folder, &record, &config, format)
}

fn card(record: &Provenance, config: &ModelConfig, format: Format) -> String {
    format!(
        "---\n{}---\n\n# {}\n\n{}{}{}{}{}",
        metadata(record, config, format),
        name(record, config),
        about(record, config),
        layers(config),
        history(record),
        figures(record),
        USE
    )
}

/// How many layers there are of each mixer, in the order of their first.
fn counts(config: &ModelConfig) -> Vec<(&'static str, usize)> {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for layer in &config.layers {
        match counts.iter_mut().find(|(name, _)| *name == layer.name()) {
            Some((_, count)) => *count += 1,
            None => counts.push((layer.name(), 1)),
        }
    }
    counts
}

/// The base's name and the layers: `Llama-3.2-1B-4mla-12mamba2`.
fn name(record: &Provenance, config: &ModelConfig) -> String {
    let base = record.base.as_ref().map_or("model", |base| &base.name);
    let base = base.rsplit('/').next().unwrap_or(base);
    let layers = counts(config).into_iter();
    let layers = layers.map(|(name, count)| format!("-{count}{name}"));
    format!("{base}{}", layers.collect::<String>())
}

/// A string that YAML reads as one: JSON's are.
fn quoted(text: &str) -> Value {
    Value::from(text)
}

/// Whether the hub can know a model by this name.
fn is_repository(name: &str) -> bool {
    let part = |part: &str| {
        let mut letters = part.chars();
        letters.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.is_empty()
            && !part.starts_with(['-', '.'])
    };
    name.split('/').count() <= 2 && name.split('/').all(part)
}

fn metadata(record: &Provenance, config: &ModelConfig, format: Format) -> String {
    let library = match format {
        Format::Llama => "transformers",
        Format::Zebroid | Format::Amd | Format::Gguf => "zebroid",
    };
    let mut yaml = format!("library_name: {library}\npipeline_tag: text-generation\n");
    if let Some(base) = &record.base {
        if is_repository(&base.name) {
            _ = writeln!(yaml, "base_model: {}", quoted(&base.name));
        }
        for (key, value) in &base.license {
            _ = writeln!(yaml, "{key}: {}", quoted(value));
        }
    }
    let counts = counts(config);
    let kinds = counts.iter().map(|(name, _)| *name);
    let hybrid = (counts.len() > 1).then_some("hybrid");
    yaml += "tags:\n- zebroid\n";
    for tag in hybrid.into_iter().chain(kinds) {
        _ = writeln!(yaml, "- {tag}");
    }
    if let Some(results) = results(record) {
        // JSON is YAML.
        let index = json!([{ "name": name(record, config), "results": [results] }]);
        _ = writeln!(yaml, "model-index: {index}");
    }
    yaml
}

/// The evaluation of the weights as they are, as the hub has it.
fn results(record: &Provenance) -> Option<Value> {
    let step = record.last_change()?;
    let text = &step.input("validation")?.name;
    let metrics = RESULTS.iter().filter_map(|(figure, kind, name)| {
        let value = step.figures.get(*figure)?;
        Some(json!({ "type": kind, "name": name, "value": value }))
    });
    let metrics: Vec<Value> = metrics.collect();
    (!metrics.is_empty()).then(|| {
        json!({
            "task": { "type": "text-generation" },
            "dataset": { "name": text, "type": text },
            "metrics": metrics,
        })
    })
}

fn about(record: &Provenance, config: &ModelConfig) -> String {
    let layers = counts(config).into_iter();
    let layers: Vec<String> = layers
        .map(|(name, count)| format!("{count} of `{name}`"))
        .collect();
    let mut text = format!(
        "A language model of {} layers ({}) and {} parameters",
        config.layers.len(),
        layers.join(", "),
        config.parameters()
    );
    match &record.base {
        Some(base) => {
            _ = write!(
                text,
                ", made from `{}` (weights {}).",
                base.spelled(),
                base.hash
            )
        }
        None => text += ".",
    }
    if let Some((ratio, context)) = record.kv_ratio(config) {
        let percent = 100.0 * ratio;
        _ = write!(
            text,
            " Its KV cache is {percent:.2} % of the base's, at {context} tokens."
        );
    }
    text + "\n\n"
}

fn layers(config: &ModelConfig) -> String {
    let mut text = "## Layers\n\n| layer | mixer | sizes |\n|---|---|---|\n".to_owned();
    for (i, layer) in config.layers.iter().enumerate() {
        _ = writeln!(text, "| {i} | {} | {} |", layer.name(), layer.show());
    }
    text + "\n"
}

fn history(record: &Provenance) -> String {
    if record.steps.is_empty() {
        return String::new();
    }
    let each = record.steps.iter().enumerate();
    let each = each.map(|(i, step)| format!("### {}. {}\n\n{}", i + 1, step.stage, lines(step)));
    format!(
        "## How it was made\n\n{}Fingerprints are 64-bit FNV-1a: of texts over their tokens, of models over sizes and weights.\n\n",
        each.collect::<String>()
    )
}

fn lines(step: &Step) -> String {
    let mut text = format!("- by: zebroid {}\n", step.version);
    for input in &step.inputs {
        let (role, name) = (&input.role, input.spelled());
        _ = match &input.hash {
            Some(hash) => writeln!(text, "- {role}: `{name}` ({hash})"),
            None => writeln!(text, "- {role}: `{name}`"),
        };
    }
    if let (Some(steps), Some(tokens)) = (step.steps, step.tokens) {
        _ = writeln!(text, "- trained: {steps} steps, {tokens} tokens");
    }
    let settings = serde_json::to_string_pretty(&step.settings).expect("JSON is written");
    _ = write!(text, "\n```json\n{settings}\n```\n\n");
    text
}

/// What was measured after every step.
fn figures(record: &Provenance) -> String {
    let mut rows = String::new();
    for step in &record.steps {
        // Those of single layers are many.
        let whole = step.figures.iter().filter(|(name, _)| !name.contains('.'));
        for (name, value) in whole {
            _ = writeln!(rows, "| {} | {name} | {value:.6} |", step.stage);
        }
    }
    match rows.is_empty() {
        true => rows,
        false => format!("## Figures\n\n| after | figure | value |\n|---|---|---|\n{rows}\n"),
    }
}

const USE: &str = "## Use\n\n```sh\nzebroid generate ./FOLDER --prompt \"Once upon a time\"\n```\n";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::provenance::{Cache, Origin};
    use crate::checkpoint::tests::config;

    fn record() -> Provenance {
        let inputs = ["data", "validation"].map(|role| {
            let name = format!("{role}.jsonl");
            Input::new(role, name, Some("00ff".into()))
        });
        let mut step = Step::new("kd", json!({ "train": { "lr": 0.5 } }), inputs.into());
        (step.steps, step.tokens) = (Some(4), Some(512));
        step.figures = [("eval_kl", 0.25), ("loss", 1.5)]
            .map(|(name, value)| (name.to_owned(), value))
            .into();
        Provenance {
            base: Some(Origin {
                name: "meta/llama".into(),
                revision: Some("89ab".into()),
                hash: "0123".into(),
                license: [("license".to_owned(), "mit".to_owned())].into(),
                cache: Some(Cache {
                    context: 16,
                    scalars: 2 * config(true).cost(16).cached,
                }),
            }),
            steps: Vec::new(),
        }
        .then(step)
    }

    #[test]
    fn the_card_says_what_the_record_does() {
        let text = card(&record(), &config(true), Format::Zebroid);
        for part in [
            "---\nlibrary_name: zebroid\npipeline_tag: text-generation\nbase_model: \"meta/llama\"\nlicense: \"mit\"\ntags:\n- zebroid\n",
            "\"results\":[{\"task\":{\"type\":\"text-generation\"},\"dataset\":{\"name\":\"validation.jsonl\",",
            "\"type\":\"kl_divergence\",\"name\":\"KL to the teacher (nats a token)\",\"value\":0.25}",
            "\n# llama-",
            "made from `meta/llama@89ab` (weights 0123). Its KV cache is 50.00 % of the base's, at 16 tokens.",
            "| 0 | attention |",
            "### 1. kd\n",
            "- data: `data.jsonl` (00ff)\n",
            "- trained: 4 steps, 512 tokens\n",
            "\"lr\": 0.5",
            "| kd | eval_kl | 0.250000 |",
            "zebroid generate",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        // An export without rounding has the results of what it exports, one with rounding has none.
        let mut export = Step::new("export", json!({}), Vec::new());
        export.same_weights = true;
        let has_results = |record: &Provenance| {
            card(record, &config(true), Format::Llama).contains("model-index")
        };
        assert!(has_results(&record().then(export.clone())));
        export.same_weights = false;
        assert!(!has_results(&record().then(export)));
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let text = card(&Provenance::default(), &config(true), Format::Llama);
        for part in ["license", "base", "model-index", "made", "Figures", "KV"] {
            assert!(!text.contains(part), "{part} is in\n{text}");
        }
        assert!(text.starts_with("---\nlibrary_name: transformers\n"));
    }
}
