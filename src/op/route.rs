//! What computes an operation: one rule for all of them.

use std::collections::BTreeSet;
use std::sync::Mutex;

use candle_core::{DType, Tensor};

/// An implementation of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The kernel for the CPU, forward and backward.
    Cpu,
    /// The kernel for CUDA devices.
    Cuda,
    /// Plain tensor operations: differentiable, on any device, in any type.
    Plain,
}

/// The kernels that an operation has.
#[derive(Debug, Clone, Copy)]
pub struct Kernels {
    pub op: &'static str,
    /// Types that its CPU kernel computes in.
    pub cpu: &'static [DType],
    /// Types that its CUDA kernel computes in; empty: there is none.
    pub cuda: &'static [DType],
}

impl Kernels {
    /// An operation with a kernel for f32 on the CPU.
    pub const fn f32(op: &'static str) -> Self {
        Self {
            op,
            cpu: &[DType::F32],
            cuda: &[],
        }
    }

    /// And with one for these types on CUDA devices, of one type at a time.
    pub const fn cuda(self, cuda: &'static [DType]) -> Self {
        Self { cuda, ..self }
    }

    /// What computes on `tensors`. Where a kernel is missing, that is said once (but not in f64, in which the plain
    /// versions are the truth that tests compare with).
    pub fn route(&self, tensors: &[&Tensor]) -> Route {
        let route = self.find(tensors);
        let rough = tensors.iter().find(|t| t.dtype() != DType::F64);
        if let (Route::Plain, Some(tensor)) = (route, rough) {
            self.say(tensor);
        }
        route
    }

    /// The half type of `tensors`, if no kernel takes it: they are to be computed on in f32 and rounded, as kernels do, where plain
    /// operations would round every sum on the way.
    pub fn rounds(&self, tensors: &[&Tensor]) -> Option<DType> {
        let dtype = tensors.first().map(|t| t.dtype());
        let half = dtype.filter(|t| matches!(t, DType::BF16 | DType::F16))?;
        (self.find(tensors) == Route::Plain).then_some(half)
    }

    /// Whether its CPU kernel takes `tensors`; nothing is said where it does not.
    pub fn runs_here(&self, tensors: &[&Tensor]) -> bool {
        self.find(tensors) == Route::Cpu
    }

    fn find(&self, tensors: &[&Tensor]) -> Route {
        let all = |types: &[DType]| tensors.iter().all(|t| types.contains(&t.dtype()));
        if tensors.iter().all(|t| t.device().is_cpu()) && all(self.cpu) {
            Route::Cpu
        } else if tensors.iter().all(|t| t.device().is_cuda()) && all(self.cuda) && alike(tensors) {
            Route::Cuda
        } else {
            Route::Plain
        }
    }

    fn say(&self, tensor: &Tensor) {
        static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let (dtype, place) = (tensor.dtype(), tensor.device().location());
        let what = format!(
            "{} has no kernel for {} on {place:?}",
            self.op,
            dtype.as_str()
        );
        // Whoever panicked while it held this has left a set of texts behind.
        let mut said = SAID.lock().unwrap_or_else(|e| e.into_inner());
        if said.insert(what.clone()) {
            tracing::warn!(
                "{what}: plain tensor operations compute it, slower and with more memory"
            );
        }
    }
}

fn alike(tensors: &[&Tensor]) -> bool {
    tensors
        .windows(2)
        .all(|pair| pair[0].dtype() == pair[1].dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_kernel_takes_what_it_supports_and_nothing_else() {
        const OP: Kernels = Kernels::f32("an operation");
        let of = |dtype| Tensor::zeros(2, dtype, &Device::Cpu).unwrap();
        let [f32, f64, bf16] = [DType::F32, DType::F64, DType::BF16].map(of);
        assert_eq!(OP.route(&[&f32, &f32]), Route::Cpu);
        assert_eq!(OP.route(&[&f32, &f64]), Route::Plain);
        assert_eq!(OP.route(&[&bf16, &bf16]), Route::Plain);
        assert_eq!(OP.rounds(&[&bf16, &bf16]), Some(DType::BF16));
        assert_eq!(OP.rounds(&[&f64, &f64]), None);
        let both = Kernels {
            cpu: &[DType::F32, DType::BF16],
            ..OP
        };
        assert_eq!(both.route(&[&f32, &bf16]), Route::Cpu);
        assert_eq!(both.rounds(&[&bf16, &f32]), None);
    }
}
