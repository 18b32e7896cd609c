//! `zebroid plan`: the hybrid's sizes and costs, or those of a whole recipe, from configs alone.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::arg::hub::Model;
use super::arg::memory::size;
use super::positive;
use super::show::forecast::{forecast_json, forecast_table};
use super::show::{Progress, bytes, print, print_json, table, thousands};
use crate::checkpoint::Checkpoint;
use crate::convert::{Init, PlanOptions, plan};
use crate::hub::Part;
use crate::model::ModelConfig;
use crate::pipeline::device::Device;
use crate::pipeline::forecast::{changes, forecast};
use crate::pipeline::{Base, Recipe, Variant};
use crate::weights::Place;
use crate::{Error, Result};

/// What the hybrid's cache and state would weigh, per layer and in total; with --train what a recipe would take: memory, disk, tokens,
/// operations and hours of every stage, and what to change where it does not fit. Nothing but configs is read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid plan ./Llama-3.2-1B-Instruct --mla 0,5,10,14 --kv-rank 128 --q-rank 1344\n  \
    zebroid plan ./teacher/config.json --layers mla:16,mamba2,mla:8,mamba2,mamba2 --json\n  \
    zebroid plan ./teacher --mla 0,3 --kv-rank budget:5%\n  \
    zebroid plan HuggingFaceTB/SmolLM2-135M --mla 0,10,20 --kv-rank 64\n  \
    zebroid plan --train recipes/zebra-llama/1b-4mla-12m2.toml\n  \
    zebroid plan --train recipes/zebra-llama/8b-8mla-24m2.toml --device-spec h200 --set kd.train.batch_size=4")]
pub struct Args {
    /// Llama checkpoint folder, just its config.json, or a Hugging Face id [default with --train: the recipe's].
    #[arg(required_unless_present = "train")]
    teacher: Option<Model>,
    #[command(flatten)]
    plan: PlanOptions,
    /// Tokens of a sequence whose cache is shown [default: the teacher's context].
    #[arg(long, value_parser = positive)]
    length: Option<usize>,
    /// A recipe that is to be trained: what every stage would take.
    #[arg(long, value_name = "RECIPE", help_heading = "Training")]
    train: Option<PathBuf>,
    /// The teacher of KD stages that name one of their own: its folder, just its config.json, or its id.
    #[arg(long, requires = "train", help_heading = "Training")]
    kd_teacher: Option<Model>,
    /// Replace what the recipe says: a key as in its file, and a value; may be given again.
    #[arg(
        long,
        value_name = "KEY=VALUE",
        requires = "train",
        help_heading = "Training"
    )]
    set: Vec<String>,
    /// What it would run on: cpu (this machine, measured), a100, h100, h200 or mi300x.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "cpu",
        requires = "train",
        help_heading = "Training"
    )]
    device_spec: String,
    /// Memory that it is to fit into, as 16GiB [default: the device's; of cpu what is free].
    #[arg(long, value_parser = size, requires = "train", help_heading = "Training")]
    memory: Option<usize>,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    if let Some(recipe) = &args.train {
        return Ok(training(&args, recipe)?);
    }
    let said = args.teacher.as_ref();
    let said = said.ok_or_else(|| Error::invalid("name a teacher, or a recipe with --train"))?;
    // Ranks by energy or budget are read off the weights; all else needs the config alone.
    let path = said.part(match args.plan.needs_weights() {
        false => Part::Config,
        true => Part::Whole,
    })?;
    let (teacher, _) = Checkpoint::config_only(&path)?;
    let student = match args.plan.needs_weights() {
        false => plan(&teacher, &args.plan)?,
        true => {
            let init = Init::Published { seed: 0 };
            Base::open(&path, Place::cpu())?.plan(&args.plan, &init)?
        }
    };
    let length = args.length.unwrap_or(teacher.max_position_embeddings);
    match args.json {
        true => print_json(&as_json(&teacher, &student, length))?,
        false => print(as_table(&teacher, &student, length))?,
    }
    Ok(())
}

/// The recipe's variants under more settings, with what the flags replace.
fn variants(args: &Args, recipe: &Path, more: &[String]) -> Result<Vec<Variant>> {
    let settings = [args.set.as_slice(), more].concat();
    let mut variants = Recipe::load_all(recipe, &settings)?;
    for Variant { recipe, .. } in &mut variants {
        recipe.teach(
            args.teacher.as_ref().map(Model::named),
            args.kd_teacher.as_ref().map(Model::named),
        );
    }
    Ok(variants)
}

/// What a recipe would take.
fn training(args: &Args, recipe: &Path) -> Result<()> {
    if args.plan != PlanOptions::default() || args.length.is_some() {
        return Err(Error::invalid(
            "--train takes the plan of its recipe: change it with --set, as in --set plan.kv_lora_rank=64",
        ));
    }
    let device = Device::named(&args.device_spec)?;
    let memory = args.memory.map_or(device.memory, |memory| memory as f64);
    let mut all = Vec::new();
    for (i, variant) in variants(args, recipe, &[])?.iter().enumerate() {
        let fetched = (variant.recipe).fetched(Part::Config, &Progress::default())?;
        let found = forecast(&fetched, &device, memory)?;
        let changed = changes(&found, memory, |more| {
            let other = variants(args, recipe, more)?.swap_remove(i).recipe;
            forecast(&other.taught_as(&fetched), &device, memory)
        })?;
        match args.json {
            true => all.push(forecast_json(variant, &device, memory, &found, &changed)),
            false => print(forecast_table(variant, &device, memory, &found, &changed))?,
        }
    }
    match (args.json, all.as_slice()) {
        (false, _) => Ok(()),
        (true, [one]) => print_json(one),
        (true, all) => print_json(&all),
    }
}

/// Bytes of a cached scalar: bf16, as everyone quotes it; recurrent states are f32.
const CACHE_BYTES: usize = 2;
const STATE_BYTES: usize = 4;

/// Sizes and costs at `length` tokens.
pub fn as_table(teacher: &ModelConfig, student: &ModelConfig, length: usize) -> String {
    let row = |name: String, mixer: String, sizes: String, cost: crate::mixer::Cost| {
        vec![
            name,
            mixer,
            sizes,
            thousands(cost.params),
            bytes((cost.cached * CACHE_BYTES).div_ceil(length)),
            bytes(cost.state * STATE_BYTES),
        ]
    };
    let mut rows: Vec<_> = (0..student.layers.len())
        .map(|i| {
            let mixer = &student.layers[i];
            row(
                i.to_string(),
                mixer.name().into(),
                mixer.show(),
                student.layer_cost(i, length),
            )
        })
        .collect();
    rows.push(row(
        "total".into(),
        String::new(),
        String::new(),
        student.cost(length),
    ));
    rows.push(row(
        "teacher".into(),
        String::new(),
        String::new(),
        teacher.cost(length),
    ));
    let headers = [
        "layer",
        "mixer",
        "sizes",
        "parameters",
        "KV bytes/token (bf16)",
        "state bytes (f32)",
    ];
    format!(
        "{}\nKV ratio {:.2} % of the teacher's cache, at {} tokens\n",
        table(&headers, &rows),
        100.0 * student.kv_ratio(teacher, length),
        thousands(length)
    )
}

pub fn as_json(teacher: &ModelConfig, student: &ModelConfig, length: usize) -> serde_json::Value {
    let cost = |c: crate::mixer::Cost| {
        json!({
            "parameters": c.params,
            "cached": c.cached,
            "cached_bytes": c.cached * CACHE_BYTES,
            "state": c.state,
            "state_bytes": c.state * STATE_BYTES,
        })
    };
    let layers: Vec<_> = (0..student.layers.len())
        .map(
            |i| json!({ "config": student.layers[i], "cost": cost(student.layer_cost(i, length)) }),
        )
        .collect();
    json!({
        "layers": layers,
        "student": cost(student.cost(length)),
        "teacher": cost(teacher.cost(length)),
        "length": length,
        "kv_ratio": student.kv_ratio(teacher, length),
    })
}
