use super::*;
use crate::op::cuda::emulated::{Emulated, Entries};
use crate::op::cuda::{Array, Gpu};
use crate::op::laws::{check_cuda, distance, f32, like, noise, truth};
use candle_core::Var;

/// Value and gradient by `x` of `Σ loss(x) · weights`, where rows weigh differently.
fn value_and_gradient(x: &Tensor, loss: &dyn Fn(&Tensor) -> Result<Tensor>) -> (Tensor, Tensor) {
    let x = Var::from_tensor(x).unwrap();
    let value = loss(x.as_tensor()).unwrap();
    let weights: Vec<f64> = (0..value.elem_count())
        .map(|i| 0.5 + (i % 3) as f64)
        .collect();
    let weights = Tensor::from_vec(weights, value.shape(), &Device::Cpu).unwrap();
    let total = (&value * like(&weights, &value))
        .unwrap()
        .sum_all()
        .unwrap();
    let gradient = total.backward().unwrap().get(&x).unwrap().clone();
    (value, gradient)
}

/// About half of the vocabulary for each row; of every other row one is missing.
fn tokens((m, v): (usize, usize)) -> Vec<u32> {
    let k = v.div_ceil(2);
    let token = |i: usize| match i.is_multiple_of(2 * k) {
        true => NO_TOKEN,
        false => ((i / k + 2 * (i % k)) % v) as u32,
    };
    (0..m * k).map(token).collect()
}

type Loss = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// Every loss as a function of `x [M, V]`, in the float type of `x`.
fn losses((m, v): (usize, usize)) -> Vec<(&'static str, Loss)> {
    let targets: Vec<u32> = (0..m).map(|i| ((i * 5 + 1) % v) as u32).collect();
    let targets = Tensor::from_vec(targets, m, &Device::Cpu).unwrap();
    let other = noise((m, v), 4., 9);
    let (teacher, target, goal) = (other.clone(), other.clone(), other);
    vec![
        (
            "cross_entropy",
            Box::new(move |x| cross_entropy(x, &targets.to_device(x.device())?)),
        ),
        (
            "forward_kl",
            Box::new(move |x| forward_kl(&like(&teacher, x), x, 1.7)),
        ),
        (
            "reverse_kl",
            Box::new({
                let teacher = goal.clone();
                move |x| divergence(Divergence::ReverseKl, &like(&teacher, x), x, 1.7)
            }),
        ),
        (
            "jsd",
            Box::new({
                let teacher = goal.clone();
                move |x| divergence(Divergence::Jsd, &like(&teacher, x), x, 1.7)
            }),
        ),
        (
            "tvd",
            Box::new({
                let teacher = goal.clone();
                move |x| divergence(Divergence::Tvd, &like(&teacher, x), x, 1.7)
            }),
        ),
        (
            "top_k",
            Box::new({
                let teacher = goal.clone();
                move |x| {
                    let (t, s) = top_k(&like(&teacher, x), x, v.div_ceil(2))?;
                    divergence(Divergence::ReverseKl, &t, &s, 1.0)
                }
            }),
        ),
        (
            "with_rest",
            Box::new({
                let (teacher, tokens) = (goal.clone(), tokens((m, v)));
                move |x| {
                    let coarse = |x: &Tensor| with_rest(x, &tokens);
                    let teacher = coarse(&like(&teacher, x))?;
                    divergence(Divergence::Jsd, &teacher, &coarse(x)?, 1.0)
                }
            }),
        ),
        (
            "relative_mse",
            Box::new(move |x| relative_mse(x, &like(&target, x))),
        ),
        ("mean_l2", Box::new(move |x| mean_l2(x, &like(&goal, x)))),
    ]
}

#[test]
fn kernels_equal_the_plain_version() {
    for shape in [(1, 1), (3, 7), (5, 16), (9, 361), (2, 3000)] {
        for (name, loss) in losses(shape) {
            let x = noise(shape, 6., 1);
            let (value, gradient) = value_and_gradient(&f32(&x), &loss);
            let (true_value, true_gradient) = value_and_gradient(&x, &loss);
            assert_eq!(value.dims(), true_value.dims(), "{name}");
            assert!(
                distance(&value, &true_value) < 1e-6,
                "{name} {shape:?}: value"
            );
            let off = distance(&gradient, &true_gradient);
            // 2.1e-6 seen: reverse_kl over 3000 entries, where the sums of logarithms are rounded.
            assert!(off < 4e-6, "{name} {shape:?}: gradient off by {off:e}");
        }
    }
}

#[test]
fn plain_gradients_equal_finite_differences() {
    let (m, v) = (3, 7);
    for (name, loss) in losses((m, v)) {
        let x = noise((m, v), 2., 4);
        let total = |x: &Tensor| {
            let value = loss(x).unwrap();
            value.sum_all().unwrap().to_scalar::<f64>().unwrap()
        };
        let var = Var::from_tensor(&x).unwrap();
        let sum = loss(var.as_tensor()).unwrap().sum_all().unwrap();
        let gradient = sum.backward().unwrap().get(&var).unwrap().clone();
        let step = 1e-5;
        let slopes: Vec<f64> = (0..m * v)
            .map(|i| {
                let mut nudge = vec![0f64; m * v];
                nudge[i] = step;
                let nudge = Tensor::from_vec(nudge, (m, v), &Device::Cpu).unwrap();
                (total(&(&x + &nudge).unwrap()) - total(&(&x - &nudge).unwrap())) / (2. * step)
            })
            .collect();
        let slopes = Tensor::from_vec(slopes, (m, v), &Device::Cpu).unwrap();
        assert!(distance(&gradient, &slopes) < 1e-7, "{name}");
    }
}

#[test]
fn divergences_are_what_they_are_called() {
    let logs = |p: [f64; 3]| Tensor::new(&[p.map(f64::ln)], &Device::Cpu).unwrap();
    let (p, q) = ([0.5, 0.3, 0.2], [0.25, 0.25, 0.5]);
    let kl = |p: [f64; 3], q: [f64; 3]| (0..3).map(|i| p[i] * (p[i] / q[i]).ln()).sum::<f64>();
    let m = [0, 1, 2].map(|i| (p[i] + q[i]) / 2.0);
    for (kind, expected) in [
        (Divergence::ForwardKl, kl(p, q)),
        (Divergence::ReverseKl, kl(q, p)),
        (Divergence::Jsd, (kl(p, m) + kl(q, m)) / 2.0),
        (Divergence::Tvd, 0.3),
    ] {
        let found = divergence(kind, &logs(p), &logs(q), 1.0).unwrap();
        let found = found.to_vec1::<f64>().unwrap()[0];
        assert!(
            (found - expected).abs() < 1e-12,
            "{kind:?}: {found} for {expected}"
        );
    }
    // Among the teacher's two likeliest tokens, renormalised.
    let (t, s) = top_k(&logs(p), &logs(q), 2).unwrap();
    let found = forward_kl(&t, &s, 1.0).unwrap().to_vec1::<f64>().unwrap()[0];
    let among = 0.625 * (0.625f64 / 0.5).ln() + 0.375 * (0.375f64 / 0.5).ln();
    assert!((found - among).abs() < 1e-12);
}

#[test]
fn divergence_of_close_distributions_is_exact() {
    let teacher = noise((4, 361), 5., 2);
    let student = (&teacher + noise((4, 361), 1e-2, 3)).unwrap();
    let kl = forward_kl(&f32(&teacher), &f32(&student), 1.).unwrap();
    let truth = forward_kl(&teacher, &student, 1.).unwrap();
    let error = (kl.to_dtype(DType::F64).unwrap() - truth)
        .unwrap()
        .abs()
        .unwrap();
    let error = error.max(0).unwrap().to_scalar::<f64>().unwrap();
    assert!(error < 1e-6, "{error}");
    let itself = forward_kl(&f32(&teacher), &f32(&teacher), 1.).unwrap();
    assert_eq!(itself.to_vec1::<f32>().unwrap(), [0.; 4]);
}

#[test]
fn large_logits_stay_finite() {
    let logits = Tensor::new(&[[-1e4f32, 0., 1e4]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    assert_eq!(
        cross_entropy(&logits, &targets)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap(),
        [2e4]
    );
}

#[test]
fn views_are_read_right() {
    let wide = f32(&noise((6, 40), 3., 5));
    let view = wide.narrow(0, 1, 4).unwrap().narrow(1, 3, 20).unwrap();
    let targets = Tensor::new(&[1u32, 0, 19, 7], &Device::Cpu).unwrap();
    let loss = |x: &Tensor| cross_entropy(x, &targets);
    let (value, gradient) = value_and_gradient(&view, &loss);
    let (copy_value, copy_gradient) = value_and_gradient(&view.contiguous().unwrap(), &loss);
    assert_eq!(distance(&value, &copy_value), 0.);
    assert_eq!(distance(&gradient, &copy_gradient), 0.);
}

#[test]
fn a_row_at_its_target_gets_no_gradient() {
    for dtype in [DType::F32, DType::F64] {
        let x = noise((2, 5), 1., 6).to_dtype(dtype).unwrap();
        let far = (x.narrow(0, 1, 1).unwrap() + 1.).unwrap();
        let target = Tensor::cat(&[&x.narrow(0, 0, 1).unwrap(), &far], 0).unwrap();
        let (value, gradient) = value_and_gradient(&x, &|x| mean_l2(x, &target));
        let root = 5f64.sqrt();
        let value = value
            .to_dtype(DType::F64)
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!((value - root / 2.).abs() < 1e-6);
        let rows = gradient
            .to_dtype(DType::F64)
            .unwrap()
            .to_vec2::<f64>()
            .unwrap();
        assert_eq!(rows[0], [0.; 5]);
        // The weight of the scalar is 0.5, its mean over two rows halves again.
        assert!(
            rows[1].iter().all(|&g| (g + 0.25 / root).abs() < 1e-6),
            "{rows:?}"
        );
    }
}

#[test]
fn teachers_and_targets_get_no_gradient() {
    for dtype in [DType::F32, DType::F64] {
        let x = Var::from_tensor(&noise((2, 5), 1., 6).to_dtype(dtype).unwrap()).unwrap();
        let other = Var::from_tensor(&noise((2, 5), 1., 7).to_dtype(dtype).unwrap()).unwrap();
        let sum = (forward_kl(&other, &x, 1.).unwrap().sum_all().unwrap()
            + relative_mse(&x, &other).unwrap())
        .unwrap();
        let gradients = (sum + mean_l2(&x, &other).unwrap())
            .unwrap()
            .backward()
            .unwrap();
        assert!(gradients.get(&x).is_some());
        assert!(gradients.get(&other).is_none());
    }
}

#[test]
fn misfits_are_named() {
    let logits = f32(&noise((2, 5), 1., 1));
    let error = |targets: &[u32]| {
        let targets = Tensor::new(targets, &Device::Cpu).unwrap();
        cross_entropy(&logits, &targets).unwrap_err().to_string()
    };
    assert!(
        error(&[1, 5]).contains("target 5 of row 1"),
        "{}",
        error(&[1, 5])
    );
    assert!(error(&[1]).contains("[2, 5]"), "{}", error(&[1]));
    assert!(forward_kl(&logits, &logits, 0.).is_err());
    assert!(mean_l2(&logits, &logits.narrow(1, 0, 4).unwrap()).is_err());
}

#[test]
fn cuda_kernels_equal_the_plain_version() {
    let shapes = [(1, 1), (3, 7), (9, 361), (2, 3000)];
    let coarse = |x: Tensor| truth(&x.to_dtype(DType::BF16).unwrap());
    let targets =
        |m: usize, v: usize| -> Vec<u32> { (0..m).map(|i| ((i * 5 + 1) % v) as u32).collect() };
    let cases = shapes.map(|(m, v)| (format!("[{m}, {v}]"), vec![noise((m, v), 4., 1)]));
    let shape = |what: &str| -> (usize, usize) { serde_json::from_str(what).unwrap() };
    // What arrives at the losses is f32, as they are.
    let f32_array = |gpu: &Emulated, x: &Entries, m: usize| gpu.array(&f32(&x.tensor(m)));
    check_cuda(
        "loss",
        &cases,
        &|what, i| {
            let (m, v) = shape(what);
            cross_entropy(&i[0], &Tensor::new(targets(m, v), i[0].device())?)
        },
        &|what, gpu, i, dy| {
            let (m, v) = shape(what);
            let targets = gpu.upload(&targets(m, v))?;
            let [loss, log_sums] = cuda::cross_entropy(gpu, &i[0], &targets, v)?;
            let dy = f32_array(gpu, dy, m);
            let back = cuda::cross_entropy_backward(gpu, &i[0], &targets, &log_sums, &dy, v)?;
            Ok(vec![loss, back])
        },
    );
    use Divergence::{ForwardKl, Jsd, ReverseKl, Tvd};
    for kind in [ForwardKl, ReverseKl, Jsd, Tvd] {
        let teacher = |m: usize, v: usize| coarse(noise((m, v), 4., 9));
        check_cuda(
            "loss",
            &cases,
            &|what, i| {
                let (m, v) = shape(what);
                divergence(kind, &like(&teacher(m, v), &i[0]), &i[0], 1.75)
            },
            &|what, gpu, i, dy| {
                let (m, v) = shape(what);
                let teacher = gpu.array(&teacher(m, v).to_dtype(i[0].dtype())?);
                let launches = cuda::Diverge {
                    kind,
                    temperature: 1.75,
                    v,
                };
                let [loss, log_sums] = launches.forward(gpu, &teacher, &i[0])?;
                let dy = f32_array(gpu, dy, m);
                let back = launches.backward(gpu, &teacher, &i[0], &log_sums, &dy)?;
                Ok(vec![loss, back])
            },
        );
    }
}

#[test]
fn the_cuda_kernel_is_exact_for_close_distributions() {
    let Some(gpu) = Emulated::of("loss", 0) else {
        return;
    };
    let teacher = noise((4, 361), 5., 2).to_dtype(DType::F32).unwrap();
    let step = noise((4, 361), 1e-2, 3).to_dtype(DType::F32).unwrap();
    let student = (&teacher + step).unwrap();
    let kl = |student: &Tensor| {
        let launches = cuda::Diverge {
            kind: Divergence::ForwardKl,
            temperature: 1.,
            v: 361,
        };
        let [teacher, student] = [&teacher, student].map(|x| gpu.array(x));
        let [kl, _] = launches.forward(&gpu, &teacher, &student).unwrap();
        kl.tensor(4)
    };
    let expected = forward_kl(&truth(&teacher), &truth(&student), 1.).unwrap();
    let error = (kl(&student) - expected).unwrap().abs().unwrap();
    let error = error.max(0).unwrap().to_scalar::<f64>().unwrap();
    assert!(error < 1e-6, "{error}");
    assert_eq!(kl(&teacher).to_vec1::<f64>().unwrap(), [0.; 4]);
}

/// Of the others together nothing is lost where there are none, or where the student's are spread as the teacher's.
#[test]
fn likeliest_and_rest_are_the_whole_where_they_can_be() {
    let (m, v) = (4, 50);
    let (teacher, student) = (f32(&noise((m, v), 4., 1)), f32(&noise((m, v), 4., 2)));
    let rows = teacher.to_vec2::<f32>().unwrap();
    let of = |k: usize, student: &Tensor| {
        let tokens: Vec<u32> = rows.iter().flat_map(|row| likeliest(row, k)).collect();
        let coarse = |x: &Tensor| with_rest(x, &tokens).unwrap();
        divergence(
            Divergence::ForwardKl,
            &coarse(&teacher),
            &coarse(student),
            1.0,
        )
    };
    let dense = |x: &Tensor| forward_kl(&teacher, x, 1.0);
    let whole = value_and_gradient(&student, &dense);
    let all = value_and_gradient(&student, &|x| of(v, x));
    assert!(distance(&all.0, &whole.0) < 1e-6);
    assert!(distance(&all.1, &whole.1) < 1e-6);
    // It is never more than the whole, and more the more tokens are told apart.
    let mut last = vec![0f32; m];
    for k in [1, 5, 20, v] {
        let now = of(k, &student).unwrap().to_vec1::<f32>().unwrap();
        assert!(now.iter().zip(&last).all(|(now, last)| *now > last - 1e-6));
        last = now;
    }
    // The same up to the tail's mass.
    let mut shifted = rows.clone();
    for row in &mut shifted {
        for token in likeliest(row, v).into_iter().skip(7) {
            row[token as usize] += 1.5;
        }
    }
    let shifted = Tensor::new(shifted, &Device::Cpu).unwrap();
    let whole = value_and_gradient(&shifted, &dense);
    let coarse = value_and_gradient(&shifted, &|x| of(7, x));
    assert!(distance(&coarse.0, &whole.0) < 1e-6);
    assert!(distance(&coarse.1, &whole.1) < 1e-6);
}
