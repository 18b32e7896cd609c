//! `zebroid plan`: the hybrid's sizes and costs, from configs alone.

use std::path::PathBuf;

use serde_json::json;

use super::positive;
use super::show::{bytes, print, print_json, table, thousands};
use crate::checkpoint::Checkpoint;
use crate::convert::{Init, PlanOptions, plan};
use crate::model::ModelConfig;
use crate::pipeline::Base;
use crate::weights::Place;

/// What the hybrid's cache and state would weigh, per layer and in total.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid plan ./Llama-3.2-1B-Instruct --mla 0,5,10,14 --kv-rank 128 --q-rank 1344\n  \
    zebroid plan ./teacher/config.json --layers mla:16,mamba2,mla:8,mamba2,mamba2 --json\n  \
    zebroid plan ./teacher --mla 0,3 --kv-rank budget:5%")]
pub struct Args {
    /// Llama checkpoint folder, or just its config.json.
    teacher: PathBuf,
    #[command(flatten)]
    plan: PlanOptions,
    /// Tokens of a sequence whose cache is shown [default: the teacher's context].
    #[arg(long, value_parser = positive)]
    length: Option<usize>,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let (teacher, _) = Checkpoint::config_only(&args.teacher)?;
    // Ranks by energy or budget are read off the weights; all else needs the config alone.
    let student = match args.plan.needs_weights() {
        false => plan(&teacher, &args.plan)?,
        true => {
            let init = Init::Published { seed: 0 };
            Base::open(&args.teacher, Place::cpu())?.plan(&args.plan, &init)?
        }
    };
    let length = args.length.unwrap_or(teacher.max_position_embeddings);
    match args.json {
        true => print_json(&as_json(&teacher, &student, length))?,
        false => print(as_table(&teacher, &student, length))?,
    }
    Ok(())
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
