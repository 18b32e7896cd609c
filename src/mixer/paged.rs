//! Queries of one sequence over the pages of its memory.

use std::cell::RefCell;

use super::memory::{Memory, PAGE};
use crate::op::attention::online::{Block, Online};
use crate::op::isa::Isa;
use crate::op::team::fill;

/// Which heads read which planes.
pub(super) struct Heads {
    /// Groups of heads that are computed together; group `g` reads its keys from plane `g`, or all from the only one.
    pub groups: usize,
    /// Heads a group.
    pub rep: usize,
    pub dim: usize,
    pub v_dim: usize,
    /// The plane of the first group's values; none: a value is the beginning of its key, and there is one plane.
    pub values: Option<usize>,
    pub scale: f32,
}

/// Queries that go over a page together.
const TOGETHER: usize = 16;
/// Multiplications below which other threads are not worth waking.
const ALONE: usize = 1 << 16;

thread_local! {
    static ONLINE: RefCell<(Online, [Vec<f32>; 2])> = RefCell::default();
    static TURNED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// The newest tokens of a sequence, `T` of them, whose keys and values have been written behind those that it had: `query(t, head)`
/// gives a query, `out [T, H, V]` gets what each sees.
pub(super) fn attend<'q>(
    memory: &Memory,
    layer: usize,
    heads: &Heads,
    query: impl Fn(usize, usize) -> &'q [f32] + Sync,
    out: &mut [f32],
) {
    let (rep, v_dim) = (heads.rep, heads.v_dim);
    let row = heads.groups * rep * v_dim;
    let (tokens, past) = (out.len() / row, memory.len());
    let together = (TOGETHER / rep).clamp(1, tokens.max(1));
    let blocks = tokens.div_ceil(together);
    let size = together * rep * v_dim;
    let task = |task: usize, out: &mut [f32]| {
        let (group, first) = (task / blocks, task % blocks * together);
        let count = together.min(tokens - first);
        ONLINE.with_borrow_mut(|(online, [keys, values])| {
            online.queries.clear();
            for t in first..first + count {
                for head in group * rep..(group + 1) * rep {
                    let scaled = query(t, head).iter().map(|x| heads.scale * x);
                    online.queries.extend(scaled);
                }
            }
            online.begin(heads.dim, v_dim);
            let reach = past + first + count;
            for page in 0..reach.div_ceil(PAGE) {
                let from = page * PAGE;
                let most = PAGE.min(reach - from);
                let plane = heads.values.map_or(0, |_| group);
                let key_rows = memory.read(layer, plane, page, most, keys);
                let block = match heads.values {
                    Some(first) => Block {
                        keys: key_rows,
                        key_stride: heads.dim,
                        values: memory.read(layer, first + group, page, most, values),
                        value_stride: v_dim,
                    },
                    None => Block {
                        keys: key_rows,
                        key_stride: heads.dim,
                        values: key_rows,
                        value_stride: heads.dim,
                    },
                };
                let seen = |q: usize| (past + first + q / rep + 1).saturating_sub(from).min(most);
                online.add(Isa::here(), block, seen);
            }
            online.finish(&mut out[..count * rep * v_dim]);
        });
    };
    let cost = tokens * (past + tokens) * heads.groups * rep * (heads.dim + v_dim);
    let run = |out: &mut [f32]| fill(cost >= ALONE, out, size, task);
    if tokens == 1 {
        // Groups stand as heads do.
        return run(out);
    }
    TURNED.with_borrow_mut(|turned| {
        turned.resize(heads.groups * blocks * size, 0.);
        run(turned);
        for (i, found) in turned.chunks_exact(rep * v_dim).enumerate() {
            let (task, t) = (
                i / together,
                i % together + i / together % blocks * together,
            );
            if t < tokens {
                let at = t * row + task / blocks * rep * v_dim;
                out[at..][..rep * v_dim].copy_from_slice(found);
            }
        }
    });
}
