//! How near each layer of a hybrid is to the teacher's, and the whole hybrid with it.

use candle_core::{DType, Tensor};
use serde::Serialize;

use super::kl::{KlReport, evaluate_batch};
use crate::Result;
use crate::data::Batch;
use crate::model::Lm;
use crate::watch::Watch;

/// Relative squared errors, `Σ(x − t)² / Σ t²`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerFidelity {
    pub mixer: &'static str,
    /// Of the mixer's output on the teacher's input, on the text that it was fitted to.
    pub calibration: f64,
    /// The same on text that it was not fitted to.
    pub held_out: f64,
    /// Of the hybrid's own residual stream after the layer, held-out.
    pub stream: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fidelity {
    pub layers: Vec<LayerFidelity>,
    /// The whole hybrid on the held-out text.
    pub whole: KlReport,
}

/// Windows a forward pass of the whole models.
const AT_ONCE: usize = 8;

/// On the text that the student was fitted to, and on other text.
///
/// # Errors
/// Models of different vocabularies, or [`crate::Error::Interrupted`].
pub fn fidelity(
    teacher: &Lm,
    student: &Lm,
    fit: &Batch,
    held_out: &Batch,
    watch: &dyn Watch,
) -> Result<Fidelity> {
    let whole = evaluate_batch(teacher, student, held_out, AT_ONCE, watch)?;
    let fitted = walk(teacher, student, fit, watch)?;
    let held_out = walk(teacher, student, held_out, watch)?;
    let names = student.config.layers.iter().map(|layer| layer.name());
    Ok(Fidelity {
        layers: names
            .zip(fitted.into_iter().zip(held_out))
            .map(
                |(mixer, ((calibration, _), (held_out, stream)))| LayerFidelity {
                    mixer,
                    calibration,
                    held_out,
                    stream,
                },
            )
            .collect(),
        whole,
    })
}

/// Of every layer: the error of its mixer on the teacher's input, and of the stream after it.
fn walk(teacher: &Lm, student: &Lm, batch: &Batch, watch: &dyn Watch) -> Result<Vec<(f64, f64)>> {
    let layers = student.layers.len();
    watch.start("layer errors", layers);
    let documents = Some(&batch.documents);
    let ids = Tensor::from_slice(&batch.input_ids, (batch.rows, batch.len), teacher.device())?;
    let (mut taught, mut own) = (teacher.embed(&ids)?, student.embed(&ids)?);
    let mut errors = Vec::new();
    for (theirs, ours) in teacher.layers.iter().zip(&student.layers) {
        let input = theirs.mixer_input(&taught)?;
        let output = theirs.mixer.forward(&input, documents)?;
        let mixed = ours.mixer.forward(&ours.mixer_input(&taught)?, documents)?;
        let mixer = relative(&mixed, &output)?;
        taught = theirs.finish(&taught, &output)?;
        own = ours.forward(&own, documents)?.hidden;
        errors.push((mixer, relative(&own, &taught)?));
        watch.reached(errors.len(), layers, "layers")?;
    }
    Ok(errors)
}

fn relative(x: &Tensor, target: &Tensor) -> Result<f64> {
    let square =
        |t: &Tensor| -> Result<f64> { Ok(t.sqr()?.to_dtype(DType::F64)?.sum_all()?.to_scalar()?) };
    Ok(square(&(x - target)?)? / square(target)?.max(f64::MIN_POSITIVE))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::data::{Corpus, Packing, Tokenizer, stories};
    use crate::watch::Quiet;

    #[test]
    fn a_teacher_is_faithful_to_itself() {
        let teacher = Checkpoint::open(Path::new("assets/teacher")).unwrap();
        let lm = teacher.model(&crate::weights::Place::cpu()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("stories.jsonl");
        stories::write_jsonl(&data, 1, 30).unwrap();
        let tokenizer = Tokenizer::open(&teacher.folder).unwrap();
        let corpus = Corpus::load(&data, &tokenizer, Packing::Documents).unwrap();
        let part = |from| corpus.ordered(from, 8, 64).unwrap();
        let found = fidelity(&lm, &lm, &part(0), &part(8), &Quiet::default()).unwrap();
        assert!(found.whole.kl == 0.0 && found.whole.agreement == 1.0);
        for layer in found.layers {
            assert_eq!(
                (layer.calibration, layer.held_out, layer.stream),
                (0.0, 0.0, 0.0)
            );
        }
    }
}
