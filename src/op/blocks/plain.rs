//! What the bytes of a block mean.

use half::f16;

use super::BlockType;

pub(super) fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// The 6-bit scale and minimum of sub-block `j` (of 8) in the 12 bytes of a Q4_K block.
pub(super) fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    match j < 4 {
        true => (packed[j] & 63, packed[j + 4] & 63),
        false => (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        ),
    }
}

/// Code `i` (of 256) of a Q6_K block, 0 to 63: four low bits of `low [128]`, two high ones of `high [64]`.
fn six_bits(low: &[u8], high: &[u8], i: usize) -> u8 {
    let (half, quarter, at) = (i / 128, i % 128 / 32, i % 32);
    let low = low[64 * half + at + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 15;
    let high = high[32 * half + at] >> (2 * quarter) & 3;
    low | high << 4
}

/// The weights of whole blocks.
///
/// # Panics
/// When `bytes` and `out` are not the same number of whole blocks.
pub fn dequantize(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    let (blocks, rest) = (bytes.chunks_exact(kind.bytes()), out.len() % kind.weights());
    assert!(
        blocks.len() == out.len() / kind.weights() && blocks.remainder().is_empty() && rest == 0
    );
    for (block, out) in blocks.zip(out.chunks_exact_mut(kind.weights())) {
        match kind {
            BlockType::Q8_0 => {
                let d = half(block);
                for (x, q) in out.iter_mut().zip(&block[2..]) {
                    *x = d * f32::from(*q as i8);
                }
            }
            BlockType::Q4_0 => {
                let (d, codes) = (half(block), &block[2..]);
                for (i, q) in codes.iter().enumerate() {
                    out[i] = d * f32::from((q & 15) as i8 - 8);
                    out[i + 16] = d * f32::from((q >> 4) as i8 - 8);
                }
            }
            BlockType::Q4K => {
                let (d, min, codes) = (half(block), half(&block[2..]), &block[16..]);
                for (i, x) in out.iter_mut().enumerate() {
                    let (s, m) = scale_min(&block[4..16], i / 32);
                    let q = codes[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 15;
                    *x = d * f32::from(s) * f32::from(q) - min * f32::from(m);
                }
            }
            BlockType::Q6K => {
                let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
                let d = half(&block[208..]);
                for (i, x) in out.iter_mut().enumerate() {
                    let q = six_bits(low, high, i) as i8 - 32;
                    *x = d * f32::from(scales[i / 16] as i8) * f32::from(q);
                }
            }
        }
    }
}
