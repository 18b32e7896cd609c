//! `zebroid eval probe`: recall over length and depth.

use std::path::PathBuf;

use candle_core::DType;

use super::device::DeviceArg;
use super::interrupt;
use super::output::{progress, table};
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::eval::probe::{Cell, Probe, Sweep, sweep};
use crate::eval::report::Report;

/// Long-context and recall probes over length and depth: needle in a haystack, multi-query associative
/// recall, phonebook lookup, copying, variable tracking. A share of exact answers in every cell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid eval probe ./hybrid --lengths 128,256,512 --report probes.html\n  \
    zebroid eval probe ./hybrid --probes needle,mqar --lengths 1024,4096 --depths 5 --count 50 --json")]
pub struct Args {
    /// Checkpoint folder.
    checkpoint: PathBuf,
    /// Which ones [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    probes: Option<Vec<Probe>>,
    /// Tokens of a text, its answer included [default: a quarter, half and all of the model's context, at least 128].
    #[arg(long, value_delimiter = ',')]
    lengths: Option<Vec<usize>>,
    /// Places of the answer, from the text's beginning to its end.
    #[arg(long, default_value_t = 5)]
    depths: usize,
    /// Questions a cell.
    #[arg(long, default_value_t = 20)]
    count: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens read at once.
    #[arg(long, default_value_t = 8192)]
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
    let lm = Checkpoint::open(&args.checkpoint)?.model(&args.device.get()?, DType::F32)?;
    let tokenizer = Tokenizer::open(&args.checkpoint)?;
    let wanted = Sweep {
        probes: args.probes.clone().unwrap_or(Probe::ALL.to_vec()),
        lengths: (args.lengths.clone())
            .unwrap_or_else(|| lengths(lm.config.max_position_embeddings)),
        depths: args.depths,
        count: args.count,
        seed: args.seed,
        batch_tokens: args.batch_tokens,
    };
    interrupt::install();
    let bar = progress("probe", 0);
    let cells = sweep(&lm, &tokenizer, &wanted, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        !interrupt::asked()
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.report {
        page(&args, &wanted, &cells).write(path)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&cells)?);
        return Ok(());
    }
    for probe in &wanted.probes {
        let (headers, rows) = grid(*probe, &wanted.lengths, &cells);
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        println!("{} (chance {:.1} %)", probe.name(), 100.0 * probe.chance());
        println!("{}", table(&headers, &rows));
    }
    Ok(())
}

/// Shorter texts have no room for every kind of question.
fn lengths(most: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = [most / 4, most / 2, most].map(|l| l.max(128)).into();
    lengths.dedup();
    lengths
}

/// Depths down, lengths across, per cent.
fn grid(probe: Probe, lengths: &[usize], cells: &[Cell]) -> (Vec<String>, Vec<Vec<String>>) {
    let own: Vec<&Cell> = cells.iter().filter(|c| c.probe == probe).collect();
    let mut depths: Vec<f64> = own.iter().map(|c| c.depth).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    let mut headers = vec!["depth".to_owned()];
    headers.extend(lengths.iter().map(|l| format!("{l} tokens")));
    let row = |depth: &f64| {
        let mut row = vec![match probe.has_depth() {
            true => format!("{:.0} %", 100.0 * depth),
            false => "all".into(),
        }];
        row.extend(lengths.iter().map(|length| {
            let cell = own
                .iter()
                .find(|c| c.length == *length && c.depth == *depth);
            cell.map_or("-".into(), |c| format!("{:.1} %", 100.0 * c.accuracy))
        }));
        row
    };
    (headers, depths.iter().map(row).collect())
}

fn page(args: &Args, wanted: &Sweep, cells: &[Cell]) -> Report {
    let mut report = Report::new("Probes");
    report.paragraph(&format!(
        "{}: share of exact answers over length and depth of the answer, {} questions a cell. A copying oracle has 100 %.",
        args.checkpoint.display(),
        wanted.count
    ));
    for probe in &wanted.probes {
        let (headers, rows) = grid(*probe, &wanted.lengths, cells);
        let values = rows.iter().map(|row| {
            let share = |cell: &String| {
                let number = cell.trim_end_matches(" %").parse::<f64>();
                number.map_or(f64::NAN, |percent| percent / 100.0)
            };
            row[1..].iter().map(share).collect::<Vec<f64>>()
        });
        let names: Vec<&str> = rows.iter().map(|row| row[0].as_str()).collect();
        let headers: Vec<&str> = headers[1..].iter().map(String::as_str).collect();
        let title = format!("{} (chance {:.1} %)", probe.name(), 100.0 * probe.chance());
        report.heat_map(
            &title,
            "depth",
            &headers,
            &names,
            &values.collect::<Vec<_>>(),
        );
    }
    report
}
