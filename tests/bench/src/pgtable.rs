//! Translation tables: ours and others', behind one interface.
//!
//! All of them take 4 KiB frames from the same kind of [`Arena`], whose physical addresses are host addresses, so that nobody
//! pays for getting from one to the other. None invalidates anything, and none flushes cache lines: that is the driver's part.

#![expect(
    unsafe_code,
    reason = "the arena hands out host memory as frames, and the others' interfaces are unsafe"
)]

mod aarch64_paging;
mod multiarch;
mod ours;
mod x86_64;

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    hint::black_box,
};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Where mappings start.
pub const START: u64 = 1 << 38;
/// The memory that they start at.
pub const MEMORY: u64 = 1 << 37;
/// Translations that are measured together.
pub const TRANSLATIONS: u64 = 100_000;

/// Leaves of one size, and how many are mapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Leaves {
    /// Bytes of a leaf.
    pub bytes: u64,
    /// How many.
    pub count: u64,
}

/// 1 GiB in pages.
pub const PAGES: Leaves = Leaves { bytes: PAGE, count: 1 << 18 };
/// 16 GiB in blocks of 2 MiB.
pub const BLOCKS_2M: Leaves = Leaves { bytes: 2 << 20, count: 1 << 13 };
/// 128 GiB in blocks of 1 GiB.
pub const BLOCKS_1G: Leaves = Leaves { bytes: 1 << 30, count: 1 << 7 };

impl Leaves {
    fn total(self) -> u64 {
        self.bytes * self.count
    }

    /// The leaves' offsets. Nobody knows them before they come, so that nothing of a walk is done once for all.
    #[inline(always)]
    fn each(self) -> impl Iterator<Item = u64> {
        (0..self.count).map(move |n| black_box(n * self.bytes))
    }

    /// The memory that the leaves map: not aligned for larger ones.
    fn memory(self) -> u64 {
        MEMORY + self.bytes
    }
}

/// An operation that is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Operation {
    MapAll(Leaves),
    MapEach(Leaves),
    UnmapAll(Leaves),
    UnmapEach(Leaves),
    ProtectAll(Leaves),
    ProtectEach(Leaves),
    Translate,
}

/// Tables that are measured. An operation returns `None` where the crate has none like it.
pub trait Subject {
    /// Maps all leaves in one call.
    fn map_all(&mut self, leaves: Leaves) -> Option<()>;
    /// Maps each leaf in a call of its own.
    fn map_each(&mut self, leaves: Leaves) -> Option<()>;
    /// Unmaps all leaves in one call.
    fn unmap_all(&mut self, leaves: Leaves) -> Option<()>;
    /// Unmaps each leaf in a call of its own.
    fn unmap_each(&mut self, leaves: Leaves) -> Option<()>;
    /// Makes all leaves read-only in one call.
    fn protect_all(&mut self, leaves: Leaves) -> Option<()>;
    /// Makes each leaf read-only in a call of its own.
    fn protect_each(&mut self, leaves: Leaves) -> Option<()>;
    /// Translates [`TRANSLATIONS`] random pages; returns the sum of what it finds.
    fn translate(&mut self) -> Option<u64>;
}

/// The subjects, by name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[expect(missing_docs, reason = "their names say it")]
pub enum Who {
    OursLongMode,
    OursStage2,
    Aarch64Paging,
    Multiarch,
    X86_64,
    /// Does what surrounds the operations, and nothing else: the loop, the addresses, the random numbers.
    Nobody,
}

impl Who {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::OursLongMode,
        Self::OursStage2,
        Self::Aarch64Paging,
        Self::Multiarch,
        Self::X86_64,
        Self::Nobody,
    ];

    /// Returns the name by which results are filed.
    pub fn name(self) -> &'static str {
        match self {
            Self::OursLongMode => "ours_long_mode",
            Self::OursStage2 => "ours_stage_2",
            Self::Aarch64Paging => "aarch64_paging",
            Self::Multiarch => "multiarch",
            Self::X86_64 => "x86_64",
            Self::Nobody => "nobody",
        }
    }

    fn empty(self) -> Box<dyn Subject> {
        match self {
            Self::OursLongMode => Box::new(ours::Ours::<pgtable::LongMode>::new()),
            Self::OursStage2 => Box::new(ours::Ours::<pgtable::Stage2>::new()),
            Self::Aarch64Paging => Box::new(aarch64_paging::Theirs::new()),
            Self::Multiarch => Box::new(multiarch::Theirs::new()),
            Self::X86_64 => Box::new(x86_64::Theirs::new()),
            Self::Nobody => Box::new(Nobody),
        }
    }

    /// Returns tables on which `operation` can be measured.
    pub fn ready_for(self, operation: Operation) -> Box<dyn Subject> {
        let mut subject = self.empty();
        let leaves = match operation {
            Operation::MapAll(_) | Operation::MapEach(_) => return subject,
            Operation::Translate => PAGES,
            Operation::UnmapAll(leaves)
            | Operation::UnmapEach(leaves)
            | Operation::ProtectAll(leaves)
            | Operation::ProtectEach(leaves) => leaves,
        };
        let _ = subject.map_all(leaves).or_else(|| subject.map_each(leaves));
        subject
    }
}

impl Operation {
    /// Does it; returns the number of leaves, or translations, or `None` where the subject has no such operation.
    pub fn run(self, subject: &mut dyn Subject) -> Option<u64> {
        match self {
            Self::MapAll(leaves) => subject.map_all(leaves).map(|()| leaves.count),
            Self::MapEach(leaves) => subject.map_each(leaves).map(|()| leaves.count),
            Self::UnmapAll(leaves) => subject.unmap_all(leaves).map(|()| leaves.count),
            Self::UnmapEach(leaves) => subject.unmap_each(leaves).map(|()| leaves.count),
            Self::ProtectAll(leaves) => subject.protect_all(leaves).map(|()| leaves.count),
            Self::ProtectEach(leaves) => subject.protect_each(leaves).map(|()| leaves.count),
            Self::Translate => subject.translate().map(|sum| {
                black_box(sum);
                TRANSLATIONS
            }),
        }
    }
}

/// The addresses that [`Subject::translate`] asks for.
#[inline(always)]
fn random_addresses() -> impl Iterator<Item = u64> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    (0..TRANSLATIONS).map(move |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        black_box(START + (state & (PAGES.count - 1)) * PAGE + (state >> 52))
    })
}

struct Nobody;

impl Nobody {
    fn call_each(leaves: Leaves) -> Option<()> {
        for at in leaves.each() {
            black_box((START + at, leaves.memory() + at));
        }
        Some(())
    }
}

impl Subject for Nobody {
    fn map_all(&mut self, _: Leaves) -> Option<()> {
        None
    }
    #[inline(never)]
    fn map_each(&mut self, leaves: Leaves) -> Option<()> {
        Self::call_each(leaves)
    }
    fn unmap_all(&mut self, _: Leaves) -> Option<()> {
        None
    }
    #[inline(never)]
    fn unmap_each(&mut self, leaves: Leaves) -> Option<()> {
        for at in leaves.each() {
            black_box(START + at);
        }
        Some(())
    }
    fn protect_all(&mut self, _: Leaves) -> Option<()> {
        None
    }
    #[inline(never)]
    fn protect_each(&mut self, leaves: Leaves) -> Option<()> {
        self.unmap_each(leaves)
    }
    #[inline(never)]
    fn translate(&mut self) -> Option<u64> {
        Some(random_addresses().fold(0, u64::wrapping_add))
    }
}

/// Frames for tables. All have been written once, so that no measurement pays for the first touch.
struct Arena {
    base: *mut u8,
    next: usize,
    free: Vec<u64>,
}

impl Arena {
    /// More than 1 GiB in pages needs.
    const FRAMES: usize = 1024;

    fn layout() -> Layout {
        Layout::from_size_align(Self::FRAMES * 4096, 4096).unwrap_or(Layout::new::<u64>())
    }

    fn new() -> Self {
        // SAFETY: the size is not zero.
        let base = unsafe { alloc_zeroed(Self::layout()) };
        if base.is_null() {
            handle_alloc_error(Self::layout());
        }
        for frame in 0..Self::FRAMES {
            // SAFETY: inside the allocation.
            let word = unsafe { base.add(frame * 4096) };
            // SAFETY: inside the allocation.
            unsafe { word.write_volatile(0xA5) };
        }
        Self { base, next: 0, free: Vec::with_capacity(Self::FRAMES) }
    }

    /// Takes a frame, whatever is in it.
    #[inline]
    fn take(&mut self) -> Option<u64> {
        self.free.pop().or_else(|| {
            let at = self.next;
            (at < Self::FRAMES).then(|| {
                self.next += 1;
                self.base as u64 + at as u64 * 4096
            })
        })
    }

    /// Takes a frame that is all zero.
    #[inline]
    fn take_zeroed(&mut self) -> Option<u64> {
        let frame = self.take()?;
        // SAFETY: a frame of the arena that nobody uses.
        unsafe { (frame as *mut u8).write_bytes(0, 4096) };
        Some(frame)
    }

    #[inline]
    fn give_back(&mut self, frame: u64) {
        self.free.push(frame);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and whoever used a frame of it is gone.
        unsafe { dealloc(self.base, Self::layout()) };
    }
}
