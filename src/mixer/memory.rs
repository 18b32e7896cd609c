//! What sequences remember while they are decoded: pages of cache that hold some positions of all layers, and the recurrent state of all
//! layers, both under one budget. Sequences share pages and states until one of them writes.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::shelf::{Of, Piece, Shelf, Store};
use crate::op::linear::Storage;
use crate::{Error, Result};

/// Positions of a page.
pub const PAGE: usize = 32;

/// How cached keys, values and latents are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheType {
    F32,
    #[default]
    F16,
    /// 8 bits, a scale for every 32 entries of a row.
    Int8,
}

/// Entries of a row that share a scale.
const GROUP: usize = 32;

impl CacheType {
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }

    /// Bytes of a row, filled up to whole words.
    fn row_bytes(self, dim: usize) -> usize {
        match self {
            Self::F32 => 4 * dim,
            Self::F16 => (2 * dim).next_multiple_of(4),
            Self::Int8 => 4 * dim.div_ceil(GROUP) + dim.next_multiple_of(4),
        }
    }

    fn write(self, row: &[f32], bytes: &mut [u8]) {
        match self {
            Self::F32 => bytes.copy_from_slice(bytemuck::cast_slice(row)),
            Self::F16 => {
                let halves: &mut [u16] = bytemuck::cast_slice_mut(bytes);
                let halves = &mut halves.reinterpret_cast_mut::<f16>()[..row.len()];
                halves.convert_from_f32_slice(row);
            }
            Self::Int8 => {
                let (scales, codes) = bytes.split_at_mut(4 * row.len().div_ceil(GROUP));
                let scales: &mut [f32] = bytemuck::cast_slice_mut(scales);
                let groups = row.chunks(GROUP).zip(codes.chunks_mut(GROUP));
                for ((row, codes), scale) in groups.zip(scales) {
                    let largest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                    // What is no number must not end as one.
                    *scale = match row.iter().all(|x| x.is_finite()) {
                        true => largest / 127.,
                        false => f32::NAN,
                    };
                    let inverse = if largest > 0. { 127. / largest } else { 0. };
                    for (code, x) in codes.iter_mut().zip(row) {
                        *code = (x * inverse).round_ties_even() as i8 as u8;
                    }
                }
            }
        }
    }

    fn read(self, bytes: &[u8], row: &mut [f32]) {
        match self {
            Self::F32 => row.copy_from_slice(bytemuck::cast_slice(bytes)),
            Self::F16 => Storage::F16.widen(bytes, row),
            Self::Int8 => {
                let (scales, codes) = bytes.split_at(4 * row.len().div_ceil(GROUP));
                let scales: &[f32] = bytemuck::cast_slice(scales);
                let groups = row.chunks_mut(GROUP).zip(codes.chunks(GROUP));
                for ((row, codes), scale) in groups.zip(scales) {
                    for (x, code) in row.iter_mut().zip(codes) {
                        *x = scale * f32::from(*code as i8);
                    }
                }
            }
        }
    }
}

impl FromStr for CacheType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name);
            Error::invalid(format!("{text:?}: choose {}", names.join(", ")))
        })
    }
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a layer keeps of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keeps {
    /// Rows a position: keys and values of every head, or a latent.
    pub planes: usize,
    /// Entries of such a row.
    pub dim: usize,
    /// Entries of state, whatever the length.
    pub state: usize,
}

/// Where everything stands that the layers keep.
#[derive(Debug)]
pub(super) struct Layout {
    kind: CacheType,
    pub layers: Vec<Place>,
    /// Bytes of a page.
    page: usize,
    /// Entries of a state.
    state: usize,
}

#[derive(Debug)]
pub(super) struct Place {
    /// First byte in a page: plane after plane, rows in each.
    pub page: usize,
    planes: usize,
    dim: usize,
    pub row_bytes: usize,
    /// Entries in a state.
    pub state: Range<usize>,
}

/// Memory for sequences, up to a limit: the host's, or a device's.
#[derive(Debug, Clone)]
pub struct Pool {
    layout: Arc<Layout>,
    limit: usize,
    used: Arc<AtomicUsize>,
    /// None: on the host.
    shelf: Option<Arc<Shelf>>,
}

/// There is not room for what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl Pool {
    /// # Errors
    /// A limit in which no sequence of `least` positions has room.
    pub fn new(layers: &[Keeps], kind: CacheType, limit: usize, least: usize) -> Result<Self> {
        let (mut page, mut state) = (0, 0);
        let places = layers.iter().map(|layer| {
            let row_bytes = kind.row_bytes(layer.dim);
            let place = Place {
                page,
                planes: layer.planes,
                dim: layer.dim,
                row_bytes,
                state: state..state + layer.state,
            };
            page += layer.planes * PAGE * row_bytes;
            state += layer.state;
            place
        });
        let pool = Self {
            layout: Arc::new(Layout {
                kind,
                layers: places.collect(),
                page,
                state,
            }),
            limit,
            used: Arc::default(),
            shelf: None,
        };
        let needed = pool.bytes(least);
        match needed > limit {
            true => Err(Error::invalid(format!(
                "a cache of {limit} bytes is too small for one sequence: {least} tokens need {needed}"
            ))),
            false => Ok(pool),
        }
    }

    /// The same in a device's memory: all of `store`.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn on(layers: &[Keeps], kind: CacheType, store: Box<dyn Store>) -> Result<Self> {
        let pool = Self::new(layers, kind, store.bytes(), 1)?;
        let sizes = [pool.layout.page, 4 * pool.layout.state];
        Ok(Self {
            shelf: Some(Arc::new(Shelf::new(store, sizes))),
            ..pool
        })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The device's memory.
    pub(super) fn store(&self) -> Option<&dyn Any> {
        self.shelf.as_ref().map(|shelf| shelf.store())
    }

    /// Says what failed on the device since it was last asked.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<()> {
        self.shelf.as_ref().map_or(Ok(()), |shelf| shelf.check())
    }

    /// Whether it is the same.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.used, &other.used)
    }

    /// Bytes that a sequence of `positions` takes.
    pub fn bytes(&self, positions: usize) -> usize {
        let pages = positions.div_ceil(PAGE).saturating_mul(self.layout.page);
        pages.saturating_add(4 * self.layout.state)
    }

    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    pub fn kind(&self) -> CacheType {
        self.layout.kind
    }

    /// Whether any layer has a recurrent state.
    pub fn has_state(&self) -> bool {
        self.layout.state > 0
    }

    /// A sequence that has seen nothing.
    pub fn sequence(&self) -> Memory {
        Memory {
            pool: self.clone(),
            pages: Vec::new(),
            state: None,
            len: 0,
        }
    }

    fn take(&self, bytes: usize) -> Result<(), Full> {
        let add = |used: usize| used.checked_add(bytes).filter(|used| *used <= self.limit);
        let taken = (self.used).fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        taken.map(|_| ()).map_err(|_| Full)
    }

    /// Room for so many pages and states; what is taken of it is counted already, and given back when it goes.
    ///
    /// # Errors
    /// When a device's memory has no place for them.
    fn pieces(&self, pages: usize, states: usize) -> Result<Vec<Home>, Full> {
        let of = |of: Of, count: usize| {
            let words = match of {
                Of::Page => self.layout.page / 4,
                Of::State => self.layout.state,
            };
            (0..count).map(move |_| Home::Host(vec![0; words]))
        };
        match &self.shelf {
            None => Ok(of(Of::Page, pages).chain(of(Of::State, states)).collect()),
            Some(shelf) => {
                let pieces = Shelf::take(shelf, pages, states).ok_or(Full)?;
                Ok(pieces.into_iter().map(Home::Device).collect())
            }
        }
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Where words stand.
#[derive(Debug)]
enum Home {
    Host(Vec<u32>),
    Device(Piece),
}

/// A page or a state.
#[derive(Debug)]
struct Words {
    home: Home,
    bytes: usize,
    used: Arc<AtomicUsize>,
}

impl Words {
    /// A place of its own, with what another holds, else with zeros.
    fn new(pool: &Pool, of: Of, mut home: Home, like: Option<&Self>) -> Self {
        match (&mut home, like) {
            (Home::Host(entries), Some(like)) => entries.copy_from_slice(like.host()),
            (Home::Host(_), None) => {}
            (Home::Device(piece), like) => piece.begin(like.map(Self::piece)),
        }
        Self {
            home,
            bytes: match of {
                Of::Page => pool.layout.page,
                Of::State => 4 * pool.layout.state,
            },
            used: pool.used.clone(),
        }
    }

    /// # Panics
    /// On a device: only its own decoder reads what stands there.
    fn host(&self) -> &[u32] {
        match &self.home {
            Home::Host(entries) => entries,
            Home::Device(piece) => unreachable!("{piece:?} is not the host's"),
        }
    }

    fn host_mut(&mut self) -> &mut [u32] {
        match &mut self.home {
            Home::Host(entries) => entries,
            Home::Device(piece) => unreachable!("{piece:?} is not the host's"),
        }
    }

    fn piece(&self) -> &Piece {
        match &self.home {
            Home::Device(piece) => piece,
            Home::Host(_) => unreachable!("a pool has one home"),
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        match &self.home {
            Home::Host(entries) => Ok(entries.iter().flat_map(|word| word.to_le_bytes()).collect()),
            Home::Device(piece) => piece.read(),
        }
    }

    fn set(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.home {
            Home::Host(entries) => {
                let words = bytes.as_chunks().0.iter().copied();
                let words = entries.iter_mut().zip(words.map(u32::from_le_bytes));
                words.for_each(|(entry, word)| *entry = word);
                Ok(())
            }
            Home::Device(piece) => piece.write(bytes),
        }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What one sequence remembers. Clones share all of it until one of them writes.
#[derive(Debug, Clone)]
pub struct Memory {
    pool: Pool,
    pages: Vec<Arc<Words>>,
    state: Option<Arc<Words>>,
    len: usize,
}

impl Memory {
    /// Positions that it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the room that `new` more positions need, all of it or none, and makes what they write its own.
    ///
    /// # Errors
    /// When the pool has less.
    pub fn reserve(&mut self, new: usize) -> Result<(), Full> {
        let layout = self.pool.layout.clone();
        let pages = match layout.page {
            0 => 0,
            _ => (self.len + new).div_ceil(PAGE),
        };
        let missing = pages.saturating_sub(self.pages.len());
        let from = (self.len / PAGE).min(self.pages.len());
        let shared: Vec<usize> = (from..self.pages.len())
            .filter(|i| Arc::get_mut(&mut self.pages[*i]).is_none())
            .collect();
        let own_state = self
            .state
            .as_mut()
            .is_some_and(|s| Arc::get_mut(s).is_some());
        let state = layout.state > 0 && !own_state;
        let count = missing + shared.len();
        let bytes = count * layout.page + if state { 4 * layout.state } else { 0 };
        self.pool.take(bytes)?;
        let homes = self.pool.pieces(count, usize::from(state));
        let homes = homes.inspect_err(|Full| self.pool.give(bytes))?;
        let mut homes = homes.into_iter();
        let mut next = |of: Of, like: Option<&Words>| {
            let home = homes.next().expect("as many as were asked for");
            Arc::new(Words::new(&self.pool, of, home, like))
        };
        for i in shared {
            self.pages[i] = next(Of::Page, Some(&self.pages[i]));
        }
        for _ in 0..missing {
            self.pages.push(next(Of::Page, None));
        }
        if state {
            self.state = Some(next(Of::State, self.state.as_deref()));
        }
        Ok(())
    }

    /// `new` positions have been written.
    pub(crate) fn advance(&mut self, new: usize) {
        self.len += new;
    }

    /// Its pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Where its pages begin in a device's memory, in units.
    pub(super) fn page_places(&self) -> impl Iterator<Item = u32> {
        self.pages.iter().map(|page| page.piece().at())
    }

    /// The same of its state, which has been reserved where there is any.
    pub(super) fn state_place(&self) -> Option<u32> {
        self.state.as_ref().map(|state| state.piece().at())
    }

    /// The row of a plane at `position`, which has been reserved.
    pub(super) fn write(&mut self, layer: usize, plane: usize, position: usize, row: &[f32]) {
        let layout = &self.pool.layout;
        let place = &layout.layers[layer];
        let at = place.page + (plane * PAGE + position % PAGE) * place.row_bytes;
        let page = Arc::get_mut(&mut self.pages[position / PAGE]).expect("reserved");
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(page.host_mut());
        layout.kind.write(row, &mut bytes[at..][..place.row_bytes]);
    }

    /// The first `count` rows of a plane's `page`, in f32: where they stand, or in `room`.
    pub(super) fn read<'a>(
        &'a self,
        layer: usize,
        plane: usize,
        page: usize,
        count: usize,
        room: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let layout = &self.pool.layout;
        let place = &layout.layers[layer];
        let at = place.page + plane * PAGE * place.row_bytes;
        let bytes: &[u8] = bytemuck::cast_slice(self.pages[page].host());
        let bytes = &bytes[at..][..count * place.row_bytes];
        if layout.kind == CacheType::F32 {
            return bytemuck::cast_slice(bytes);
        }
        room.resize(count * place.dim, 0.);
        if layout.kind == CacheType::F16 && place.row_bytes == 2 * place.dim {
            // Rows without gaps are one.
            layout.kind.read(bytes, room);
            return room;
        }
        let rows = room.chunks_exact_mut(place.dim);
        for (row, bytes) in rows.zip(bytes.chunks_exact(place.row_bytes)) {
            layout.kind.read(bytes, row);
        }
        room
    }

    /// A layer's state, which has been reserved.
    pub(super) fn state(&mut self, layer: usize) -> &mut [f32] {
        let range = self.pool.layout.layers[layer].state.clone();
        let state = self
            .state
            .as_mut()
            .and_then(Arc::get_mut)
            .expect("reserved");
        bytemuck::cast_slice_mut(&mut state.host_mut()[range])
    }

    /// Goes back to its first `len` positions: where nothing but pages is kept.
    pub fn truncate(&mut self, len: usize) {
        debug_assert!(self.state.is_none() && len <= self.len);
        self.len = len;
        self.pages.truncate(len.div_ceil(PAGE));
    }

    /// The whole pages among the first `len` positions, without a state.
    pub fn pages_of(&self, len: usize) -> Self {
        let whole = len.min(self.len) / PAGE;
        Self {
            pages: self.pages[..whole.min(self.pages.len())].to_vec(),
            state: None,
            len: whole * PAGE,
            pool: self.pool.clone(),
        }
    }

    /// `len` positions with entries that mean nothing, as if they had been read: to measure with.
    ///
    /// # Errors
    /// When the pool has no room.
    pub fn fill(&mut self, len: usize, seed: u64) -> Result<(), Full> {
        self.reserve(len)?;
        if self.pool.shelf.is_some() {
            self.fill_pieces(seed);
            self.len += len;
            return Ok(());
        }
        let mut random = seed;
        let mut next = || {
            // Knuth's MMIX generator.
            random = random.wrapping_mul(6_364_136_223_846_793_005);
            random = random.wrapping_add(1_442_695_040_888_963_407);
            (random >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let layout = self.pool.layout.clone();
        for (layer, place) in layout.layers.iter().enumerate() {
            let row: Vec<f32> = (0..place.dim + 61).map(|_| next()).collect();
            for plane in 0..place.planes {
                for position in self.len..self.len + len {
                    let row = &row[(plane + position) % 61..][..place.dim];
                    self.write(layer, plane, position, row);
                }
            }
        }
        self.len += len;
        Ok(())
    }

    /// The same on a device: one page, again and again.
    fn fill_pieces(&self, seed: u64) {
        let Some(first) = self.pages.first() else {
            return;
        };
        let host = Pool {
            shelf: None,
            used: Arc::default(),
            limit: usize::MAX,
            ..self.pool.clone()
        };
        let mut page = host.sequence();
        page.fill(PAGE, seed).expect("no limit");
        first
            .piece()
            .begin_with(bytemuck::cast_slice(page.pages[0].host()));
        for page in &self.pages[1..] {
            page.piece().begin(Some(first.piece()));
        }
    }

    /// Bytes of all that it holds, shared or not.
    pub fn bytes(&self) -> usize {
        let words = self.pages.iter().chain(&self.state);
        words.map(|words| words.bytes).sum()
    }

    /// Everything as bytes: what a session's file holds.
    ///
    /// # Errors
    /// A device that fails.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let words = self.pages.iter().chain(&self.state);
        let parts: Result<Vec<Vec<u8>>> = words.map(|words| words.to_bytes()).collect();
        Ok(parts?.concat())
    }

    /// A sequence of `len` positions from [`Memory::to_bytes`].
    ///
    /// # Errors
    /// Another number of bytes, or no room.
    pub fn from_bytes(pool: &Pool, len: usize, bytes: &[u8]) -> Result<Self> {
        let mut memory = pool.sequence();
        let wanted = pool.bytes(len);
        if bytes.len() != wanted {
            return Err(Error::invalid(format!(
                "{} bytes for {len} tokens; this model's take {wanted}",
                bytes.len()
            )));
        }
        memory.reserve(len).map_err(|Full| {
            let (used, limit) = (pool.used(), pool.limit());
            Error::invalid(format!(
                "{wanted} bytes of cache, where {used} of {limit} are in use"
            ))
        })?;
        let mut rest = bytes;
        for part in memory.pages.iter_mut().chain(&mut memory.state) {
            let part = Arc::get_mut(part).expect("reserved");
            let (own, behind) = rest.split_at(part.bytes);
            part.set(own)?;
            rest = behind;
        }
        memory.len = len;
        Ok(memory)
    }
}

/// The next tokens of a sequence: rows of a batch in which all sequences' tokens stand one after the other.
pub struct Span<'a> {
    pub memory: &'a mut Memory,
    pub rows: Range<usize>,
}

impl Span<'_> {
    /// Where its first token stands in its sequence.
    pub fn first(&self) -> usize {
        self.memory.len()
    }
}

/// Positions up to the furthest new token.
pub(super) fn reach(spans: &[Span]) -> usize {
    let ends = spans.iter().map(|span| span.first() + span.rows.len());
    ends.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: [Keeps; 3] = [
        Keeps {
            planes: 2,
            dim: 6,
            state: 0,
        },
        Keeps {
            planes: 0,
            dim: 0,
            state: 5,
        },
        Keeps {
            planes: 1,
            dim: 40,
            state: 3,
        },
    ];

    fn pool(kind: CacheType, limit: usize) -> Pool {
        Pool::new(&LAYERS, kind, limit, 1).unwrap()
    }

    fn row(dim: usize, seed: usize) -> Vec<f32> {
        (0..dim).map(|i| ((i + 7 * seed) as f32).sin()).collect()
    }

    #[test]
    fn what_is_written_is_read() {
        for (kind, bound) in [
            (CacheType::F32, 0.),
            (CacheType::F16, 5e-4),
            (CacheType::Int8, 8e-3),
        ] {
            let mut memory = pool(kind, 1 << 20).sequence();
            memory.reserve(70).unwrap();
            for position in 0..70 {
                memory.write(0, 1, position, &row(6, position));
                memory.write(2, 0, position, &row(40, position));
            }
            memory.state(2).copy_from_slice(&[1., 2., 3.]);
            memory.advance(70);
            let mut room = Vec::new();
            for (layer, plane, dim) in [(0, 1, 6), (2, 0, 40)] {
                let read = memory.read(layer, plane, 1, 32, &mut room);
                for (i, read) in read.chunks_exact(dim).enumerate() {
                    for (a, b) in read.iter().zip(row(dim, 32 + i)) {
                        assert!((a - b).abs() <= bound, "{kind}: {a} {b}");
                    }
                }
            }
            assert!(memory.read(0, 0, 2, 6, &mut room).iter().all(|x| *x == 0.));
            assert_eq!(memory.state(1), [0.; 5]);
        }
    }

    #[test]
    fn clones_go_on_alone_and_everything_is_given_back() {
        let pool = pool(CacheType::F32, 1 << 20);
        let mut first = pool.sequence();
        first.reserve(40).unwrap();
        first.write(0, 0, 33, &row(6, 1));
        first.state(1)[0] = 1.;
        first.advance(40);
        let (used, mut second) = (pool.used(), first.clone());
        assert_eq!(used, pool.bytes(40));
        assert_eq!(pool.used(), used, "clones share");
        second.reserve(1).unwrap();
        let own = pool.bytes(1);
        assert_eq!(
            pool.used(),
            used + own,
            "the last page and the state are copied"
        );
        second.write(0, 0, 33, &row(6, 2));
        second.state(1)[0] = 2.;
        let mut room = Vec::new();
        assert_eq!(first.read(0, 0, 1, 8, &mut room)[6..12], row(6, 1));
        assert_eq!(second.read(0, 0, 1, 8, &mut room)[6..12], row(6, 2));
        let again = Memory::from_bytes(&pool, 40, &first.to_bytes().unwrap()).unwrap();
        assert_eq!(again.to_bytes().unwrap(), first.to_bytes().unwrap());
        drop((first, second, again));
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn a_full_pool_gives_nothing() {
        let pool = pool(CacheType::F16, 3 * 4096);
        let mut memory = pool.sequence();
        memory.reserve(32).unwrap();
        let used = pool.used();
        assert_eq!(memory.reserve(10_000), Err(Full));
        assert_eq!(pool.used(), used);
        let message = Pool::new(&LAYERS, CacheType::F32, 100, 1)
            .unwrap_err()
            .to_string();
        assert!(message.contains("too small"), "{message}");
        assert!(Memory::from_bytes(&pool, 3, &[0; 5]).is_err());
    }
}
