use super::swiglu;
use crate::op::laws::{check, random};

#[test]
fn kernel_equals_the_plain_version() {
    for shape in [&[1][..], &[3, 7], &[2, 5, 4000]] {
        let inputs = random(&[shape, shape], 1);
        check(&format!("{shape:?}"), &inputs, 1e-5, &|i| {
            swiglu(&(&i[0] * 9.)?, &i[1])
        });
    }
}

#[test]
fn views_are_accepted() {
    check("narrowed", &random(&[&[3, 8], &[3, 4]], 2), 1e-5, &|i| {
        swiglu(&i[0].narrow(1, 2, 4)?, &i[1])
    });
}
