//! A buffer that grows along the positions.

use std::sync::Arc;

use candle_core::Tensor;

use super::positions::Positions;
use crate::Result;

/// `[B, capacity, heads, dim]`; position `p` of a row stands at `p`. The capacity doubles, so that appending costs a constant
/// time a token on average. Clones share the buffer until one of them appends, which then goes on in a buffer of its own.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    buffer: Option<Arc<Tensor>>,
    /// Positions that some row may have filled.
    filled: usize,
}

/// The first capacity, in positions.
pub const FIRST_CAPACITY: usize = 64;
const POSITION: usize = 1;

impl Cache {
    /// Scalars in the buffer.
    pub fn allocated(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| buffer.elem_count())
    }

    /// Sequences `rows` (u32) of the batch, any of them any number of times; each goes on alone.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        let filled = |buffer: &Arc<Tensor>| -> Result<Arc<Tensor>> {
            let filled = buffer.narrow(POSITION, 0, self.filled)?.contiguous()?;
            Ok(Arc::new(filled.index_select(rows, 0)?))
        };
        Ok(Self {
            buffer: self.buffer.as_ref().map(filled).transpose()?,
            filled: self.filled,
        })
    }

    /// Puts `x [B, T, heads, dim]` behind what each row has and returns a view of all positions up to the furthest,
    /// `[B, S, heads, dim]`: of each row those up to its own last token mean something.
    pub fn append(&mut self, x: &Tensor, at: &Positions) -> Result<Tensor> {
        let (b, t, heads, dim) = x.dims4()?;
        let need = at.reach();
        let capacity = match &self.buffer {
            Some(buffer) => buffer.dim(POSITION)?,
            None => 0,
        };
        let alone = self
            .buffer
            .as_mut()
            .is_some_and(|b| Arc::get_mut(b).is_some());
        if need > capacity || !alone {
            let capacity = need.next_power_of_two().max(FIRST_CAPACITY);
            let own = Tensor::zeros((b, capacity, heads, dim), x.dtype(), x.device())?;
            if let Some(old) = &self.buffer {
                let filled = self.filled.min(capacity);
                own.slice_set(&old.narrow(POSITION, 0, filled)?.contiguous()?, POSITION, 0)?;
            }
            self.buffer = Some(Arc::new(own));
        }
        let buffer = self.buffer.as_ref().expect("allocated above");
        let x = x.contiguous()?;
        match at.common_past() {
            Some(past) if t > 0 => buffer.slice_set(&x, POSITION, past)?,
            _ => {
                for (row, (past, new)) in at.past().iter().zip(at.added()).enumerate() {
                    if *new > 0 {
                        let own = x.narrow(0, row, 1)?.narrow(POSITION, 0, *new)?;
                        buffer.narrow(0, row, 1)?.slice_set(&own, POSITION, *past)?;
                    }
                }
            }
        }
        self.filled = need;
        Ok(buffer.narrow(POSITION, 0, need)?)
    }
}
