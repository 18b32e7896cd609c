//! `zebroid calibrate`: what the teacher's mixers read and write on a text.

use serde_json::json;

use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::arg::{cache, data};
use super::show::{Progress, print, print_json, table, thousands};
use crate::convert::{CalibrationConfig, calibrate};
use crate::data::Packing;
use crate::pipeline::{Base, Text};

/// Stream a text through the teacher and keep statistics of every layer: covariance of what its mixer
/// reads, energies of queries and keys by head and frequency, size of what it writes. Kept by content in
/// the cache (ZEBROID_CACHE), where compose, train and select find them; an interrupted pass goes on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid calibrate ./teacher train.jsonl\n  \
    zebroid calibrate ./teacher train.jsonl --calibration-tokens 1000000 --json")]
pub struct Args {
    /// Llama checkpoint folder or Hugging Face id.
    teacher: Model,
    /// Texts (train kd --help says in what forms).
    #[arg(value_name = "TEXT", required = true)]
    data: Vec<Text>,
    #[command(flatten)]
    config: CalibrationConfig,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let base = Base::open(&args.teacher.fetch()?, args.device.place()?)?;
    let watch = Progress::default();
    let corpus = data::corpus(&args.data, &base.tokenizer, Packing::Documents, &watch)?;
    let (parts, place, folder) = (&base.parts, &base.place, cache::folder());
    let found = calibrate(parts, place, &corpus, &args.config, &folder, &watch)?;
    drop(watch);
    let root_mean = |values: &[f64]| (values.iter().sum::<f64>() / values.len() as f64).sqrt();
    let layers: Vec<_> = (found.layers.iter())
        .map(|layer| {
            let d = layer.input_mean.len();
            let variances: Vec<f64> = (0..d).map(|i| layer.input_moment[(i, i)]).collect();
            // What each rotary pair adds to scores, as a share of all.
            let (q, k) = (&layer.query_energy, &layer.key_energy);
            let (h, g) = (q.nrows(), k.nrows());
            let pair = |p: usize| (0..h).map(|n| q[(n, p)] * k[(n * g / h, p)]).sum::<f64>();
            let energies: Vec<f64> = (0..q.ncols()).map(pair).collect();
            let all = energies.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let shares: Vec<f64> = energies.iter().map(|e| e / all).collect();
            (
                root_mean(&variances),
                root_mean(&layer.output_square),
                shares,
            )
        })
        .collect();
    if args.json {
        let layers: Vec<_> = (layers.iter())
            .map(|(input, output, shares)| {
                json!({ "input_rms": input, "output_rms": output, "pair_energy": shares })
            })
            .collect();
        let report = json!({ "tokens": found.tokens, "layers": layers });
        print_json(&report)?;
        return Ok(());
    }
    let rows = layers
        .iter()
        .enumerate()
        .map(|(i, (input, output, shares))| {
            let strongest =
                (0..shares.len()).reduce(|a, b| if shares[b] > shares[a] { b } else { a });
            vec![
                i.to_string(),
                format!("{input:.4}"),
                format!("{output:.4}"),
                strongest.map_or(String::new(), |p| {
                    format!("{p} ({:.0} %)", 100.0 * shares[p])
                }),
            ]
        });
    let headers = [
        "layer",
        "mixer reads (rms)",
        "writes (rms)",
        "strongest rotary pair",
    ];
    print(table(&headers, &rows.collect::<Vec<_>>()))?;
    print(format_args!(
        "\n{} tokens, kept in {}\n",
        thousands(found.tokens),
        cache::folder().display()
    ))?;
    Ok(())
}
