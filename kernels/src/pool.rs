//! A fork-join pool for work that lasts microseconds.
//!
//! One decoded token is some two hundred parallel regions. A general work-stealing pool wakes
//! its sleepers through the operating system for each; here workers spin for a while after every
//! region (the next one is usually microseconds away), then yield, and sleep when the engine goes
//! idle. On a machine with other work a region goes on without the threads that got no processor.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a waiting thread keeps its processor to itself: the gap between two ops of a decode
/// step, or the end of a neighbour's piece of work.
const SPIN: Duration = Duration::from_micros(20);
/// How long it then goes on looking, but lets any other thread have the processor in between.
/// After that it sleeps.
const YIELD: Duration = Duration::from_micros(200);

/// A region's body with its lifetime erased; valid until every thread that entered has left.
#[derive(Clone, Copy)]
struct Job(*const (dyn Fn(usize) + Sync));

/// The region's number in the upper half of [`Shared::gate`].
const REGION: u64 = 1 << 32;
/// Bit of [`Shared::gate`]: nobody else may enter. Workers inside are counted below it.
const CLOSED: u64 = 1 << 31;

struct Shared {
    /// Number of the newest region, whether it is closed, and how many workers have entered it.
    gate: AtomicU64,
    /// Workers that have entered the newest region and left it again.
    left: AtomicUsize,
    /// Body of the newest region: written while nobody is inside, read by those who enter.
    job: UnsafeCell<Job>,
    stop: AtomicBool,
    /// Where workers wait for a region, and where the caller waits for workers.
    idle: Waiting,
    done: Waiting,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written before the gate opens (release) and read after entering through it
// (acquire); the next write waits until all who entered have left. Its pointee is Sync.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A place to wait at: spin, then yield, then sleep.
struct Waiting {
    asleep: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Waiting {
    fn new() -> Waiting {
        Waiting {
            asleep: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Returns once `ready()`.
    fn until(&self, ready: impl Fn() -> bool) {
        let since = Instant::now();
        loop {
            for _ in 0..16 {
                if ready() {
                    return;
                }
                std::hint::spin_loop();
            }
            let waited = since.elapsed();
            if waited > YIELD {
                break;
            }
            if waited > SPIN {
                std::thread::yield_now();
            }
        }
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Ordering::Relaxed);
        // With the fence in `wake`: either this sleeper sees the news or `wake` sees the sleeper.
        fence(Ordering::SeqCst);
        while !ready() {
            lock = self.wake.wait(lock).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::Relaxed);
    }

    /// Wakes those asleep, after what they wait for has been made true.
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) > 0 {
            // Who has counted itself holds the lock until it sleeps.
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }
}

/// Threads that run the same closure side by side. See the module's text.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time: callers on several threads take turns.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads` (at least one): the caller and `n_threads - 1` workers. Workers are
    /// pinned, each to a processor of its own, if there are as many threads as processors in the
    /// caller's affinity mask; with fewer the system knows better which to leave free.
    pub fn new(n_threads: usize) -> Pool {
        let n_threads = n_threads.max(1);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(CLOSED),
            left: AtomicUsize::new(0),
            job: UnsafeCell::new(Job(&|_: usize| {})),
            stop: AtomicBool::new(false),
            idle: Waiting::new(),
            done: Waiting::new(),
            panic: Mutex::new(None),
        });
        let cpus = allowed_cpus();
        let pin = cpus.len() == n_threads;
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

    /// Number of threads a region may run on, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(thread)` for every thread index below [`Pool::n_threads`] and returns when all
    /// have finished. A panic in any of them is raised again here. Must not be nested.
    pub fn run(&self, f: impl Fn(usize) + Sync) {
        self.region(&f, self.workers.len());
    }

    /// Covers `0..n` with ranges of `grain` (the last may be shorter), each claimed by the next
    /// free thread. One range or one thread runs on the caller alone, and the caller never waits
    /// for a worker that has claimed nothing: one without a processor costs only its help.
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
        let body = |_| {
            loop {
                let start = next.fetch_add(grain, Ordering::Relaxed);
                if start >= n {
                    break;
                }
                f(start..(start + grain).min(n));
            }
        };
        self.region(&body, 0);
    }

    /// [`Pool::for_each`] for work whose neighbours lie beside each other in memory: each thread goes
    /// through a part of its own from its start, `grain` at a time, and then helps with the others'.
    /// Two threads that read one stream in turns get less from memory than with a stream each.
    ///
    /// # Panics
    /// If `f` does.
    pub fn for_each_in_parts(&self, n: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
        let (grain, n_parts) = (grain.max(1), self.n_threads());
        if n <= grain || n_parts == 1 {
            return self.for_each(n, grain, f);
        }
        let bound = |part: usize| n / n_parts * part + part.min(n % n_parts);
        let next: Vec<AtomicUsize> = (0..n_parts).map(|p| AtomicUsize::new(bound(p))).collect();
        let body = |thread: usize| {
            for part in (thread..n_parts).chain(0..thread) {
                let end = bound(part + 1);
                loop {
                    let start = next[part].fetch_add(grain, Ordering::Relaxed);
                    if start >= end {
                        break;
                    }
                    f(start..(start + grain).min(end));
                }
            }
        };
        self.region(&body, 0);
    }

    /// Runs `body` on the caller and on every worker that comes before the caller is done; waits
    /// for at least `n_needed` workers to come.
    fn region(&self, body: &(dyn Fn(usize) + Sync), n_needed: usize) {
        if self.workers.is_empty() {
            return body(0);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `body` lives until the waits below have ended.
        let job = Job(unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize) + Sync + '_),
                *const (dyn Fn(usize) + Sync + 'static),
            >(body)
        });
        // SAFETY: the last region is closed and empty: nobody reads the cell.
        unsafe { *shared.job.get() = job }
        shared.left.store(0, Ordering::Relaxed);
        let region = (shared.gate.load(Ordering::Relaxed) / REGION).wrapping_add(1);
        shared
            .gate
            .store(region.wrapping_mul(REGION), Ordering::Release);
        shared.idle.wake();
        let mine = catch_unwind(AssertUnwindSafe(|| body(0)));
        if n_needed > 0 {
            let left = || shared.left.load(Ordering::Acquire);
            shared.done.until(|| left() >= n_needed);
        }
        let entered = (shared.gate.fetch_or(CLOSED, Ordering::AcqRel) % CLOSED) as usize;
        let left = || shared.left.load(Ordering::Acquire);
        shared.done.until(|| left() == entered);
        let theirs = shared
            .panic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.idle.wake();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let open = |gate: u64| gate / REGION != seen && gate & CLOSED == 0;
        let stop = || shared.stop.load(Ordering::Acquire);
        shared
            .idle
            .until(|| open(shared.gate.load(Ordering::Acquire)) || stop());
        if stop() {
            return;
        }
        let enter = |gate| open(gate).then_some(gate + 1);
        let gate = shared
            .gate
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, enter);
        let Ok(gate) = gate else {
            continue; // closed in the meantime
        };
        seen = gate / REGION;
        // SAFETY: entered: the cell holds this region's body, and the caller keeps it alive until
        // this worker has left.
        let body = unsafe { &*(*shared.job.get()).0 };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(thread))) {
            *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        shared.left.fetch_add(1, Ordering::Release);
        shared.done.wake();
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
                pool.for_each_in_parts(n, grain, |range| {
                    for i in range {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 2));
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
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.for_each(100, 1, |range| {
                assert!(range.start != 50, "fails on purpose")
            });
        }));
        assert!(caught.is_err());
        let sum = AtomicU64::new(0);
        pool.for_each(100, 1, |range| {
            sum.fetch_add(range.start as u64, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    }

    /// Far more threads than processors, regions so short that most workers come late.
    #[test]
    fn more_threads_than_processors_finish() {
        let pool = Pool::new(16);
        for n in 0..2000 {
            let sum = AtomicU64::new(0);
            pool.for_each(n % 40, 1, |range| {
                sum.fetch_add(range.start as u64 + 1, Ordering::Relaxed);
            });
            let n = n as u64 % 40;
            assert_eq!(sum.load(Ordering::Relaxed), n * (n + 1) / 2);
        }
        for _ in 0..50 {
            let sum = AtomicU64::new(0);
            pool.run(|t| {
                sum.fetch_add(1 << t, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), (1 << 16) - 1);
        }
    }

    /// Pauses that end while workers spin, while they yield and while they sleep.
    #[test]
    fn no_wake_up_is_lost() {
        let pool = Pool::new(3);
        for pause in 0..300 {
            let until = Instant::now() + Duration::from_micros(pause * 2);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            let sum = AtomicU64::new(0);
            pool.run(|t| {
                sum.fetch_add(1 << t, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 7);
        }
    }

    /// Two callers share a pool in turns, each with panics of its own.
    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2);
        std::thread::scope(|scope| {
            for caller in 0..3u64 {
                let pool = &pool;
                scope.spawn(move || {
                    for n in 0..200 {
                        let sum = AtomicU64::new(0);
                        pool.for_each(30, 1, |_| {
                            sum.fetch_add(caller + 1, Ordering::Relaxed);
                        });
                        assert_eq!(sum.load(Ordering::Relaxed), 30 * (caller + 1));
                        let caught = catch_unwind(AssertUnwindSafe(|| {
                            pool.run(|_| assert!(n % 10 != 0, "fails on purpose"));
                        }));
                        assert_eq!(caught.is_err(), n % 10 == 0);
                    }
                });
            }
        });
    }
}
