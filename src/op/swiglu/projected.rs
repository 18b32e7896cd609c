//! SwiGLU and the two products before it as one operation: candle adds a gradient to zeros for every input of an operation, and what the
//! products give, the widest tensors of a layer, is no input of this one (KD's steps are 2 to 3 % faster).

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};

use super::{KERNELS, cpu, swiglu};
use crate::op::cpu::{host, slice};
use crate::op::linear::{Matrix, linear, output};
use crate::op::matmul::{View, add_product, product};

/// `silu(x gateᵀ) · (x upᵀ)`: `x [.., K]`, `gate` and `up` `[N, K]` → `[.., N]`.
pub fn swiglu_of(x: &Tensor, gate: &Matrix, up: &Matrix) -> Result<Tensor> {
    if let (Matrix::Dense(gate), Matrix::Dense(up)) = (gate, up)
        && KERNELS.runs_here(&[x, gate, up])
        && gate.dims() == up.dims()
        && gate.rank() == 2
        && x.dims().last() == gate.dims().last()
    {
        let learns = [x, gate, up].iter().any(|of| of.track_op());
        let op = Projected(learns.then(Mutex::default));
        let [x, gate, up] = [x, gate, up].map(|of| of.contiguous());
        return x?.apply_op3(&gate?, &up?, op);
    }
    swiglu(&linear(x, gate)?, &linear(x, up)?)
}

/// `x gateᵀ` and `x upᵀ`, each `[M, N]`.
type Projections = [Vec<f32>; 2];

/// Where something learns: the projections, until they become gradients.
struct Projected(Option<Mutex<Option<Projections>>>);

fn project(x: View, weights: [View; 2]) -> Projections {
    weights.map(|w| product(x, w.transposed()))
}

impl CustomOp3 for Projected {
    fn name(&self) -> &'static str {
        "swiglu_of"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_at: &Layout,
        gate: &CpuStorage,
        gate_at: &Layout,
        up: &CpuStorage,
        up_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (outs, ins) = gate_at.shape().dims2()?;
        let x = View::rows(slice(x, x_at)?, x_at.shape().elem_count() / ins, ins);
        let [gate, up] = [slice(gate, gate_at)?, slice(up, up_at)?];
        let projections = project(x, [gate, up].map(|w| View::rows(w, outs, ins)));
        let y = cpu::forward(&projections[0], &projections[1]);
        if let Some(kept) = &self.0 {
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(projections);
        }
        Ok((CpuStorage::F32(y), output(x_at.dims(), outs)))
    }

    /// Of projections `g`, `u` with gradients `dg`, `du`: `dx = dg gate + du up`, `dgate = dgᵀ x`, `dup = duᵀ x`.
    fn bwd(
        &self,
        x: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (outs, ins) = gate.dims2()?;
        let m = x.elem_count() / ins;
        let dy = dy.contiguous()?;
        let ((x_in, x_at), (dy_in, dy_at)) = (x.storage_and_layout(), dy.storage_and_layout());
        let ((gate_in, gate_at), (up_in, up_at)) =
            (gate.storage_and_layout(), up.storage_and_layout());
        let entries = View::rows(slice(host(&x_in)?, x_at)?, m, ins);
        let weights = [
            slice(host(&gate_in)?, gate_at)?,
            slice(host(&up_in)?, up_at)?,
        ];
        let weights = weights.map(|w| View::rows(w, outs, ins));
        let kept = self.0.as_ref().and_then(|kept| {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.take()
        });
        // Whoever goes back a second time has them computed anew.
        let [mut dg, mut du] = kept.unwrap_or_else(|| project(entries, weights));
        cpu::backward(&mut dg, &mut du, slice(host(&dy_in)?, dy_at)?);
        let [dg, du] = [&dg, &du].map(|of| View::rows(of, m, outs));
        let dx = x.track_op().then(|| {
            let mut dx = product(dg, weights[0]);
            add_product(&mut dx, du, weights[1]);
            Tensor::from_vec(dx, x.shape(), &Device::Cpu)
        });
        let of_weight = |w: &Tensor, d: View| {
            let dw = w.track_op().then(|| product(d.transposed(), entries));
            dw.map(|dw| Tensor::from_vec(dw, w.shape(), &Device::Cpu))
                .transpose()
        };
        Ok((dx.transpose()?, of_weight(gate, dg)?, of_weight(up, du)?))
    }
}
