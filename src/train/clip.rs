//! Norms of gradients, and what is clipped to them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::layer_of;

/// What is clipped together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ClipBy {
    /// All gradients, by their global norm; ILD's layers are apart always.
    #[default]
    All,
    /// Each layer's gradients; embedding, final norm and head each by itself.
    Layer,
}

/// How gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// 0 never clips.
    pub norm: f64,
    pub by: ClipBy,
}

impl Clip {
    /// Whether a layer's gradients can be applied before the others' are known.
    pub fn is_apart(self) -> bool {
        self.norm == 0.0 || self.by == ClipBy::Layer
    }
}

/// Norms of gradients, before clipping.
#[derive(Debug, Default)]
pub struct Norms {
    /// Sums of squares: of all, and of each layer's and of each weight that stands in none.
    all: f64,
    apart: BTreeMap<String, f64>,
}

/// What is clipped together under [`ClipBy::Layer`].
fn part(name: &str) -> String {
    layer_of(name).map_or_else(|| name.to_owned(), |i| i.to_string())
}

impl Norms {
    pub fn of_all(&self) -> f64 {
        self.all.sqrt()
    }

    pub fn is_empty(&self) -> bool {
        self.apart.is_empty()
    }

    pub fn count(&mut self, name: &str, square: f64) {
        self.all += square;
        *self.apart.entry(part(name)).or_default() += square;
    }

    pub fn add(&mut self, other: Self) {
        self.all += other.all;
        for (part, square) in other.apart {
            *self.apart.entry(part).or_default() += square;
        }
    }

    /// Adds each layer's sum of squares to `squares`, by the layers' indices.
    pub fn add_to_layers(&self, squares: &mut Vec<f64>) {
        for (part, square) in &self.apart {
            if let Ok(layer) = part.parse::<usize>() {
                squares.resize(squares.len().max(layer + 1), 0.0);
                squares[layer] += square;
            }
        }
    }

    /// What a weight's gradient is multiplied by.
    pub fn scale(&self, clip: Clip, name: &str) -> f64 {
        let norm = match clip.by {
            ClipBy::All => self.of_all(),
            ClipBy::Layer => self
                .apart
                .get(&part(name))
                .map_or(0.0, |square| square.sqrt()),
        };
        match clip.norm > 0.0 && norm > clip.norm {
            true => clip.norm / norm,
            false => 1.0,
        }
    }
}
