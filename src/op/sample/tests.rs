use super::cuda::{Draw, argmax, draw};
use crate::op::cuda::Gpu;
use crate::op::cuda::emulated::Emulated;

fn logits(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * 37) % 101) as f32 / 12. - 20.)
        .collect()
}

#[test]
fn the_first_of_the_largest_is_found() {
    let Some(gpu) = Emulated::of("sample", 0) else {
        return;
    };
    for n in [1, 5, 700] {
        let row = |change: &dyn Fn(&mut [f32])| {
            let mut row: Vec<f32> = (0..n).map(|i| ((i * 37) % 11) as f32 - 20.).collect();
            change(&mut row);
            row
        };
        let first = |row: &[f32]| {
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().position(|x| *x == most).map(|i| i as u32)
        };
        let plain = row(&|_| ());
        let last = row(&|row| row[n - 1] = 3.);
        let never = vec![f32::NEG_INFINITY; n];
        let [nan, infinite] = [f32::NAN, f32::INFINITY].map(|bad| row(&|row| row[n / 2] = bad));
        let wanted = [first(&plain), first(&last), Some(0), None, None];
        let x = gpu.upload_f32(&[plain, last, never, nan, infinite].concat());
        assert_eq!(argmax(&gpu, &x.unwrap(), n).unwrap(), wanted, "{n}");
    }
}

/// Tokens drawn at numbers that stand evenly are as many as their weights say, in the order of the vocabulary.
#[test]
fn tokens_are_drawn_by_the_weights_that_limits_leave() {
    const DRAWS: usize = 12;
    let Some(gpu) = Emulated::of("sample", 0) else {
        return;
    };
    for (n, temperature, top_k, top_p, min_p) in [
        (7, 1., 0, 1., 0.),
        (101, 0.7, 5, 1., 0.),
        (101, 1.3, 0, 0.8, 0.),
        (90, 1., 0, 1., 0.2),
        (101, 1., 6, 0.7, 0.05),
        (50, 1., 1, 1., 0.),
        (50, 1., 500, 0.99, 0.),
    ] {
        let row = logits(n);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        let best = row[order[0]];
        let weight = |i: usize| f64::from((row[i] - best) / temperature).exp();
        let count = if top_k > 0 { top_k as usize } else { n };
        order.truncate(count);
        order.retain(|i| weight(*i) >= f64::from(min_p));
        let total: f64 = order.iter().map(|i| weight(*i)).sum();
        let mut reached = 0.;
        order.retain(|i| {
            let inside = top_p == 1. || reached < f64::from(top_p) * total;
            reached += weight(*i);
            inside
        });
        order.sort_unstable();
        let total: f64 = order.iter().map(|i| weight(*i)).sum();
        let number = |i: usize| (i as f32 + 0.5) / DRAWS as f32;
        let wanted = (0..DRAWS).map(|i| {
            let mut left = f64::from(number(i)) * total;
            let found = order.iter().find(|i| {
                left -= weight(**i);
                left < 0.
            });
            Some(*found.unwrap() as u32)
        });
        let draws = (0..DRAWS).map(|i| {
            let uniform = number(i);
            let draw = Draw {
                temperature,
                top_k,
                top_p,
                min_p,
                uniform,
            };
            // The second row, behind one that is not asked for.
            (1, draw)
        });
        let x = gpu
            .upload_f32(&[vec![9.; n], row.clone()].concat())
            .unwrap();
        let found = draw(&gpu, &x, n, &draws.collect::<Vec<_>>()).unwrap();
        assert_eq!(
            found,
            wanted.collect::<Vec<_>>(),
            "{n} {top_k} {top_p} {min_p}"
        );
    }
    let bad = gpu.upload_f32(&[0., f32::NAN, 1.]).unwrap();
    let never = gpu.upload_f32(&[f32::NEG_INFINITY; 3]).unwrap();
    let one = Draw {
        temperature: 1.,
        top_k: 2,
        top_p: 0.5,
        min_p: 0.,
        uniform: 0.3,
    };
    assert_eq!(draw(&gpu, &bad, 3, &[(0, one)]).unwrap(), [None]);
    assert_eq!(draw(&gpu, &never, 3, &[(0, one)]).unwrap(), [Some(0)]);
}
