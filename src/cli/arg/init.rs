//! `--init`, `--calibration`: how mixers are born.

use super::{cache, data};
use crate::convert::{Calibration, CalibrationConfig, Init, InitName, calibrate};
use crate::data::Packing;
use crate::pipeline::stage::compose::Birth;
use crate::pipeline::{Base, Text};
use crate::watch::Watch;
use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub struct InitArgs {
    /// How mixers are born from attention weights.
    #[arg(long, value_enum, default_value = "refined")]
    init: InitName,
    /// Text that the refined initialisation is fitted to, and that ranks and the report are measured on:
    /// Texts [train: --data].
    #[arg(long, value_name = "TEXT")]
    calibration: Vec<Text>,
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
        fallback: &[Text],
        watch: &dyn Watch,
    ) -> Result<Option<Calibration>> {
        let texts = match &self.calibration[..] {
            [] if self.init == InitName::Published => return Ok(None),
            [] => fallback,
            named => named,
        };
        if texts.is_empty() {
            return Err(Error::invalid(
                "--init refined is fitted to text: name it with --calibration FILE.jsonl, or use --init published",
            ));
        }
        let corpus = data::corpus(texts, &base.tokenizer, Packing::Documents, watch)?;
        let (parts, place, folder) = (&base.parts, &base.place, cache::folder());
        calibrate(parts, place, &corpus, &self.config, &folder, watch).map(Some)
    }

    /// What a record says of `init`; `fallback` as in [`InitArgs::calibration`].
    pub fn birth(&self, init: &Init, fallback: &[Text]) -> Birth {
        let texts = match &self.calibration[..] {
            [] => fallback,
            named => named,
        };
        Birth::of(init, &self.config, &Text::names(texts))
    }

    /// Only if a text is named.
    pub fn calibration_if_named(
        &self,
        base: &Base,
        watch: &dyn Watch,
    ) -> Result<Option<Calibration>> {
        match &self.calibration[..] {
            [] => Ok(None),
            texts => self.calibration(base, texts, watch),
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
