//! Rotary position embedding (Su et al. 2021).
use candle_core::{Result, Tensor};

/// Which dims of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Dim `i` with `i + D/2` (Hugging Face Llama).
    Halves,
    /// Dim `2i` with `2i + 1` (DeepSeek, the reference MLA).
    Interleaved,
}

/// `x [B, T, H, D]`, `cos, sin [T, D/2]` → `[B, T, H, D]`, every dim staying where it was.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    let (b,t,h,d)=x.dims4()?;
    let (c,s)=(cos.reshape((1,t,1,d/2))?, sin.reshape((1,t,1,d/2))?);
    match layout {
      RopeLayout::Halves => {
        let (a,bb)=(x.narrow(3,0,d/2)?, x.narrow(3,d/2,d/2)?);
        Tensor::cat(&[(a.broadcast_mul(&c)? - bb.broadcast_mul(&s)?)?, (bb.broadcast_mul(&c)?+a.broadcast_mul(&s)?)?],3)
      }
      RopeLayout::Interleaved => {
        let p=x.contiguous()?.reshape((b,t,h,d/2,2))?;
        let (a,bb)=(p.narrow(4,0,1)?.squeeze(4)?, p.narrow(4,1,1)?.squeeze(4)?);
        Tensor::stack(&[(a.broadcast_mul(&c)? - bb.broadcast_mul(&s)?)?, (bb.broadcast_mul(&c)?+a.broadcast_mul(&s)?)?],4)?.reshape((b,t,h,d))
      }
    }
}
