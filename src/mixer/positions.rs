//! Where the new tokens of a batch stand: rows may have seen different numbers of tokens, and get different numbers.

use candle_core::{Device, Tensor};

use crate::op::attention::Sight;
use crate::{Error, Result};

/// For every row of a batch the tokens it has seen, and how many of the `T` that come are its own; what follows those is
/// filling, whose results mean nothing and which leaves no trace in a state. A row that has seen none starts anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Positions {
    past: Vec<usize>,
    new: Vec<usize>,
    /// `T`
    len: usize,
}

impl Positions {
    /// # Errors
    /// Lists of different lengths, or a row with more than `len` new tokens.
    pub fn new(past: Vec<usize>, new: Vec<usize>, len: usize) -> Result<Self> {
        match past.len() == new.len() && new.iter().all(|new| *new <= len) {
            true => Ok(Self { past, new, len }),
            false => Err(Error::invalid(format!(
                "positions: {} rows have seen tokens, {} get some, at most {len}: {new:?}",
                past.len(),
                new.len()
            ))),
        }
    }

    /// Rows that have all seen `past` tokens and get `len`.
    pub fn even(rows: usize, past: usize, len: usize) -> Self {
        Self {
            past: vec![past; rows],
            new: vec![len; rows],
            len,
        }
    }

    /// Tokens that each row has seen, `[B]`.
    pub fn past(&self) -> &[usize] {
        &self.past
    }

    /// New tokens of each row, `[B]`.
    pub fn added(&self) -> &[usize] {
        &self.new
    }

    /// Columns of the new tokens, `T`.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The past of all rows, if it is one.
    pub fn common_past(&self) -> Option<usize> {
        let first = *self.past.first()?;
        self.past.iter().all(|past| *past == first).then_some(first)
    }

    /// Whether every new token is a row's own.
    pub fn is_full(&self) -> bool {
        self.new.iter().all(|new| *new == self.len)
    }

    /// The most tokens of a row, filling included.
    pub fn reach(&self) -> usize {
        self.past.iter().max().map_or(0, |past| past + self.len)
    }

    /// Of queries over a cache that holds position `p` at `p`.
    pub fn sight(&self) -> Sight {
        Sight {
            past: self
                .common_past()
                .is_none()
                .then(|| self.past.as_slice().into()),
            ..Sight::default()
        }
    }

    /// `[B, T, 1]`: 0 where a token is a row's own, `filling` elsewhere.
    pub fn filling(&self, filling: f32, device: &Device) -> Result<Tensor> {
        let marks = self
            .new
            .iter()
            .flat_map(|new| (0..self.len).map(move |t| if t < *new { 0. } else { filling }));
        let shape = (self.new.len(), self.len, 1);
        Ok(Tensor::from_vec(
            marks.collect::<Vec<f32>>(),
            shape,
            device,
        )?)
    }

    /// `[B]` (u8): 0 for rows that start anew, 1 for the others.
    pub fn continued(&self, device: &Device) -> Result<Tensor> {
        let marks: Vec<u8> = self.past.iter().map(|past| u8::from(*past > 0)).collect();
        Ok(Tensor::from_vec(marks, self.past.len(), device)?)
    }
}
