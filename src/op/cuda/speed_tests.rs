//! Seconds and bandwidth of the kernels at the sizes of a 1B model, on the GPU: `recipes/gpu/all.sh` runs this, `cargo test` does not.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};

use super::open;
use crate::op::Documents;
use crate::op::adamw::{AdamW, adamw_step, sum_of_squares};
use crate::op::attention::causal_attention;
use crate::op::causal_conv::causal_conv;
use crate::op::loss::forward_kl;
use crate::op::rms_norm::{gated_rms_norm, rms_norm};
use crate::op::rope::{RopeLayout, rope};
use crate::op::ssd::{SsdShape, ssd};
use crate::op::swiglu::swiglu;

/// Of a KD step: 8 windows of 2,048 tokens.
const B: usize = 8;
const T: usize = 2048;
const D: usize = 2048;

/// The median over calls, the device waited for after each.
fn seconds(device: &Device, mut call: impl FnMut() -> Result<()>) -> f64 {
    let mut time = || {
        let started = Instant::now();
        call().unwrap();
        device.synchronize().unwrap();
        started.elapsed().as_secs_f64()
    };
    time();
    time();
    let mut times: Vec<f64> = (0..9).map(|_| time()).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// One JSON line; `bytes` is what has to be read and written at least.
fn say(name: &str, dtype: DType, bytes: usize, seconds: f64, copy: f64) {
    let rate = bytes as f64 / seconds;
    println!(
        r#"{{"kernel": "{name}", "type": "{}", "seconds": {seconds:.3e}, "gb_per_s": {:.0}, "share_of_copy": {:.2}}}"#,
        dtype.as_str(),
        rate / 1e9,
        rate / copy
    );
}

/// What calls of an operation took.
struct Measured {
    forward: f64,
    backward: f64,
    /// Bytes of the inputs and of the output.
    read: usize,
    written: usize,
}

/// Forward, then backward alone, of an operation on tensors of `shapes`.
fn timed(
    device: &Device,
    dtype: DType,
    shapes: &[&[usize]],
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Measured {
    let random = |shape: &&[usize]| Tensor::randn(0f32, 0.5, *shape, device)?.to_dtype(dtype);
    let inputs: Vec<Tensor> = shapes.iter().map(|s| random(s).unwrap()).collect();
    let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
    let read = inputs.iter().map(size).sum();
    let written = size(&op(&inputs).unwrap());
    let forward = seconds(device, || op(&inputs).map(|_| ()));
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(t).unwrap())
        .collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tracked).unwrap();
    let backward = seconds(device, || y.backward().map(|_| ()));
    Measured {
        forward,
        backward,
        read,
        written,
    }
}

/// Of an operation that is bound by memory.
fn measure(
    device: &Device,
    copy: f64,
    name: &str,
    dtype: DType,
    shapes: &[&[usize]],
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let found = timed(device, dtype, shapes, op);
    let bytes = found.read + found.written;
    say(name, dtype, bytes, found.forward, copy);
    // The gradient of the output is read and made; inputs are read, their gradients written.
    let back = format!("{name}_back");
    say(&back, dtype, 2 * bytes, found.backward, copy);
}

/// Of one that is bound by products: `flops` of the forward pass, 2.5 times as many of the backward pass.
fn measure_products(
    device: &Device,
    name: &str,
    dtype: DType,
    shapes: &[&[usize]],
    flops: f64,
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let found = timed(device, dtype, shapes, op);
    let passes = [
        (name.to_owned(), flops, found.forward),
        (format!("{name}_back"), 2.5 * flops, found.backward),
    ];
    for (name, flops, seconds) in passes {
        println!(
            r#"{{"kernel": "{name}", "type": "{}", "seconds": {seconds:.3e}, "tflop_per_s": {:.1}}}"#,
            dtype.as_str(),
            flops / seconds / 1e12
        );
    }
}

#[test]
#[ignore = "needs a GPU; recipes/gpu/all.sh runs it"]
fn speed_of_kernels() {
    let device = &open(0).unwrap();
    let big = Tensor::zeros(1 << 28, DType::F32, device).unwrap();
    let copy = 2. * 4. * (1u64 << 28) as f64 / seconds(device, || big.copy().map(|_| ()));
    say(
        "copy",
        DType::F32,
        1 << 31,
        2. * 4. * (1u64 << 28) as f64 / copy,
        copy,
    );
    let angles = Tensor::randn(0f32, 1., (T, 32), device).unwrap();
    let starts = (0..B * T).map(|i| (i % T / 512 * 512) as u32).collect();
    let documents = Documents::new(starts, T);
    for dtype in [DType::BF16, DType::F32] {
        let run = |name: &str, shapes: &[&[usize]], op: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
            measure(device, copy, name, dtype, shapes, op);
        };
        run("rms_norm", &[&[B * T, D], &[D]], &|i| {
            rms_norm(&i[0], &i[1], 1e-5)
        });
        run(
            "gated_rms_norm",
            &[&[B * T, 2 * D], &[B * T, 2 * D], &[2 * D]],
            &|i| gated_rms_norm(&i[0], &i[1], &i[2], 2 * D, 1e-5),
        );
        let tables =
            [angles.cos().unwrap(), angles.sin().unwrap()].map(|t| t.to_dtype(dtype).unwrap());
        run("rope", &[&[B, T, 32, 64]], &|i| {
            rope(&i[0], &tables[0], &tables[1], RopeLayout::Halves)
        });
        run("swiglu", &[&[B * T, 4 * D], &[B * T, 4 * D]], &|i| {
            swiglu(&i[0], &i[1])
        });
        run(
            "causal_conv",
            &[&[B, T, 3 * D], &[3 * D, 4], &[3 * D]],
            &|i| causal_conv(&i[0], &i[1], &i[2], true, Some(&documents)),
        );
        run("forward_kl", &[&[1024, 128_256], &[1024, 128_256]], &|i| {
            forward_kl(&i[0].detach(), &i[1], 1.)
        });
    }
    // [heads, of keys and values, K, V]: of a 1B model, of an 8B model, of its MLA.
    for [h, g, k, v] in [[32, 8, 64, 64], [32, 8, 128, 128], [32, 32, 192, 128]] {
        for dtype in [DType::BF16, DType::F32] {
            let shapes: [&[usize]; 3] = [&[B, T, h, k], &[B, T, g, k], &[B, T, g, v]];
            let flops = (B * h * T * T * (k + v)) as f64;
            let name = format!("attention_{k}_{v}");
            measure_products(device, &name, dtype, &shapes, flops, &|i| {
                causal_attention(&i[0], &i[1], &i[2], (k as f64).powf(-0.5), &None.into())
            });
        }
    }
    for width in [64, 128] {
        let shape = SsdShape {
            heads: 32,
            groups: 8,
            head_dim: width,
            d_state: width,
            chunk: 64,
        };
        for dtype in [DType::BF16, DType::F32] {
            let shapes: [&[usize]; 3] = [&[B, T, shape.channels()], &[B, T, 32], &[3, 32]];
            // Of a position: two products within its chunk, two with the state.
            let flops = (B * T * 32 * 2 * (64 + width) * 2 * width) as f64;
            let name = format!("ssd_{width}");
            measure_products(device, &name, dtype, &shapes, flops, &|i| {
                let params = i[2].to_dtype(DType::F32)?;
                ssd(&i[0], &i[1], &params, shape, Some(&documents))
            });
        }
    }
    let hyper = AdamW {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    let n = 1 << 27;
    let [param, grad] = [0, 1].map(|_| Tensor::randn(0f32, 1., n, device).unwrap());
    let moments = Tensor::zeros((2, n), DType::F32, device).unwrap();
    let step = || adamw_step(&param, &grad, &moments, 1., 1, &hyper);
    say("adamw", DType::F32, 7 * 4 * n, seconds(device, step), copy);
    let sum = || sum_of_squares(&grad).map(|_| ());
    say(
        "sum_of_squares",
        DType::F32,
        4 * n,
        seconds(device, sum),
        copy,
    );
}
