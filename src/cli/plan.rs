//! `zebroid plan`: the hybrid's sizes and costs, from configs alone.

use std::path::PathBuf;

use serde_json::json;

use super::output::{bytes, table, thousands};
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::convert::{LayerKind, PlanOptions, plan};
use crate::mixer::MixerConfig;
use crate::model::ModelConfig;

/// What the hybrid's cache and state would weigh, per layer and in total.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid plan ./Llama-3.2-1B-Instruct --mla 0,5,10,14 --kv-rank 128 --q-rank 1344\n  \
    zebroid plan ./teacher/config.json --layers mla,mamba2,mla,mamba2,mamba2 --json")]
pub struct Args {
    /// Llama checkpoint folder, or just its config.json.
    teacher: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// Which mixers, with which sizes.
#[derive(Debug, Clone, clap::Args)]
pub struct PlanArgs {
    /// Layers that become MLA; the others become Mamba2.
    #[arg(long, value_delimiter = ',', value_name = "I,J,..")]
    pub mla: Vec<usize>,
    /// Layers that keep their attention.
    #[arg(long, value_delimiter = ',', value_name = "I,J,..")]
    pub attention: Vec<usize>,
    /// One mixer a layer, first to last.
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND,..", conflicts_with_all = ["mla", "attention"])]
    pub layers: Option<Vec<LayerKind>>,
    /// Rank of the key/value latent [default: an eighth of the teacher's keys and values].
    #[arg(long)]
    pub kv_rank: Option<usize>,
    /// Rank of the queries [default: three quarters of the teacher's].
    #[arg(long)]
    pub q_rank: Option<usize>,
    /// Rotated dims of a head [default: half].
    #[arg(long)]
    pub rope_dim: Option<usize>,
    /// Un-rotated dims of a head [default: the rest].
    #[arg(long)]
    pub nope_dim: Option<usize>,
    /// RMSNorm on the latents.
    #[arg(long)]
    pub lora_layer_norm: bool,
    /// Latent keys and values for every query head.
    #[arg(long)]
    pub full_kv_head: bool,
    /// Repeat x and B to all heads before the convolution.
    #[arg(long)]
    pub repeat_kv_before_conv: bool,
    /// YaRN in MLA layers: factor over the original window, e.g. 32,8192.
    #[arg(long, value_name = "FACTOR,WINDOW", value_parser = yarn)]
    pub yarn: Option<(f64, usize)>,
    /// Positions a chunk of the Mamba2 scan.
    #[arg(long, default_value_t = 256)]
    pub chunk_size: usize,
}

fn yarn(text: &str) -> std::result::Result<(f64, usize), String> {
    let parts = text
        .split_once(',')
        .ok_or("give FACTOR,WINDOW, e.g. 32,8192")?;
    let factor = parts
        .0
        .parse()
        .map_err(|_| format!("{} is no number", parts.0))?;
    let window = parts
        .1
        .parse()
        .map_err(|_| format!("{} is no number of positions", parts.1))?;
    Ok((factor, window))
}

impl PlanArgs {
    pub fn options(&self, layers: usize) -> Result<PlanOptions> {
        let kinds = match &self.layers {
            Some(kinds) => kinds.clone(),
            None => PlanOptions::place(layers, &self.mla, &self.attention)?,
        };
        Ok(PlanOptions {
            layers: kinds,
            kv_lora_rank: self.kv_rank,
            q_lora_rank: self.q_rank,
            qk_rope_head_dim: self.rope_dim,
            qk_nope_head_dim: self.nope_dim,
            use_lora_layer_norm: self.lora_layer_norm,
            use_full_kv_head: self.full_kv_head,
            repeat_kv_before_conv: self.repeat_kv_before_conv,
            yarn: self.yarn,
            chunk_size: self.chunk_size,
        })
    }

    pub fn student(&self, teacher: &ModelConfig) -> Result<ModelConfig> {
        plan(teacher, &self.options(teacher.layers.len())?)
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let (teacher, _) = Checkpoint::config_only(&args.teacher)?;
    let student = args.plan.student(&teacher)?;
    match args.json {
        true => println!(
            "{}",
            serde_json::to_string_pretty(&as_json(&teacher, &student))?
        ),
        false => print!("{}", as_table(&teacher, &student)),
    }
    Ok(())
}

/// Bytes of a cached scalar: bf16, as everyone quotes it; recurrent states are f32.
const CACHE_BYTES: usize = 2;
const STATE_BYTES: usize = 4;

fn sizes(mixer: &MixerConfig) -> String {
    match mixer {
        MixerConfig::Attention(c) => format!(
            "{}/{} heads x {}",
            c.num_attention_heads, c.num_key_value_heads, c.head_dim
        ),
        MixerConfig::Mla(c) => format!(
            "q {} kv {} rope {} nope {}",
            c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim, c.qk_nope_head_dim
        ),
        MixerConfig::Mamba2(c) => {
            format!("{} heads x {} state {}", c.num_heads, c.head_dim, c.d_state)
        }
    }
}

pub fn as_table(teacher: &ModelConfig, student: &ModelConfig) -> String {
    let row = |name: String, mixer: String, sizes: String, cost: crate::mixer::Cost| {
        vec![
            name,
            mixer,
            sizes,
            thousands(cost.params),
            bytes(cost.kv_per_token * CACHE_BYTES),
            bytes(cost.state * STATE_BYTES),
        ]
    };
    let mut rows: Vec<_> = (0..student.layers.len())
        .map(|i| {
            let mixer = &student.layers[i];
            row(
                i.to_string(),
                mixer.name().into(),
                sizes(mixer),
                student.layer_cost(i),
            )
        })
        .collect();
    rows.push(row(
        "total".into(),
        String::new(),
        String::new(),
        student.cost(),
    ));
    rows.push(row(
        "teacher".into(),
        String::new(),
        String::new(),
        teacher.cost(),
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
        "{}\nKV ratio {:.2} % of the teacher's cache\n",
        table(&headers, &rows),
        100.0 * student.kv_ratio(teacher)
    )
}

pub fn as_json(teacher: &ModelConfig, student: &ModelConfig) -> serde_json::Value {
    let cost = |c: crate::mixer::Cost| {
        json!({
            "parameters": c.params,
            "kv_per_token": c.kv_per_token,
            "kv_bytes_per_token": c.kv_per_token * CACHE_BYTES,
            "state": c.state,
            "state_bytes": c.state * STATE_BYTES,
        })
    };
    let layers: Vec<_> = (0..student.layers.len())
        .map(|i| json!({ "config": student.layers[i], "cost": cost(student.layer_cost(i)) }))
        .collect();
    json!({
        "layers": layers,
        "student": cost(student.cost()),
        "teacher": cost(teacher.cost()),
        "kv_ratio": student.kv_ratio(teacher),
    })
}
