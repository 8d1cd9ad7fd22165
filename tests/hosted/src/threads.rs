//! Threads that end also when one of them fails.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Tells other threads to end when it goes, also when it goes because its own thread failed.
#[derive(Debug)]
pub struct Ends<'a>(
    /// What the other threads look at.
    pub &'a AtomicBool,
);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}
