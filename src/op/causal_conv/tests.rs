use super::*;
use crate::op::cuda::Array;
use crate::op::cuda::emulated::Emulated;
use crate::op::laws::{check_cuda, distance, f32, like, noise, short_documents};
use candle_core::{DType, Var};

/// The output and the gradients of x, weight and bias under uneven weights of the outputs.
fn run(
    [x, weight, bias]: [&Tensor; 3],
    silu: bool,
    documents: Option<&Documents>,
) -> (Tensor, [Tensor; 3]) {
    let vars = [x, weight, bias].map(|x| Var::from_tensor(x).unwrap());
    let y = causal_conv(&vars[0], &vars[1], &vars[2], silu, documents).unwrap();
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
fn kernel_equals_the_plain_version() {
    // Odd sizes; shorter than the width; longer than a block of the backward pass.
    for (b, t, c, w) in [
        (2, 9, 5, 4),
        (1, 2, 3, 4),
        (3, 70, 33, 3),
        (1, 1, 1, 1),
        (2, 150, 16, 2),
    ] {
        let x = noise((b, t, c), 1., 1);
        let (weight, bias) = (noise((c, w), 1., 2), noise(c, 1., 3));
        let documents = short_documents(b, t);
        for (silu, documents) in [(false, None), (true, None), (true, Some(&documents))] {
            let (truth, true_gradients) = run([&x, &weight, &bias], silu, documents);
            let (y, gradients) = run([&f32(&x), &f32(&weight), &f32(&bias)], silu, documents);
            assert!(distance(&y, &truth) < 1e-6);
            for (gradient, truth) in gradients.iter().zip(&true_gradients) {
                assert!(distance(gradient, truth) < 2e-6, "{b} {t} {c} {w} {silu}");
            }
        }
    }
}

#[test]
fn plain_gradients_equal_finite_differences() {
    let (b, t, c, w) = (2, 5, 2, 4);
    let inputs = [
        noise((b, t, c), 1., 1),
        noise((c, w), 1., 2),
        noise(c, 1., 3),
    ];
    let documents = short_documents(b, t);
    let (_, gradients) = run(inputs.each_ref(), true, Some(&documents));
    let weights = noise((b, t, c), 1., 77);
    let total = |[x, weight, bias]: [&Tensor; 3]| {
        let y = causal_conv(x, weight, bias, true, Some(&documents)).unwrap();
        (y * &weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap()
    };
    let step = 1e-5;
    for (which, gradient) in gradients.iter().enumerate() {
        let count = inputs[which].elem_count();
        let slope = |i: usize| {
            let mut nudge = vec![0f64; count];
            nudge[i] = step;
            let nudge = Tensor::from_vec(nudge, inputs[which].shape(), &Device::Cpu).unwrap();
            let mut moved = inputs.clone();
            moved[which] = (&inputs[which] + &nudge).unwrap();
            let up = total(moved.each_ref());
            moved[which] = (&inputs[which] - &nudge).unwrap();
            (up - total(moved.each_ref())) / (2. * step)
        };
        let slopes: Vec<f64> = (0..count).map(slope).collect();
        let slopes = Tensor::from_vec(slopes, inputs[which].shape(), &Device::Cpu).unwrap();
        assert!(distance(gradient, &slopes) < 1e-7, "argument {which}");
    }
}

#[test]
fn packed_documents_equal_each_alone() {
    let (t, c, w) = (11, 4, 4);
    for dtype in [DType::F32, DType::F64] {
        let [x, weight, bias] = [
            noise((1, t, c), 1., 1),
            noise((c, w), 1., 2),
            noise(c, 1., 3),
        ]
        .map(|x| x.to_dtype(dtype).unwrap());
        let starts = [0, 0, 0, 3, 4, 4, 6, 6, 6, 6, 6].to_vec();
        let packed =
            causal_conv(&x, &weight, &bias, true, Some(&Documents::new(starts, t))).unwrap();
        for (start, length) in [(0, 3), (3, 1), (4, 2), (6, 5)] {
            let part = x.narrow(1, start, length).unwrap();
            let alone = causal_conv(&part, &weight, &bias, true, None).unwrap();
            assert_eq!(
                distance(&packed.narrow(1, start, length).unwrap(), &alone),
                0.
            );
        }
    }
}

#[test]
fn any_split_resumes_to_the_whole() {
    let (t, c, w) = (10, 6, 4);
    let [x, weight, bias] = [
        noise((1, t, c), 1., 1),
        noise((c, w), 1., 2),
        noise(c, 1., 3),
    ]
    .each_ref()
    .map(f32);
    let whole = causal_conv(&x, &weight, &bias, true, None).unwrap();
    let taps = weight.t().unwrap().contiguous().unwrap();
    let [x, taps, bias, whole] =
        [x, taps, bias, whole].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    for pieces in [vec![10], vec![1; 10], vec![3, 2, 5], vec![7, 3]] {
        let mut state = vec![0.; (w - 1) * c];
        let (mut y, mut from) = (vec![f32::NAN; t * c], 0);
        for length in pieces {
            let rows = from * c..(from + length) * c;
            resume(&x[rows.clone()], &taps, &bias, &mut state, &mut y[rows]);
            from += length;
        }
        assert_eq!(y, whole);
        assert_eq!(state, x[(t - (w - 1)) * c..]);
    }
}

#[test]
fn views_are_read_right() {
    let wide = f32(&noise((2, 9, 20), 1., 1));
    let (weight, bias) = (
        f32(&noise((4, 7), 1., 2)).t().unwrap(),
        f32(&noise(7, 1., 3)),
    );
    let narrowed = wide.narrow(2, 5, 7).unwrap().narrow(1, 2, 6).unwrap();
    let transposed = f32(&noise((2, 7, 6), 1., 4)).transpose(1, 2).unwrap();
    for view in [narrowed, transposed] {
        let copies = [
            view.contiguous().unwrap(),
            weight.contiguous().unwrap(),
            bias.clone(),
        ];
        let truth = run(copies.each_ref(), true, None);
        let y = causal_conv(&view, &weight, &bias, true, None).unwrap();
        assert_eq!(distance(&y, &truth.0), 0.);
        // The gradient through a view, to a variable.
        let offset = Var::from_tensor(&Tensor::zeros_like(&view).unwrap()).unwrap();
        let moved = Tensor::cat(&[&(&view + offset.as_tensor()).unwrap(), &view], 2).unwrap();
        let moved = moved.narrow(2, 0, 7).unwrap();
        let y = causal_conv(&moved, &weight, &bias, true, None).unwrap();
        let weights = f32(&noise(y.shape().clone(), 1., 77));
        let gradients = (y * weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert_eq!(distance(gradients.get(&offset).unwrap(), &truth.1[0]), 0.);
    }
}

#[test]
fn only_wanted_gradients_are_computed() {
    let [x, weight, bias] = [
        noise((1, 5, 3), 1., 1),
        noise((3, 4), 1., 2),
        noise(3, 1., 3),
    ]
    .map(|x| f32(&x));
    let (_, all) = run([&x, &weight, &bias], true, None);
    let weights = f32(&noise((1, 5, 3), 1., 77));
    for wanted in 0..2 {
        let mut inputs = [x.clone(), weight.clone(), bias.clone()];
        let var = Var::from_tensor(&inputs[wanted]).unwrap();
        inputs[wanted] = var.as_tensor().clone();
        let y = causal_conv(&inputs[0], &inputs[1], &inputs[2], true, None).unwrap();
        let gradients = (y * &weights)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert_eq!(distance(gradients.get(&var).unwrap(), &all[wanted]), 0.);
    }
}

#[test]
fn misfits_are_named() {
    let x = f32(&noise((2, 5, 3), 1., 1));
    let (weight, bias) = (f32(&noise((3, 4), 1., 2)), f32(&noise(3, 1., 3)));
    let error = causal_conv(&x, &weight.t().unwrap(), &bias, true, None).unwrap_err();
    assert!(error.to_string().contains("[3, W]"), "{error}");
    let documents = short_documents(1, 5);
    assert!(causal_conv(&x, &weight, &bias, true, Some(&documents)).is_err());
}

#[test]
fn cuda_kernels_equal_the_plain_version() {
    let shapes = [
        [2, 9, 5, 4],
        [1, 2, 3, 4],
        [3, 70, 33, 3],
        [1, 1, 1, 1],
        [2, 150, 16, 2],
        [1, 66, 300, 4],
    ];
    for (silu, bordered) in [(false, false), (true, false), (true, true)] {
        let case = |[b, t, c, w]: [usize; 4]| {
            let inputs = [
                noise((b, t, c), 1., 1),
                noise((c, w), 1., 2),
                noise(c, 1., 3),
            ];
            (format!("[{b}, {t}, {c}, {w}]"), inputs.to_vec())
        };
        let documents = |b, t| bordered.then(|| short_documents(b, t));
        check_cuda(
            "causal_conv",
            &shapes.map(case),
            &|_, i| {
                let (b, t, _) = i[0].dims3()?;
                causal_conv(&i[0], &i[1], &i[2], silu, documents(b, t).as_ref())
            },
            &|what, gpu, i, dy| {
                let [b, t, c, w]: [usize; 4] = serde_json::from_str(what).unwrap();
                let dtype = i[0].dtype();
                let taps = i[1].tensor((c, w)).t()?.contiguous()?.to_dtype(dtype)?;
                let documents = documents(b, t);
                let conv = cuda::Conv {
                    gpu,
                    rows: cuda::Rows {
                        x: &i[0],
                        dims: [b, t, c],
                        strides: [t * c, c],
                    },
                    taps: &gpu.array(&taps),
                    bias: &i[2],
                    silu,
                    documents: documents.as_ref(),
                };
                let (dx, sums) = conv.backward(dy, true)?;
                let sums = sums.tensor((w + 1, c)).to_dtype(dtype)?;
                let [dtaps, dbias] = [sums.narrow(0, 0, w)?.t()?, sums.get(w)?];
                let [dtaps, dbias] = [dtaps, dbias].map(|t| gpu.array(&t.contiguous().unwrap()));
                Ok(vec![conv.forward()?, dx.unwrap(), dtaps, dbias])
            },
        );
    }
}

/// Rows that lie apart, as in a projection of which the convolution takes a part.
#[test]
fn cuda_kernels_read_narrowed_rows_in_place() {
    let Some(gpu) = Emulated::of("causal_conv", 0) else {
        return;
    };
    let (b, t, c, w) = (2, 7, 6, 4);
    let whole = noise((b, t, 10), 1., 1);
    let [taps, bias] = [noise((w, c), 1., 2), noise(c, 1., 3)];
    // The view begins at channel 4.
    let seen = whole.flatten_all().unwrap().narrow(0, 4, b * t * 10 - 4);
    let array = |x: &Tensor| gpu.array(&x.to_dtype(DType::F32).unwrap());
    let conv = cuda::Conv {
        gpu: &gpu,
        rows: cuda::Rows {
            x: &array(&seen.unwrap()),
            dims: [b, t, c],
            strides: [t * 10, 10],
        },
        taps: &array(&taps),
        bias: &array(&bias),
        silu: true,
        documents: None,
    };
    let found = conv.forward().unwrap().tensor((b, t, c));
    let x = whole.narrow(2, 4, c).unwrap();
    let truth = causal_conv(&x, &taps.t().unwrap(), &bias, true, None).unwrap();
    assert!(distance(&found, &truth) < 1e-6);
}
