//! A cache that keeps the first and the last positions.

use std::sync::Arc;

use candle_core::Tensor;

use crate::Result;
use crate::mixer::cache::FIRST_CAPACITY;
use crate::mixer::positions::Positions;
use crate::op::attention::{Sight, Window};

const SLOT: usize = 1;

/// `[B, capacity, heads, dim]`: a row's first positions stand where they are, behind them each takes the place of the one that has
/// left the window. Clones share the buffer until one of them appends.
#[derive(Debug, Clone)]
pub struct Ring {
    window: Window,
    buffer: Option<Arc<Tensor>>,
}

impl Ring {
    pub fn new(window: Window) -> Self {
        Self {
            window,
            buffer: None,
        }
    }

    /// Slots that are ever used.
    fn limit(&self) -> usize {
        self.window.size + self.window.sinks
    }

    fn slot(&self, position: usize) -> usize {
        let Window { size, sinks } = self.window;
        match position < sinks {
            true => position,
            false => sinks + (position - sinks) % size,
        }
    }

    /// Positions that a row of `past` tokens has kept, in order.
    fn kept(&self, past: usize) -> impl Iterator<Item = usize> + use<> {
        let Window { size, sinks } = self.window;
        let first = sinks.min(past);
        (0..first).chain(first.max(past.saturating_sub(size))..past)
    }

    fn capacity(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| buffer.dims()[SLOT])
    }

    pub fn allocated(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| buffer.elem_count())
    }

    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        let buffer = self.buffer.as_ref();
        let buffer = buffer.map(|buffer| buffer.index_select(rows, 0).map(Arc::new));
        Ok(Self {
            window: self.window,
            buffer: buffer.transpose()?,
        })
    }

    /// Adds each row's own of `x [B, T, heads, dim]`; gives what the new tokens' queries look at, `[B, S, heads, dim]`, and what they see
    /// of it.
    pub fn append(&mut self, x: &Tensor, at: &Positions) -> Result<(Tensor, Sight)> {
        let slots = at.reach().min(self.limit());
        let alone = self
            .buffer
            .as_mut()
            .is_some_and(|b| Arc::get_mut(b).is_some());
        match at.len() == 1 && alone && slots <= self.capacity() {
            true => self.write(x, at, slots),
            false => self.rebuild(x, at, slots),
        }
    }

    /// One token a row: whatever stands in the slots then is seen, in any order.
    fn write(&self, x: &Tensor, at: &Positions, slots: usize) -> Result<(Tensor, Sight)> {
        let buffer = self.buffer.as_ref().expect("there is room");
        let x = x.contiguous()?;
        match at.common_past() {
            Some(past) if at.is_full() => buffer.slice_set(&x, SLOT, self.slot(past))?,
            _ => {
                for (row, (past, new)) in at.past().iter().zip(at.added()).enumerate() {
                    if *new > 0 {
                        let row_of = |x: &Tensor| x.narrow(0, row, 1);
                        row_of(buffer)?.slice_set(&row_of(&x)?, SLOT, self.slot(*past))?;
                    }
                }
            }
        }
        // The last place that a row has filled: all up to it are seen.
        let last = at.past().iter().map(|past| (*past).min(slots - 1));
        let sight = Sight {
            past: Some(last.collect()),
            ..Sight::default()
        };
        Ok((buffer.narrow(SLOT, 0, slots)?, sight))
    }

    /// Any number of tokens: what is kept and what is new, in order.
    fn rebuild(&mut self, x: &Tensor, at: &Positions, slots: usize) -> Result<(Tensor, Sight)> {
        let (b, t, heads, dim) = x.dims4()?;
        let capacity = slots
            .next_power_of_two()
            .max(FIRST_CAPACITY)
            .min(self.limit());
        let zeros = |count: usize| Tensor::zeros((1, count, heads, dim), x.dtype(), x.device());
        let pick = |x: &Tensor, places: Vec<u32>| {
            let count = places.len();
            x.index_select(&Tensor::from_vec(places, count, x.device())?, SLOT)
        };
        let kept: Vec<Vec<usize>> = at
            .past()
            .iter()
            .map(|past| self.kept(*past).collect())
            .collect();
        let seen = kept.iter().map(Vec::len).max().unwrap_or(0) + t;
        let (mut looked_at, mut stored) = (Vec::with_capacity(b), Vec::with_capacity(b));
        for (row, kept) in kept.iter().enumerate() {
            let (past, new) = (at.past()[row], at.added()[row]);
            let mut parts = Vec::new();
            if let Some(buffer) = self.buffer.as_ref().filter(|_| !kept.is_empty()) {
                let places = kept.iter().map(|p| self.slot(*p) as u32);
                parts.push(pick(&buffer.narrow(0, row, 1)?, places.collect())?);
            }
            parts.push(x.narrow(0, row, 1)?.narrow(SLOT, 0, t)?);
            if kept.len() + t < seen {
                parts.push(zeros(seen - t - kept.len())?);
            }
            let all = Tensor::cat(&parts, SLOT)?;
            // Where in `all` the token stands that each slot is to hold; any stands for those that hold none yet.
            let mut places = vec![0u32; capacity];
            for (i, position) in kept.iter().copied().chain(past..past + new).enumerate() {
                places[self.slot(position)] = i as u32;
            }
            stored.push(pick(&all, places)?);
            looked_at.push(all);
        }
        self.buffer = Some(Arc::new(Tensor::cat(&stored, 0)?));
        let sight = Sight {
            past: Some(kept.iter().map(Vec::len).collect()),
            window: Some(self.window),
            documents: None,
        };
        Ok((Tensor::cat(&looked_at, 0)?, sight))
    }
}
