//! One step, or as many as there are tokens, over the state where it stands.

use super::{Mamba2, Mamba2Config, NORM_EPS};
use crate::Result;
use crate::mixer::memory::{Keeps, Span};
use crate::mixer::work::Work;
use crate::op::cpu::entries;
use crate::op::linear::{Part, Stored, products};
use crate::op::rms_norm::gated_row;
use crate::op::team::fill;
use crate::op::{causal_conv, ssd};

/// What decoding needs of the layer.
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: Mamba2Config,
    pub(super) z_proj: Stored,
    pub(super) xbc_proj: Stored,
    pub(super) dt_proj: Stored,
    /// `[W, C]`
    pub(super) taps: Vec<f32>,
    pub(super) bias: Vec<f32>,
    /// `A_log`, `dt_bias`, `D`, `[3, H]`.
    pub(super) params: Vec<f32>,
    pub(super) norm: Vec<f32>,
    pub(super) out_proj: Stored,
}

impl Mamba2 {
    pub(in crate::mixer) fn decoder(&self) -> Result<Decoder> {
        Ok(Decoder {
            config: self.config.clone(),
            z_proj: self.z_proj.stored()?,
            xbc_proj: self.xbc_proj.stored()?,
            dt_proj: self.dt_proj.stored()?,
            taps: entries(&self.conv_weight.t()?)?,
            bias: entries(&self.conv_bias)?,
            params: entries(&self.params()?)?,
            norm: entries(&self.norm)?,
            out_proj: self.out_proj.stored()?,
        })
    }
}

/// Multiplications below which other threads are not worth waking.
const ALONE: usize = 1 << 15;

impl Decoder {
    /// Entries of the convolution's last inputs.
    fn conv(&self) -> usize {
        (self.config.d_conv - 1) * self.config.conv_channels()
    }

    pub(in crate::mixer) fn keeps(&self) -> Keeps {
        let scan = self.config.num_heads * self.config.ssd_shape().kept();
        Keeps {
            state: self.conv() + scan,
            ..Keeps::default()
        }
    }

    /// `u [N, D]` → `out [N, D]`.
    pub(in crate::mixer) fn mix(
        &self,
        layer: usize,
        u: &[f32],
        spans: &mut [Span],
        out: &mut [f32],
        work: &mut Work,
    ) {
        let c = &self.config;
        let (h, di, channels) = (c.num_heads, c.d_inner(), c.conv_channels());
        let projected: usize = c.widths().iter().sum();
        let n = u.len() / self.z_proj.width();
        let Work { scratch, arena, .. } = work;
        let repeated = c.repeat_kv_before_conv && channels != projected;
        let [z, narrow, xbc, mixed, dt, y] = arena.split([
            n * di,
            n * projected,
            if repeated { n * channels } else { 0 },
            n * channels,
            n * h,
            n * di,
        ]);
        let mut parts = [
            Part {
                w: &self.z_proj,
                y: &mut *z,
            },
            Part {
                w: &self.xbc_proj,
                y: &mut *narrow,
            },
            Part {
                w: &self.dt_proj,
                y: &mut *dt,
            },
        ];
        products(u, &mut parts, scratch);
        let xbc = match repeated {
            true => {
                let rows = narrow
                    .chunks_exact(projected)
                    .zip(xbc.chunks_exact_mut(channels));
                rows.for_each(|(narrow, xbc)| self.repeat(narrow, xbc));
                xbc
            }
            false => narrow,
        };
        for span in spans.iter_mut() {
            let rows = span.rows.clone();
            let of = |width: usize| rows.start * width..rows.end * width;
            let (conv, scan) = span.memory.state(layer).split_at_mut(self.conv());
            let mixed = &mut mixed[of(channels)];
            causal_conv::resume(&xbc[of(channels)], &self.taps, &self.bias, conv, mixed);
            let (dt, y) = (&dt[of(h)], &mut y[of(di)]);
            ssd::resume(mixed, dt, &self.params, c.ssd_shape(), scan, y);
        }
        let gate = |i: usize, y: &mut [f32]| {
            gated_row(
                y,
                &z[i * di..][..di],
                &self.norm,
                c.head_dim,
                NORM_EPS as f32,
            );
        };
        fill(n * di >= ALONE, y, di, gate);
        products(
            y,
            &mut [Part {
                w: &self.out_proj,
                y: out,
            }],
            scratch,
        );
    }

    /// Each of the `G` heads of x and B `H/G` times in a row.
    fn repeat(&self, narrow: &[f32], wide: &mut [f32]) {
        let (h, g) = (self.config.num_heads, self.config.num_kv_heads);
        let [x, b, _] = self.config.widths();
        let (mut from, mut to) = (0, 0);
        for width in [x / g, b / g] {
            for _ in 0..g {
                for _ in 0..h / g {
                    wide[to..][..width].copy_from_slice(&narrow[from..][..width]);
                    to += width;
                }
                from += width;
            }
        }
        wide[to..].copy_from_slice(&narrow[from..]);
    }
}
