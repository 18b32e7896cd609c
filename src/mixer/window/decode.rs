//! A ring of rotated keys and values in the state: the first positions stand where they are, behind them each takes the place of the one
//! that has left the window.

use std::cell::RefCell;
use std::ops::Range;

use super::{Reach, Window};
use crate::Result;
use crate::mixer::attention;
use crate::mixer::memory::{Keeps, Span};
use crate::mixer::work::Work;
use crate::op::attention::online::{Block, Online};
use crate::op::isa::Isa;
use crate::op::team::fill;

/// What decoding needs of the layer.
#[derive(Debug)]
pub struct Decoder {
    pub(super) attention: attention::Decoder,
    pub(super) reach: Reach,
}

impl Window {
    pub(in crate::mixer) fn decoder(&self) -> Result<Decoder> {
        Ok(Decoder {
            attention: self.attention.decoder()?,
            reach: self.reach,
        })
    }
}

/// Multiplications below which other threads are not worth waking.
const ALONE: usize = 1 << 16;

thread_local! {
    static ONLINE: RefCell<Online> = RefCell::default();
}

impl Decoder {
    fn slots(&self) -> usize {
        self.reach.size + self.reach.sinks
    }

    fn slot(&self, position: usize) -> usize {
        let Reach { size, sinks } = self.reach;
        match position < sinks {
            true => position,
            false => sinks + (position - sinks) % size,
        }
    }

    pub(in crate::mixer) fn keeps(&self) -> Keeps {
        let c = &self.attention.config;
        Keeps {
            state: 2 * c.num_key_value_heads * c.head_dim * self.slots(),
            ..Keeps::default()
        }
    }

    /// Slots that a token at `position` sees, in the order of what stands in them.
    fn seen(&self, position: usize) -> [Range<usize>; 3] {
        let Reach { size, sinks } = self.reach;
        let first = sinks.max((position + 1).saturating_sub(size));
        let sinks = 0..sinks.min(position + 1);
        if position < first {
            return [sinks, 0..0, 0..0];
        }
        let (from, to) = (self.slot(first), self.slot(position) + 1);
        match from < to {
            true => [sinks, from..to, 0..0],
            false => [sinks, from..self.slots(), self.reach.sinks..to],
        }
    }

    /// `x [N, D]` → `out [N, D]`. Token after token: each takes the place of one that it does not see any more.
    pub(in crate::mixer) fn mix(
        &self,
        layer: usize,
        x: &[f32],
        spans: &mut [Span],
        out: &mut [f32],
        work: &mut Work,
    ) {
        let c = &self.attention.config;
        let (h, g, hd) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let (rep, plane) = (h / g, self.slots() * hd);
        let scale = c.scale() as f32;
        self.attention
            .around(x, spans, out, work, |spans, [q, k, v, y]| {
                for span in spans.iter_mut() {
                    let first = span.first();
                    // [keys and values, G, slots, hd]
                    let state = span.memory.state(layer);
                    for (t, row) in span.rows.clone().enumerate() {
                        let slot = self.slot(first + t);
                        for head in 0..g {
                            let new = (row * g + head) * hd..(row * g + head + 1) * hd;
                            let at = head * plane + slot * hd;
                            state[at..][..hd].copy_from_slice(&k[new.clone()]);
                            state[g * plane + at..][..hd].copy_from_slice(&v[new]);
                        }
                        let (keys, values) = state.split_at(g * plane);
                        let seen = self.seen(first + t);
                        let task = |group: usize, y: &mut [f32]| {
                            ONLINE.with_borrow_mut(|online| {
                                online.queries.clear();
                                let own = &q[(row * h + group * rep) * hd..][..rep * hd];
                                online.queries.extend(own.iter().map(|x| scale * x));
                                online.begin(hd, hd);
                                for slots in &seen {
                                    let at = group * plane + slots.start * hd;
                                    let block = Block {
                                        keys: &keys[at..],
                                        key_stride: hd,
                                        values: &values[at..],
                                        value_stride: hd,
                                    };
                                    online.add(Isa::here(), block, |_| slots.len());
                                }
                                online.finish(y);
                            });
                        };
                        let y = &mut y[row * h * hd..][..h * hd];
                        fill(2 * h * plane >= ALONE, y, rep * hd, task);
                    }
                }
            });
    }
}
