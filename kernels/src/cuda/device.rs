//! A GPU: its memory, its one stream of work, and recorded graphs of work.

use super::Error;
use super::buffer::{Buffer, Memory, Plain, View, ViewMut};
use super::driver::{Driver, Recording};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A GPU that has been opened. Clones are the same device.
#[derive(Clone)]
pub struct Device {
    shared: Arc<Shared>,
    /// Memory that ops use between their own kernels.
    workspace: Arc<Mutex<Option<Arc<Memory>>>>,
}

pub(crate) struct Shared {
    pub(crate) driver: Driver,
    /// While a graph is being captured: everything it touches.
    held: Mutex<Option<Vec<Arc<Memory>>>>,
}

/// Recorded work, to be run again as often as wanted, with what its buffers hold by then. It
/// keeps the buffers it touches alive.
pub struct Graph {
    recording: Recording,
    shared: Arc<Shared>,
    _held: Vec<Arc<Memory>>,
}

/// Grid, block and dynamic shared memory of a launch.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl Shape {
    /// `grid` blocks of `threads` threads in a row, no shared memory.
    pub(crate) fn row(grid: u32, threads: u32) -> Shape {
        Shape {
            grid: [grid, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
        }
    }
}

/// The workspace, locked: nothing else may use it until the op's last kernel is in the stream.
pub(crate) struct Workspace<'a> {
    memory: MutexGuard<'a, Option<Arc<Memory>>>,
    device: &'a Device,
}

impl Workspace<'_> {
    /// Address of its first byte, 256-byte aligned.
    pub(crate) fn address(&self) -> u64 {
        let memory = self.memory.as_ref().expect("made by `Device::workspace`");
        self.device.hold(memory);
        memory.allocation.address()
    }
}

impl Device {
    /// Number of GPUs; 0 without a driver.
    pub fn count() -> usize {
        Driver::count()
    }

    /// Opens GPU `n` and loads the kernels.
    ///
    /// # Errors
    /// Without a driver, without such a device, or if the driver cannot run the kernels.
    pub fn open(n: usize) -> Result<Device, Error> {
        let driver = Driver::open(n)?;
        Ok(Device {
            shared: Arc::new(Shared {
                driver,
                held: Mutex::new(None),
            }),
            workspace: Arc::default(),
        })
    }

    /// The maker's name of the device.
    pub fn name(&self) -> &str {
        self.shared.driver.name()
    }

    /// Memory, in bytes.
    pub fn total_bytes(&self) -> usize {
        self.shared.driver.total_bytes()
    }

    /// Memory not in use by anyone, in bytes.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn free_bytes(&self) -> Result<usize, Error> {
        self.shared.driver.free_bytes()
    }

    /// Multiprocessors: how many blocks of threads run at the same time, at least.
    pub fn n_multiprocessors(&self) -> usize {
        self.shared.driver.n_multiprocessors()
    }

    /// Room for `n` numbers of unspecified content.
    ///
    /// # Errors
    /// If memory is exhausted.
    pub fn alloc<T: Plain>(&self, n: usize) -> Result<Buffer<T>, Error> {
        Ok(Buffer::new(
            self.memory(n.saturating_mul(size_of::<T>()))?,
            n,
        ))
    }

    fn memory(&self, bytes: usize) -> Result<Arc<Memory>, Error> {
        Ok(Arc::new(Memory {
            allocation: self.shared.driver.alloc(bytes)?,
            device: Arc::clone(&self.shared),
        }))
    }

    /// `n` numbers of zero bits.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn zeroed<T: Plain>(&self, n: usize) -> Result<Buffer<T>, Error> {
        let mut buffer = self.alloc(n)?;
        self.zero(buffer.all_mut())?;
        Ok(buffer)
    }

    /// A copy of `from` on the device.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Device::write`].
    pub fn upload<T: Plain>(&self, from: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = self.alloc(from.len())?;
        self.write(buffer.all_mut(), from)?;
        Ok(buffer)
    }

    /// Copies from the host, after the work given so far. `from` may change once this returns.
    ///
    /// # Errors
    /// While capturing: a graph has no host memory.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn write<T: Plain>(&self, to: ViewMut<'_, T>, from: &[T]) -> Result<(), Error> {
        assert_eq!(to.len(), from.len(), "write: lengths differ");
        self.not_capturing("a copy from the host")?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is as long as `from`, and plain numbers have no invalid bytes.
        unsafe {
            let n = size_of_val(from);
            self.shared
                .driver
                .write(to.address(), from.as_ptr().cast(), n)
        }
    }

    /// Copies to the host and waits for it, hence for all work given so far.
    ///
    /// # Errors
    /// While capturing, or if work given earlier has failed.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn read<T: Plain>(&self, from: View<'_, T>, to: &mut [T]) -> Result<(), Error> {
        assert_eq!(to.len(), from.len(), "read: lengths differ");
        self.not_capturing("a copy to the host")?;
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is as long as `from`, and any bytes are plain numbers.
        unsafe {
            let n = size_of_val(to);
            self.shared
                .driver
                .read(to.as_mut_ptr().cast(), from.address(), n)
        }
    }

    /// Copies on the device.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy<T: Plain>(&self, from: View<'_, T>, to: ViewMut<'_, T>) -> Result<(), Error> {
        assert_eq!(to.len(), from.len(), "copy: lengths differ");
        if to.is_empty() {
            return Ok(());
        }
        self.hold(from.memory());
        self.hold(to.memory());
        // SAFETY: both ranges are of live buffers, and `ViewMut` lets nothing overlap it.
        unsafe {
            let n = to.len() * size_of::<T>();
            self.shared.driver.copy(to.address(), from.address(), n)
        }
    }

    /// Fills with zero bits.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn zero<T: Plain>(&self, to: ViewMut<'_, T>) -> Result<(), Error> {
        if to.is_empty() {
            return Ok(());
        }
        self.hold(to.memory());
        // SAFETY: the range is of a live buffer.
        unsafe {
            self.shared
                .driver
                .zero(to.address(), to.len() * size_of::<T>())
        }
    }

    /// Waits for all work given so far.
    ///
    /// # Errors
    /// If any of it failed.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.not_capturing("waiting")?;
        self.shared.driver.synchronize()
    }

    /// Makes the room that ops use between their kernels at least `bytes` large. It grows by
    /// itself when an op needs more; asking in advance keeps that out of steps.
    ///
    /// # Errors
    /// If memory is exhausted.
    pub fn reserve(&self, bytes: usize) -> Result<(), Error> {
        self.workspace(bytes).map(drop)
    }

    pub(crate) fn workspace(&self, bytes: usize) -> Result<Workspace<'_>, Error> {
        let lock = self.workspace.lock();
        let mut memory = lock.unwrap_or_else(PoisonError::into_inner);
        let has = memory.as_ref().map_or(0, |m| m.allocation.bytes());
        if memory.is_none() || has < bytes {
            // A graph captured with the smaller one keeps that alive.
            *memory = None;
            *memory = Some(self.memory(bytes.next_power_of_two().max(1 << 16))?);
        }
        Ok(Workspace {
            memory,
            device: self,
        })
    }

    /// Records the ops that `f` calls instead of running them. Ops that find their workspace too
    /// small enlarge it while recording: run the same ops once before.
    ///
    /// # Errors
    /// Those of `f`, or of the driver; or if a capture is already under way.
    pub fn capture(&self, f: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        self.not_capturing("another capture")?;
        *self.held() = Some(Vec::new());
        let result = self.shared.driver.begin_capture().and_then(|()| {
            let done = f();
            // A capture that has begun must end, whatever happened in it.
            let recording = self.shared.driver.end_capture();
            done.and(recording)
        });
        let held = self.held().take().unwrap_or_default();
        Ok(Graph {
            recording: result?,
            shared: Arc::clone(&self.shared),
            _held: held,
        })
    }

    fn held(&self) -> MutexGuard<'_, Option<Vec<Arc<Memory>>>> {
        let lock = self.shared.held.lock();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    fn not_capturing(&self, what: &'static str) -> Result<(), Error> {
        match *self.held() {
            Some(_) => Err(Error::Capturing { what }),
            None => Ok(()),
        }
    }

    /// Notes that a graph being captured touches `memory`.
    pub(crate) fn hold(&self, memory: &Arc<Memory>) {
        assert!(
            Arc::ptr_eq(&memory.device, &self.shared),
            "a buffer of another device"
        );
        if let Some(held) = &mut *self.held()
            && !held.iter().any(|m| Arc::ptr_eq(m, memory))
        {
            held.push(Arc::clone(memory));
        }
    }

    /// Address for a kernel that reads.
    pub(crate) fn input<T: Plain>(&self, x: &View<'_, T>) -> u64 {
        self.hold(x.memory());
        x.address()
    }

    /// Address for a kernel that writes.
    pub(crate) fn output<T: Plain>(&self, x: &ViewMut<'_, T>) -> u64 {
        self.hold(x.memory());
        x.address()
    }

    /// Puts a kernel into the stream, or into the graph being captured.
    ///
    /// # Safety
    /// `Args` must be the kernel's struct, field by field, and its addresses those of buffers
    /// that are large enough and held ([`Device::input`], [`Device::output`]).
    pub(crate) unsafe fn launch<Args: Copy>(
        &self,
        kernel: &'static str,
        shape: Shape,
        args: &Args,
    ) -> Result<(), Error> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let bytes = size_of::<Args>();
        // SAFETY: by the caller's promise.
        unsafe {
            let args = std::ptr::from_ref(args).cast();
            self.shared.driver.launch(kernel, shape, args, bytes)
        }
    }
}

impl Graph {
    /// Puts the recorded work into the stream.
    ///
    /// # Errors
    /// If the driver refuses.
    pub fn launch(&self) -> Result<(), Error> {
        // SAFETY: what the recording touches is held by this graph.
        unsafe { self.shared.driver.launch_recording(&self.recording) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.shared.driver.free_recording(&mut self.recording);
    }
}
