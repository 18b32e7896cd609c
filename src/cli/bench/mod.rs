//! `zebroid bench`: how fast, in how much memory.

mod data;
mod generate;
mod serve;
mod train;

#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    Train(train::Args),
    Data(data::Args),
    Decode(generate::Decode),
    Prefill(generate::Prefill),
    Batch(generate::BatchArgs),
    Serve(serve::Args),
}

pub fn run(command: Bench) -> anyhow::Result<()> {
    match command {
        Bench::Train(args) => train::run(args),
        Bench::Data(args) => data::run(args),
        Bench::Decode(args) => generate::decode(args),
        Bench::Prefill(args) => generate::prefill(args),
        Bench::Batch(args) => generate::batch(args),
        Bench::Serve(args) => serve::run(args),
    }
}

fn use_threads(threads: Option<usize>) -> anyhow::Result<()> {
    if let Some(threads) = threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global()?;
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    quantile(&mut values, 0.5)
}

/// The value that this share of the others lies below; NaN of none.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * share) as usize;
    let last = values.len().saturating_sub(1);
    values.get(at.min(last)).copied().unwrap_or(f64::NAN)
}
