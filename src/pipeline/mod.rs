//! From a teacher to a trained hybrid: an opened teacher ([`Base`]), its stages (`stage/<name>.rs`, which commands and recipes
//! share), a recipe as the list of its stages, and carrying it out.

mod base;
mod decontaminate;
pub mod device;
pub mod embedded;
pub mod forecast;
pub mod need;
mod recipe;
mod run;
pub mod stage;
mod sweep;
#[cfg(test)]
mod tests;
mod text;
mod texts;

pub use base::Base;
pub use decontaminate::{Decontaminate, NGRAM};
pub use recipe::{Recipe, Teacher, Variant};
pub use run::{Outcome, check, clear, kept, run, teacher_folder};
pub use stage::{CANDIDATES, StageResult, Surroundings};
pub use text::{Mixture, Text};
