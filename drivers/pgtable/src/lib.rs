//! Translation tables for whoever owns guest memory: one tree, formats as data.
//!
//! A [`Tree`] maps a device's or a guest's addresses to memory that was granted. Table frames come from a [`Frames`]
//! source and go back to it when the tree is taken down. The tables are live while they change: an entry changes by one
//! store, a new table is complete and visible before it is pointed at, and what hardware may have cached is the caller's
//! to invalidate after [`Tree::unmap`].
//!
//! ```
//! # use pgtable::*;
//! # use iommu::*;
//! fn give(tree: &Tree, frames: &mut impl Frames, page: &Grant) -> Result<(), Error> {
//!     tree.map(frames, 0x4000_0000, page, Perms::READ_WRITE)
//! }
//! ```
//!
//! | feature | supported | note |
//! |---|---|---|
//! | VT-d first stage, 4 levels | yes | [`VTD_FIRST_STAGE`] |
//! | SVM nested tables | yes | [`SVM_NESTED`] |
//! | AArch64 stage 1, stage 2, 4 KiB granule, 4 levels | yes | [`AARCH64_STAGE_1`], [`AARCH64_STAGE_2`]; memory is write-back |
//! | pages of 4 KiB | yes | |
//! | superpages, other formats, protect, dirty bits | no | |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

use core::fmt;
use iommu::{Grant, PAGE_SIZE, Perms, PhysAddr};

/// Entries of a table.
pub const ENTRIES: usize = 512;
const INDEX_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;

/// Where table frames come from, and how their words are reached.
///
/// A frame is 4 KiB of memory that no one else uses between `take` and `give_back`.
pub trait Frames {
    /// Takes a frame whose words are all zero, and visible as zero to whoever walks tables.
    fn take(&mut self) -> Option<PhysAddr>;
    /// Takes back a frame. Nothing can reach it any more: every invalidation that covers it has completed.
    fn give_back(&mut self, frame: PhysAddr);
    /// Loads word `index` of a frame that was taken.
    fn load(&self, frame: PhysAddr, index: usize) -> u64;
    /// Stores a word of a frame that was taken, in one store, and makes it visible before any later store.
    fn store(&mut self, frame: PhysAddr, index: usize, value: u64);
}

/// A table format, as data: which bits an entry has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Format {
    /// Levels of a tree.
    pub levels: u8,
    /// Bits of an input address; it lies below 2^`input_bits`.
    pub input_bits: u32,
    /// Set in every entry that is used; an entry with none of these bits is not present.
    pub present: u64,
    /// Set, besides `present`, in an entry that points at a table.
    pub table: u64,
    /// Set, besides `present`, in an entry that points at memory.
    pub leaf: u64,
    /// Set in a leaf that permits writes.
    pub write: u64,
    /// Set in a leaf that forbids writes.
    pub read_only: u64,
    /// Set in a leaf that forbids execution; 0 where the format cannot say so.
    pub no_execute: u64,
    /// The bits that hold an address.
    pub address: u64,
}

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// First-stage tables of VT-d, 4 levels ("First-Stage Paging Entries").
///
/// User entries, because requests without privilege need U/S at every level. Accessed and dirty are set from the start,
/// so that hardware need not write to the tables. XD stays clear: older units take it for a reserved bit. Addresses stay
/// in the lower canonical half.
pub const VTD_FIRST_STAGE: Format = Format {
    levels: 4,
    input_bits: 47,
    present: PRESENT,
    table: WRITABLE | USER | ACCESSED,
    leaf: USER | ACCESSED,
    write: WRITABLE | DIRTY,
    read_only: 0,
    no_execute: 0,
    address: ADDRESS,
};

/// Nested tables of SVM, 4 levels: the host's long-mode format, walked as user accesses; needs `EFER.NXE`.
pub const SVM_NESTED: Format = Format { input_bits: 48, no_execute: NO_EXECUTE, ..VTD_FIRST_STAGE };

/// In a leaf: inner shareable (SH), accessed (AF). With bit 1 it is a page, and so is a table a table.
const AARCH64_LEAF: u64 = 1 << 1 | 0b11 << 8 | 1 << 10;

/// AArch64 stage 1 tables, 4 KiB granule, 4 levels ("VMSAv8-64 translation table format descriptors").
///
/// Memory attribute 0 of the context (AttrIndx = 0), reachable without privilege (AP\[1\]), tagged with its ASID (nG).
pub const AARCH64_STAGE_1: Format = Format {
    levels: 4,
    input_bits: 48,
    present: 1 << 0,
    table: 1 << 1,
    leaf: AARCH64_LEAF | 1 << 6 | 1 << 11,
    write: 0,
    read_only: 1 << 7,
    no_execute: 1 << 53 | 1 << 54,
    address: 0x0000_FFFF_FFFF_F000,
};

/// AArch64 stage 2 tables, 4 KiB granule, 4 levels, for addresses of up to 44 bits.
///
/// Normal memory, write-back (MemAttr = 0b1111); what stage 1 calls a device stays one.
pub const AARCH64_STAGE_2: Format = Format {
    input_bits: 44,
    leaf: AARCH64_LEAF | 0b1111 << 2 | 1 << 6,
    write: 1 << 7,
    read_only: 0,
    no_execute: 1 << 54,
    ..AARCH64_STAGE_1
};

/// Why a tree was not changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Error {
    /// The range is empty, not made of whole pages, wraps, or ends past what the format can address.
    Range {
        /// Where it starts.
        address: u64,
        /// Its length in bytes.
        bytes: u64,
    },
    /// Something is mapped at `address` already.
    Mapped {
        /// The first page that is mapped.
        address: u64,
    },
    /// Nothing is mapped at `address`.
    NotMapped {
        /// The first page that is not mapped.
        address: u64,
    },
    /// Tables allow reading wherever they allow anything.
    Permissions,
    /// The source has no more frames.
    NoFrame,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Range { address, bytes } => {
                write!(f, "{bytes:#x} bytes at {address:#x} are not whole pages that the tables reach")
            }
            Self::Mapped { address } => write!(f, "{address:#x} is mapped already"),
            Self::NotMapped { address } => write!(f, "{address:#x} is not mapped"),
            Self::Permissions => write!(f, "a mapping that cannot be read is not possible"),
            Self::NoFrame => write!(f, "no frame is left for a table"),
        }
    }
}

impl core::error::Error for Error {}

/// One translation tree. It changes through a source of frames, which its owner holds under a lock.
#[derive(Debug)]
pub struct Tree {
    format: Format,
    root: PhysAddr,
}

/// Where a walk ended.
enum Walk {
    /// At the leaf entry's table; the index follows from the address.
    Leaf(PhysAddr),
    /// An entry above it is not present.
    Absent,
}

impl Tree {
    /// An empty tree.
    pub fn new(frames: &mut impl Frames, format: Format) -> Result<Self, Error> {
        Ok(Self { format, root: frames.take().ok_or(Error::NoFrame)? })
    }

    /// Returns the physical address of the top table.
    pub fn root(&self) -> PhysAddr {
        self.root
    }

    /// Returns the number of levels.
    pub fn levels(&self) -> u8 {
        self.format.levels
    }

    /// Maps `grant` at `address`. A refusal leaves every translation as it was; tables may have been added.
    pub fn map(
        &self,
        frames: &mut impl Frames,
        address: u64,
        grant: &Grant,
        perms: Perms,
    ) -> Result<(), Error> {
        let pages = self.pages(address, grant.bytes())?;
        let memory = grant.phys().start.0;
        if memory & !self.format.address != 0
            || (memory + grant.bytes() - 1) & !(self.format.address | 0xFFF) != 0
        {
            return Err(Error::Range { address: memory, bytes: grant.bytes() });
        }
        if !perms.read {
            return Err(Error::Permissions);
        }
        for address in pages.clone() {
            if self.translate(frames, address).is_some() {
                return Err(Error::Mapped { address });
            }
            // All tables first: from here on nothing can fail.
            self.tables_to(frames, address)?;
        }
        let attributes = self.leaf(perms);
        for (page, offset) in pages.zip((0..).step_by(PAGE_SIZE as usize)) {
            if let Walk::Leaf(table) = self.walk(frames, page) {
                frames.store(table, self.index(page, 1), (memory + offset) | attributes);
            }
        }
        Ok(())
    }

    /// Unmaps `bytes` bytes from `address`, all of which are mapped.
    ///
    /// Hardware may still use what it cached: invalidate, and wait, before the memory is used for anything else.
    pub fn unmap(&self, frames: &mut impl Frames, address: u64, bytes: u64) -> Result<(), Error> {
        let pages = self.pages(address, bytes)?;
        if let Some(address) = pages.clone().find(|&page| self.translate(frames, page).is_none()) {
            return Err(Error::NotMapped { address });
        }
        for page in pages {
            if let Walk::Leaf(table) = self.walk(frames, page) {
                frames.store(table, self.index(page, 1), 0);
            }
        }
        Ok(())
    }

    /// Returns the memory at `address`, and whether it may be written.
    pub fn translate(&self, frames: &impl Frames, address: u64) -> Option<(PhysAddr, Perms)> {
        if address >> self.format.input_bits != 0 {
            return None;
        }
        let Walk::Leaf(table) = self.walk(frames, address) else { return None };
        let entry = frames.load(table, self.index(address, 1));
        if entry & self.format.present == 0 {
            return None;
        }
        let perms = Perms {
            read: true,
            write: entry & self.format.write == self.format.write && entry & self.format.read_only == 0,
            execute: entry & self.format.no_execute == 0,
            privileged: false,
        };
        Some((PhysAddr(entry & self.format.address | address & (PAGE_SIZE - 1)), perms))
    }

    /// Gives all tables back to `frames`. No one walks the tree any more: the caller's invalidation has completed.
    pub fn take_down(self, frames: &mut impl Frames) {
        self.give_back(frames, self.root, self.format.levels);
    }

    /// Gives back the table `table` of level `level` and all below; the depth is bounded by the levels.
    fn give_back(&self, frames: &mut impl Frames, table: PhysAddr, level: u8) {
        if level > 1 {
            for index in 0..ENTRIES {
                let entry = frames.load(table, index);
                if entry & self.format.present != 0 {
                    self.give_back(frames, PhysAddr(entry & self.format.address), level - 1);
                }
            }
        }
        frames.give_back(table);
    }

    /// Returns the pages of a range that the format can address.
    fn pages(&self, address: u64, bytes: u64) -> Result<core::iter::StepBy<core::ops::Range<u64>>, Error> {
        let wrong = Error::Range { address, bytes };
        let end = address.checked_add(bytes).ok_or(wrong)?;
        let whole = address.is_multiple_of(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE);
        if !whole || bytes == 0 || end > 1 << self.format.input_bits {
            return Err(wrong);
        }
        Ok((address..end).step_by(PAGE_SIZE as usize))
    }

    fn leaf(&self, perms: Perms) -> u64 {
        let Format { present, leaf, write, read_only, no_execute, .. } = self.format;
        present
            | leaf
            | if perms.write { write } else { read_only }
            | if perms.execute { 0 } else { no_execute }
    }

    /// The index of `address` in a table of `level`; leaves are in level 1.
    fn index(&self, address: u64, level: u8) -> usize {
        (address >> (PAGE_BITS + INDEX_BITS * (u32::from(level) - 1))) as usize & (ENTRIES - 1)
    }

    fn walk(&self, frames: &impl Frames, address: u64) -> Walk {
        let mut table = self.root;
        for level in (2..=self.format.levels).rev() {
            let entry = frames.load(table, self.index(address, level));
            if entry & self.format.present == 0 {
                return Walk::Absent;
            }
            table = PhysAddr(entry & self.format.address);
        }
        Walk::Leaf(table)
    }

    /// Makes the tables down to the leaf of `address` that are missing.
    fn tables_to(&self, frames: &mut impl Frames, address: u64) -> Result<(), Error> {
        let mut table = self.root;
        for level in (2..=self.format.levels).rev() {
            let index = self.index(address, level);
            let mut entry = frames.load(table, index);
            if entry & self.format.present == 0 {
                // ORDER: the source made the frame visible as zero before this entry points at it.
                let frame = frames.take().ok_or(Error::NoFrame)?;
                entry = frame.0 | self.format.present | self.format.table;
                frames.store(table, index, entry);
            }
            table = PhysAddr(entry & self.format.address);
        }
        Ok(())
    }
}
