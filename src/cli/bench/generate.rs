//! `zebroid bench decode|prefill|batch`: the engine at any depth and batch.

use std::time::Instant;

use serde::Serialize;

use super::{median, use_threads};
use crate::checkpoint::Checkpoint;
use crate::cli::arg::device::DeviceArg;
use crate::cli::arg::hub::Model;
use crate::cli::arg::memory::MemoryArg;
use crate::cli::positive;
use crate::cli::show::{Progress, bytes, print, print_json, table};
use crate::mixer::{Memory, Pool, Span};
use crate::model::{Decoder, Reading};
use crate::op::isa::Isa;
use crate::op::runtime::peak_memory;
use crate::watch::Watch;

#[derive(Debug, clap::Args)]
struct Common {
    /// Checkpoint folder, .gguf file or Hugging Face id.
    model: Model,
    #[command(flatten)]
    memory: MemoryArg,
    /// Measurements of which the median is taken.
    #[arg(long, value_parser = positive, default_value_t = 3)]
    repeat: usize,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = positive)]
    threads: Option<usize>,
    #[command(flatten)]
    device: DeviceArg,
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

/// Tokens one by one, behind so many that are in the cache already (filled with random entries, not read).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid bench decode ./hybrid --depths 0,4096,16384\n  \
    zebroid bench decode model.gguf --depths 0 --tokens 128 --json")]
pub struct Decode {
    #[command(flatten)]
    common: Common,
    /// Tokens before the first one.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    depths: Vec<usize>,
    /// Tokens of a measurement.
    #[arg(long, value_parser = positive, default_value_t = 32)]
    tokens: usize,
}

/// Prompts: the time to the first token.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid bench prefill ./hybrid --lengths 128,512,2048 --chunk 512")]
pub struct Prefill {
    #[command(flatten)]
    common: Common,
    /// Tokens of a prompt.
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "512")]
    lengths: Vec<usize>,
    /// Tokens that are read in one pass.
    #[arg(long, value_parser = positive, default_value_t = 512)]
    chunk: usize,
}

/// Several sequences decoded together. AMD's protocol for the released Zebra-Llama models is `--batches 48 --tokens 1024` at depth 0:
/// the time of the prompts is left out.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    zebroid bench batch ./hybrid --batches 1,8,32\n  \
    zebroid bench batch ./hybrid --batches 48 --tokens 1024 --repeat 1   (AMD's protocol)")]
pub struct BatchArgs {
    #[command(flatten)]
    common: Common,
    /// Sequences.
    #[arg(long, value_parser = positive, value_delimiter = ',', default_value = "1,8")]
    batches: Vec<usize>,
    /// Tokens before the first one of each.
    #[arg(long, default_value_t = 0)]
    depth: usize,
    /// Tokens of each sequence in a measurement.
    #[arg(long, value_parser = positive, default_value_t = 16)]
    tokens: usize,
}

#[derive(Serialize)]
struct Report {
    model: String,
    cpu: String,
    isa: &'static str,
    threads: usize,
    cache_type: String,
    parameters: usize,
    runs: Vec<Run>,
    /// Of the whole process; absent where the system does not tell.
    peak_rss_bytes: Option<usize>,
}

#[derive(Serialize)]
struct Run {
    depth: usize,
    batch: usize,
    /// Tokens that went through: of the prompt, or continued by each sequence.
    tokens: usize,
    /// Of all sequences.
    tokens_per_s: f64,
    /// Seconds to the first token: of a prompt the whole time, else one step.
    ttft_s: f64,
    /// Seconds a token of each sequence.
    time_per_output_token_s: f64,
    /// Seconds of the measurement.
    total_s: f64,
    /// Of all sequences, at its end.
    cache_bytes: usize,
}

struct Setup {
    decoder: Decoder,
    pool: Pool,
    reading: Reading,
    report: Report,
}

impl Setup {
    fn new(common: &Common) -> anyhow::Result<Self> {
        use_threads(common.threads)?;
        let place = common.device.place()?;
        let lm = Checkpoint::open(&common.model.fetch()?)?.model(&place.host())?;
        let decoder = lm.decoding_on(&place.device).decoder()?;
        let kind = common.memory.cache_type;
        let limit = common.memory.cache_memory.unwrap_or(usize::MAX);
        Ok(Self {
            pool: decoder.pool(kind, limit)?,
            reading: Reading::default(),
            report: Report {
                model: common.model.named().display().to_string(),
                cpu: cpu(),
                isa: Isa::here().level().name(),
                threads: rayon::current_num_threads(),
                cache_type: kind.to_string(),
                parameters: decoder.config.parameters(),
                runs: Vec::new(),
                peak_rss_bytes: None,
            },
            decoder,
        })
    }

    /// A token that is as good as any other.
    fn token(&self, i: usize) -> u32 {
        ((i * 7919 + 13) % self.decoder.config.vocab_size) as u32
    }

    /// One token for each sequence.
    fn step(&mut self, memories: &mut [Memory], i: usize) -> anyhow::Result<()> {
        let tokens: Vec<u32> = (0..memories.len())
            .map(|m| self.token(i + 31 * m))
            .collect();
        for memory in memories.iter_mut() {
            room(memory.reserve(1))?;
        }
        let mut spans: Vec<Span> = (memories.iter_mut().enumerate())
            .map(|(m, memory)| Span {
                memory,
                rows: m..m + 1,
            })
            .collect();
        let wanted: Vec<usize> = (0..spans.len()).collect();
        (self.decoder).read(&tokens, &mut spans, &wanted, &mut self.reading)?;
        Ok(())
    }

    /// `batch` sequences that hold `depth` tokens each go on by `tokens`.
    fn decode(
        &mut self,
        depth: usize,
        batch: usize,
        tokens: usize,
        repeat: usize,
    ) -> anyhow::Result<Run> {
        let mut memories = Vec::with_capacity(batch);
        for i in 0..batch {
            let mut memory = self.pool.sequence();
            room(memory.fill(depth, i as u64))?;
            memories.push(memory);
        }
        // What is read for the first time is not measured.
        self.step(&mut memories.clone(), 0)?;
        let mut times = Vec::with_capacity(repeat);
        let mut cache_bytes = 0;
        for _ in 0..repeat {
            let mut own = memories.clone();
            let started = Instant::now();
            for i in 0..tokens {
                self.step(&mut own, i)?;
            }
            times.push(started.elapsed().as_secs_f64());
            cache_bytes = own.iter().map(Memory::bytes).sum();
        }
        let total_s = median(times);
        let each = total_s / tokens as f64;
        Ok(Run {
            depth,
            batch,
            tokens,
            tokens_per_s: batch as f64 / each,
            ttft_s: each,
            time_per_output_token_s: each,
            total_s,
            cache_bytes,
        })
    }

    fn prefill(&mut self, length: usize, chunk: usize, repeat: usize) -> anyhow::Result<Run> {
        let tokens: Vec<u32> = (0..length).map(|i| self.token(i)).collect();
        let mut times = Vec::with_capacity(repeat);
        let mut cache_bytes = 0;
        for _ in 0..repeat {
            let mut memory = self.pool.sequence();
            let started = Instant::now();
            for piece in tokens.chunks(chunk) {
                room(memory.reserve(piece.len()))?;
                let last = memory.len() + piece.len() == length;
                let wanted: Vec<usize> = last.then_some(piece.len() - 1).into_iter().collect();
                let mut spans = [Span {
                    memory: &mut memory,
                    rows: 0..piece.len(),
                }];
                (self.decoder).read(piece, &mut spans, &wanted, &mut self.reading)?;
            }
            times.push(started.elapsed().as_secs_f64());
            cache_bytes = memory.bytes();
        }
        let total_s = median(times);
        Ok(Run {
            depth: 0,
            batch: 1,
            tokens: length,
            tokens_per_s: length as f64 / total_s,
            ttft_s: total_s,
            time_per_output_token_s: total_s / length as f64,
            total_s,
            cache_bytes,
        })
    }

    fn show(mut self, json: bool) -> anyhow::Result<()> {
        self.report.peak_rss_bytes = peak_memory();
        if json {
            print_json(&self.report)?;
            return Ok(());
        }
        let rows: Vec<Vec<String>> = (self.report.runs.iter())
            .map(|run| {
                vec![
                    run.depth.to_string(),
                    run.batch.to_string(),
                    run.tokens.to_string(),
                    format!("{:.1}", run.tokens_per_s),
                    format!("{:.1} ms", 1e3 * run.ttft_s),
                    format!("{:.2} ms", 1e3 * run.time_per_output_token_s),
                    bytes(run.cache_bytes),
                ]
            })
            .collect();
        let headers = [
            "depth",
            "batch",
            "tokens",
            "tokens/s",
            "TTFT",
            "time per token",
            "cache",
        ];
        print(table(&headers, &rows))?;
        let Report {
            cpu, isa, threads, ..
        } = &self.report;
        let peak = self.report.peak_rss_bytes.map_or("unknown".into(), bytes);
        print(format_args!(
            "{cpu}, {isa}, {threads} threads; peak memory {peak}\n"
        ))?;
        Ok(())
    }
}

fn room(reserved: Result<(), crate::mixer::Full>) -> anyhow::Result<()> {
    reserved.map_err(|_| anyhow::anyhow!("no room in the cache: raise --cache-memory"))
}

/// What the system calls its processor.
fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("model name"));
    let name = line.map(|l| l.trim_start_matches([' ', '\t', ':']).to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

pub fn decode(args: Decode) -> anyhow::Result<()> {
    let mut setup = Setup::new(&args.common)?;
    let watch = Progress::default();
    watch.start("decode", args.depths.len());
    for (i, depth) in args.depths.iter().enumerate() {
        let run = setup.decode(*depth, 1, args.tokens, args.common.repeat)?;
        setup.report.runs.push(run);
        watch.reached(i + 1, args.depths.len(), "depths")?;
    }
    drop(watch);
    setup.show(args.common.json)
}

pub fn prefill(args: Prefill) -> anyhow::Result<()> {
    let mut setup = Setup::new(&args.common)?;
    let watch = Progress::default();
    watch.start("prefill", args.lengths.len());
    for (i, length) in args.lengths.iter().enumerate() {
        let run = setup.prefill(*length, args.chunk, args.common.repeat)?;
        setup.report.runs.push(run);
        watch.reached(i + 1, args.lengths.len(), "lengths")?;
    }
    drop(watch);
    setup.show(args.common.json)
}

pub fn batch(args: BatchArgs) -> anyhow::Result<()> {
    let mut setup = Setup::new(&args.common)?;
    let watch = Progress::default();
    watch.start("batch", args.batches.len());
    for (i, batch) in args.batches.iter().enumerate() {
        let run = setup.decode(args.depth, *batch, args.tokens, args.common.repeat)?;
        setup.report.runs.push(run);
        watch.reached(i + 1, args.batches.len(), "batches")?;
    }
    drop(watch);
    setup.show(args.common.json)
}
