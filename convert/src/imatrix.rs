//! Importance matrices: how strongly each column of a weight is used, measured on a text by
//! llama.cpp's `imatrix` tool. Both of its formats are read: GGUF, and the older `.dat`.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use mneme_engine::gguf::{GgmlType, Gguf};

use crate::Error;

/// Importances by tensor name.
#[derive(Clone, Debug)]
pub struct Imatrix {
    path: PathBuf,
    entries: HashMap<String, Vec<f32>>,
    dataset: Option<String>,
    n_chunks: Option<u32>,
}

impl Imatrix {
    /// Reads a file of either format.
    pub fn open(path: &Path) -> Result<Imatrix, Error> {
        let mut magic = [0; 4];
        let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
        let is_gguf = file.read_exact(&mut magic).is_ok() && &magic == b"GGUF";
        let mut imatrix = Imatrix {
            path: path.to_path_buf(),
            entries: HashMap::new(),
            dataset: None,
            n_chunks: None,
        };
        if is_gguf {
            imatrix.read_gguf(&Gguf::open(path)?)?;
        } else {
            let bytes = std::fs::read(path).map_err(Error::io(path))?;
            imatrix.read_dat(&bytes)?;
        }
        if imatrix.entries.is_empty() {
            return Err(imatrix.error("it has no entries"));
        }
        for (name, values) in &imatrix.entries {
            if let Some(bad) = values
                .iter()
                .find(|value| !value.is_finite() || **value < 0.0)
            {
                return Err(imatrix.error(format!("entry {name:?} holds {bad}")));
            }
        }
        Ok(imatrix)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tensors.
    pub fn n_entries(&self) -> usize {
        self.entries.len()
    }

    /// The text that it was measured on, if the file says.
    pub fn dataset(&self) -> Option<&str> {
        self.dataset.as_deref()
    }

    /// Number of pieces of text, if the file says.
    pub fn n_chunks(&self) -> Option<u32> {
        self.n_chunks
    }

    /// Importances of a tensor: one per column and matrix.
    pub fn get(&self, tensor: &str) -> Option<&[f32]> {
        self.entries.get(tensor).map(Vec::as_slice)
    }

    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::Imatrix {
            path: self.path.clone(),
            message: message.into(),
        }
    }

    /// Pairs of tensors `NAME.in_sum2` and `NAME.counts`, both F32: sums of squares and how many.
    fn read_gguf(&mut self, gguf: &Gguf) -> Result<(), Error> {
        if gguf.opt_str("general.type")? != Some("imatrix") {
            return Err(self.error("it is a GGUF file, but general.type is not \"imatrix\""));
        }
        let floats = |name: &str| -> Result<Vec<f32>, Error> {
            let tensor = gguf.require_tensor(name)?;
            if tensor.ty != GgmlType::F32 {
                let message = format!("tensor {name:?} has type {}, expected f32", tensor.ty);
                return Err(self.error(message));
            }
            let bytes = gguf.data(tensor).as_chunks::<4>().0;
            Ok(bytes.iter().map(|raw| f32::from_le_bytes(*raw)).collect())
        };
        let mut entries = HashMap::new();
        for tensor in gguf.tensors() {
            let Some(name) = tensor.name.strip_suffix(".in_sum2") else {
                continue;
            };
            let mut values = floats(&tensor.name)?;
            let counts = floats(&format!("{name}.counts"))?;
            if counts.is_empty() || !values.len().is_multiple_of(counts.len()) || values.is_empty()
            {
                let message = format!(
                    "{name:?} has {} sums and {} counts",
                    values.len(),
                    counts.len()
                );
                return Err(self.error(message));
            }
            let n_cols = values.len() / counts.len();
            for (sums, &count) in values.chunks_mut(n_cols).zip(&counts) {
                for sum in sums {
                    // A matrix that no token reached: all columns alike.
                    *sum = if count > 0.0 { *sum / count } else { 1.0 };
                }
            }
            entries.insert(name.to_owned(), values);
        }
        self.entries = entries;
        let datasets = gguf.opt_arr_str("imatrix.datasets")?;
        self.dataset = datasets.and_then(|names| names.first().cloned());
        self.n_chunks = gguf.opt_u32("imatrix.chunk_count")?;
        Ok(())
    }

    /// `n_entries`, then per entry: length of the name, name, calls, values, F32 sums; then the number of
    /// pieces and the data set's name. All numbers i32.
    fn read_dat(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut at = 0usize;
        let mut take = |n: usize, what: &str| {
            let left = bytes.len() - at;
            if n > left {
                let message =
                    format!("it ends inside {what}: {n} bytes needed at offset {at}, {left} left");
                return Err(self.error(message));
            }
            at += n;
            Ok(&bytes[at - n..at])
        };
        let count = |raw: &[u8], what: &str| {
            let n = i32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            usize::try_from(n).map_err(|_| self.error(format!("{what} is {n}")))
        };
        let n_entries = count(take(4, "the number of entries")?, "the number of entries")?;
        let mut entries = HashMap::new();
        for i in 0..n_entries {
            let what = format!("entry {i}");
            let n = count(take(4, &what)?, "a name's length")?;
            let name = String::from_utf8_lossy(take(n, &what)?).into_owned();
            let n_calls = count(take(4, &what)?, "a number of calls")?;
            let n = count(take(4, &what)?, "a number of values")?;
            let n_bytes = n
                .checked_mul(4)
                .ok_or_else(|| self.error(format!("{what} is too large")))?;
            let raw = take(n_bytes, &what)?.as_chunks::<4>().0;
            let divisor = if n_calls > 0 { n_calls as f32 } else { 1.0 };
            let values = raw
                .iter()
                .map(|raw| f32::from_le_bytes(*raw) / divisor)
                .collect();
            entries.insert(name, values);
        }
        // The rest came later in the format's life.
        let tail = take(4, "").and_then(|raw| count(raw, "chunks")).ok();
        let dataset = take(4, "")
            .and_then(|raw| count(raw, "name"))
            .and_then(|n| take(n, "the data set's name"));
        let dataset = dataset
            .ok()
            .map(|raw| String::from_utf8_lossy(raw).into_owned());
        self.entries = entries;
        self.n_chunks = tail.and_then(|n| u32::try_from(n).ok());
        self.dataset = dataset;
        Ok(())
    }
}
