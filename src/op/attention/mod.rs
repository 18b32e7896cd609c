use super::Documents;
use candle_core::{Result, Tensor, D};
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, documents: Option<&Documents>) -> Result<Tensor> {
    let (b,t,h,kd)=q.dims4()?; let (_,s,g,vd)=v.dims4()?;
    let q=q.transpose(1,2)?.contiguous()?;
    let rep=|x:&Tensor,d:usize| -> Result<Tensor> { x.reshape((b,s,g,1,d))?.broadcast_as((b,s,g,h/g,d))?.reshape((b,s,h,d))?.transpose(1,2)?.contiguous() };
    let k=rep(&k.contiguous()?,kd)?; let v=rep(&v.contiguous()?,vd)?;
    let mut m=vec![0f32;b*t*s];
    for bi in 0..b { for ti in 0..t { let lo=documents.map_or(0,|d| d.row(bi)[ti] as usize); for si in 0..s { if si>s-t+ti || si<lo { m[(bi*t+ti)*s+si]=-1e30; } } } }
    let m=Tensor::from_vec(m,(b,1,t,s),q.device())?.to_dtype(q.dtype())?;
    let a=(q.matmul(&k.transpose(2,3)?.contiguous()?)?*scale)?.broadcast_add(&m)?;
    let mx=a.max_keepdim(D::Minus1)?.detach();
    let e=a.broadcast_sub(&mx)?.exp()?;
    let p=e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    p.matmul(&v)?.transpose(1,2)?.contiguous()
}
