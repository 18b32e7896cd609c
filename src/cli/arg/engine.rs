//! What a command opens to generate text with: a model, memory for its sequences, and who guesses at its tokens.

use std::path::Path;

use super::device::DeviceArg;
use super::memory::MemoryArg;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::generate::{Drafter, Engine, EngineOptions};

#[derive(Debug, Clone, clap::Args)]
pub struct EngineArg {
    #[command(flatten)]
    memory: MemoryArg,
    /// Speculative decoding: guess at the next tokens by what followed the last ones before (ngram), or by a smaller model of the same
    /// vocabulary. The text stays the same; guessing ends where it does not pay.
    #[arg(long, value_name = "ngram|MODEL")]
    draft: Option<String>,
    #[command(flatten)]
    device: DeviceArg,
}

impl EngineArg {
    /// # Errors
    /// A checkpoint that cannot be used, a draft model of other tokens, or too little memory.
    pub fn open(&self, checkpoint: &Path) -> Result<Engine> {
        let place = self.device.place()?;
        let tokenizer = Tokenizer::open(checkpoint)?;
        let lm = Checkpoint::open(checkpoint)?.model(&place)?;
        let options = EngineOptions {
            cache_type: self.memory.cache_type,
            cache_memory: self.memory.cache_memory,
            ..EngineOptions::default()
        };
        let mut engine = Engine::with(&lm, tokenizer, options)?;
        engine.drafter = match self.draft.as_deref() {
            None => None,
            Some("ngram") => Some(Drafter::Ngrams),
            Some(path) => {
                let path = Path::new(path);
                let own = Tokenizer::open(path)?;
                let lm = Checkpoint::open(path)?.model(&place)?;
                let (kind, limit) = (engine.pool.kind(), engine.pool.limit());
                Some(Drafter::model(&lm, &own, &engine.tokenizer, kind, limit)?)
            }
        };
        Ok(engine)
    }
}
