//! Rotation in tensor operations.

use super::RopeLayout;
use candle_core::{Result, Tensor};

pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    let (b, t, h, k) = x.dims4()?;
    let table = |table: &Tensor| table.reshape((t, 1, k / 2));
    let (cos, sin) = (table(cos)?, table(sin)?);
    let turned = |first: Tensor, second: Tensor| -> Result<[Tensor; 2]> {
        let one = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let other = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        Ok([one, other])
    };
    match layout {
        RopeLayout::Halves => {
            let pair = turned(x.narrow(3, 0, k / 2)?, x.narrow(3, k / 2, k / 2)?)?;
            Tensor::cat(&pair, 3)
        }
        RopeLayout::Interleaved => {
            let pairs = x.contiguous()?.reshape((b, t, h, k / 2, 2))?;
            let part = |i: usize| pairs.narrow(4, i, 1)?.squeeze(4);
            Tensor::stack(&turned(part(0)?, part(1)?)?, 4)?.reshape((b, t, h, k))
        }
    }
}
