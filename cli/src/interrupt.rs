//! Ctrl-C, and the system's own wish that a program end: commands that work in steps look here between
//! them and finish cleanly.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static PRESSED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();

/// The error a command returns when Ctrl-C or a signal ended it; the process then exits with
/// [`exit_code`].
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

/// What a command exits with that was ended by SIGTERM.
const TERMINATED: u8 = 143;

/// Set by SIGTERM and SIGHUP, once somebody watches for them.
#[cfg(unix)]
static ENDED: std::sync::OnceLock<std::sync::Arc<AtomicBool>> = std::sync::OnceLock::new();

/// As [`watch`], and the same for SIGTERM and SIGHUP: for commands that would leave half a file behind.
pub fn watch_all() {
    watch();
    #[cfg(unix)]
    ENDED.get_or_init(|| {
        use signal_hook::consts::{SIGHUP, SIGTERM};
        use signal_hook::flag;
        let ended = std::sync::Arc::<AtomicBool>::default();
        for signal in [SIGTERM, SIGHUP] {
            // The second one does not wait. Without a handler the first one ends the process.
            let code = TERMINATED.into();
            let _ = flag::register_conditional_shutdown(signal, code, ended.clone());
            let _ = flag::register(signal, ended.clone());
        }
        ended
    });
}

fn ended() -> bool {
    #[cfg(unix)]
    if let Some(ended) = ENDED.get() {
        return ended.load(Ordering::SeqCst);
    }
    false
}

/// What a process exits with that was interrupted.
pub fn exit_code() -> u8 {
    match ended() {
        true => TERMINATED,
        false => 130,
    }
}

/// Whether Ctrl-C was pressed since the last call of [`clear`], or the process shall end.
pub fn pressed() -> bool {
    PRESSED.load(Ordering::SeqCst) || ended()
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
