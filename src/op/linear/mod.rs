use candle_core::{Result, Tensor};
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut d=x.dims().to_vec(); let i=d.pop().unwrap(); let n: usize=d.iter().product(); d.push(w.dim(0)?);
    x.contiguous()?.reshape((n,i))?.matmul(&w.t()?)?.reshape(d)
}
