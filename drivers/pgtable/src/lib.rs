//! Translation tables for whoever owns guest memory: one tree, every format.
//!
//! A [`Tree`] maps a device's or a guest's addresses to memory that was granted. Which bits an entry has is its
//! [`Format`], as data; the walker is one. Table frames come from a [`Frames`] source, and go back to it from a [`Gather`]
//! when the invalidation that covers them has completed, or when the tree is taken down.
//!
//! ```
//! # use iommu::{Grant, Perms};
//! # use pgtable::*;
//! # fn invalidate_and_wait(_: impl Iterator<Item = Changed>) -> bool { true }
//! fn lend(frames: &mut impl Frames, page: &Grant) -> Result<(), Error> {
//!     let tree = Tree::<VtdFirstStage>::new(frames, Limits::NONE)?;
//!     tree.map(frames, 0x4000_0000, page, Perms::READ_WRITE)?;
//!
//!     let mut gather = Gather::new();
//!     tree.unmap(frames, 0x4000_0000, page.bytes(), &mut gather)?;
//!     if invalidate_and_wait(gather.ranges()) {
//!         gather.give_back(frames);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # Rules
//!
//! - **All or nothing.** What is refused leaves tables and source as they were. Frames are taken before anything changes.
//! - **Largest leaves.** A map uses the largest leaves that alignment, length and [`Limits`] allow, where no table is yet.
//! - **A leaf is one thing.** To unmap, protect or clear a part of a leaf is refused ([`Error::Superpage`]), in all formats. A
//!   leaf is therefore never split or merged in place, no entry changes from one that is present to another but for its
//!   permissions, accessed and dirty bits, and break-before-make is never needed: a caller that wants other memory, or another
//!   kind of it, unmaps, invalidates, and maps.
//! - **Live.** An entry changes by one store. A table is complete and published before it is pointed at. What changed is
//!   published in runs of adjacent entries.
//! - **One writer, any readers.** The changes of a tree are made under a lock of its owner. Whoever reads ([`Tree::translate`],
//!   [`Tree::walk`]) needs none, but has to be gone before frames of a gather go back.
//! - **Dirty** tells whether a leaf was written since it was mapped or cleared. Where writes become forbidden, it is lost: read
//!   it first.
//!
//! # What is supported
//!
//! | feature | supported | evidence |
//! |---|---|---|
//! | VT-d first stage, 4 and 5 levels: [`VtdFirstStage`] | yes | model, walker, VT-d model, QEMU (4) |
//! | VT-d second stage, 3 to 5 levels, with forced snooping (SNP) or without: [`VtdSecondStage`] | yes | model, walker, VT-d model (4) |
//! | x86-64 long mode, 4 and 5 levels, lower half: [`LongMode`] | yes | model, walker, `x86_64` (4) |
//! | SVM nested tables, 4 and 5 levels: [`SvmNested`] | yes | model, walker, QEMU (4) |
//! | AArch64 stage 1 and 2, 4, 16, 64 KiB, to 48 bits: [`Stage1`], [`Stage2`] | yes | model, walker, `aarch64-paging` (4 KiB), SMMUv3 model and QEMU (4 KiB) |
//! | the same with 52 bits (LPA for 64 KiB, LPA2 for the others) | yes | model, walker |
//! | concatenated top tables (stage 2) | yes | model, walker |
//! | leaves of all sizes, as [`Limits`] allow | yes | model, walker |
//! | memory types, permissions, accessed, dirty | yes | round trip of every combination, walker |
//! | contiguous hint, `S2FWB`, memory types of VT-d's second stage, upper half, execute-only | no | |
//!
//! # Size against speed
//!
//! The walker is compiled once for each format and source that are used. A hypervisor uses two of each, and pays for the second
//! with a few KiB; for that, shifts and masks are immediates, and the levels of a walk are unrolled (`tests/bench`).
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod format;
mod gather;
mod tree;

pub use format::{
    Attributes, Dirty, Format, Layout, Limits, LongMode, Memory, Stage1, Stage2, SvmNested, VtdFirstStage,
    VtdSecondStage, Writes,
};
pub use gather::{Changed, Gather, RANGES, Retired};
pub use tree::{Leaf, Tree};

use core::{
    fmt,
    ops::Range,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Release, SeqCst},
    },
};
use iommu::PhysAddr;

/// How the words of tables are reached.
pub trait Words {
    /// One table.
    type Table: Table;

    /// Returns the table at `frame`, which was taken and not given back.
    fn table(&self, frame: PhysAddr) -> Self::Table;
}

/// The words of one table. The index is below the number of entries of a table of the tree's format.
pub trait Table: Copy {
    /// Loads word `index`, in one load, before any later load.
    fn load(self, index: usize) -> u64;
    /// Stores `value` in word `index`, in one store, after any earlier store.
    fn store(self, index: usize, value: u64);
    /// Stores `new` in word `index` if it holds `current`, in one step; else returns what it holds.
    fn exchange(self, index: usize, current: u64, new: u64) -> Result<(), u64>;
}

/// Where table frames come from.
pub trait Frames: Words {
    /// Takes `bytes` bytes, aligned to their size, all zero, and visible as zero to whoever walks tables.
    ///
    /// A table has as many bytes as a page of the format. Top tables may have up to 16 times as many.
    fn take(&mut self, bytes: usize) -> Option<PhysAddr>;
    /// Takes back what `take` gave. Nothing reaches it any more.
    fn give_back(&mut self, frame: PhysAddr, bytes: usize);
    /// Makes the stores to `range` of a table visible to whoever walks it, before any later store.
    fn publish(&self, range: Range<PhysAddr>);
}

/// A table of N words.
impl<const N: usize> Table for &[AtomicU64; N] {
    #[inline(always)]
    fn load(self, index: usize) -> u64 {
        self[index].load(Acquire)
    }
    #[inline(always)]
    fn store(self, index: usize, value: u64) {
        self[index].store(value, Release);
    }
    #[inline(always)]
    fn exchange(self, index: usize, current: u64, new: u64) -> Result<(), u64> {
        self[index].compare_exchange(current, new, SeqCst, Acquire).map(|_| ())
    }
}

/// Why a tree was not changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Error {
    /// The range is empty, not made of whole pages, wraps, or ends past what tables or machine can address.
    Range {
        /// Where it starts.
        address: u64,
        /// Its length in bytes.
        bytes: u64,
    },
    /// Something is mapped at `address` already.
    Mapped {
        /// The first page of the range that is mapped.
        address: u64,
    },
    /// Nothing is mapped at `address`.
    NotMapped {
        /// The first page of the range that is not mapped.
        address: u64,
    },
    /// The range has a part of a leaf, and not all of it.
    Superpage {
        /// Where the leaf starts.
        address: u64,
        /// Its size.
        bytes: u64,
    },
    /// The format has no leaf with these permissions. No leaf permits nothing.
    Permissions,
    /// The format has no such memory type, or it would change under a leaf that is mapped.
    Memory,
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
            Self::Superpage { address, bytes } => {
                write!(f, "the range has a part of the {bytes:#x} bytes that one leaf maps at {address:#x}")
            }
            Self::Permissions => write!(f, "a mapping with these permissions is not possible"),
            Self::Memory => write!(f, "a mapping with this memory type is not possible"),
            Self::NoFrame => write!(f, "no frame is left for a table"),
        }
    }
}

impl core::error::Error for Error {}
