//! A fork-join pool for work that lasts microseconds.
//!
//! One decoded token is some two hundred parallel regions. A general work-stealing pool wakes
//! its sleepers through the operating system for each; here workers spin for a while after every
//! region (the next one is usually microseconds away) and park only when the engine goes idle.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it parks: longer than the gap between two ops of a
/// decode step, shorter than anyone would notice on a fan.
const SPIN: Duration = Duration::from_micros(200);

/// A region's body with its lifetime erased; valid until every thread has finished it.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));
// SAFETY: the pointee is Sync and outlives the region: `run` returns only after all workers
// have reported that they are done with it.
unsafe impl Send for Job {}

struct Shared {
    /// Number of the current region; a change is the signal to start.
    epoch: AtomicUsize,
    /// Workers that have not finished the current region.
    running: AtomicUsize,
    /// Workers parked or about to park; the caller takes the lock only when there are some.
    parked: AtomicUsize,
    job: Mutex<Slot>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Slot {
    job: Option<Job>,
    stop: bool,
}

/// Threads that run the same closure side by side. See the module's text.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time: `run` from two threads takes turns.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads` (at least one): the caller and `n_threads - 1` workers. Workers are
    /// pinned to processors of the caller's affinity mask when there is one for each.
    pub fn new(n_threads: usize) -> Pool {
        let n_threads = n_threads.max(1);
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            parked: AtomicUsize::new(0),
            job: Mutex::new(Slot {
                job: None,
                stop: false,
            }),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let cpus = allowed_cpus();
        let pin = cpus.len() >= n_threads;
        let workers = (1..n_threads)
            .map(|thread| {
                let shared = Arc::clone(&shared);
                let cpu = pin.then(|| cpus[thread]);
                std::thread::Builder::new()
                    .name(format!("mneme-{thread}"))
                    .spawn(move || {
                        if let Some(cpu) = cpu {
                            pin_to(cpu);
                        }
                        work(&shared, thread);
                    })
                    .expect("the system refuses to start a thread")
            })
            .collect();
        Pool {
            shared,
            workers,
            turn: Mutex::new(()),
        }
    }

    /// Number of threads a region runs on, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(thread)` for every thread index below [`Pool::n_threads`] and returns when all
    /// have finished. A panic in any of them is raised again here. Must not be nested.
    pub fn run(&self, f: impl Fn(usize) + Sync) {
        if self.workers.is_empty() {
            return f(0);
        }
        let _turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let body: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: only the lifetime changes; `body` lives until the wait below has ended.
        let job = Job(unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize) + Sync + '_),
                *const (dyn Fn(usize) + Sync + 'static),
            >(body)
        });
        let shared = &*self.shared;
        shared.running.store(self.workers.len(), Ordering::Relaxed);
        shared.job.lock().expect("pool lock").job = Some(job);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            let _guard = shared.job.lock().expect("pool lock");
            shared.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| f(0)));
        let mut spins = 0u32;
        while shared.running.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now(); // more threads than processors
            } else {
                std::hint::spin_loop();
            }
        }
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        let theirs = shared.panic.lock().expect("pool lock").take();
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    /// Covers `0..n` with ranges of `grain` (the last may be shorter), each claimed by the next
    /// free thread. One range or one thread runs on the caller alone.
    pub fn for_each(&self, n: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
        let grain = grain.max(1);
        if n <= grain || self.workers.is_empty() {
            let mut start = 0;
            while start < n {
                let end = (start + grain).min(n);
                f(start..end);
                start = end;
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(|_| {
            loop {
                let start = next.fetch_add(grain, Ordering::Relaxed);
                if start >= n {
                    break;
                }
                f(start..(start + grain).min(n));
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Ok(mut slot) = self.shared.job.lock() {
            slot.stop = true;
        }
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = self.shared.job.lock();
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let idle_since = Instant::now();
        let mut spins = 0u32;
        while shared.epoch.load(Ordering::Acquire) == seen {
            spins += 1;
            std::hint::spin_loop();
            if spins.is_multiple_of(256) && idle_since.elapsed() > SPIN {
                shared.parked.fetch_add(1, Ordering::SeqCst);
                let mut slot = shared.job.lock().expect("pool lock");
                while shared.epoch.load(Ordering::SeqCst) == seen {
                    slot = shared.wake.wait(slot).expect("pool lock");
                }
                drop(slot);
                shared.parked.fetch_sub(1, Ordering::SeqCst);
            }
        }
        seen = shared.epoch.load(Ordering::Acquire);
        let (job, stop) = {
            let slot = shared.job.lock().expect("pool lock");
            (slot.job, slot.stop)
        };
        if stop {
            return;
        }
        if let Some(Job(body)) = job {
            // SAFETY: `run` keeps the closure alive until `running` reaches zero.
            let body = unsafe { &*body };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(thread))) {
                *shared.panic.lock().expect("pool lock") = Some(panic);
            }
            shared.running.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Processors this process may run on, in order.
#[cfg(target_os = "linux")]
fn allowed_cpus() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is an empty set; the call writes no more than its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Vec::new();
        }
        (0..libc::CPU_SETSIZE as usize)
            .filter(|&cpu| libc::CPU_ISSET(cpu, &set))
            .collect()
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed_cpus() -> Vec<usize> {
    Vec::new()
}

/// Binds the calling thread to one processor; failure only costs speed and is ignored.
#[cfg(target_os = "linux")]
fn pin_to(cpu: usize) {
    // SAFETY: `cpu` came out of the affinity mask, so it is below CPU_SETSIZE.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_cpu: usize) {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_thread_runs_every_region_once() {
        for n_threads in [1, 2, 3, 5] {
            let pool = Pool::new(n_threads);
            let hits: Vec<AtomicU64> = (0..n_threads).map(|_| AtomicU64::new(0)).collect();
            for _ in 0..500 {
                pool.run(|t| {
                    hits[t].fetch_add(1, Ordering::Relaxed);
                });
            }
            for hit in &hits {
                assert_eq!(hit.load(Ordering::Relaxed), 500);
            }
        }
    }

    #[test]
    fn for_each_covers_each_index_once() {
        let pool = Pool::new(3);
        for n in [0, 1, 7, 64, 1001] {
            for grain in [0, 1, 8, 2000] {
                let seen: Vec<AtomicU64> = (0..n).map(|_| AtomicU64::new(0)).collect();
                pool.for_each(n, grain, |range| {
                    for i in range {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_parked_pool_wakes_and_a_panic_comes_back() {
        let pool = Pool::new(2);
        std::thread::sleep(Duration::from_millis(20));
        let sum = AtomicU64::new(0);
        pool.run(|t| {
            sum.fetch_add(t as u64 + 1, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(|t| assert_eq!(t, 0, "worker fails on purpose"));
        }));
        assert!(caught.is_err());
        pool.run(|_| {}); // still usable
    }
}
