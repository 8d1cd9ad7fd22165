//! Stands in for `core::sync`.

/// Stands in for `core::sync::atomic`.
pub mod atomic {
    pub use loom::sync::atomic::{Ordering, fence};
    use std::{fmt, sync::OnceLock};

    /// A `core::sync::atomic::AtomicU64` that loom controls.
    ///
    /// loom knows it from its first access on, and wants that to come before all others. Formatting it is an access: a
    /// model looks so at all that is shared, before it starts threads.
    pub struct AtomicU64 {
        first: u64,
        known: OnceLock<loom::sync::atomic::AtomicU64>,
    }

    impl AtomicU64 {
        /// See the real one.
        pub const fn new(value: u64) -> Self {
            Self { first: value, known: OnceLock::new() }
        }

        fn known(&self) -> &loom::sync::atomic::AtomicU64 {
            self.known.get_or_init(|| loom::sync::atomic::AtomicU64::new(self.first))
        }

        /// See the real one.
        pub fn load(&self, order: Ordering) -> u64 {
            self.known().load(order)
        }

        /// See the real one.
        pub fn store(&self, value: u64, order: Ordering) {
            self.known().store(value, order);
        }

        /// See the real one.
        pub fn swap(&self, value: u64, order: Ordering) -> u64 {
            self.known().swap(value, order)
        }

        /// See the real one.
        pub fn compare_exchange(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            self.known().compare_exchange(current, new, success, failure)
        }

        /// See the real one.
        pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            self.known().fetch_add(value, order)
        }

        /// See the real one.
        pub fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
            self.known().fetch_sub(value, order)
        }

        /// See the real one.
        pub fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
            self.known().fetch_max(value, order)
        }

        /// See the real one.
        pub fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
            self.known().fetch_and(value, order)
        }

        /// See the real one.
        pub fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
            self.known().fetch_or(value, order)
        }
    }

    impl fmt::Debug for AtomicU64 {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.known();
            Ok(())
        }
    }
}
