//! Memory shared with a device: the only `unsafe` code of the driver crates.
//!
//! Four promises, each made once by whoever owns physical memory (a hypervisor's frame allocator, a model) and relied
//! on everywhere else: that memory may be used to talk to a device ([`DmaBuf`]), that a table hierarchy stays valid
//! ([`Root`]), that a device may touch certain memory ([`Grant`]) or all of it ([`Trust`]).
#![expect(unsafe_code, reason = "shared memory is reached through raw pointers; see each type's promise")]

use crate::PhysAddr;
use core::{ops::Range, ptr::NonNull};
use volatile::VolatilePtr;

/// Physically contiguous memory that the CPU and one device both access, in 64-bit words.
#[derive(Debug)]
pub struct DmaBuf {
    cpu: NonNull<u64>,
    phys: PhysAddr,
    words: usize,
}

// SAFETY: a `DmaBuf` is the only CPU-side path to its memory (`new`), so it may move between cores.
unsafe impl Send for DmaBuf {}
// SAFETY: through a shared reference memory is only loaded, and volatile loads may race with the device's stores.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// Takes ownership of `words` 64-bit words at `cpu`, which the device sees at `phys`.
    ///
    /// # Safety
    ///
    /// For the life of the value, `cpu` is valid for volatile reads and writes of `words` words, is aligned for them,
    /// backs the `words` words at `phys`, and no other CPU-side pointer reaches that memory.
    pub const unsafe fn new(cpu: NonNull<u64>, phys: PhysAddr, words: usize) -> Self {
        Self { cpu, phys, words }
    }

    /// Returns the device's view of the buffer's start.
    pub const fn phys(&self) -> PhysAddr {
        self.phys
    }

    /// Returns the number of 64-bit words.
    pub const fn words(&self) -> usize {
        self.words
    }

    /// Returns the device addresses of `count` words from word `at`.
    ///
    /// PANICS: when they are not all inside the buffer.
    #[inline(always)]
    pub fn range(&self, at: usize, count: usize) -> Range<PhysAddr> {
        assert!(at <= self.words && count <= self.words - at, "range outside the buffer");
        let start = self.phys.0 + at as u64 * 8;
        PhysAddr(start)..PhysAddr(start + count as u64 * 8)
    }

    /// Loads word `at`.
    ///
    /// PANICS: when `at` is outside the buffer.
    #[inline]
    pub fn load(&self, at: usize) -> u64 {
        self.word(at).read()
    }

    /// Loads the words from `at`, each in one load, in their order.
    ///
    /// PANICS: when they are not all inside the buffer.
    #[inline]
    pub fn load_all<const N: usize>(&self, at: usize) -> [u64; N] {
        let fits = self.words.checked_sub(N).is_some_and(|last| at <= last);
        assert!(fits, "words outside the buffer");
        core::array::from_fn(|i| {
            // SAFETY: `at + N` words are inside the memory that `new` was promised.
            let word = unsafe { self.cpu.add(at + i) };
            // SAFETY: `new` was promised that the address is valid and aligned for volatile access of one word.
            unsafe { VolatilePtr::new(word) }.read()
        })
    }

    /// Stores `value` in word `at`, in one store.
    ///
    /// PANICS: when `at` is outside the buffer.
    #[inline]
    pub fn store(&mut self, at: usize, value: u64) {
        self.word(at).write(value);
    }

    /// Stores `values` in the words from `at`, each in one store, in their order.
    ///
    /// PANICS: when they are not all inside the buffer.
    #[inline]
    pub fn store_all<const N: usize>(&mut self, at: usize, values: [u64; N]) {
        self.store_rows(at, core::iter::once(values));
    }

    /// Stores `rows` in the words from `at`, one behind the other, each word in one store, in their order. Returns their device
    /// addresses.
    ///
    /// PANICS: when they are not all inside the buffer.
    #[inline(always)]
    pub fn store_rows<const N: usize>(
        &mut self,
        at: usize,
        rows: impl ExactSizeIterator<Item = [u64; N]>,
    ) -> Range<PhysAddr> {
        let count = rows.len();
        let range = self.range(at, count * N);
        // SAFETY: `at` is inside the memory that `new` was promised, or at its end, as `range` has checked.
        let first = unsafe { self.cpu.add(at) };
        // No iterator has more than it says.
        for (row, values) in rows.take(count).enumerate() {
            for (i, value) in values.into_iter().enumerate() {
                // SAFETY: `count * N` words from `first` are inside that memory, as `range` has checked.
                let word = unsafe { first.add(row * N + i) };
                // SAFETY: `new` was promised that the address is valid and aligned for volatile access of one word.
                unsafe { VolatilePtr::new(word) }.write(value);
            }
        }
        range
    }

    /// Stores zero in every word.
    pub fn clear(&mut self) {
        for at in 0..self.words {
            self.store(at, 0);
        }
    }

    fn word(&self, at: usize) -> VolatilePtr<'_, u64> {
        assert!(at < self.words, "word outside the buffer");
        // SAFETY: `at` is in bounds, so the address is inside the memory that `new` was promised.
        let word = unsafe { self.cpu.add(at) };
        // SAFETY: `new` was promised that the address is valid and aligned for volatile access of one word.
        unsafe { VolatilePtr::new(word) }
    }
}

/// The root of a table hierarchy that stays valid for as long as a unit may walk it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Root {
    phys: PhysAddr,
    levels: u8,
}

impl Root {
    /// Names the hierarchy of `levels` levels whose top table is at `phys`.
    ///
    /// # Safety
    ///
    /// From the moment the root is attached until the invalidation that follows its detachment has completed, `phys`
    /// points at tables in the format that it is attached as, and every memory that they reach may be touched by the
    /// device in the way they say.
    pub const unsafe fn new(phys: PhysAddr, levels: u8) -> Self {
        Self { phys, levels }
    }

    /// Returns the physical address of the top table.
    pub const fn phys(self) -> PhysAddr {
        self.phys
    }

    /// Returns the number of levels: 3, 4 or 5.
    pub const fn levels(self) -> u8 {
        self.levels
    }
}

/// The word of whoever owns physical memory that a device may reach all of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Trust(());

impl Trust {
    /// Vouches for a device.
    ///
    /// # Safety
    ///
    /// The device that is attached with it, and whoever programs that device, may read and write all of physical memory
    /// without breaking what the program rests on.
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

/// Physical memory that a device, or a guest, may touch while it is mapped.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Grant {
    phys: Range<PhysAddr>,
}

impl Grant {
    /// Grants `phys`.
    ///
    /// # Safety
    ///
    /// Until the grant is unmapped and the invalidation has completed, whoever it is mapped for may read and write
    /// the memory at any moment, and nothing that the hypervisor's safety rests on lives there.
    pub const unsafe fn new(phys: Range<PhysAddr>) -> Self {
        Self { phys }
    }

    /// Returns the memory.
    pub fn phys(&self) -> Range<PhysAddr> {
        self.phys.clone()
    }

    /// Returns the size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.phys.end.0.saturating_sub(self.phys.start.0)
    }
}
