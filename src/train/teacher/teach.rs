//! Writing a teacher's targets down, window by window.

use std::path::Path;

use candle_core::Tensor;
use rayon::prelude::*;

use super::record::Targets;
use super::served::Served;
use super::store::{About, Draft};
use crate::data::{Batch, Batches, Corpus, Tokenizer};
use crate::model::{LOGITS, Lm, pieces};
use crate::op::loss::{ABSENT, likeliest};
use crate::watch::Watch;
use crate::{Error, Result};

/// Who says what follows each position.
pub enum Source {
    Model(Box<Lm>),
    Served(Served),
}

impl Source {
    /// Of every position of a batch the `k` likeliest tokens.
    fn targets(&self, batch: &Batch, k: usize, watch: &dyn Watch) -> Result<Targets> {
        match self {
            Self::Model(lm) => of_model(lm, batch, k),
            Self::Served(served) => served.targets(batch, k, watch),
        }
    }
}

fn of_model(lm: &Lm, batch: &Batch, k: usize) -> Result<Targets> {
    let ids = Tensor::from_slice(&batch.input_ids, (batch.rows, batch.len), lm.device())?;
    let hidden = lm.hidden(&ids, Some(&batch.documents))?;
    let vocab = lm.config.vocab_size;
    let mut found = Targets::new(k);
    for range in pieces(batch.input_ids.len(), vocab, LOGITS) {
        let logits = lm
            .logits(&hidden, &range)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        let rows: Vec<(Vec<u32>, f32)> = (logits.par_chunks(vocab))
            .map(|row| {
                let tokens = likeliest(row, k);
                let rest = rest(row, &tokens);
                (tokens, rest)
            })
            .collect();
        for ((tokens, rest), row) in rows.iter().zip(logits.chunks(vocab)) {
            let known = tokens.iter().map(|token| row[*token as usize]);
            if !known.clone().all(f32::is_finite) {
                return Err(Error::invalid(
                    "the teacher's logits are not finite: nothing can be learned from them",
                ));
            }
            found.push(tokens, known, *rest);
        }
    }
    Ok(found)
}

/// `ln Σ exp` over the entries of a row that are not of `tokens`, of which the first is the greatest of all.
fn rest(row: &[f32], tokens: &[u32]) -> f32 {
    let greatest = tokens.first().map_or(0.0, |token| row[*token as usize]);
    let mut others = row.to_vec();
    for token in tokens {
        others[*token as usize] = f32::NEG_INFINITY;
    }
    let sum: f64 = others.iter().map(|x| f64::from((x - greatest).exp())).sum();
    match tokens.len() == row.len() {
        true => ABSENT,
        // What is too small for a float is far below what is told apart.
        false => greatest + sum.max(f64::MIN_POSITIVE).ln() as f32,
    }
}

/// Writes the targets of all windows of `corpus` into `folder`, `rows` windows at a time; shards that are there are kept, and what is
/// there of other settings goes with `force`.
///
/// # Errors
/// An unfinished attempt of other settings, a disk that is full, what a server said, or [`Error::Interrupted`].
pub fn teach(
    source: &Source,
    about: &About,
    (corpus, tokenizer): (&Corpus, &Tokenizer),
    (folder, force): (&Path, bool),
    rows: usize,
    watch: &dyn Watch,
) -> Result<()> {
    let mut draft = Draft::open(folder, about, tokenizer, corpus.manifest(), force)?;
    watch.start("teach", about.windows);
    let missing = draft.missing();
    let per_shard = about.per_shard();
    let windows = |shard: usize| shard * per_shard..about.windows.min((shard + 1) * per_shard);
    let mut done = about.windows - missing.iter().map(|s| windows(*s).len()).sum::<usize>();
    let (began, before) = (std::time::Instant::now(), done);
    let go_on = |done: usize| match watch.stop() && done < about.windows {
        true => Err(Error::Interrupted(format!(
            "shards that are whole are kept in {}; run the same command again to go on",
            folder.display()
        ))),
        false => Ok(()),
    };
    for shard in missing {
        let all = windows(shard);
        for from in all.clone().step_by(rows) {
            let batch = corpus.numbered(from..all.end.min(from + rows), about.seq_len)?;
            let targets = source.targets(&batch, about.top_k, watch)?;
            for (row, window) in batch.examples.iter().enumerate() {
                draft.push(
                    *window,
                    &targets.part(row * batch.len..(row + 1) * batch.len),
                );
            }
            done += batch.rows;
            let tokens = ((done - before) * about.seq_len) as f64;
            let speed = tokens / began.elapsed().as_secs_f64();
            watch.at(done, &format!("windows, {speed:.0} tokens/s"));
            if batch.examples.last().is_some_and(|last| last + 1 < all.end) {
                go_on(done)?;
            }
        }
        draft.write(shard)?;
        go_on(done)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_all_but_the_likeliest() {
        let row = [0.5f32, 2.0, -1.0, 1.5, f32::NEG_INFINITY];
        let tokens = likeliest(&row, 2);
        assert_eq!(tokens, [1, 3]);
        let expected = (0.5f32.exp() + (-1f32).exp()).ln();
        assert!((rest(&row, &tokens) - expected).abs() < 1e-6);
        assert_eq!(rest(&row[..2], &likeliest(&row[..2], 2)), ABSENT);
        let far = rest(&[0.0, -200.0], &[0]);
        assert!(far.is_finite() && far < -100.0, "{far}");
    }
}
