//! Memory with two views: what the CPU stored, and what the device sees.
//!
//! Only [`Memory::publish`] copies from the CPU's view to the device's, and only [`Memory::observe`] copies back, each
//! exactly the range that it is given. A barrier that is missing or too short therefore fails in every run of a
//! hosted test, on any host.
//!
//! What the CPU stored and did not publish may be written back over what the device stored meanwhile, when the cache has
//! no more room or when it is told to look again. So a word is published before the device has it to store to.
#![expect(unsafe_code, reason = "makes the promises that a hypervisor's frame allocator makes")]

use iommu::{DmaBuf, Grant, PAGE_SIZE, PhysAddr, Root, Trust};
use std::{
    fmt,
    ops::Range,
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

/// Where the modelled machine's memory starts; far from any host pointer, so that the two are never confused.
pub const BASE: PhysAddr = PhysAddr(0x8_0000_0000);

/// What a word reads as until somebody stores or publishes it.
///
/// Real memory is not zeroed either. Taken for a table entry it is present and has reserved bits set, so that a table
/// which was used before it was cleared and published makes a fault.
pub const UNWRITTEN: u64 = 0xBAD0_BAD0_BAD0_BAD1;

/// The CPU's views of all memories, kept for the rest of the process.
///
/// A `DmaBuf` has no lifetime, so nobody knows when the last one is gone.
static KEPT: Mutex<Vec<&'static [AtomicU64]>> = Mutex::new(Vec::new());

/// An access by the device, or a range given to `publish` or `observe`, that is not whole words inside the memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OutsideMemory(
    /// Where the access starts.
    pub PhysAddr,
);

impl fmt::Display for OutsideMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} is not a whole word of the modelled memory", self.0.0)
    }
}

impl std::error::Error for OutsideMemory {}

/// Names the tables at `phys`, for a modelled unit.
pub fn root(phys: u64, levels: u8) -> Root {
    // SAFETY: the only hardware is a model, which checks every address itself and reaches nothing but its own memory.
    unsafe { Root::new(PhysAddr(phys), levels) }
}

/// Grants `pages` pages from `phys` to a modelled device.
pub fn grant(phys: u64, pages: u64) -> Grant {
    let end = PhysAddr(phys.wrapping_add(pages * PAGE_SIZE));
    // SAFETY: as for `root`.
    unsafe { Grant::new(PhysAddr(phys)..end) }
}

/// Lets a modelled device reach all of the modelled memory.
pub fn trust() -> Trust {
    // SAFETY: as for `root`.
    unsafe { Trust::new() }
}

/// Why a word could not be observed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unobserved {
    /// It is not in the memory.
    Outside(OutsideMemory),
    /// The CPU has stored there, and did not publish it: a cache that is cleaned before it is emptied writes that over what
    /// the device stored.
    Unpublished(PhysAddr),
}

impl From<OutsideMemory> for Unobserved {
    fn from(outside: OutsideMemory) -> Self {
        Self::Outside(outside)
    }
}

impl fmt::Display for Unobserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside(outside) => outside.fmt(f),
            Self::Unpublished(at) => write!(f, "{:#x} was stored and never published", at.0),
        }
    }
}

impl std::error::Error for Unobserved {}

/// A modelled machine's memory; clones are the same memory.
#[derive(Clone)]
pub struct Memory {
    views: Arc<Views>,
}

struct Views {
    cpu: &'static [AtomicU64],
    device: Vec<AtomicU64>,
    /// What the CPU's words were when they were last published or observed; `None` is never.
    clean: Mutex<Vec<Option<u64>>>,
    /// Words handed out so far, from the start.
    taken: AtomicUsize,
}

impl Memory {
    /// Returns a memory of `words` 64-bit words at [`BASE`].
    pub fn new(words: usize) -> Self {
        let zeroed: &'static mut [u64] = Box::leak(vec![0; words].into_boxed_slice());
        let cpu = ptr::from_mut(zeroed) as *const [AtomicU64];
        // SAFETY: the borrow that `cpu` comes from is exclusive and lasts for ever, and the two types have the same
        // layout (on 64-bit hosts `u64` is aligned to 8 too, and these tests run on no others).
        let cpu: &'static [AtomicU64] = unsafe { &*cpu };
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(cpu);
        let device = (0..words).map(|_| AtomicU64::new(UNWRITTEN)).collect();
        let clean = Mutex::new(vec![None; words]);
        Self { views: Arc::new(Views { cpu, device, clean, taken: AtomicUsize::new(0) }) }
    }

    /// Hands out `words` words whose address is a multiple of `align_words` words; they read as [`UNWRITTEN`].
    ///
    /// PANICS: when the memory is used up, or `align_words` is zero.
    pub fn take(&self, words: usize, align_words: usize) -> DmaBuf {
        let (at, cells) = self.hand_out(words, align_words);
        let Some(cpu) = NonNull::new(ptr::from_ref(cells).cast_mut().cast::<u64>()) else {
            unreachable!("a slice is never at address zero");
        };
        // SAFETY: the words are kept for ever and are aligned; being inside atomics, they may be written through a
        // pointer made from a shared reference; they are handed out once. What else reaches them is this module
        // alone, by atomic access: `publish` and `observe` in the role of the memory system, `cpu_load`, and
        // `guest_store` in the role of a guest to which the memory is shown.
        unsafe { DmaBuf::new(cpu, at, words) }
    }

    /// Hands out `words` words as `take` does, for several cores to load and store.
    ///
    /// PANICS: as `take` does.
    pub fn take_shared(&self, words: usize, align_words: usize) -> (PhysAddr, &'static [AtomicU64]) {
        self.hand_out(words, align_words)
    }

    fn hand_out(&self, words: usize, align_words: usize) -> (PhysAddr, &'static [AtomicU64]) {
        let size = self.views.cpu.len();
        let place = |taken: usize| Some(taken.next_multiple_of(align_words)).filter(|at| at + words <= size);
        let taken = self.views.taken.fetch_update(SeqCst, SeqCst, |taken| place(taken).map(|at| at + words));
        let Some(at) = taken.ok().and_then(place) else {
            panic!("the modelled memory of {size} words is used up: give `Memory::new` more");
        };
        let cells = &self.views.cpu[at..at + words];
        for cell in cells {
            cell.store(UNWRITTEN, SeqCst);
        }
        (Self::address(at), cells)
    }

    /// Makes the CPU's stores to `range` visible to the device.
    pub fn publish(&self, range: Range<PhysAddr>) -> Result<(), OutsideMemory> {
        let indices = self.indices(range)?;
        let mut clean = self.clean();
        for at in indices {
            let word = self.views.cpu[at].load(SeqCst);
            clean[at] = Some(word);
            self.views.device[at].store(word, SeqCst);
        }
        Ok(())
    }

    /// Takes the CPU's word at `address` out of its caches, for whoever stores it to memory later.
    pub(crate) fn write_back(&self, address: PhysAddr) -> Result<u64, OutsideMemory> {
        let at = self.index(address)?;
        let word = self.views.cpu.get(at).ok_or(OutsideMemory(address))?.load(SeqCst);
        self.clean()[at] = Some(word);
        Ok(word)
    }

    /// Makes the device's stores to `range` visible to the CPU. A word that the CPU stored and did not publish is an error:
    /// there the CPU's stays, and the device's is lost.
    pub fn observe(&self, range: Range<PhysAddr>) -> Result<(), Unobserved> {
        let indices = self.indices(range)?;
        let mut clean = self.clean();
        let mut unpublished = None;
        for at in indices {
            let own = self.views.cpu[at].load(SeqCst);
            if clean[at] == Some(own) {
                let word = self.views.device[at].load(SeqCst);
                clean[at] = Some(word);
                self.views.cpu[at].store(word, SeqCst);
            } else {
                clean[at] = Some(own);
                self.views.device[at].store(own, SeqCst);
                unpublished = unpublished.or(Some(Unobserved::Unpublished(Self::address(at))));
            }
        }
        unpublished.map_or(Ok(()), Err)
    }

    fn clean(&self) -> MutexGuard<'_, Vec<Option<u64>>> {
        self.views.clean.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the word at `address` as the device sees it.
    pub fn device_load(&self, address: PhysAddr) -> Result<u64, OutsideMemory> {
        Ok(self.device(address)?.load(SeqCst))
    }

    /// Stores the word at `address` as the device does.
    pub fn device_store(&self, address: PhysAddr, value: u64) -> Result<(), OutsideMemory> {
        self.device(address)?.store(value, SeqCst);
        Ok(())
    }

    /// Sets `bits` in the word at `address` as the device does, atomically.
    pub fn device_set(&self, address: PhysAddr, bits: u64) -> Result<(), OutsideMemory> {
        self.device(address)?.fetch_or(bits, SeqCst);
        Ok(())
    }

    /// Stores the 32-bit word at `address`, a multiple of 4, as the device does.
    pub fn device_store32(&self, address: PhysAddr, value: u32) -> Result<(), OutsideMemory> {
        if !address.0.is_multiple_of(4) {
            return Err(OutsideMemory(address));
        }
        let shift = address.0 % 8 * 8;
        self.device_merge(PhysAddr(address.0 & !7), 0xFFFF_FFFF << shift, u64::from(value) << shift)
    }

    /// Loads the byte at `address` as the device does.
    pub fn device_load_byte(&self, address: PhysAddr) -> Result<u8, OutsideMemory> {
        let word = self.device_load(PhysAddr(address.0 & !7))?;
        Ok((word >> (address.0 % 8 * 8)) as u8)
    }

    /// Stores the byte at `address` as the device does.
    pub fn device_store_byte(&self, address: PhysAddr, value: u8) -> Result<(), OutsideMemory> {
        let shift = address.0 % 8 * 8;
        self.device_merge(PhysAddr(address.0 & !7), 0xFF << shift, u64::from(value) << shift)
    }

    /// Returns the word at `address` as the CPU sees it.
    ///
    /// PANICS: when there is no such word.
    pub fn cpu_load(&self, address: PhysAddr) -> u64 {
        self.cpu(address).1.load(SeqCst)
    }

    /// Stores the word at `address` as the CPU does, where nothing was taken yet.
    ///
    /// PANICS: when there is no such word, or when it was handed out: a `DmaBuf` is the only way to store there.
    pub fn cpu_store(&self, address: PhysAddr, value: u64) {
        let (at, cell) = self.cpu(address);
        let taken = self.views.taken.load(SeqCst);
        assert!(at >= taken, "{:#x} was taken: store through its DmaBuf", address.0);
        cell.store(value, SeqCst);
    }

    /// Stores the word at `address` as a guest does that shares it with the owner of its `DmaBuf`: by way of the same caches.
    ///
    /// PANICS: when there is no such word.
    pub fn guest_store(&self, address: PhysAddr, value: u64) {
        self.cpu(address).1.store(value, SeqCst);
    }

    fn cpu(&self, address: PhysAddr) -> (usize, &AtomicU64) {
        let at = self.index(address);
        match at.and_then(|at| Ok((at, self.views.cpu.get(at).ok_or(OutsideMemory(address))?))) {
            Ok(found) => found,
            Err(error) => panic!("{error}"),
        }
    }

    fn device(&self, address: PhysAddr) -> Result<&AtomicU64, OutsideMemory> {
        self.views.device.get(self.index(address)?).ok_or(OutsideMemory(address))
    }

    /// Replaces the bits of `mask` in the word at `address`; the other bits are left to whoever stores them meanwhile.
    fn device_merge(&self, address: PhysAddr, mask: u64, value: u64) -> Result<(), OutsideMemory> {
        let merge = |word: u64| Some(word & !mask | value & mask);
        self.device(address)?
            .fetch_update(SeqCst, SeqCst, merge)
            .map(|_| ())
            .map_err(|_| OutsideMemory(address))
    }

    fn address(at: usize) -> PhysAddr {
        PhysAddr(BASE.0 + at as u64 * 8)
    }

    /// Returns the number of the word at `address`, which may still lie past the end.
    fn index(&self, address: PhysAddr) -> Result<usize, OutsideMemory> {
        let bytes = address.0.checked_sub(BASE.0).filter(|bytes| bytes % 8 == 0);
        bytes.map(|bytes| (bytes / 8) as usize).ok_or(OutsideMemory(address))
    }

    fn indices(&self, range: Range<PhysAddr>) -> Result<Range<usize>, OutsideMemory> {
        let indices = self.index(range.start)?..self.index(range.end)?;
        let inside = indices.start <= indices.end && indices.end <= self.views.device.len();
        if inside { Ok(indices) } else { Err(OutsideMemory(range.start)) }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (words, taken) = (self.views.cpu.len(), self.views.taken.load(SeqCst));
        write!(f, "Memory {{ words: {words}, taken: {taken} }}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_sees_what_was_published_and_no_word_more() {
        let memory = Memory::new(64);
        let mut buffer = memory.take(4, 1);

        (0..4).for_each(|at| buffer.store(at, 0x100 + at as u64));
        memory.publish(buffer.range(1, 2)).expect("inside");

        let seen = [0, 1, 2, 3].map(|at| memory.device_load(buffer.range(at, 1).start).expect("inside"));
        assert_eq!(seen, [UNWRITTEN, 0x101, 0x102, UNWRITTEN]);
    }

    #[test]
    fn the_cpu_sees_what_was_observed_and_no_word_more() {
        let memory = Memory::new(64);
        let mut buffer = memory.take(2, 1);
        buffer.clear();
        memory.publish(buffer.range(0, 2)).expect("inside");

        memory.device_store(buffer.range(0, 1).start, 7).expect("inside");
        memory.device_store(buffer.range(1, 1).start, 8).expect("inside");
        assert_eq!(buffer.load(0), 0);
        memory.observe(buffer.range(0, 1)).expect("inside");

        assert_eq!([buffer.load(0), buffer.load(1)], [7, 0]);
    }

    /// A cache is cleaned before it is emptied (Arm: DC CIVAC): nothing else would keep what shares a line.
    #[test]
    fn what_the_cpu_stored_and_did_not_publish_goes_over_what_the_device_stored() {
        let memory = Memory::new(64);
        let mut buffer = memory.take(3, 1);
        let at = |word| PhysAddr(BASE.0 + word * 8);
        // Of word 0 nothing was ever published; word 1 was; word 2 was, and changed since.
        memory.publish(buffer.range(1, 2)).expect("inside");
        buffer.store(2, 5);
        (0..3).for_each(|word| memory.device_store(at(word), 7).expect("inside"));

        for (word, observed, seen) in [
            (0, Err(Unobserved::Unpublished(at(0))), UNWRITTEN),
            (1, Ok(()), 7),
            (2, Err(Unobserved::Unpublished(at(2))), 5),
        ] {
            assert_eq!(memory.observe(buffer.range(word, 1)), observed);
            assert_eq!((buffer.load(word), memory.device_load(at(word as u64))), (seen, Ok(seen)));
        }
    }

    #[test]
    fn memory_is_handed_out_once_and_aligned() {
        let memory = Memory::new(2048);

        let first = memory.take(1, 1);
        let page = memory.take(512, 512);

        assert_eq!(first.phys(), BASE);
        assert_eq!(page.phys(), PhysAddr(BASE.0 + 4096));
        assert_eq!(page.load(511), UNWRITTEN);
    }

    #[test]
    fn an_access_of_the_device_outside_the_memory_is_an_error() {
        let memory = Memory::new(8);

        for address in [0, BASE.0 - 8, BASE.0 + 64, BASE.0 + 4, !7].map(PhysAddr) {
            assert_eq!(memory.device_load(address), Err(OutsideMemory(address)));
            assert_eq!(memory.device_store(address, 0), Err(OutsideMemory(address)));
        }
        assert!(memory.publish(BASE..PhysAddr(BASE.0 + 72)).is_err());
        assert!(memory.publish(PhysAddr(BASE.0 + 8)..BASE).is_err());
    }

    #[test]
    fn narrow_stores_leave_the_rest_of_the_word() {
        let memory = Memory::new(8);
        memory.device_store(BASE, u64::MAX).expect("inside");

        memory.device_store32(PhysAddr(BASE.0 + 4), 0x1234_5678).expect("inside");
        memory.device_store_byte(PhysAddr(BASE.0 + 1), 0).expect("inside");

        assert_eq!(memory.device_load(BASE), Ok(0x1234_5678_FFFF_00FF));
        assert_eq!(memory.device_load_byte(PhysAddr(BASE.0 + 7)), Ok(0x12));
    }

    #[test]
    fn a_test_stores_where_nothing_was_taken() {
        let memory = Memory::new(8);
        let _taken = memory.take(1, 1);
        let free = PhysAddr(BASE.0 + 8);

        memory.cpu_store(free, 5);
        memory.publish(free..PhysAddr(BASE.0 + 16)).expect("inside");

        assert_eq!((memory.cpu_load(free), memory.device_load(free)), (5, Ok(5)));
    }

    #[test]
    #[should_panic(expected = "was taken")]
    fn a_test_cannot_store_behind_the_owner_of_a_buffer() {
        let memory = Memory::new(8);
        let buffer = memory.take(1, 1);

        memory.cpu_store(buffer.phys(), 1);
    }
}
