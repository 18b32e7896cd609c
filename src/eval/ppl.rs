//! Perplexity of any text: every token once, with as much context as a window allows.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Text, Tokenizer};
use crate::model::{LOGITS, Lm, pieces};
use crate::op::loss::cross_entropy;
use crate::watch::Watch;
use crate::{Error, Result};

/// What a token may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum PplMode {
    /// Its own document: the context is reset at each.
    #[default]
    Documents,
    /// All text before it, as one stream.
    Stream,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PplReport {
    /// `exp` of the mean negative log-likelihood a token.
    pub perplexity: f64,
    /// Negative log-likelihood a byte, in bits: comparable between tokenizers.
    pub bits_per_byte: f64,
    /// `exp` of the negative log-likelihood a word (by white space).
    pub word_perplexity: f64,
    /// Tokens scored.
    pub tokens: usize,
    pub bytes: usize,
    pub words: usize,
}

/// A window: its tokens, and the first of them that is scored.
struct Window {
    ids: Vec<u32>,
    from: usize,
}

/// Windows of `window` tokens every `stride`: a token is scored in the first window that holds it, behind
/// at least `window − stride` others once the text is that long. A text's first token has nothing before
/// it: it is scored only behind the begin token that the tokenizer adds.
///
/// # Errors
/// A window of fewer than two tokens, a stride that leaves tokens out, no token to score, or
/// [`Error::Interrupted`].
pub fn ppl(
    lm: &Lm,
    tokenizer: &Tokenizer,
    texts: &[Text],
    mode: PplMode,
    (window, stride): (usize, usize),
    batch_tokens: usize,
    watch: &dyn Watch,
) -> Result<PplReport> {
    if window < 2 || stride == 0 || stride >= window {
        return Err(Error::invalid(format!(
            "windows of {window} tokens every {stride}: a window needs two tokens, and a stride below it"
        )));
    }
    let ids = texts.iter().map(|text| {
        let tokens = text.tokens(tokenizer)?;
        Ok(tokens.into_iter().map(|(id, _)| id).collect::<Vec<u32>>())
    });
    let ids = ids.collect::<Result<Vec<_>>>()?;
    let streams = match mode {
        PplMode::Documents => ids,
        PplMode::Stream => vec![ids.concat()],
    };
    let mut windows = Vec::new();
    for ids in &streams {
        let (mut start, mut scored) = (0, 1);
        while scored < ids.len() {
            let end = (start + window).min(ids.len());
            windows.push(Window {
                ids: ids[start..end].to_vec(),
                from: scored - start,
            });
            scored = end;
            start += stride;
        }
    }
    // Windows of like length are read together.
    windows.sort_by_key(|w| std::cmp::Reverse(w.ids.len()));
    let (mut sum, mut tokens, mut at) = (0.0, 0, 0);
    watch.start("ppl", windows.len());
    while at < windows.len() {
        let len = windows[at].ids.len();
        let rows = (batch_tokens / len).max(1).min(windows.len() - at);
        let (found, count) = score(lm, &windows[at..at + rows], len)?;
        sum += found;
        tokens += count;
        at += rows;
        watch.reached(at, windows.len(), "windows")?;
    }
    if tokens == 0 {
        return Err(Error::invalid(
            "the text has no token with another before it",
        ));
    }
    let bytes: usize = texts.iter().map(|t| t.text.len()).sum();
    let words = texts.iter().map(|t| t.text.split_whitespace().count());
    let words: usize = words.sum();
    Ok(PplReport {
        perplexity: (sum / tokens as f64).exp(),
        bits_per_byte: sum / bytes as f64 / std::f64::consts::LN_2,
        word_perplexity: (sum / words as f64).exp(),
        tokens,
        bytes,
        words,
    })
}

/// Negative log-likelihood of the windows' scored tokens, and how many they are.
fn score(lm: &Lm, windows: &[Window], len: usize) -> Result<(f64, usize)> {
    let mut ids = Vec::with_capacity(windows.len() * len);
    let mut learned = Vec::with_capacity(windows.len() * len);
    for window in windows {
        let filled = window.ids.len();
        ids.extend_from_slice(&window.ids);
        ids.resize(ids.len() + len - filled, 0);
        learned.extend((0..len).map(|at| (window.from..filled).contains(&at)));
    }
    let batch = Batch::new(ids, vec![0; windows.len() * len], &learned, len);
    let ids = Tensor::from_slice(&batch.input_ids, (batch.rows, len), lm.device())?;
    let hidden = lm.hidden(&ids, Some(&batch.documents))?;
    let mut losses = Vec::with_capacity(batch.targets.len());
    for range in pieces(batch.targets.len(), lm.config.vocab_size, LOGITS) {
        let logits = lm.logits(&hidden, &range)?;
        let targets = Tensor::new(&batch.targets[range], lm.device())?;
        losses.extend(cross_entropy(&logits, &targets)?.to_vec1::<f32>()?);
    }
    let scored = losses
        .iter()
        .zip(&batch.mask)
        .filter(|(_, mask)| **mask > 0.0);
    let sum = scored.clone().map(|(loss, _)| f64::from(*loss)).sum();
    Ok((sum, scored.count()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::watch::Quiet;

    #[test]
    fn windows_score_every_token_once() {
        let folder = Path::new("assets/teacher");
        let lm = Checkpoint::open(folder).unwrap();
        let lm = lm.model(&crate::weights::Place::cpu()).unwrap();
        let tokenizer = Tokenizer::open(folder).unwrap();
        let texts = [
            "Tom had a red ball. Mia had a blue kite. Tom loved the red ball.",
            "Mia had a drum.",
        ];
        let documents = texts.map(|text| Text::whole(text.to_owned()));
        let run = |mode, window, stride, batch| {
            ppl(
                &lm,
                &tokenizer,
                &documents,
                mode,
                (window, stride),
                batch,
                &Quiet::default(),
            )
            .unwrap()
        };
        let lengths: Vec<usize> = texts
            .iter()
            .map(|t| tokenizer.encode(t).unwrap().len())
            .collect();
        let whole = run(PplMode::Documents, 64, 32, 1024);
        assert_eq!(whole.tokens, lengths[0] + lengths[1] - 2);
        assert_eq!(run(PplMode::Documents, 8, 4, 16).tokens, whole.tokens);
        assert_eq!(
            run(PplMode::Stream, 8, 4, 16).tokens,
            lengths[0] + lengths[1] - 1
        );
        // A window as long as the text is the plain loss.
        let mut sum = 0.0;
        for text in &texts {
            let ids = tokenizer.encode(text).unwrap();
            let input = Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu).unwrap();
            let logits = lm.forward(&input, None).unwrap().squeeze(0).unwrap();
            for (row, next) in logits.to_vec2::<f32>().unwrap().iter().zip(&ids[1..]) {
                let log_sum = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
                sum += log_sum - f64::from(row[*next as usize]);
            }
        }
        assert!((whole.perplexity - (sum / whole.tokens as f64).exp()).abs() < 1e-4);
        let bits = sum / std::f64::consts::LN_2 / (texts[0].len() + texts[1].len()) as f64;
        assert!((whole.bits_per_byte - bits).abs() < 1e-5);
        // Less context is not better, on a text the model knows.
        assert!(run(PplMode::Documents, 8, 7, 64).perplexity > whole.perplexity);
    }
}
