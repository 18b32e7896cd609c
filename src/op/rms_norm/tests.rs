use super::{cuda, gated_rms_norm, rms_norm};
use crate::op::laws::{check, check_cuda, random};

#[test]
fn kernel_equals_the_plain_version() {
    for shape in [&[1, 3][..], &[2, 7, 16], &[300, 33]] {
        let inputs = random(&[shape, &shape[shape.len() - 1..]], 1);
        check(&format!("{shape:?}"), &inputs, 1e-5, &|i| {
            rms_norm(&i[0], &i[1], 1e-5)
        });
    }
}

#[test]
fn gated_kernel_equals_the_plain_version() {
    for (rows, d, group) in [(1, 4, 4), (7, 48, 16), (300, 12, 3), (5, 128, 64)] {
        let inputs = random(&[&[rows, d], &[rows, d], &[d]], 2);
        check(
            &format!("{rows} rows of {d} by {group}"),
            &inputs,
            1e-5,
            &|i| gated_rms_norm(&i[0], &(&i[1] * 4.)?, &i[2], group, 1e-5),
        );
    }
}

#[test]
fn views_are_accepted() {
    check("narrowed", &random(&[&[3, 9], &[4]], 2), 1e-5, &|i| {
        rms_norm(&i[0].narrow(1, 3, 4)?, &i[1], 1e-5)
    });
}

#[test]
fn cuda_kernels_equal_the_plain_version() {
    let case = |rows: usize, d: usize| (format!("{rows} {d}"), random(&[&[rows, d], &[d]], 1));
    let cases = [
        (1, 1),
        (1, 3),
        (14, 16),
        (3, 33),
        (2, 1027),
        (600, 5),
        (3, 5000),
    ];
    check_cuda(
        "rms_norm",
        &cases.map(|(rows, d)| case(rows, d)),
        &|_, i| rms_norm(&i[0], &i[1], 1e-5),
        &|_, gpu, i, dy| {
            let y = cuda::forward(gpu, &i[0], &i[1], 1e-5)?;
            let [dx, dw] = cuda::backward(gpu, &i[0], &i[1], dy, 1e-5)?;
            Ok(vec![y, dx, dw])
        },
    );
}

#[test]
fn gated_cuda_kernels_equal_the_plain_version() {
    let case = |rows: usize, d: usize, group: usize| {
        let mut inputs = random(&[&[rows, d], &[rows, d], &[d]], 2);
        inputs[1] = (&inputs[1] * 4.).unwrap();
        (group.to_string(), inputs)
    };
    let cases = [
        (1, 4, 4),
        (7, 48, 16),
        (600, 12, 3),
        (5, 128, 64),
        (2, 2600, 1300),
    ];
    let group = |what: &str| what.parse().unwrap();
    check_cuda(
        "rms_norm",
        &cases.map(|(rows, d, group)| case(rows, d, group)),
        &|what, i| gated_rms_norm(&i[0], &i[1], &i[2], group(what), 1e-5),
        &|what, gpu, i, dy| {
            let y = cuda::gated_forward(gpu, &i[0], &i[1], &i[2], group(what), 1e-5)?;
            let back = cuda::gated_backward(gpu, &i[0], &i[1], &i[2], dy, group(what), 1e-5)?;
            Ok([y].into_iter().chain(back).collect())
        },
    );
}
