//! The page tables: the first 4 GiB, each address mapped to itself.
//!
//! What is mapped how: the image's code is read-only, its constants are read-only and not executable, the guards below
//! the stacks are not mapped, other memory is writable and not executable, and what lies above the top of RAM is
//! uncached too, since devices live there.
#![expect(unsafe_code, reason = "translation is the ground that safe code stands on")]

use crate::{
    cpu::CORES,
    entry::{GUARD_BYTES, STACKS},
};
use core::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};
use x86_64::{instructions::tlb, registers::model_specific::Msr};

/// The end of what is mapped, in bytes.
pub(crate) const MAPPED_END: u64 = 1 << 32;

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
/// Large pages of the image that are mapped as small ones; the linker script keeps the image this small.
const IMAGE_LARGE_PAGES: usize = 8;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// `PWT` and `PCD`: entry 3 of the PAT, uncacheable.
const UNCACHED: u64 = 0b11 << 3;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// A table of entries that the page walker may read at any moment.
#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

static IMAGE_TABLES: [Table; IMAGE_LARGE_PAGES] =
    [const { Table([const { AtomicU64::new(0) }; 512]) }; IMAGE_LARGE_PAGES];

unsafe extern "C" {
    /// The four page directories, one after the other, from `entry`.
    safe static boot_pd: [AtomicU64; 2048];
    safe static __image_start: u8;
    safe static __text_end: u8;
    safe static __rodata_end: u8;
    safe static __image_end: u8;
}

/// Returns the memory of the image, whole pages of it.
pub(crate) fn image() -> Range<u64> {
    address(&__image_start)..address(&__image_end)
}

fn address(symbol: &u8) -> u64 {
    (&raw const *symbol).addr() as u64
}

/// Gives each page the permissions and the memory type that it should have. Runs once, on the first core alone.
pub(crate) fn protect(top_of_ram: u64) {
    // A large page that straddles the top stays cached; its MTRRs say what is a device in it.
    let devices = top_of_ram.next_multiple_of(LARGE_PAGE);
    for (entry, at) in boot_pd.iter().zip((0..).step_by(LARGE_PAGE as usize)) {
        // The image is in use: from one store to the next its pages stay executable.
        if !image().contains(&at) {
            let memory_type = if at >= devices { UNCACHED } else { 0 };
            entry.store(at | PRESENT | WRITABLE | LARGE | NO_EXECUTE | memory_type, Ordering::Relaxed);
        }
    }
    // The linker script puts the image at the start of a large page, and its end is that of a table.
    for (table, large_page) in IMAGE_TABLES.iter().zip(image().step_by(LARGE_PAGE as usize)) {
        for (entry, at) in table.0.iter().zip((large_page..).step_by(PAGE as usize)) {
            entry.store(small_page(at), Ordering::Relaxed);
        }
        let table = (&raw const *table).addr() as u64;
        // ORDER: x86 keeps stores in order, so the walker that sees the table's address sees the table.
        boot_pd[(large_page / LARGE_PAGE) as usize].store(table | PRESENT | WRITABLE, Ordering::Release);
    }
    tlb::flush_all();
}

/// Returns the entry for the small page at `at`, which lies in or behind the image.
fn small_page(at: u64) -> u64 {
    let guarded = (0..CORES).any(|core| {
        let guard = (&raw const STACKS[core]).addr() as u64;
        (guard..guard + GUARD_BYTES as u64).contains(&at)
    });
    if guarded {
        0
    } else if at < address(&__text_end) {
        at | PRESENT
    } else if at < address(&__rodata_end) {
        at | PRESENT | NO_EXECUTE
    } else {
        at | PRESENT | WRITABLE | NO_EXECUTE
    }
}

/// `IA32_PAT`: the memory types that `PAT`, `PCD` and `PWT` select.
const PAT: Msr = Msr::new(0x277);
/// The value that the manual gives for reset, on which [`UNCACHED`] rests; firmware may have left another.
pub(crate) const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;

/// Sets this core's memory types to what the page tables assume.
pub(crate) fn set_memory_types() {
    let mut pat = PAT;
    // SAFETY: entries 0 and 3, which the tables use, keep the meaning of write-back and uncacheable.
    unsafe { pat.write(PAT_AT_RESET) };
}
