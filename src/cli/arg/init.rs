//! `--init`, `--calibration`: how mixers are born.

use std::path::{Path, PathBuf};

use super::{cache, data};
use crate::convert::{Calibration, CalibrationConfig, Init, InitName, calibrate};
use crate::data::Packing;
use crate::pipeline::Base;
use crate::watch::Watch;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub struct InitArgs {
    /// How mixers are born from attention weights.
    #[arg(long, value_enum, default_value = "refined")]
    init: InitName,
    /// Text that the refined initialisation is fitted to, and that ranks and the report are measured on:
    /// Texts [train: --data].
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
    pub fn calibration(
        &self,
        base: &Base,
        fallback: Option<&Path>,
        watch: &dyn Watch,
    ) -> Result<Option<Calibration>> {
        let text = match (self.init, self.calibration.as_deref().or(fallback)) {
            (InitName::Published, _) if self.calibration.is_none() => return Ok(None),
            (_, Some(text)) => text,
            (_, None) => {
                return Err(Error::invalid(
                    "--init refined is fitted to text: name it with --calibration FILE.jsonl, or use --init published",
                ));
            }
        };
        let corpus = data::corpus(text, &base.tokenizer, Packing::Documents, watch)?;
        let (parts, place, folder) = (&base.parts, &base.place, cache::folder());
        calibrate(parts, place, &corpus, &self.config, &folder, watch).map(Some)
    }

    /// Only if a text is named.
    pub fn calibration_if_named(
        &self,
        base: &Base,
        watch: &dyn Watch,
    ) -> Result<Option<Calibration>> {
        match self.calibration {
            Some(_) => self.calibration(base, None, watch),
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
            _ => Init::Published { seed },
        }
    }
}
