use super::{Sight, Window, causal_attention};
use crate::op::Documents;
use crate::op::laws::{check, gap, random};
use candle_core::{DType, Tensor};

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
