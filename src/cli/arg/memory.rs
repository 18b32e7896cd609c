//! `--cache-type`, `--cache-memory`: what sequences remember while text is generated.

use crate::mixer::CacheType;

#[derive(Debug, Clone, clap::Args)]
pub struct MemoryArg {
    /// How cached keys, values and latents are kept: f32, f16 or int8 (recurrent states are f32).
    #[arg(long, default_value = "f16")]
    pub cache_type: CacheType,
    /// Memory for the caches and states of all sequences, as 512MiB or 4GiB [default: half of what is free].
    #[arg(long, value_parser = size)]
    pub cache_memory: Option<usize>,
}

/// A number of bytes, with K, M or G (and iB or B) behind it.
pub fn size(text: &str) -> Result<usize, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kib" | "kb" => 1 << 10,
        "m" | "mib" | "mb" => 1 << 20,
        "g" | "gib" | "gb" => 1 << 30,
        _ => return Err(format!("unit {unit:?}: choose KiB, MiB or GiB")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "not a number of bytes".to_owned())?;
    Ok((number * factor as f64) as usize)
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("512", 512),
            ("1.5GiB", 3 << 29),
            ("2 k", 2048),
            ("3MB", 3 << 20),
        ] {
            assert_eq!(size(text), Ok(bytes));
        }
        assert!(size("4 parsecs").unwrap_err().contains("GiB"));
        assert!(size("GiB").is_err());
    }
}
