use super::{cuda, swiglu, swiglu_of};
use crate::op::laws::{check, check_cuda, random};

#[test]
fn kernel_equals_the_plain_version() {
    for shape in [&[1][..], &[3, 7], &[2, 5, 4000]] {
        let inputs = random(&[shape, shape], 1);
        check(&format!("{shape:?}"), &inputs, 1e-5, &|i| {
            swiglu(&(&i[0] * 9.)?, &i[1])
        });
    }
}

/// In f64 it is products and [`swiglu`].
#[test]
fn with_its_products_it_equals_the_plain_version() {
    for (x, n, k) in [(&[3, 7][..], 5, 7), (&[2, 90, 64], 130, 64)] {
        let inputs = random(&[x, &[n, k], &[n, k]], 3);
        check(&format!("{x:?}"), &inputs, 1e-5, &|i| {
            swiglu_of(&i[0], &i[1].clone().into(), &i[2].clone().into())
        });
    }
}

#[test]
fn views_are_accepted() {
    check("narrowed", &random(&[&[3, 8], &[3, 4]], 2), 1e-5, &|i| {
        swiglu(&i[0].narrow(1, 2, 4)?, &i[1])
    });
}

#[test]
fn cuda_kernels_equal_the_plain_version() {
    let cases = [1usize, 21, 1024, 40_003].map(|n| (n.to_string(), random(&[&[n], &[n]], 1)));
    let cases = cases.map(|(what, i)| (what, vec![(&i[0] * 9.).unwrap(), i[1].clone()]));
    check_cuda(
        "swiglu",
        &cases,
        &|_, i| swiglu(&i[0], &i[1]),
        &|_, gpu, i, dy| {
            let y = cuda::forward(gpu, &i[0], &i[1])?;
            let [dgate, dup] = cuda::backward(gpu, &i[0], &i[1], dy)?;
            Ok(vec![y, dgate, dup])
        },
    );
}
