//! Bounds on a model's sizes: far above every published model, and so low that no count of parameters or
//! bytes made from them leaves 63 bits. They are asked before anything is made.

use crate::{Error, Result};

pub const MAX_LAYERS: usize = 1 << 10;
pub const MAX_HEADS: usize = 1 << 12;
/// Of hidden states, latents, and all heads together.
pub const MAX_WIDTH: usize = 1 << 20;
pub const MAX_VOCAB: usize = 1 << 24;
pub const MAX_POSITIONS: usize = 1 << 31;

/// # Errors
/// When `value` is above `most`.
pub fn at_most(name: &str, value: usize, most: usize) -> Result<()> {
    match value <= most {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{name} {value} is above {most}, the most that zebroid takes"
        ))),
    }
}

/// # Errors
/// When `value` is 0 or above `most`.
pub fn bounded(name: &str, value: usize, most: usize) -> Result<()> {
    match value {
        0 => Err(Error::invalid(format!("{name} must not be 0"))),
        _ => at_most(name, value, most),
    }
}

/// # Errors
/// When heads of `dim` dims, side by side, are wider than [`MAX_WIDTH`].
pub fn bounded_heads(name: &str, heads: usize, dim: usize) -> Result<()> {
    match heads.checked_mul(dim) {
        Some(width) if width <= MAX_WIDTH => Ok(()),
        _ => Err(Error::invalid(format!(
            "{name}: {heads} heads of {dim} are wider than {MAX_WIDTH}, the most that zebroid takes"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use crate::mixer::{AttentionConfig, Mamba2Config, MixerConfig, MlaConfig, RopeConfig};

    /// Every size of every mixer, at values whose sums and products would wrap.
    #[test]
    fn every_size_is_bounded() {
        let mla = MixerConfig::Mla(MlaConfig {
            num_attention_heads: 4,
            num_key_value_heads: 2,
            use_full_kv_head: false,
            q_lora_rank: 8,
            kv_lora_rank: 8,
            qk_nope_head_dim: 4,
            qk_rope_head_dim: 4,
            v_head_dim: 8,
            use_lora_layer_norm: false,
            attention_bias: false,
            rope: RopeConfig::new(100.0),
        });
        let attention = MixerConfig::Attention(AttentionConfig::new(4, 2, 8, None));
        let mamba2 = MixerConfig::Mamba2(Mamba2Config {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 8,
            d_state: 8,
            d_conv: 4,
            repeat_kv_before_conv: false,
            chunk_size: 16,
        });
        for config in [mla, attention, mamba2] {
            config.validate().unwrap();
            let json = serde_json::to_value(&config).unwrap();
            for (field, value) in json.as_object().unwrap() {
                // A divisor of the heads: too many of them are met by the heads themselves.
                if !value.is_u64() || field == "num_key_value_heads" || field == "num_kv_heads" {
                    continue;
                }
                for huge in [1 << 33, (1 << 63) - 2, u64::MAX] {
                    let mut json = json.clone();
                    json[field] = huge.into();
                    let read: MixerConfig = serde_json::from_value(json).unwrap();
                    let message = read.validate().unwrap_err().to_string();
                    let wanted = [huge.to_string(), "the most that zebroid takes".into()];
                    assert!(
                        wanted.iter().all(|part| message.contains(part)),
                        "{field}: {message}"
                    );
                }
            }
        }
    }
}
