//! Memory that devices are given, and memory that is not the guest's to own: registers and the channel.
#![expect(unsafe_code, reason = "registers and the channel are reached by address")]

use crate::machine;
use core::{
    ops::Range,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};
use iommu::PAGE_SIZE;

/// Words of a page.
pub const PAGE_WORDS: usize = PAGE_SIZE as usize / 8;

/// A page that a device may be given. A device may change it at any time, so it is made of atomics.
#[repr(C, align(4096))]
pub struct Page([AtomicU64; PAGE_WORDS]);

/// All pages that devices are given.
pub static PAGES: [Page; 16] = [const { Page([const { AtomicU64::new(0) }; PAGE_WORDS]) }; 16];

/// Where the hypervisor writes counters.
pub static COUNTS: Page = Page([const { AtomicU64::new(0) }; PAGE_WORDS]);

impl Page {
    /// Returns the page's guest-physical address.
    pub fn address(&self) -> u64 {
        ptr::from_ref(self).addr() as u64
    }

    /// Fills the page with words that depend on `seed` and on where they are.
    pub fn fill(&self, seed: u64) {
        for (at, word) in self.0.iter().enumerate() {
            word.store(filling(seed, at), Ordering::Relaxed);
        }
    }

    /// Returns whether `words` are as [`fill`](Self::fill) left them.
    pub fn is_filled(&self, seed: u64, words: Range<usize>) -> bool {
        words.into_iter().all(|at| self.load(at) == Some(filling(seed, at)))
    }

    /// Returns whether `words` are what a device stores: `first`, and one more in each word.
    pub fn counts_from(&self, first: u64, words: Range<usize>) -> bool {
        words.zip(0..).all(|(at, n)| self.load(at) == Some(first.wrapping_add(n)))
    }

    /// Returns what a device finds when it reads the page: the wrapping sum of word i times 2 * i + 1.
    pub fn checksum(&self) -> u64 {
        (self.0.iter().zip(0u64..))
            .map(|(word, i)| word.load(Ordering::Relaxed).wrapping_mul(2 * i + 1))
            .fold(0, u64::wrapping_add)
    }

    /// Stores word `at`, if it is in the page.
    pub fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.0.get(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Loads word `at`; `None` past the page.
    pub fn load(&self, at: usize) -> Option<u64> {
        self.0.get(at).map(|word| word.load(Ordering::Relaxed))
    }
}

fn filling(seed: u64, at: usize) -> u64 {
    // An odd factor maps different words to different words, and spreads them over all bits.
    (seed << 32 | at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Addresses outside the guest's RAM that the hypervisor lets it use: the registers of a device, the channel.
#[derive(Clone, Copy)]
pub struct Window {
    base: u64,
    bytes: u64,
}

impl Window {
    /// Names the `bytes` bytes at `base`; `None` if they overlap the RAM, are not mapped or are not whole pages.
    pub fn new(base: u64, bytes: u64) -> Option<Self> {
        let outside = base >= machine::RAM.end && base.checked_add(bytes)? <= machine::MAPPED_END;
        let whole = base.is_multiple_of(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE) && bytes > 0;
        (outside && whole).then_some(Self { base, bytes })
    }

    /// Returns whether `address` is inside.
    pub fn contains(&self, address: u64) -> bool {
        address.checked_sub(self.base).is_some_and(|offset| offset < self.bytes)
    }

    /// Returns the address of the first byte.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Loads 32 bits. PANICS: when `offset` is not inside, or not aligned.
    pub fn read32(&self, offset: u64) -> u32 {
        // SAFETY: `at` vouches for an aligned, mapped address where Rust owns nothing.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    /// Stores 32 bits. PANICS: as [`read32`](Self::read32).
    pub fn write32(&self, offset: u64, value: u32) {
        // SAFETY: as above.
        unsafe { self.at::<u32>(offset).write_volatile(value) };
    }

    /// Loads 64 bits. PANICS: as [`read32`](Self::read32).
    pub fn read64(&self, offset: u64) -> u64 {
        // SAFETY: as above.
        unsafe { self.at::<u64>(offset).read_volatile() }
    }

    /// Stores 64 bits. PANICS: as [`read32`](Self::read32).
    pub fn write64(&self, offset: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.at::<u64>(offset).write_volatile(value) };
    }

    fn at<T>(&self, offset: u64) -> *mut T {
        let bytes = size_of::<T>() as u64;
        assert!(offset <= self.bytes - bytes && offset.is_multiple_of(bytes), "outside the window");
        ptr::with_exposed_provenance_mut((self.base + offset) as usize)
    }
}

/// Tries to store `value` at `address`, which must not be in the guest's RAM; returns whether it was stored.
///
/// PANICS: when it is in the RAM.
pub fn try_write(address: u64, value: u64) -> bool {
    assert!(!machine::RAM.contains(&address), "a try to write to the guest's own RAM");
    // SAFETY: all that Rust owns is in the RAM.
    unsafe { machine::try_write(address, value) }
}
