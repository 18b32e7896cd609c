//! What stages compute, as recorded figures. They decide whether a result that a program kept is the result that this program
//! would make: every key of a kept result holds [`version`].
//!
//! `assets/numerics.json` has losses, divergences and norms of tiny runs of every stage. A test (`tests/golden/numerics.rs`)
//! computes them anew; when code moves them, it fails until they are recorded again, and with the record all keys move that
//! depend on it. An edit that moves no figure keeps all results. Figures are computed on the CPU: kernels of other devices are
//! held to the CPU's by their own tests.

use std::sync::LazyLock;

use candle_core::{Device, DeviceLocation};
use serde_json::Value;

use crate::hash::Hash;

/// What keeps results of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Calibration,
    /// Mixers born from attention weights, and ranks.
    Init,
    Ild,
    Kd,
    Dpo,
    Pretrain,
    /// Sensitivity scores.
    Scores,
    /// KL to the teacher and what is measured with it.
    Kl,
    Harness,
}

impl Stage {
    pub const ALL: [Stage; 9] = [
        Stage::Calibration,
        Stage::Init,
        Stage::Ild,
        Stage::Kd,
        Stage::Dpo,
        Stage::Pretrain,
        Stage::Scores,
        Stage::Kl,
        Stage::Harness,
    ];

    /// In the record.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Calibration => "calibration",
            Stage::Init => "init",
            Stage::Ild => "ild",
            Stage::Kd => "kd",
            Stage::Dpo => "dpo",
            Stage::Pretrain => "pretrain",
            Stage::Scores => "scores",
            Stage::Kl => "kl",
            Stage::Harness => "harness",
        }
    }
}

static RECORD: LazyLock<Value> = LazyLock::new(|| {
    let text = include_str!("../assets/numerics.json");
    serde_json::from_str(text).expect("a test reads the record")
});

/// What a stage computes, and on which kind of device: two results may be exchanged if this is equal and all that went in.
pub fn version(stage: Stage, device: &Device) -> String {
    version_at(stage, device.location())
}

fn version_at(stage: Stage, place: DeviceLocation) -> String {
    let kind = match place {
        DeviceLocation::Cpu => "cpu",
        DeviceLocation::Cuda { .. } => "cuda",
        DeviceLocation::Metal { .. } => "metal",
    };
    let figures = RECORD[stage.name()].to_string();
    format!("{kind} {}", Hash::of(figures.as_bytes()))
}

/// Of all stages together.
pub fn fingerprint() -> Hash {
    Hash::of(RECORD.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn stages_and_kinds_of_devices_are_told_apart() {
        let cuda = |gpu_id| DeviceLocation::Cuda { gpu_id };
        let places = [
            DeviceLocation::Cpu,
            cuda(0),
            DeviceLocation::Metal { gpu_id: 0 },
        ];
        let all = Stage::ALL.map(|stage| places.map(|place| version_at(stage, place)));
        let different: BTreeSet<&String> = all.iter().flatten().collect();
        assert_eq!(different.len(), 27);
        assert_eq!(
            version_at(Stage::Kd, cuda(0)),
            version_at(Stage::Kd, cuda(1))
        );
        assert_eq!(version(Stage::Kd, &Device::Cpu), all[3][0]);
    }
}
