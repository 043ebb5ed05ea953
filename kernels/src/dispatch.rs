//! Which instruction set the kernels use: asked of the processor once, then a constant.

use std::sync::OnceLock;

/// An instruction set that has kernels of its own, from plain to wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, the reference every other implementation is compared with.
    Scalar,
    /// AArch64 with dot-product instructions.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with dot products of bytes (AVX-VNNI).
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// [`Isa::Avx512`] with VBMI and AMX tiles for 8-bit integers and BF16, allowed by the kernel.
    Amx,
}

impl Isa {
    /// Lower-case name, as benches and `--version` print it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx-vnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }
}

/// The widest instruction set of this machine.
pub fn best() -> Isa {
    *available().last().expect("scalar is always there")
}

static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();

/// Every instruction set this machine can run, [`Isa::Scalar`] first, the widest last; up to the one
/// that [`limit`] names.
pub fn available() -> &'static [Isa] {
    FOUND.get_or_init(detect)
}

/// Leaves out the instruction sets wider than the one called `name`, to compare them or to see how a
/// smaller machine fares. Before anything else of this crate is used.
///
/// # Errors
/// The names there are, if it is none of them; that it comes too late.
pub fn limit(name: &str) -> Result<(), String> {
    let mut found = detect();
    let Some(widest) = found.iter().position(|isa| isa.name() == name) else {
        let names: Vec<_> = found.iter().map(|isa| isa.name()).collect();
        return Err(format!(
            "this machine has no instruction set `{name}`, but {}",
            names.join(", ")
        ));
    };
    found.truncate(widest + 1);
    FOUND
        .set(found)
        .map_err(|_| format!("`{name}` was named after the instruction set had been chosen"))
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    let mut found = vec![Isa::Scalar];
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    if !avx2 {
        return found;
    }
    found.push(Isa::Avx2);
    if is_x86_feature_detected!("avxvnni") {
        found.push(Isa::AvxVnni);
    }
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni");
    if !avx512 {
        return found;
    }
    found.push(Isa::Avx512);
    if is_x86_feature_detected!("avx512vbmi") && amx_allowed() {
        found.push(Isa::Amx);
    }
    found
}

/// Whether the L1 data cache holds more than 32 KiB: then what is fetched into it some KiB ahead of its
/// use is still there when its turn comes. Processors that do not say are taken to be small.
#[cfg(target_arch = "x86_64")]
pub(crate) fn roomy_l1() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        // Leaves with one cache each, of the same layout: Intel's, AMD's.
        [4, 0x8000_001d].into_iter().any(|leaf: u32| {
            __cpuid(leaf & 0x8000_0000).eax >= leaf
                && (0..8).any(|n| {
                    let cache = __cpuid_count(leaf, n);
                    let is_data = cache.eax & 31 == 1 && cache.eax >> 5 & 7 == 1;
                    let ways = u64::from(cache.ebx >> 22) + 1;
                    let parts = u64::from(cache.ebx >> 12 & 0x3ff) + 1;
                    let line = u64::from(cache.ebx & 0xfff) + 1;
                    let sets = u64::from(cache.ecx) + 1;
                    is_data && ways * parts * line * sets > 32 << 10
                })
        })
    })
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Vec<Isa> {
    let mut found = vec![Isa::Scalar];
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        found.push(Isa::Neon);
    }
    found
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Vec<Isa> {
    vec![Isa::Scalar]
}

/// Whether the processor has AMX tiles for int8 and BF16 and Linux lets this process use them.
#[cfg(target_arch = "x86_64")]
fn amx_allowed() -> bool {
    // CPUID leaf 7: EDX bit 22 amx-bf16, bit 24 amx-tile, bit 25 amx-int8.
    let edx = std::arch::x86_64::__cpuid_count(7, 0).edx;
    if edx & (1 << 22) == 0 || edx & (1 << 24) == 0 || edx & (1 << 25) == 0 {
        return false;
    }
    #[cfg(target_os = "linux")]
    {
        // The tile registers are 8 KiB of state that Linux saves only for processes that ask.
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: arch_prctl with this code takes a plain number and changes only this process.
        unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    }
    #[cfg(not(target_os = "linux"))]
    false
}
