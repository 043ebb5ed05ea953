//! Progress on stderr: only on a terminal, and only for work that has lasted a while.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Work shorter than this shows no bar.
const DELAY: Duration = Duration::from_secs(2);

/// What the length counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of a file.
    Bytes,
    /// Tokens, or anything else counted one by one.
    Count,
}

/// A bar that appears once its work has lasted two seconds.
pub struct Progress {
    bar: ProgressBar,
    since: Instant,
    shown: bool,
}

impl Progress {
    /// A bar of `len` steps named `what`.
    pub fn new(what: &'static str, len: u64, unit: Unit) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::hidden());
        let template = match unit {
            Unit::Bytes => "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
            Unit::Count => "{msg} [{bar:30}] {pos}/{len} {per_sec} {eta}",
        };
        let style = ProgressStyle::with_template(template).expect("the templates are fixed");
        bar.set_style(style.progress_chars("=> "));
        bar.set_message(what);
        Progress {
            bar,
            since: Instant::now(),
            // Never shown: nobody would see it move.
            shown: !std::io::stderr().is_terminal(),
        }
    }

    /// `done` steps are done.
    pub fn set(&mut self, done: u64) {
        if !self.shown && self.since.elapsed() > DELAY {
            self.bar
                .set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
            self.shown = true;
        }
        self.bar.set_position(done);
    }

    /// Changes the number of steps.
    pub fn set_len(&mut self, len: u64) {
        self.bar.set_length(len);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
