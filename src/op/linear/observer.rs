//! What a matrix reads.

use std::sync::{Mutex, PoisonError};

/// Sums of squares of every input, over all products.
#[derive(Debug)]
pub struct Observer(Mutex<Sums>);

#[derive(Debug)]
struct Sums {
    squares: Vec<f64>,
    rows: u64,
}

impl Observer {
    pub(super) fn new(width: usize) -> Self {
        Self(Mutex::new(Sums {
            squares: vec![0.; width],
            rows: 0,
        }))
    }

    /// `x [M, K]`
    pub(super) fn add(&self, x: &[f32]) {
        let mut sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let width = sums.squares.len();
        for row in x.chunks_exact(width) {
            for (sum, x) in sums.squares.iter_mut().zip(row) {
                *sum += f64::from(*x) * f64::from(*x);
            }
            sums.rows += 1;
        }
    }

    /// Of every input; nothing if the matrix was in no product.
    pub fn mean_squares(&self) -> Option<Vec<f32>> {
        let sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mean = |sum: &f64| (sum / sums.rows as f64) as f32;
        (sums.rows > 0).then(|| sums.squares.iter().map(mean).collect())
    }
}
