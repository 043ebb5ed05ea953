//! Writes GGUF files (version 3): keys and tensor infos are collected first, then the data are streamed.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::error::{Error, ErrorKind};
use super::reader::tensor_bytes;
use super::types::GgmlType;
use super::value::{Array, TYPE_ARRAY, Value};
use super::{DEFAULT_ALIGNMENT, KEY_ALIGNMENT};

/// Longest tensor name written: llama.cpp refuses longer ones.
const MAX_TENSOR_NAME_BYTES: usize = 63;

struct Planned {
    name: String,
    dims: Vec<u64>,
    ty: GgmlType,
    n_bytes: u64,
}

/// Collects keys and tensor infos of a new file.
///
/// ```no_run
/// # use mneme_engine::gguf::{GgufWriter, GgmlType};
/// # fn main() -> Result<(), mneme_engine::gguf::Error> {
/// let mut writer = GgufWriter::new();
/// writer.set("general.architecture", "llama");
/// writer.tensor("output_norm.weight", &[2], GgmlType::F32)?;
/// let mut sink = writer.create("model.gguf".as_ref(), false)?;
/// sink.tensor("output_norm.weight", bytemuck::cast_slice(&[1f32, 1f32]))?;
/// sink.finish()
/// # }
/// ```
#[derive(Default)]
pub struct GgufWriter {
    keys: Vec<(String, Value)>,
    tensors: Vec<Planned>,
    names: HashSet<String>,
}

impl GgufWriter {
    /// A file without keys and tensors.
    pub fn new() -> GgufWriter {
        GgufWriter::default()
    }

    /// Sets a key; a second value for the same key replaces the first in its place. `general.alignment` must be a
    /// `u32` power of two, which [`GgufWriter::create`] checks.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some(slot) => slot.1 = value,
            None => self.keys.push((key.to_string(), value)),
        }
        self
    }

    /// Removes a key, if it is set.
    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    /// The keys set so far.
    pub fn keys(&self) -> &[(String, Value)] {
        &self.keys
    }

    /// Announces a tensor. Data must be written in the order of the announcements. `dims` in ggml's order (row first).
    ///
    /// Fails on a name used twice or longer than 63 bytes, more than 4 dims, or a row that is not whole blocks.
    pub fn tensor(&mut self, name: &str, dims: &[u64], ty: GgmlType) -> Result<&mut Self, Error> {
        let fail = |kind| Error::new(Path::new("<new file>"), kind);
        if name.len() > MAX_TENSOR_NAME_BYTES {
            return Err(fail(ErrorKind::NameTooLong {
                what: format!("tensor name {name:?}"),
                got: name.len(),
                max: MAX_TENSOR_NAME_BYTES,
            }));
        }
        if dims.len() > 4 {
            return Err(fail(ErrorKind::Dims {
                tensor: name.to_string(),
                got: dims.len() as u32,
            }));
        }
        let n_bytes = tensor_bytes(name, dims, ty).map_err(fail)?;
        if !self.names.insert(name.to_string()) {
            return Err(fail(ErrorKind::DuplicateTensor {
                tensor: name.to_string(),
            }));
        }
        self.tensors.push(Planned {
            name: name.to_string(),
            dims: dims.to_vec(),
            ty,
            n_bytes,
        });
        Ok(self)
    }

    /// Alignment of the tensor data.
    fn alignment(&self) -> Result<u64, ErrorKind> {
        match self.keys.iter().find(|(key, _)| key == KEY_ALIGNMENT) {
            None => Ok(DEFAULT_ALIGNMENT),
            Some((_, Value::U32(v))) if v.is_power_of_two() => Ok(u64::from(*v)),
            Some((_, v)) => Err(ErrorKind::Alignment {
                got: format!("{v} ({})", v.type_name()),
            }),
        }
    }

    /// The header, padded to where tensor data start.
    fn header(&self) -> Result<(Vec<u8>, u64), ErrorKind> {
        let alignment = self.alignment()?;
        let mut out = Vec::new();
        out.extend_from_slice(b"GGUF");
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            put_string(&mut out, &t.name);
            out.extend_from_slice(&(t.dims.len() as u32).to_le_bytes());
            for &n in &t.dims {
                out.extend_from_slice(&n.to_le_bytes());
            }
            out.extend_from_slice(&t.ty.id().to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            offset = (t.n_bytes.checked_next_multiple_of(alignment))
                .and_then(|padded| offset.checked_add(padded))
                .ok_or_else(|| ErrorKind::TensorSize {
                    tensor: t.name.clone(),
                    dims: t.dims.clone(),
                    ty: t.ty.name(),
                })?;
        }
        out.resize(out.len().next_multiple_of(alignment as usize), 0);
        Ok((out, alignment))
    }

    /// The whole file in memory; `data` holds one slice per tensor, in order.
    pub fn to_bytes(&self, data: &[&[u8]]) -> Result<Vec<u8>, Error> {
        let path = Path::new("<bytes>");
        let (mut out, alignment) = self.header().map_err(|kind| Error::new(path, kind))?;
        for (i, t) in self.tensors.iter().enumerate() {
            let got = data.get(i).map_or(0, |d| d.len() as u64);
            if got != t.n_bytes {
                return Err(Error::new(path, data_size(t, got)));
            }
            out.extend_from_slice(data[i]);
            out.resize(out.len().next_multiple_of(alignment as usize), 0);
        }
        Ok(out)
    }

    /// Writes the header to a temporary file beside `path` and returns the sink for the data.
    ///
    /// `path` itself appears only when [`TensorSink::finish`] succeeds; dropping the sink removes the temporary
    /// file. Fails at once with [`ErrorKind::Exists`] if `path` exists and `overwrite` is not set.
    pub fn create(self, path: &Path, overwrite: bool) -> Result<TensorSink, Error> {
        let fail = |kind| Error::new(path, kind);
        if !overwrite && path.symlink_metadata().is_ok() {
            return Err(fail(ErrorKind::Exists));
        }
        let (header, alignment) = self.header().map_err(fail)?;
        let temp = temp_beside(path).map_err(|e| fail(ErrorKind::Io(e)))?;
        let mut out = BufWriter::with_capacity(1 << 20, temp);
        out.write_all(&header).map_err(|e| fail(ErrorKind::Io(e)))?;
        Ok(TensorSink {
            path: path.to_path_buf(),
            overwrite,
            out,
            alignment,
            tensors: self.tensors,
            next: 0,
            written: 0,
        })
    }
}

/// Takes the tensor data of a new file, in the order announced, and puts the file in place at the end.
pub struct TensorSink {
    path: PathBuf,
    overwrite: bool,
    out: BufWriter<NamedTempFile>,
    alignment: u64,
    tensors: Vec<Planned>,
    next: usize,
    /// Bytes of tensor `next` that are written.
    written: u64,
}

impl TensorSink {
    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(&self.path, kind)
    }

    /// Writes the data of the next tensor in one piece. Fails if the name or size is not what was announced.
    pub fn tensor(&mut self, name: &str, data: &[u8]) -> Result<(), Error> {
        let Some(t) = self.tensors.get(self.next) else {
            return Err(self.error(ErrorKind::TooManyTensors {
                count: self.tensors.len(),
                got: name.to_string(),
            }));
        };
        if t.name != name || self.written != 0 {
            return Err(self.error(ErrorKind::Order {
                tensor: t.name.clone(),
                got: name.to_string(),
            }));
        }
        if t.n_bytes != data.len() as u64 {
            return Err(self.error(data_size(t, data.len() as u64)));
        }
        self.write_part(data)
    }

    /// Writes the next bytes of the data of the next tensor (or tensors: a tensor ends where its size says).
    pub fn write_part(&mut self, mut data: &[u8]) -> Result<(), Error> {
        loop {
            let Some(t) = self.tensors.get(self.next) else {
                if data.is_empty() {
                    return Ok(());
                }
                return Err(self.error(ErrorKind::TooManyTensors {
                    count: self.tensors.len(),
                    got: format!("{} bytes more", data.len()),
                }));
            };
            let n_bytes = t.n_bytes;
            let take = (data.len() as u64).min(n_bytes - self.written);
            let (now, later) = data.split_at(take as usize);
            self.write(now)?;
            self.written += take;
            if self.written < n_bytes {
                return Ok(());
            }
            let padding = n_bytes.next_multiple_of(self.alignment) - n_bytes;
            self.write(&vec![0; padding as usize])?;
            self.next += 1;
            self.written = 0;
            if later.is_empty() {
                return Ok(());
            }
            data = later;
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match self.out.write_all(bytes) {
            Ok(()) => Ok(()),
            Err(e) => Err(self.error(ErrorKind::Io(e))),
        }
    }

    /// Flushes to the disk and renames the temporary file into place. Fails if data are missing, the disk is full,
    /// or (without `overwrite`) the file appeared meanwhile; then nothing is left behind.
    pub fn finish(mut self) -> Result<(), Error> {
        while (self.tensors.get(self.next)).is_some_and(|t| t.n_bytes == 0) {
            self.next += 1; // tensors without elements need no data
        }
        if let Some(t) = self.tensors.get(self.next) {
            return Err(self.error(data_size(t, self.written)));
        }
        let TensorSink {
            path,
            overwrite,
            out,
            ..
        } = self;
        let fail = |e: std::io::Error| {
            let kind = match e.kind() {
                std::io::ErrorKind::AlreadyExists => ErrorKind::Exists,
                _ => ErrorKind::Io(e),
            };
            Error::new(&path, kind)
        };
        let temp = out.into_inner().map_err(|e| fail(e.into_error()))?;
        temp.as_file().sync_all().map_err(fail)?;
        if overwrite {
            temp.persist(&path).map_err(|e| fail(e.error))?;
        } else {
            temp.persist_noclobber(&path).map_err(|e| fail(e.error))?;
        }
        sync_folder(&path);
        Ok(())
    }
}

fn data_size(t: &Planned, got: u64) -> ErrorKind {
    ErrorKind::DataSize {
        tensor: t.name.clone(),
        expected: t.n_bytes,
        got,
    }
}

/// A temporary file in the folder of `path`, so that renaming it stays within one file system.
fn temp_beside(path: &Path) -> std::io::Result<NamedTempFile> {
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        // Renaming would replace a device or a pipe.
        return Err(std::io::Error::other("is there and no regular file"));
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut prefix = path.file_name().unwrap_or_default().to_os_string();
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".part");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As an ordinary new file: the process's umask takes away what it takes.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

/// Makes the rename durable where the system can sync a folder. The file is complete either way.
fn sync_folder(path: &Path) {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let Ok(folder) = File::open(folder)
        && let Err(e) = folder.sync_all()
    {
        tracing::debug!("cannot sync the folder of {}: {e}", path.display());
    }
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.extend_from_slice(&value.type_id().to_le_bytes());
    match value {
        Value::U8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::U64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Array(a) => {
            debug_assert_ne!(a.type_id(), TYPE_ARRAY);
            out.extend_from_slice(&a.type_id().to_le_bytes());
            out.extend_from_slice(&(a.len() as u64).to_le_bytes());
            match a {
                Array::U8(v) => out.extend_from_slice(v),
                Array::I8(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::U16(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::I16(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::U32(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::I32(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::F32(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::Bool(v) => v.iter().for_each(|v| out.push(u8::from(*v))),
                Array::String(v) => v.iter().for_each(|v| put_string(out, v)),
                Array::U64(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::I64(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
                Array::F64(v) => v
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
            }
        }
    }
}
