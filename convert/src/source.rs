//! A Hugging Face model folder: its JSON files, and its tensors over memory maps.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value as Json;

use crate::Error;

/// Element type of a source tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// Upper half of a single.
    BF16,
}

impl SourceType {
    fn size(self) -> usize {
        match self {
            SourceType::F32 => 4,
            SourceType::F16 | SourceType::BF16 => 2,
        }
    }
}

/// Where a tensor lies in the folder.
#[derive(Clone, Debug)]
pub struct SourceTensor {
    /// Name in the safetensors file.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Element type.
    pub ty: SourceType,
    file: usize,
    offset: usize,
}

impl SourceTensor {
    /// Number of elements. The safetensors header was checked, so the product does not overflow.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Fails unless the shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), Error> {
        if self.shape == expected {
            return Ok(());
        }
        Err(Error::Shape {
            tensor: self.name.clone(),
            expected: expected.to_vec(),
            got: self.shape.clone(),
        })
    }
}

/// The tensors of a folder, from `model.safetensors`, from the files of
/// `model.safetensors.index.json`, or from every `.safetensors` file in it.
pub struct Source {
    folder: PathBuf,
    maps: Vec<Mmap>,
    tensors: BTreeMap<String, SourceTensor>,
}

impl Source {
    /// Maps every weight file of a folder and checks its header.
    pub fn open(folder: &Path) -> Result<Source, Error> {
        if !folder.is_dir() {
            let message = if folder.exists() {
                "is not a folder: give the folder that holds config.json and the safetensors files"
            } else {
                "does not exist"
            };
            return Err(Error::Files {
                path: folder.to_path_buf(),
                message: message.into(),
            });
        }
        let mut source = Source {
            folder: folder.to_path_buf(),
            maps: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for path in weight_files(folder)? {
            source.map(&path)?;
        }
        Ok(source)
    }

    fn map(&mut self, path: &Path) -> Result<(), Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only; a file that another process shortens meanwhile ends this one by
        // SIGBUS, as with every mapped model.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let fail = |source| Error::Safetensors {
            path: path.to_path_buf(),
            source,
        };
        let views = SafeTensors::deserialize(&map).map_err(fail)?;
        let start = map.as_ptr() as usize;
        for (name, view) in views.iter() {
            let ty = match view.dtype() {
                Dtype::F32 => SourceType::F32,
                Dtype::F16 => SourceType::F16,
                Dtype::BF16 => SourceType::BF16,
                got => {
                    return Err(Error::Dtype {
                        tensor: name.to_string(),
                        got: format!("{got:?}"),
                    });
                }
            };
            let tensor = SourceTensor {
                name: name.to_string(),
                shape: view.shape().to_vec(),
                ty,
                file: self.maps.len(),
                offset: view.data().as_ptr() as usize - start,
            };
            if self.tensors.insert(name.to_string(), tensor).is_some() {
                return Err(Error::Files {
                    path: path.to_path_buf(),
                    message: format!("tensor {name:?} is in another file of the folder too"),
                });
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, SourceTensor> {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Result<&SourceTensor, Error> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            tensor: name.to_string(),
            path: self.folder.clone(),
        })
    }

    /// Reads elements `from..from + out.len()` as F32, exactly.
    pub fn read(&self, tensor: &SourceTensor, from: usize, out: &mut [f32]) {
        let size = tensor.ty.size();
        let start = tensor.offset + from * size;
        let bytes = &self.maps[tensor.file][start..start + out.len() * size];
        match tensor.ty {
            SourceType::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
            SourceType::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = f16::from_le_bytes(*raw).to_f32();
                }
            }
            SourceType::BF16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = bf16::from_le_bytes(*raw).to_f32();
                }
            }
        }
    }

    /// The whole tensor as F32.
    pub fn read_all(&self, tensor: &SourceTensor) -> Vec<f32> {
        let mut out = vec![0.0; tensor.n_elements()];
        self.read(tensor, 0, &mut out);
        out
    }
}

/// The weight files of a folder, sorted.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let single = folder.join("model.safetensors");
    let index_path = folder.join("model.safetensors.index.json");
    if index_path.is_file() {
        let index = read_json(&index_path)?.unwrap_or_default();
        let names = index["weight_map"].as_object().ok_or_else(|| Error::Key {
            path: index_path.clone(),
            key: "weight_map".into(),
            expected: "an object from tensor names to file names".into(),
            got: short(&index["weight_map"]),
        })?;
        let mut files = BTreeSet::new();
        for (tensor, file) in names {
            // A file name only: an index must not reach outside of its folder.
            let file = file.as_str().filter(|file| {
                !file.is_empty() && Path::new(file).file_name() == Some(file.as_ref())
            });
            let file = file.ok_or_else(|| Error::Key {
                path: index_path.clone(),
                key: format!("weight_map.{tensor}"),
                expected: "the name of a file in the same folder".into(),
                got: short(&names[tensor]),
            })?;
            files.insert(folder.join(file));
        }
        for file in &files {
            if !file.is_file() {
                return Err(Error::Files {
                    path: index_path,
                    message: format!("the file {} that it names is missing", file.display()),
                });
            }
        }
        return Ok(files.into_iter().collect());
    }
    if single.is_file() {
        return Ok(vec![single]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
            && path.is_file()
        {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::Files {
            path: folder.to_path_buf(),
            message: "no .safetensors file in it".into(),
        });
    }
    Ok(files)
}

/// A JSON file, `None` if there is none.
pub fn read_json(path: &Path) -> Result<Option<Json>, Error> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let json = serde_json::from_slice(&text).map_err(|source| Error::Json {
        path: path.to_path_buf(),
        source,
    })?;
    Ok(Some(json))
}

/// A JSON value for an error message, cut to a line.
pub fn short(value: &Json) -> String {
    if value.is_null() {
        return "nothing".into();
    }
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
