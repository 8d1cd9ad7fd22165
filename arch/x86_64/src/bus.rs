//! Registers, shared memory and physical addresses.
//!
//! The promise on which the rest stands: physical memory below 4 GiB is mapped at its own address.
#![expect(unsafe_code, reason = "registers and cache lines are reached by address")]

use crate::{clock, cpu::cpuid, paging::MAPPED_END};
use core::{
    arch::asm,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{AtomicBool, Ordering, fence},
};
use iommu::{Bus, PhysAddr};
use spin::Once;

/// Returns the pointer that reaches the memory at `phys`; `None` for address 0, for addresses that are not mapped
/// (4 GiB and above) and for those that are not aligned to 8 bytes.
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
    flush: Flush,
}

impl Mmio {
    /// Names the `bytes` bytes of registers at `base`.
    ///
    /// PANICS: when they are not all mapped (below 4 GiB), or `base` is not aligned to 8 bytes.
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
        Self { base: base.0 as usize, bytes, flush: Flush::of_this_machine() }
    }

    /// Returns how many bytes of registers there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the pointer to the register of type `T` at `offset`; `None` if there can be none.
    #[inline]
    fn register<T>(&self, offset: usize) -> Option<*mut T> {
        let end = offset.checked_add(size_of::<T>());
        if end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(size_of::<T>()) {
            return Some(ptr::with_exposed_provenance_mut(self.base + offset));
        }
        self.tell_missing(offset);
        None
    }

    #[cold]
    #[inline(never)]
    fn tell_missing(&self, offset: usize) {
        static TOLD: AtomicBool = AtomicBool::new(false);
        if !TOLD.swap(true, Ordering::Relaxed) {
            defmt::warn!(
                "no register at {=usize:#x} of the unit at {=usize:#x}, which has {=usize:#x} bytes; told once",
                offset,
                self.base,
                self.bytes
            );
        }
    }
}

impl Bus for Mmio {
    fn read32(&self, offset: usize) -> u32 {
        let register = self.register::<u32>(offset);
        // SAFETY: the address is inside the registers that `new` was promised, aligned, and mapped uncached.
        register.map_or(u32::MAX, |register| unsafe { register.read_volatile() })
    }

    fn write32(&self, offset: usize, value: u32) {
        if let Some(register) = self.register::<u32>(offset) {
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
            // SAFETY: as above.
            unsafe { register.write_volatile(value) };
        }
    }

    /// Cleans the cache lines of `range` always: an IOMMU may walk its tables without looking into the caches, and only
    /// its driver knows (`ECAP.C` of VT-d).
    ///
    /// PANICS: when `range` is not all mapped (below 4 GiB).
    #[inline]
    fn publish(&self, range: Range<PhysAddr>) {
        assert!(range.end.0 <= MAPPED_END, "memory out of reach");
        let Flush { line_bytes, optimised } = self.flush;
        // ORDER: a flush waits for older stores to its own line. With CLFLUSHOPT nothing else waits for it, and with AMD's
        // CLFLUSH neither; MFENCE holds back what comes later until the lines are in memory.
        let mut line = range.start.0 & !(line_bytes - 1);
        while line < range.end.0 {
            if optimised {
                // SAFETY: the line is mapped, and flushing changes no value; CPUID says that the instruction exists.
                unsafe { asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags)) };
            } else {
                // SAFETY: as above; every 64-bit x86 processor has it.
                unsafe { asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags)) };
            }
            line += line_bytes;
        }
        // SAFETY: every 64-bit x86 processor has it. It is written out because the intrinsic would be a call: this target has
        // no SSE2.
        unsafe { asm!("mfence", options(nostack, preserves_flags)) };
    }

    /// Flushes nothing: the unit looks into the caches.
    fn order(&self, _range: Range<PhysAddr>) {
        fence(Ordering::SeqCst);
    }

    /// Flushes nothing: on x86 a device's stores go through the CPU's caches, and loads stay in order. Only the compiler
    /// has to be held back.
    fn observe(&self, _range: Range<PhysAddr>) {
        fence(Ordering::Acquire);
    }

    fn now_us(&self) -> u64 {
        clock::now_us()
    }
}

/// How cache lines are flushed.
#[derive(Clone, Copy, Debug)]
struct Flush {
    /// Bytes of a line as CLFLUSH sees it.
    line_bytes: u64,
    /// CLFLUSHOPT is there, whose flushes do not wait for each other.
    optimised: bool,
}

impl Flush {
    fn of_this_machine() -> Self {
        static ANSWER: Once<Flush> = Once::new();
        *ANSWER.call_once(|| Self {
            line_bytes: u64::from(cpuid(1, 0).ebx >> 8 & 0xFF).max(1) * 8,
            optimised: cpuid(0, 0).eax >= 7 && cpuid(7, 0).ebx & 1 << 23 != 0,
        })
    }
}
