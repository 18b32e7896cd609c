//! `zebroid compose`: a hybrid checkpoint from a teacher.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::arg::hub::Model;
use super::arg::init::InitArgs;
use super::plan::{as_json, as_table};
use super::show::{Progress, check_file, print, print_json, table};
use crate::checkpoint::{self, Bank, Format};
use crate::convert::{Calibration, Init, PlanOptions};
use crate::eval::fidelity::{Fidelity, fidelity};
use crate::model::{ModelConfig, Parts};
use crate::pipeline::Base;
use crate::pipeline::stage::compose::{Source, hybrid, recorded};
use crate::report::{Bars, Report};
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

/// Make a hybrid at initialisation, or from the trained layers of an ILD bank.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid compose ./teacher ./hybrid --mla 0,3 --kv-rank 16 --calibration train.jsonl --report report.html\n  \
    zebroid compose ./teacher ./hybrid --mla 0,3 --kv-rank budget:5% --calibration train.jsonl\n  \
    zebroid compose ./teacher ./hybrid --mla 0,3 --kv-rank 16 --init published\n  \
    zebroid compose ./teacher ./hybrid --mla 2 --bank ./bank")]
pub struct Args {
    /// Llama checkpoint folder or Hugging Face id.
    teacher: Model,
    /// Folder of the hybrid; must not exist.
    out: PathBuf,
    #[command(flatten)]
    plan: PlanOptions,
    #[command(flatten)]
    init: InitArgs,
    /// Take whole layers from this ILD bank (a result of train ild).
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
    /// An HTML page about the hybrid's layers.
    #[arg(long)]
    report: Option<PathBuf>,
    /// One JSON object instead of the tables.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let inputs = [Some(args.teacher.named()), args.bank.as_deref()];
    let inputs: Vec<&Path> = inputs.into_iter().flatten().collect();
    let _lock = checkpoint::claim(&args.out, args.force, &inputs)?;
    args.report.iter().try_for_each(|path| check_file(path))?;
    let teacher = args.teacher.fetch()?;
    let base = Base::open(&teacher, Place::cpu())?;
    // Sizes that need no weights are refused before the text is read.
    if !args.plan.needs_weights() {
        base.plan(&args.plan, &Init::Published { seed: args.seed })?;
    }
    let watch = Progress::default();
    let calibration = match args.bank.is_some() {
        true => args.init.calibration_if_named(&base, &watch)?,
        false => args.init.calibration(&base, &[], &watch)?,
    };
    let init = args.init.init(&calibration, true, args.seed);
    let bank = args.bank.as_ref().map(|folder| Bank::open(folder));
    let bank = bank.transpose()?;
    let source = bank.as_ref().map_or(Source::Teacher, Source::Bank);
    let composed = hybrid(&base, &args.plan, &init, &source, &watch)?;
    let record = recorded(&base, &args.plan, &source, args.init.birth(&init, &[]))?;
    checkpoint::save(
        &args.out,
        args.format,
        &composed.config,
        &composed.weights,
        Some(&teacher),
        &record,
        args.force,
    )?;
    let found = calibration
        .map(|c| measure(&base, &composed, &c, &watch))
        .transpose()
        .map_err(|error| written(error, &args.out))?;
    drop(watch);
    if let Some(path) = &args.report {
        report(base.config(), &composed.config, found.as_ref()).write(path)?;
    }
    let context = base.config().max_position_embeddings;
    if args.json {
        let plan = as_json(base.config(), &composed.config, context);
        let whole = json!({ "plan": plan, "fidelity": found, "out": args.out });
        print_json(&whole)?;
        return Ok(());
    }
    let measured = match &found {
        Some(found) => format!("{}\n{}", table(&HEADERS, &rows(found)), whole(found)),
        None => format!("{NOT_MEASURED}\n"),
    };
    print(format_args!(
        "{}\n{measured}written to {}\n",
        as_table(base.config(), &composed.config, context),
        args.out.display()
    ))?;
    Ok(())
}

/// When its measurement is interrupted, the hybrid is there.
fn written(error: Error, out: &Path) -> Error {
    match error {
        Error::Interrupted(_) => Error::Interrupted(format!(
            "{} is written; only its measurement is missing (eval kl makes it)",
            out.display()
        )),
        other => other,
    }
}

fn measure(
    base: &Base,
    composed: &Parts,
    calibration: &Calibration,
    watch: &dyn Watch,
) -> Result<Fidelity> {
    fidelity(
        &base.lm()?,
        &composed.lm(&base.place)?,
        &calibration.fit,
        &calibration.held_out,
        watch,
    )
}

/// What stands in the place of figures.
const NOT_MEASURED: &str = "not measured: name a text with --calibration FILE.jsonl";

const HEADERS: [&str; 5] = [
    "layer",
    "mixer",
    "error on calibration text",
    "held-out",
    "stream, held-out",
];

fn rows(found: &Fidelity) -> Vec<Vec<String>> {
    let row = |(i, layer): (usize, &crate::eval::fidelity::LayerFidelity)| {
        let mut row = vec![i.to_string(), layer.mixer.to_owned()];
        let errors = [layer.calibration, layer.held_out, layer.stream];
        row.extend(errors.map(|error| format!("{error:.4}")));
        row
    };
    found.layers.iter().enumerate().map(row).collect()
}

fn whole(found: &Fidelity) -> String {
    let kl = &found.whole;
    format!(
        "held-out: KL {:.4} nats/token, perplexity {:.3} (teacher {:.3}), top-1 agreement {:.2} %\n",
        kl.kl,
        kl.ce_student.exp(),
        kl.ce_teacher.exp(),
        100.0 * kl.agreement
    )
}

/// The layers' errors, where a text was named to measure them on, and the plan.
fn report(teacher: &ModelConfig, student: &ModelConfig, found: Option<&Fidelity>) -> Report {
    let mut report = Report::new("zebroid compose");
    match found {
        Some(found) => errors(&mut report, found),
        None => _ = report.paragraph(NOT_MEASURED),
    }
    report.heading("Plan").code(
        "layers",
        &as_table(teacher, student, teacher.max_position_embeddings),
    );
    report
}

fn errors(report: &mut Report, found: &Fidelity) {
    let errors = |name: &str, of: fn(&crate::eval::fidelity::LayerFidelity) -> f64| Bars {
        name: name.into(),
        values: found.layers.iter().map(of).collect(),
    };
    let layers: Vec<String> = (found.layers.iter().enumerate())
        .map(|(i, layer)| format!("{i} {}", layer.mixer))
        .collect();
    let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
    report
        .paragraph("Relative squared errors against the teacher: of each mixer's output on the teacher's own input, and of the hybrid's residual stream.")
        .table(&HEADERS, &rows(found))
        .bar_plot(
            "Error of each layer",
            "relative squared error",
            &layers,
            &[
                errors("mixer, calibration text", |l| l.calibration),
                errors("mixer, held-out", |l| l.held_out),
                errors("stream, held-out", |l| l.stream),
            ],
        )
        .paragraph(&whole(found));
}
