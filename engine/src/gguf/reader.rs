//! Parses the header of one GGUF file. Nothing in it is trusted: every count is checked against the bytes
//! that are left before anything is allocated, and all arithmetic on offsets is checked.
//!
//! Layout (little-endian): magic `GGUF`, u32 version, u64 tensor count, u64 key count; the keys, each a
//! string, a u32 type and the value; the tensor infos, each a string, u32 number of dims, u64 dims, u32 type
//! and u64 offset; padding to the alignment; the tensor data. A string is a u64 length and its bytes; an
//! array is a u32 element type, a u64 count and its elements.

use std::collections::HashMap;

use super::error::ErrorKind;
use super::types::GgmlType;
use super::value::{Array, TYPE_ARRAY, Value};
use super::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT, TensorInfo};

/// Longest key or tensor name accepted. (llama.cpp stops at 63 bytes for tensors, the format's text at 65535 for keys.)
const MAX_NAME_BYTES: usize = 65535;
/// Most dimensions a tensor may have.
const MAX_DIMS: u32 = 4;
/// Fewest bytes a key takes: length of its name, one byte of name, type, one byte of value.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes a tensor info takes: length of its name, number of dims, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

/// The header of one file.
pub(super) struct Header {
    pub version: u32,
    pub alignment: u64,
    pub keys: Vec<(String, Value)>,
    pub tensors: Vec<TensorInfo>,
}

/// Parses `bytes` (a whole file); `part` is stored in the tensor infos. The offsets of the returned tensors count from the start of the file.
pub(super) fn parse(bytes: &[u8], part: usize) -> Result<Header, ErrorKind> {
    let mut r = Cursor { bytes, at: 0 };
    let magic = r.array::<4>("the magic number")?;
    if &magic != b"GGUF" {
        return Err(ErrorKind::Magic {
            got: magic.escape_ascii().to_string(),
        });
    }
    let version = r.u32("the version")?;
    match version {
        2 | 3 => {}
        1 => return Err(ErrorKind::VersionOne),
        // A big-endian file of version 3 reads as 0x03000000.
        got if got != 0 && got & 0xffff == 0 => return Err(ErrorKind::BigEndian { got }),
        got => return Err(ErrorKind::Version { got }),
    }
    let n_tensors = r.u64("the tensor count")?;
    let n_keys = r.u64("the key count")?;
    r.check_count("the key count", n_keys, MIN_KEY_BYTES)?;
    r.check_count("the tensor count", n_tensors, MIN_TENSOR_BYTES)?;

    let mut keys: Vec<(String, Value)> = Vec::with_capacity(bounded(n_keys));
    let mut seen: HashMap<String, ()> = HashMap::with_capacity(bounded(n_keys));
    for index in 0..n_keys {
        let key = r.name(&|| format!("the name of key {index}"))?;
        if key.is_empty() {
            return Err(ErrorKind::EmptyKey { index });
        }
        if seen.insert(key.clone(), ()).is_some() {
            return Err(ErrorKind::DuplicateKey { key });
        }
        let value = r.value(&key)?;
        keys.push((key, value));
    }

    let alignment = match keys.iter().find(|(key, _)| key == KEY_ALIGNMENT) {
        None => DEFAULT_ALIGNMENT,
        Some((_, Value::U32(v))) if v.is_power_of_two() => u64::from(*v),
        Some((_, v)) => {
            return Err(ErrorKind::Alignment {
                got: format!("{v} ({})", v.type_name()),
            });
        }
    };

    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(bounded(n_tensors));
    let mut seen: HashMap<String, ()> = HashMap::with_capacity(bounded(n_tensors));
    for index in 0..n_tensors {
        let tensor = r.tensor(index, part)?;
        if seen.insert(tensor.name.clone(), ()).is_some() {
            return Err(ErrorKind::DuplicateTensor {
                tensor: tensor.name,
            });
        }
        tensors.push(tensor);
    }

    place(&mut tensors, r.at as u64, alignment, bytes.len() as u64)?;
    Ok(Header {
        version,
        alignment,
        keys,
        tensors,
    })
}

/// Checks every tensor's place in the data section, which starts at the first multiple of `alignment` after
/// the header, and makes the offsets absolute.
fn place(
    tensors: &mut [TensorInfo],
    header_end: u64,
    alignment: u64,
    file_len: u64,
) -> Result<(), ErrorKind> {
    if tensors.is_empty() {
        return Ok(()); // a file of metadata only need not be padded
    }
    // Neither can overflow: header_end is at most the file's length and alignment below 2^32.
    let data_start = header_end.next_multiple_of(alignment);
    let data_len = file_len.saturating_sub(data_start);
    for t in tensors.iter_mut() {
        if t.offset % alignment != 0 {
            return Err(ErrorKind::Misaligned {
                tensor: t.name.clone(),
                got: t.offset,
                alignment,
            });
        }
        match t.offset.checked_add(t.n_bytes) {
            Some(end) if end <= data_len => {}
            _ => {
                return Err(ErrorKind::OutOfBounds {
                    tensor: t.name.clone(),
                    offset: t.offset,
                    need: t.n_bytes,
                    len: data_len,
                });
            }
        }
        // An empty tensor may stand at the very end of a file without padding; keep it inside.
        t.offset = (t.offset + data_start).min(file_len);
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|t| t.n_bytes > 0).collect();
    by_offset.sort_unstable_by_key(|t| t.offset);
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].n_bytes > pair[1].offset {
            return Err(ErrorKind::Overlap {
                first: pair[0].name.clone(),
                second: pair[1].name.clone(),
            });
        }
    }
    Ok(())
}

/// Capacity to reserve for `n` elements that the file claims: real files rarely have more, and a lie costs nothing.
fn bounded(n: u64) -> usize {
    n.min(4096) as usize
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// Fails if `n` elements of at least `min_bytes` each cannot be in what is left of the file.
    fn check_count(&self, what: &str, n: u64, min_bytes: u64) -> Result<(), ErrorKind> {
        match n.checked_mul(min_bytes) {
            Some(need) if need <= self.left() => Ok(()),
            _ => Err(ErrorKind::Count {
                what: what.to_string(),
                got: n,
                left: self.left(),
            }),
        }
    }

    fn take(&mut self, n: u64, what: &dyn Fn() -> String) -> Result<&'a [u8], ErrorKind> {
        if n > self.left() {
            return Err(ErrorKind::Truncated {
                what: what(),
                offset: self.at as u64,
                need: n,
                len: self.bytes.len() as u64,
            });
        }
        let from = self.at;
        self.at += n as usize; // n <= left
        Ok(&self.bytes[from..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ErrorKind> {
        let taken = self.take(N as u64, &|| what.to_string())?;
        let mut out = [0; N];
        out.copy_from_slice(taken);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ErrorKind> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ErrorKind> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &dyn Fn() -> String) -> Result<String, ErrorKind> {
        let n = self.u64_of(what)?;
        let bytes = self.take(n, what)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_string()),
            Err(_) => Err(ErrorKind::Utf8 { what: what() }),
        }
    }

    fn u64_of(&mut self, what: &dyn Fn() -> String) -> Result<u64, ErrorKind> {
        let taken = self.take(8, what)?;
        let mut out = [0; 8];
        out.copy_from_slice(taken);
        Ok(u64::from_le_bytes(out))
    }

    fn name(&mut self, what: &dyn Fn() -> String) -> Result<String, ErrorKind> {
        let s = self.string(what)?;
        if s.len() > MAX_NAME_BYTES {
            return Err(ErrorKind::NameTooLong {
                what: what(),
                got: s.len(),
                max: MAX_NAME_BYTES,
            });
        }
        Ok(s)
    }

    fn value(&mut self, key: &str) -> Result<Value, ErrorKind> {
        let what = format!("key {key:?}");
        let ty = self.u32(&what)?;
        Ok(match ty {
            0 => Value::U8(u8::from_le_bytes(self.array(&what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(&what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(&what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(&what)?)),
            4 => Value::U32(self.u32(&what)?),
            5 => Value::I32(i32::from_le_bytes(self.array(&what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(&what)?)),
            7 => Value::Bool(to_bool(key, self.array::<1>(&what)?[0])?),
            8 => Value::String(self.string(&|| what.clone())?),
            TYPE_ARRAY => Value::Array(self.array_value(key, &what)?),
            10 => Value::U64(self.u64(&what)?),
            11 => Value::I64(i64::from_le_bytes(self.array(&what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(&what)?)),
            got => {
                return Err(ErrorKind::ValueType {
                    key: key.to_string(),
                    got,
                });
            }
        })
    }

    /// `n` numbers of `N` bytes each.
    fn numbers<T, const N: usize>(
        &mut self,
        what: &str,
        n: u64,
        from: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, ErrorKind> {
        self.check_count(what, n, N as u64)?;
        let bytes = self.take(n * N as u64, &|| what.to_string())?; // checked just above
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|c| from(*c)).collect())
    }

    fn array_value(&mut self, key: &str, what: &str) -> Result<Array, ErrorKind> {
        let ty = self.u32(what)?;
        let n = self.u64(what)?;
        Ok(match ty {
            0 => Array::U8(self.numbers(what, n, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(what, n, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(what, n, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(what, n, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(what, n, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(what, n, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(what, n, f32::from_le_bytes)?),
            7 => {
                let bytes = self.numbers(what, n, u8::from_le_bytes)?;
                let bools: Result<Vec<bool>, ErrorKind> =
                    bytes.into_iter().map(|b| to_bool(key, b)).collect();
                Array::Bool(bools?)
            }
            8 => {
                self.check_count(what, n, 8)?;
                let mut strings = Vec::with_capacity(bounded(n));
                for i in 0..n {
                    strings.push(self.string(&|| format!("{what}, element {i},"))?);
                }
                Array::String(strings)
            }
            TYPE_ARRAY => {
                return Err(ErrorKind::NestedArray {
                    key: key.to_string(),
                });
            }
            10 => Array::U64(self.numbers(what, n, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(what, n, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(what, n, f64::from_le_bytes)?),
            got => {
                return Err(ErrorKind::ValueType {
                    key: key.to_string(),
                    got,
                });
            }
        })
    }

    fn tensor(&mut self, index: u64, part: usize) -> Result<TensorInfo, ErrorKind> {
        let name = self.name(&|| format!("the name of tensor {index}"))?;
        let what = format!("the info of tensor {name:?}");
        let n_dims = self.u32(&what)?;
        if n_dims > MAX_DIMS {
            return Err(ErrorKind::Dims {
                tensor: name,
                got: n_dims,
            });
        }
        let mut dims = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            dims.push(self.u64(&what)?);
        }
        let id = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let Some(ty) = GgmlType::from_id(id) else {
            return Err(ErrorKind::TensorType {
                tensor: name,
                got: id,
            });
        };
        let n_bytes = tensor_bytes(&name, &dims, ty)?;
        Ok(TensorInfo {
            name,
            dims,
            ty,
            part,
            offset,
            n_bytes,
        })
    }
}

/// Bytes of a tensor, or the error that names what is wrong with its shape.
pub(super) fn tensor_bytes(name: &str, dims: &[u64], ty: GgmlType) -> Result<u64, ErrorKind> {
    let row = dims.first().copied().unwrap_or(1);
    if !row.is_multiple_of(ty.block_size() as u64) {
        return Err(ErrorKind::Row {
            tensor: name.to_string(),
            ty: ty.name(),
            got: row,
            expected: ty.block_size(),
        });
    }
    // The number of elements must be addressable as well: a zero in one dim must not hide an absurd other.
    let n_elements = dims
        .iter()
        .filter(|&&n| n > 0)
        .try_fold(1u64, |product, &n| product.checked_mul(n))
        .filter(|&n| n <= i64::MAX as u64);
    match (ty.tensor_bytes(dims), n_elements) {
        (Some(bytes), Some(_)) if bytes <= i64::MAX as u64 => Ok(bytes),
        _ => Err(ErrorKind::TensorSize {
            tensor: name.to_string(),
            dims: dims.to_vec(),
            ty: ty.name(),
        }),
    }
}

fn to_bool(key: &str, got: u8) -> Result<bool, ErrorKind> {
    match got {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(ErrorKind::Bool {
            key: key.to_string(),
            got,
        }),
    }
}
