//! Matrices in 8 bits as others keep them in safetensors: `NAME` in `F8_E4M3`, and in `NAME_scale` what its entries are multiplied by, one
//! number a row or for all. `quantization_config` in `config.json` says so; what it says beside that is how others round activations
//! and caches, which are not rounded here.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::op::linear::{Matrix, Storage};
use crate::{Error, Result};

const FIELD: &str = "quantization_config";

/// Beside matrices in 8 bits, and of no use here.
const OTHERS: [&str; 4] = [".input_scale", ".input_scale_ub", ".k_scale", ".v_scale"];

/// What the scale of a matrix is called.
pub(super) fn scale_of(name: &str) -> String {
    format!("{name}_scale")
}

/// The matrix that a tensor is the scale of, by its name.
pub(super) fn scaled_by(name: &str) -> Option<&str> {
    name.strip_suffix("_scale")
}

pub(super) fn is_of_others(name: &str) -> bool {
    OTHERS.iter().any(|end| name.ends_with(end))
}

/// What is wrong with the scale of a matrix of so many rows, by the scale's shape; by whether the matrix has scales of blocks where it has none.
pub(super) fn wrong(
    name: &str,
    rows: usize,
    scale: Option<&[usize]>,
    of_blocks: bool,
) -> Option<String> {
    match scale {
        Some([] | [1]) => None,
        Some([n] | [n, 1]) if *n == rows => None,
        Some([1, 1]) => None,
        Some(shape) => Some(format!(
            "{} has shape {shape:?}: one scale for all of the matrix or one a row ([{rows}, 1]) is supported",
            scale_of(name)
        )),
        None if of_blocks => Some(format!(
            "{name} has a scale for every block of it ({}_inv), which is not supported: take a checkpoint with a scale a row, or the one \
             that it was made from",
            scale_of(name)
        )),
        None => Some(format!(
            "{name} has dtype F8_E4M3 but no scale ({})",
            scale_of(name)
        )),
    }
}

/// # Errors
/// Names a way of rounding weights that is not read, before their tensors are found not to fit.
pub(super) fn check(path: &Path, config: &Value) -> Result<()> {
    const KNOWN: &str = "fp8, fbgemm_fp8 and compressed-tensors (float-quantized) are, with a scale a row or a matrix: take such a \
                         checkpoint, the one that it was made from, or a GGUF file";
    let Some(found) = config.get(FIELD).filter(|found| !found.is_null()) else {
        return Ok(());
    };
    let refused = |what: String| {
        let what = format!("{FIELD}: {what} not supported; {KNOWN}");
        Err(Error::file(path, what))
    };
    match found["quant_method"].as_str() {
        Some("fp8") => match &found["weight_block_size"] {
            Value::Null => Ok(()),
            size => refused(format!(
                "a scale for every block (weight_block_size {size}) is"
            )),
        },
        Some("fbgemm_fp8") => Ok(()),
        Some("compressed-tensors") => match found["format"].as_str() {
            // The older name of files whose types say all.
            Some("float-quantized" | "naive-quantized") => Ok(()),
            other => refused(format!(
                "compressed-tensors of format {} is",
                other.unwrap_or("(none)")
            )),
        },
        other => refused(format!("quant_method {} is", other.unwrap_or("(none)"))),
    }
}

/// The same weights, with the scales of those in 8 bits beside them.
///
/// # Errors
/// Scales that are no tensor.
pub(super) fn with_scales(weights: &BTreeMap<String, Matrix>) -> Result<BTreeMap<String, Matrix>> {
    let mut all = weights.clone();
    for (name, weight) in weights.iter().filter(|(_, weight)| is_fp8(weight)) {
        let Matrix::Stored(w) = weight else { continue };
        let scales = w
            .scales()
            .map_or_else(|| vec![1.; w.rows()], <[f32]>::to_vec);
        let scales = Tensor::from_vec(scales, (w.rows(), 1), &Device::Cpu)?;
        all.insert(scale_of(name), scales.into());
    }
    Ok(all)
}

pub(super) fn is_fp8(weight: &Matrix) -> bool {
    matches!(weight, Matrix::Stored(w) if w.storage() == Storage::F8E4M3)
}

/// Says in a `config.json` of another program's format that there are such matrices, as compressed-tensors does.
pub(super) fn declare(config: &mut Value, weights: &BTreeMap<String, Matrix>) {
    if !weights.values().any(is_fp8) {
        return;
    }
    let products = weights.iter().filter(|(name, weight)| {
        weight.shape().len() == 2 && !is_fp8(weight) && !name.ends_with("embed_tokens.weight")
    });
    let kept: Vec<&str> = products
        .filter_map(|(name, _)| name.strip_suffix(".weight"))
        .collect();
    config[FIELD] = json!({
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": { "group_0": {
            "targets": ["Linear"],
            "weights": { "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true, "dynamic": false },
            "input_activations": null,
        } },
        "ignore": kept,
    });
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::super::tests::{Folder, bits, config, tensors, write};
    use super::super::{Checkpoint, Format, read_json};
    use super::*;
    use crate::op::linear::quantize_float8;

    const UP: &str = "model.layers.0.mlp.up_proj.weight";

    type Raw = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

    /// A folder with one matrix in 8 bits, and a scale of this type and shape with these entries.
    struct Fp8 {
        folder: Folder,
        all: Raw,
        codes: Vec<u8>,
        scales: Vec<f32>,
    }

    impl Fp8 {
        fn new() -> Self {
            let all = tensors(&config(true)).into_iter().map(|(name, tensor)| {
                let bytes = bits(&tensor).iter().flat_map(|b| b.to_le_bytes()).collect();
                (name, (Dtype::F32, tensor.dims().to_vec(), bytes))
            });
            let mut all: Raw = all.collect();
            let (_, shape, bytes) = all.remove(UP).unwrap();
            let entries = bytes
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let (codes, scales) = quantize_float8(&entries.collect::<Vec<_>>(), shape[1]);
            all.insert(UP.into(), (Dtype::F8_E4M3, shape, codes.clone()));
            let found = Self {
                folder: Folder::whole(),
                all,
                codes,
                scales,
            };
            let scales = found.scales.clone();
            found.with_scale(&[6, 1], &scales)
        }

        fn with_scale(mut self, shape: &[usize], scales: &[f32]) -> Self {
            let bytes = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.all
                .insert(scale_of(UP), (Dtype::F32, shape.to_vec(), bytes));
            self.stored()
        }

        fn with(mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
            self.all.insert(name.into(), (dtype, shape.to_vec(), bytes));
            self.stored()
        }

        fn without(mut self, name: &str) -> Self {
            self.all.remove(name);
            self.stored()
        }

        fn stored(self) -> Self {
            let views = self.all.iter().map(|(name, (dtype, shape, bytes))| {
                (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
            });
            safetensors::serialize_to_file(views, None, &self.folder.weights()).unwrap();
            self
        }

        fn read(&self) -> Matrix {
            let parts = Checkpoint::open(&self.folder.path)
                .unwrap()
                .parts()
                .unwrap();
            parts.weights.matrix(UP).unwrap()
        }

        fn is_refused(&self, why: &str) {
            let said = self.folder.error();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn scales_of_rows_and_of_matrices_are_read() {
        let fp8 = Fp8::new();
        let scales = fp8.scales.clone();
        let of = |fp8: &Fp8| {
            let Matrix::Stored(w) = fp8.read() else {
                panic!("read where it stands")
            };
            assert_eq!(w.bytes(), fp8.codes);
            w.scales().unwrap().to_vec()
        };
        assert_eq!(of(&fp8), scales);
        let fp8 = fp8.with_scale(&[6], &scales);
        assert_eq!(of(&fp8), scales);
        for shape in [&[][..], &[1], &[1, 1]] {
            assert_eq!(of(&Fp8::new().with_scale(shape, &[0.25])), [0.25; 6]);
        }
        // As others keep them, and with what they round activations and caches by.
        let halves = [1., 2., 0.5, 1., 1., 4.].map(half::bf16::from_f32);
        let bytes = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
        let one = || 1f32.to_le_bytes().to_vec();
        let fp8 = Fp8::new().with(&scale_of(UP), Dtype::BF16, &[6, 1], bytes);
        let fp8 = fp8.with(
            "model.layers.0.mlp.up_proj.input_scale",
            Dtype::F32,
            &[1],
            one(),
        );
        let fp8 = fp8.with("model.layers.1.self_attn.k_scale", Dtype::F32, &[], one());
        assert_eq!(of(&fp8), [1., 2., 0.5, 1., 1., 4.]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let nan = f32::NAN.to_le_bytes().to_vec();
        Fp8::new()
            .without(&scale_of(UP))
            .is_refused("up_proj.weight has dtype F8_E4M3 but no scale");
        let blocks = format!("{}_inv", scale_of(UP));
        Fp8::new()
            .without(&scale_of(UP))
            .with(&blocks, Dtype::F32, &[1], nan.clone())
            .is_refused(
                "a scale for every block of it (model.layers.0.mlp.up_proj.weight_scale_inv)",
            );
        Fp8::new()
            .with_scale(&[2, 1], &[1., 1.])
            .is_refused("up_proj.weight_scale has shape [2, 1]: one scale");
        Fp8::new()
            .with_scale(&[1], &[f32::NAN])
            .is_refused("up_proj.weight_scale holds NaN");
        Fp8::new()
            .with_scale(&[1], &[-1.])
            .is_refused("up_proj.weight: a scale of -1");
        let mut codes = Fp8::new().codes;
        codes[7] = 0xff;
        Fp8::new()
            .with(UP, Dtype::F8_E4M3, &[6, 8], codes)
            .is_refused("up_proj.weight holds NaN");
        Fp8::new()
            .with("model.norm.weight", Dtype::F8_E4M3, &[8], vec![0; 8])
            .is_refused(
                "model.norm.weight has dtype F8_E4M3; F32, F16, BF16 and for matrices F8_E4M3",
            );
        Fp8::new()
            .with(UP, Dtype::F8_E5M2, &[6, 8], vec![0; 48])
            .is_refused("has dtype F8_E5M2");
        // A scale of a matrix that is in no need of one.
        let plain = tensors(&config(true)).remove(UP).unwrap();
        let bytes = bits(&plain).iter().flat_map(|b| b.to_le_bytes()).collect();
        Fp8::new()
            .with(UP, Dtype::F32, &[6, 8], bytes)
            .is_refused("unexpected model.layers.0.mlp.up_proj.weight_scale");
    }

    #[test]
    fn other_ways_of_rounding_are_named() {
        let fp8 = Fp8::new();
        for (config, why) in [
            (
                json!({ "quant_method": "gptq", "bits": 4 }),
                "quant_method gptq is not supported",
            ),
            (json!({}), "quant_method (none) is"),
            (
                json!({ "quant_method": "fp8", "weight_block_size": [128, 128] }),
                "weight_block_size [128,128]",
            ),
            (
                json!({ "quant_method": "compressed-tensors", "format": "pack-quantized" }),
                "format pack-quantized",
            ),
        ] {
            fp8.folder.set(FIELD, config);
            fp8.is_refused(why);
        }
        for config in [
            json!({ "quant_method": "fp8", "activation_scheme": "dynamic" }),
            json!({ "quant_method": "fbgemm_fp8" }),
            json!({ "quant_method": "compressed-tensors", "format": "float-quantized" }),
        ] {
            fp8.folder.set(FIELD, config);
            fp8.read();
        }
    }

    #[test]
    fn what_is_written_is_read_again_and_declared() {
        let fp8 = Fp8::new();
        let read = Checkpoint::open(&fp8.folder.path).unwrap();
        let weights = read.stored().unwrap();
        for format in [Format::Llama, Format::Zebroid] {
            let out = fp8.folder.path.join("again");
            write(&out, format, &read.config, &weights, true).unwrap();
            let again = Checkpoint::open(&out).unwrap().stored().unwrap();
            let names = |of: &crate::weights::Weights| {
                of.iter()
                    .map(|(name, _)| name.to_owned())
                    .collect::<Vec<_>>()
            };
            assert_eq!(names(&again), names(&weights));
            let Matrix::Stored(w) = again.matrix(UP).unwrap() else {
                panic!("read where it stands")
            };
            assert_eq!(
                (w.bytes(), w.scales()),
                (&fp8.codes[..], Some(&fp8.scales[..]))
            );
        }
        let out = fp8.folder.path.join("others");
        write(&out, Format::Llama, &read.config, &weights, false).unwrap();
        let found = &read_json(&out.join("config.json")).unwrap()[FIELD];
        assert_eq!(found["quant_method"], "compressed-tensors");
        let kept = found["ignore"].as_array().unwrap();
        assert!(
            kept.contains(&"model.layers.1.mlp.up_proj".into()),
            "{kept:?}"
        );
        assert!(
            !kept.contains(&"model.layers.0.mlp.up_proj".into())
                && !kept.contains(&"model.embed_tokens".into())
        );
        let out = fp8.folder.path.join("amd");
        let said = write(&out, Format::Amd, &read.config, &weights, false)
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("AMD's format has no matrices in 8 bits"),
            "{said}"
        );
    }
}
