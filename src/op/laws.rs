//! What every kernel owes its plain version, and what its tests share. Public functions send f32 to the kernel
//! and f64 to the plain version, so one closure shows both.

use std::sync::LazyLock;

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Documents;
use super::cuda::emulated::{Emulated, Entries};

/// Where kernels are held against their plain versions: the CPU, or what `ZEBROID_TEST_DEVICE` names (`cuda`).
pub fn device() -> &'static Device {
    static DEVICE: LazyLock<Device> =
        LazyLock::new(|| match std::env::var("ZEBROID_TEST_DEVICE").as_deref() {
            Err(_) | Ok("cpu") => Device::Cpu,
            #[cfg(feature = "cuda")]
            Ok("cuda") => super::cuda::open(0).unwrap(),
            Ok(other) => panic!("ZEBROID_TEST_DEVICE={other}: cpu, or cuda with the feature cuda"),
        });
    &DEVICE
}

/// How far a product of a row of `x` with one of `w` is off, as a share of its terms.
pub fn off(product: f32, x: &[f32], w: &[f32]) -> f64 {
    let terms = x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b));
    let (sum, size) = terms.fold((0., 0.), |(s, n), t| (s + t, n + t.abs()));
    (f64::from(product) - sum).abs() / size
}

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

/// What a kernel gets.
pub fn f32(x: &Tensor) -> Tensor {
    placed(x, DType::F32)
}

/// In the type and the place of `other`.
pub fn like(x: &Tensor, other: &Tensor) -> Tensor {
    let x = x.to_dtype(other.dtype()).unwrap();
    x.to_device(other.device()).unwrap()
}

/// In f64 on the CPU, where the plain versions are the truth; else on the device that is tested.
pub fn placed(x: &Tensor, dtype: DType) -> Tensor {
    let device = if dtype == DType::F64 {
        &Device::Cpu
    } else {
        device()
    };
    x.to_dtype(dtype).unwrap().to_device(device).unwrap()
}

/// In f64 on the CPU.
pub fn truth(x: &Tensor) -> Tensor {
    let x = x.to_device(&Device::Cpu).unwrap();
    x.to_dtype(DType::F64).unwrap()
}

/// The greatest absolute entry; not a number if one is not.
fn greatest(x: &Tensor) -> f64 {
    let x = truth(x).flatten_all().unwrap();
    let entries = x.to_vec1::<f64>().unwrap().into_iter().map(f64::abs);
    entries.max_by(f64::total_cmp).unwrap_or(0.0)
}

/// The greatest difference of `a` from `b`, in f64.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let [a, b] = [a, b].map(truth);
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

/// By how much a value `y` weighs in what gradients are taken of.
fn probe(y: &Tensor) -> Tensor {
    random(&[y.dims()], 99).remove(0)
}

/// The value of `op` at `inputs`, then the gradients of `Σ op · probe`, all in `dtype`; `round` is what befalls the probe before.
fn run(
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    inputs: &[Tensor],
    dtype: DType,
    round: &dyn Fn(&Tensor) -> Tensor,
) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs
        .iter()
        .map(|t| Var::from_tensor(&placed(t, dtype)).unwrap())
        .collect();
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tracked).unwrap();
    let probe = placed(&round(&probe(&y)), y.dtype());
    let grads = (&y * probe).unwrap().sum_all().unwrap().backward().unwrap();
    let grads = vars
        .iter()
        .map(|v| grads.get(v).expect("every input gets a gradient").clone());
    std::iter::once(y.detach()).chain(grads).collect()
}

fn named(i: usize) -> String {
    match i {
        0 => "value".to_owned(),
        i => format!("gradient {}", i - 1),
    }
}

/// Kernel and plain version agree in value and in every gradient (`tolerance`, relative to the largest
/// entry); the plain version's gradients agree with finite differences.
pub fn check(
    what: &str,
    inputs: &[Tensor],
    tolerance: f64,
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let fast = run(op, inputs, DType::F32, &Tensor::clone);
    let slow = run(op, inputs, DType::F64, &Tensor::clone);
    assert_eq!(fast[0].dims(), slow[0].dims(), "{what}");
    for (i, (fast, slow)) in fast.iter().zip(&slow).enumerate() {
        let of = named(i);
        let off = gap(fast, slow);
        assert!(off < tolerance, "{what}: {of} off by {off:e}");
    }
    let (slow, slow_grads) = (&slow[0], &slow[1..]);
    let probe = &probe(slow);
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

/// What launches kernels: from a case's name, its inputs and the gradient of its value to the value and the inputs' gradients.
pub type Launches<'a> = &'a dyn Fn(&str, &Emulated, &[Entries], &Entries) -> Result<Vec<Entries>>;

/// The kernels of folder `folder` for CUDA against the plain version of `op`, in value and every gradient, with entries of f32 and of
/// bf16, aligned and not: on the GPU that is tested, else by the emulator, for which `kernels` launches them with the inputs and the
/// gradient of the value and returns the value and the inputs' gradients.
pub fn check_cuda(
    folder: &str,
    cases: &[(String, Vec<Tensor>)],
    op: &dyn Fn(&str, &[Tensor]) -> Result<Tensor>,
    kernels: Launches,
) {
    for (dtype, skew) in [
        (DType::F32, 0),
        (DType::F32, 1),
        (DType::BF16, 0),
        (DType::BF16, 1),
    ] {
        // bf16 keeps 8 bits, and some operations round in between; the laws of f32 are those of the CPU's kernels.
        let tolerance = if dtype == DType::BF16 { 6e-3 } else { 1e-5 };
        let emulated = match device().is_cpu() {
            true => match Emulated::of(folder, skew) {
                None => return,
                found => found,
            },
            false => None,
        };
        for (what, inputs) in cases {
            let round = |x: &Tensor| truth(&x.to_dtype(dtype).unwrap());
            let inputs: Vec<Tensor> = inputs.iter().map(round).collect();
            let slow = run(&|i| op(what, i), &inputs, DType::F64, &round);
            let fast = match &emulated {
                None => run(&|i| op(what, i), &inputs, dtype, &round),
                Some(gpu) => {
                    let array = |x: &Tensor| gpu.array(&x.to_dtype(dtype).unwrap());
                    let arrays: Vec<Entries> = inputs.iter().map(array).collect();
                    let dy = array(&probe(&slow[0]));
                    let found = kernels(what, gpu, &arrays, &dy).unwrap();
                    assert_eq!(found.len(), slow.len(), "{what}");
                    let shaped = found.iter().zip(&slow).map(|(f, s)| f.tensor(s.shape()));
                    shaped.collect()
                }
            };
            for (i, (fast, slow)) in fast.iter().zip(&slow).enumerate() {
                let off = gap(fast, slow);
                let of = named(i);
                assert!(off < tolerance, "{what} in {dtype:?}: {of} off by {off:e}");
            }
        }
    }
}
