//! Formats as data: where an entry keeps its address, and which bits say what.
//!
//! A format is a type, and its [`Layout`] a constant, so that the walker is compiled for each format that is used: shifts,
//! masks and the number of levels are immediates there. What differs from machine to machine are [`Limits`], which are
//! values.

use crate::Error;
use core::fmt;
use iommu::{Perms, PhysAddr};

/// A format of translation tables.
pub trait Format: Copy + fmt::Debug + 'static {
    /// What its entries look like.
    const LAYOUT: Layout;
}

/// What the entries of a format look like. Levels are counted from the pages: tables of level 1 hold pages alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    /// A page has 2^`page_bits` bytes, and so has a table.
    pub page_bits: u32,
    /// Levels of a tree.
    pub levels: u32,
    /// Bits of an input address; it lies below 2^`input_bits`.
    pub input_bits: u32,
    /// Bits of an address that an entry can hold.
    pub output_bits: u32,
    /// Bit n set: an entry of level n may be a leaf.
    pub leaves: u32,
    /// An entry with none of these bits is not present.
    pub present: u64,
    /// What an entry that points at a table is, besides the address.
    pub table: u64,
    /// Set in every leaf of level 1.
    pub page: u64,
    /// Set in every leaf above level 1.
    pub block: u64,
    /// The bits that hold an address, each in its own place.
    pub address: u64,
    /// The bits of an address that are kept `moved_by` places lower.
    pub moved: u64,
    /// See `moved`.
    pub moved_by: u32,
    /// Set in a leaf that permits reads; 0 where every leaf does.
    pub read: u64,
    /// How a leaf says whether it permits writes, and whether there was one.
    pub writes: Writes,
    /// Set in a leaf that forbids execution; 0 where the format cannot say so.
    pub no_execute: u64,
    /// Set in a leaf that is not for privileged accesses alone; 0 where the format cannot say so.
    pub user: u64,
    /// Set in a leaf that is for privileged accesses alone.
    pub privileged: u64,
    /// Set in an entry that was used for an access.
    pub accessed: u64,
    /// The bits that hold a memory type.
    pub memory_bits: u64,
    /// The memory types that a leaf can have, in the order of [`Memory`].
    pub memory: [Option<u64>; 3],
}

/// What the bits in `bits` are for a leaf that permits writes, or not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Writes {
    /// Which bits.
    pub bits: u64,
    /// No writes.
    pub forbidden: u64,
    /// Writes, of which hardware keeps no record.
    pub untracked: u64,
    /// Writes; hardware records the first, and has seen none.
    pub clean: u64,
    /// Writes, and hardware has seen one.
    pub dirty: u64,
}

/// The kind of memory that a leaf maps.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Memory {
    /// RAM, cached with write-back.
    #[default]
    WriteBack,
    /// RAM that is not cached.
    Uncached,
    /// Registers of a device.
    Device,
}

/// What is known about writes to a leaf.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Dirty {
    /// Nothing: count it as written. Hardware need not write to the tables.
    #[default]
    Untracked,
    /// Not written since it was mapped or cleared. The unit has to keep dirty bits.
    Clean,
    /// Written.
    Dirty,
}

/// What a leaf says besides its address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Attributes {
    /// Which accesses it permits. With `privileged`, only those that are made in privileged mode.
    pub perms: Perms,
    /// What kind of memory it maps.
    pub memory: Memory,
    /// Whether it counts as accessed. If not, the unit has to record the first access by itself.
    pub accessed: bool,
    /// What is known about writes. Means nothing where writes are not permitted.
    pub dirty: Dirty,
}

impl From<Perms> for Attributes {
    fn from(perms: Perms) -> Self {
        Self { perms, memory: Memory::WriteBack, accessed: true, dirty: Dirty::Untracked }
    }
}

/// What a machine can do of what a format can say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Bits of a physical address that it takes.
    pub output_bits: u32,
    /// Bit n set: it takes leaves of 2^n bytes, as a unit reports in
    /// [`Capabilities::stage1_leaves`](iommu::Capabilities) and `stage2_leaves`. Pages of the smallest size it always takes.
    pub leaf_sizes: u64,
}

impl Limits {
    /// Everything that the format can say.
    pub const NONE: Self = Self { output_bits: 64, leaf_sizes: u64::MAX };
    /// Pages of the smallest size alone.
    pub const PAGES: Self = Self { leaf_sizes: 0, ..Self::NONE };

    /// Returns what both can do: a tree that two machines walk has these.
    pub fn and(self, other: Self) -> Self {
        Self {
            output_bits: self.output_bits.min(other.output_bits),
            leaf_sizes: self.leaf_sizes & other.leaf_sizes,
        }
    }
}

impl Layout {
    /// Bits of an index in all tables but the top one.
    pub const fn index_bits(&self) -> u32 {
        self.page_bits - 3
    }

    /// Returns n for entries of `level` that span 2^n bytes.
    pub const fn shift(&self, level: u32) -> u32 {
        self.page_bits + self.index_bits() * (level - 1)
    }

    /// Bytes of the top table, or of the top tables that lie one after the other.
    pub const fn root_bytes(&self) -> usize {
        let entries = 1_usize << (self.input_bits - self.shift(self.levels));
        let bytes = entries * 8;
        if bytes < 1 << self.page_bits { 1 << self.page_bits } else { bytes }
    }

    /// Returns the bits that hold `phys`, which has no bits that an address cannot have.
    #[inline(always)]
    pub(crate) const fn pack(&self, phys: u64) -> u64 {
        // Callers have refused what does not fit.
        if self.moved == 0 { phys } else { phys & self.address | (phys & self.moved) >> self.moved_by }
    }

    /// Returns the address that `entry` holds.
    #[inline(always)]
    pub(crate) const fn unpack(&self, entry: u64) -> u64 {
        entry & self.address | (entry & self.moved >> self.moved_by) << self.moved_by
    }

    /// Whether `entry`, of a level above 1, points at a table.
    ///
    /// Software alone writes these entries, and hardware sets nothing in their low byte. It tells a table from both a
    /// leaf and nothing in all formats, and takes one comparison.
    #[inline(always)]
    pub(crate) const fn is_table(&self, entry: u64) -> bool {
        entry as u8 == self.table as u8
    }

    /// Returns the table that `entry`, for which `is_table` holds, points at.
    ///
    /// It is as it was written: hardware changes nothing in it, for it counts as accessed from the start. So a subtraction
    /// does, which costs no instruction where the address is used.
    #[inline(always)]
    pub(crate) const fn next(&self, entry: u64) -> PhysAddr {
        PhysAddr(if self.moved == 0 { entry.wrapping_sub(self.table) } else { self.unpack(entry) })
    }

    /// Returns a leaf's bits, besides the address and what its level says.
    #[inline(always)]
    pub(crate) const fn encode(&self, attributes: Attributes) -> Result<u64, Error> {
        let Attributes { perms, memory, accessed, dirty } = attributes;
        if !(perms.read || perms.write && self.read != 0) || perms.privileged && self.user == 0 {
            return Err(Error::Permissions);
        }
        let Some(memory) = self.memory[memory as usize] else { return Err(Error::Memory) };
        Ok(memory
            | if perms.read { self.read } else { 0 }
            | match (perms.write, dirty) {
                (false, _) => self.writes.forbidden,
                (true, Dirty::Untracked) => self.writes.untracked,
                (true, Dirty::Clean) => self.writes.clean,
                (true, Dirty::Dirty) => self.writes.dirty,
            }
            | if perms.execute { 0 } else { self.no_execute }
            | if perms.privileged { self.privileged } else { self.user }
            | if accessed { self.accessed } else { 0 })
    }

    /// Returns what `entry`, a leaf, says. What it cannot say it does not forbid.
    pub(crate) fn decode(&self, entry: u64) -> Attributes {
        let Self { read, writes, no_execute, user, .. } = *self;
        let privileged = user != 0 && entry & user == 0;
        // What keeps everybody else from execution does not count for a privileged leaf.
        let no_execute = if privileged { no_execute & !self.privileged } else { no_execute };
        let (write, dirty) = match entry & writes.bits {
            bits if bits == writes.untracked => (true, Dirty::Untracked),
            bits if bits == writes.clean => (true, Dirty::Clean),
            bits if bits == writes.dirty => (true, Dirty::Dirty),
            _ => (false, Dirty::Untracked),
        };
        let is = |bits: &Option<u64>| *bits == Some(entry & self.memory_bits);
        Attributes {
            perms: Perms {
                read: read == 0 || entry & read != 0,
                write,
                execute: entry & no_execute == 0,
                privileged,
            },
            memory: match self.memory.iter().position(is) {
                Some(1) => Memory::Uncached,
                Some(2) => Memory::Device,
                _ => Memory::WriteBack,
            },
            accessed: self.accessed == 0 || entry & self.accessed != 0,
            dirty,
        }
    }

    /// The bits that a change of permissions changes.
    pub(crate) const fn permission_bits(&self) -> u64 {
        self.read | self.writes.bits | self.no_execute | self.user | self.privileged
    }
}

/// Levels 1, 2 and 3: 4 KiB, 2 MiB, 1 GiB.
const PAGE_2M_1G: u32 = 1 << 1 | 1 << 2 | 1 << 3;
const X86_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// Long mode: P, R/W, U/S, A, D, PS, XD. Table entries permit everything, and count as accessed from the start.
const LONG_MODE: Layout = {
    let (p, w, u, a, d, ps, xd) = (1, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 63);
    let uncached = 1 << 3 | 1 << 4;
    Layout {
        page_bits: 12,
        levels: 4,
        input_bits: 47,
        output_bits: 52,
        leaves: PAGE_2M_1G,
        present: p,
        table: p | w | u | a,
        page: p,
        block: p | ps,
        address: X86_ADDRESS,
        moved: 0,
        moved_by: 0,
        read: 0,
        writes: Writes { bits: w | d, forbidden: 0, untracked: w | d, clean: w, dirty: w | d },
        no_execute: xd,
        user: u,
        privileged: 0,
        accessed: a,
        memory_bits: uncached,
        memory: [Some(0), Some(uncached), Some(uncached)],
    }
};

/// Tables of x86-64 long mode, for the lower half of the address space: 4 levels, or 5 with `CR4.LA57`. Needs `EFER.NXE`.
///
/// Memory types are those of the page attribute table after reset: 0 is write-back, 3 is uncached.
#[derive(Clone, Copy, Debug)]
pub struct LongMode<const LEVELS: u32 = 4>;

impl<const LEVELS: u32> Format for LongMode<LEVELS> {
    const LAYOUT: Layout = {
        assert!(LEVELS == 4 || LEVELS == 5, "long mode has 4 or 5 levels");
        // The upper half of what an index can say is the upper half of the address space.
        Layout { levels: LEVELS, input_bits: 11 + 9 * LEVELS, ..LONG_MODE }
    };
}

/// First-stage tables of VT-d ("First-Stage Paging Entries"): 4 levels, or 5 where `CAP.FS5LP` says so.
///
/// XD stays clear, because older units take it for a reserved bit. Addresses stay in the lower canonical half. 1 GiB leaves
/// need `CAP.FS1GP`.
#[derive(Clone, Copy, Debug)]
pub struct VtdFirstStage<const LEVELS: u32 = 4>;

impl<const LEVELS: u32> Format for VtdFirstStage<LEVELS> {
    const LAYOUT: Layout = Layout { no_execute: 0, ..LongMode::<LEVELS>::LAYOUT };
}

/// Nested tables of SVM: the host's long-mode format, walked as user accesses; needs `EFER.NXE`. 5 levels where the host
/// has `CR4.LA57` set.
#[derive(Clone, Copy, Debug)]
pub struct SvmNested<const LEVELS: u32 = 4>;

impl<const LEVELS: u32> Format for SvmNested<LEVELS> {
    const LAYOUT: Layout = {
        let host = LongMode::<LEVELS>::LAYOUT;
        Layout {
            input_bits: host.input_bits + 1,
            page: host.page | host.user,
            block: host.block | host.user,
            user: 0,
            ..host
        }
    };
}

/// Second-stage tables of VT-d ("Second-Stage Paging Entries"): 3 to 5 levels, as `CAP.SAGAW` says.
///
/// Leaves above 4 KiB need `CAP.SSLPS`. A and D (bits 8 and 9) are ignored where the unit keeps none. With `SNOOP` accesses snoop
/// the CPU's caches whatever the device says (SNP), which needs `ECAP.SC`; in scalable mode the PASID table entry does that
/// for all of a table (PGSNP).
#[derive(Clone, Copy, Debug)]
pub struct VtdSecondStage<const LEVELS: u32 = 4, const SNOOP: bool = false>;

impl<const LEVELS: u32, const SNOOP: bool> Format for VtdSecondStage<LEVELS, SNOOP> {
    const LAYOUT: Layout = {
        assert!(LEVELS >= 3 && LEVELS <= 5, "the second stage has 3 to 5 levels");
        let (r, w, ps, a, d) = (1, 1 << 1, 1 << 7, 1 << 8, 1 << 9);
        let snoop = if SNOOP { 1 << 11 } else { 0 };
        Layout {
            levels: LEVELS,
            input_bits: 12 + 9 * LEVELS,
            present: r | w,
            table: r | w | a,
            page: snoop,
            block: ps | snoop,
            read: r,
            writes: Writes { bits: w | d, forbidden: 0, untracked: w | d, clean: w, dirty: w | d },
            no_execute: 0,
            user: 0,
            accessed: a,
            memory_bits: 0,
            memory: [Some(0), None, None],
            ..LONG_MODE
        }
    };
}

const AF: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const UXN: u64 = 1 << 54;

/// What both stages of AArch64 share: descriptors of VMSAv8-64.
///
/// 52 bits are the form of FEAT_LPA with a granule of 64 KiB (address bits 51:48 in 15:12), and that of FEAT_LPA2 with the
/// others (address bits 51:50 in 9:8, where the shareability is otherwise; then it is the context's).
const fn vmsa(page_bits: u32, input_bits: u32, levels: u32) -> Layout {
    assert!(page_bits == 12 || page_bits == 14 || page_bits == 16, "granules are 4, 16 and 64 KiB");
    assert!(input_bits >= 32 && input_bits <= 48 || input_bits == 52, "32 to 48 bits, or 52");
    assert!(levels >= 2, "the walker starts above the pages");
    let large = input_bits == 52;
    let (top, moved, moved_by) = match (large, page_bits) {
        (false, _) => (48, 0, 0),
        (true, 16) => (48, 0xF << 48, 36),
        (true, _) => (50, 0b11 << 50, 42),
    };
    Layout {
        page_bits,
        levels,
        input_bits,
        output_bits: if large { 52 } else { 48 },
        leaves: match (page_bits, large) {
            (12, false) => PAGE_2M_1G,
            (12, true) => PAGE_2M_1G | 1 << 4,
            (_, false) => 1 << 1 | 1 << 2,
            (_, true) => 1 << 1 | 1 << 2 | 1 << 3,
        },
        present: 1,
        table: 0b11,
        page: 0b11,
        block: 0b01,
        address: (1 << top) - (1 << page_bits),
        moved,
        moved_by,
        accessed: AF,
        ..LONG_MODE
    }
}

/// The shareability (SH) of a leaf, where it is the leaf's to say.
const fn shareable(layout: &Layout, value: u64) -> u64 {
    if layout.moved >> layout.moved_by == 0b11 << 8 { 0 } else { value << 8 }
}

/// AArch64 stage 1 tables with a granule of 2^`PAGE_BITS` bytes, for addresses of `INPUT_BITS` bits from 0.
///
/// The context's MAIR has write-back memory in attribute 0, device memory in 1, uncached memory in 2. Leaves are tagged with
/// their ASID (nG). Dirty bits need `CD.HD`.
#[derive(Clone, Copy, Debug)]
pub struct Stage1<const PAGE_BITS: u32 = 12, const INPUT_BITS: u32 = 48>;

impl<const PAGE_BITS: u32, const INPUT_BITS: u32> Format for Stage1<PAGE_BITS, INPUT_BITS> {
    const LAYOUT: Layout = {
        let shared = vmsa(PAGE_BITS, INPUT_BITS, (INPUT_BITS - PAGE_BITS).div_ceil(PAGE_BITS - 3));
        let (user, read_only, non_global, pxn) = (1 << 6, 1 << 7, 1 << 11, 1 << 53);
        let (inner, outer) = (shareable(&shared, 0b11), shareable(&shared, 0b10));
        Layout {
            page: shared.page | non_global,
            block: shared.block | non_global,
            writes: Writes {
                bits: read_only | DBM,
                forbidden: read_only,
                untracked: 0,
                clean: read_only | DBM,
                dirty: DBM,
            },
            no_execute: pxn | UXN,
            user,
            privileged: UXN,
            memory_bits: 0b111 << 2 | inner,
            memory: [Some(inner), Some(2 << 2 | outer), Some(1 << 2 | outer)],
            ..shared
        }
    };
}

/// AArch64 stage 2 tables with a granule of 2^`PAGE_BITS` bytes, for addresses of `INPUT_BITS` bits.
///
/// Where the top level would have up to 16 entries, it is left out, and as many tables of the next lie one after the other
/// instead: the architecture allows that always, and asks for it at some sizes. What stage 1 calls a device stays one.
/// `S2FWB` is off. Dirty bits need `STE.S2HD`, or `VTCR_EL2.HD`.
#[derive(Clone, Copy, Debug)]
pub struct Stage2<const PAGE_BITS: u32 = 12, const INPUT_BITS: u32 = 48>;

impl<const PAGE_BITS: u32, const INPUT_BITS: u32> Format for Stage2<PAGE_BITS, INPUT_BITS> {
    const LAYOUT: Layout = {
        let (bits, index_bits) = (INPUT_BITS - PAGE_BITS, PAGE_BITS - 3);
        let levels = bits / index_bits + (bits % index_bits > 4) as u32;
        let shared = vmsa(PAGE_BITS, INPUT_BITS, levels);
        let (read, write) = (1 << 6, 1 << 7);
        let (inner, outer) = (shareable(&shared, 0b11), shareable(&shared, 0b10));
        Layout {
            read,
            writes: Writes {
                bits: write | DBM,
                forbidden: 0,
                untracked: write,
                clean: DBM,
                dirty: write | DBM,
            },
            no_execute: UXN,
            user: 0,
            memory_bits: 0b1111 << 2 | inner,
            memory: [Some(0b1111 << 2 | inner), Some(0b0101 << 2 | outer), Some(0b0001 << 2 | outer)],
            ..shared
        }
    };
}
