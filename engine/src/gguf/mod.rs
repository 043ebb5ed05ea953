//! GGUF: the file format of models. Reader over memory maps, and writer.
//!
//! [`Gguf::open`] checks the whole header and every tensor's place, so that [`Gguf::data`] cannot fail. Files
//! of version 2 and 3, little-endian, whole or split into `-00001-of-0000N` parts. `docs/gguf.md` lists the
//! keys and tensors that the engine reads.

mod error;
mod reader;
mod types;
mod value;
mod writer;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};

pub use error::{Error, ErrorKind};
pub use types::GgmlType;
pub use value::{Array, Value};
pub use writer::{GgufWriter, TensorSink};

/// Key that sets the alignment of tensor data (u32, a power of two).
pub const KEY_ALIGNMENT: &str = "general.alignment";
/// Alignment of tensor data where the file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;
const KEY_SPLIT_NO: &str = "split.no";
const KEY_SPLIT_COUNT: &str = "split.count";
const KEY_SPLIT_TENSORS: &str = "split.tensors.count";

/// Name, shape, type and place of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dims in ggml's order: `dims[0]` is the length of a row (for a weight, the input width). At most 4; none for a scalar.
    pub dims: Vec<u64>,
    /// Element type.
    pub ty: GgmlType,
    /// Which part of a split file holds the data; 0 for a whole file.
    pub part: usize,
    /// Where the data starts, in bytes from the start of that part.
    pub offset: u64,
    /// Bytes of data.
    pub n_bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Elements per row: `dims[0]`, 1 for a scalar.
    pub fn n_cols(&self) -> u64 {
        self.dims.first().copied().unwrap_or(1)
    }

    /// Number of rows: the product of the other dims.
    pub fn n_rows(&self) -> u64 {
        self.dims.iter().skip(1).product()
    }
}

/// The bytes of one part: mapped, or in memory.
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(vec) => vec,
        }
    }
}

/// An open GGUF file, all of its parts mapped into memory.
///
/// The files must not be shortened while they are mapped: the operating system answers a read behind the new
/// end with SIGBUS, which ends the process. (Replacing a file by renaming another over it, as
/// [`GgufWriter`] does, is safe: the old one stays mapped.)
pub struct Gguf {
    path: PathBuf,
    version: u32,
    alignment: u64,
    keys: Vec<(String, Value)>,
    key_index: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    tensor_index: HashMap<String, usize>,
    parts: Vec<Bytes>,
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path)
            .field("n_keys", &self.keys.len())
            .field("n_tensors", &self.tensors.len())
            .field("n_parts", &self.parts.len())
            .finish()
    }
}

impl Gguf {
    /// Opens a file; with `NAME-00001-of-0000N.gguf`, all parts of the set.
    ///
    /// Metadata come from the first part. Fails on anything that is not exactly a GGUF file, naming what is wrong.
    pub fn open(path: &Path) -> Result<Gguf, Error> {
        let mut gguf = Gguf::assemble(path, map(path)?)?;
        let fail = |kind| Error::new(path, kind);
        let count = gguf
            .opt_u64(KEY_SPLIT_COUNT)?
            .filter(|&count| count > 1)
            .unwrap_or(1);
        if count == 1 {
            return Ok(gguf);
        }
        let no = gguf.opt_u64(KEY_SPLIT_NO)?.unwrap_or(0);
        if no != 0 {
            let first = match split_stem(path, no, count) {
                Some(stem) => format!("{stem}-00001-of-{count:05}.gguf"),
                None => "the first part".to_string(),
            };
            return Err(fail(ErrorKind::NotFirstSplit { no, count, first }));
        }
        let stem =
            split_stem(path, 0, count).ok_or_else(|| fail(ErrorKind::SplitName { count }))?;
        for part in 1..count {
            let part_path = path.with_file_name(split_name(&stem, part, count));
            gguf.append(&part_path, part, count)?;
        }
        if let Some(expected) = gguf.opt_u64(KEY_SPLIT_TENSORS)? {
            let got = gguf.tensors.len() as u64;
            if expected != got {
                return Err(fail(ErrorKind::SplitTensors { expected, got }));
            }
        }
        Ok(gguf)
    }

    /// Reads a whole (not split) file from memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Gguf, Error> {
        Gguf::assemble(Path::new("<bytes>"), Bytes::Owned(bytes))
    }

    fn assemble(path: &Path, bytes: Bytes) -> Result<Gguf, Error> {
        let header = reader::parse(bytes.as_slice(), 0).map_err(|kind| Error::new(path, kind))?;
        let key_index = (header.keys.iter().enumerate())
            .map(|(i, (key, _))| (key.clone(), i))
            .collect();
        let tensor_index = (header.tensors.iter().enumerate())
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        Ok(Gguf {
            path: path.to_path_buf(),
            version: header.version,
            alignment: header.alignment,
            keys: header.keys,
            key_index,
            tensors: header.tensors,
            tensor_index,
            parts: vec![bytes],
        })
    }

    /// Adds part `expected_no` (from 0) of a split set.
    fn append(&mut self, path: &Path, expected_no: u64, expected_count: u64) -> Result<(), Error> {
        let bytes = map(path)?;
        let fail = |kind| Error::new(path, kind);
        let header = reader::parse(bytes.as_slice(), self.parts.len()).map_err(fail)?;
        let number = |name: &str| {
            let found = header.keys.iter().find(|(key, _)| key == name);
            found
                .and_then(|(_, v)| v.as_i128())
                .and_then(|v| u64::try_from(v).ok())
                .unwrap_or(0)
        };
        let (no, count) = (number(KEY_SPLIT_NO), number(KEY_SPLIT_COUNT));
        if (no, count) != (expected_no, expected_count) {
            return Err(fail(ErrorKind::Split {
                expected_no,
                expected_count,
                no,
                count,
            }));
        }
        for t in header.tensors {
            let index = self.tensors.len();
            if self.tensor_index.insert(t.name.clone(), index).is_some() {
                return Err(fail(ErrorKind::DuplicateTensor { tensor: t.name }));
            }
            self.tensors.push(t);
        }
        self.parts.push(bytes);
        Ok(())
    }

    /// Path the file was opened by; `<bytes>` when read from memory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of tensor data in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Number of parts; 1 for a whole file.
    pub fn n_parts(&self) -> usize {
        self.parts.len()
    }

    /// Bytes of all parts together.
    pub fn n_bytes(&self) -> u64 {
        (self.parts.iter())
            .map(|part| part.as_slice().len() as u64)
            .sum()
    }

    /// All keys and values, in the order of the file.
    pub fn keys(&self) -> &[(String, Value)] {
        &self.keys
    }

    /// Value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.key_index.get(key).map(|&i| &self.keys[i].1)
    }

    /// All tensors, in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensor_index.get(name).map(|&i| &self.tensors[i])
    }

    /// A tensor by name, or an error that names it.
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo, Error> {
        self.tensor(name).ok_or_else(|| {
            self.error(ErrorKind::MissingTensor {
                tensor: name.to_string(),
            })
        })
    }

    /// Data of a tensor of this file: `n_bytes` bytes, aligned to the file's alignment when the file is mapped.
    ///
    /// # Panics
    /// If `tensor` is an info of another file that does not fit this one.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let from = tensor.offset as usize;
        &self.parts[tensor.part].as_slice()[from..from + tensor.n_bytes as usize]
    }

    /// Tells the operating system that the pages of a tensor will not be read soon, after its data were copied
    /// elsewhere: the process's resident memory shrinks by them. Reading them again works and goes to the file.
    /// Returns the number of bytes given up (whole pages inside the tensor; 0 when nothing is mapped).
    pub fn release(&self, tensor: &TensorInfo) -> usize {
        const PAGE: usize = 4096;
        let Bytes::Mapped(map) = &self.parts[tensor.part] else {
            return 0;
        };
        // Rounded inwards, for neighbours share the outer pages. The map starts on a page.
        let from = (tensor.offset as usize).next_multiple_of(PAGE);
        let end = (tensor.offset + tensor.n_bytes) as usize / PAGE * PAGE;
        if from >= end {
            return 0;
        }
        // SAFETY: the map is of a file, private and never written, so that dropped pages come back with the same
        // bytes when read again; no borrowed slice can see another value.
        match unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, from, end - from) } {
            Ok(()) => end - from,
            Err(_) => 0,
        }
    }

    /// Locks all mapped parts in memory (`mlock`). Fails when the process's limit is too low.
    pub fn lock(&self) -> Result<(), Error> {
        for part in &self.parts {
            if let Bytes::Mapped(map) = part {
                map.lock().map_err(|e| self.error(ErrorKind::Io(e)))?;
            }
        }
        Ok(())
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(&self.path, kind)
    }

    /// The error for a key whose value has the wrong type or is out of range.
    pub fn key_error(&self, key: &str, expected: &'static str) -> Error {
        let got = match self.get(key) {
            None => {
                return self.error(ErrorKind::MissingKey {
                    key: key.to_string(),
                });
            }
            Some(v) => {
                let shown: String = v.to_string().chars().take(60).collect();
                format!("{shown} ({})", v.type_name())
            }
        };
        self.error(ErrorKind::KeyType {
            key: key.to_string(),
            expected,
            got,
        })
    }
}

/// Typed access to metadata. `opt_x` gives `None` for an absent key; `x` fails on it. A value of another type is
/// always an error. Integers of every width are accepted where they fit the asked one.
impl Gguf {
    fn opt<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match read(v) {
                Some(t) => Ok(Some(t)),
                None => Err(self.key_error(key, expected)),
            },
        }
    }

    fn required<T>(&self, key: &str, found: Option<T>) -> Result<T, Error> {
        found.ok_or_else(|| {
            self.error(ErrorKind::MissingKey {
                key: key.to_string(),
            })
        })
    }

    /// An unsigned integer below 2^32, if the key is there.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.opt(key, "an integer that fits u32", |v| {
            u32::try_from(v.as_i128()?).ok()
        })
    }

    /// An unsigned integer below 2^32.
    pub fn u32(&self, key: &str) -> Result<u32, Error> {
        self.required(key, self.opt_u32(key)?)
    }

    /// An unsigned integer below 2^64, if the key is there.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>, Error> {
        self.opt(key, "an integer that fits u64", |v| {
            u64::try_from(v.as_i128()?).ok()
        })
    }

    /// An unsigned integer below 2^64.
    pub fn u64(&self, key: &str) -> Result<u64, Error> {
        self.required(key, self.opt_u64(key)?)
    }

    /// A signed integer, if the key is there.
    pub fn opt_i64(&self, key: &str) -> Result<Option<i64>, Error> {
        self.opt(key, "an integer that fits i64", |v| {
            i64::try_from(v.as_i128()?).ok()
        })
    }

    /// A float (an `f64` is rounded), if the key is there.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.opt(key, "a float", |v| Some(v.as_f64()? as f32))
    }

    /// A float (an `f64` is rounded).
    pub fn f32(&self, key: &str) -> Result<f32, Error> {
        self.required(key, self.opt_f32(key)?)
    }

    /// A boolean, if the key is there.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.opt(key, "a bool", |v| v.as_bool())
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<bool, Error> {
        self.required(key, self.opt_bool(key)?)
    }

    /// A string, if the key is there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.opt(key, "a string", |v| v.as_str())
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        self.required(key, self.opt_str(key)?)
    }

    /// An array of strings, if the key is there.
    pub fn opt_arr_str(&self, key: &str) -> Result<Option<&[String]>, Error> {
        self.opt(key, "an array of strings", |v| match v.as_array()? {
            Array::String(a) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of strings.
    pub fn arr_str(&self, key: &str) -> Result<&[String], Error> {
        self.required(key, self.opt_arr_str(key)?)
    }

    /// An array of `f32`, if the key is there.
    pub fn opt_arr_f32(&self, key: &str) -> Result<Option<&[f32]>, Error> {
        self.opt(key, "an array of f32", |v| match v.as_array()? {
            Array::F32(a) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// An array of `f32`.
    pub fn arr_f32(&self, key: &str) -> Result<&[f32], Error> {
        self.required(key, self.opt_arr_f32(key)?)
    }

    /// An array of integers that all fit `i64`, if the key is there.
    pub fn opt_arr_i64(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        self.opt(key, "an array of integers", |v| {
            Some(match v.as_array()? {
                Array::U8(a) => a.iter().map(|&v| v.into()).collect(),
                Array::I8(a) => a.iter().map(|&v| v.into()).collect(),
                Array::U16(a) => a.iter().map(|&v| v.into()).collect(),
                Array::I16(a) => a.iter().map(|&v| v.into()).collect(),
                Array::U32(a) => a.iter().map(|&v| v.into()).collect(),
                Array::I32(a) => a.iter().map(|&v| v.into()).collect(),
                Array::I64(a) => a.clone(),
                Array::U64(a) => {
                    let all: Result<Vec<i64>, _> = a.iter().map(|&v| v.try_into()).collect();
                    all.ok()?
                }
                _ => return None,
            })
        })
    }

    /// An array of integers that all fit `i64`.
    pub fn arr_i64(&self, key: &str) -> Result<Vec<i64>, Error> {
        self.required(key, self.opt_arr_i64(key)?)
    }

    /// An array of integers that all fit `u32`, if the key is there.
    pub fn opt_arr_u32(&self, key: &str) -> Result<Option<Vec<u32>>, Error> {
        let Some(wide) = self.opt_arr_i64(key)? else {
            return Ok(None);
        };
        let all: Result<Vec<u32>, _> = wide.into_iter().map(u32::try_from).collect();
        match all {
            Ok(narrow) => Ok(Some(narrow)),
            Err(_) => Err(self.key_error(key, "an array of integers that fit u32")),
        }
    }

    /// An array of integers that all fit `u32`.
    pub fn arr_u32(&self, key: &str) -> Result<Vec<u32>, Error> {
        self.required(key, self.opt_arr_u32(key)?)
    }
}

fn map(path: &Path) -> Result<Bytes, Error> {
    let fail = |e| Error::new(path, ErrorKind::Io(e));
    let file = File::open(path).map_err(fail)?;
    let meta = file.metadata().map_err(fail)?;
    if meta.is_dir() {
        return Err(fail(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    if meta.len() == 0 {
        return Ok(Bytes::Owned(Vec::new())); // an empty map is an error on some systems
    }
    // SAFETY: the map is read-only and private. What remains is another process shortening or changing the
    // file meanwhile; `Gguf` documents it, and every header byte is copied out before it is used.
    let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
    Ok(Bytes::Mapped(map))
}

/// File name of part `no` (from 0) of `count`.
pub fn split_name(stem: &str, no: u64, count: u64) -> String {
    format!("{stem}-{:05}-of-{count:05}.gguf", no + 1)
}

/// The stem of a split file's name, if the name is that of part `no`.
fn split_stem(path: &Path, no: u64, count: u64) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let suffix = split_name("", no, count);
    name.strip_suffix(&suffix).map(str::to_string)
}
