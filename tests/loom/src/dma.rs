//! Stands in for `iommu::DmaBuf`: memory that two sides load and store, one word at a time.

use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

/// Words that loom controls. A volatile access is one that promises no order, so it is relaxed here.
#[derive(Clone, Debug)]
pub struct DmaBuf(Arc<[AtomicU64]>);

impl DmaBuf {
    /// So many words, which hold anything.
    pub fn new(words: usize) -> Self {
        Self((0..words).map(|_| AtomicU64::new(u64::MAX)).collect())
    }

    /// See the real one.
    pub fn load(&self, at: usize) -> u64 {
        self.0[at].load(Relaxed)
    }

    /// See the real one.
    pub fn store(&mut self, at: usize, value: u64) {
        self.put(at, value);
    }

    /// Stores from the other side.
    pub fn put(&self, at: usize, value: u64) {
        self.0[at].store(value, Relaxed);
    }

    /// See the real one.
    pub fn store_all<const N: usize>(&mut self, at: usize, values: [u64; N]) {
        (at..).zip(values).for_each(|(at, value)| self.put(at, value));
    }

    /// See the real one.
    pub fn clear(&mut self) {
        self.0.iter().for_each(|word| word.store(0, Relaxed));
    }
}
