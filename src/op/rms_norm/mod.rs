use candle_core::{Result, Tensor, D};
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let r = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&r)?.broadcast_mul(weight)
}
pub fn gated_rms_norm(y: &Tensor, z: &Tensor, weight: &Tensor, group: usize, eps: f64) -> Result<Tensor> {
    let x = (y * z.silu()?)?;
    let mut d = x.dims().to_vec(); let n = d.pop().unwrap(); d.push(n/group); d.push(group);
    let g = x.contiguous()?.reshape(d)?;
    let r = (g.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    g.broadcast_div(&r)?.reshape(x.shape())?.broadcast_mul(weight)
}
