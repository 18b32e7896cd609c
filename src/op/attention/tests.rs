use super::{Sight, Window, causal_attention, cuda};
use crate::op::Documents;
use crate::op::cuda::emulated::Emulated;
use crate::op::laws::{check, check_cuda, gap, random, truth};
use candle_core::{DType, Layout, Tensor};

#[test]
fn kernel_equals_the_plain_version() {
    // [B, T, S, H, G, K, V]
    for [b, t, s, h, g, k, v] in [
        [1, 1, 1, 1, 1, 2, 3],
        [2, 7, 7, 4, 2, 6, 5],
        [1, 70, 70, 2, 2, 16, 16],
        [2, 3, 40, 4, 1, 5, 8],
        [1, 1, 90, 8, 1, 12, 8],
        [1, 130, 130, 3, 1, 4, 4],
    ] {
        let inputs = random(&[&[b, t, h, k], &[b, s, g, k], &[b, s, g, v]], 1);
        check(
            &format!("{t} of {s}, heads {h}/{g}, {k} {v}"),
            &inputs,
            2e-5,
            &|i| causal_attention(&(&i[0] * 3.)?, &i[1], &i[2], 0.7, &None.into()),
        );
    }
}

#[test]
fn documents_do_not_see_each_other() {
    let t = 90;
    let starts = |cuts: &[usize]| {
        (0..t)
            .map(|i| cuts.iter().rev().find(|c| **c <= i).copied().unwrap_or(0) as u32)
            .collect::<Vec<_>>()
    };
    let rows = [starts(&[0, 1, 40]), starts(&[0, 64, 89])].concat();
    let documents = Documents::new(rows, t);
    let inputs = random(&[&[2, t, 4, 6], &[2, t, 2, 6], &[2, t, 2, 6]], 2);
    check("documents", &inputs, 2e-5, &|i| {
        causal_attention(&i[0], &i[1], &i[2], 1., &Some(&documents).into())
    });
    let f32s: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_dtype(DType::F32).unwrap())
        .collect();
    let packed =
        causal_attention(&f32s[0], &f32s[1], &f32s[2], 1., &Some(&documents).into()).unwrap();
    let part = |t: &Tensor| {
        t.narrow(0, 0, 1)
            .unwrap()
            .narrow(1, 40, 50)
            .unwrap()
            .contiguous()
            .unwrap()
    };
    let alone = causal_attention(
        &part(&f32s[0]),
        &part(&f32s[1]),
        &part(&f32s[2]),
        1.,
        &None.into(),
    )
    .unwrap();
    assert!(gap(&part(&packed), &alone) < 1e-6);
}

#[test]
fn views_are_read_where_they_stand() {
    // Keys and values side by side, as MLA's cache holds them.
    let inputs = random(&[&[2, 3, 4, 6], &[2, 9, 2, 10]], 3);
    check("narrowed", &inputs, 2e-5, &|i| {
        causal_attention(
            &i[0],
            &i[1].narrow(3, 0, 6)?,
            &i[1].narrow(3, 5, 5)?,
            1.,
            &None.into(),
        )
    });
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let inputs = random(&[&[1, 3, 4, 6], &[1, 2, 2, 6]], 1);
    let message = causal_attention(&inputs[0], &inputs[1], &inputs[1], 1., &None.into())
        .unwrap_err()
        .to_string();
    assert!(message.contains("do not fit"), "{message}");
}

/// Queries behind keys that were there before, and windows with sinks, packed or not.
#[test]
fn every_sight_equals_the_plain_version() {
    let starts = [vec![0; 30], vec![30; 40]].concat();
    let documents = Documents::new(starts, 70);
    let window = |size: usize, sinks: usize| Some(Window { size, sinks });
    let inputs = random(&[&[2, 9, 4, 6], &[2, 90, 2, 6], &[2, 90, 2, 5]], 5);
    let packed = random(&[&[1, 70, 4, 6], &[1, 70, 2, 6], &[1, 70, 2, 5]], 6);
    for window in [
        None,
        window(1, 0),
        window(7, 0),
        window(7, 3),
        window(100, 2),
        window(1, 1),
    ] {
        let sight = Sight {
            window,
            ..Sight::default()
        };
        check(&format!("{sight:?}"), &inputs, 2e-5, &|i| {
            causal_attention(&i[0], &i[1], &i[2], 0.7, &sight)
        });
        let sight = Sight {
            documents: Some(documents.clone()),
            window,
        };
        check(&format!("{sight:?}"), &packed, 2e-5, &|i| {
            causal_attention(&i[0], &i[1], &i[2], 0.7, &sight)
        });
    }
}

fn heads<A>(entries: &A, dims: [usize; 4]) -> cuda::Heads<'_, A> {
    let [b, s, g, x] = dims;
    cuda::Heads::of(entries, &Layout::contiguous((b, s, g, x))).unwrap()
}

/// Heads of every size there is a kernel for, tiles that are not whole, queries behind keys, borders, windows and sinks.
#[test]
fn cuda_kernels_equal_the_plain_version() {
    let window = |size: usize, sinks: usize| Some(Window { size, sinks });
    let starts = |cuts: &[usize], t: usize| -> Vec<u32> {
        let start = |i: usize| cuts.iter().rev().find(|c| **c <= i).copied();
        (0..t).map(|i| start(i).unwrap_or(0) as u32).collect()
    };
    // [B, T, S, H, G, K, V], window, where documents begin.
    type Case<'a> = ([usize; 7], Option<Window>, &'a [usize]);
    let cases: [Case; 12] = [
        ([1, 1, 1, 1, 1, 2, 3], None, &[]),
        ([2, 7, 7, 4, 2, 6, 5], None, &[]),
        ([1, 1, 90, 8, 1, 12, 8], None, &[]),
        ([1, 150, 150, 2, 1, 16, 8], None, &[]),
        ([2, 70, 70, 2, 1, 6, 6], None, &[1, 40, 64, 69]),
        ([1, 9, 190, 4, 2, 6, 5], window(7, 3), &[]),
        ([1, 150, 150, 1, 1, 6, 5], window(20, 2), &[]),
        ([1, 70, 70, 1, 1, 8, 8], window(1, 0), &[]),
        ([1, 140, 140, 1, 1, 8, 8], window(30, 3), &[70, 71, 130]),
        ([1, 70, 100, 2, 1, 64, 50], None, &[]),
        ([1, 68, 68, 1, 1, 128, 128], None, &[65]),
        ([1, 66, 66, 1, 1, 192, 128], None, &[20]),
    ];
    let sight = |what: &str| {
        let case = what.split(':').next().unwrap().parse::<usize>().unwrap();
        let ([b, t, ..], window, cuts) = cases[case];
        let rows = (0..b).flat_map(|_| starts(cuts, t)).collect();
        Sight {
            documents: (!cuts.is_empty()).then(|| Documents::new(rows, t)),
            window,
        }
    };
    let described = |(i, case): (usize, &Case)| {
        let [b, t, s, h, g, k, v] = case.0;
        let inputs = random(&[&[b, t, h, k], &[b, s, g, k], &[b, s, g, v]], 1);
        (format!("{i}: {case:?}"), inputs)
    };
    let described: Vec<_> = cases.iter().enumerate().map(described).collect();
    let scale = |k: usize| 1.5 / (k as f64).sqrt();
    check_cuda(
        "attention",
        &described,
        &|what, i| causal_attention(&i[0], &i[1], &i[2], scale(i[0].dim(3)?), &sight(what)),
        &|what, gpu, i, dy| {
            let case = what.split(':').next().unwrap().parse::<usize>().unwrap();
            let [b, t, s, h, g, k, v] = cases[case].0;
            let launches = cuda::Attention {
                gpu,
                q: &i[0],
                q_dims: [b, t, h, k],
                k: heads(&i[1], [b, s, g, k]),
                v: heads(&i[2], [b, s, g, v]),
                scale: scale(k) as f32,
                sight: &sight(what),
            };
            let [y, sums] = launches.forward()?;
            let [dq, dk, dv] = launches.backward(&y, dy, &sums)?;
            Ok(vec![y, dq, dk, dv])
        },
    );
}

/// Keys and values side by side, as MLA has them.
#[test]
fn cuda_kernels_read_heads_where_they_stand() {
    let Some(gpu) = Emulated::of("attention", 0) else {
        return;
    };
    let [b, t, s, h, g] = [2, 3, 9, 4, 2];
    let inputs = random(&[&[b, t, h, 6], &[b, s, g, 10]], 3);
    let both = inputs[1].flatten_all().unwrap();
    let array = |x: &Tensor| gpu.array(&x.to_dtype(DType::F32).unwrap());
    let (keys, values) = (
        array(&both),
        array(&both.narrow(0, 5, b * s * g * 10 - 5).unwrap()),
    );
    let of = |entries, x| {
        let strides = vec![s * g * 10, g * 10, 10, 1];
        cuda::Heads::of(entries, &Layout::new((b, s, g, x).into(), strides, 0)).unwrap()
    };
    let launches = cuda::Attention {
        gpu: &gpu,
        q: &array(&inputs[0]),
        q_dims: [b, t, h, 6],
        k: of(&keys, 6),
        v: of(&values, 5),
        scale: 1.,
        sight: &Sight::default(),
    };
    let [y, _] = launches.forward().unwrap();
    let [k, v] = [(0, 6), (5, 5)].map(|(from, x)| inputs[1].narrow(3, from, x).unwrap());
    let plain = causal_attention(&inputs[0], &k, &v, 1., &None.into()).unwrap();
    assert!(gap(&y.tensor((b, t, h, 5)), &truth(&plain)) < 1e-6);
}
