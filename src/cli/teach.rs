//! `zebroid teach`: a teacher's likeliest tokens, written down for distillation without it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::arg::data::DataArgs;
use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::positive;
use super::show::{Progress, bytes, note, print, thousands};
use crate::checkpoint::{check_output, lock, replace_folder};
use crate::data::{Corpus, Tokenizer};
use crate::hub::Part;
use crate::numerics;
use crate::pipeline::{Base, Text};
use crate::train::partial_folder;
use crate::train::teacher::{About, Served, Source, teach};
use crate::watch::Watch;
use crate::{Error, Result};

/// Write down a teacher's likeliest tokens behind every token of a text, for train kd --teacher-logits: learning then needs neither the
/// teacher's memory nor its passes. What the other tokens have together is kept too. An unfinished folder is gone on with.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid teach ./teacher ./logits --data train.jsonl#tokens=2000000 --seq-len 256\n  \
    zebroid train kd --teacher-logits ./logits --student ./hybrid --data manifest:./logits/data.json ./distilled\n  \
    OPENAI_API_KEY=.. zebroid teach http://host:8000/v1 ./logits --model NAME --tokenizer ./student --data train.jsonl --top-k 20")]
pub struct Args {
    /// Checkpoint folder or Hugging Face id; or the address of a served teacher, http://HOST:PORT/v1 (zebroid, vLLM: /v1/completions with
    /// echo and logprobs; a key is read from OPENAI_API_KEY).
    #[arg(value_name = "TEACHER|URL")]
    teacher: OsString,
    /// Folder of the result; must not exist.
    out: PathBuf,
    /// Texts (train kd --help says in what forms, and how they are mixed; #tokens=N is a text's beginning).
    #[arg(long, value_name = "TEXT", required = true)]
    data: Vec<Text>,
    #[command(flatten)]
    reading: DataArgs,
    /// Tokens per window, those of the training.
    #[arg(long, value_parser = positive, default_value_t = 256)]
    seq_len: usize,
    /// Likeliest tokens that are kept of each place; the others' probability is kept as one.
    #[arg(long, value_name = "K", default_value_t = 64)]
    top_k: usize,
    /// Windows that the teacher reads together.
    #[arg(long, value_parser = positive, default_value_t = 16)]
    batch_size: usize,
    /// Name of a served teacher [default: the only one there].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Folder with the tokenizer.json of a served teacher (the student's has the same tokens), or a Hugging Face id.
    #[arg(long)]
    tokenizer: Option<Model>,
    #[command(flatten)]
    device: DeviceArg,
    /// Say how much will be written, and write nothing.
    #[arg(long)]
    plan: bool,
    /// Replace OUT, and drop an unfinished one of other settings.
    #[arg(long)]
    force: bool,
}

/// A teacher that is asked.
struct Teacher {
    tokenizer: Tokenizer,
    vocab_size: usize,
    source: Source,
    /// What it is, and what it is computed with.
    is: (String, String),
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let url = args.teacher.to_str().filter(|text| text.contains("://"));
    let named = Path::new(&args.teacher);
    let inputs: Vec<&Path> = (args.data.iter().filter_map(Text::source))
        .chain(url.is_none().then_some(named))
        .collect();
    let _lock = lock(&args.out)?;
    check_output(&args.out, args.force, &inputs)?;
    let watch = Progress::default();
    let teacher = match url {
        Some(url) => served(&args, url, &watch)?,
        None => opened(&args)?,
    };
    let (tokenizer, vocab_size) = (&teacher.tokenizer, teacher.vocab_size);
    let corpus = args.reading.corpus(&args.data, tokenizer, &watch)?;
    let sizes = (args.seq_len, args.top_k);
    let about = About::new(teacher.is, &corpus, tokenizer, vocab_size, sizes)?;
    let size = size(&about, &corpus, &args.out);
    if args.plan {
        drop(watch);
        return Ok(print(size + "\n")?);
    }
    watch.note(&size);
    let folder = partial_folder(&args.out);
    let of = (&corpus, tokenizer);
    let rows = args.batch_size;
    teach(
        &teacher.source,
        &about,
        of,
        (&folder, args.force),
        rows,
        &watch,
    )?;
    replace_folder(&folder, &args.out, args.force)?;
    drop(watch);
    note(format_args!("written to {}", args.out.display()));
    Ok(())
}

fn opened(args: &Args) -> Result<Teacher> {
    for (flag, given) in [
        ("model", args.model.is_some()),
        ("tokenizer", args.tokenizer.is_some()),
    ] {
        if given {
            return Err(Error::invalid(format!(
                "--{flag} is for a served teacher (http://HOST:PORT/v1); a checkpoint has its own"
            )));
        }
    }
    let folder = Model::from(args.teacher.clone()).fetch()?;
    let base = Base::open(&folder, args.device.place()?)?;
    let context = base.config().max_position_embeddings;
    if args.seq_len > context {
        return Err(Error::invalid(format!(
            "--seq-len {} is above the teacher's context of {context}",
            args.seq_len
        )));
    }
    Ok(Teacher {
        source: Source::Model(Box::new(base.lm()?)),
        vocab_size: base.config().vocab_size,
        is: (
            base.hash()?,
            numerics::version(numerics::Stage::Kl, &base.place.device),
        ),
        tokenizer: base.tokenizer,
    })
}

fn served(args: &Args, url: &str, watch: &Progress) -> Result<Teacher> {
    let Some(tokenizer) = &args.tokenizer else {
        return Err(Error::invalid(format!(
            "{url}: a served teacher needs --tokenizer, a folder with its tokenizer.json (the student's has the same tokens)"
        )));
    };
    let tokenizer = Tokenizer::open(&tokenizer.part(Part::Tokenizer)?)?;
    let key = std::env::var("OPENAI_API_KEY").ok();
    let served = Served::open(url, args.model.as_deref(), key, &tokenizer, watch)?;
    Ok(Teacher {
        is: (served.name(), "served".into()),
        vocab_size: tokenizer.vocab_size(),
        source: Source::Served(served),
        tokenizer,
    })
}

/// What will be written.
fn size(about: &About, corpus: &Corpus, out: &Path) -> String {
    let (k, vocab) = (about.top_k, about.vocab_size);
    let left = corpus.tokens() - about.tokens();
    format!(
        "{} tokens in {} windows of {} ({} left over), {k} of {vocab} tokens of each place: {} bytes a token, {} in {} ({})",
        thousands(about.tokens()),
        thousands(about.windows),
        about.seq_len,
        thousands(left),
        about.bytes_per_token(),
        bytes(about.bytes()),
        out.display(),
        match about.shards() {
            1 => "1 shard".to_owned(),
            shards => format!("{} shards", thousands(shards)),
        }
    )
}
