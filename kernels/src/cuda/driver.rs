//! The little of CUDA's driver interface that is used, through `cudarc`'s bindings. The library
//! is opened at run time: the program also starts on machines that do not have it.

use super::Error;
use super::device::Shape;
use cudarc::driver::{DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, PoisonError};

/// Bytes where the driver may want words.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// Fat binaries made by `build.rs`: machine code for Ampere and Hopper, PTX for what came later.
macro_rules! images {
    ($($file:literal)*) => {
        &[$((
            $file,
            &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $file, ".fatbin"))),
        )),*]
    };
}
static IMAGES: &[(&str, &Aligned<[u8]>)] = images!("add" "attend" "cells" "gates" "get_rows" "mul_mat" "peak" "rank" "recur" "recur_chunk" "rms_norm" "rope" "swiglu" "top_k");

/// More dynamic shared memory than this must be asked for, function by function.
const SHARED_BYTES: u32 = 48 * 1024;

/// A device's primary context, one stream, and the kernels.
pub(crate) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<&'static str, Function>>,
    name: String,
    total_bytes: usize,
    n_multiprocessors: usize,
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared_bytes: u32,
}

// SAFETY: contexts, streams, modules and functions may be used from any thread once the context
// is made current there, which every method does first; the table of functions is locked.
unsafe impl Send for Driver {}
// SAFETY: as above. The driver's own calls are thread safe.
unsafe impl Sync for Driver {}

/// Device memory.
pub(crate) struct Allocation {
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

/// An instantiated graph.
pub(crate) struct Recording {
    graph: sys::CUgraph,
    instance: sys::CUgraphExec,
}

// SAFETY: a graph may be launched from any thread, one at a time, which the stream's owner does.
unsafe impl Send for Recording {}
// SAFETY: launching takes no exclusive access to the instance itself; see the stream's order.
unsafe impl Sync for Recording {}

fn wrap<T>(what: &str, result: Result<T, DriverError>) -> Result<T, Error> {
    result.map_err(|e| {
        let words = e.error_string().map(|s| s.to_string_lossy().into_owned());
        Error::Driver {
            what: what.into(),
            why: words.unwrap_or_else(|_| format!("error {}", e.0 as u32)),
        }
    })
}

impl Driver {
    /// Whether the library is there and answers.
    fn start() -> Result<(), Error> {
        // SAFETY: only looks for the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        wrap("starting CUDA", result::init())
    }

    pub(crate) fn count() -> usize {
        if Driver::start().is_err() {
            return 0;
        }
        result::device::get_count().map_or(0, |n| n.max(0) as usize)
    }

    pub(crate) fn open(n: usize) -> Result<Driver, Error> {
        Driver::start()?;
        let count = wrap("counting GPUs", result::device::get_count())?;
        let count = count.max(0) as usize;
        if n >= count {
            return Err(Error::NoDevice { n, count });
        }
        let device = wrap("opening the GPU", result::device::get(n as i32))?;
        let name = wrap("the GPU's name", result::device::get_name(device))?;
        // SAFETY: the device is one of those counted.
        let (total, n_multiprocessors, major) = unsafe {
            use sys::CUdevice_attribute::{
                CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            };
            let attribute = |a| wrap("asking the GPU", result::device::get_attribute(device, a));
            (
                wrap("the GPU's memory", result::device::total_mem(device))?,
                attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            )
        };
        if major < 8 {
            return Err(Error::Driver {
                what: format!("GPU {n} ({name})"),
                why: format!("compute capability {major}.x; 8.0 (Ampere) or newer is needed"),
            });
        }
        // SAFETY: released in `drop`.
        let context = wrap("the GPU's context", unsafe {
            result::primary_ctx::retain(device)
        })?;
        // From here on `drop` cleans up.
        let mut driver = Driver {
            device,
            context,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            functions: Mutex::default(),
            name,
            total_bytes: total,
            n_multiprocessors: n_multiprocessors.max(1) as usize,
        };
        driver.enter()?;
        let kind = result::stream::StreamKind::NonBlocking;
        driver.stream = wrap("a stream", result::stream::create(kind))?;
        for (file, image) in IMAGES {
            // SAFETY: a fat binary of ours, which says its own length.
            let module = unsafe { result::module::load_data(image.0.as_ptr().cast()) };
            driver
                .modules
                .push(wrap(&format!("loading the kernels of {file}"), module)?);
        }
        Ok(driver)
    }

    /// Makes the context current on this thread.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: retained until `drop`.
        wrap("entering the GPU's context", unsafe {
            result::ctx::set_current(self.context)
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn total_bytes(&self) -> usize {
        self.total_bytes
    }

    pub(crate) fn free_bytes(&self) -> Result<usize, Error> {
        self.enter()?;
        wrap("free GPU memory", result::mem_get_info()).map(|(free, _)| free)
    }

    pub(crate) fn n_multiprocessors(&self) -> usize {
        self.n_multiprocessors
    }

    pub(crate) fn alloc(&self, bytes: usize) -> Result<Allocation, Error> {
        self.enter()?;
        // SAFETY: any size may be asked for; none is refused by the driver.
        match unsafe { result::malloc_sync(bytes.max(16)) } {
            Ok(address) => Ok(Allocation { address, bytes }),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::OutOfMemory {
                asked: bytes,
                free: self.free_bytes().unwrap_or(0),
            }),
            Err(e) => wrap("GPU memory", Err(e)),
        }
    }

    /// # Safety
    /// Nothing may refer to it any more.
    pub(crate) unsafe fn free(&self, allocation: &Allocation) {
        if self.enter().is_err() {
            // The context is gone, and the memory with it.
            return;
        }
        use sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: allocated by `alloc`, unused by the caller's promise but for work that is still
        // under way, which is waited for. Nothing is while a graph is captured: what the capture
        // touches is held by it. A failure to free leaves nothing that could be done here.
        unsafe {
            if result::stream::is_capturing(self.stream) == Ok(CU_STREAM_CAPTURE_STATUS_NONE) {
                let _ = result::stream::synchronize(self.stream);
            }
            let _ = result::free_sync(allocation.address);
        }
    }

    /// # Safety
    /// Both ranges must be live.
    pub(crate) unsafe fn write(&self, to: u64, from: *const u8, n: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise. The driver has taken in pageable memory when the call
        // returns.
        unsafe {
            let from = std::slice::from_raw_parts(from, n);
            wrap(
                "a copy to the GPU",
                result::memcpy_htod_async(to, from, self.stream),
            )
        }
    }

    /// # Safety
    /// Both ranges must be live.
    pub(crate) unsafe fn read(&self, to: *mut u8, from: u64, n: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise; waited for before it can end.
        let copied = unsafe {
            let to = std::slice::from_raw_parts_mut(to, n);
            result::memcpy_dtoh_async(to, from, self.stream)
        };
        wrap("a copy from the GPU", copied)?;
        self.synchronize()
    }

    /// # Safety
    /// Both ranges must be live and apart.
    pub(crate) unsafe fn copy(&self, to: u64, from: u64, n: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        wrap("a copy on the GPU", unsafe {
            result::memcpy_dtod_async(to, from, n, self.stream)
        })
    }

    /// # Safety
    /// The range must be live.
    pub(crate) unsafe fn zero(&self, to: u64, n: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        wrap("filling GPU memory", unsafe {
            result::memset_d8_async(to, 0, n, self.stream)
        })
    }

    fn function(&self, kernel: &'static str, shared_bytes: u32) -> Result<Function, Error> {
        let lock = self.functions.lock();
        let mut functions = lock.unwrap_or_else(PoisonError::into_inner);
        let mut function = match functions.get(kernel) {
            Some(function) => *function,
            None => {
                let name = CString::new(kernel).expect("kernel names have no NUL");
                let found = self.modules.iter().find_map(|&module| {
                    // SAFETY: the module is loaded until `drop`.
                    unsafe { result::module::get_function(module, name.clone()) }.ok()
                });
                let handle = found.ok_or_else(|| Error::Driver {
                    what: format!("kernel {kernel}"),
                    why: "there is no such kernel".into(),
                })?;
                Function {
                    handle,
                    shared_bytes: SHARED_BYTES,
                }
            }
        };
        if shared_bytes > function.shared_bytes {
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            let set = unsafe {
                result::function::set_function_attribute(
                    function.handle,
                    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes as i32,
                )
            };
            wrap(&format!("shared memory of {kernel}"), set)?;
            function.shared_bytes = shared_bytes;
        }
        functions.insert(kernel, function);
        Ok(function)
    }

    /// # Safety
    /// `args` must point to `n` bytes that are the kernel's arguments.
    pub(crate) unsafe fn launch(
        &self,
        kernel: &'static str,
        shape: Shape,
        args: *const c_void,
        _n: usize,
    ) -> Result<(), Error> {
        self.enter()?;
        let function = self.function(kernel, shape.shared_bytes)?;
        let triple = |x: [u32; 3]| (x[0], x[1], x[2]);
        // SAFETY: every kernel takes one struct; the rest by the caller's promise.
        let launched = unsafe {
            result::launch_kernel(
                function.handle,
                triple(shape.grid),
                triple(shape.block),
                shape.shared_bytes,
                self.stream,
                &mut [args.cast_mut()],
            )
        };
        match launched {
            Ok(()) => Ok(()),
            failed => wrap(&format!("kernel {kernel}"), failed),
        }
    }

    pub(crate) fn synchronize(&self) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the stream lives until `drop`.
        wrap("work on the GPU", unsafe {
            result::stream::synchronize(self.stream)
        })
    }

    pub(crate) fn begin_capture(&self) -> Result<(), Error> {
        self.enter()?;
        // Relaxed: memory may be allocated and freed meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives until `drop`.
        wrap("capturing a graph", unsafe {
            result::stream::begin_capture(self.stream, mode)
        })
    }

    pub(crate) fn end_capture(&self) -> Result<Recording, Error> {
        self.enter()?;
        // SAFETY: a capture is under way; the graph is freed by `free_recording` or just below.
        unsafe {
            let graph = wrap(
                "capturing a graph",
                result::stream::end_capture(self.stream),
            )?;
            if graph.is_null() {
                return Err(Error::Driver {
                    what: "capturing a graph".into(),
                    why: "the capture was invalidated".into(),
                });
            }
            match result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) {
                Ok(instance) => Ok(Recording { graph, instance }),
                Err(e) => {
                    let _ = result::graph::destroy(graph);
                    wrap("instantiating a graph", Err(e))
                }
            }
        }
    }

    /// # Safety
    /// Everything it touches must be live.
    pub(crate) unsafe fn launch_recording(&self, recording: &Recording) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: instantiated in this context; the rest by the caller's promise.
        wrap("launching a graph", unsafe {
            result::graph::launch(recording.instance, self.stream)
        })
    }

    pub(crate) fn free_recording(&self, recording: &mut Recording) {
        if self.enter().is_ok() && !recording.instance.is_null() {
            // SAFETY: made by `end_capture`, freed once: it is null from now on.
            unsafe {
                let _ = result::graph::exec_destroy(recording.instance);
                let _ = result::graph::destroy(recording.graph);
            }
            recording.instance = std::ptr::null_mut();
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: made by `open`; buffers and graphs hold the driver, so none is left. Failures
        // mean that the context is gone already.
        unsafe {
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
