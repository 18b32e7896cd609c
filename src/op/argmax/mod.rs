//! The likeliest token of every row, on a GPU: greedy answers need no logits on the host.

pub mod cuda;
#[cfg(test)]
mod tests;
