//! A pass over new tokens on a GPU: what its layers read of the host, and where the tokens stand in the device's memory.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;

use super::memory::{CacheType, Pool, Span};
use super::rotary::Rotary;
use super::shelf::{Store, UNIT};
use crate::op::cuda::{Array, Gpu, Lasting, Places};
use crate::op::paged_attention::cuda::{Kept, Planes};

/// A device's memory for sequences.
pub struct Arena<G: Gpu> {
    gpu: Arc<G>,
    bytes: usize,
    entries: G::Array,
}

impl<G: Gpu> fmt::Debug for Arena<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena of {} bytes", self.bytes)
    }
}

impl<G: Lasting> Arena<G> {
    /// # Errors
    /// A device that has no room for it.
    pub fn new(gpu: &Arc<G>, bytes: usize) -> Result<Self> {
        Ok(Self {
            entries: gpu.empty(candle_core::DType::U8, bytes)?,
            gpu: gpu.clone(),
            bytes,
        })
    }

    /// That of a pool.
    ///
    /// # Errors
    /// A pool of another place.
    pub fn of(pool: &Pool) -> crate::Result<&Self> {
        let found = pool.store().and_then(|store| store.downcast_ref());
        found.ok_or_else(|| crate::Error::invalid("what a sequence remembers is elsewhere"))
    }

    pub fn entries(&self) -> &G::Array {
        &self.entries
    }
}

impl<G: Lasting> Store for Arena<G> {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn copy(&self, from: usize, to: usize, bytes: usize) -> crate::Result<()> {
        Ok(self.gpu.copy(&self.entries, from, to, bytes)?)
    }

    fn clear(&self, range: Range<usize>) -> crate::Result<()> {
        Ok(self.gpu.clear(&self.entries, range.start, range.len())?)
    }

    fn read(&self, range: Range<usize>) -> crate::Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        self.gpu.read(&self.entries, range.start, &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, at: usize, bytes: &[u8]) -> crate::Result<()> {
        Ok(self.gpu.write(&self.entries, at, bytes)?)
    }
}

/// Numbers that a pass reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Input {
    Tokens,
    /// Rows whose logits are wanted.
    Wanted,
    Pages,
    States,
    Owners,
    Lengths,
    Ends,
    /// Blocks of so many tokens of a sequence.
    Tiles(usize),
}

/// Which rotary table, and how many pairs before it stand still.
type Turn = (usize, usize);

/// What a pass reads of the host. Its shape says what is launched; what changes from step to step changes entries alone.
pub struct Plan {
    spans: Vec<Range<usize>>,
    /// `[N]`
    positions: Vec<usize>,
    numbers: BTreeMap<Input, Vec<u32>>,
    turns: BTreeMap<Turn, [Vec<f32>; 2]>,
}

impl Plan {
    /// # Panics
    /// When spans lack the room that they need.
    pub fn new(tokens: &[u32], spans: &[Span], wanted: &[usize]) -> Self {
        let number = |n: usize| u32::try_from(n).expect("fewer than 2^32 positions");
        let (mut positions, mut owners) = (vec![0; tokens.len()], vec![0; tokens.len()]);
        for (s, span) in spans.iter().enumerate() {
            for (t, row) in span.rows.clone().enumerate() {
                positions[row] = span.first() + t;
                owners[row] = number(s);
            }
        }
        let tables: Vec<Vec<u32>> = spans
            .iter()
            .map(|span| span.memory.page_places().collect())
            .collect();
        // Of few widths, so that passes are alike.
        let width = tables.iter().map(Vec::len).max().unwrap_or(0);
        let width = width.next_power_of_two();
        let pages = tables.into_iter().flat_map(|mut table: Vec<u32>| {
            table.resize(width, 0);
            table
        });
        let ends = spans.iter().map(|span| number(span.rows.end));
        let states = spans
            .iter()
            .map(|span| span.memory.state_place().unwrap_or(0));
        let numbers = [
            (Input::Tokens, tokens.to_vec()),
            (Input::Wanted, wanted.iter().map(|w| number(*w)).collect()),
            (Input::Pages, pages.collect()),
            (Input::States, states.collect()),
            (Input::Owners, owners),
            (
                Input::Lengths,
                positions.iter().map(|p| number(p + 1)).collect(),
            ),
            (Input::Ends, std::iter::once(0).chain(ends).collect()),
        ];
        Self {
            spans: spans.iter().map(|span| span.rows.clone()).collect(),
            positions,
            numbers: numbers.into_iter().collect(),
            turns: BTreeMap::new(),
        }
    }

    /// Blocks of up to `together` neighbouring tokens of a sequence will be read.
    pub(super) fn tile(&mut self, together: usize) {
        let spans = &self.spans;
        self.numbers
            .entry(Input::Tiles(together))
            .or_insert_with(|| {
                let tiles = spans.iter().enumerate().flat_map(|(s, span)| {
                    let firsts = span.clone().step_by(together);
                    firsts.map(move |first| [s, first, together.min(span.end - first)])
                });
                tiles.flatten().map(|n| n as u32).collect()
            });
    }

    /// Heads will be turned, behind `still` pairs that are not.
    pub(super) fn turn(&mut self, rotary: &Arc<Rotary>, still: usize) {
        let positions = &self.positions;
        self.turns.entry(key(rotary, still)).or_insert_with(|| {
            let reach = positions.iter().max().map_or(0, |last| last + 1);
            let table = rotary.table(reach);
            let mut found = [Vec::new(), Vec::new()];
            for position in positions {
                let (cos, sin) = table.at(*position);
                for (found, (entries, rest)) in found.iter_mut().zip([(cos, 1.), (sin, 0.)]) {
                    found.extend(std::iter::repeat_n(rest, still));
                    found.extend_from_slice(entries);
                }
            }
            found
        });
    }

    /// Whether every sequence has one new token.
    pub fn is_step(&self) -> bool {
        self.positions.len() == self.spans.len()
    }

    /// Passes of one shape launch the same kernels, in the same shapes.
    pub fn shape(&self) -> Vec<usize> {
        let numbers = self.numbers.values().map(Vec::len);
        let turns = self.turns.values().map(|[cos, _]| cos.len());
        numbers.chain(turns).collect()
    }
}

fn key(rotary: &Arc<Rotary>, still: usize) -> Turn {
    (Arc::as_ptr(rotary) as usize, still)
}

/// A [`Plan`] on the device.
#[derive(Debug)]
pub struct Inputs<A> {
    numbers: BTreeMap<Input, A>,
    turns: BTreeMap<Turn, [A; 2]>,
}

impl<A> Inputs<A> {
    pub fn new<G: Gpu<Array = A>>(gpu: &G, plan: &Plan) -> Result<Self> {
        let numbers = plan.numbers.iter();
        let turns = plan.turns.iter();
        Ok(Self {
            numbers: numbers
                .map(|(input, numbers)| Ok((*input, gpu.upload(numbers)?)))
                .collect::<Result<_>>()?,
            turns: turns
                .map(|(turn, [cos, sin])| Ok((*turn, [gpu.upload_f32(cos)?, gpu.upload_f32(sin)?])))
                .collect::<Result<_>>()?,
        })
    }

    /// Takes the entries of another plan of the same shape.
    pub fn write<G: Gpu<Array = A>>(&self, gpu: &G, plan: &Plan) -> Result<()> {
        for (array, numbers) in self.numbers.values().zip(plan.numbers.values()) {
            gpu.write(array, 0, bytemuck::cast_slice(numbers))?;
        }
        for (arrays, entries) in self.turns.values().zip(plan.turns.values()) {
            for (array, entries) in arrays.iter().zip(entries) {
                gpu.write(array, 0, bytemuck::cast_slice(entries))?;
            }
        }
        Ok(())
    }

    /// No row's logits are wanted.
    pub fn wants_nothing(&self) -> bool
    where
        A: Array,
    {
        self.wanted().is_empty()
    }

    pub fn tokens(&self) -> &A {
        self.number(Input::Tokens)
    }

    pub fn wanted(&self) -> &A {
        self.number(Input::Wanted)
    }

    fn number(&self, input: Input) -> &A {
        &self.numbers[&input]
    }
}

/// New tokens on the device.
pub struct Batch<'a, G: Gpu> {
    pub gpu: &'a G,
    pub pool: &'a Pool,
    pub memory: &'a G::Array,
    pub inputs: &'a Inputs<G::Array>,
}

impl<G: Gpu> Batch<'_, G> {
    /// Where their pages are, for a layer.
    pub(super) fn pages(&self, layer: usize) -> (Places<'_, G::Array>, Planes) {
        let place = &self.pool.layout().layers[layer];
        let planes = Planes {
            kept: match self.pool.kind() {
                CacheType::F32 => Kept::F32,
                CacheType::F16 => Kept::F16,
                CacheType::Int8 => Kept::Int8,
            },
            row_bytes: place.row_bytes,
        };
        (self.places(place.page), planes)
    }

    /// Where their states are, for a layer.
    pub(super) fn states(&self, layer: usize) -> Places<'_, G::Array> {
        self.places(size_of::<f32>() * self.pool.layout().layers[layer].state.start)
    }

    fn places(&self, layer_at: usize) -> Places<'_, G::Array> {
        let of = |input| self.inputs.number(input);
        Places {
            memory: self.memory,
            unit: UNIT,
            layer_at,
            pages: of(Input::Pages),
            states: of(Input::States),
            owners: of(Input::Owners),
            lengths: of(Input::Lengths),
            ends: of(Input::Ends),
        }
    }

    /// What [`Plan::tile`] asked for.
    pub(super) fn tiles(&self, together: usize) -> &G::Array {
        self.inputs.number(Input::Tiles(together))
    }

    /// What [`Plan::turn`] asked for: cos and sin.
    pub(super) fn turns(&self, rotary: &Arc<Rotary>, still: usize) -> &[G::Array; 2] {
        &self.inputs.turns[&key(rotary, still)]
    }
}
