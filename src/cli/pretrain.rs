//! `zebroid pretrain`: a small Llama from scratch, or a model that is trained on.

use std::path::{Path, PathBuf};

use super::arg::hub::Model;
use super::show::Progress;
use super::train::{TrainArgs, TrainRun};
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::hub::Part;
use crate::mixer::sizes::{MAX_LAYERS, bounded};
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig};
use crate::model::{FORMAT_VERSION, ModelConfig};
use crate::pipeline::Text;
use crate::train::stage::pretrain::{Pretrain, fresh};
use crate::train::{Sources, Stage};
use crate::{Error, Result};

/// Train a small Llama from scratch on texts, or a model further.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    zebroid pretrain ./teacher --data stories.jsonl --tokenizer ./tokenizer --hidden-size 128 --num-layers 5 --tokens 20000000\n  \
    zebroid pretrain ./longer --from ./teacher --data more.jsonl --tokens 5000000")]
pub struct Args {
    /// Folder of the result (a Hugging Face Llama checkpoint); must not exist.
    out: PathBuf,
    /// Texts (train kd --help says in what forms).
    #[arg(long, value_name = "TEXT", required = true)]
    data: Vec<Text>,
    /// A model to go on from, with its sizes and its tokenizer.
    #[arg(long, value_name = "MODEL", required_unless_present = "tokenizer", conflicts_with_all = ["tokenizer", "Sizes"])]
    from: Option<Model>,
    /// Folder with tokenizer.json, or a Hugging Face id.
    #[arg(long)]
    tokenizer: Option<Model>,
    #[command(flatten)]
    sizes: Sizes,
    #[command(flatten)]
    train: TrainArgs,
}

/// Of a model from scratch.
#[derive(Debug, clap::Args)]
struct Sizes {
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
}

impl Sizes {
    /// # Errors
    /// More layers than there may be.
    fn config(&self, tokenizer: &Tokenizer, positions: usize) -> Result<ModelConfig> {
        bounded("--num-layers", self.num_layers, MAX_LAYERS)?;
        let attention = AttentionConfig::new(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim
                .unwrap_or(self.hidden_size / self.num_heads.max(1)),
            Some(RopeConfig::new(self.rope_theta)),
        );
        Ok(ModelConfig {
            model_type: ModelConfig::MODEL_TYPE.into(),
            format_version: FORMAT_VERSION,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: tokenizer.vocab_size(),
            max_position_embeddings: positions,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            bos_token_id: tokenizer.bos(),
            eos_token_id: tokenizer.eos().to_vec(),
            layers: vec![MixerConfig::Attention(attention); self.num_layers],
            converted: None,
        })
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let models = [&args.from, &args.tokenizer].into_iter().flatten();
    let inputs: Vec<&Path> = models
        .map(Model::named)
        .chain(args.data.iter().filter_map(Text::source))
        .collect();
    let (settings, _lock) = args.train.claim(&args.out, &inputs)?;
    let start = match &args.from {
        Some(model) => Some(Checkpoint::open(&model.fetch()?)?),
        None => None,
    };
    let folder = match (&start, &args.tokenizer) {
        (Some(start), _) => start.folder.clone(),
        (None, Some(tokenizer)) => tokenizer.part(Part::Tokenizer)?,
        (None, None) => return Err(Error::invalid("no tokenizer is named").into()),
    };
    let tokenizer = Tokenizer::open(&folder)?;
    let place = args.train.device.place()?.training(settings.weights);
    let watch = Progress::default();
    let parts = match &start {
        Some(start) => {
            tokenizer.check(start.config.vocab_size)?;
            start.parts()?
        }
        None => {
            let config = args.sizes.config(&tokenizer, settings.seq_len)?;
            fresh(&config, settings.seed)?
        }
    };
    let record = start.as_ref().map(Checkpoint::provenance).transpose()?;
    let corpus = args.train.data.corpus(&args.data, &tokenizer, &watch)?;
    let stage = Stage::Pretrain(Pretrain::new(&parts, &place)?, &corpus);
    let run = TrainRun {
        name: "pretrain",
        config: &settings,
        out: &args.out,
        tokenizer: &folder,
        teacher: None,
        sources: Sources {
            record: record.unwrap_or_default(),
            inputs: vec![Text::input("data", &args.data, &corpus)],
        },
    };
    args.train.finish(run, stage.into(), watch)?;
    Ok(())
}
