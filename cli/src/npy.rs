//! NumPy's `.npy` files: token ids in, F32 rows out.
//!
//! Format: numpy.org/doc/stable/reference/generated/numpy.lib.format.html. Magic `\x93NUMPY`,
//! version, length of a header that is a Python dictionary literal, the values in C order.

use crate::report::{is_special, temp_beside};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest header believed; NumPy's own are a few hundred bytes.
const MAX_HEADER: usize = 1 << 16;

/// Token ids of a one-dimensional int32 or int64 array.
pub fn read_ids(path: &Path) -> Result<Vec<u32>> {
    read_ids_from(path).with_context(|| path.display().to_string())
}

fn read_ids_from(path: &Path) -> Result<Vec<u32>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut file = BufReader::new(file);
    let header = Header::read(&mut file, len)?;
    let size: u64 = match header.descr.as_str() {
        "<i4" | "=i4" => 4,
        "<i8" | "=i8" => 8,
        other => bail!("expected int32 or int64 (`<i4`, `<i8`), got `{other}`"),
    };
    let [n] = header.shape[..] else {
        bail!("expected one dimension, got shape {:?}", header.shape);
    };
    let held = len - header.end;
    if n.checked_mul(size) != Some(held) {
        bail!("shape ({n},) needs {n} values of {size} bytes, the file holds {held} bytes");
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let id = |i: usize, value: i64| {
        u32::try_from(value).with_context(|| format!("value {i} is {value}, not a token id"))
    };
    let ids: Result<Vec<u32>> = match size {
        4 => bytes
            .as_chunks()
            .0
            .iter()
            .enumerate()
            .map(|(i, b)| id(i, i64::from(i32::from_le_bytes(*b))))
            .collect(),
        _ => bytes
            .as_chunks()
            .0
            .iter()
            .enumerate()
            .map(|(i, b)| id(i, i64::from_le_bytes(*b)))
            .collect(),
    };
    let ids = ids?;
    if ids.len() as u64 != n {
        bail!("the file changed while it was read");
    }
    Ok(ids)
}

struct Header {
    descr: String,
    shape: Vec<u64>,
    /// Offset of the first value.
    end: u64,
}

impl Header {
    fn read(from: &mut impl Read, len: u64) -> Result<Header> {
        let mut start = [0; 8];
        from.read_exact(&mut start)
            .context("not a .npy file: too short")?;
        if &start[..6] != MAGIC {
            bail!("not a .npy file");
        }
        let (n, fixed) = match start[6] {
            1 => {
                let mut b = [0; 2];
                from.read_exact(&mut b).context("the header is cut off")?;
                (usize::from(u16::from_le_bytes(b)), 10)
            }
            2 | 3 => {
                let mut b = [0; 4];
                from.read_exact(&mut b).context("the header is cut off")?;
                (u32::from_le_bytes(b) as usize, 12)
            }
            v => bail!("version {v} of the format is unknown"),
        };
        let end = fixed + n as u64;
        if n > MAX_HEADER || end > len {
            bail!("the header claims {n} bytes, the file has {len}");
        }
        let mut text = vec![0; n];
        from.read_exact(&mut text)
            .context("the header is cut off")?;
        let text = String::from_utf8(text).context("the header is not text")?;
        let descr = value_of(&text, "descr")?.trim_start();
        let quote = descr.chars().next().filter(|c| matches!(c, '\'' | '"'));
        let Some(quote) = quote else {
            bail!("a structured type, expected int32 or int64");
        };
        let descr = descr[1..].split(quote).next().unwrap_or_default();
        let shape = value_of(&text, "shape")?.trim_start();
        let inside = shape
            .strip_prefix('(')
            .and_then(|s| s.split_once(')'))
            .with_context(|| "the header has no shape".to_string())?;
        let shape = inside
            .0
            .split(',')
            .map(str::trim)
            .filter(|s| !s.is_empty())
            .map(|s| s.parse().with_context(|| format!("dimension `{s}`")))
            .collect::<Result<Vec<u64>>>()?;
        Ok(Header {
            descr: descr.to_owned(),
            shape,
            end,
        })
    }
}

/// What follows `'key':` in the header.
fn value_of<'a>(header: &'a str, key: &str) -> Result<&'a str> {
    [format!("'{key}':"), format!("\"{key}\":")]
        .iter()
        .find_map(|k| header.split_once(k.as_str()))
        .map(|(_, rest)| rest)
        .with_context(|| format!("the header has no `{key}`"))
}

/// A two-dimensional F32 array, written row by row and put in place when it is complete.
pub struct RowWriter {
    out: BufWriter<NamedTempFile>,
    path: PathBuf,
    n_values: u64,
    expected: u64,
}

impl RowWriter {
    /// Starts `path`, which will hold `[n_rows, n_cols]`.
    pub fn create(path: &Path, n_rows: usize, n_cols: usize) -> Result<RowWriter> {
        let named = || path.display().to_string();
        let temp = temp_beside(path)?;
        let mut out = BufWriter::with_capacity(1 << 20, temp);
        let mut header =
            format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({n_rows}, {n_cols}), }}");
        // The values start at a multiple of 64; the header ends with a newline.
        let fixed = MAGIC.len() + 4;
        let padded = (fixed + header.len() + 1).next_multiple_of(64);
        header += &" ".repeat(padded - fixed - header.len() - 1);
        header.push('\n');
        out.write_all(MAGIC).with_context(named)?;
        out.write_all(&[1, 0]).with_context(named)?;
        let n = u16::try_from(header.len()).expect("two numbers fit a short header");
        out.write_all(&n.to_le_bytes()).with_context(named)?;
        out.write_all(header.as_bytes()).with_context(named)?;
        Ok(RowWriter {
            out,
            path: path.to_owned(),
            n_values: 0,
            expected: n_rows as u64 * n_cols as u64,
        })
    }

    /// Appends values.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        self.n_values += values.len() as u64;
        for chunk in values.chunks(1 << 16) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|x| x.to_le_bytes()).collect();
            self.out
                .write_all(&bytes)
                .with_context(|| self.path.display().to_string())?;
        }
        Ok(())
    }

    /// Puts the file in place.
    pub fn finish(self) -> Result<()> {
        let named = || self.path.display().to_string();
        assert_eq!(self.n_values, self.expected, "rows announced and written");
        let temp = self
            .out
            .into_inner()
            .map_err(|e| e.into_error())
            .with_context(named)?;
        if is_special(&self.path) {
            let mut from = temp.reopen().with_context(named)?;
            let to = std::fs::OpenOptions::new().write(true).open(&self.path);
            std::io::copy(&mut from, &mut to.with_context(named)?).with_context(named)?;
            return Ok(());
        }
        temp.persist(&self.path)
            .map_err(|e| e.error)
            .with_context(named)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> NamedTempFile {
        let mut f = NamedTempFile::new().unwrap();
        f.write_all(bytes).unwrap();
        f
    }

    fn npy(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend([version, 0]);
        match version {
            1 => out.extend((header.len() as u16).to_le_bytes()),
            _ => out.extend((header.len() as u32).to_le_bytes()),
        }
        out.extend(header.as_bytes());
        out.extend(data);
        out
    }

    #[test]
    fn ids_of_both_widths_are_read() {
        let data: Vec<u8> = [7i64, 0, 4_000_000_000]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        let header = "{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }\n";
        for version in [1, 2, 3] {
            let f = file(&npy(version, header, &data));
            assert_eq!(read_ids(f.path()).unwrap(), [7, 0, 4_000_000_000]);
        }
        let data: Vec<u8> = [5i32, 6].iter().flat_map(|x| x.to_le_bytes()).collect();
        let header = "{'descr': '<i4', 'fortran_order': True, 'shape': (2,)}";
        assert_eq!(
            read_ids(file(&npy(1, header, &data)).path()).unwrap(),
            [5, 6]
        );
        let header = "{'descr': '<i4', 'fortran_order': False, 'shape': (0,), }";
        assert!(
            read_ids(file(&npy(1, header, &[])).path())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn broken_files_are_refused_in_words() {
        let ok = "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }";
        let eight = [0u8; 8];
        let huge = format!("{{'descr': '<i8', 'shape': ({},)}}", u64::MAX / 8 + 1);
        let cases: &[(Vec<u8>, &str)] = &[
            (vec![], "too short"),
            (b"\x93NUMPX\x01\x00\x00\x00".to_vec(), "not a .npy"),
            (npy(9, ok, &eight), "version 9"),
            (npy(1, ok, &eight)[..20].to_vec(), "header claims"),
            (npy(1, ok, &eight)[..9].to_vec(), "cut off"),
            (npy(1, ok, &eight[..7]), "holds 7 bytes"),
            (npy(1, ok, &[0; 9]), "holds 9 bytes"),
            (npy(1, &ok.replace("<i4", "<f4"), &eight), "got `<f4`"),
            (
                npy(1, &ok.replace("'<i4'", "[('a', '<i4')]"), &eight),
                "structured",
            ),
            (
                npy(1, &ok.replace("(2,)", "(2,1)"), &eight),
                "one dimension",
            ),
            (
                npy(1, &ok.replace("(2,)", "(-2,)"), &eight),
                "dimension `-2`",
            ),
            (npy(1, &ok.replace("(2,)", "2"), &eight), "no shape"),
            (npy(1, &huge, &eight), "the file holds 8 bytes"),
            (npy(1, "{}", &eight), "no `descr`"),
            (npy(1, ok, &[255; 8]), "value 0 is -1"),
        ];
        for (bytes, expected) in cases {
            let e = format!("{:#}", read_ids(file(bytes).path()).unwrap_err());
            assert!(e.contains(expected), "expected `{expected}` in `{e}`");
        }
    }

    #[test]
    fn rows_are_written_as_numpy_lays_them_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        let mut out = RowWriter::create(&path, 2, 3).unwrap();
        out.write(&[1.0, 2.0, 3.0]).unwrap();
        out.write(&[4.0, 5.0, 6.0]).unwrap();
        assert!(!path.exists(), "the file appears when it is complete");
        out.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let data = bytes.len() - 6 * 4;
        assert_eq!(data % 64, 0);
        assert_eq!(bytes[data - 1], b'\n');
        let header = Header::read(&mut &bytes[..], bytes.len() as u64).unwrap();
        assert_eq!((header.shape, header.descr.as_str()), (vec![2, 3], "<f4"));
        assert_eq!(bytes[data + 4..data + 8], 2f32.to_le_bytes());
    }
}
