//! From a teacher to a trained hybrid: an opened teacher ([`Base`], which the commands use too), a recipe,
//! and carrying it out.

mod bank;
mod base;
mod budget;
mod check;
pub mod embedded;
mod places;
mod recipe;
mod run;
#[cfg(test)]
mod tests;
mod training;

pub use bank::{CANDIDATES, Pair, bank_plans};
pub use base::Base;
pub use budget::{BUDGET_CANDIDATES, Budget, Candidates, Damage, Damages, damages, fitting};
pub use check::{check, teacher_folder};
pub use places::Places;
pub use recipe::{Method, Recipe, Teacher, Text};
pub use run::{Outcome, StageResult, Surroundings, clear, kept, run};
pub use training::{start_training, tell_step};
