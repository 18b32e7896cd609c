//! AdamW ([`op::adamw`](crate::op::adamw)), its moments in full or in 8 bits.

use candle_core::{DType, Device, Tensor};

use super::SavedTensors;
use crate::Result;
use crate::op::adamw::{self, AdamW, adamw_8bit, adamw_step};

/// Entries below which a tensor's moments stay in full under 8 bits (bitsandbytes' `min_8bit_size`).
const SMALL: usize = 4096;

fn in_eight_bits(entries: usize, eight_bit: bool) -> bool {
    eight_bit && entries >= SMALL
}

/// First and second moments.
pub enum Moments {
    /// `[2, ..]`
    Full(Tensor),
    EightBit(adamw::Placed),
}

impl Moments {
    /// Before the first step of a parameter like `of`.
    pub fn zeros(of: &Tensor, eight_bit: bool) -> Result<Self> {
        let entries = of.elem_count();
        if in_eight_bits(entries, eight_bit) {
            return Ok(Self::EightBit(adamw::Placed::zeros(entries, of.device())?));
        }
        let moments = Tensor::zeros(full(of.dims()), DType::F32, of.device())?;
        Ok(Self::Full(moments))
    }

    pub fn bytes(entries: usize, eight_bit: bool) -> usize {
        match in_eight_bits(entries, eight_bit) {
            true => adamw::Moments::bytes(entries),
            false => 2 * entries * size_of::<f32>(),
        }
    }

    /// Updates `param` in place.
    pub fn step(
        &mut self,
        param: &Tensor,
        grad: &Tensor,
        grad_scale: f64,
        steps: u64,
        rules: &AdamW,
    ) -> Result<()> {
        Ok(match self {
            Self::Full(moments) => adamw_step(param, grad, moments, grad_scale, steps, rules),
            Self::EightBit(moments) => adamw_8bit(param, grad, moments, grad_scale, steps, rules),
        }?)
    }

    pub fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(match self {
            Self::Full(moments) => vec![(MOMENTS, moments.clone())],
            Self::EightBit(moments) => {
                let [codes, scales] = moments.tensors()?;
                vec![(CODES, codes), (SCALES, scales)]
            }
        })
    }

    pub fn read(saved: &SavedTensors, shape: &[usize]) -> Result<Option<Self>> {
        let entries: usize = shape.iter().product();
        let codes = saved.find(CODES, &[2 * entries])?;
        let scales = saved.find(SCALES, &[2 * entries.div_ceil(adamw::BLOCK)])?;
        if let (Some(codes), Some(scales)) = (codes, scales) {
            let moments = adamw::Placed::read([&codes, &scales], codes.device())?;
            return Ok(Some(Self::EightBit(moments)));
        }
        Ok(saved.find(MOMENTS, &full(shape))?.map(Self::Full))
    }

    pub fn onto(self, device: &Device) -> Result<Self> {
        Ok(match self {
            Self::Full(moments) => Self::Full(moments.to_device(device)?),
            Self::EightBit(moments) => {
                let [codes, scales] = moments.tensors()?;
                Self::EightBit(adamw::Placed::read([&codes, &scales], device)?)
            }
        })
    }
}

/// Both moments of a parameter of this shape.
fn full(shape: &[usize]) -> Vec<usize> {
    [&[2], shape].concat()
}

const MOMENTS: &str = "moments";
const CODES: &str = "codes";
const SCALES: &str = "scales";
