//! `zebroid eval harness`: benchmark tasks, as lm-evaluation-harness runs them.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use super::arg::cache;
use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::positive;
use super::show::{Progress, check_file, print};
use crate::checkpoint::{Checkpoint, write_atomic};
use crate::data::Tokenizer;
use crate::eval::harness::{
    FEWSHOT_SEED, HarnessConfig, Source, TaskResult, markdown, max_length, run_task, to_json,
};
use crate::eval::task::{Examples, GROUPS, Task, find};
use crate::hash::Hash;
use crate::hub::Hub;
use crate::{Error, Result};

/// Run benchmark tasks: prompts, few-shot examples, tokens, scores and standard errors are those of
/// lm-evaluation-harness 0.4, item by item. An interrupted run goes on with the tasks that are left.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid eval harness ./hybrid --tasks arc_easy,piqa,blimp --data-dir ./data --json results.json\n  \
    zebroid eval harness ./hybrid --tasks zebra\n  \
    zebroid eval harness ./hybrid --tasks mmlu --num-fewshot 5 --limit 10 --data-dir ./data --log-samples --json mmlu.json")]
pub struct Args {
    /// Checkpoint folder, .gguf file or Hugging Face id.
    checkpoint: Model,
    /// Tasks and groups (zebra: the paper's eight; fewshot: ARC-25, HellaSwag-10, MMLU-5, WinoGrande-5, TruthfulQA-0).
    #[arg(long, value_delimiter = ',', required = true)]
    tasks: Vec<String>,
    /// Examples before each document [default: 0, or the group's].
    #[arg(long)]
    num_fewshot: Option<usize>,
    /// First documents of every task (of every subject, where a task has several).
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Folder of the datasets: JSON lines, parquet or .arrow with Hugging Face's field names, e.g. arc_easy_test.jsonl
    /// [default: downloaded from Hugging Face; zebroid --help says into which cache].
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Tokens read at once.
    #[arg(long, value_parser = positive, default_value_t = 8192)]
    batch_tokens: usize,
    /// Longest input in tokens [default: the model's max_position_embeddings].
    #[arg(long, value_parser = positive)]
    max_length: Option<usize>,
    /// Score what the tokenizer makes of texts that it cannot say.
    #[arg(long)]
    lossy: bool,
    /// Where the results go, in lm-evaluation-harness's schema.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Keep every document's log-likelihoods and scores in the JSON.
    #[arg(long, requires = "json")]
    log_samples: bool,
    /// Run everything again, whatever an earlier run kept.
    #[arg(long)]
    fresh: bool,
    #[command(flatten)]
    device: DeviceArg,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let tasks = tasks(&args.tasks, args.num_fewshot)?;
    args.json.iter().try_for_each(|path| check_file(path))?;
    let place = args.device.place()?;
    let folder = args.checkpoint.fetch()?;
    let checkpoint = Checkpoint::open(&folder)?;
    let tokenizer = Tokenizer::open(&folder)?;
    tokenizer.check(checkpoint.config.vocab_size)?;
    let parts = checkpoint.parts()?;
    let (fingerprint, lm) = (parts.hash()?, parts.lm(&place.host())?);
    let lm = lm.decoding_on(&place.device);
    let config = HarnessConfig {
        data: match args.data_dir.clone() {
            Some(folder) => Source::Folder(folder),
            None => Source::Hub(Hub::from_env()),
        },
        limit: args.limit.map(|l| l as usize),
        batch_tokens: args.batch_tokens,
        max_length: max_length(&lm, args.max_length)?,
        lossy: args.lossy,
        cache: cache::folder().join("harness"),
        fresh: args.fresh,
        model: Hash::of(format!("{fingerprint} {}", tokenizer.hash()).as_bytes()).to_string(),
    };
    let started = Instant::now();
    let watch = Progress::default();
    let mut results: Vec<TaskResult> = Vec::new();
    for (task, num_fewshot) in tasks {
        let result = run_task(&lm, &tokenizer, task, num_fewshot, &config, &watch);
        results.push(result.map_err(|e| resumable(e, task))?);
    }
    drop(watch);
    let documents: usize = results.iter().map(TaskResult::samples).sum();
    let tokens: usize = results.iter().map(TaskResult::tokens).sum();
    let seconds: f64 = results.iter().map(TaskResult::seconds).sum();
    let all_s = started.elapsed().as_secs_f64();
    if let Some(path) = &args.json {
        let length = checkpoint.config.max_position_embeddings;
        let cost = checkpoint.config.cost(length);
        let about = json!({
            "limit": args.limit,
            "batch_tokens": config.batch_tokens,
            "max_length": config.max_length,
            "fewshot_seed": FEWSHOT_SEED,
            "model_hash": config.model,
            "kv_per_token": cost.cached as f64 / length as f64,
            "state": cost.state,
            "documents_per_second": documents as f64 / seconds,
            "tokens_per_second": tokens as f64 / seconds,
        });
        let model = args.checkpoint.named().display().to_string();
        let all = to_json(&results, &model, about, args.log_samples);
        write_atomic(path, serde_json::to_string_pretty(&all)?.as_bytes())?;
    }
    print(format_args!(
        "{}\n{documents} documents, {:.1} a second ({seconds:.1} s of scoring, {all_s:.1} s in all)\n",
        markdown(&results),
        documents as f64 / seconds,
    ))?;
    Ok(())
}

/// Tasks by name, groups taken apart, each with its number of examples.
fn tasks(names: &[String], num_fewshot: Option<usize>) -> Result<Vec<(&'static Task, usize)>> {
    let mut tasks: Vec<(&'static Task, usize)> = Vec::new();
    let mut add = |name: &str, own: Option<usize>| -> Result<()> {
        let task = find(name)?;
        let asked = match task.examples {
            // Its prompt has examples already.
            Examples::None => 0,
            _ => num_fewshot.or(own).unwrap_or(0),
        };
        tasks.push((task, asked));
        Ok(())
    };
    for name in names {
        match GROUPS.iter().find(|g| g.name == name) {
            Some(group) => (group.tasks.iter()).try_for_each(|(name, own, _)| add(name, *own))?,
            None => add(name, None)?,
        }
    }
    Ok(tasks)
}

fn resumable(error: Error, task: &Task) -> Error {
    match error {
        Error::Interrupted(what) => Error::Interrupted(format!(
            "{}: {what} (finished tasks, and parts of this one, are kept)",
            task.name
        )),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_the_groups_unless_asked_for() {
        let shots = |num_fewshot| -> Vec<(&str, usize)> {
            let found = tasks(&["fewshot".into()], num_fewshot).unwrap();
            found.iter().map(|(task, n)| (task.name, *n)).collect()
        };
        let own = [25, 10, 5, 5, 0];
        let names = [
            "arc_challenge",
            "hellaswag",
            "mmlu",
            "winogrande",
            "truthfulqa_mc2",
        ];
        assert_eq!(shots(None), names.into_iter().zip(own).collect::<Vec<_>>());
        // TruthfulQA's prompt has its examples.
        assert_eq!(
            shots(Some(3))[3..],
            [("winogrande", 3), ("truthfulqa_mc2", 0)]
        );
    }
}
