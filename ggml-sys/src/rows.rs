//! Dot products over quantized rows: the fallback of `mul_mat` for types without a kernel of ours.
//!
//! `build.rs` compiles ggml's row functions for the baseline and once per instruction set; a table
//! pairs each baseline function with its namesake. Here the best set for the running CPU is chosen
//! once, and functions of ggml's type table are looked up in it.

use std::sync::LazyLock;

use crate::{Error, Type, init, raw};

/// One line of a table that `build.rs` generates; a null pair ends it.
#[repr(C)]
struct RowPair {
    baseline: Option<unsafe extern "C" fn()>,
    here: Option<unsafe extern "C" fn()>,
}

struct RowSet {
    name: &'static str,
    table: *const RowPair,
    supported: bool,
}

// SAFETY: the table is a constant.
unsafe impl Sync for RowSet {}
// SAFETY: as above.
unsafe impl Send for RowSet {}

#[cfg(target_arch = "x86_64")]
fn sets() -> Vec<RowSet> {
    unsafe extern "C" {
        static mneme_rows_avx2: [RowPair; 0];
        static mneme_rows_avx512: [RowPair; 0];
    }
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    vec![
        RowSet {
            name: "avx512",
            table: &raw const mneme_rows_avx512 as *const RowPair,
            supported: avx512,
        },
        RowSet {
            name: "avx2",
            table: &raw const mneme_rows_avx2 as *const RowPair,
            supported: avx2,
        },
    ]
}

#[cfg(target_arch = "aarch64")]
fn sets() -> Vec<RowSet> {
    unsafe extern "C" {
        static mneme_rows_dotprod: [RowPair; 0];
    }
    let dotprod = std::arch::is_aarch64_feature_detected!("dotprod")
        && std::arch::is_aarch64_feature_detected!("fp16");
    vec![RowSet {
        name: "dotprod",
        table: &raw const mneme_rows_dotprod as *const RowPair,
        supported: dotprod,
    }]
}

static BEST: LazyLock<Option<RowSet>> =
    LazyLock::new(|| sets().into_iter().find(|set| set.supported));

/// The instruction set whose row functions run here: `avx512`, `avx2`, `dotprod` or `baseline`.
pub fn row_set() -> &'static str {
    BEST.as_ref().map_or("baseline", |set| set.name)
}

/// The namesake of a baseline function in a set; the function itself if the set has none.
fn namesake(set: Option<&RowSet>, baseline: unsafe extern "C" fn()) -> unsafe extern "C" fn() {
    let Some(set) = set else { return baseline };
    let mut pair = set.table;
    loop {
        // SAFETY: the table ends with a pair of nulls, where the loop returns.
        let RowPair {
            baseline: Some(from),
            here: Some(to),
        } = (unsafe { &*pair })
        else {
            return baseline;
        };
        if std::ptr::fn_addr_eq(*from, baseline) {
            return *to;
        }
        // SAFETY: this pair was not the last.
        pair = unsafe { pair.add(1) };
    }
}

type VecDot = unsafe extern "C" fn(
    std::ffi::c_int,
    *mut f32,
    usize,
    *const std::ffi::c_void,
    usize,
    *const std::ffi::c_void,
    usize,
    std::ffi::c_int,
);
type FromFloat = unsafe extern "C" fn(*const f32, *mut std::ffi::c_void, i64);

/// How rows of one weight type are multiplied: activations are brought to
/// [`activation_type`](RowDot::activation_type) once, then every weight row is dotted with them.
#[derive(Clone, Copy)]
pub struct RowDot {
    weight: Type,
    activation: Type,
    vec_dot: VecDot,
    from_float: FromFloat,
}

impl RowDot {
    /// The functions for a weight type, `None` if ggml has no dot product for it (integer types,
    /// `q8_1`, `q8_K`).
    pub fn new(weight: Type) -> Option<RowDot> {
        RowDot::with_set(weight, BEST.as_ref())
    }

    /// The functions for a weight type in every set that runs here, the baseline included, each with
    /// its name: for tests.
    pub fn all(weight: Type) -> Vec<(&'static str, RowDot)> {
        let sets = sets();
        let supported = sets.iter().filter(|set| set.supported).map(Some);
        std::iter::once(None)
            .chain(supported)
            .filter_map(|set| {
                let name = set.map_or("baseline", |set| set.name);
                Some((name, RowDot::with_set(weight, set)?))
            })
            .collect()
    }

    fn with_set(weight: Type, set: Option<&RowSet>) -> Option<RowDot> {
        init();
        // SAFETY: a `Type` is in range, and the table is a constant.
        let traits = unsafe { &*raw::ggml_get_type_traits_cpu(weight.id()) };
        let vec_dot: VecDot = traits.vec_dot?;
        let activation = Type::from_id(traits.vec_dot_type)?;
        // SAFETY: as above.
        let traits = unsafe { &*raw::ggml_get_type_traits_cpu(activation.id()) };
        let from_float: FromFloat = traits.from_float?;
        // SAFETY: function pointers keep their signature through the table, which pairs functions
        // of the same declaration; the set's instructions were detected.
        unsafe {
            let vec_dot = namesake(
                set,
                std::mem::transmute::<VecDot, unsafe extern "C" fn()>(vec_dot),
            );
            let from_float = namesake(
                set,
                std::mem::transmute::<FromFloat, unsafe extern "C" fn()>(from_float),
            );
            Some(RowDot {
                weight,
                activation,
                vec_dot: std::mem::transmute::<unsafe extern "C" fn(), VecDot>(vec_dot),
                from_float: std::mem::transmute::<unsafe extern "C" fn(), FromFloat>(from_float),
            })
        }
    }

    /// The type of the weight rows.
    pub fn weight_type(&self) -> Type {
        self.weight
    }

    /// The type that activations are brought to: `q8_0`, `q8_1`, `q8_K`, or the weight's own float type.
    pub fn activation_type(&self) -> Type {
        self.activation
    }

    /// Brings one row of activations to the activation type. `out` has
    /// `activation_type().row_bytes(x.len())` bytes at a multiple of 4.
    pub fn quantize_activation(&self, x: &[f32], out: &mut [u8]) -> Result<(), Error> {
        let ty = self.activation;
        let expected = crate::row_bytes(ty, x.len())?;
        check_len("activation row", expected, out.len())?;
        check_aligned("activation row", out)?;
        // SAFETY: whole blocks, and the destination holds them at an aligned address.
        unsafe { (self.from_float)(x.as_ptr(), out.as_mut_ptr().cast(), x.len() as i64) };
        Ok(())
    }

    /// Dots one weight row of `n` values with one row of prepared activations, which lies at a multiple
    /// of 4. A weight row may lie anywhere: no weight type has a member wider than 2 bytes except F32,
    /// and rows of a GGUF tensor keep to that.
    pub fn dot(&self, n: usize, weight: &[u8], activation: &[u8]) -> Result<f32, Error> {
        check_len(
            "weight row",
            crate::row_bytes(self.weight, n)?,
            weight.len(),
        )?;
        let expected = crate::row_bytes(self.activation, n)?;
        check_len("activation row", expected, activation.len())?;
        check_aligned("activation row", activation)?;
        if self.weight == Type::F32 {
            check_aligned("weight row", weight)?;
        }
        let n = i32::try_from(n).map_err(|_| Error::Length {
            what: "row of values",
            expected: i32::MAX as usize,
            got: n,
        })?;
        let mut sum = 0.0;
        // SAFETY: both rows hold n values in whole blocks. One row at a time (nrc = 1), so the strides
        // are not read.
        unsafe {
            (self.vec_dot)(
                n,
                &raw mut sum,
                0,
                weight.as_ptr().cast(),
                0,
                activation.as_ptr().cast(),
                0,
                1,
            );
        }
        Ok(sum)
    }
}

/// The widest member of any block struct is a 4-byte float.
fn check_aligned(what: &'static str, bytes: &[u8]) -> Result<(), Error> {
    if bytes.as_ptr().cast::<u32>().is_aligned() {
        Ok(())
    } else {
        Err(Error::Alignment { what })
    }
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            got,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table whose names no longer match would fall back to the slow baseline in silence.
    #[test]
    fn every_set_replaces_the_baseline() {
        for name in ["q5_0", "q4_K", "iq4_xs", "iq2_xxs", "tq1_0"] {
            let ty = Type::from_name(name).unwrap();
            let all = RowDot::all(ty);
            for (set, row_dot) in &all[1..] {
                assert!(
                    !std::ptr::fn_addr_eq(row_dot.vec_dot, all[0].1.vec_dot),
                    "{name}: set {set} has no vec_dot of its own"
                );
            }
            let supported = sets().iter().filter(|set| set.supported).count();
            assert_eq!(all.len(), supported + 1);
        }
    }
}
