//! Ctrl-C: commands that work in steps look here between them and finish cleanly.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static PRESSED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();

/// The error a command returns when Ctrl-C ended it; the process then exits with 130.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// From now on Ctrl-C only sets a flag, and a second one that finds it still set ends the process.
pub fn watch() {
    INSTALL.call_once(|| {
        // Without a handler Ctrl-C kills the process, which loses nothing but the summary.
        let _ = ctrlc::set_handler(|| {
            if PRESSED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        });
    });
}

/// Whether Ctrl-C was pressed since the last call of [`clear`].
pub fn pressed() -> bool {
    PRESSED.load(Ordering::SeqCst)
}

/// Forgets a Ctrl-C that has been answered.
pub fn clear() {
    PRESSED.store(false, Ordering::SeqCst);
}

/// An error when Ctrl-C was pressed.
pub fn check() -> Result<(), Interrupted> {
    match pressed() {
        true => Err(Interrupted),
        false => Ok(()),
    }
}
