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
const TOGETHER: usize = 32;
/// Pages whose positions are summed up by themselves, whoever computes them: tasks of their own where there are few queries.
const PART: usize = 32;
/// Multiplications below which other threads are not worth waking.
const ALONE: usize = 1 << 14;

thread_local! {
    static ONLINE: RefCell<Room> = RefCell::default();
    static TURNED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Default)]
struct Room {
    part: Online,
    whole: Online,
    keys: Vec<f32>,
    values: Vec<f32>,
    found: Vec<f32>,
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
    // `count` tokens from `first` on over the pages of one part.
    let pass = |room: &mut Room, group: usize, first: usize, count: usize, part: usize| {
        let Room {
            part: online,
            keys,
            values,
            ..
        } = room;
        online.queries.clear();
        for t in first..first + count {
            for head in group * rep..(group + 1) * rep {
                let scaled = query(t, head).iter().map(|x| heads.scale * x);
                online.queries.extend(scaled);
            }
        }
        online.begin(heads.dim, v_dim);
        let reach = past + first + count;
        for page in part * PART..reach.div_ceil(PAGE).min((part + 1) * PART) {
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
    };
    let parts = (past + tokens).div_ceil(PART * PAGE);
    let cost = tokens * (past + tokens) * heads.groups * rep * (heads.dim + v_dim);
    if tokens == 1 && parts > 1 {
        let size = rep * Online::entries(v_dim);
        return TURNED.with_borrow_mut(|found| {
            found.resize(heads.groups * parts * size, 0.);
            fill(cost >= ALONE, found, size, |task, found| {
                ONLINE.with_borrow_mut(|room| {
                    pass(room, task / parts, 0, 1, task % parts);
                    room.part.put(found);
                });
            });
            let groups = found.chunks_exact(parts * size);
            ONLINE.with_borrow_mut(|Room { whole, .. }| {
                for (found, out) in groups.zip(out.chunks_exact_mut(rep * v_dim)) {
                    whole.queries.resize(rep * heads.dim, 0.);
                    whole.begin(heads.dim, v_dim);
                    let parts = found.chunks_exact(size);
                    parts.for_each(|part| whole.join(Isa::here(), part));
                    whole.finish(out);
                }
            });
        });
    }
    let task = |task: usize, out: &mut [f32]| {
        let (group, first) = (task / blocks, task % blocks * together);
        let count = together.min(tokens - first);
        let out = &mut out[..count * rep * v_dim];
        ONLINE.with_borrow_mut(|room| {
            let parts = (past + first + count).div_ceil(PART * PAGE);
            pass(room, group, first, count, 0);
            if parts == 1 {
                return room.part.finish(out);
            }
            room.whole.queries.clone_from(&room.part.queries);
            room.whole.begin(heads.dim, v_dim);
            for part in 0..parts {
                if part > 0 {
                    pass(room, group, first, count, part);
                }
                let Room {
                    part, whole, found, ..
                } = room;
                found.resize(count * rep * Online::entries(v_dim), 0.);
                part.put(found);
                whole.join(Isa::here(), found);
            }
            room.whole.finish(out);
        });
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mixer::memory::{CacheType, Keeps, Pool};

    fn random(count: usize, seed: f32) -> Vec<f32> {
        let entry = |i: usize| (((i * i) as f32 + seed) * 1.37).sin();
        (0..count).map(entry).collect()
    }

    /// Over the border of a part: tokens alone, whose parts are tasks, give the bits that they give together, and what the softmax over
    /// all positions says.
    #[test]
    fn tokens_give_the_same_bits_alone_and_together() {
        let (groups, rep, dim, tokens) = (2, 2, 16, 5);
        let past = PART * PAGE - 3;
        let keeps = Keeps {
            planes: 2 * groups,
            dim,
            state: 0,
        };
        let pool = Pool::new(&[keeps], CacheType::F32, 1 << 24, 1).unwrap();
        let mut memory = pool.sequence();
        memory.reserve(past + tokens).unwrap();
        let row = |plane: usize, p: usize| random(dim, (7 * p + 3 * plane) as f32);
        for (plane, p) in (0..2 * groups).flat_map(|i| (0..past + tokens).map(move |p| (i, p))) {
            memory.write(0, plane, p, &row(plane, p));
        }
        let heads = Heads {
            groups,
            rep,
            dim,
            v_dim: dim,
            values: Some(groups),
            scale: 0.5,
        };
        let count = groups * rep * dim;
        let queries = random(tokens * count, 5.);
        let query = |t: usize, head: usize| &queries[t * count + head * dim..][..dim];
        memory.advance(past);
        let mut together = vec![0.; tokens * count];
        attend(&memory, 0, &heads, query, &mut together);
        for (t, found) in together.chunks_exact(count).enumerate() {
            let mut alone = vec![0.; count];
            attend(&memory, 0, &heads, |_, head| query(t, head), &mut alone);
            assert_eq!(alone, found, "token {t}");
            memory.advance(1);
            for (head, found) in found.chunks_exact(dim).enumerate() {
                let dot = |p: usize| {
                    let key = row(head / rep, p);
                    let terms = key.iter().zip(query(t, head));
                    terms
                        .map(|(k, q)| f64::from(k * q * heads.scale))
                        .sum::<f64>()
                };
                let weights: Vec<f64> = (0..=past + t).map(|p| dot(p).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for (i, found) in found.iter().enumerate() {
                    let terms = weights.iter().enumerate();
                    let truth = terms
                        .map(|(p, w)| w / sum * f64::from(row(groups + head / rep, p)[i]))
                        .sum::<f64>();
                    assert!((truth - f64::from(*found)).abs() < 1e-5, "{t} {head} {i}");
                }
            }
        }
    }
}
