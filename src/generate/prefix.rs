//! What was read before, for prompts that begin in the same way: a radix tree over tokens (SGLang, arXiv 2312.07104) whose nodes hold
//! memories. A recurrent state cannot be cut back, so a prompt of a model that has one goes on from the longest beginning of which there
//! is a snapshot; caches of keys, values or latents alone serve any beginning of whole pages.

use std::collections::BTreeMap;

use crate::mixer::Memory;

/// Requests and tokens that found what they begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct PrefixStatistics {
    pub hits: usize,
    pub misses: usize,
    /// Tokens that were not read again.
    pub reused_tokens: usize,
    pub snapshots: usize,
    pub evicted: usize,
}

/// Snapshots of which one goes when there is no room.
const SHARE: usize = 16;

pub struct PrefixCache {
    root: Node,
    /// Whether snapshots serve only their own length.
    whole: bool,
    clock: u64,
    statistics: PrefixStatistics,
}

#[derive(Default)]
struct Node {
    /// By their first token: what stands on the way there, and the node.
    children: BTreeMap<u32, (Vec<u32>, Node)>,
    snapshot: Option<Snapshot>,
}

struct Snapshot {
    memory: Memory,
    used: u64,
}

impl PrefixCache {
    /// `has_state`: of a model with recurrent states.
    pub fn new(has_state: bool) -> Self {
        Self {
            root: Node::default(),
            whole: has_state,
            clock: 0,
            statistics: PrefixStatistics::default(),
        }
    }

    pub fn statistics(&self) -> PrefixStatistics {
        self.statistics
    }

    /// Keeps the memory of `tokens`, all of which it has read.
    pub fn insert(&mut self, tokens: &[u32], memory: &Memory) {
        debug_assert_eq!(tokens.len(), memory.len());
        self.clock += 1;
        let node = self.root.reach(tokens);
        if node.snapshot.is_none() {
            self.statistics.snapshots += 1;
        }
        node.snapshot = Some(Snapshot {
            memory: memory.clone(),
            used: self.clock,
        });
    }

    /// The memory of the longest beginning of `tokens` that is shorter than all of them.
    pub fn find(&mut self, tokens: &[u32]) -> Option<Memory> {
        let limit = tokens.len().saturating_sub(1);
        let mut best: Option<Memory> = None;
        let (mut node, mut depth) = (&mut self.root, 0);
        loop {
            if let Some(snapshot) = node.snapshot.as_mut().filter(|_| depth <= limit) {
                self.clock += 1;
                snapshot.used = self.clock;
                best = Some(snapshot.memory.clone());
            }
            let Some((way, child)) = tokens.get(depth).and_then(|t| node.children.get_mut(t))
            else {
                break;
            };
            let common = common(way, &tokens[depth..]);
            if !self.whole {
                // Whatever lies further down begins with these tokens too.
                let reach = (depth + common).min(limit);
                if let Some(snapshot) = child.any() {
                    let part = snapshot.memory.pages_of(reach);
                    if part.len() > best.as_ref().map_or(0, Memory::len) {
                        self.clock += 1;
                        snapshot.used = self.clock;
                        best = Some(part);
                    }
                }
            }
            depth += common;
            if common < way.len() {
                break;
            }
            node = child;
        }
        match &best {
            Some(memory) if !memory.is_empty() => {
                self.statistics.hits += 1;
                self.statistics.reused_tokens += memory.len();
            }
            _ => self.statistics.misses += 1,
        }
        best.filter(|memory| !memory.is_empty())
    }

    /// Lets go of the snapshots that were not used for longest, of [`SHARE`] one, as all must be looked at to find them; false when
    /// there is none.
    pub fn evict(&mut self) -> bool {
        let mut used = Vec::new();
        self.root.clocks(&mut used);
        if used.is_empty() {
            return false;
        }
        // Clocks differ, so that at least one goes.
        let last = (used.len() / SHARE).saturating_sub(1);
        let (_, last, _) = used.select_nth_unstable(last);
        let gone = self.root.remove(*last);
        self.statistics.snapshots -= gone;
        self.statistics.evicted += gone;
        true
    }
}

/// How many tokens two lists begin with in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Node {
    /// The node at the end of `tokens`, made where there is none.
    fn reach(&mut self, tokens: &[u32]) -> &mut Node {
        let Some(first) = tokens.first() else {
            return self;
        };
        let (way, child) = self
            .children
            .entry(*first)
            .or_insert_with(|| (tokens.to_vec(), Node::default()));
        let common = common(way, tokens);
        if common < way.len() {
            // A fork on the way.
            let rest = way.split_off(common);
            let below = std::mem::take(child);
            child.children.insert(rest[0], (rest, below));
        }
        child.reach(&tokens[common..])
    }

    /// Some snapshot at or below.
    fn any(&mut self) -> Option<&mut Snapshot> {
        match &mut self.snapshot {
            Some(snapshot) => Some(snapshot),
            None => self
                .children
                .values_mut()
                .find_map(|(_, child)| child.any()),
        }
    }

    /// When each snapshot at or below was last used.
    fn clocks(&self, found: &mut Vec<u64>) {
        found.extend(self.snapshot.as_ref().map(|s| s.used));
        let below = self.children.values();
        below.for_each(|(_, child)| child.clocks(found));
    }

    /// Removes the snapshots last used at `clock` or before, and nodes that lead to none; how many.
    fn remove(&mut self, clock: u64) -> usize {
        let mut gone = usize::from(self.snapshot.take_if(|s| s.used <= clock).is_some());
        self.children.retain(|_, (_, child)| {
            gone += child.remove(clock);
            child.snapshot.is_some() || !child.children.is_empty()
        });
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mixer::memory::PAGE;
    use crate::mixer::{CacheType, Keeps, Pool};

    fn pool(state: usize) -> Pool {
        let keeps = Keeps {
            planes: 1,
            dim: 4,
            state,
        };
        Pool::new(&[keeps], CacheType::F32, 1 << 20, 1).unwrap()
    }

    fn read(pool: &Pool, len: usize) -> Memory {
        let mut memory = pool.sequence();
        memory.reserve(len).unwrap();
        memory.advance(len);
        memory
    }

    fn text(len: usize, fork: usize) -> Vec<u32> {
        (0..len as u32)
            .map(|i| if (i as usize) < fork { i } else { 1000 + i })
            .collect()
    }

    #[test]
    fn with_a_state_the_longest_snapshot_is_found() {
        let pool = pool(3);
        let mut cache = PrefixCache::new(true);
        for len in [10, 64, 80] {
            cache.insert(&text(len, len), &read(&pool, len));
        }
        let found = |cache: &mut PrefixCache, tokens: &[u32]| cache.find(tokens).map(|m| m.len());
        assert_eq!(found(&mut cache, &text(100, 100)), Some(80));
        assert_eq!(found(&mut cache, &text(100, 70)), Some(64));
        assert_eq!(
            found(&mut cache, &text(64, 64)),
            Some(10),
            "one token is read at least"
        );
        assert_eq!(found(&mut cache, &text(30, 5)), None);
        // The one that was not used for longest goes first.
        assert!(cache.evict());
        assert_eq!(found(&mut cache, &text(100, 100)), Some(64));
        assert!(cache.evict() && cache.evict() && !cache.evict());
        assert_eq!(found(&mut cache, &text(100, 100)), None);
        let s = cache.statistics();
        assert_eq!(
            (s.hits, s.misses, s.reused_tokens, s.snapshots, s.evicted),
            (4, 2, 218, 0, 3)
        );
        drop(cache);
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn without_one_any_whole_pages_serve() {
        let pool = pool(0);
        let mut cache = PrefixCache::new(false);
        cache.insert(&text(100, 100), &read(&pool, 100));
        cache.insert(&text(90, 50), &read(&pool, 90));
        for (tokens, expected) in [
            (text(200, 200), 100),
            (text(200, 70), 2 * PAGE),
            (text(100, 100), 3 * PAGE),
            (text(60, 20), 0),
        ] {
            assert_eq!(cache.find(&tokens).map_or(0, |m| m.len()), expected);
        }
    }
}
