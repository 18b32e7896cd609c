use candle_core::{DType, Device, Var};

use super::*;
use crate::mixer::linalg;
use crate::op::laws::noise;

const ADAMW: AdamW = AdamW {
    lr: 0.02,
    beta1: 0.9,
    beta2: 0.95,
    // Above what rounding leaves of a gradient that is 0: AdamW would make a step of it.
    eps: 1e-4,
    weight_decay: 0.1,
};

const MATRIX: Role = Role {
    is_matrix: true,
    decays: true,
    in_mixer: false,
    is_read: false,
    rows: Vec::new(),
};

const SHAPES: [[usize; 2]; 3] = [[6, 20], [20, 6], [9, 9]];

fn f32s(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// A gradient of known singular values `10, 10 / 3, 10 / 9, ..`.
fn gradient([m, n]: [usize; 2], seed: usize) -> Tensor {
    let found = linalg::svd(&linalg::matrix(&noise((m, n), 1., seed)).unwrap()).unwrap();
    let sizes = faer::Mat::from_fn(m.min(n), m.min(n), |i, j| {
        f64::from(u8::from(i == j)) * 10. * 3f64.powi(-(i as i32))
    });
    linalg::tensor(&(found.u * sizes * found.v.transpose())).unwrap()
}

fn trained(
    optimizer: OptimizerConfig,
    shape: [usize; 2],
    steps: u64,
    grads: impl Fn(u64) -> Tensor,
) -> Tensor {
    let start = noise((shape[0], shape[1]), 1., 1)
        .to_dtype(DType::F32)
        .unwrap();
    let param = Var::from_tensor(&start).unwrap();
    let (mut state, rules) = (State::None, optimizer.rules(ADAMW, 1.0, 1.0));
    for step in 1..=steps {
        state
            .step(&param, &MATRIX, &grads(step), 0.7, step, &rules)
            .unwrap();
    }
    param.as_tensor().clone()
}

fn galore(rank: usize, interval: u64, scale: f64) -> GaloreConfig {
    GaloreConfig {
        rank,
        interval,
        scale,
    }
}

#[test]
fn galore_of_full_rank_is_adamw() {
    for shape in SHAPES {
        let grads = |step| gradient(shape, 1 + step as usize);
        let truth = f32s(&trained(OptimizerConfig::Adamw, shape, 6, grads));
        let whole = galore(shape[0].min(shape[1]), 4, 1.0);
        let found = trained(OptimizerConfig::Galore(whole), shape, 6, grads);
        assert_eq!(f32s(&found), truth);
    }
}

/// Gradients along as many axes as the rank: turned into them AdamW is itself, and there is nothing beside them.
#[test]
fn galore_is_adamw_where_the_rank_holds_the_gradient() {
    for (rows, columns) in [(6, 20), (20, 6)] {
        let [from, along] = [2, 4];
        let grads = |step: u64| {
            let full = noise((rows, columns), 1., 1 + step as usize);
            let full = full.to_dtype(DType::F32).unwrap();
            let axis = usize::from(rows > columns);
            // Rows (or columns) are orthogonal where they have entries at different places.
            let (m, n) = (rows, columns);
            let keep = (0..m * n).map(|at| {
                let (i, j) = (at / n, at % n);
                let (short, long) = if axis == 0 { (i, j) } else { (j, i) };
                let size = if short == from { 5f32 } else { 1. };
                let own = [from, along].iter().position(|s| *s == short);
                if own.is_some_and(|own| long % 2 == own) {
                    size
                } else {
                    0.
                }
            });
            (full
                * Tensor::from_iter(keep, &Device::Cpu)
                    .unwrap()
                    .reshape((m, n))
                    .unwrap())
            .unwrap()
        };
        let shape = [rows, columns];
        let truth = f32s(&trained(OptimizerConfig::Adamw, shape, 5, grads));
        let config = galore(2, 2, 1.0);
        let found = f32s(&trained(OptimizerConfig::Galore(config), shape, 5, grads));
        for (found, truth) in found.iter().zip(&truth) {
            assert!((found - truth).abs() < 1e-4, "{found} {truth}");
        }
    }
}

/// Against the paper's algorithm in f64, with a whole singular value decomposition.
#[test]
fn galore_equals_the_plain_version() {
    let (rank, interval, scale, steps) = (3, 3, 0.25, 7u64);
    for shape in SHAPES {
        let [m, n] = shape;
        let grads = |step| gradient(shape, 1 + step as usize);
        let config = galore(rank, interval, scale);
        let found = f32s(&trained(
            OptimizerConfig::Galore(config),
            shape,
            steps,
            grads,
        ));
        let mut param = linalg::matrix(&noise((m, n), 1., 1)).unwrap();
        let size = if m <= n { (rank, n) } else { (m, rank) };
        let (mut first, mut second) = (
            faer::Mat::<f64>::zeros(size.0, size.1),
            faer::Mat::<f64>::zeros(size.0, size.1),
        );
        let mut basis = faer::Mat::<f64>::zeros(0, 0);
        for step in 1..=steps {
            let grad = linalg::matrix(&grads(step)).unwrap();
            if (step - 1) % interval == 0 {
                let svd = linalg::svd(&grad).unwrap();
                let side = if m <= n { svd.u } else { svd.v };
                let before = std::mem::replace(&mut basis, side.subcols(0, rank).to_owned());
                for j in (0..rank).filter(|_| step > 1) {
                    let dot: f64 = (0..basis.nrows())
                        .map(|i| basis[(i, j)] * before[(i, j)])
                        .sum();
                    for i in (0..basis.nrows()).filter(|_| dot < 0.) {
                        basis[(i, j)] *= -1.;
                    }
                }
            }
            let inside = match m <= n {
                true => basis.transpose() * &grad,
                false => &grad * &basis,
            };
            let inside = faer::Scale(0.7) * inside;
            let moved = faer::Mat::from_fn(size.0, size.1, |i, j| {
                let g: f64 = inside[(i, j)];
                first[(i, j)] = 0.9 * first[(i, j)] + (1. - 0.9) * g;
                second[(i, j)] = 0.95 * second[(i, j)] + (1. - 0.95) * g * g;
                let mean: f64 = first[(i, j)] / (1. - 0.9f64.powi(step as i32));
                let deviation: f64 = second[(i, j)] / (1. - 0.95f64.powi(step as i32));
                mean / (deviation.sqrt() + ADAMW.eps)
            });
            let moved = match m <= n {
                true => &basis * moved,
                false => moved * basis.transpose(),
            };
            param = faer::Scale(1. - 0.02 * 0.1) * param - faer::Scale(0.02 * scale) * moved;
        }
        for (at, found) in found.iter().enumerate() {
            let truth = param[(at / n, at % n)];
            assert!(
                (f64::from(*found) - truth).abs() < 1e-4,
                "{shape:?}: {found} {truth}"
            );
        }
    }
}

#[test]
fn leading_vectors_are_those_of_the_singular_value_decomposition() {
    // Some of many, none above the noise but one, and all.
    for (shape, rank) in [([40, 90], 5), ([90, 40], 5), ([12, 30], 12)] {
        let grad = gradient(shape, 3);
        let basis = linalg::matrix(&galore::leading(&grad, rank).unwrap()).unwrap();
        let svd = linalg::svd(&linalg::matrix(&grad).unwrap()).unwrap();
        let side = if shape[0] <= shape[1] { svd.u } else { svd.v };
        let overlap = basis.transpose() * side.subcols(0, rank);
        for i in 0..rank.min(5) {
            assert!((overlap[(i, i)].abs() - 1.).abs() < 1e-4, "{shape:?} {i}");
        }
        let gram = basis.transpose() * &basis;
        for i in 0..rank {
            for j in 0..rank {
                let wanted = f64::from(u8::from(i == j));
                assert!((gram[(i, j)] - wanted).abs() < 1e-5);
            }
        }
    }
    let nothing = Tensor::zeros((6, 9), DType::F32, &Device::Cpu).unwrap();
    let basis = galore::leading(&nothing, 2).unwrap();
    assert!(f32s(&basis).iter().all(|x| x.is_finite()));
}

/// A badly scaled bowl: 8 bits lead where 32 do.
#[test]
fn galore_of_8_bits_ends_where_that_in_full_ends() {
    let (shape, rank) = ([64, 160], 32);
    let [target, start] =
        [2, 1].map(|seed| noise((64, 160), 1., seed).to_dtype(DType::F32).unwrap());
    let run = |optimizer: OptimizerConfig| {
        let param = Var::from_tensor(&start).unwrap();
        let (mut state, rules) = (State::None, optimizer.rules(ADAMW, 1.0, 1.0));
        for step in 1..=200 {
            let grad = (param.as_tensor() - &target).unwrap();
            state
                .step(&param, &MATRIX, &grad, 1.0, step, &rules)
                .unwrap();
        }
        let off = (param.as_tensor() - &target).unwrap().sqr().unwrap();
        let bytes: usize = state
            .tensors()
            .unwrap()
            .iter()
            .map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes())
            .sum();
        assert_eq!(bytes, optimizer.state_bytes("model.layers.0.x", &shape));
        (
            off.mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt(),
            bytes,
        )
    };
    let config = galore(rank, 20, 1.0);
    let (full, whole) = run(OptimizerConfig::Galore(config));
    let (eight, small) = run(OptimizerConfig::Galore8bit(config));
    assert!(eight < 1.1 * full + 0.01, "{eight} for {full}");
    assert!(full < 0.2 && 2 * small < whole, "{full} {small} {whole}");
    let (_, adamw) = run(OptimizerConfig::Adamw);
    assert!(whole < adamw);
}
