//! The page tables: the first 512 GiB, each address mapped to itself.
//!
//! What is mapped how: the image's code is read-only, its constants are read-only and never executed, the guards below the
//! stacks are not mapped, other RAM is writable and never executed, and everything that is not RAM is mapped as devices,
//! which the processor does not touch on its own.
#![expect(unsafe_code, reason = "translation is the ground that safe code stands on")]

use crate::{
    cpu::CORES,
    entry::{GUARD_BYTES, STACKS},
    machine::Error,
};
use aarch64_cpu::asm::barrier;
use core::{
    arch::naked_asm,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// The end of what is mapped, in bytes.
pub(crate) const MAPPED_END: u64 = 1 << 39;
/// RAM is used in whole blocks of this size.
pub(crate) const BLOCK: u64 = 2 << 20;

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
/// The GiB in which the image is linked.
pub(crate) const IMAGE_GIB: u64 = 0x4000_0000;
/// GiBs that are not mapped whole: that of the image, and those of which a part is RAM.
const MIXED_GIBS: usize = 8;
/// Blocks of the image that are mapped as pages; the linker script keeps the image this small.
const IMAGE_BLOCKS: usize = 8;

/// An entry that points at a table.
const TABLE: u64 = 0b11;
/// An entry of the last level that points at a page.
const LAST: u64 = 0b11;
/// An entry of another level that points at a block.
const BLOCK_ENTRY: u64 = 0b01;
/// Attribute 1, inner shareable, accessed; bit 6 is one at EL2.
const MEMORY: u64 = 1 << 2 | 1 << 6 | 0b11 << 8 | 1 << 10;
/// Attribute 0, accessed, never executed.
const DEVICE: u64 = 1 << 6 | 1 << 10 | NEVER_EXECUTE;
const READ_ONLY: u64 = 1 << 7;
const NEVER_EXECUTE: u64 = 1 << 54;

/// A table of entries that the page walker may read at any moment.
#[repr(C, align(4096))]
pub(crate) struct Table([AtomicU64; 512]);

impl Table {
    const fn empty() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }

    /// Returns the physical address of the table.
    pub(crate) fn address(&self) -> u64 {
        (&raw const *self).addr() as u64
    }
}

/// The top table of every core; one entry for each GiB.
pub(crate) static ROOT: Table = Table::empty();
/// A top table of a guest that maps nothing.
pub(crate) static NOTHING: Table = Table::empty();
static GIB_TABLES: [Table; MIXED_GIBS] = [const { Table::empty() }; MIXED_GIBS];
static IMAGE_TABLES: [Table; IMAGE_BLOCKS] = [const { Table::empty() }; IMAGE_BLOCKS];

unsafe extern "C" {
    safe static image_start: u8;
    safe static text_end: u8;
    safe static rodata_end: u8;
    safe static image_end: u8;
}

/// Returns the memory of the image, whole pages of it.
pub(crate) fn image() -> Range<u64> {
    address(&image_start)..address(&image_end)
}

fn address(symbol: &u8) -> u64 {
    (&raw const *symbol).addr() as u64
}

/// Makes the tables that stay, with `ram` as memory, in whole blocks. Runs once, on the first core alone.
pub(crate) fn protect(ram: &[Range<u64>]) -> Result<(), Error> {
    let touches = |at: u64, bytes: u64| ram.iter().any(|ram| ram.start < at + bytes && at < ram.end);
    let is_ram = |at: u64, bytes: u64| ram.iter().any(|ram| ram.start <= at && at + bytes <= ram.end);
    let image = image();
    if !is_ram(image.start, image.end - image.start) {
        let what = "the image, which no RAM in the device tree holds,";
        return Err(Error::OutOfReach { what, address: image.start });
    }
    let mut tables = GIB_TABLES.iter();
    for (entry, gib) in ROOT.0.iter().zip((0..).step_by(GIB as usize)) {
        let value = if gib != IMAGE_GIB && is_ram(gib, GIB) {
            gib | BLOCK_ENTRY | MEMORY | NEVER_EXECUTE
        } else if touches(gib, GIB) {
            let full = Error::TooMany { what: "GiBs of which a part is RAM", limit: MIXED_GIBS };
            let table = tables.next().ok_or(full)?;
            for (entry, at) in table.0.iter().zip((gib..).step_by(BLOCK as usize)) {
                entry.store(block(at, is_ram(at, BLOCK)), Ordering::Relaxed);
            }
            table.address() | TABLE
        } else {
            gib | BLOCK_ENTRY | DEVICE
        };
        entry.store(value, Ordering::Relaxed);
    }
    for (table, block) in IMAGE_TABLES.iter().zip(image.step_by(BLOCK as usize)) {
        for (entry, at) in table.0.iter().zip((block..).step_by(PAGE as usize)) {
            entry.store(page(at), Ordering::Relaxed);
        }
    }
    // SAFETY: the tables map what the boot table mapped, each address to itself, so that what runs goes on.
    unsafe { switch_tables(ROOT.address()) };
    Ok(())
}

/// Returns the entry for the block at `at`.
fn block(at: u64, is_ram: bool) -> u64 {
    // The linker script puts the image at the start of a block.
    let of_image = image().step_by(BLOCK as usize).position(|block| block == at);
    match of_image.and_then(|index| IMAGE_TABLES.get(index)) {
        Some(table) => table.address() | TABLE,
        None if is_ram => at | BLOCK_ENTRY | MEMORY | NEVER_EXECUTE,
        None => at | BLOCK_ENTRY | DEVICE,
    }
}

/// Returns the entry for the page at `at`, which lies in or behind the image.
fn page(at: u64) -> u64 {
    let guarded = (0..CORES).any(|core| {
        let guard = (&raw const STACKS[core]).addr() as u64;
        (guard..guard + GUARD_BYTES as u64).contains(&at)
    });
    if guarded {
        0
    } else if at < address(&text_end) {
        at | LAST | MEMORY | READ_ONLY
    } else if at < address(&rodata_end) {
        at | LAST | MEMORY | READ_ONLY | NEVER_EXECUTE
    } else {
        at | LAST | MEMORY | NEVER_EXECUTE
    }
}

/// Lets this core walk the tables at `root`.
///
/// A block may not become a table while it is in use (break-before-make), and this code is in such a block: so translation
/// is off for a moment, in which nothing is loaded or stored.
///
/// # Safety
///
/// What is mapped by the tables now stays mapped in the same way, each address to itself.
unsafe fn switch_tables(root: u64) {
    #[unsafe(naked)]
    unsafe extern "C" fn switch(root: u64) {
        naked_asm!(
            "mrs x1, sctlr_el2",
            "bic x2, x1, #1",
            "dsb sy",
            "msr sctlr_el2, x2",
            "isb",
            "msr ttbr0_el2, x0",
            "tlbi alle2",
            "dsb nsh",
            "isb",
            "msr sctlr_el2, x1",
            "isb",
            "ret",
        )
    }
    // ORDER: the walker sees the tables complete.
    barrier::dsb(barrier::SY);
    // SAFETY: the caller vouches for the tables; the code is mapped to itself, so it runs with translation off, too.
    unsafe { switch(root) };
}
