//! Session files: a conversation's tokens and memory, to be taken up again later.
//!
//! Layout (little endian): magic `mneme\0\0\1`, format version u32, model identity u64, memory
//! description and K/V types as strings, tokens, the memory's own bytes, the caller's bytes
//! (sampler state), CRC-32 of everything before it. Written to a temporary file in the same
//! folder and renamed, so a reader never meets half a session.

use std::io::{self, Read, Write};

/// First eight bytes of a session file.
pub const MAGIC: [u8; 8] = *b"mneme\0\0\x01";
/// Version of the layout; another version is refused.
pub const VERSION: u32 = 2;

/// Writes primitive values and keeps a running checksum.
pub struct Encoder<'a> {
    out: &'a mut dyn Write,
    crc: crc32fast::Hasher,
}

impl<'a> Encoder<'a> {
    /// Encodes into `out`.
    pub fn new(out: &'a mut dyn Write) -> Encoder<'a> {
        Encoder {
            out,
            crc: crc32fast::Hasher::new(),
        }
    }

    /// Raw bytes, no length.
    pub fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc.update(bytes);
        self.out.write_all(bytes)
    }

    /// One u32.
    pub fn u32(&mut self, n: u32) -> io::Result<()> {
        self.bytes(&n.to_le_bytes())
    }

    /// One u64.
    pub fn u64(&mut self, n: u64) -> io::Result<()> {
        self.bytes(&n.to_le_bytes())
    }

    /// One f32.
    pub fn f32(&mut self, x: f32) -> io::Result<()> {
        self.bytes(&x.to_le_bytes())
    }

    /// A length and the values.
    pub fn f32s(&mut self, xs: &[f32]) -> io::Result<()> {
        self.u64(xs.len() as u64)?;
        self.bytes(bytemuck::cast_slice(xs))
    }

    /// A length and the values.
    pub fn u32s(&mut self, xs: &[u32]) -> io::Result<()> {
        self.u64(xs.len() as u64)?;
        self.bytes(bytemuck::cast_slice(xs))
    }

    /// A length and the bytes.
    pub fn blob(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.u64(bytes.len() as u64)?;
        self.bytes(bytes)
    }

    /// The checksum of everything so far, written behind it.
    pub fn finish(self) -> io::Result<()> {
        let crc = self.crc.finalize();
        self.out.write_all(&crc.to_le_bytes())
    }
}

/// Reads what an [`Encoder`] wrote, believing no length beyond what the file could hold.
pub struct Decoder<'a> {
    from: &'a mut dyn Read,
    crc: crc32fast::Hasher,
    /// Bytes left in the file: the bound on every length.
    left: u64,
}

impl<'a> Decoder<'a> {
    /// Decodes from `from`, which holds `left` bytes.
    pub fn new(from: &'a mut dyn Read, left: u64) -> Decoder<'a> {
        Decoder {
            from,
            crc: crc32fast::Hasher::new(),
            left,
        }
    }

    /// Fills `out`.
    pub fn bytes_into(&mut self, out: &mut [u8]) -> io::Result<()> {
        self.left = self
            .left
            .checked_sub(out.len() as u64)
            .ok_or_else(|| io::Error::other("the file ends too early"))?;
        self.from.read_exact(out)?;
        self.crc.update(out);
        Ok(())
    }

    /// One u32.
    pub fn u32(&mut self) -> io::Result<u32> {
        let mut b = [0; 4];
        self.bytes_into(&mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// One u64.
    pub fn u64(&mut self) -> io::Result<u64> {
        let mut b = [0; 8];
        self.bytes_into(&mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// One f32.
    pub fn f32(&mut self) -> io::Result<f32> {
        Ok(f32::from_bits(self.u32()?))
    }

    fn length(&mut self, size: u64) -> io::Result<usize> {
        let n = self.u64()?;
        match n.checked_mul(size) {
            Some(bytes) if bytes <= self.left => Ok(n as usize),
            _ => Err(io::Error::other(format!(
                "a list of {n} values does not fit the {} bytes left",
                self.left
            ))),
        }
    }

    /// A list of any length the file can hold.
    pub fn f32s(&mut self) -> io::Result<Vec<f32>> {
        let n = self.length(4)?;
        let mut xs = vec![0f32; n];
        self.bytes_into(bytemuck::cast_slice_mut(&mut xs))?;
        Ok(xs)
    }

    /// A list whose length is known.
    pub fn f32s_into(&mut self, out: &mut [f32]) -> io::Result<()> {
        let n = self.length(4)?;
        if n != out.len() {
            return Err(io::Error::other(format!(
                "expected {} values, got {n}",
                out.len()
            )));
        }
        self.bytes_into(bytemuck::cast_slice_mut(out))
    }

    /// A list of any length the file can hold.
    pub fn u32s(&mut self) -> io::Result<Vec<u32>> {
        let n = self.length(4)?;
        let mut xs = vec![0u32; n];
        self.bytes_into(bytemuck::cast_slice_mut(&mut xs))?;
        Ok(xs)
    }

    /// A list of bytes of any length the file can hold.
    pub fn blob(&mut self) -> io::Result<Vec<u8>> {
        let n = self.length(1)?;
        let mut bytes = vec![0; n];
        self.bytes_into(&mut bytes)?;
        Ok(bytes)
    }

    /// A string.
    pub fn string(&mut self) -> io::Result<String> {
        String::from_utf8(self.blob()?).map_err(|_| io::Error::other("a string is not UTF-8"))
    }

    /// Compares the checksum that follows, and ends the file, with that of everything read.
    pub fn finish(self) -> io::Result<()> {
        let crc = self.crc.finalize();
        let mut b = [0; 4];
        let Some(after) = self.left.checked_sub(b.len() as u64) else {
            return Err(io::Error::other("the file ends too early"));
        };
        self.from.read_exact(&mut b)?;
        if u32::from_le_bytes(b) != crc {
            return Err(io::Error::other("the checksum does not match"));
        }
        if after > 0 {
            return Err(io::Error::other(format!("{after} bytes follow its end")));
        }
        Ok(())
    }
}
