//! `zebroid data`: what a corpus is made of.

use super::arg::data::DataArgs;
use super::arg::hub::Model;
use super::positive;
use super::show::{Progress, print, print_json, table, thousands};
use crate::data::{Batches, Listed, Tokenizer};
use crate::hub::Part;
use crate::pipeline::Text;

/// Tokenise texts as training does, keep the tokens of large ones in the cache (ZEBROID_CACHE), and say what they are: records, tokens,
/// what is dropped, what an epoch takes of each. With --json the manifest that --data manifest:FILE makes the same batches from; training
/// writes it into its result as data.json.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid data web.parquet#weight=0.7 code.jsonl.zst#weight=0.3 --tokenizer ./teacher\n  \
    zebroid data train.jsonl --tokenizer ./teacher --decontaminate zebra,own-test.jsonl --json > data.json")]
pub struct Args {
    /// Texts (train kd --help says in what forms, and how they are mixed).
    #[arg(value_name = "TEXT", required = true)]
    texts: Vec<Text>,
    /// Folder with tokenizer.json, a GGUF file, or a Hugging Face id.
    #[arg(long)]
    tokenizer: Model,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens a window, for what an epoch takes.
    #[arg(long, value_parser = positive, default_value_t = 256)]
    seq_len: usize,
    /// The manifest instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::open(&args.tokenizer.part(Part::Tokenizer)?)?;
    let watch = Progress::default();
    let corpus = args.data.corpus(&args.texts, &tokenizer, &watch)?;
    corpus.check(1, args.seq_len)?;
    drop(watch);
    let manifest = corpus.manifest().expect("it was read from files");
    if args.json {
        print_json(&manifest)?;
        return Ok(());
    }
    let taken = corpus.windows_taken(args.seq_len);
    let row = |(listed, taken): (&Listed, usize)| {
        let weight = listed
            .weight
            .map_or("-".into(), |weight| weight.to_string());
        let numbers = [listed.records, listed.dropped, listed.tokens].map(thousands);
        let mut row = vec![listed.text.clone()];
        row.extend(numbers);
        row.extend([weight, thousands(taken)]);
        row
    };
    let rows: Vec<Vec<String>> = manifest.data.iter().zip(taken).map(row).collect();
    let headers = [
        "text",
        "records",
        "dropped",
        "tokens",
        "weight",
        "windows an epoch",
    ];
    print(format_args!(
        "{}\nhash {}\n",
        table(&headers, &rows),
        manifest.hash
    ))?;
    Ok(())
}
