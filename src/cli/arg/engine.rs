//! What a command opens to generate text with: a model, memory for its sequences, and who guesses at its tokens.

use std::path::Path;

use super::device::DeviceArg;
use super::hub::Model;
use super::memory::MemoryArg;
use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::generate::{Drafter, Engine, EngineOptions};
use crate::mixer::Pool;
use crate::model::{Lm, cache_room};

/// Tokens of a text by which memory is shared out.
const TEXT: usize = 1024;

#[derive(Debug, Clone, clap::Args)]
pub struct EngineArg {
    #[command(flatten)]
    memory: MemoryArg,
    /// Speculative decoding: guess at the next tokens by what followed the last ones before (ngram), or by a smaller model of the same
    /// vocabulary (folder, .gguf file or Hugging Face id). The text stays the same; guessing ends where it does not pay.
    #[arg(long, value_name = "ngram|MODEL")]
    draft: Option<Model>,
    #[command(flatten)]
    device: DeviceArg,
}

impl EngineArg {
    /// How an engine uses the machine, as far as the command line says.
    pub fn options(&self) -> EngineOptions {
        EngineOptions {
            cache_type: self.memory.cache_type,
            cache_memory: self.memory.cache_memory,
            ..EngineOptions::default()
        }
    }

    /// Bytes for what sequences remember, where nobody says how many.
    ///
    /// # Errors
    /// A device that is not there.
    pub fn cache_room(&self) -> Result<usize> {
        cache_room(&self.device.place()?.device)
    }

    /// # Errors
    /// As [`EngineArg::open_with`].
    pub fn open(&self, checkpoint: &Path) -> Result<Engine> {
        self.open_with(checkpoint, self.options())
    }

    /// # Errors
    /// A checkpoint that cannot be used, a draft model of other tokens, or too little memory.
    pub fn open_with(&self, checkpoint: &Path, mut options: EngineOptions) -> Result<Engine> {
        let place = self.device.place()?;
        let opened = Checkpoint::open(checkpoint)?;
        let tokenizer = Tokenizer::open(checkpoint)?;
        let device = &place.device;
        let lm = opened.model(&place.host())?.decoding_on(device);
        let mut drafter = None;
        match &self.draft {
            None => {}
            Some(draft) if draft.named() == Path::new("ngram") => drafter = Some(Drafter::Ngrams),
            Some(draft) => {
                let path = draft.fetch()?;
                let opened = Checkpoint::open(&path)?;
                let own = Tokenizer::open(&path)?;
                let draft = opened.model(&place.host())?;
                // What both remember of a token shares the memory.
                let limit = match options.cache_memory {
                    Some(limit) => limit,
                    None => cache_room(device)?,
                };
                let bytes = |lm: &Lm| -> Result<usize> {
                    let keeps = lm.keeps()?;
                    Ok(Pool::new(&keeps, options.cache_type, usize::MAX, 1)?.bytes(TEXT))
                };
                let (model, guesser) = (bytes(&lm)?, bytes(&draft)?);
                let part = (limit as f64 * guesser as f64 / (model + guesser) as f64) as usize;
                options.cache_memory = Some(limit - part);
                let kind = options.cache_type;
                let draft = draft.decoding_on(device);
                drafter = Some(Drafter::model(&draft, &own, &tokenizer, kind, part)?);
            }
        }
        let mut engine = Engine::with(&lm, tokenizer, options)?;
        engine.drafter = drafter;
        Ok(engine)
    }
}
