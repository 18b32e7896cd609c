//! `[calibration]`: what the teacher's mixers read and write on the training text.

use super::{Context, Made, Sizes, Stage, check_context};
use crate::Result;
use crate::checkpoint::Key;
use crate::convert::{CHUNK, CalibrationConfig, calibrate, calibration_key};
use crate::mixer::Windows;
use crate::pipeline::need::{Need, Supply, reading};
use crate::pipeline::texts::Texts;
use crate::train::cost::{Memory, forward};

impl Stage for CalibrationConfig {
    fn about(&self) -> String {
        super::training::millions(self.tokens as u64)
    }

    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        check_context(sizes.teacher, self.seq_len)
    }

    /// Every layer's products of its inputs, in f64: summed up, and again as statistics. A layer's inputs are widened on the way.
    fn need(&self, sizes: &Sizes, with: &Supply) -> Result<Need> {
        let config = sizes.teacher;
        let (d, layers) = (config.hidden_size, config.layers.len());
        let windows = Windows {
            rows: CHUNK,
            len: self.seq_len,
        };
        let sums = 8 * layers * d * d;
        let layer = windows.tokens() * d * (8 + 8 + 4) + d * d * (4 + 8 + 8);
        let summed = reading(config, windows, 0).with("sums", sums + layer);
        let kept = Memory::default().with("sums", 2 * sums);
        Ok(Need {
            phases: vec![summed, kept],
            kept: sums,
            scratch: 2 * sums,
            statistics: sums,
            tokens: Some(
                self.tokens
                    .min(with.text.map_or(usize::MAX, |t| t as usize)) as u64,
            ),
            // Without the head; a product of every input with every other.
            operations: Some(forward(config, windows) + 2.0 * (layers * d * d) as f64),
            ..Need::default()
        })
    }

    fn fill(&self, texts: &Texts) -> Result<()> {
        CalibrationConfig::check(self, &texts.train)
    }

    fn key(&self, with: &Context, _: &Made) -> Result<Key> {
        let base = with.base;
        calibration_key(&base.parts, &base.place, &with.texts.train, self)
    }

    fn carry_out(&self, _: &str, with: &Context, made: &mut Made) -> Result<()> {
        let (base, around) = (with.base, with.surroundings);
        let text = &with.texts.train;
        let found = calibrate(
            &base.parts,
            &base.place,
            text,
            self,
            around.out,
            around.watch,
        )?;
        made.calibration = Some(found);
        Ok(())
    }
}
