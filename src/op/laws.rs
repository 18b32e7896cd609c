//! What every kernel owes its plain version, and what its tests share. Public functions send f32 to the kernel
//! and f64 to the plain version, so one closure shows both.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Documents;

/// Seeded tensors in f64, entries in `(−1, 1)`.
pub fn random(shapes: &[&[usize]], seed: u64) -> Vec<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draw = |shape: &&[usize]| {
        let n = shape.iter().product();
        let data: Vec<f64> = (0..n).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(data, *shape, &Device::Cpu).unwrap()
    };
    shapes.iter().map(draw).collect()
}

/// Entries in about ±`range` that no generator's version changes, in f64.
pub fn noise(shape: impl Into<Shape>, range: f64, seed: usize) -> Tensor {
    let shape = shape.into();
    let entry = |i: usize| ((i * 7919 + seed * 104_729) as f64 * 0.618_033_988_7).fract();
    let values: Vec<f64> = (0..shape.elem_count())
        .map(|i| range * (2. * entry(i) - 1.))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

pub fn f32(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).unwrap()
}

/// The greatest absolute entry; not a number if one is not.
fn greatest(x: &Tensor) -> f64 {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    let entries = x.to_vec1::<f64>().unwrap().into_iter().map(f64::abs);
    entries.max_by(f64::total_cmp).unwrap_or(0.0)
}

/// The greatest difference of `a` from `b`, in f64.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let [a, b] = [a, b].map(|t| t.to_dtype(DType::F64).unwrap());
    greatest(&(a - b).unwrap())
}

/// `max |a − b| / max |b|`.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    difference(a, b) / greatest(b).max(1e-30)
}

/// `max |a − b| / (1 + max |b|)`.
pub fn gap(a: &Tensor, b: &Tensor) -> f64 {
    difference(a, b) / (1.0 + greatest(b))
}

/// Documents of lengths 1, 2, 3, … in every row, row `b` beginning with length `b + 1`.
pub fn short_documents(b: usize, t: usize) -> Documents {
    let mut starts = Vec::new();
    for row in 0..b {
        let (mut start, mut length) = (0, 1 + row);
        for position in 0..t {
            if position == start + length {
                (start, length) = (position, length + 1);
            }
            starts.push(start as u32);
        }
    }
    Documents::new(starts, t)
}

/// The value of `op` at `inputs` and the gradients of `Σ op · probe`, all in `dtype`.
fn run(
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    dtype: DType,
) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap())
        .collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tracked).unwrap();
    let probe = random(&[y.dims()], 99)[0].to_dtype(dtype).unwrap();
    let grads = (&y * probe).unwrap().sum_all().unwrap().backward().unwrap();
    let grads = vars
        .iter()
        .map(|v| grads.get(v).expect("every input gets a gradient").clone());
    (y.detach(), grads.collect())
}

/// Kernel and plain version agree in value and in every gradient (`tolerance`, relative to the largest
/// entry); the plain version's gradients agree with finite differences.
pub fn check(
    what: &str,
    inputs: &[Tensor],
    tolerance: f64,
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let (fast, fast_grads) = run(op, inputs, DType::F32);
    let (slow, slow_grads) = run(op, inputs, DType::F64);
    assert_eq!(fast.dims(), slow.dims(), "{what}");
    assert!(
        gap(&fast, &slow) < tolerance,
        "{what}: value off by {:e}",
        gap(&fast, &slow)
    );
    for (i, (fast, slow)) in fast_grads.iter().zip(&slow_grads).enumerate() {
        assert!(
            gap(fast, slow) < tolerance,
            "{what}: gradient {i} off by {:e}",
            gap(fast, slow)
        );
    }
    let probe = &random(&[slow.dims()], 99)[0];
    let loss = |inputs: &[Tensor]| -> f64 {
        (op(inputs).unwrap() * probe)
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar()
            .unwrap()
    };
    for (i, input) in inputs.iter().enumerate() {
        let flat = input.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let grad = slow_grads[i]
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        for at in [0, flat.len() / 2, flat.len() - 1] {
            let moved = |step: f64| {
                let (mut inputs, mut flat) = (inputs.to_vec(), flat.clone());
                flat[at] += step;
                inputs[i] = Tensor::from_vec(flat, input.shape(), &Device::Cpu).unwrap();
                loss(&inputs)
            };
            let numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let off = (numeric - grad[at]).abs() / (1.0 + numeric.abs());
            assert!(
                off < 1e-6,
                "{what}: input {i}[{at}]: {} for {numeric}",
                grad[at]
            );
        }
    }
}
