use super::{RopeLayout, rope};
use crate::op::laws::{check, gap, random};
use candle_core::{Result, Tensor};

fn tables(t: usize, pairs: usize, like: &Tensor) -> Result<[Tensor; 2]> {
    let angles = (random(&[&[t, pairs]], 5)[0].clone() * 3.)?;
    Ok([
        angles.cos()?.to_dtype(like.dtype())?,
        angles.sin()?.to_dtype(like.dtype())?,
    ])
}

#[test]
fn kernel_equals_the_plain_version() {
    for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
        for [b, t, h, k] in [[1, 1, 1, 2], [2, 5, 3, 6], [2, 300, 4, 16]] {
            check(
                &format!("{layout:?} {t} {k}"),
                &random(&[&[b, t, h, k]], 1),
                1e-5,
                &|i| {
                    let [cos, sin] = tables(t, k / 2, &i[0])?;
                    rope(&i[0], &cos, &sin, layout)
                },
            );
        }
        check(
            "a narrowed head",
            &random(&[&[2, 5, 3, 10]], 1),
            1e-5,
            &|i| {
                let [cos, sin] = tables(5, 2, &i[0])?;
                rope(&i[0].narrow(3, 6, 4)?, &cos, &sin, layout)
            },
        );
    }
}

/// The two layouts are one map between reordered dims.
#[test]
fn layouts_are_permutations_of_each_other() {
    let x = random(&[&[1, 4, 2, 6]], 3).remove(0);
    let [cos, sin] = tables(4, 3, &x).unwrap();
    let order = |x: &Tensor, dims: [u32; 6]| {
        x.index_select(&Tensor::new(&dims, x.device()).unwrap(), 3)
            .unwrap()
    };
    let halves = rope(
        &order(&x, [0, 2, 4, 1, 3, 5]),
        &cos,
        &sin,
        RopeLayout::Halves,
    )
    .unwrap();
    let pairs = rope(&x, &cos, &sin, RopeLayout::Interleaved).unwrap();
    assert!(gap(&order(&halves, [0, 3, 1, 4, 2, 5]), &pairs) < 1e-12);
}
