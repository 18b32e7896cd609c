//! `zebroid eval probe`: recall over length and depth.

use std::path::PathBuf;

use super::arg::device::DeviceArg;
use super::arg::hub::Model;
use super::positive;
use super::show::{Progress, check_file, print, print_json, table};
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::eval::probe::{Cell, Probe, Sweep, sweep};
use crate::report::Report;

/// Long-context and recall probes over length and depth: needle in a haystack, multi-query associative
/// recall, phonebook lookup, copying, variable tracking. A share of exact answers in every cell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid eval probe ./hybrid --lengths 128,256,512 --report probes.html\n  \
    zebroid eval probe ./hybrid --probes needle,mqar --lengths 1024,4096 --depths 5 --count 50 --json")]
pub struct Args {
    /// Checkpoint folder, .gguf file or Hugging Face id.
    checkpoint: Model,
    /// Which ones [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    probes: Option<Vec<Probe>>,
    /// Tokens of a text, its answer included [default: a quarter, half and all of the model's context, at least 128].
    #[arg(long, value_parser = positive, value_delimiter = ',')]
    lengths: Option<Vec<usize>>,
    /// Places of the answer, from the text's beginning to its end.
    #[arg(long, value_parser = positive, default_value_t = 5)]
    depths: usize,
    /// Questions a cell.
    #[arg(long, value_parser = positive, default_value_t = 20)]
    count: usize,
    /// Seed of what is asked.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens read at once.
    #[arg(long, value_parser = positive, default_value_t = 8192)]
    batch_tokens: usize,
    /// An HTML page with heat maps.
    #[arg(long)]
    report: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON list instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    args.report.iter().try_for_each(|path| check_file(path))?;
    let (place, checkpoint) = (args.device.place()?, args.checkpoint.fetch()?);
    let lm = Checkpoint::open(&checkpoint)?.model(&place.host())?;
    let lm = lm.decoding_on(&place.device);
    let tokenizer = Tokenizer::open(&checkpoint)?;
    tokenizer.check(lm.config.vocab_size)?;
    let wanted = Sweep {
        probes: args.probes.clone().unwrap_or(Probe::ALL.to_vec()),
        lengths: (args.lengths.clone())
            .unwrap_or_else(|| lengths(lm.config.max_position_embeddings)),
        depths: args.depths,
        count: args.count,
        seed: args.seed,
        batch_tokens: args.batch_tokens,
    };
    let watch = Progress::default();
    let cells = sweep(&lm, &tokenizer, &wanted, &watch)?;
    drop(watch);
    if let Some(path) = &args.report {
        page(&args, &wanted, &cells).write(path)?;
    }
    if args.json {
        print_json(&cells)?;
        return Ok(());
    }
    for grid in grids(&wanted, &cells) {
        let mut headers = vec!["depth"];
        headers.extend(grid.lengths.iter().map(String::as_str));
        let rows = grid.depths.iter().zip(&grid.accuracies);
        let rows = rows.map(|(depth, accuracies)| {
            let mut row = vec![depth.clone()];
            row.extend(accuracies.iter().map(|a| format!("{:.1} %", 100.0 * a)));
            row
        });
        let cells = table(&headers, &rows.collect::<Vec<_>>());
        print(format_args!("{}\n{cells}\n", grid.title))?;
    }
    Ok(())
}

/// Shorter texts have no room for every kind of question.
fn lengths(most: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = [most / 4, most / 2, most].map(|l| l.max(128)).into();
    lengths.dedup();
    lengths
}

/// One probe's accuracies, depths down, lengths across.
struct Grid {
    title: String,
    depths: Vec<String>,
    lengths: Vec<String>,
    accuracies: Vec<Vec<f64>>,
}

fn grids(wanted: &Sweep, cells: &[Cell]) -> Vec<Grid> {
    let grid = |probe: &Probe| {
        let own: Vec<&Cell> = cells.iter().filter(|c| c.probe == *probe).collect();
        let mut depths: Vec<f64> = own.iter().map(|c| c.depth).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        let row = |depth: &f64| {
            let at = |length: &usize| {
                let mut own = own.iter();
                let cell = own.find(|c| c.length == *length && c.depth == *depth);
                cell.map_or(f64::NAN, |c| c.accuracy)
            };
            wanted.lengths.iter().map(at).collect()
        };
        let name = |depth: &f64| match probe.has_depth() {
            true => format!("{:.0} %", 100.0 * depth),
            false => "all".into(),
        };
        Grid {
            title: format!("{} (chance {:.1} %)", probe.name(), 100.0 * probe.chance()),
            depths: depths.iter().map(name).collect(),
            lengths: wanted
                .lengths
                .iter()
                .map(|l| format!("{l} tokens"))
                .collect(),
            accuracies: depths.iter().map(row).collect(),
        }
    };
    wanted.probes.iter().map(grid).collect()
}

fn page(args: &Args, wanted: &Sweep, cells: &[Cell]) -> Report {
    let mut report = Report::new("Probes");
    report.paragraph(&format!(
        "{}: share of exact answers over length and depth of the answer, {} questions a cell. A copying oracle has 100 %.",
        args.checkpoint.named().display(),
        wanted.count
    ));
    for grid in grids(wanted, cells) {
        let lengths: Vec<&str> = grid.lengths.iter().map(String::as_str).collect();
        let depths: Vec<&str> = grid.depths.iter().map(String::as_str).collect();
        report.heat_map(&grid.title, "depth", &lengths, &depths, &grid.accuracies);
    }
    report
}
