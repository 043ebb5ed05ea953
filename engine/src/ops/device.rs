//! Where numbers live.

#[cfg(feature = "on-card")]
use super::cuda::{Card, CardBuffer, CardPage};
use crate::error::Result;
use mneme_kernels::attend::{self, PageLayout};
#[cfg(feature = "on-card")]
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The memory that activations, weights, cells and states are kept in.
#[derive(Clone)]
pub enum Device {
    /// The host's own.
    Host,
    /// A graphics card's.
    #[cfg(feature = "on-card")]
    Cuda(Arc<Card>),
}

impl PartialEq for Device {
    fn eq(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Host, Device::Host) => true,
            #[cfg(feature = "on-card")]
            (Device::Cuda(a), Device::Cuda(b)) => Arc::ptr_eq(a, b),
            #[cfg(feature = "on-card")]
            _ => false,
        }
    }
}

impl Device {
    /// Whether this is the host's own memory.
    pub fn is_host(&self) -> bool {
        matches!(self, Device::Host)
    }

    /// `n` zeros.
    pub fn zeros(&self, n: usize) -> Result<Buffer> {
        match self {
            Device::Host => Ok(Buffer::Host(vec![0.0; n])),
            #[cfg(feature = "on-card")]
            Device::Cuda(card) => {
                let mut buffer = card.buffer(n)?;
                buffer.zero()?;
                Ok(Buffer::Cuda(buffer))
            }
        }
    }

    /// A buffer of these values.
    pub fn upload(&self, values: Vec<f32>) -> Result<Buffer> {
        match self {
            Device::Host => Ok(Buffer::Host(values)),
            #[cfg(feature = "on-card")]
            Device::Cuda(card) => {
                let mut buffer = card.buffer(values.len())?;
                buffer.write(&values)?;
                Ok(Buffer::Cuda(buffer))
            }
        }
    }

    /// Gives `buffer` exactly `n` values of unspecified content, in its own memory where that
    /// suffices.
    pub fn resize(&self, buffer: &mut Buffer, n: usize) -> Result<()> {
        match self {
            Device::Host => match buffer {
                Buffer::Host(values) => values.resize(n, 0.0),
                #[cfg(feature = "on-card")]
                Buffer::Cuda(_) => panic!("a buffer of another device"),
            },
            #[cfg(feature = "on-card")]
            Device::Cuda(card) => match buffer {
                Buffer::Cuda(mine) if mine.capacity() >= n => mine.set_len(n),
                _ => {
                    // What is too small goes first, so that both need not fit.
                    *buffer = Buffer::default();
                    *buffer = Buffer::Cuda(card.buffer(n)?);
                    card.moved();
                }
            },
        }
        Ok(())
    }

    /// Gives `buffer` exactly `n` values, which `fill` writes on the host.
    pub fn fill(&self, buffer: &mut Buffer, n: usize, fill: impl FnOnce(&mut [f32])) -> Result<()> {
        self.resize(buffer, n)?;
        match buffer {
            Buffer::Host(values) => fill(values),
            #[cfg(feature = "on-card")]
            Buffer::Cuda(mine) => {
                let mut values = vec![0.0; n];
                fill(&mut values);
                mine.write(&values)?;
            }
        }
        Ok(())
    }

    /// A page of cells of `layout`. On the host they are zero, elsewhere anything.
    pub fn page(&self, layout: &PageLayout) -> Result<Page> {
        let n_bytes = layout.page_bytes();
        let mem = match self {
            Device::Host => PageMem::Host(attend::Page::zeroed(n_bytes)),
            #[cfg(feature = "on-card")]
            Device::Cuda(card) => PageMem::Cuda(card.page(layout)?),
        };
        LIVE_BYTES.fetch_add(n_bytes, Ordering::Relaxed);
        Ok(Page { mem, n_bytes })
    }
}

/// F32 numbers on a [`Device`].
pub enum Buffer {
    /// In the host's memory.
    Host(Vec<f32>),
    /// In a card's memory.
    #[cfg(feature = "on-card")]
    Cuda(CardBuffer),
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer::Host(Vec::new())
    }
}

impl Buffer {
    /// Numbers held.
    pub fn len(&self) -> usize {
        match self {
            Buffer::Host(values) => values.len(),
            #[cfg(feature = "on-card")]
            Buffer::Cuda(buffer) => buffer.len(),
        }
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether they are in the host's memory.
    pub fn is_host(&self) -> bool {
        matches!(self, Buffer::Host(_))
    }

    /// The numbers of a buffer of the host.
    ///
    /// # Panics
    /// When they are on another device.
    pub fn host(&self) -> &[f32] {
        match self {
            Buffer::Host(values) => values,
            #[cfg(feature = "on-card")]
            Buffer::Cuda(_) => panic!("a buffer of another device"),
        }
    }

    /// As [`Buffer::host`], to be written.
    ///
    /// # Panics
    /// When they are on another device.
    pub fn host_mut(&mut self) -> &mut [f32] {
        match self {
            Buffer::Host(values) => values,
            #[cfg(feature = "on-card")]
            Buffer::Cuda(_) => panic!("a buffer of another device"),
        }
    }

    /// A buffer of a card.
    ///
    /// # Panics
    /// When the numbers are on the host.
    #[cfg(feature = "on-card")]
    pub(super) fn card(&self) -> &CardBuffer {
        match self {
            Buffer::Host(_) => panic!("a buffer of the host"),
            Buffer::Cuda(buffer) => buffer,
        }
    }

    /// As [`Buffer::card`], to be written.
    #[cfg(feature = "on-card")]
    pub(super) fn card_mut(&mut self) -> &mut CardBuffer {
        match self {
            Buffer::Host(_) => panic!("a buffer of the host"),
            Buffer::Cuda(buffer) => buffer,
        }
    }

    /// Holds `n` numbers from now on, of unspecified content where there were fewer; never more
    /// than [`Device::resize`] has made room for.
    pub fn set_len(&mut self, n: usize) {
        match self {
            Buffer::Host(values) => values.resize(n, 0.0),
            #[cfg(feature = "on-card")]
            Buffer::Cuda(buffer) => buffer.set_len(n),
        }
    }

    /// Copies the numbers to the host.
    pub fn read(&self) -> Result<Vec<f32>> {
        match self {
            Buffer::Host(values) => Ok(values.clone()),
            #[cfg(feature = "on-card")]
            Buffer::Cuda(buffer) => {
                let mut values = vec![0.0; buffer.len()];
                buffer.read(&mut values)?;
                Ok(values)
            }
        }
    }

    /// The numbers on the host: in place where they are there already, else copied to `copy`.
    pub fn read_with<'a>(&'a self, copy: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        match self {
            Buffer::Host(values) => {
                copy.clear();
                Ok(values)
            }
            #[cfg(feature = "on-card")]
            Buffer::Cuda(buffer) => {
                copy.resize(buffer.len(), 0.0);
                buffer.read(copy)?;
                Ok(copy)
            }
        }
    }

    /// Replaces the numbers by as many of the host's.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        match self {
            Buffer::Host(mine) => mine.copy_from_slice(values),
            #[cfg(feature = "on-card")]
            Buffer::Cuda(buffer) => buffer.write(values)?,
        }
        Ok(())
    }
}

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of all pages alive in this process, shared ones counted once.
pub fn live_page_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

/// A page of cells on a [`Device`].
pub struct Page {
    mem: PageMem,
    n_bytes: usize,
}

enum PageMem {
    Host(attend::Page),
    #[cfg(feature = "on-card")]
    Cuda(CardPage),
}

impl Page {
    /// The bytes of a page of the host.
    ///
    /// # Panics
    /// When it is on another device.
    pub fn host(&self) -> &[u8] {
        match &self.mem {
            PageMem::Host(page) => page,
            #[cfg(feature = "on-card")]
            PageMem::Cuda(_) => panic!("a page of another device"),
        }
    }

    /// As [`Page::host`], to be written.
    ///
    /// # Panics
    /// When it is on another device.
    pub fn host_mut(&mut self) -> &mut [u8] {
        match &mut self.mem {
            PageMem::Host(page) => page,
            #[cfg(feature = "on-card")]
            PageMem::Cuda(_) => panic!("a page of another device"),
        }
    }

    /// A page of a card.
    ///
    /// # Panics
    /// When it is on the host.
    #[cfg(feature = "on-card")]
    pub(super) fn card(&self) -> &CardPage {
        match &self.mem {
            PageMem::Host(_) => panic!("a page of the host"),
            PageMem::Cuda(page) => page,
        }
    }

    /// A second page of the same content.
    pub fn copy(&self) -> Result<Page> {
        let mem = match &self.mem {
            PageMem::Host(from) => {
                let mut page = attend::Page::zeroed(self.n_bytes);
                page.copy_from_slice(from);
                PageMem::Host(page)
            }
            #[cfg(feature = "on-card")]
            PageMem::Cuda(from) => PageMem::Cuda(from.copy()?),
        };
        LIVE_BYTES.fetch_add(self.n_bytes, Ordering::Relaxed);
        Ok(Page {
            mem,
            n_bytes: self.n_bytes,
        })
    }

    /// Copies the bytes to the host, in the order the host keeps them in.
    pub fn read(&self, out: &mut [u8]) -> Result<()> {
        match &self.mem {
            PageMem::Host(page) => out.copy_from_slice(page),
            #[cfg(feature = "on-card")]
            PageMem::Cuda(page) => page.read(out)?,
        }
        Ok(())
    }

    /// Replaces the bytes by as many of the host's, in its order.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.mem {
            PageMem::Host(page) => page.copy_from_slice(bytes),
            #[cfg(feature = "on-card")]
            PageMem::Cuda(page) => page.write(bytes)?,
        }
        Ok(())
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        LIVE_BYTES.fetch_sub(self.n_bytes, Ordering::Relaxed);
    }
}
