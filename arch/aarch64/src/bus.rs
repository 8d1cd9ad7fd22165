//! Registers, shared memory and physical addresses.
//!
//! The promise on which the rest stands: physical memory below 512 GiB is mapped at its own address, RAM as memory and
//! everything else as devices.
#![expect(unsafe_code, reason = "registers and cache lines are reached by address")]

use crate::{clock, paging::MAPPED_END, registers::CTR_EL0};
use aarch64_cpu::asm::barrier;
use core::{
    arch::asm,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{AtomicBool, Ordering},
};
use iommu::{Bus, PhysAddr};

/// Returns the pointer that reaches the memory at `phys`; `None` for address 0, for addresses that are not mapped
/// (512 GiB and above) and for those that are not aligned to 8 bytes.
///
/// It is valid for what the memory there is free for; that is for its owner to know.
pub fn direct(phys: PhysAddr) -> Option<NonNull<u64>> {
    let at = (phys.0 < MAPPED_END && phys.0.is_multiple_of(8)).then_some(phys.0 as usize)?;
    NonNull::new(ptr::with_exposed_provenance_mut(at))
}

/// The registers of one unit, and memory shared with it.
///
/// Hardware says where some registers are, and may be wrong: registers past the end, or not aligned to their size, read
/// all ones, and writes to them do nothing. The first such access is logged. Who reads an offset from hardware compares
/// it with [`bytes`](Self::bytes) first, since all ones may mean anything.
#[derive(Clone, Copy, Debug)]
pub struct Mmio {
    base: usize,
    bytes: usize,
}

impl Mmio {
    /// Names the `bytes` bytes of registers at `base`.
    ///
    /// PANICS: when they are not all mapped (below 512 GiB), or `base` is not aligned to 8 bytes.
    ///
    /// # Safety
    ///
    /// There are registers, or nothing at all, and no access to them breaks what memory safety rests on unless the driver
    /// breaks its own promises.
    pub unsafe fn new(base: PhysAddr, bytes: usize) -> Self {
        let end = base.0.checked_add(bytes as u64);
        assert!(
            base.0.is_multiple_of(8) && end.is_some_and(|end| end <= MAPPED_END),
            "registers out of reach"
        );
        Self { base: base.0 as usize, bytes }
    }

    /// Returns how many bytes of registers there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the pointer to the register of type `T` at `offset`; `None` if there can be none.
    fn register<T>(&self, offset: usize) -> Option<*mut T> {
        static TOLD: AtomicBool = AtomicBool::new(false);
        let end = offset.checked_add(size_of::<T>());
        if end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(size_of::<T>()) {
            return Some(ptr::with_exposed_provenance_mut(self.base + offset));
        }
        if !TOLD.swap(true, Ordering::Relaxed) {
            defmt::warn!(
                "no register at {=usize:#x} of the unit at {=usize:#x}, which has {=usize:#x} bytes; told once",
                offset,
                self.base,
                self.bytes
            );
        }
        None
    }
}

impl Bus for Mmio {
    fn read32(&self, offset: usize) -> u32 {
        let register = self.register::<u32>(offset);
        // SAFETY: the address is inside the registers that `new` was promised, aligned, and mapped as a device.
        register.map_or(u32::MAX, |register| unsafe { register.read_volatile() })
    }

    fn write32(&self, offset: usize, value: u32) {
        if let Some(register) = self.register::<u32>(offset) {
            load_first();
            // SAFETY: as above.
            unsafe { register.write_volatile(value) };
        }
    }

    fn read64(&self, offset: usize) -> u64 {
        let register = self.register::<u64>(offset);
        // SAFETY: as above.
        register.map_or(u64::MAX, |register| unsafe { register.read_volatile() })
    }

    fn write64(&self, offset: usize, value: u64) {
        if let Some(register) = self.register::<u64>(offset) {
            load_first();
            // SAFETY: as above.
            unsafe { register.write_volatile(value) };
        }
    }

    /// Cleans the cache lines of `range` always: a unit may walk its tables without looking into the caches, and only its
    /// driver knows (`IDR0.COHACC` of SMMUv3).
    ///
    /// PANICS: when `range` is not all mapped (below 512 GiB).
    fn publish(&self, range: Range<PhysAddr>) {
        clean(range);
    }

    /// Drops the cache lines of `range`, since a unit that does not look into the caches has stored behind them.
    ///
    /// PANICS: when `range` is not all mapped (below 512 GiB).
    fn observe(&self, range: Range<PhysAddr>) {
        clean(range);
    }

    fn now_us(&self) -> u64 {
        clock::now_us()
    }
}

/// Ends every load from memory before what comes later: a queue's entry is read before its place is given back.
fn load_first() {
    // ORDER: nothing else orders a load from memory before a store to a device.
    barrier::dmb(barrier::OSHLD);
}

/// Writes the cache lines of `range` back to memory and drops them: what was stored here is seen by whoever does not look
/// into the caches, and what it stored is seen here. Every later access comes after it.
///
/// PANICS: when `range` is not all mapped (below 512 GiB).
fn clean(range: Range<PhysAddr>) {
    assert!(range.end.0 <= MAPPED_END, "memory out of reach");
    // `DminLine`: log2 of the words of 4 bytes in the shortest line.
    let line_bytes = 4_u64 << (CTR_EL0.get() >> 16 & 0xF);
    let mut line = range.start.0 & !(line_bytes - 1);
    while line < range.end.0 {
        // SAFETY: the line is mapped. Its value does not change for this core: lines that a device stores to are not dirty,
        // because they were published after the last store.
        unsafe { asm!("dc civac, {}", in(reg) line, options(nostack, preserves_flags)) };
        line += line_bytes;
    }
    // ORDER: waits for the lines, and holds back every access that comes later, those of devices among them.
    barrier::dsb(barrier::SY);
}
