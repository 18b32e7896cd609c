//! Kernels. One folder an operation: `mod.rs` the public function and its `CustomOp` (forward and
//! backward), `plain.rs` the same in plain tensor operations, `cpu.rs` loops over slices,
//! `kernel.cuh` kernels for CUDA, `cuda.rs` their launches, `tests.rs` the laws between them.
//!
//! Every public function takes tensors on any device: what a kernel computes in goes to it (`route.rs`), all
//! else (other devices, f64 in gradient tests) to the differentiable plain version.

mod documents;
pub use documents::Documents;

pub mod adamw;
#[cfg(target_arch = "x86_64")]
pub mod amx;
pub mod attention;
pub mod blocks;
pub mod causal_conv;
pub mod cgroup;
pub mod cpu;
pub mod cuda;
pub mod isa;
#[cfg(test)]
pub(crate) mod laws;
pub mod linear;
pub mod loss;
pub mod mamba2_step;
pub mod matmul;
pub mod paged_attention;
pub mod rms_norm;
pub mod rope;
pub mod rounding;
pub mod route;
pub mod runtime;
pub mod sample;
pub mod ssd;
pub mod swiglu;
pub mod team;
pub mod window_step;
