//! `zebroid quantize`: matrices in blocks of 8, 6 or 4 bits, in a GGUF file, or in 8 bits with an exponent each, in a folder.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::arg::data;
use super::arg::hub::Model;
use super::positive;
use super::show::{Progress, bytes, check_file, print, print_json, table, thousands};
use crate::checkpoint::{self, Checkpoint, Format, Step, save_gguf, write_atomic};
use crate::convert::quantize::{
    Importance, check, encoded, float8, importance, storage, takes_float8,
};
use crate::data::{Batches, Corpus, Packing, Tokenizer};
use crate::eval::kl::{self, KlReport};
use crate::op::blocks::BlockType;
use crate::op::linear::{Matrix, Storage};
use crate::pipeline::Text;
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

/// Round a model's matrices into blocks and write them as GGUF. Norms, convolutions and what recurrences are made of stay in f32;
/// rows that are no whole blocks of the type become Q8_0, or 16 bits. In f8_e4m3 what multiplies within layers gets 8 bits an entry and
/// a scale a row, in a folder of safetensors that others read (Q8_0 loses less); embedding and head become 16 bits. Ends with what the rounding costs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid quantize ./hybrid hybrid-q4_k.gguf --type q4_k --calibration train.jsonl --validation held-out.jsonl\n  \
    zebroid quantize ./teacher teacher-q8_0.gguf --type q8_0\n  \
    zebroid quantize ./teacher ./teacher-f8 --type f8_e4m3 --validation held-out.jsonl")]
pub struct Args {
    /// Checkpoint folder of any format, with its tokenizer, a GGUF file, or a Hugging Face id.
    checkpoint: Model,
    /// File to write (.gguf), for f8_e4m3 a folder; must not exist.
    out: PathBuf,
    /// Type of the matrices: of blocks q8_0, q6_k, q4_k or q4_0; or f8_e4m3.
    #[arg(long = "type", value_name = "TYPE", value_parser = kind)]
    kind: Storage,
    /// Texts that say what an error in each weight is worth (of blocks).
    #[arg(long, value_name = "TEXT")]
    calibration: Vec<Text>,
    /// Tokens of it that are read.
    #[arg(long, value_parser = positive, value_name = "TOKENS", default_value_t = 65_536)]
    calibration_tokens: usize,
    /// Where to keep the mean square of every input of every matrix, as JSON (llama.cpp's importance matrix).
    #[arg(long, requires = "calibration")]
    save_importance: Option<PathBuf>,
    /// Texts that the result is measured on [default: not measured].
    #[arg(long, value_name = "TEXT")]
    validation: Vec<Text>,
    /// Tokens per window of either text.
    #[arg(long, value_parser = positive, default_value_t = 256)]
    seq_len: usize,
    /// Windows of the validation text per forward pass.
    #[arg(long, value_parser = positive, default_value_t = 8)]
    batch_size: usize,
    /// Replace OUT if it exists.
    #[arg(long)]
    force: bool,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// # Errors
/// A name of none.
fn kind(name: &str) -> Result<Storage> {
    if name == Storage::F8E4M3.name() {
        return Ok(Storage::F8E4M3);
    }
    let kind = name.parse::<BlockType>().map(Storage::Blocks);
    kind.map_err(|e| Error::invalid(format!("{e}, or {}", Storage::F8E4M3.name())))
}

/// # Errors
/// A name for the output that its type cannot have, or texts that it has no use for.
fn check_args(args: &Args) -> Result<()> {
    let wrong = match (args.kind, crate::gguf::Gguf::is_named(&args.out)) {
        (Storage::Blocks(_), false) => {
            "matrices in blocks are written as GGUF: give a name that ends in .gguf"
        }
        (Storage::F8E4M3, true) => "GGUF has no f8_e4m3: give the name of a folder, or --type q8_0",
        _ if args.kind == Storage::F8E4M3 && !args.calibration.is_empty() => {
            return Err(Error::invalid(
                "f8_e4m3 rounds every entry by its own exponent, whatever it is worth: leave out --calibration",
            ));
        }
        _ => return Ok(()),
    };
    Err(Error::file(&args.out, wrong))
}

pub fn run(args: Args) -> anyhow::Result<()> {
    check_args(&args)?;
    let texts = args.calibration.iter().chain(&args.validation);
    let texts = texts.filter_map(Text::source);
    let inputs: Vec<&Path> = [args.checkpoint.named()].into_iter().chain(texts).collect();
    let _lock = checkpoint::claim(&args.out, args.force, &inputs)?;
    args.save_importance
        .iter()
        .try_for_each(|path| check_file(path))?;
    let checkpoint = args.checkpoint.fetch()?;
    let source = Checkpoint::open(&checkpoint)?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    tokenizer.check(source.config.vocab_size)?;
    let parts = source.parts()?;
    if let Storage::Blocks(kind) = args.kind {
        check(kind, &parts)?;
    }
    let watch = Progress::default();
    let text = |texts: &[Text]| -> Result<Option<Corpus>> {
        if texts.is_empty() {
            return Ok(None);
        }
        let corpus = data::corpus(texts, &tokenizer, Packing::Documents, &watch)?;
        corpus.check(1, args.seq_len)?;
        Ok(Some(corpus))
    };
    let (calibration, validation) = (text(&args.calibration)?, text(&args.validation)?);
    let worth = match &calibration {
        Some(text) => importance(&parts, text, args.calibration_tokens, args.seq_len, &watch)?,
        None => Importance::default(),
    };
    if let Some(path) = &args.save_importance {
        let all: std::collections::BTreeMap<_, _> = worth.iter().collect();
        write_atomic(path, serde_json::to_string(&all)?.as_bytes())?;
    }
    let (config, weights) = (&parts.config, &parts.weights);
    match args.kind {
        Storage::Blocks(kind) => {
            let matrices = weights.iter().filter(|(_, w)| w.shape().len() == 2);
            let matrices = matrices.count();
            let done = std::cell::Cell::new(0);
            watch.start("quantize", matrices);
            let encode = |name: &str, weight: &Matrix, storage: Storage| {
                let bytes = encoded(name, weight, storage, &worth)?;
                done.set(done.get() + 1);
                watch.reached(done.get(), matrices, "matrices")?;
                Ok(bytes)
            };
            let kept = |_: &str, weight: &Matrix| storage(kind, weight);
            save_gguf(
                &args.out,
                config,
                weights,
                &checkpoint,
                args.force,
                &kept,
                &encode,
            )?;
        }
        _ => {
            let rounded = float8(weights, &watch)?;
            let format = match source.format {
                Format::Llama => Format::Llama,
                _ => Format::Zebroid,
            };
            let settings = json!({ "type": args.kind.name() });
            let record = source
                .provenance()?
                .then(Step::new("quantize", settings, Vec::new()));
            let from = Some(checkpoint.as_path());
            checkpoint::save(
                &args.out, format, config, rounded, from, &record, args.force,
            )?;
        }
    }
    let written = Checkpoint::open(&args.out)?;
    let size: usize = match args.kind {
        // With the tokenizer and all that stands in the file.
        Storage::Blocks(_) => {
            let file = std::fs::metadata(&args.out).map_err(Error::io("cannot read", &args.out))?;
            file.len() as usize
        }
        _ => written.on_disk().values().map(|of| of.bytes).sum(),
    };
    let result = written.parts()?;
    let measured = validation.map(|text| -> Result<KlReport> {
        let (before, after) = (parts.lm(&Place::cpu())?, result.lm(&Place::cpu())?);
        kl::evaluate(
            &before,
            &after,
            &text,
            args.batch_size,
            args.seq_len,
            &watch,
        )
    });
    let measured = measured.transpose()?;
    drop(watch);
    let other = weights.iter().filter(|(name, w)| {
        let taken = match args.kind {
            Storage::Blocks(kind) => storage(kind, w) == args.kind,
            _ => takes_float8(name, w),
        };
        w.shape().len() == 2 && !taken
    });
    let other: Vec<String> = other.map(|(name, _)| name.to_owned()).collect();
    let count = config.parameters();
    if args.json {
        print_json(&json!({
            "type": args.kind.name(),
            "bytes": size,
            "parameters": count,
            "other_types": other,
            "measured": measured,
            "out": args.out,
        }))?;
        return Ok(());
    }
    let mut rows = vec![
        ("type", args.kind.name().to_owned()),
        ("size", bytes(size)),
        (
            "bits a parameter",
            format!("{:.2}", 8.0 * size as f64 / count as f64),
        ),
    ];
    if !other.is_empty() {
        rows.push(("matrices of other types", other.len().to_string()));
    }
    match &measured {
        Some(kl) => rows.extend([
            ("KL (nats/token)", format!("{:.5}", kl.kl)),
            ("perplexity before", format!("{:.4}", kl.ce_teacher.exp())),
            ("perplexity after", format!("{:.4}", kl.ce_student.exp())),
            ("top-1 agreement", format!("{:.2} %", 100.0 * kl.agreement)),
            ("tokens measured on", thousands(kl.tokens)),
        ]),
        None => rows.push(("cost", "not measured: name a text with --validation".into())),
    }
    let rows = rows
        .into_iter()
        .map(|(name, value)| vec![name.into(), value]);
    print(table(&["quantised", ""], &rows.collect::<Vec<_>>()))?;
    print(format_args!("\nwritten to {}\n", args.out.display()))?;
    Ok(())
}
