use super::cuda::{argmax, read};
use crate::op::cuda::Gpu;
use crate::op::cuda::emulated::Emulated;

#[test]
fn the_first_of_the_largest_is_found() {
    let Some(gpu) = Emulated::of("argmax", 0) else {
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
        let found = argmax(&gpu, &x.unwrap(), n).unwrap();
        assert_eq!(read(&gpu, &found).unwrap(), wanted, "{n}");
    }
}
