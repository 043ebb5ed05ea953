//! What this machine can do at most: the denominators of every "share of peak" we print.
//!
//! Each figure is the best of several rounds of over 100 ms in which all threads work at once.
//! Nothing here is a model: it is measured, in the same run as the thing it is compared with,
//! because clocks and neighbours change from hour to hour.

use crate::dispatch::{Isa, best};
use crate::mul_mat::buffer::Buffer;
use crate::pool::Pool;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Best rates of this machine with a given number of threads.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Threads it was measured with.
    pub n_threads: usize,
    /// Bytes per second read from buffers far larger than a thread's own caches.
    pub read: f64,
    /// F32 operations per second; a fused multiply-add is two. 0 where we have no kernels.
    pub fma: f64,
    /// 8-bit integer operations per second of the vector units; 0 without such instructions.
    pub int8: f64,
    /// 8-bit integer operations per second of AMX tiles; 0 without AMX.
    pub int8_amx: f64,
}

impl Peak {
    /// Measures all of it with the pool's threads, best of `n_rounds` rounds each.
    pub fn measure(pool: &Pool, n_rounds: usize) -> Peak {
        let meter = Meter::new(pool);
        let first = meter.round();
        (1..n_rounds).fold(first, |best, _| best.max(meter.round()))
    }

    /// The better rate of both, figure by figure.
    pub fn max(self, other: Peak) -> Peak {
        Peak {
            n_threads: self.n_threads,
            read: self.read.max(other.read),
            fma: self.fma.max(other.fma),
            int8: self.int8.max(other.int8),
            int8_amx: self.int8_amx.max(other.int8_amx),
        }
    }
}

/// Measures rates now and again: where neighbours come and go, right beside what they are compared with.
pub struct Meter<'p> {
    pool: &'p Pool,
    /// What each thread reads.
    buffers: Vec<Buffer>,
}

impl<'p> Meter<'p> {
    /// A meter of the pool's threads; it holds 256 MiB for each of them.
    pub fn new(pool: &'p Pool) -> Meter<'p> {
        let buffers = (0..pool.n_threads())
            .map(|_| {
                let mut buffer = Buffer::zeroed(SWEEP_BYTES);
                // Memory never written to is one page of zeros, which lies in the cache.
                buffer.fill(0x55);
                buffer
            })
            .collect();
        Meter { pool, buffers }
    }

    /// One round of every figure.
    pub fn round(&self) -> Peak {
        let rate = |work: f64, f: &(dyn Fn(usize) + Sync)| rate(self.pool, work, f);
        let of = |kernel: Option<(unsafe fn(), f64)>| match kernel {
            // SAFETY: `kernels` lists only what the best instruction set includes.
            Some((f, work)) => rate(work, &|_| unsafe { f() }),
            None => 0.0,
        };
        let kernels = kernels(best());
        Peak {
            n_threads: self.pool.n_threads(),
            read: rate(SWEEP_BYTES as f64, &|thread| {
                black_box(sweep(&self.buffers[thread]));
            }),
            fma: of(kernels.fma),
            int8: of(kernels.int8),
            int8_amx: of(kernels.int8_amx),
        }
    }
}

/// Bytes each thread reads in a sweep.
const SWEEP_BYTES: usize = 256 << 20;
/// Shortest round that counts: pinning, clocks and page tables settle within it.
const ROUND: Duration = Duration::from_millis(100);

/// Work per second of all threads, where one call of `f` on one thread is `work`.
fn rate(pool: &Pool, work: f64, f: &(dyn Fn(usize) + Sync)) -> f64 {
    let mut calls = 1;
    loop {
        let start = Instant::now();
        pool.run(|thread| (0..calls).for_each(|_| f(thread)));
        let took = start.elapsed();
        if took >= ROUND {
            return work * (calls * pool.n_threads()) as f64 / took.as_secs_f64();
        }
        calls *= 2;
    }
}

/// Reads every byte, in the order and width in which kernels read weights.
fn sweep(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if best() >= Isa::Avx512 {
        // SAFETY: the instruction set is there.
        return unsafe { x86::sweep_512(bytes) };
    }
    #[cfg(target_arch = "x86_64")]
    if best() >= Isa::Avx2 {
        // SAFETY: as above.
        return unsafe { x86::sweep_256(bytes) };
    }
    let mut lanes = [0u64; 32];
    for run in bytes.as_chunks::<256>().0 {
        for (lane, word) in lanes.iter_mut().zip(run.as_chunks::<8>().0) {
            *lane ^= u64::from_ne_bytes(*word);
        }
    }
    lanes.into_iter().fold(0, |a, b| a ^ b)
}

/// Straight-line arithmetic on registers, and the operations in one call.
struct Kernels {
    fma: Option<(unsafe fn(), f64)>,
    int8: Option<(unsafe fn(), f64)>,
    int8_amx: Option<(unsafe fn(), f64)>,
}

#[cfg(target_arch = "x86_64")]
fn kernels(isa: Isa) -> Kernels {
    const STEPS: f64 = x86::STEPS as f64;
    let wide = isa >= Isa::Avx512;
    let avx2 = isa >= Isa::Avx2;
    Kernels {
        fma: if wide {
            Some((x86::fma_512, STEPS * 12.0 * 16.0 * 2.0))
        } else {
            avx2.then_some((x86::fma_256, STEPS * 12.0 * 8.0 * 2.0))
        },
        int8: if wide {
            Some((x86::vnni_512, STEPS * 12.0 * 64.0 * 2.0))
        } else {
            avx2.then_some((x86::maddubs_256, STEPS * 12.0 * 32.0 * 2.0))
        },
        int8_amx: (isa == Isa::Amx).then_some((x86::amx, STEPS * 4.0 * 16.0 * 16.0 * 64.0 * 2.0)),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn kernels(_isa: Isa) -> Kernels {
    Kernels {
        fma: None,
        int8: None,
        int8_amx: None,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Repetitions of the instruction groups below.
    pub(super) const STEPS: usize = 100_000;

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn sweep_512(bytes: &[u8]) -> u64 {
        let mut lanes = [_mm512_setzero_si512(); 4];
        for run in bytes.as_chunks::<256>().0 {
            for (i, lane) in lanes.iter_mut().enumerate() {
                let at = run[64 * i..].as_ptr();
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(4096).cast());
                // SAFETY: 64 bytes of this run.
                let v = unsafe { _mm512_loadu_si512(at.cast()) };
                *lane = _mm512_xor_si512(*lane, v);
            }
        }
        let [a, b, c, d] = lanes;
        let all = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
        _mm512_reduce_or_epi64(all) as u64
    }

    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn sweep_256(bytes: &[u8]) -> u64 {
        let mut lanes = [_mm256_setzero_si256(); 8];
        for run in bytes.as_chunks::<256>().0 {
            for (i, lane) in lanes.iter_mut().enumerate() {
                let at = run[32 * i..].as_ptr();
                if i % 2 == 0 {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(4096).cast());
                }
                // SAFETY: 32 bytes of this run.
                let v = unsafe { _mm256_loadu_si256(at.cast()) };
                *lane = _mm256_xor_si256(*lane, v);
            }
        }
        let all = lanes
            .into_iter()
            .fold(_mm256_setzero_si256(), |a, b| _mm256_or_si256(a, b));
        _mm256_extract_epi64::<0>(all) as u64
    }

    /// A loop of twelve independent instructions, enough to hide a latency of five at two per
    /// cycle. `$regs` names the register class, `$op` is the instruction.
    macro_rules! twelve {
        ($(#[$doc:meta])* $name:ident, $features:literal, $r:literal, $op:literal) => {
            $(#[$doc])*
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name() {
                // SAFETY: registers only.
                unsafe {
                    asm!(
                        "2:",
                        concat!($op, " ", $r, "0, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "1, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "2, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "3, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "4, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "5, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "6, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "7, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "8, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "9, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "10, ", $r, "12, ", $r, "13"),
                        concat!($op, " ", $r, "11, ", $r, "12, ", $r, "13"),
                        "dec {n}",
                        "jnz 2b",
                        n = inout(reg) STEPS => _,
                        inout("xmm12") _mm_setzero_ps() => _,
                        inout("xmm13") _mm_setzero_ps() => _,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                        out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                        out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                        options(nomem, nostack),
                    );
                }
            }
        };
    }
    twelve!(fma_512, "avx512f", "zmm", "vfmadd231ps");
    twelve!(fma_256, "avx2,fma", "ymm", "vfmadd231ps");
    twelve!(vnni_512, "avx512f,avx512vnni", "zmm", "vpdpbusd");
    twelve!(
        /// The multiply of AVX2's three-instruction dot product; the widening and the sum of the
        /// other two come on top, so this is an upper limit.
        maddubs_256, "avx2", "ymm", "vpmaddubsw"
    );

    /// Four tile products per step on two by two tiles.
    pub(super) unsafe fn amx() {
        let config = crate::cpu::amx::CONFIG;
        // SAFETY: the caller has AMX; the tiles are released again.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbssd tmm0, tmm4, tmm6",
                "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6",
                "tdpbssd tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const config,
                n = inout(reg) STEPS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
