use super::*;
use crate::op::isa::Isa;
use crate::op::laws::off;
use rand::{RngExt, SeedableRng};

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    // Nearly normal, with a heavier one now and then.
    let mut normal = || {
        (0..4)
            .map(|_| random.random_range(-1.0..1.0f32))
            .sum::<f32>()
    };
    (0..count)
        .map(|i| match i % 61 {
            7 => 4. * normal(),
            _ => normal(),
        })
        .collect()
}

fn coded(kind: BlockType, x: &[f32], importance: Option<&[f32]>) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = vec![0; kind.row_bytes(x.len()).unwrap()];
    quantize(kind, x, importance, &mut bytes);
    let mut back = vec![0.; x.len()];
    dequantize(kind, &bytes, &mut back);
    (bytes, back)
}

fn share(x: &[f32], back: &[f32], w: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(usize) -> f32| (0..x.len()).map(|i| f64::from(f(i))).sum::<f64>();
    sum(&|i| w[i] * (x[i] - back[i]).powi(2)) / sum(&|i| w[i] * x[i].powi(2))
}

/// The share of a normal weight's energy that each type loses; bits tell the order of magnitude.
#[test]
fn rounding_loses_what_the_bits_allow() {
    let x = random(4096, 1);
    let equal = vec![1.; x.len()];
    for (kind, most) in [
        (BlockType::Q8_0, 5e-5),
        (BlockType::Q6K, 6e-4),
        (BlockType::Q4K, 9e-3),
        (BlockType::Q4_0, 1.5e-2),
    ] {
        let lost = share(&x, &coded(kind, &x, None).1, &equal);
        assert!(lost < most && lost > most / 10., "{}: {lost}", kind.name());
    }
}

#[test]
fn importance_moves_the_error_to_where_it_costs_least() {
    let x = random(4096, 2);
    let w: Vec<f32> = random(4096, 3).iter().map(|w| w.powi(4)).collect();
    for kind in BlockType::ALL {
        let plain = share(&x, &coded(kind, &x, None).1, &w);
        let weighted = share(&x, &coded(kind, &x, Some(&w)).1, &w);
        assert!(
            weighted < 0.95 * plain,
            "{}: {weighted} {plain}",
            kind.name()
        );
    }
}

#[test]
fn zeros_constants_and_signs_are_kept() {
    for kind in BlockType::ALL {
        assert!(coded(kind, &[0.; 512], None).1.iter().all(|x| *x == 0.));
        for value in [3.5, -0.01] {
            let back = coded(kind, &[value; 512], Some(&[0.; 512])).1;
            let near = |x: &f32| (x - value).abs() < 0.01 * value.abs();
            assert!(back.iter().all(near), "{} {value}: {back:?}", kind.name());
        }
    }
}

/// What is read is coded again to the same weights.
#[test]
fn coding_twice_changes_little() {
    let x = random(2048, 4);
    for kind in BlockType::ALL {
        let once = coded(kind, &x, None).1;
        let twice = coded(kind, &once, None).1;
        let equal = vec![1.; x.len()];
        let moved = share(&once, &twice, &equal);
        assert!(moved < 2e-4, "{}: {moved}", kind.name());
    }
}

/// All rows of `W`.
fn product(isa: Isa, kind: BlockType, w: &[u8], x: &Activations, y: &mut [f32]) {
    let outs = y.len() / x.rows();
    let y = std::cell::RefCell::new(y);
    let write = |row: usize, m: usize, found: &[f32]| {
        y.borrow_mut()[m * outs + row..][..found.len()].copy_from_slice(found);
    };
    rows(isa, kind, w, x, 0..outs, write);
}

/// Every path this processor has, against the plain product of what weights and codes stand for.
#[test]
fn products_equal_the_plain_ones_on_every_path() {
    for kind in BlockType::ALL {
        // The last: more activations than stay in a cache beside a row's whole width.
        let few = &[1, 2, 4, 6, 7, 11][..];
        for (outs, width, counts) in [
            (1, 256, few),
            (37, 512, few),
            (20, 768, few),
            (70, 2048, few),
            (20, 1024, &[100]),
        ] {
            // An odd number of small blocks too.
            let width = match kind.weights() {
                32 => width + 32,
                _ => width,
            };
            let weights = random(outs * width, 5);
            let (bytes, back) = coded(kind, &weights, None);
            for rows in counts {
                let entries = random(rows * width, 6);
                let x = Activations::new(&entries, width);
                let plain = x.dequantized();
                for isa in Isa::found() {
                    let mut y = vec![f32::NAN; rows * outs];
                    product(isa, kind, &bytes, &x, &mut y);
                    for (at, y) in y.iter().enumerate() {
                        let (i, j) = (at / outs, at % outs);
                        let off = off(*y, &plain[i * width..][..width], &back[j * width..]);
                        assert!(off < 2e-6, "{} {isa:?} {i} {j}: {y}, {off}", kind.name());
                    }
                    // A row alone gives the same bits.
                    for (entries, y) in entries.chunks_exact(width).zip(y.chunks_exact(outs)) {
                        let alone = Activations::new(entries, width);
                        let mut found = vec![0.; outs];
                        product(isa, kind, &bytes, &alone, &mut found);
                        assert_eq!(found, y, "{} {isa:?}", kind.name());
                    }
                }
            }
        }
    }
}

/// Blocks of any bytes, and of the largest codes with the largest activations, whose sums have to fit.
#[test]
fn any_block_means_what_it_says_on_every_path() {
    let (rows, width) = (7, 1024);
    for kind in BlockType::ALL {
        for largest in [false, true] {
            let any = random(2 * rows * width, 9);
            let mut bytes: Vec<u8> = (any.iter())
                .map(|x| if largest { 255 } else { x.to_bits() as u8 })
                .take(rows * kind.row_bytes(width).unwrap())
                .collect();
            for block in bytes.chunks_exact_mut(kind.bytes()) {
                for at in kind.halves() {
                    block[*at..][..2].copy_from_slice(&half::f16::from_f32(0.25).to_le_bytes());
                }
            }
            let mut weights = vec![0.; rows * width];
            dequantize(kind, &bytes, &mut weights);
            for count in [1, 3, 5] {
                let x: Vec<f32> = match largest {
                    true => (0..count * width)
                        .map(|i| if i / width % 2 == 0 { 1. } else { -1. })
                        .collect(),
                    false => random(count * width, 10),
                };
                let x = Activations::new(&x, width);
                let plain = x.dequantized();
                for isa in Isa::found() {
                    let mut y = vec![f32::NAN; count * rows];
                    product(isa, kind, &bytes, &x, &mut y);
                    for (at, y) in y.iter().enumerate() {
                        let (x, w) = (&plain[at / rows * width..], &weights[at % rows * width..]);
                        let off = off(*y, &x[..width], w);
                        assert!(off < 1e-5, "{} {isa:?} {at}: {y}, {off}", kind.name());
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let mut x = random(256, 7);
    x[40] = f32::INFINITY;
    let (bytes, _) = coded(BlockType::Q4K, &random(256, 8), None);
    for isa in Isa::found() {
        let mut y = [0.];
        product(
            isa,
            BlockType::Q4K,
            &bytes,
            &Activations::new(&x, 256),
            &mut y,
        );
        assert!(!y[0].is_finite(), "{isa:?}");
    }
}

#[test]
fn widths_that_do_not_fit_are_named() {
    let message = BlockType::Q4K.row_bytes(320).unwrap_err().to_string();
    assert!(
        message.contains("320") && message.contains("q4_k"),
        "{message}"
    );
    assert!(
        "q5_1"
            .parse::<BlockType>()
            .unwrap_err()
            .to_string()
            .contains("q4_0")
    );
}
