use super::linear;
use crate::op::laws::{check, random};

#[test]
fn kernel_equals_reference() {
    for (lead, ins, outs) in [(&[1][..], 3, 5), (&[2, 7], 16, 9), (&[3, 40], 33, 64)] {
        let x: Vec<usize> = lead.iter().copied().chain([ins]).collect();
        let inputs = random(&[&x, &[outs, ins]], 1);
        check(&format!("{x:?} to {outs}"), &inputs, 1e-5, &|i| {
            linear(&i[0], &i[1])
        });
    }
}

#[test]
fn views_are_read_where_they_stand() {
    let inputs = random(&[&[2, 5, 6], &[9, 4]], 2);
    check("narrowed x, narrowed w", &inputs, 1e-5, &|i| {
        linear(&i[0].narrow(2, 1, 4)?, &i[1].narrow(0, 3, 5)?)
    });
    check(
        "transposed x",
        &random(&[&[2, 4, 5], &[3, 4]], 3),
        1e-5,
        &|i| linear(&i[0].transpose(1, 2)?, &i[1]),
    );
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let inputs = random(&[&[2, 5], &[3, 4]], 1);
    let message = linear(&inputs[0], &inputs[1]).unwrap_err().to_string();
    assert!(message.contains("4 inputs"), "{message}");
}
