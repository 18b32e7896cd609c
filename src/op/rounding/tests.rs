use super::*;
use crate::op::cuda::emulated::Emulated;
use crate::op::laws::{noise, placed};
use candle_core::Device;

fn bits(x: &Tensor) -> Vec<u16> {
    let x = x.to_device(&Device::Cpu).unwrap();
    let x = x.to_dtype(DType::BF16).unwrap();
    let entries: Vec<bf16> = x.flatten_all().unwrap().to_vec1().unwrap();
    entries.into_iter().map(bf16::to_bits).collect()
}

fn round_to(x: &Tensor, key: u64) -> Tensor {
    let to = x.zeros_like().unwrap().to_dtype(DType::BF16).unwrap();
    round(x, &to, key).unwrap();
    to
}

fn of(entries: &[f32]) -> Tensor {
    let x = Tensor::new(entries, &Device::Cpu).unwrap();
    placed(&x, DType::F32)
}

/// Between the neighbours, with the mean of many draws at the number itself; each draw is one of the two.
#[test]
fn the_mean_of_many_is_the_number() {
    const DRAWS: u64 = 4000;
    let entries = [1.001f32, -0.3337, 6.1e-30, 12345.678, -1e-3];
    let x = of(&entries);
    let mut sums = [0f64; 5];
    let mut ups = [0u64; 5];
    for key in 0..DRAWS {
        for (i, bits) in bits(&round_to(&x, key * 0x9e37_79b9_7f4a_7c15))
            .into_iter()
            .enumerate()
        {
            let down = (entries[i].to_bits() >> 16) as u16;
            assert!(bits == down || bits == down + 1, "{}", entries[i]);
            ups[i] += u64::from(bits != down);
            sums[i] += f64::from(bf16::from_bits(bits).to_f32());
        }
    }
    for (i, x) in entries.iter().enumerate() {
        let down = f64::from(f32::from_bits(x.to_bits() & 0xffff_0000));
        let up = f64::from(f32::from_bits((x.to_bits() & 0xffff_0000) + 0x1_0000));
        let share = (f64::from(*x) - down) / (up - down);
        // Five deviations of a mean of so many draws.
        let bound = 5. * (share * (1. - share) / DRAWS as f64).sqrt();
        let found = ups[i] as f64 / DRAWS as f64;
        assert!((found - share).abs() < bound, "{x}: {found} for {share}");
        let mean = sums[i] / DRAWS as f64;
        assert!((mean - f64::from(*x)).abs() < bound * (up - down).abs());
    }
}

/// Neighbouring entries, and one entry under neighbouring keys, are drawn apart.
#[test]
fn draws_do_not_hang_together() {
    let n = 1 << 16;
    let half_way = of(&vec![1. + 1. / 256.; n]);
    let up = |key| -> Vec<bool> {
        bits(&round_to(&half_way, key))
            .iter()
            .map(|b| *b != 0x3f80)
            .collect()
    };
    let (a, b) = (up(7), up(8));
    let share = |same: usize, of: usize| same as f64 / of as f64;
    let alike = |a: &[bool], b: &[bool]| {
        share(
            a.iter().zip(b).filter(|(a, b)| a == b).count(),
            a.len().min(b.len()),
        )
    };
    let bound = 5. * 0.5 / (n as f64).sqrt();
    for by in [1, 2, 3, 8, 64, 4096] {
        let found = alike(&a[by..], &a[..n - by]);
        assert!(
            (found - 0.5).abs() < 1.1 * bound,
            "{by} entries on: {found}"
        );
    }
    assert!((alike(&a, &b) - 0.5).abs() < bound);
    assert_eq!(a, up(7));
}

#[test]
fn numbers_of_bf16_stay_and_others_are_kept_apart() {
    let exact = [
        0f32,
        -0.,
        1.,
        -2.5,
        3.389_531_4e38,
        f32::INFINITY,
        f32::NEG_INFINITY,
    ];
    for key in 0..50 {
        let found = bits(&round_to(&of(&exact), key));
        assert_eq!(found, exact.map(|x| (x.to_bits() >> 16) as u16));
        let odd = [f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)];
        let found = round_to(&of(&odd), key).to_dtype(DType::F32).unwrap();
        assert!(found.to_vec1::<f32>().unwrap().iter().all(|x| x.is_nan()));
    }
    let short = Tensor::zeros(2, DType::BF16, &Device::Cpu).unwrap();
    assert!(
        round(
            &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap(),
            &short,
            0
        )
        .is_err()
    );
}

#[test]
fn the_cuda_kernel_draws_as_the_cpu_does() {
    for skew in [0, 1] {
        let Some(gpu) = Emulated::of("rounding", skew) else {
            return;
        };
        let x = noise(1001, 3., 5).to_dtype(DType::F32).unwrap();
        let to = gpu.array(&x.zeros_like().unwrap().to_dtype(DType::BF16).unwrap());
        for key in [0, 0x8123_4567_89ab_cdef] {
            cuda::round(&gpu, &gpu.array(&x), &to, key).unwrap();
            assert_eq!(bits(&to.tensor(1001)), bits(&round_to(&x, key)));
        }
    }
}
