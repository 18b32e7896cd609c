use super::*;
use crate::op::cuda::emulated::{Emulated, Entries};
use crate::op::laws::{check_cuda, distance, f32, like, noise, short_documents};
use candle_core::{DType, Var};

fn shape([heads, groups, head_dim, d_state, chunk]: [usize; 5]) -> SsdShape {
    SsdShape {
        heads,
        groups,
        head_dim,
        d_state,
        chunk,
    }
}

/// xbc, dt and params; steps from about 0.05 to 2, decays a step from almost 0 to almost 1.
fn inputs(shape: SsdShape, b: usize, t: usize) -> [Tensor; 3] {
    let h = shape.heads;
    let params = noise((3, h), 1.5, 3);
    [
        noise((b, t, shape.channels()), 1., 1),
        noise((b, t, h), 2., 2),
        params,
    ]
}

/// The output and the gradients of xbc, dt and params under uneven weights of the outputs.
fn run(
    inputs: &[Tensor; 3],
    shape: SsdShape,
    documents: Option<&Documents>,
) -> (Tensor, [Tensor; 3]) {
    let vars = inputs.each_ref().map(|x| Var::from_tensor(x).unwrap());
    let y = ssd(&vars[0], &vars[1], &vars[2], shape, documents).unwrap();
    let weights = like(&noise(y.shape().clone(), 1., 77), &y);
    let gradients = (&y * weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    (y, vars.map(|var| gradients.get(&var).unwrap().clone()))
}

#[test]
fn kernel_equals_the_recurrence() {
    for (sizes, b, t) in [
        ([4, 2, 16, 16, 8], 2, 21),
        ([2, 2, 5, 3, 4], 2, 9),
        ([3, 1, 20, 33, 64], 1, 50),
        ([1, 1, 1, 1, 1], 1, 1),
        ([4, 1, 32, 16, 7], 1, 130),
    ] {
        let shape = shape(sizes);
        let exact = inputs(shape, b, t);
        let documents = short_documents(b, t);
        for documents in [None, Some(&documents)] {
            let (truth, true_gradients) = run(&exact, shape, documents);
            let (y, gradients) = run(&exact.each_ref().map(f32), shape, documents);
            assert!(
                distance(&y, &truth) < 1e-6,
                "{shape:?}: {}",
                distance(&y, &truth)
            );
            for (gradient, truth) in gradients.iter().zip(&true_gradients) {
                let error = distance(gradient, truth);
                assert!(error < 3e-6, "{shape:?} {:?}: {error}", gradient.shape());
            }
        }
    }
}

#[test]
fn plain_gradients_equal_finite_differences() {
    let (shape, b, t) = (shape([4, 2, 2, 3, 2]), 2, 5);
    let exact = inputs(shape, b, t);
    let documents = short_documents(b, t);
    let (y, gradients) = run(&exact, shape, Some(&documents));
    let weights = noise(y.shape().clone(), 1., 77);
    let total = |[xbc, dt, params]: &[Tensor; 3]| {
        let y = ssd(xbc, dt, params, shape, Some(&documents)).unwrap();
        (y * &weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    };
    let step = 1e-5;
    for (which, gradient) in gradients.iter().enumerate() {
        let count = exact[which].elem_count();
        let slope = |i: usize| {
            let mut nudge = vec![0f64; count];
            nudge[i] = step;
            let nudge = Tensor::from_vec(nudge, exact[which].shape(), &Device::Cpu).unwrap();
            let mut moved = exact.clone();
            moved[which] = (&exact[which] + &nudge).unwrap();
            let up = total(&moved);
            moved[which] = (&exact[which] - &nudge).unwrap();
            (up - total(&moved)) / (2. * step)
        };
        let slopes: Vec<f64> = (0..count).map(slope).collect();
        let slopes = Tensor::from_vec(slopes, exact[which].shape(), &Device::Cpu).unwrap();
        assert!(distance(gradient, &slopes) < 1e-7, "argument {which}");
    }
}

#[test]
fn chunk_size_never_changes_the_answer() {
    let (b, t) = (2, 37);
    let sized = |chunk| shape([4, 2, 16, 20, chunk]);
    let inputs = inputs(sized(1), b, t).map(|x| f32(&x));
    let (y, gradients) = run(&inputs, sized(t), None);
    for chunk in [1, 2, 8, 36, 1000] {
        let (other_y, other_gradients) = run(&inputs, sized(chunk), None);
        assert_eq!(distance(&other_y, &y), 0.);
        for (other, gradient) in other_gradients.iter().zip(&gradients) {
            assert!(distance(other, gradient) < 1e-6, "chunk {chunk}");
        }
    }
}

#[test]
fn packed_documents_equal_each_alone() {
    let t = 11;
    let shape = shape([4, 2, 3, 5, 4]);
    for dtype in [DType::F32, DType::F64] {
        let inputs = inputs(shape, 1, t).map(|x| x.to_dtype(dtype).unwrap());
        let starts = [0, 0, 0, 3, 4, 4, 6, 6, 6, 6, 6].to_vec();
        let documents = Documents::new(starts, t);
        let [xbc, dt, params] = &inputs;
        let packed = ssd(xbc, dt, params, shape, Some(&documents)).unwrap();
        for (start, length) in [(0, 3), (3, 1), (4, 2), (6, 5)] {
            let part = |x: &Tensor| x.narrow(1, start, length).unwrap();
            let alone = ssd(&part(xbc), &part(dt), params, shape, None).unwrap();
            assert_eq!(distance(&part(&packed), &alone), 0.);
        }
    }
}

#[test]
fn any_split_resumes_to_the_whole() {
    let t = 10;
    for sizes in [[4, 2, 18, 5, 3], [2, 2, 16, 33, 64]] {
        let shape = shape(sizes);
        // The bits are those of the CPU's kernel.
        let [xbc, dt, params] = inputs(shape, 1, t).map(|x| x.to_dtype(DType::F32).unwrap());
        let whole = ssd(&xbc, &dt, &params, shape, None).unwrap();
        let [xbc, dt, params, whole] =
            [xbc, dt, params, whole].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let (channels, h, width) = (shape.channels(), shape.heads, shape.heads * shape.head_dim);
        for pieces in [vec![10], vec![1; 10], vec![3, 2, 5], vec![7, 3]] {
            let mut state = vec![0.; h * shape.kept()];
            let (mut y, mut from) = (vec![f32::NAN; t * width], 0);
            for length in pieces {
                let to = from + length;
                let (xbc, dt) = (&xbc[from * channels..to * channels], &dt[from * h..to * h]);
                let y = &mut y[from * width..to * width];
                resume(xbc, dt, &params, shape, &mut state, y);
                from = to;
            }
            assert_eq!(y, whole);
        }
    }
}

#[test]
fn views_are_read_right() {
    let shape = shape([2, 1, 4, 3, 4]);
    let (b, t, channels) = (2, 6, shape.channels());
    let wide = f32(&noise((b, t, channels + 9), 1., 1));
    let xbc = wide.narrow(2, 3, channels).unwrap();
    let dt = wide.narrow(2, channels + 5, 2).unwrap();
    let params = f32(&noise((2, 3), 1., 3)).t().unwrap();
    let copies = [&xbc, &dt, &params].map(|x| x.contiguous().unwrap());
    let truth = run(&copies, shape, None);
    let y = ssd(&xbc, &dt, &params, shape, None).unwrap();
    assert_eq!(distance(&y, &truth.0), 0.);
    // Gradients through views, with an upstream gradient that is a view too.
    let var = Var::from_tensor(&wide).unwrap();
    let views = [var.narrow(2, 3, channels), var.narrow(2, channels + 5, 2)].map(Result::unwrap);
    let y = ssd(&views[0], &views[1], &params, shape, None).unwrap();
    let weights = f32(&noise(y.shape().clone(), 1., 77));
    let turned = (y.transpose(1, 2).unwrap() * weights.transpose(1, 2).unwrap()).unwrap();
    let gradients = turned.sum_all().unwrap().backward().unwrap();
    let gradient = gradients.get(&var).unwrap();
    assert!(distance(&gradient.narrow(2, 3, channels).unwrap(), &truth.1[0]) < 1e-6);
    assert!(distance(&gradient.narrow(2, channels + 5, 2).unwrap(), &truth.1[1]) < 1e-6);
}

#[test]
fn tiny_and_huge_steps_are_exact() {
    let shape = shape([1, 1, 1, 1, 4]);
    let raw = [-80f64, -15., -7., -1e-3, 0., 3., 19.9, 20.1, 60.];
    let dt = Tensor::from_slice(&raw, (raw.len(), 1, 1), &Device::Cpu).unwrap();
    let xbc = Tensor::ones((raw.len(), 1, 3), DType::F64, &Device::Cpu).unwrap();
    let params = Tensor::zeros((3, 1), DType::F64, &Device::Cpu).unwrap();
    let truth = raw.map(|x| x.max(0.) + (-x.abs()).exp().ln_1p());
    for dtype in [DType::F64, DType::F32] {
        let [xbc, dt, params] = [&xbc, &dt, &params].map(|x| x.to_dtype(dtype).unwrap());
        // One step from zero with x = B = C = 1 and D = 0 shows Δ itself.
        let y = ssd(&xbc, &dt, &params, shape, None).unwrap();
        let y = y
            .to_dtype(DType::F64)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f64>()
            .unwrap();
        for (y, truth) in y.iter().zip(truth) {
            assert!((y / truth - 1.).abs() < 1e-6, "{dtype:?}: {y} {truth}");
        }
    }
}

#[test]
fn misfits_are_named() {
    let good = shape([4, 2, 3, 5, 4]);
    let [xbc, dt, params] = inputs(good, 2, 6).map(|x| f32(&x));
    let error = |sizes, dt: &Tensor| {
        ssd(&xbc, dt, &params, shape(sizes), None)
            .unwrap_err()
            .to_string()
    };
    assert!(error([4, 3, 3, 5, 4], &dt).contains("4 heads do not share 3 groups"));
    assert!(error([4, 2, 3, 5, 0], &dt).contains("chunk"));
    assert!(error([4, 2, 4, 5, 4], &dt).contains("[B, T, 38]"));
    assert!(error([4, 2, 3, 5, 4], &params).contains("dt [B, T, 4]"));
    assert!(ssd(&xbc, &dt, &params, good, Some(&short_documents(2, 5))).is_err());
}

fn launches<'a>(
    gpu: &'a Emulated,
    [xbc, dt, params]: [&'a Entries; 3],
    shape: SsdShape,
    [b, t, row]: [usize; 3],
    documents: Option<&'a Documents>,
) -> cuda::Ssd<'a, Emulated> {
    let (h, channels) = (shape.heads, shape.channels());
    let layout = Layout::new((b, t, channels).into(), vec![t * row, row, 1], 0);
    cuda::Ssd {
        gpu,
        xbc: cuda::Rows::of(xbc, &layout).unwrap(),
        dt: cuda::Rows::of(dt, &Layout::contiguous((b, t, h))).unwrap(),
        params,
        shape,
        documents,
    }
}

/// Every size there is a kernel for, chunks that are not whole, borders in many places.
#[test]
fn cuda_kernels_equal_the_recurrence() {
    // [H, G, P, N, B, T]
    let cases = [
        [1, 1, 1, 1, 1, 1],
        [4, 2, 16, 16, 2, 21],
        [2, 2, 5, 3, 2, 9],
        [4, 1, 32, 16, 1, 130],
        [2, 1, 20, 31, 1, 150],
        [2, 1, 64, 40, 1, 70],
        [1, 1, 70, 128, 1, 66],
    ];
    let sizes = |[h, g, p, n, ..]: [usize; 6]| shape([h, g, p, n, 64]);
    for bordered in [false, true] {
        let documents = |b, t| bordered.then(|| short_documents(b, t));
        let case = |case: [usize; 6]| {
            let [.., b, t] = case;
            let [xbc, dt, params] = inputs(sizes(case), b, t);
            // Sums over many small products are rounded to bf16 between them.
            (format!("{case:?}"), vec![(xbc * 0.25).unwrap(), dt, params])
        };
        check_cuda(
            "ssd",
            &cases.map(case),
            &|what, i| {
                let shape = sizes(serde_json::from_str(what).unwrap());
                let (b, t, _) = i[0].dims3()?;
                ssd(&i[0], &i[1], &i[2], shape, documents(b, t).as_ref())
            },
            &|what, gpu, i, dy| {
                let case: [usize; 6] = serde_json::from_str(what).unwrap();
                let ([h, .., b, t], shape) = (case, sizes(case));
                let (documents, channels) = (documents(b, t), shape.channels());
                // These are in f32 whatever the model is in.
                let steady = |x: &Entries, dims: (usize, usize)| {
                    let x: Tensor = x.tensor(dims);
                    gpu.array(&x.to_dtype(DType::F32).unwrap())
                };
                let (dt, params) = (steady(&i[1], (b * t, h)), steady(&i[2], (3, h)));
                let operands = [&i[0], &dt, &params];
                let launches = launches(gpu, operands, shape, [b, t, channels], documents.as_ref());
                let [y, entering] = launches.forward()?;
                let [dxbc, ddt, dparams] = launches.backward(dy, &entering)?;
                Ok(vec![y, dxbc, ddt, dparams])
            },
        );
    }
}

/// Rows that lie apart.
#[test]
fn cuda_kernels_read_rows_where_they_stand() {
    let Some(gpu) = Emulated::of("ssd", 0) else {
        return;
    };
    let shape = shape([2, 1, 4, 3, 4]);
    let (b, t, channels) = (2, 6, shape.channels());
    let row = channels + 9;
    let wide = noise((b, t, row), 1., 1);
    let [_, dt, params] = inputs(shape, b, t);
    let seen = wide
        .flatten_all()
        .unwrap()
        .narrow(0, 3, b * t * row - 3)
        .unwrap();
    let [xbc, dt_entries, params_entries] =
        [&seen, &dt, &params].map(|x| gpu.array(&x.to_dtype(DType::F32).unwrap()));
    let operands = [&xbc, &dt_entries, &params_entries];
    let [y, _] = launches(&gpu, operands, shape, [b, t, row], None)
        .forward()
        .unwrap();
    let xbc = wide.narrow(2, 3, channels).unwrap();
    let truth = ssd(&xbc, &dt, &params, shape, None).unwrap();
    assert!(distance(&y.tensor(truth.shape()), &truth) < 1e-6);
}
