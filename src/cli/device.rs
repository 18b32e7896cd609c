//! `--device auto|cpu|cuda:N|metal`.

use candle_core::Device;

use crate::{Error, Result};

#[derive(Debug, Clone, clap::Args)]
pub struct DeviceArg {
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: String,
}

impl DeviceArg {
    /// # Errors
    /// A device that does not exist, or that this binary was not built for.
    pub fn get(&self) -> Result<Device> {
        match self.device.as_str() {
            "auto" => Ok(accelerator(0).unwrap_or(Device::Cpu)),
            "cpu" => Ok(Device::Cpu),
            "metal" if cfg!(feature = "metal") => {
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
                Device::new_cuda(index)
                    .map_err(|e| Error::invalid(format!("--device {other}: {e}")))
            }
        }
    }
}

fn not_built(feature: &str) -> Error {
    Error::invalid(format!(
        "this binary was built without {feature}: build it with --features {feature}, or use --device cpu"
    ))
}

fn accelerator(index: usize) -> Option<Device> {
    if cfg!(feature = "cuda") {
        Device::new_cuda(index).ok()
    } else if cfg!(feature = "metal") {
        Device::new_metal(index).ok()
    } else {
        None
    }
}
