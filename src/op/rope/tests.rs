use super::{RopeLayout, cuda, rope};
use crate::op::cuda::Array;
use crate::op::laws::{self, check, check_cuda, gap, random};
use candle_core::{Result, Tensor};

fn tables(t: usize, pairs: usize, like: &Tensor) -> Result<[Tensor; 2]> {
    let angles = (random(&[&[t, pairs]], 5)[0].clone() * 3.)?;
    Ok([
        laws::like(&angles.cos()?, like),
        laws::like(&angles.sin()?, like),
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

#[test]
fn cuda_kernels_equal_the_plain_version() {
    let case = |dims: [usize; 4]| (format!("{dims:?}"), random(&[&dims], 1));
    let shapes = [
        [1, 1, 1, 2],
        [2, 5, 3, 6],
        [2, 130, 4, 16],
        [1, 3, 2, 66],
        [1, 2, 5, 128],
    ];
    for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
        check_cuda(
            "rope",
            &shapes.map(case),
            &|_, i| {
                let (_, t, _, k) = i[0].dims4()?;
                let [cos, sin] = tables(t, k / 2, &i[0])?;
                rope(&i[0], &cos, &sin, layout)
            },
            &|what, gpu, i, dy| {
                let shape: [usize; 4] = serde_json::from_str(what).unwrap();
                let [_, t, h, k] = shape;
                let dtype = i[0].dtype();
                let like = Tensor::zeros(1, dtype, &candle_core::Device::Cpu)?;
                let [cos, sin] = tables(t, k / 2, &like)?.map(|table| gpu.array(&table));
                let turn = |x, sign| cuda::rope(gpu, x, &cos, &sin, [h, k], layout, sign);
                Ok(vec![turn(&i[0], 1.)?, turn(dy, -1.)?])
            },
        );
    }
}
