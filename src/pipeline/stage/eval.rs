//! `[eval]`: how results are measured against the teacher.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Context, Made, StageResult, Student, check_context};
use crate::Result;
use crate::checkpoint::{self, Checkpoint};
use crate::data::{Batches, Corpus};
use crate::eval::kl;
use crate::model::ModelConfig;
use crate::numerics;
use crate::train::{StepMetrics, check_batch};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalStage {
    /// Windows per forward pass.
    pub batch_size: usize,
    /// Tokens per window.
    pub seq_len: usize,
}

impl Default for EvalStage {
    fn default() -> Self {
        Self {
            batch_size: 16,
            seq_len: 256,
        }
    }
}

impl EvalStage {
    /// # Errors
    /// Names the field that cannot work.
    pub fn check(&self, teacher: &ModelConfig) -> Result<()> {
        check_batch(self.batch_size, 1, self.seq_len)?;
        check_context(teacher, self.seq_len)
    }

    /// # Errors
    /// A text without a window.
    pub fn fill(&self, validation: &Corpus) -> Result<()> {
        validation.check(1, self.seq_len)
    }
}

/// Measures what a stage has made and adds it to the results; it is what the next stage goes on from.
pub(super) fn result(
    name: &str,
    student: Student,
    metrics: Vec<StepMetrics>,
    with: &Context,
    made: &mut Made,
) -> Result<()> {
    let (eval, text) = (&with.common.eval, &with.texts.validation);
    let settings = json!([student.key, eval, text.hash()]);
    let key = with.key(numerics::Stage::Kl, settings)?;
    let kl = with.store.get("eval", &key, || {
        let lm = Checkpoint::open(&student.folder)?.model(&with.base.place)?;
        kl::evaluate(
            &with.base.lm()?,
            &lm,
            text,
            eval.batch_size,
            eval.seq_len,
            with.surroundings.watch,
        )
    })?;
    let text = with.texts.validation_input();
    checkpoint::measured(&student.folder, text, kl.figures())?;
    made.results.push(StageResult {
        name: name.to_owned(),
        folder: student.folder.clone(),
        kl: Some(kl),
        metrics,
    });
    made.student = Some(student);
    Ok(())
}
