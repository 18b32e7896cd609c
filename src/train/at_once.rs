//! A step whose gradients are applied as they appear, so that they are never all there.

use std::collections::BTreeMap;

use super::check_loss;
use super::clip::Norms;
use super::params::{ParamGroup, Update};
use crate::Result;

pub struct AtOnce {
    update: Update,
    /// A loss above it is a spike.
    most: f64,
    /// Norms of what was applied, by the groups' places in the stage's list.
    applied: BTreeMap<usize, Norms>,
}

impl AtOnce {
    pub fn new(update: Update, most: f64) -> Self {
        Self {
            update,
            most,
            applied: BTreeMap::new(),
        }
    }

    /// Judges the step's loss, once: what gradients are taken of afterwards may have another value.
    ///
    /// # Errors
    /// A loss that is not finite, or a spike.
    pub fn judge(&mut self, loss: f64) -> Result<()> {
        check_loss(loss, std::mem::replace(&mut self.most, f64::INFINITY))
    }

    /// Clips the gradients that group `group` has now, steps and forgets them.
    ///
    /// # Errors
    /// A gradient that is not finite; nothing of this group was applied then.
    pub fn apply(&mut self, group: usize, params: &mut ParamGroup) -> Result<()> {
        let norms = params.norms()?;
        params.update(&norms, &self.update)?;
        self.applied.entry(group).or_default().add(norms);
        Ok(())
    }

    /// Whether anything was applied.
    pub fn is_begun(&self) -> bool {
        self.applied.values().any(|norms| !norms.is_empty())
    }

    /// Adds the norms of what was applied to those of the groups.
    pub fn add_to(self, norms: &mut [Norms]) {
        for (group, applied) in self.applied {
            norms[group].add(applied);
        }
    }
}
