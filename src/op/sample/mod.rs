//! The next token of every row of logits, on a GPU: the host needs no logits for it.

pub mod cuda;
#[cfg(test)]
mod tests;
