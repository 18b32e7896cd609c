//! Requests are scored right however they are batched; samples, files and results are those of the harness.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::score::{Tokens, log_likelihoods, tokens};
use crate::checkpoint::Checkpoint;
use crate::data::Tokenizer;
use crate::model::{Lm, ModelConfig};

fn teacher() -> (Lm, Tokenizer) {
    let folder = Path::new("assets/teacher");
    let lm = Checkpoint::open(folder)
        .unwrap()
        .model(&Device::Cpu, DType::F32);
    (lm.unwrap(), Tokenizer::open(folder).unwrap())
}

/// Alone, by the whole forward pass.
fn plainly(lm: &Lm, request: &Tokens) -> (f64, bool) {
    let whole = [request.context.as_slice(), &request.continuation].concat();
    let ids = Tensor::from_slice(&whole, (1, whole.len()), &Device::Cpu).unwrap();
    let logits = lm.forward(&ids, None).unwrap().squeeze(0).unwrap();
    let rows = logits.to_vec2::<f32>().unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for (i, token) in request.continuation.iter().enumerate() {
        let row = &rows[request.context.len() + i - 1];
        let log_sum = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
        sum += f64::from(row[*token as usize]) - log_sum;
        greedy &= row.iter().all(|x| *x <= row[*token as usize]);
    }
    (sum, greedy)
}

/// Sharing, sorting and batching change nothing, for a Llama and for a hybrid.
#[test]
fn shared_contexts_score_as_each_request_alone() {
    let (lm, tokenizer) = teacher();
    let mut config: ModelConfig = lm.config.clone();
    let plan = crate::convert::PlanOptions {
        mla: vec![1],
        qk_rope_head_dim: Some(8),
        ..Default::default()
    };
    config = crate::convert::plan(&config, &plan).unwrap();
    let checkpoint = Checkpoint::open(Path::new("assets/teacher")).unwrap();
    let weights = checkpoint.weights(DType::F32, &Device::Cpu).unwrap();
    let init = crate::convert::Init::Reference { seed: 1 };
    let composed = crate::convert::compose(&lm.config, &weights, &config, &init).unwrap();
    let hybrid = Lm::new(&config, &crate::weights::Weights::new(composed.tensors)).unwrap();
    let texts = [
        (
            "One day Tom and Mia walked to the",
            [" park.", " river. Tom had a red ball.", " x"],
        ),
        (
            "Tom had a blue kite. Mia had a",
            [" drum.", " red drum and a", " green"],
        ),
        ("", ["Tom", " Tom had a red ball.", "A"]),
    ];
    let requests: Vec<Tokens> = texts
        .iter()
        .flat_map(|(context, all)| all.map(|c| tokens(&tokenizer, context, c, 256).unwrap()))
        .collect();
    for lm in [&lm, &hybrid] {
        for batch_tokens in [1, 24, 4096] {
            let found = log_likelihoods(lm, &requests, batch_tokens, &mut |_| true).unwrap();
            for (request, (sum, greedy)) in requests.iter().zip(found) {
                let (true_sum, true_greedy) = plainly(lm, request);
                assert!((sum - true_sum).abs() < 2e-4, "{sum} for {true_sum}");
                assert_eq!(greedy, true_greedy);
            }
        }
    }
}

#[test]
fn requests_split_and_truncate_as_the_harness_does() {
    let (_, tokenizer) = teacher();
    let split = |context: &str, continuation: &str, max: usize| {
        tokens(&tokenizer, context, continuation, max).unwrap()
    };
    // Spaces move over.
    assert_eq!(split("Tom had ", "a", 99), split("Tom had", " a", 99));
    let whole = split("Tom had a red", " ball. Mia had a", 99);
    let short = split("Tom had a red", " ball. Mia had a", 5);
    let all = [whole.context.as_slice(), &whole.continuation].concat();
    let kept = [short.context.as_slice(), &short.continuation].concat();
    assert_eq!(kept, all[all.len() - 6..]);
    assert_eq!(short.continuation, whole.continuation);
    let error = tokens(&tokenizer, "Tom", " had a red ball. Mia had a", 3).unwrap_err();
    assert!(
        error.to_string().contains("the model's context 3"),
        "{error}"
    );
}
