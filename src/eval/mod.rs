//! How good a model is: against its teacher, against recorded outputs, on held-out text.

pub mod fidelity;
pub mod harness;
pub mod kl;
pub mod parity;
pub mod ppl;
pub mod probe;
pub mod recall;
pub mod retention;
pub mod sensitivity;
pub mod task;
