//! `--init`, `--calibration`: how mixers are born.

use std::path::{Path, PathBuf};

use super::output::progress;
use super::{cache, interrupt};
use crate::convert::{Calibration, CalibrationConfig, Init, InitName};
use crate::data::{Corpus, Packing};
use crate::pipeline::Base;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub struct InitArgs {
    /// How mixers are born from attention weights.
    #[arg(long, value_enum, default_value = "refined")]
    init: InitName,
    /// Text that the refined initialisation is fitted to, and that ranks and the report are measured on:
    /// JSON lines [train: --data].
    #[arg(long)]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    config: CalibrationConfig,
}

impl InitArgs {
    /// Runs the calibration pass, or reads what an earlier one kept; `fallback` is used where no text is
    /// named and one is needed.
    ///
    /// # Errors
    /// A refined initialisation without text.
    pub fn calibration(&self, base: &Base, fallback: Option<&Path>) -> Result<Option<Calibration>> {
        let text = match (self.init, self.calibration.as_deref().or(fallback)) {
            (InitName::Reference, _) if self.calibration.is_none() => return Ok(None),
            (_, Some(text)) => text,
            (_, None) => {
                return Err(Error::invalid(
                    "--init refined is fitted to text: name it with --calibration FILE.jsonl, or use --init reference",
                ));
            }
        };
        let corpus = Corpus::load(text, &base.tokenizer, Packing::Documents)?;
        calibrate(base, &corpus, &self.config).map(Some)
    }

    /// Only if a text is named.
    pub fn calibration_if_named(&self, base: &Base) -> Result<Option<Calibration>> {
        match self.calibration {
            Some(_) => self.calibration(base, None),
            None => Ok(None),
        }
    }

    /// The initialisation; `own_inputs` as in [`Init::Refined`].
    pub fn init<'a>(
        &self,
        calibration: &'a Option<Calibration>,
        own_inputs: bool,
        seed: u64,
    ) -> Init<'a> {
        match (self.init, calibration) {
            (InitName::Refined, Some(calibration)) => Init::Refined {
                calibration,
                own_inputs,
            },
            _ => Init::Reference { seed },
        }
    }
}

/// The pass itself, with a bar and Ctrl-C, kept in the cache.
pub fn calibrate(base: &Base, corpus: &Corpus, config: &CalibrationConfig) -> Result<Calibration> {
    interrupt::install();
    let bar = progress("calibrate", 0);
    let found = base.calibrate(
        corpus,
        config,
        &cache::folder(),
        &interrupt::asked,
        &mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        },
    );
    bar.finish_and_clear();
    found
}
