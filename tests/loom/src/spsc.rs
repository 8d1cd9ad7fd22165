//! Stands in for `heapless::spsc`: a ring of slot numbers that promises less than the real one.
//!
//! It keeps no order among the numbers, and orders nothing else: whoever relies on the real ring for that fails here.

use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::marker::PhantomData;

/// Numbers below 128 that are on their way.
#[derive(Debug)]
pub struct Ring([AtomicU64; 2]);

impl Default for Ring {
    fn default() -> Self {
        Self([AtomicU64::new(0), AtomicU64::new(0)])
    }
}

/// Sends numbers.
pub struct Producer<'a, T>(&'a Ring, PhantomData<T>);

/// Takes numbers.
pub struct Consumer<'a, T>(&'a Ring, PhantomData<T>);

impl Ring {
    /// The end that sends.
    pub fn producer(&self) -> Producer<'_, u16> {
        Producer(self, PhantomData)
    }

    /// The end that takes.
    pub fn consumer(&self) -> Consumer<'_, u16> {
        Consumer(self, PhantomData)
    }
}

impl Producer<'_, u16> {
    /// See the real one. A number that is in the ring already would not have room in a real one, and fails the test.
    pub fn enqueue(&mut self, item: u16) -> Result<(), u16> {
        let bit = 1 << (item % 64);
        let before = self.0.0[usize::from(item) / 64].fetch_or(bit, Relaxed);
        assert_eq!(before & bit, 0, "slot {item} was announced twice");
        Ok(())
    }

    /// See the real one.
    pub fn capacity(&self) -> usize {
        128
    }

    /// See the real one.
    pub fn len(&self) -> usize {
        self.0.0.iter().map(|word| word.load(Relaxed).count_ones() as usize).sum()
    }

    /// See the real one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Consumer<'_, u16> {
    /// See the real one.
    pub fn ready(&self) -> bool {
        self.0.0.iter().any(|word| word.load(Relaxed) != 0)
    }

    /// See the real one.
    pub fn dequeue(&mut self) -> Option<u16> {
        (0..2).find_map(|at| {
            let word = &self.0.0[at];
            let seen = word.load(Relaxed);
            let lowest = seen & seen.wrapping_neg();
            (seen != 0).then(|| {
                word.fetch_and(!lowest, Relaxed);
                at as u16 * 64 + lowest.trailing_zeros() as u16
            })
        })
    }
}
