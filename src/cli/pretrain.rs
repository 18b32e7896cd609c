//! `zebroid pretrain`: a small Llama from scratch.

use std::path::{Path, PathBuf};

use super::arg::hub::Model;
use super::show::Progress;
use super::train::{TrainArgs, TrainRun};
use crate::checkpoint::Provenance;
use crate::data::Tokenizer;
use crate::hub::Part;
use crate::mixer::sizes::{MAX_LAYERS, bounded};
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig};
use crate::model::{FORMAT_VERSION, ModelConfig};
use crate::pipeline::Text;
use crate::train::stage::pretrain::Pretrain;
use crate::train::{Sources, Stage};

/// Train a small Llama from scratch on texts.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid pretrain ./teacher --data stories.jsonl --tokenizer ./tokenizer --hidden-size 128 --num-layers 5 --tokens 20000000")]
pub struct Args {
    /// Folder of the result (a Hugging Face Llama checkpoint); must not exist.
    out: PathBuf,
    /// Texts (train kd --help says in what forms).
    #[arg(long, value_name = "TEXT", required = true)]
    data: Vec<Text>,
    /// Folder with tokenizer.json, or a Hugging Face id.
    #[arg(long)]
    tokenizer: Model,
    /// Channels of the residual stream.
    #[arg(long, default_value_t = 128)]
    hidden_size: usize,
    /// Channels inside the MLPs.
    #[arg(long, default_value_t = 352)]
    intermediate_size: usize,
    /// Layers.
    #[arg(long, default_value_t = 5)]
    num_layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    num_heads: usize,
    /// Key/value heads, a divisor of the query heads.
    #[arg(long, default_value_t = 4)]
    num_kv_heads: usize,
    /// Channels of a head [default: hidden size over heads].
    #[arg(long)]
    head_dim: Option<usize>,
    /// Base of the rotary frequencies.
    #[arg(long, default_value_t = 10_000.0)]
    rope_theta: f64,
    #[command(flatten)]
    train: TrainArgs,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let tokenizer = [args.tokenizer.named()].into_iter();
    let inputs: Vec<&Path> = tokenizer
        .chain(args.data.iter().filter_map(Text::source))
        .collect();
    let (settings, _lock) = args.train.claim(&args.out, &inputs)?;
    let folder = args.tokenizer.part(Part::Tokenizer)?;
    let tokenizer = Tokenizer::open(&folder)?;
    let attention = AttentionConfig::new(
        args.num_heads,
        args.num_kv_heads,
        args.head_dim
            .unwrap_or(args.hidden_size / args.num_heads.max(1)),
        Some(RopeConfig::new(args.rope_theta)),
    );
    bounded("--num-layers", args.num_layers, MAX_LAYERS)?;
    let config = ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: args.hidden_size,
        intermediate_size: args.intermediate_size,
        vocab_size: tokenizer.vocab_size(),
        max_position_embeddings: settings.seq_len,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: tokenizer.bos(),
        eos_token_id: tokenizer.eos().to_vec(),
        layers: vec![MixerConfig::Attention(attention); args.num_layers],
        converted: None,
    };
    let place = args.train.device.place()?.training(settings.weights);
    let watch = Progress::default();
    let corpus = args.train.data.corpus(&args.data, &tokenizer, &watch)?;
    let pretrain = Pretrain::new(&config, settings.seed, &place)?;
    let stage = Stage::Pretrain(pretrain, &corpus);
    let run = TrainRun {
        name: "pretrain",
        config: &settings,
        out: &args.out,
        tokenizer: &folder,
        teacher: None,
        sources: Sources {
            record: Provenance::default(),
            inputs: vec![Text::input("data", &args.data, &corpus)],
        },
    };
    args.train.finish(run, stage.into(), watch)?;
    Ok(())
}
