//! What decoding works with, kept from token to token: nothing is allocated anew for each.

use crate::op::linear::Scratch;

#[derive(Default)]
pub struct Work {
    pub scratch: Scratch,
    pub(super) arena: Arena,
}

/// Room for what a layer computes in between.
#[derive(Default)]
pub(super) struct Arena(Vec<f32>);

impl Arena {
    /// Slices of these lengths; what they hold means nothing.
    pub fn split<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let all: usize = lens.iter().sum();
        if self.0.len() < all {
            self.0.resize(all, 0.);
        }
        let mut rest = self.0.as_mut_slice();
        lens.map(|len| {
            let (slice, behind) = std::mem::take(&mut rest).split_at_mut(len);
            rest = behind;
            slice
        })
    }
}
