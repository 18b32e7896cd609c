//! Pages and states as pieces of a device's memory: pages from its beginning on, states from its end on, wherever they meet. The lowest
//! and the highest free place is taken first, so that what is free lies between.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::{Error, Result};

/// Bytes by which places are counted, and to which they are aligned.
pub const UNIT: usize = 64;

/// A device's memory. What it is told happens in the order in which it is told.
pub trait Store: Any + fmt::Debug + Send + Sync {
    fn bytes(&self) -> usize;
    fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()>;
    /// Zeros.
    fn clear(&self, range: Range<usize>) -> Result<()>;
    fn read(&self, range: Range<usize>) -> Result<Vec<u8>>;
    fn write(&self, at: usize, bytes: &[u8]) -> Result<()>;
}

/// What a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    Page,
    State,
}

#[derive(Debug)]
pub(super) struct Shelf {
    store: Box<dyn Store>,
    /// Bytes of a page and of a state.
    sizes: [usize; 2],
    sides: Mutex<Sides>,
    /// What failed where nobody could be told.
    failed: Mutex<Option<Error>>,
}

/// Who panicked while holding one of these has left it whole.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[derive(Debug)]
struct Sides {
    /// Of the whole, in units.
    units: usize,
    pages: Side,
    states: Side,
}

/// Equal places, counted from one end.
#[derive(Debug, Default)]
struct Side {
    /// In units.
    size: usize,
    /// Places up to the furthest that is taken.
    count: usize,
    /// Those of them that are not.
    free: BTreeSet<usize>,
}

impl Side {
    fn of(bytes: usize) -> Self {
        Self {
            size: bytes.div_ceil(UNIT),
            ..Self::default()
        }
    }

    /// Units up to the furthest place if `more` are taken.
    fn reach(&self, more: usize) -> usize {
        let new = more.saturating_sub(self.free.len());
        (self.count + new).saturating_mul(self.size)
    }

    fn take(&mut self) -> usize {
        self.free.pop_first().unwrap_or_else(|| {
            self.count += 1;
            self.count - 1
        })
    }

    fn give(&mut self, place: usize) {
        self.free.insert(place);
        while self.count > 0 && self.free.remove(&(self.count - 1)) {
            self.count -= 1;
        }
    }
}

impl Shelf {
    pub fn new(store: Box<dyn Store>, sizes: [usize; 2]) -> Self {
        let [pages, states] = sizes.map(Side::of);
        let units = store.bytes() / UNIT;
        Self {
            store,
            sizes,
            sides: Mutex::new(Sides {
                units,
                pages,
                states,
            }),
            failed: Mutex::default(),
        }
    }

    pub fn store(&self) -> &dyn Any {
        &*self.store
    }

    /// So many pages and states, or none where there is not room for all.
    pub fn take(shelf: &Arc<Self>, pages: usize, states: usize) -> Option<Vec<Piece>> {
        let mut sides = held(&shelf.sides);
        if sides.pages.reach(pages) + sides.states.reach(states) > sides.units {
            return None;
        }
        let piece = |of: Of, place: usize| Piece {
            shelf: shelf.clone(),
            of,
            place,
        };
        let mut taken: Vec<Piece> = Vec::with_capacity(pages + states);
        taken.extend((0..pages).map(|_| piece(Of::Page, sides.pages.take())));
        taken.extend((0..states).map(|_| piece(Of::State, sides.states.take())));
        Some(taken)
    }

    /// # Errors
    /// What failed since it was last asked.
    pub fn check(&self) -> Result<()> {
        held(&self.failed).take().map_or(Ok(()), Err)
    }

    /// The first failure is kept: those behind it follow from it.
    fn note(&self, done: Result<()>) {
        if let Err(error) = done {
            held(&self.failed).get_or_insert(error);
        }
    }
}

/// A place that is given back when it goes.
pub(super) struct Piece {
    shelf: Arc<Shelf>,
    of: Of,
    place: usize,
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} of a device", self.of, self.place)
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut sides = held(&self.shelf.sides);
        match self.of {
            Of::Page => sides.pages.give(self.place),
            Of::State => sides.states.give(self.place),
        }
    }
}

impl Piece {
    /// Where it begins, in units.
    pub fn at(&self) -> u32 {
        let sides = held(&self.shelf.sides);
        let at = match self.of {
            Of::Page => self.place * sides.pages.size,
            Of::State => sides.units - (self.place + 1) * sides.states.size,
        };
        u32::try_from(at).expect("a device's memory has fewer than 2^32 units")
    }

    fn range(&self) -> Range<usize> {
        let [page, state] = self.shelf.sizes;
        let from = self.at() as usize * UNIT;
        match self.of {
            Of::Page => from..from + page,
            Of::State => from..from + state,
        }
    }

    /// Takes what another of its kind holds. Without one a state becomes zeros; of a page nothing is read that was not written.
    pub fn begin(&self, like: Option<&Self>) {
        let (store, own) = (&self.shelf.store, self.range());
        self.shelf.note(match (like, self.of) {
            (Some(like), _) => store.copy(like.range().start, own.start, own.len()),
            (None, Of::State) => store.clear(own),
            (None, Of::Page) => Ok(()),
        });
    }

    pub fn begin_with(&self, bytes: &[u8]) {
        self.shelf.note(self.write(bytes));
    }

    pub fn read(&self) -> Result<Vec<u8>> {
        self.shelf.store.read(self.range())
    }

    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.shelf.store.write(self.range().start, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Bytes(Mutex<Vec<u8>>);

    impl Store for Bytes {
        fn bytes(&self) -> usize {
            held(&self.0).len()
        }
        fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<()> {
            held(&self.0).copy_within(from..from + bytes, to);
            Ok(())
        }
        fn clear(&self, range: Range<usize>) -> Result<()> {
            held(&self.0)[range].fill(0);
            Ok(())
        }
        fn read(&self, range: Range<usize>) -> Result<Vec<u8>> {
            Ok(held(&self.0)[range].to_vec())
        }
        fn write(&self, at: usize, bytes: &[u8]) -> Result<()> {
            match bytes.first() {
                Some(13) => Err(Error::invalid("unlucky")),
                _ => {
                    held(&self.0)[at..at + bytes.len()].copy_from_slice(bytes);
                    Ok(())
                }
            }
        }
    }

    fn shelf(units: usize) -> Arc<Shelf> {
        let store = Bytes(Mutex::new(vec![7; UNIT * units + 5]));
        Arc::new(Shelf::new(Box::new(store), [2 * UNIT, 3 * UNIT - 10]))
    }

    #[test]
    fn both_kinds_share_one_memory() {
        let shelf = shelf(12);
        let places = |pieces: &[Piece]| pieces.iter().map(Piece::at).collect::<Vec<_>>();
        let mut pages = Shelf::take(&shelf, 3, 0).unwrap();
        let states = Shelf::take(&shelf, 0, 2).unwrap();
        assert_eq!(
            (places(&pages), places(&states)),
            (vec![0, 2, 4], vec![9, 6])
        );
        assert!(Shelf::take(&shelf, 1, 0).is_none() && Shelf::take(&shelf, 0, 1).is_none());
        // A hole is filled by its own kind only.
        drop(pages.remove(1));
        assert!(Shelf::take(&shelf, 0, 1).is_none());
        assert_eq!(places(&Shelf::take(&shelf, 1, 0).unwrap()), [2]);
        // What is free at the border serves both.
        drop(pages.pop());
        assert_eq!(places(&Shelf::take(&shelf, 0, 1).unwrap()), [3]);
        drop((pages, states));
        assert_eq!(Shelf::take(&shelf, 6, 0).unwrap().len(), 6);
    }

    #[test]
    fn pieces_hold_what_they_are_told() {
        let shelf = shelf(12);
        let pieces = Shelf::take(&shelf, 2, 2).unwrap();
        let [page, other, state, second] = &pieces[..] else {
            panic!("{pieces:?}")
        };
        page.write(&[1; 2 * UNIT]).unwrap();
        other.begin(Some(page));
        state.begin(None);
        state.write(&[5]).unwrap();
        second.begin(Some(state));
        assert_eq!(other.read().unwrap(), [1; 2 * UNIT]);
        let found = second.read().unwrap();
        assert_eq!((found.len(), &found[..2]), (3 * UNIT - 10, &[5, 0][..]));
        page.begin_with(&[13]);
        page.begin_with(&[13]);
        let said = shelf.check().unwrap_err().to_string();
        assert!(said.contains("unlucky") && shelf.check().is_ok(), "{said}");
    }
}
