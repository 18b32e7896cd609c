use super::*;
use crate::op::cuda::Array;
use crate::op::cuda::emulated::{Emulated, Entries};
use crate::op::laws::{self, noise, placed, truth};
use candle_core::{DType, Device, Shape, Var};

const HYPER: AdamW = AdamW {
    lr: 0.02,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};

fn values(x: &Tensor) -> Vec<f64> {
    truth(x).flatten_all().unwrap().to_vec1().unwrap()
}

/// Parameters after some steps with changing gradients and a gradient scale.
fn train(dtype: DType, shape: &Shape, steps: u64) -> (Tensor, Tensor) {
    let param = Var::from_tensor(&placed(&noise(shape.clone(), 1., 1), dtype)).unwrap();
    let zeros = Tensor::zeros([&[2], shape.dims()].concat(), dtype, &Device::Cpu).unwrap();
    let moments = placed(&zeros, dtype);
    for step in 1..=steps {
        let grad = placed(&noise(shape.clone(), 1., 1 + step as usize), dtype);
        adamw_step(&param, &grad, &moments, 0.7, step, &HYPER).unwrap();
    }
    (param.as_tensor().clone(), moments)
}

#[test]
fn kernel_equals_the_plain_version() {
    for shape in [Shape::from((3, 5)), Shape::from(40_001), Shape::from(())] {
        let (param, moments) = train(DType::F32, &shape, 7);
        let (true_param, true_moments) = train(DType::F64, &shape, 7);
        for (found, truth) in [(param, true_param), (moments, true_moments)] {
            for (found, truth) in values(&found).iter().zip(values(&truth)) {
                assert!((found - truth).abs() < 1e-6, "{found} {truth}");
            }
        }
    }
}

#[test]
fn the_plain_version_equals_the_scalar_recipe() {
    // The update of torch.optim.AdamW, written out for one entry.
    let shape = Shape::from(1);
    let (param, _) = train(DType::F64, &shape, 5);
    let mut expected = values(&noise(1, 1., 1))[0];
    let (mut first, mut second) = (0., 0.);
    for step in 1..=5i32 {
        let grad = 0.7 * values(&noise(1, 1., 1 + step as usize))[0];
        expected -= HYPER.lr * HYPER.weight_decay * expected;
        first += (1. - HYPER.beta1) * (grad - first);
        second = HYPER.beta2 * second + (1. - HYPER.beta2) * grad * grad;
        let first_corrected = first / (1. - HYPER.beta1.powi(step));
        let second_corrected = second / (1. - HYPER.beta2.powi(step));
        expected -= HYPER.lr * first_corrected / (second_corrected.sqrt() + HYPER.eps);
    }
    assert!((values(&param)[0] - expected).abs() < 1e-13);
}

#[test]
fn views_of_the_parameter_see_the_update() {
    for dtype in [DType::F32, DType::F64] {
        let var = Var::from_tensor(&placed(&noise((4, 3), 1., 1), dtype)).unwrap();
        let model_side = var.as_tensor().t().unwrap();
        let before = values(&model_side.contiguous().unwrap());
        let zeros = Tensor::zeros((2, 4, 3), dtype, &Device::Cpu).unwrap();
        let moments = placed(&zeros, dtype);
        // A gradient of any layout will do.
        let grad = placed(&noise((3, 4), 1., 2), dtype).t().unwrap();
        adamw_step(&var, &grad, &moments, 1., 1, &HYPER).unwrap();
        let after = values(&model_side.contiguous().unwrap());
        // The first step moves every entry by lr against its gradient, beside the decay.
        let grads = values(&grad.t().unwrap().contiguous().unwrap());
        for ((before, after), grad) in before.iter().zip(after).zip(grads) {
            let expected = before * (1. - HYPER.lr * HYPER.weight_decay) - HYPER.lr * grad.signum();
            assert!((after - expected).abs() < 1e-5, "{after} {expected}");
        }
    }
}

#[test]
fn sum_of_squares_of_any_layout() {
    let x = noise((123, 457), 1., 3);
    let truth: f64 = values(&x).iter().map(|x| x * x).sum();
    assert!((sum_of_squares(&x).unwrap() / truth - 1.).abs() < 1e-12);
    let narrow = laws::f32(&x);
    for view in [narrow.clone(), narrow.t().unwrap()] {
        assert!((sum_of_squares(&view).unwrap() / truth - 1.).abs() < 1e-7);
    }
    assert_eq!(
        sum_of_squares(&narrow).unwrap(),
        sum_of_squares(&narrow).unwrap()
    );
    let half = narrow.to_dtype(DType::BF16).unwrap();
    let wide = half.to_dtype(DType::F32).unwrap();
    let (half, wide) = [half, wide].map(|x| sum_of_squares(&x).unwrap()).into();
    assert_eq!(half, wide);
}

/// On any device, saved and read in between.
#[test]
fn moments_in_8_bits_lead_to_the_same_places() {
    let n = 5003;
    let start = values(&noise(n, 1., 1)).into_iter().map(|x| x as f32);
    let (mut expected, mut host) = (start.collect::<Vec<f32>>(), Moments::zeros(n));
    let param = Var::from_tensor(&placed(&noise(n, 1., 1), DType::F32)).unwrap();
    let mut moments = Placed::zeros(n, laws::device()).unwrap();
    for step in 1..=5 {
        let grad = laws::f32(&noise(n, 1., 1 + step as usize));
        adamw_8bit(&param, &grad, &mut moments, 0.7, step, &HYPER).unwrap();
        let [codes, scales] = moments.tensors().unwrap();
        moments = Placed::read([&codes, &scales], laws::device()).unwrap();
        let grad: Vec<f32> = values(&grad).iter().map(|x| *x as f32).collect();
        adamw_8bit_step(&mut expected, &grad, &mut host, 0.7, step, &HYPER);
    }
    for (found, expected) in values(&param).iter().zip(&expected) {
        // Where products and sums are fused another code is taken now and then: a few per cent of a step.
        let off = (found - f64::from(*expected)).abs();
        assert!(off < 0.1 * HYPER.lr, "{found} {expected}");
    }
    assert!(laws::device().is_cpu() || matches!(moments, Placed::Device { .. }));
}

#[test]
fn misfits_are_named() {
    let (param, moments) = (noise((2, 3), 1., 1), noise((2, 2, 3), 1., 2));
    let step = |param: &Tensor, grad: &Tensor, moments: &Tensor, step| {
        adamw_step(param, grad, moments, 1., step, &HYPER)
    };
    assert!(step(&param, &noise((3, 2), 1., 1), &moments, 1).is_err());
    assert!(step(&param, &param, &param, 1).is_err());
    assert!(step(&param, &param, &moments, 0).is_err());
    assert!(step(&noise((3, 2), 1., 1).t().unwrap(), &param, &moments, 1).is_err());
}

/// One step after another on the emulated device, and the same in `expected`.
fn cuda_steps(n: usize, skew: usize) {
    let Some(gpu) = Emulated::of("adamw", skew) else {
        return;
    };
    let f32 = |x: Tensor| x.to_dtype(DType::F32).unwrap();
    let param = gpu.array(&f32(noise(n, 1., 1)));
    let moments = gpu.array(&f32(noise((2, n), 0., 1)));
    let (codes, scales) = (2 * n, 2 * n.div_ceil(BLOCK));
    let codes = gpu.array(&Tensor::zeros(codes, DType::U8, &Device::Cpu).unwrap());
    let scales = gpu.array(&Tensor::zeros(scales, DType::F32, &Device::Cpu).unwrap());
    let param_8bit = param.clone();
    let mut expected_8bit = f32(noise(n, 1., 1)).to_vec1::<f32>().unwrap();
    let mut expected_moments = Moments::zeros(n);
    for step in 1..=5 {
        let grad = f32(noise(n, 1., 1 + step as usize));
        let grads = gpu.array(&grad);
        cuda::step(&gpu, &param, &grads, &moments, 0.7, step, &HYPER).unwrap();
        let both = [&codes, &scales];
        cuda::step_8bit(&gpu, &param_8bit, &grads, both, 0.7, step, &HYPER).unwrap();
        let grad = grad.to_vec1::<f32>().unwrap();
        let moments = &mut expected_moments;
        adamw_8bit_step(&mut expected_8bit, &grad, moments, 0.7, step, &HYPER);
    }
    let (true_param, true_moments) = train(DType::F64, &Shape::from(n), 5);
    for (found, truth) in [(&param, true_param), (&moments, true_moments)] {
        let found = values(&found.tensor(found.len()));
        for (found, truth) in found.iter().zip(values(&truth)) {
            assert!((found - truth).abs() < 1e-6, "{found} {truth}");
        }
    }
    // The same arithmetic without fused products: the same bits.
    let bits = |x: &Entries| values(&x.tensor(x.len()));
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
    assert_eq!(bits(&param_8bit), wide(&expected_8bit));
    assert_eq!(bits(&scales), wide(&expected_moments.scales));
    let expected = expected_moments.codes.iter().map(|x| f64::from(*x));
    assert_eq!(bits(&codes), expected.collect::<Vec<_>>());
}

#[test]
fn cuda_kernels_equal_those_of_the_cpu() {
    for (n, skew) in [(1, 0), (255, 1), (5003, 0)] {
        cuda_steps(n, skew);
    }
}

#[test]
fn the_sum_of_squares_on_cuda_is_that_of_all() {
    let Some(gpu) = Emulated::of("adamw", 0) else {
        return;
    };
    for n in [1, 300, 150_001] {
        let x = noise(n, 1., 3).to_dtype(DType::F32).unwrap();
        let sums = cuda::sum_of_squares(&gpu, &gpu.array(&x)).unwrap();
        let found: f64 = values(&sums.tensor(sums.len())).iter().sum();
        let truth: f64 = values(&x).iter().map(|x| x * x).sum();
        assert!((found / truth - 1.).abs() < 1e-12, "{n}");
    }
}
