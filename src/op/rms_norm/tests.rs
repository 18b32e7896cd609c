use super::{gated_rms_norm, rms_norm};
use crate::op::laws::{check, random};

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
