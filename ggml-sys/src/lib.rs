//! ggml as mneme uses it: the table of tensor types, the quantizers, and the dot products over
//! quantized rows, behind functions that check every precondition. ggml aborts the process when one
//! is broken, so nothing here calls it before the check.
//!
//! [`raw`] holds the generated bindings, graph functions included, for benches and oracle tests.
//!
//! # What is compiled, and for which CPU
//! ggml's code is compiled for the architecture's baseline, so an executable starts on any CPU of
//! the architecture, and quantizers give the same bytes wherever they were built. The row functions
//! ([`RowDot`]) exist once more per instruction set and are chosen at run time ([`row_set`]). The
//! feature `native` compiles the CPU code for the build machine: use it for benches only.

use std::ffi::CStr;
use std::fmt;
use std::sync::Once;

mod rows;
pub use rows::{RowDot, row_set};

/// The generated bindings. Everything in here is unsafe and aborts on misuse.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unsafe_op_in_unsafe_fn
)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
pub mod raw {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

/// Version of the compiled ggml, such as `0.26.0`.
pub const GGML_VERSION: &str = env!("GGML_VERSION");

/// Largest magnitude that a block quantizer accepts. The scale of a block is an F16 (at most 65,504)
/// times at most 127, so larger values cannot be stored; and far beyond, sums of squares overflow and
/// ggml's search over codebooks aborts.
pub const MAX_QUANTIZABLE: f32 = 1e6;

/// Why a call was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The type has no quantizer (integer types, `q8_1`, `q8_K`).
    #[error("type {ty} cannot be written: ggml has no quantizer for it")]
    NoQuantizer {
        /// The type asked for.
        ty: Type,
    },
    /// The type cannot be turned into F32 by ggml (integer types, `q8_1`).
    #[error("type {ty} cannot be converted to f32")]
    NoDequantizer {
        /// The type asked for.
        ty: Type,
    },
    /// A row is not a whole number of blocks.
    #[error("rows of {n_cols} values do not fit type {ty}, whose blocks hold {block}")]
    RaggedRow {
        /// The type asked for.
        ty: Type,
        /// Values per row.
        n_cols: usize,
        /// Values per block.
        block: usize,
    },
    /// A slice has the wrong length.
    #[error("{what}: expected a length of {expected}, got {got}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements expected.
        expected: usize,
        /// Elements given.
        got: usize,
    },
    /// A row starts at an address that its type cannot.
    #[error("{what} is not aligned to 4 bytes")]
    Alignment {
        /// Which slice.
        what: &'static str,
    },
    /// The type needs an importance matrix.
    #[error("type {ty} needs an importance matrix")]
    NeedsImatrix {
        /// The type asked for.
        ty: Type,
    },
    /// A value is NaN or infinite, or too large for the type.
    #[error("value {value} at row {row}, column {col} cannot be stored as {ty}")]
    Value {
        /// The type asked for.
        ty: Type,
        /// Row of the value.
        row: usize,
        /// Column of the value.
        col: usize,
        /// The value.
        value: f32,
    },
    /// An importance is negative, NaN, infinite, or zero over a whole codebook group, or the product
    /// with the values overflows.
    #[error("importance {value} at column {col} is unusable for type {ty}")]
    Imatrix {
        /// The type asked for.
        ty: Type,
        /// Column of the importance.
        col: usize,
        /// The importance.
        value: f32,
    },
}

/// A tensor type that this ggml knows. Holding one proves the id valid, so the getters are safe.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Type(u32);

impl Type {
    /// The type with this id in a GGUF file; `None` for ids that ggml has removed (4, 5, 31..=33,
    /// 36..=38) or does not know.
    pub fn from_id(id: u32) -> Option<Type> {
        if id >= raw::GGML_TYPE_COUNT {
            return None;
        }
        // Removed types keep a row with a block size of zero.
        let traits = traits_of(id);
        (traits.blck_size > 0 && traits.type_size > 0).then_some(Type(id))
    }

    /// The type with this name, as `name` gives it; upper and lower case are the same.
    pub fn from_name(name: &str) -> Option<Type> {
        Type::all().find(|ty| ty.name().eq_ignore_ascii_case(name))
    }

    /// Every type, ascending by id.
    pub fn all() -> impl Iterator<Item = Type> {
        (0..raw::GGML_TYPE_COUNT).filter_map(Type::from_id)
    }

    /// The id in a GGUF file.
    pub fn id(self) -> u32 {
        self.0
    }

    /// ggml's name, such as `q4_K`.
    pub fn name(self) -> &'static str {
        let name = traits_of(self.0).type_name;
        // SAFETY: every row with a block size has a name, a C literal, which is ASCII.
        unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("?")
    }

    /// Values per block.
    pub fn block_size(self) -> usize {
        traits_of(self.0).blck_size as usize
    }

    /// Bytes per block.
    pub fn type_size(self) -> usize {
        traits_of(self.0).type_size
    }

    /// Whether values are stored as codes with a scale.
    pub fn is_quantized(self) -> bool {
        traits_of(self.0).is_quantized
    }

    /// Bytes of `n` values; `None` if `n` is not a whole number of blocks or the product overflows.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        if !n.is_multiple_of(self.block_size()) {
            return None;
        }
        (n / self.block_size()).checked_mul(self.type_size())
    }

    /// Whether [`quantize_rows`] can write the type.
    pub fn can_quantize(self) -> bool {
        !matches!(
            self.0,
            raw::GGML_TYPE_Q8_1
                | raw::GGML_TYPE_Q8_K
                | raw::GGML_TYPE_I8
                | raw::GGML_TYPE_I16
                | raw::GGML_TYPE_I32
                | raw::GGML_TYPE_I64
                | raw::GGML_TYPE_F64
        )
    }

    /// Whether [`dequantize`] can read the type.
    pub fn can_dequantize(self) -> bool {
        self == Type::F32 || traits_of(self.0).to_float.is_some()
    }

    /// Whether ggml refuses to write the type without an importance matrix.
    pub fn requires_imatrix(self) -> bool {
        // SAFETY: a comparison with constants.
        unsafe { raw::ggml_quantize_requires_imatrix(self.0) }
    }

    /// Whether the quantizer searches a codebook, and so cannot take weights that are all zero.
    fn has_codebook(self) -> bool {
        matches!(
            self.0,
            raw::GGML_TYPE_IQ1_S
                | raw::GGML_TYPE_IQ1_M
                | raw::GGML_TYPE_IQ2_XXS
                | raw::GGML_TYPE_IQ2_XS
                | raw::GGML_TYPE_IQ2_S
                | raw::GGML_TYPE_IQ3_XXS
                | raw::GGML_TYPE_IQ3_S
        )
    }
}

/// One constant per floating and block type, named as ggml names it.
macro_rules! constants {
    ($($name:ident = $raw:ident: $what:literal;)*) => {
        #[allow(non_upper_case_globals)]
        impl Type {$(
            #[doc = $what]
            pub const $name: Type = Type(raw::$raw);
        )*}
    };
}

constants! {
    F32 = GGML_TYPE_F32: "IEEE single precision.";
    F16 = GGML_TYPE_F16: "IEEE half precision.";
    BF16 = GGML_TYPE_BF16: "The upper half of a single.";
    Q1_0 = GGML_TYPE_Q1_0: "1 bit, blocks of 128.";
    Q2_0 = GGML_TYPE_Q2_0: "2 bits, blocks of 64.";
    Q4_0 = GGML_TYPE_Q4_0: "4 bits, blocks of 32, a scale each.";
    Q4_1 = GGML_TYPE_Q4_1: "4 bits, blocks of 32, a scale and a minimum each.";
    Q5_0 = GGML_TYPE_Q5_0: "5 bits, blocks of 32, a scale each.";
    Q5_1 = GGML_TYPE_Q5_1: "5 bits, blocks of 32, a scale and a minimum each.";
    Q8_0 = GGML_TYPE_Q8_0: "8 bits, blocks of 32, a scale each.";
    Q2_K = GGML_TYPE_Q2_K: "2 bits, superblocks of 256.";
    Q3_K = GGML_TYPE_Q3_K: "3 bits, superblocks of 256.";
    Q4_K = GGML_TYPE_Q4_K: "4 bits, superblocks of 256.";
    Q5_K = GGML_TYPE_Q5_K: "5 bits, superblocks of 256.";
    Q6_K = GGML_TYPE_Q6_K: "6 bits, superblocks of 256.";
    IQ1_S = GGML_TYPE_IQ1_S: "1.56 bits by codebook.";
    IQ1_M = GGML_TYPE_IQ1_M: "1.75 bits by codebook.";
    IQ2_XXS = GGML_TYPE_IQ2_XXS: "2.06 bits by codebook.";
    IQ2_XS = GGML_TYPE_IQ2_XS: "2.31 bits by codebook.";
    IQ2_S = GGML_TYPE_IQ2_S: "2.56 bits by codebook.";
    IQ3_XXS = GGML_TYPE_IQ3_XXS: "3.06 bits by codebook.";
    IQ3_S = GGML_TYPE_IQ3_S: "3.44 bits by codebook.";
    IQ4_NL = GGML_TYPE_IQ4_NL: "4 bits at unequal steps, blocks of 32.";
    IQ4_XS = GGML_TYPE_IQ4_XS: "4 bits at unequal steps, superblocks of 256.";
    TQ1_0 = GGML_TYPE_TQ1_0: "Ternary, 1.69 bits.";
    TQ2_0 = GGML_TYPE_TQ2_0: "Ternary, 2.06 bits.";
    MXFP4 = GGML_TYPE_MXFP4: "4-bit floats, blocks of 32 with a power-of-two scale.";
    NVFP4 = GGML_TYPE_NVFP4: "4-bit floats, blocks of 64 with four scales.";
}

impl fmt::Debug for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The row of ggml's table for an id below `GGML_TYPE_COUNT`.
fn traits_of(id: u32) -> &'static raw::ggml_type_traits {
    assert!(id < raw::GGML_TYPE_COUNT);
    // SAFETY: the id is in range, and the table is a constant.
    unsafe { &*raw::ggml_get_type_traits(id) }
}

/// Fills ggml's tables (F16 conversions among them). Every function here that needs them calls it; a
/// user of [`raw`] must too.
pub fn init() {
    static INIT: Once = Once::new();
    // SAFETY: no precondition; `Once` because the function is not meant to run concurrently.
    INIT.call_once(|| unsafe { raw::ggml_cpu_init() });
}

/// Quantizes `n_rows` rows of `n_cols` values each; the bytes are those of a GGUF tensor.
///
/// `imatrix` holds one importance per column. Safe to call from several threads.
pub fn quantize_rows(
    ty: Type,
    src: &[f32],
    n_rows: usize,
    n_cols: usize,
    imatrix: Option<&[f32]>,
) -> Result<Vec<u8>, Error> {
    let bytes = row_bytes(ty, n_cols)?.saturating_mul(n_rows);
    let expected = n_rows.saturating_mul(n_cols);
    if src.len() != expected {
        return Err(Error::Length {
            what: "source values",
            expected,
            got: src.len(),
        });
    }
    let mut out = vec![0; bytes];
    quantize_rows_into(ty, src, n_cols, imatrix, &mut out)?;
    Ok(out)
}

/// As [`quantize_rows`], into bytes of the caller; the number of rows is `src.len() / n_cols`.
pub fn quantize_rows_into(
    ty: Type,
    src: &[f32],
    n_cols: usize,
    imatrix: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), Error> {
    if !ty.can_quantize() {
        return Err(Error::NoQuantizer { ty });
    }
    let bytes = row_bytes(ty, n_cols)?;
    if n_cols == 0 || src.is_empty() {
        return Ok(());
    }
    if !src.len().is_multiple_of(n_cols) {
        return Err(Error::Length {
            what: "source values",
            expected: src.len().next_multiple_of(n_cols),
            got: src.len(),
        });
    }
    let n_rows = src.len() / n_cols;
    if out.len() != n_rows.saturating_mul(bytes) {
        return Err(Error::Length {
            what: "quantized bytes",
            expected: n_rows.saturating_mul(bytes),
            got: out.len(),
        });
    }
    let largest = check_values(ty, src, n_cols)?;
    match imatrix {
        Some(imatrix) => check_imatrix(ty, imatrix, n_cols, largest)?,
        None if ty.requires_imatrix() => return Err(Error::NeedsImatrix { ty }),
        None => {}
    }
    init();
    let imatrix = imatrix.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: the type has a quantizer and its importances if it needs them; rows are whole blocks;
    // source and destination hold n_rows rows; values are finite, so no codebook search fails.
    unsafe {
        raw::ggml_quantize_chunk(
            ty.0,
            src.as_ptr(),
            out.as_mut_ptr().cast(),
            0,
            n_rows as i64,
            n_cols as i64,
            imatrix,
        );
    }
    Ok(())
}

/// Turns the bytes of a type into F32. `out` holds as many values as the bytes say.
pub fn dequantize(ty: Type, bytes: &[u8], out: &mut [f32]) -> Result<(), Error> {
    let expected = row_bytes(ty, out.len())?;
    if bytes.len() != expected {
        return Err(Error::Length {
            what: "quantized bytes",
            expected,
            got: bytes.len(),
        });
    }
    init();
    if ty == Type::F32 {
        for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*raw);
        }
        return Ok(());
    }
    let Some(to_float) = traits_of(ty.0).to_float else {
        return Err(Error::NoDequantizer { ty });
    };
    // ggml reads blocks through pointers to structs whose widest member is an F16 or F32.
    let aligned;
    let bytes = if bytes.as_ptr().cast::<u32>().is_aligned() {
        bytes
    } else {
        aligned = AlignedBytes::copy(bytes);
        aligned.as_slice()
    };
    // SAFETY: both slices hold the same whole number of blocks, and the source is aligned.
    unsafe { to_float(bytes.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) };
    Ok(())
}

/// A copy of bytes at an address that suits every block struct.
struct AlignedBytes {
    words: Vec<u64>,
    len: usize,
}

impl AlignedBytes {
    fn copy(bytes: &[u8]) -> AlignedBytes {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(padded);
        }
        AlignedBytes {
            words,
            len: bytes.len(),
        }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: the words hold at least `len` initialised bytes, and any byte is a valid u8.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }
}

fn row_bytes(ty: Type, n_cols: usize) -> Result<usize, Error> {
    ty.row_bytes(n_cols).ok_or(Error::RaggedRow {
        ty,
        n_cols,
        block: ty.block_size(),
    })
}

/// Refuses values that the type cannot hold; the largest magnitude otherwise.
fn check_values(ty: Type, src: &[f32], n_cols: usize) -> Result<f32, Error> {
    let limit = match ty {
        Type::F32 => return Ok(0.0), // stored as it is, whatever it is
        Type::F16 => 65519.0,        // the largest value that does not round to infinity
        Type::BF16 => f32::MAX,
        _ => MAX_QUANTIZABLE,
    };
    // One pass that vectorises: a NaN anywhere keeps `within` false.
    let mut within = true;
    let mut largest = 0f32;
    for &value in src {
        let magnitude = value.abs();
        within &= magnitude <= limit;
        largest = largest.max(magnitude);
    }
    if within {
        return Ok(largest);
    }
    let at = src
        .iter()
        .position(|value| !matches!(value.abs().partial_cmp(&limit), Some(order) if order.is_le()))
        .unwrap_or(0);
    Err(Error::Value {
        ty,
        row: at / n_cols,
        col: at % n_cols,
        value: src[at],
    })
}

fn check_imatrix(ty: Type, imatrix: &[f32], n_cols: usize, largest: f32) -> Result<(), Error> {
    if imatrix.len() != n_cols {
        return Err(Error::Length {
            what: "importance matrix",
            expected: n_cols,
            got: imatrix.len(),
        });
    }
    let refuse = |col: usize| Error::Imatrix {
        ty,
        col,
        value: imatrix[col],
    };
    // Squares of weighted sums over 256 values must stay finite: (256 * 15 * p)^2 < 3e38.
    let limit = 4e15 / (largest * largest).max(f32::MIN_POSITIVE);
    for (col, &value) in imatrix.iter().enumerate() {
        if !(0.0..=limit).contains(&value) {
            return Err(refuse(col));
        }
    }
    if ty.has_codebook() {
        for (group, values) in imatrix.chunks(4).enumerate() {
            if values.iter().all(|&value| value == 0.0) {
                return Err(refuse(group * 4));
            }
        }
    }
    Ok(())
}
