//! `zebroid export`: the same weights, bit for bit or rounded once, in another checkpoint format.

use std::path::PathBuf;

use candle_core::DType;
use serde::Serialize;
use serde_json::json;

use super::arg::hub::Model;
use super::show::print;
use crate::Result;
use crate::checkpoint::{self, Checkpoint, Format, Provenance, Step};
use crate::op::linear::{Matrix, Storage};
use crate::weights::Weights;

/// Write a checkpoint in another format.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid export ./Zebra-Llama-1B-4MLA-12Mamba-SFT ./own --format zebroid\n  \
    zebroid export ./distilled ./small --format zebroid --dtype bf16")]
pub struct Args {
    /// Checkpoint folder of any format, .gguf file or Hugging Face id.
    checkpoint: Model,
    /// Folder to write; must not exist.
    out: PathBuf,
    /// The format to write.
    #[arg(long, value_enum)]
    format: Format,
    /// Round matrices to this type [default: as they are stored]; norms, convolutions and what recurrences are made of stay.
    #[arg(long, value_enum)]
    dtype: Option<Rounding>,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Rounding {
    F32,
    F16,
    Bf16,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let _lock = checkpoint::claim(&args.out, args.force, &[args.checkpoint.named()])?;
    let checkpoint = args.checkpoint.fetch()?;
    let source = Checkpoint::open(&checkpoint)?;
    let stored = source.stored()?;
    let weights = match args.dtype {
        Some(rounding) => rounded(&stored, rounding)?,
        None => stored,
    };
    let record = match args.format {
        Format::Gguf => Provenance::default(),
        format => {
            let settings = json!({ "format": format, "dtype": args.dtype });
            let mut step = Step::new("export", settings, Vec::new());
            step.same_weights = args.dtype.is_none();
            source.provenance()?.then(step)
        }
    };
    checkpoint::save(
        &args.out,
        args.format,
        &source.config,
        &weights,
        Some(&checkpoint),
        &record,
        args.force,
    )?;
    print(format_args!("written to {}\n", args.out.display()))?;
    Ok(())
}

/// # Errors
/// Names the tensor with a value past the type's range.
fn rounded(weights: &Weights, rounding: Rounding) -> Result<Weights> {
    let (dtype, storage) = match rounding {
        Rounding::F32 => (DType::F32, Storage::F32),
        Rounding::F16 => (DType::F16, Storage::F16),
        Rounding::Bf16 => (DType::BF16, Storage::Bf16),
    };
    let all = weights.iter().map(|(name, weight)| {
        let same = matches!(weight, Matrix::Stored(w) if w.storage() == storage);
        if weight.shape().len() != 2 || same {
            return Ok((name.to_owned(), weight.clone()));
        }
        let tensor = weight.to_tensor()?.to_dtype(dtype)?;
        let greatest = tensor.to_dtype(DType::F32)?.abs()?.max_all()?;
        match greatest.to_scalar::<f32>()?.is_finite() {
            true => Ok((name.to_owned(), Matrix::from(tensor))),
            false => Err(crate::Error::invalid(format!(
                "{name} has values past the range of {}: keep it, or choose bf16",
                dtype.as_str()
            ))),
        }
    });
    Ok(all
        .collect::<Result<std::collections::BTreeMap<_, _>>>()?
        .into())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn matrices_are_rounded_and_nothing_else() {
        let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let all = |matrix: Tensor| {
            let all = [("norm", ones(&[3])), ("matrix", matrix)];
            let all = all.map(|(name, tensor)| (name.to_owned(), tensor));
            Weights::new(all.into())
        };
        let half = rounded(&all(ones(&[2, 3])), Rounding::Bf16).unwrap();
        let dtype = |name: &str| half.get(name).unwrap().dtype();
        assert_eq!([dtype("norm"), dtype("matrix")], [DType::F32, DType::BF16]);
        let large = (ones(&[2, 3]) * 1e6).unwrap();
        let message = rounded(&all(large), Rounding::F16).unwrap_err().to_string();
        assert!(
            message.contains("matrix has values past the range of f16"),
            "{message}"
        );
    }
}
