//! `--device auto|cpu|cuda:N|metal`.

use candle_core::Device;

use crate::op::cuda::{check_all, record_steps};
use crate::weights::{Frozen, Place};
use crate::{Error, Result};

/// Why a device is not taken unasked.
fn reserve(device: &str) -> &'static str {
    match device.starts_with("cuda") {
        true => "its kernels have run on an emulator only, on no GPU yet",
        false => {
            "it has no kernels yet, and the plain versions that stand in for them are slow and large (that of SSD: about 410 GB for a 1B \
             hybrid at 8 x 2,048 tokens)"
        }
    }
}

#[derive(Debug, Clone, clap::Args)]
pub struct DeviceArg {
    /// Where to compute: auto (the CPU, until accelerators have kernels), cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: String,
    /// What is not trained: as the file has it (on the CPU), or widened once.
    #[arg(long, value_enum, default_value = "stored", hide_short_help = true)]
    frozen: Frozen,
    /// Stop at the first CUDA kernel that leaves something that is no number (each launch is waited for: slow).
    #[arg(long, hide_short_help = true)]
    check: bool,
    /// Record steps of decoding as CUDA graphs and play them again (has never run on a GPU).
    #[arg(long, hide_short_help = true)]
    cuda_graphs: bool,
}

impl DeviceArg {
    /// # Errors
    /// A device that does not exist, or that this binary was not built for.
    pub fn place(&self) -> Result<Place> {
        if self.check {
            check_all();
        }
        if self.cuda_graphs {
            record_steps();
        }
        Ok(Place::new(self.get()?, self.frozen))
    }

    fn get(&self) -> Result<Device> {
        match self.device.as_str() {
            "auto" => {
                let (device, said) = automatic(accelerator());
                said.iter().for_each(|said| tracing::warn!("{said}"));
                Ok(device)
            }
            "cpu" => Ok(Device::Cpu),
            "metal" if cfg!(feature = "metal") => {
                tracing::warn!("--device metal: {}", reserve("metal"));
                Device::new_metal(0).map_err(|e| Error::invalid(format!("--device metal: {e}")))
            }
            "metal" => Err(not_built("metal")),
            other => {
                let index = match other.strip_prefix("cuda") {
                    Some("") => Some(0),
                    Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
                    None => None,
                };
                let Some(index) = index else {
                    return Err(Error::invalid(format!(
                        "--device {other}: choose auto, cpu, cuda, cuda:N or metal"
                    )));
                };
                if !cfg!(feature = "cuda") {
                    return Err(not_built("cuda"));
                }
                tracing::warn!("--device {other}: {}", reserve(other));
                cuda(index).map_err(|e| Error::invalid(format!("--device {other}: {e}")))
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> candle_core::Result<Device> {
    crate::op::cuda::open(index)
}

#[cfg(not(feature = "cuda"))]
fn cuda(index: usize) -> candle_core::Result<Device> {
    Device::new_cuda(index)
}

fn not_built(feature: &str) -> Error {
    Error::invalid(format!(
        "this binary was built without {feature}: build it with --features {feature}, or use --device cpu"
    ))
}

/// What `auto` takes, and what is to be said where it leaves an accelerator idle.
fn automatic(idle: Option<&str>) -> (Device, Option<String>) {
    let said = idle.map(|idle| {
        let why = reserve(idle);
        format!("computing on the CPU, not on {idle}: {why}; --device {idle} takes it anyway")
    });
    (Device::Cpu, said)
}

/// Back ends that this binary has, and an accelerator that it can use.
pub fn accelerators() -> (Vec<&'static str>, Option<&'static str>) {
    let built = [
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
    ];
    let built = built.into_iter().filter(|(_, built)| *built);
    (built.map(|(name, _)| name).collect(), accelerator())
}

/// An accelerator of this machine that this binary was built for, as `--device` names it.
fn accelerator() -> Option<&'static str> {
    let cuda = || cfg!(feature = "cuda") && cuda(0).is_ok();
    let metal = || cfg!(feature = "metal") && Device::new_metal(0).is_ok();
    match () {
        () if cuda() => Some("cuda"),
        () if metal() => Some("metal"),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_leaves_accelerators_without_kernels_alone_and_says_so() {
        let (device, said) = automatic(Some("cuda"));
        assert!(device.is_cpu());
        let said = said.unwrap();
        assert!(
            said.contains("not on cuda") && said.contains("--device cuda"),
            "{said}"
        );
        assert!(automatic(None).1.is_none());
    }
}
