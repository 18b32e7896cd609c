//! Every kernel, forward and forward + backward, at the sizes of `bench train` (B 16, T 256, D 128, 8/4
//! heads of 16). Run with `cargo bench`, or one with `cargo bench -- attention`.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use zebroid::op::Documents;
use zebroid::op::adamw::{AdamW, Placed, adamw_8bit, adamw_step};
use zebroid::op::attention::causal_attention;
use zebroid::op::blocks::{BlockType, quantize};
use zebroid::op::causal_conv::causal_conv;
use zebroid::op::isa::Isa;
use zebroid::op::linear::{Part, Scratch, Storage, Stored, linear, products_by};
use zebroid::op::loss::{cross_entropy, forward_kl, mean_l2, relative_mse};
use zebroid::op::rms_norm::{gated_rms_norm, rms_norm};
use zebroid::op::rope::{RopeLayout, rope};
use zebroid::op::ssd::{SsdShape, ssd};
use zebroid::op::swiglu::swiglu;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const B: usize = 16;
const T: usize = 256;
const D: usize = 128;
const H: usize = 8;
const G: usize = 4;
const HEAD: usize = 16;
const VOCAB: usize = 361;

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 0.5, shape, &Device::Cpu).unwrap()
}

/// Times `op` on tensors of `shapes`, without and with gradients of all of them.
fn bench(
    c: &mut Criterion,
    name: &str,
    shapes: &[&[usize]],
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let plain: Vec<Tensor> = shapes.iter().map(|s| random(s)).collect();
    c.bench_function(&format!("{name}/forward"), |b| {
        b.iter(|| op(&plain).unwrap())
    });
    let vars: Vec<Var> = plain.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    c.bench_function(&format!("{name}/forward+backward"), |b| {
        b.iter(|| op(&tracked).unwrap().sum_all().unwrap().backward().unwrap())
    });
}

fn ops(c: &mut Criterion) {
    let documents = Documents::new(
        (0..B)
            .flat_map(|_| (0..T as u32).map(|t| t / 100 * 100))
            .collect(),
        T,
    );
    let documents = &documents;
    bench(c, "linear", &[&[B, T, D], &[352, D]], &|i| {
        linear(&i[0], &i[1].clone().into())
    });
    bench(c, "rms_norm", &[&[B, T, D], &[D]], &|i| {
        rms_norm(&i[0], &i[1], 1e-5)
    });
    bench(c, "gated_rms_norm", &[&[B, T, D], &[B, T, D], &[D]], &|i| {
        gated_rms_norm(&i[0], &i[1], &i[2], HEAD, 1e-5)
    });
    bench(c, "swiglu", &[&[B, T, 352], &[B, T, 352]], &|i| {
        swiglu(&i[0], &i[1])
    });
    let (cos, sin) = (random(&[T, HEAD / 2]), random(&[T, HEAD / 2]));
    for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
        bench(c, &format!("rope {layout:?}"), &[&[B, T, H, HEAD]], &|i| {
            rope(&i[0], &cos, &sin, layout)
        });
    }
    let heads: [&[usize]; 3] = [&[B, T, H, HEAD], &[B, T, G, HEAD], &[B, T, G, HEAD]];
    bench(c, "attention", &heads, &|i| {
        causal_attention(&i[0], &i[1], &i[2], 0.25, &None.into())
    });
    bench(c, "attention documents", &heads, &|i| {
        causal_attention(&i[0], &i[1], &i[2], 0.25, &Some(documents).into())
    });
    let cache: [&[usize]; 3] = [&[1, 1, 32, 160], &[1, 4096, 1, 160], &[1, 4096, 1, 128]];
    let cache: Vec<Tensor> = cache.iter().map(|s| random(s)).collect();
    c.bench_function("attention absorbed decode 4096/forward", |b| {
        b.iter(|| causal_attention(&cache[0], &cache[1], &cache[2], 0.1, &None.into()).unwrap())
    });
    let channels = 2 * G * HEAD + H * HEAD;
    bench(
        c,
        "causal_conv",
        &[&[B, T, channels], &[channels, 4], &[channels]],
        &|i| causal_conv(&i[0], &i[1], &i[2], true, Some(documents)),
    );
    let shape = SsdShape {
        heads: H,
        groups: G,
        head_dim: HEAD,
        d_state: HEAD,
        chunk: 64,
    };
    bench(c, "ssd", &[&[B, T, channels], &[B, T, H], &[3, H]], &|i| {
        ssd(&i[0], &i[1], &i[2], shape, Some(documents))
    });
    let logits: [&[usize]; 2] = [&[B * T, VOCAB], &[B * T, VOCAB]];
    bench(c, "forward_kl", &logits, &|i| {
        forward_kl(&i[0].detach(), &i[1], 1.0)
    });
    let targets = Tensor::zeros(B * T, DType::U32, &Device::Cpu).unwrap();
    bench(c, "cross_entropy", &[&[B * T, VOCAB]], &|i| {
        cross_entropy(&i[0], &targets)
    });
    bench(c, "relative_mse", &[&[B * T, D], &[B * T, D]], &|i| {
        relative_mse(&i[0], &i[1].detach())
    });
    bench(c, "mean_l2", &[&[B * T, D], &[B * T, D]], &|i| {
        mean_l2(&i[0], &i[1].detach())
    });
    let (param, grad, moments) = (
        random(&[1_000_000]),
        random(&[1_000_000]),
        random(&[2, 1_000_000]),
    );
    let moments = moments.abs().unwrap();
    let hyper = AdamW {
        lr: 1e-6,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };
    c.bench_function("adamw 1M", |b| {
        b.iter(|| adamw_step(&param, &grad, &moments, 1.0, 10, &hyper).unwrap())
    });
    let mut moments = Placed::zeros(param.elem_count(), &Device::Cpu).unwrap();
    c.bench_function("adamw 1M, moments in 8 bits", |b| {
        b.iter(|| adamw_8bit(&param, &grad, &mut moments, 1.0, 10, &hyper).unwrap())
    });
}

/// Rows in blocks, more of them than caches hold, with one and with eight rows of activations.
fn blocks(c: &mut Criterion) {
    const WIDTH: usize = 8192;
    const OUTS: usize = 16384;
    let row: Vec<f32> = (0..WIDTH).map(|i| (i as f32 * 0.37).sin()).collect();
    for kind in BlockType::ALL {
        let mut coded = vec![0; kind.row_bytes(WIDTH).unwrap()];
        quantize(kind, &row, None, &mut coded);
        let bytes = coded.repeat(OUTS);
        let mut group = c.benchmark_group(format!("blocks/{}", kind.name()));
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        let (all, storage) = (0..bytes.len(), Storage::Blocks(kind));
        let matrix = Stored::new(Arc::new(bytes), all, storage, OUTS, WIDTH).unwrap();
        group.sample_size(10);
        for rows in [1, 8] {
            let x = row.repeat(rows);
            let (mut y, mut scratch) = (vec![0.; rows * OUTS], Scratch::default());
            for isa in Isa::found() {
                group.bench_function(format!("{} rows {rows}", isa.level().name()), |b| {
                    b.iter(|| {
                        let part = Part {
                            w: &matrix,
                            y: &mut y,
                        };
                        products_by(isa, &x, &mut [part], &mut scratch)
                    })
                });
            }
        }
    }
}

criterion_group!(benches, ops, blocks);
criterion_main!(benches);
