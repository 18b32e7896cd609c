//! A buffer that grows along the positions.

use std::sync::Arc;

use candle_core::Tensor;

use crate::Result;

/// `[B, capacity, heads, dim]`, of which the first `len` positions are filled. The capacity doubles, so
/// that appending costs a constant time a token on average. Clones share the buffer until one of them appends,
/// which then goes on in a buffer of its own.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    buffer: Option<Arc<Tensor>>,
    len: usize,
}

/// The first capacity, in positions.
pub const FIRST_CAPACITY: usize = 64;
const POSITION: usize = 1;

impl Cache {
    /// Filled positions.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Scalars in the buffer.
    pub fn allocated(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| buffer.elem_count())
    }

    /// Sequences `rows` (u32) of the batch, any of them any number of times; each goes on alone.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        let filled = |buffer: &Arc<Tensor>| -> Result<Arc<Tensor>> {
            let filled = buffer.narrow(POSITION, 0, self.len)?.contiguous()?;
            Ok(Arc::new(filled.index_select(rows, 0)?))
        };
        Ok(Self {
            buffer: self.buffer.as_ref().map(filled).transpose()?,
            len: self.len,
        })
    }

    /// Appends `x [B, T, heads, dim]` and returns a view of all filled positions `[B, S, heads, dim]`.
    pub fn append(&mut self, x: &Tensor) -> Result<Tensor> {
        let (b, t, heads, dim) = x.dims4()?;
        let need = self.len + t;
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
                own.slice_set(
                    &old.narrow(POSITION, 0, self.len)?.contiguous()?,
                    POSITION,
                    0,
                )?;
            }
            self.buffer = Some(Arc::new(own));
        }
        let buffer = self.buffer.as_ref().expect("allocated above");
        buffer.slice_set(&x.contiguous()?, POSITION, self.len)?;
        self.len = need;
        Ok(buffer.narrow(POSITION, 0, need)?)
    }
}
