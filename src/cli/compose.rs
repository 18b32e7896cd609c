//! `zebroid compose`: a hybrid checkpoint from a teacher.

use std::path::PathBuf;

use candle_core::{DType, Device};

use super::init::{InitArgs, init};
use super::output::table;
use super::plan::{PlanArgs, as_table};
use crate::checkpoint::{self, Checkpoint, Format};
use crate::convert::{compose, compose_from_bank};

/// Make a hybrid at initialisation, or from the trained layers of an ILD bank.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid compose ./teacher ./hybrid --mla 0,3 --kv-rank 16 --calibration train.jsonl\n  \
    zebroid compose ./teacher ./hybrid --mla 0,3 --kv-rank 16 --init reference\n  \
    zebroid compose ./teacher ./hybrid --mla 2 --bank ./bank")]
pub struct Args {
    /// Llama checkpoint folder.
    teacher: PathBuf,
    /// Folder of the hybrid; must not exist.
    out: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    init: InitArgs,
    /// Take whole layers from this ILD bank (a result of train --stage ild).
    #[arg(long)]
    bank: Option<PathBuf>,
    /// Of what the initialisation draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// zebroid's own format, or AMD's.
    #[arg(long, value_enum, default_value = "zebroid")]
    format: Format,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    checkpoint::check_output(&args.out, args.force)?;
    let teacher = Checkpoint::open(&args.teacher)?;
    let student = args.plan.student(&teacher.config)?;
    let weights = teacher.weights(DType::F32, &Device::Cpu)?;
    let composed = match &args.bank {
        None => {
            let text = args.init.text(&args.teacher, None)?;
            compose(
                &teacher.config,
                &weights,
                &student,
                &init(&text, true, args.seed),
            )?
        }
        Some(bank) => compose_from_bank(&weights, &student, &open_bank(bank)?)?,
    };
    checkpoint::save(
        &args.out,
        args.format,
        &composed.config,
        &composed.tensors,
        Some(&args.teacher),
        args.force,
    )?;
    print!("{}", as_table(&teacher.config, &composed.config));
    let rows: Vec<_> = composed
        .errors
        .iter()
        .enumerate()
        .filter_map(|(i, error)| error.map(|e| vec![i.to_string(), format!("{e:.4}")]))
        .collect();
    if !rows.is_empty() {
        print!(
            "\n{}",
            table(&["layer", "relative error of the mixer's output"], &rows)
        );
    }
    println!("written to {}", args.out.display());
    Ok(())
}

/// The models of an ILD bank: every checkpoint folder inside it.
pub fn open_bank(
    folder: &std::path::Path,
) -> crate::Result<Vec<(crate::model::ModelConfig, crate::weights::Weights)>> {
    let mut models = Vec::new();
    for name in ["mla", "mamba2"] {
        let path = folder.join(name);
        if path.exists() {
            let checkpoint = Checkpoint::open(&path)?;
            let weights = checkpoint.weights(DType::F32, &Device::Cpu)?;
            models.push((checkpoint.config, weights));
        }
    }
    match models.is_empty() {
        true => Err(crate::Error::file(
            folder,
            "no mla/ or mamba2/ checkpoint inside: not an ILD bank",
        )),
        false => Ok(models),
    }
}
