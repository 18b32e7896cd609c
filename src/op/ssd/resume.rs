//! The recurrence over the next positions of one sequence, in place. Positions one by one, in chunks or all at once: the bits are the
//! same, and those of the kernel for whole sequences.

use std::cell::RefCell;

use super::SsdShape;
use super::cpu::softplus;
use super::lanes::{self, Inputs, LANES, Lanes, Panel, Tile};
use crate::op::cpu::exp;
use crate::op::isa::vectorised;
use crate::op::team::{Scatter, team};

/// Entries of a tile.
const TILE: usize = LANES * LANES;
/// Positions that stay in the cache while the tiles of a state pass.
const CHUNK: usize = 64;
/// Heads times positions below which other threads are not worth waking.
const ALONE: usize = 4;

impl SsdShape {
    /// Entries of a head's state as it is kept: tiles of `[N, P]`, filled up with zeros.
    pub fn kept(&self) -> usize {
        self.head_dim.div_ceil(LANES) * self.d_state.div_ceil(LANES) * TILE
    }
}

/// What a thread works with.
struct Panels {
    x: Panel,
    y: Panel,
    b: Panel,
    c: Panel,
    decay: Vec<f32>,
}

thread_local! {
    static PANELS: RefCell<Panels> = RefCell::new(Panels {
        x: Panel::zeros(0, 1),
        y: Panel::zeros(0, 1),
        b: Panel::zeros(0, 1),
        c: Panel::zeros(0, 1),
        decay: Vec::new(),
    });
}

/// `xbc [T, G·P + G·N + H·N]`, `dt [T, H]`, `params [3, H]`, `state [H, kept]` moves on → `y [T, H·P]`.
///
/// # Panics
/// When sizes do not fit: callers have checked them.
pub fn resume(
    xbc: &[f32],
    dt: &[f32],
    params: &[f32],
    shape: SsdShape,
    state: &mut [f32],
    y: &mut [f32],
) {
    let (h, p, kept) = (shape.heads, shape.head_dim, shape.kept());
    let t = dt.len() / h;
    assert!(dt.len() == t * h && xbc.len() == t * shape.channels() && params.len() == 3 * h);
    assert!(state.len() == h * kept && y.len() == t * h * p);
    let (states, ys) = (Scatter::of(state), Scatter::of(y));
    let work = |head: usize| {
        // SAFETY: a head's state, and its columns of `y`, are one task's.
        #[allow(unsafe_code)]
        let state = unsafe { states.slice(head * kept, kept) };
        let write = |t: usize, panel: &Panel, i: usize| {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            let place = unsafe { ys.slice((t * h + head) * p, p) };
            panel.store(i, place);
        };
        PANELS.with_borrow_mut(|panels| {
            vectorised!(one(xbc, dt, params, shape, head, state, write, panels))
        });
    };
    match h * t < ALONE {
        true => (0..h).for_each(work),
        false => team().run(h, work),
    }
}

/// One head; `write` gets every position's row of a panel.
#[inline(always)]
fn one(
    xbc: &[f32],
    dt: &[f32],
    params: &[f32],
    shape: SsdShape,
    head: usize,
    state: &mut [f32],
    write: impl Fn(usize, &Panel, usize),
    panels: &mut Panels,
) {
    let SsdShape {
        heads: h,
        groups,
        head_dim: p,
        d_state: n,
        ..
    } = shape;
    let (t, channels) = (dt.len() / h, shape.channels());
    let [a_log, dt_bias, skip] = [0, 1, 2].map(|row| params[row * h + head]);
    let a = -a_log.exp();
    let g = head / (h / groups);
    let columns = [g * p, groups * p + g * n, groups * (p + n) + head * n];
    let Panels { x, y, b, c, decay } = panels;
    for first in (0..t).step_by(CHUNK) {
        let len = CHUNK.min(t - first);
        x.resize(len, p);
        y.resize(len, p);
        b.resize(len, n);
        c.resize(len, n);
        decay.clear();
        for i in 0..len {
            let row = &xbc[(first + i) * channels..][..channels];
            x.load(i, &row[columns[0]..][..p]);
            b.load(i, &row[columns[1]..][..n]);
            c.load(i, &row[columns[2]..][..n]);
            let (delta, _) = softplus(dt[(first + i) * h + head] + dt_bias);
            decay.push(exp(a * delta));
            for (x, y) in x.row_mut(i).iter_mut().zip(y.row_mut(i)) {
                *y = x.scaled(skip);
                *x = x.scaled(delta);
            }
        }
        let inputs = Inputs {
            decay,
            outer: b,
            spread: x,
            read: c,
        };
        for (k, kept) in state.chunks_exact_mut(TILE).enumerate() {
            let (rows, _) = kept.as_chunks_mut::<LANES>();
            let mut tile: Tile = std::array::from_fn(|row| Lanes(rows[row]));
            lanes::forward(&mut tile, [k / x.width, k % x.width], len, inputs, y);
            for (row, lanes) in rows.iter_mut().zip(tile) {
                *row = lanes.0;
            }
        }
        for i in 0..len {
            write(first + i, y, i);
        }
    }
}
