//! The driver's part of a [`super::Device`] played by the host, for tests: kernels run to their
//! end inside `launch`, each block's threads as fibers (`kernels/cuda/host`).
//!
//! New memory holds NaN, ends at an inaccessible page, and is unmapped when freed, so that
//! reading what was never written, or past an end, does not go unnoticed.

use super::Error;
use super::device::Shape;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::sync::{Mutex, PoisonError};

unsafe extern "C" {
    fn mneme_cuda_host_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: u32,
        args: *const c_void,
        args_bytes: usize,
    ) -> i32;
}

/// The emulated device.
pub(crate) struct Driver {
    /// What has been recorded, while capturing.
    recording: Mutex<Option<Vec<Work>>>,
    names: Mutex<HashMap<&'static str, CString>>,
}

enum Work {
    Launch(&'static str, Shape, Vec<u64>, usize),
    Copy { to: u64, from: u64, n: usize },
    Zero { to: u64, n: usize },
}

/// A list of work.
pub(crate) struct Recording(Vec<Work>);

/// Mapped pages, the numbers at their end.
pub(crate) struct Allocation {
    map: usize,
    map_bytes: usize,
    address: u64,
    bytes: usize,
}

impl Allocation {
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

const PAGE: usize = 4096;

impl Driver {
    pub(crate) fn count() -> usize {
        1
    }

    pub(crate) fn open(n: usize) -> Result<Driver, Error> {
        if n > 0 {
            return Err(Error::NoDevice { n, count: 1 });
        }
        Ok(Driver {
            recording: Mutex::new(None),
            names: Mutex::default(),
        })
    }

    pub(crate) fn name(&self) -> &str {
        "host emulation (for tests)"
    }

    pub(crate) fn total_bytes(&self) -> usize {
        8 << 30
    }

    pub(crate) fn free_bytes(&self) -> Result<usize, Error> {
        Ok(self.total_bytes())
    }

    pub(crate) fn n_multiprocessors(&self) -> usize {
        4
    }

    pub(crate) fn alloc(&self, bytes: usize) -> Result<Allocation, Error> {
        let out_of_memory = Error::OutOfMemory {
            asked: bytes,
            free: self.total_bytes(),
        };
        if bytes > self.total_bytes() {
            return Err(out_of_memory);
        }
        let used = bytes.max(1).next_multiple_of(PAGE);
        let map_bytes = used + PAGE;
        // SAFETY: a new private mapping of a checked size, whose last page is made inaccessible.
        let map = unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if map == libc::MAP_FAILED {
                return Err(out_of_memory);
            }
            map.cast::<u8>().write_bytes(0xff, used);
            libc::mprotect(map.cast::<u8>().add(used).cast(), PAGE, libc::PROT_NONE);
            map as usize
        };
        Ok(Allocation {
            map,
            map_bytes,
            // As near to the inaccessible page as vector loads allow.
            address: (map + used - bytes.next_multiple_of(16)) as u64,
            bytes,
        })
    }

    /// # Safety
    /// Nothing may refer to it any more.
    pub(crate) unsafe fn free(&self, allocation: &Allocation) {
        // SAFETY: mapped by `alloc` with this size; unused by the caller's promise.
        unsafe { libc::munmap(allocation.map as *mut c_void, allocation.map_bytes) };
    }

    /// # Safety
    /// Both ranges must be live.
    pub(crate) unsafe fn write(&self, to: u64, from: *const u8, n: usize) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, n) };
        Ok(())
    }

    /// # Safety
    /// Both ranges must be live.
    pub(crate) unsafe fn read(&self, to: *mut u8, from: u64, n: usize) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, n) };
        Ok(())
    }

    /// # Safety
    /// Both ranges must be live and apart.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, n: usize) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { self.submit(Work::Copy { to, from, n }) }
    }

    /// # Safety
    /// The range must be live.
    pub(crate) unsafe fn zero(&self, to: u64, n: usize) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { self.submit(Work::Zero { to, n }) }
    }

    /// # Safety
    /// `args` must point to `n` bytes that are the kernel's arguments.
    pub(crate) unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        args: *const c_void,
        n: usize,
    ) -> Result<(), Error> {
        let mut copy = vec![0u64; n.div_ceil(8)];
        // SAFETY: `copy` has room for `n` bytes; the rest by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(args.cast::<u8>(), copy.as_mut_ptr().cast(), n);
            self.submit(Work::Launch(kernel, shape, copy, n))
        }
    }

    unsafe fn submit(&self, work: Work) -> Result<(), Error> {
        let mut recording = lock(&self.recording);
        if let Some(recording) = &mut *recording {
            recording.push(work);
            return Ok(());
        }
        drop(recording);
        // SAFETY: by the caller's promise.
        unsafe { self.run(&work) }
    }

    unsafe fn run(&self, work: &Work) -> Result<(), Error> {
        match work {
            // SAFETY: by the caller's promise.
            &Work::Copy { to, from, n } => unsafe {
                std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, n);
            },
            // SAFETY: as above.
            &Work::Zero { to, n } => unsafe { (to as *mut u8).write_bytes(0, n) },
            Work::Launch(kernel, shape, args, n) => {
                let name = lock(&self.names)
                    .entry(kernel)
                    .or_insert_with(|| CString::new(*kernel).expect("kernel names have no NUL"))
                    .as_ptr();
                // SAFETY: the name lives as long as the driver; arguments as promised.
                let code = unsafe {
                    mneme_cuda_host_launch(
                        name,
                        shape.grid.as_ptr(),
                        shape.block.as_ptr(),
                        shape.shared_bytes,
                        args.as_ptr().cast(),
                        *n,
                    )
                };
                let why = match code {
                    0 => return Ok(()),
                    1 => "there is no such kernel",
                    2 => "its arguments have another size",
                    _ => "no device would accept this grid, block or shared memory",
                };
                return Err(Error::Driver {
                    what: format!("kernel {kernel}"),
                    why: why.into(),
                });
            }
        }
        Ok(())
    }

    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }

    pub(crate) fn begin_capture(&self) -> Result<(), Error> {
        *lock(&self.recording) = Some(Vec::new());
        Ok(())
    }

    pub(crate) fn end_capture(&self) -> Result<Recording, Error> {
        Ok(Recording(lock(&self.recording).take().unwrap_or_default()))
    }

    /// # Safety
    /// Everything it touches must be live.
    pub(crate) unsafe fn launch_recording(&self, recording: &Recording) -> Result<(), Error> {
        for work in &recording.0 {
            // SAFETY: by the caller's promise.
            unsafe { self.run(work)? };
        }
        Ok(())
    }

    pub(crate) fn free_recording(&self, recording: &mut Recording) {
        recording.0.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
