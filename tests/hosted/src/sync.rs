//! Stands in for `core::sync`, so that the source of a driver can be compiled with atomics that [`crate::interleave`]
//! controls. It has what the broker uses, and no more.

/// Stands in for `core::sync::atomic`.
pub mod atomic {
    use crate::interleave::access;
    pub use std::sync::atomic::Ordering;

    /// A `core::sync::atomic::AtomicU64` before each access of which something else can happen.
    #[derive(Debug)]
    pub struct AtomicU64(std::sync::atomic::AtomicU64);

    impl AtomicU64 {
        /// See the real one.
        pub const fn new(value: u64) -> Self {
            Self(std::sync::atomic::AtomicU64::new(value))
        }

        /// See the real one.
        pub fn load(&self, order: Ordering) -> u64 {
            access();
            self.0.load(order)
        }

        /// See the real one.
        pub fn store(&self, value: u64, order: Ordering) {
            access();
            self.0.store(value, order);
        }

        /// See the real one.
        pub fn swap(&self, value: u64, order: Ordering) -> u64 {
            access();
            self.0.swap(value, order)
        }

        /// See the real one.
        pub fn compare_exchange(
            &self,
            current: u64,
            new: u64,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u64, u64> {
            access();
            self.0.compare_exchange(current, new, success, failure)
        }

        /// See the real one.
        pub fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
            access();
            self.0.fetch_add(value, order)
        }

        /// See the real one.
        pub fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
            access();
            self.0.fetch_sub(value, order)
        }

        /// See the real one.
        pub fn fetch_max(&self, value: u64, order: Ordering) -> u64 {
            access();
            self.0.fetch_max(value, order)
        }

        /// See the real one.
        pub fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
            access();
            self.0.fetch_and(value, order)
        }

        /// See the real one.
        pub fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
            access();
            self.0.fetch_or(value, order)
        }
    }

    /// See the real one. Everything happens on one thread here, in the order of the program.
    pub fn fence(_: Ordering) {}
}
