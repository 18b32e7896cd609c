//! `[calibration]`: what the teacher's mixers read and write on the training text.

use super::{Context, Made, Sizes, Stage, check_context};
use crate::Result;
use crate::checkpoint::Key;
use crate::convert::{CalibrationConfig, calibrate, calibration_key};
use crate::pipeline::texts::Texts;

impl Stage for CalibrationConfig {
    fn about(&self) -> String {
        super::training::millions(self.tokens as u64)
    }

    fn check(&self, sizes: &mut Sizes) -> Result<()> {
        check_context(sizes.teacher, self.seq_len)
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
