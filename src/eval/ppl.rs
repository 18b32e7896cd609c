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

/// How a text is read.
#[derive(Debug, Clone, Copy)]
pub struct PplConfig {
    pub mode: PplMode,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens from a window's beginning to the next one's.
    pub stride: usize,
    /// Tokens read at once.
    pub batch_tokens: usize,
}

/// A window: its tokens, and the first of them that is scored.
struct Window {
    ids: Vec<u32>,
    from: usize,
}

/// Cuts one stream after the other into windows, as far as their tokens are known.
struct Cutter {
    window: usize,
    stride: usize,
    /// From where the next window begins.
    ids: Vec<u32>,
    /// The first of them that no window has scored.
    from: usize,
}

impl Cutter {
    /// A stream goes on.
    fn add(&mut self, ids: Vec<u32>, windows: &mut Vec<Window>) {
        self.ids.extend(ids);
        let mut start = 0;
        while self.ids.len() - start >= self.window {
            windows.push(Window {
                ids: self.ids[start..start + self.window].to_vec(),
                from: self.from,
            });
            self.from = self.window - self.stride;
            start += self.stride;
        }
        self.ids.drain(..start);
    }

    /// A stream ends.
    fn end(&mut self, windows: &mut Vec<Window>) {
        let ids = std::mem::take(&mut self.ids);
        if self.from < ids.len() {
            windows.push(Window {
                ids,
                from: self.from,
            });
        }
        self.from = 1;
    }
}

/// Tokens whose windows are in memory together.
const PORTION: usize = if cfg!(test) { 16 } else { 1 << 20 };

/// Windows of `window` tokens every `stride`: a token is scored in the first window that holds it, behind
/// at least `window − stride` others once the text is that long. A text's first token has nothing before
/// it: it is scored only behind the begin token that the tokenizer adds. `texts`: each with the share of all that has been
/// read with it; they are in memory a portion at a time.
///
/// # Errors
/// A window of fewer than two tokens, a stride that leaves tokens out, no token to score, a text's own, or
/// [`Error::Interrupted`].
pub fn ppl(
    lm: &Lm,
    tokenizer: &Tokenizer,
    texts: impl IntoIterator<Item = Result<(Text, f64)>>,
    config: PplConfig,
    watch: &dyn Watch,
) -> Result<PplReport> {
    let PplConfig { window, stride, .. } = config;
    if window < 2 || stride == 0 || stride >= window {
        return Err(Error::invalid(format!(
            "windows of {window} tokens every {stride}: a window needs two tokens, and a stride below it"
        )));
    }
    let mut cutter = Cutter {
        window,
        stride,
        ids: Vec::new(),
        from: 1,
    };
    let (mut sum, mut tokens, mut bytes, mut words) = (0.0, 0, 0, 0);
    let (mut texts, mut windows) = (texts.into_iter(), Vec::new());
    let (mut done, mut all) = (0, None);
    loop {
        let (mut held, mut read) = (0, 1.0);
        while held < PORTION
            && let Some(text) = texts.next()
        {
            let (text, share) = text?;
            bytes += text.text.len();
            words += text.text.split_whitespace().count();
            let ids = text.tokens(tokenizer)?;
            held += ids.len();
            cutter.add(ids.into_iter().map(|(id, _)| id).collect(), &mut windows);
            if config.mode == PplMode::Documents {
                cutter.end(&mut windows);
            }
            read = share;
        }
        let last = held < PORTION;
        if last {
            cutter.end(&mut windows);
            read = 1.0;
        }
        // What is not read yet has about as many as what is.
        let all = *all.get_or_insert_with(|| {
            let all = (windows.len() as f64 / read).ceil() as usize;
            watch.start("ppl", all);
            all
        });
        // Windows of like length are read together.
        windows.sort_by_key(|w| std::cmp::Reverse(w.ids.len()));
        let mut left = &windows[..];
        while let Some(longest) = left.first() {
            let len = longest.ids.len();
            let rows = (config.batch_tokens / len).max(1).min(left.len());
            let (found, count) = score(lm, &left[..rows], len)?;
            sum += found;
            tokens += count;
            done += rows;
            left = &left[rows..];
            // Before the last portion it is never through.
            let all = match last {
                true => done + left.len(),
                false => all.max(done + left.len() + 1),
            };
            watch.reached(done, all, "windows")?;
        }
        windows.clear();
        if last {
            break;
        }
    }
    if tokens == 0 {
        return Err(Error::invalid(
            "the text has no token with another before it",
        ));
    }
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

    /// However a stream comes.
    #[test]
    fn windows_begin_every_stride() {
        for len in [1, 2, 7, 8, 9, 12, 13, 40] {
            let whole: Vec<u32> = (0..len).collect();
            let (window, stride) = (8usize, 4usize);
            let (mut start, mut scored, mut want) = (0, 1, Vec::new());
            while scored < whole.len() {
                let end = (start + window).min(whole.len());
                want.push((whole[start..end].to_vec(), scored - start));
                (scored, start) = (end, start + stride);
            }
            for piece in [1, 5, 8, 100] {
                let (ids, from) = (Vec::new(), 1);
                let mut cutter = Cutter {
                    window,
                    stride,
                    ids,
                    from,
                };
                // What one stream leaves is not in the next.
                for _ in 0..2 {
                    let mut windows = Vec::new();
                    for piece in whole.chunks(piece) {
                        cutter.add(piece.to_vec(), &mut windows);
                    }
                    cutter.end(&mut windows);
                    let found: Vec<_> = windows.into_iter().map(|w| (w.ids, w.from)).collect();
                    assert_eq!(found, want, "{len} by {piece}");
                }
            }
        }
    }

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
        let run = |mode, window, stride, batch_tokens| {
            let config = PplConfig {
                mode,
                window,
                stride,
                batch_tokens,
            };
            let texts = texts.map(|text| Ok((Text::whole(text.to_owned()), 1.0)));
            ppl(&lm, &tokenizer, texts, config, &Quiet::default()).unwrap()
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
