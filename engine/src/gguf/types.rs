//! Tensor element types of GGUF: ids, names and block sizes, as ggml 0.26 numbers them.

use std::fmt;

/// Element type of a tensor in a GGUF file. The discriminant is the id in the file.
///
/// A row of a tensor is a sequence of *blocks* of [`GgmlType::block_size`] elements, each stored in
/// [`GgmlType::type_size`] bytes. Ids that ggml has withdrawn (4, 5, 31 to 33, 36 to 38) have no variant.
#[allow(missing_docs, non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum GgmlType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// One row per type: type, name as ggml prints it, elements per block, bytes per block.
const TYPES: &[(GgmlType, &str, usize, usize)] = {
    use GgmlType::*;
    &[
        (F32, "f32", 1, 4),
        (F16, "f16", 1, 2),
        (Q4_0, "q4_0", 32, 18),
        (Q4_1, "q4_1", 32, 20),
        (Q5_0, "q5_0", 32, 22),
        (Q5_1, "q5_1", 32, 24),
        (Q8_0, "q8_0", 32, 34),
        (Q8_1, "q8_1", 32, 36),
        (Q2_K, "q2_K", 256, 84),
        (Q3_K, "q3_K", 256, 110),
        (Q4_K, "q4_K", 256, 144),
        (Q5_K, "q5_K", 256, 176),
        (Q6_K, "q6_K", 256, 210),
        (Q8_K, "q8_K", 256, 292),
        (IQ2_XXS, "iq2_xxs", 256, 66),
        (IQ2_XS, "iq2_xs", 256, 74),
        (IQ3_XXS, "iq3_xxs", 256, 98),
        (IQ1_S, "iq1_s", 256, 50),
        (IQ4_NL, "iq4_nl", 32, 18),
        (IQ3_S, "iq3_s", 256, 110),
        (IQ2_S, "iq2_s", 256, 82),
        (IQ4_XS, "iq4_xs", 256, 136),
        (I8, "i8", 1, 1),
        (I16, "i16", 1, 2),
        (I32, "i32", 1, 4),
        (I64, "i64", 1, 8),
        (F64, "f64", 1, 8),
        (IQ1_M, "iq1_m", 256, 56),
        (BF16, "bf16", 1, 2),
        (TQ1_0, "tq1_0", 256, 54),
        (TQ2_0, "tq2_0", 256, 66),
        (MXFP4, "mxfp4", 32, 17),
        (NVFP4, "nvfp4", 64, 36),
        (Q1_0, "q1_0", 128, 18),
        (Q2_0, "q2_0", 64, 18),
    ]
};

impl GgmlType {
    /// Every type, in the order of the ids.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        TYPES.iter().map(|row| row.0)
    }

    /// The type with this id, or `None` when ggml has no such type (any more).
    pub fn from_id(id: u32) -> Option<GgmlType> {
        TYPES.iter().map(|row| row.0).find(|ty| ty.id() == id)
    }

    /// The type with this name, in any case (`q4_K`, `Q4_K`).
    pub fn from_name(name: &str) -> Option<GgmlType> {
        TYPES
            .iter()
            .find(|row| row.1.eq_ignore_ascii_case(name))
            .map(|row| row.0)
    }

    /// The id that stands in the file.
    pub fn id(self) -> u32 {
        self as u32
    }

    fn row(self) -> &'static (GgmlType, &'static str, usize, usize) {
        // The table is in the order of the discriminants, so the search is exact.
        let at = TYPES
            .binary_search_by_key(&self.id(), |row| row.0.id())
            .expect("every variant has a row");
        &TYPES[at]
    }

    /// Name as ggml prints it, such as `q4_K`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements per block; 1 for plain number types.
    pub fn block_size(self) -> usize {
        self.row().2
    }

    /// Bytes per block.
    pub fn type_size(self) -> usize {
        self.row().3
    }

    /// Whether blocks hold more than one element.
    pub fn is_quantized(self) -> bool {
        self.block_size() > 1
    }

    /// Bytes of a row of `n` elements; `None` if `n` is no multiple of the block size or the product overflows.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        let row = self.row();
        if !n.is_multiple_of(row.2) {
            return None;
        }
        (n / row.2).checked_mul(row.3)
    }

    /// Bytes of a tensor with these dims (ggml order, the row first); `None` as for [`GgmlType::row_bytes`].
    pub fn tensor_bytes(self, dims: &[u64]) -> Option<u64> {
        let row = usize::try_from(dims.first().copied().unwrap_or(1)).ok()?;
        let mut bytes = self.row_bytes(row)? as u64;
        for &n in dims.iter().skip(1) {
            bytes = bytes.checked_mul(n)?;
        }
        Some(bytes)
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_and_round_trips() {
        for pair in TYPES.windows(2) {
            assert!(pair[0].0.id() < pair[1].0.id());
        }
        for ty in GgmlType::all() {
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
            assert_eq!(GgmlType::from_name(ty.name()), Some(ty));
            assert_eq!(ty.row_bytes(ty.block_size() * 3), Some(ty.type_size() * 3));
        }
        for withdrawn in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(GgmlType::from_id(withdrawn), None);
        }
    }

    #[test]
    fn row_bytes_refuses_ragged_rows_and_overflow() {
        assert_eq!(GgmlType::Q8_0.row_bytes(33), None);
        assert_eq!(GgmlType::F64.row_bytes(usize::MAX), None);
        assert_eq!(GgmlType::F32.tensor_bytes(&[1 << 40, 1 << 40]), None);
        assert_eq!(GgmlType::F32.tensor_bytes(&[]), Some(4));
        assert_eq!(GgmlType::Q4_K.tensor_bytes(&[512, 3]), Some(2 * 144 * 3));
    }
}
