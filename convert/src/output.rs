//! Writes planned tensors to one GGUF file or to the parts of a split one. Nothing appears under a
//! final name before every part is complete.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mneme_engine::gguf::{self, GgmlType, GgufWriter, TensorSink};

use crate::Error;

/// How far a conversion has come, for a progress display.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor being written.
    pub tensor: &'a str,
    /// Its type.
    pub ty: &'static str,
    /// Tensors finished.
    pub n_done: usize,
    /// Tensors in all.
    pub n_tensors: usize,
    /// Bytes of tensor data written.
    pub bytes_done: u64,
    /// Bytes of tensor data in all.
    pub bytes_total: u64,
}

/// Called before each slab of a tensor; `Break` stops, and no output is left.
pub type OnProgress<'a> = dyn FnMut(Progress<'_>) -> ControlFlow<()> + 'a;

/// One tensor of the output.
pub(crate) struct OutputTensor {
    pub name: String,
    /// ggml's order, the row first.
    pub dims: Vec<u64>,
    pub ty: GgmlType,
}

impl OutputTensor {
    fn n_bytes(&self) -> u64 {
        // Rows that are not whole blocks are refused by the writer, with the tensor's name.
        self.ty.tensor_bytes(&self.dims).unwrap_or(0)
    }
}

/// Where to write.
#[derive(Clone, Debug)]
pub struct OutputOptions {
    /// The file, `NAME.gguf`; parts of a split model become `NAME-00001-of-0000N.gguf`.
    pub path: PathBuf,
    /// Replace existing files.
    pub overwrite: bool,
    /// Largest size of the tensor data of a part; `None` for one file.
    pub split_max_bytes: Option<u64>,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// The file, or all parts in order.
    pub files: Vec<PathBuf>,
    /// Number of tensors.
    pub n_tensors: usize,
    /// Bytes of tensor data.
    pub n_bytes: u64,
}

/// Fails early if an output is in the way or its folder cannot hold it: before any long work.
fn check_free(path: &Path, overwrite: bool) -> Result<(), Error> {
    if path.is_dir() {
        return Err(Error::Options(format!(
            "{}: is a folder; give the name of the file to write",
            path.display()
        )));
    }
    let exists = path.symlink_metadata().is_ok();
    if exists && !overwrite {
        return Err(Error::Options(format!(
            "{}: already exists; give --force to replace it",
            path.display()
        )));
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return Err(Error::Options(format!(
            "{}: the folder {} does not exist",
            path.display(),
            folder.display()
        )));
    }
    Ok(())
}

/// Which tensors go into each part.
fn parts_of(tensors: &[OutputTensor], max: Option<u64>) -> Vec<std::ops::Range<usize>> {
    let max = max.unwrap_or(u64::MAX);
    let (mut parts, mut start, mut bytes) = (Vec::new(), 0, 0u64);
    for (i, tensor) in tensors.iter().enumerate() {
        let more = tensor.n_bytes();
        if i > start && bytes.saturating_add(more) > max {
            parts.push(start..i);
            (start, bytes) = (i, 0);
        }
        bytes = bytes.saturating_add(more);
    }
    parts.push(start..tensors.len());
    parts
}

/// `NAME.gguf` to `NAME-00001-of-00003.gguf`.
fn part_path(path: &Path, no: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_path_buf();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", no + 1))
}

/// Writes a file: `keys` fills the first part's metadata, `produce(i, write)` gives the data of tensor `i`
/// in slabs.
pub(crate) fn write_gguf(
    options: &OutputOptions,
    keys: GgufWriter,
    tensors: &[OutputTensor],
    progress: &mut OnProgress<'_>,
    mut produce: impl FnMut(usize, &mut dyn FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error>,
) -> Result<Written, Error> {
    let parts = parts_of(tensors, options.split_max_bytes);
    let count = parts.len();
    if count > usize::from(u16::MAX) {
        return Err(Error::Options(format!(
            "a split into {count} parts is too fine: at most {}",
            u16::MAX
        )));
    }
    let files: Vec<PathBuf> = (0..count)
        .map(|no| part_path(&options.path, no, count))
        .collect();
    for file in &files {
        check_free(file, options.overwrite)?;
    }
    let n_bytes = tensors.iter().map(OutputTensor::n_bytes).sum();
    let mut keys = Some(keys);
    let mut sinks: Vec<TensorSink> = Vec::with_capacity(count);
    let mut bytes_done = 0u64;
    for (no, part) in parts.into_iter().enumerate() {
        let mut writer = keys.take().unwrap_or_default();
        if count > 1 {
            writer.set("split.no", no as u16);
            writer.set("split.count", count as u16);
            writer.set("split.tensors.count", tensors.len() as i32);
        }
        for tensor in &tensors[part.clone()] {
            writer.tensor(&tensor.name, &tensor.dims, tensor.ty)?;
        }
        let mut sink = writer.create(&files[no], options.overwrite)?;
        for i in part {
            let tensor = &tensors[i];
            let mut report = |bytes_done| {
                let step = Progress {
                    tensor: &tensor.name,
                    ty: tensor.ty.name(),
                    n_done: i,
                    n_tensors: tensors.len(),
                    bytes_done,
                    bytes_total: n_bytes,
                };
                match progress(step) {
                    ControlFlow::Continue(()) => Ok(()),
                    ControlFlow::Break(()) => Err(Error::Stopped),
                }
            };
            report(bytes_done)?;
            produce(i, &mut |bytes| {
                sink.write_part(bytes)?;
                bytes_done += bytes.len() as u64;
                report(bytes_done)
            })?;
        }
        sinks.push(sink);
    }
    finish(sinks, &files, options.overwrite)?;
    Ok(Written {
        files,
        n_tensors: tensors.len(),
        n_bytes,
    })
}

/// Puts all parts in place; if one fails, takes back those that were new.
fn finish(sinks: Vec<TensorSink>, files: &[PathBuf], overwrite: bool) -> Result<(), gguf::Error> {
    for (no, sink) in sinks.into_iter().enumerate() {
        if let Err(error) = sink.finish() {
            if !overwrite {
                for file in &files[..no] {
                    let _ = std::fs::remove_file(file);
                }
            }
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_hold_whole_tensors_up_to_the_size() {
        let tensor = |n| OutputTensor {
            name: "t".into(),
            dims: vec![n],
            ty: GgmlType::F32,
        };
        let tensors = [tensor(10), tensor(10), tensor(100), tensor(1), tensor(1)];
        assert_eq!(parts_of(&tensors, None).len(), 1);
        assert_eq!(parts_of(&tensors, Some(80)), [0..2, 2..3, 3..5]);
        assert_eq!(parts_of(&tensors, Some(1)), [0..1, 1..2, 2..3, 3..4, 4..5]);
        let path = Path::new("a/b.gguf");
        assert_eq!(part_path(path, 1, 3), Path::new("a/b-00002-of-00003.gguf"));
        assert_eq!(part_path(path, 0, 1), path);
    }
}
