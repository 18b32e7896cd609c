//! Which vector instructions the kernels that are written for them use.

use std::sync::OnceLock;

/// From the plainest to the widest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the architecture has.
    Portable,
    /// x86-64 with AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// The same with tiles for products in bf16 (AMX).
    Amx,
}

/// Forces one: `portable`, `avx2`, `avx512` or `amx`.
pub const VARIABLE: &str = "ZEBROID_ISA";

impl Level {
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    fn is_here(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => {
                Self::Avx512.is_here() && is_x86_feature_detected!("avx512bf16") && tiles()
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

/// Compiles a block for the widest vectors of this processor too, and runs it there: as far as it is written out, or calls what is
/// `#[inline(always)]`.
macro_rules! vectorised {
    ($work:expr) => {
        $crate::op::isa::Isa::here().run(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorised;

/// Instructions that this processor has: there is no other `Isa`, so whoever holds one may use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Level);

impl Isa {
    /// All of this processor.
    pub fn found() -> impl Iterator<Item = Self> {
        let levels = Level::ALL.into_iter().filter(|level| level.is_here());
        levels.map(Self)
    }

    /// What [`vectorised`] is.
    #[inline(always)]
    pub fn run<R>(self, work: impl FnOnce() -> R) -> R {
        match self.0 {
            Level::Portable => portable(work),
            // SAFETY: an `Isa` is of this processor.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Level::Avx2 => unsafe { avx2(work) },
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Level::Avx512 | Level::Amx => unsafe { avx512(work) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("not on this architecture"),
        }
    }

    pub fn level(self) -> Level {
        self.0
    }

    /// The last that is [found](Self::found).
    pub fn widest() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| Self::found().last().unwrap_or(Self(Level::Portable)))
    }

    /// The widest that this processor has, or the one that the environment names. Found once.
    pub fn here() -> Self {
        static FOUND: OnceLock<Isa> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let widest = Self::widest();
            let Ok(wanted) = std::env::var(VARIABLE) else {
                return widest;
            };
            let named = Self::found().find(|isa| isa.0.name() == wanted);
            named.unwrap_or_else(|| {
                let names: Vec<_> = Self::found().map(|isa| isa.0.name()).collect();
                tracing::warn!(
                    "{VARIABLE}={wanted}: this processor has {}; {} is taken",
                    names.join(", "),
                    widest.0.name()
                );
                widest
            })
        })
    }
}

/// Whether the processor has tiles for bf16, and the kernel lets this process use them: their registers are so large that it has to be asked.
#[cfg(target_arch = "x86_64")]
fn tiles() -> bool {
    const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
    let has = std::arch::x86_64::__cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES;
    has && permitted()
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: it asks for a permission of the process, and has no pointers.
    #[allow(unsafe_code)]
    let refused = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) };
    refused == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn permitted() -> bool {
    false
}

#[inline(never)]
fn portable<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
fn avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
fn avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The laws of all ops and mixers, once more for each set of instructions that this processor has.
    #[test]
    fn every_level_keeps_the_laws() {
        if std::env::var_os(VARIABLE).is_some() {
            return;
        }
        for isa in Isa::found().filter(|isa| *isa != Isa::here()) {
            let mut tests = std::process::Command::new(std::env::current_exe().unwrap());
            tests.args(["op::", "mixer::tests"]);
            let output = tests.env(VARIABLE, isa.level().name()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{:?}: {said}", isa.level());
            assert!(!said.contains("running 0 tests"), "{said}");
        }
    }
}
