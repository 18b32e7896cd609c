//! What a forecast knows of the device it is for: figures of `assets/devices.toml`, or this machine's own, measured.

use std::hint::black_box;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::op::matmul::{View, product, roughly};
use crate::op::runtime::free_memory;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    pub name: String,
    pub about: String,
    /// In bytes; of a processor what is free.
    pub memory: f64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Additions and multiplications a second in products of matrices.
    pub f32: f64,
    /// The same in bf16, where it has units for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16: Option<f64>,
    /// Where the figures are from.
    pub source: String,
}

/// This machine, whose figures are measured.
pub const CPU: &str = "cpu";

/// Share of a device's rate that training is taken to reach: an assumption. Large runs on accelerators report 0.35 to 0.45 (PaLM,
/// arXiv 2204.02311, 4.1; Llama 3, arXiv 2407.21783, 3.3.2).
pub const UTILISATION: f64 = 0.4;

const DEVICES: &str = include_str!("../../assets/devices.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    device: Vec<Device>,
}

impl Device {
    /// Those with known figures.
    pub fn known() -> Vec<Self> {
        let file: File = toml::from_str(DEVICES).expect("a fixed file, read by a test");
        file.device
    }

    /// # Errors
    /// A name that is neither known nor `cpu`.
    pub fn named(name: &str) -> Result<Self> {
        if name == CPU {
            return Ok(Self::measured());
        }
        let known = Self::known();
        let names: Vec<&str> = known.iter().map(|device| device.name.as_str()).collect();
        let names = names.join(", ");
        let found = known.iter().find(|device| device.name == name);
        found
            .cloned()
            .ok_or_else(|| Error::invalid(format!("--device-spec {name}: choose {CPU}, {names}")))
    }

    /// This machine, of whose figures only the free memory is known.
    pub fn here() -> Self {
        Self {
            name: CPU.into(),
            about: "this machine".into(),
            memory: free_memory().map_or(f64::INFINITY, |free| free as f64),
            bandwidth: f64::INFINITY,
            f32: f64::INFINITY,
            bf16: None,
            source: "not measured".into(),
        }
    }

    /// This machine: its free memory, a product of matrices of a thousand rows as a training step takes it and a copy of 256 MB, the best of
    /// three each.
    fn measured() -> Self {
        const N: usize = 1024;
        let here = Self::here();
        let matrix: Vec<f32> = (0..N * N).map(|i| (i % 251) as f32).collect();
        let view = View::rows(&matrix, N, N);
        let product = best(|| {
            black_box(roughly(|| product(view, view)));
        });
        let from = vec![1u8; 1 << 28];
        let mut to = vec![0u8; 1 << 28];
        let copy = best(|| to.copy_from_slice(&from));
        black_box(&to);
        Self {
            about: format!("this machine, {} threads", rayon::current_num_threads()),
            // Read and written.
            bandwidth: 2.0 * from.len() as f64 / copy,
            f32: 2.0 * (N * N * N) as f64 / product,
            source: "measured now, beside whatever else runs".into(),
            ..here
        }
    }

    pub fn is_cpu(&self) -> bool {
        self.name == CPU
    }

    /// Of so many operations at `rate` and so many bytes moved besides.
    pub fn seconds(&self, rate: f64, operations: f64, moved: f64) -> f64 {
        operations / (UTILISATION * rate) + moved / self.bandwidth
    }
}

/// Seconds.
fn best(mut work: impl FnMut()) -> f64 {
    let times = (0..3).map(|_| {
        let started = Instant::now();
        work();
        started.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_devices_have_plausible_figures_and_sources() {
        let known = Device::known();
        assert!(known.len() >= 4);
        for device in known {
            let bf16 = device.bf16.unwrap();
            assert!((1e10..1e12).contains(&device.memory), "{device:?}");
            assert!((1e12..1e13).contains(&device.bandwidth), "{device:?}");
            assert!(device.f32 < bf16 && bf16 < 1e16, "{device:?}");
            assert!(!device.source.is_empty());
        }
        let error = Device::named("abacus").unwrap_err().to_string();
        assert!(
            error.contains("abacus") && error.contains("h200"),
            "{error}"
        );
    }
}
