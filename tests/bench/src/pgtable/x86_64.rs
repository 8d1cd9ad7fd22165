//! `x86_64`: its mapper with a given translation of frames, here none. It has no calls for ranges.

use super::{Arena, Leaves, PAGE, START, Subject, random_addresses};
use x86_64::{
    PhysAddr, VirtAddr,
    structures::paging::{
        FrameAllocator, MappedPageTable, Mapper, Page, PageSize, PageTable, PageTableFlags, PhysFrame,
        Size1GiB, Size2MiB, Size4KiB, Translate, mapper::PageTableFrameMapping,
    },
};

const READ_WRITE: PageTableFlags =
    PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::USER_ACCESSIBLE);
const READ: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE);

struct Straight;

// SAFETY: physical addresses of the arena are host addresses.
unsafe impl PageTableFrameMapping for Straight {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        frame.start_address().as_u64() as *mut PageTable
    }
}

// SAFETY: a frame is handed out once.
unsafe impl FrameAllocator<Size4KiB> for Arena {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        self.take().and_then(|frame| PhysFrame::from_start_address(PhysAddr::new(frame)).ok())
    }
}

pub struct Theirs {
    table: MappedPageTable<'static, Straight>,
    arena: Arena,
}

impl Theirs {
    pub fn new() -> Self {
        let mut arena = Arena::new();
        let Some(root) = arena.take_zeroed() else { unreachable!("the arena is new") };
        // SAFETY: a frame of the arena, which lives as long.
        let root = unsafe { &mut *(root as *mut PageTable) };
        // SAFETY: an empty table, and frames of the arena.
        let table = unsafe { MappedPageTable::new(root, Straight) };
        Self { table, arena }
    }

    fn map<S: PageSize>(&mut self, leaves: Leaves) -> Option<()>
    where
        MappedPageTable<'static, Straight>: Mapper<S>,
    {
        for at in leaves.each() {
            let page = Page::<S>::from_start_address(VirtAddr::new(START + at)).ok()?;
            let frame = PhysFrame::from_start_address(PhysAddr::new(leaves.memory() + at)).ok()?;
            // SAFETY: nothing walks the tables.
            unsafe { self.table.map_to(page, frame, READ_WRITE, &mut self.arena) }.ok()?.ignore();
        }
        Some(())
    }

    fn unmap<S: PageSize>(&mut self, leaves: Leaves) -> Option<()>
    where
        MappedPageTable<'static, Straight>: Mapper<S>,
    {
        for at in leaves.each() {
            let page = Page::<S>::from_start_address(VirtAddr::new(START + at)).ok()?;
            self.table.unmap(page).ok()?.1.ignore();
        }
        Some(())
    }

    fn protect<S: PageSize>(&mut self, leaves: Leaves) -> Option<()>
    where
        MappedPageTable<'static, Straight>: Mapper<S>,
    {
        for at in leaves.each() {
            let page = Page::<S>::from_start_address(VirtAddr::new(START + at)).ok()?;
            // SAFETY: nothing walks the tables.
            unsafe { self.table.update_flags(page, READ) }.ok()?.ignore();
        }
        Some(())
    }
}

impl Subject for Theirs {
    fn map_all(&mut self, _: Leaves) -> Option<()> {
        None
    }
    #[inline(never)]
    fn map_each(&mut self, leaves: Leaves) -> Option<()> {
        match leaves.bytes {
            PAGE => self.map::<Size4KiB>(leaves),
            Size2MiB::SIZE => self.map::<Size2MiB>(leaves),
            _ => self.map::<Size1GiB>(leaves),
        }
    }
    fn unmap_all(&mut self, _: Leaves) -> Option<()> {
        None
    }
    #[inline(never)]
    fn unmap_each(&mut self, leaves: Leaves) -> Option<()> {
        match leaves.bytes {
            PAGE => self.unmap::<Size4KiB>(leaves),
            Size2MiB::SIZE => self.unmap::<Size2MiB>(leaves),
            _ => self.unmap::<Size1GiB>(leaves),
        }
    }
    fn protect_all(&mut self, _: Leaves) -> Option<()> {
        None
    }
    #[inline(never)]
    fn protect_each(&mut self, leaves: Leaves) -> Option<()> {
        match leaves.bytes {
            PAGE => self.protect::<Size4KiB>(leaves),
            Size2MiB::SIZE => self.protect::<Size2MiB>(leaves),
            _ => self.protect::<Size1GiB>(leaves),
        }
    }
    #[inline(never)]
    fn translate(&mut self) -> Option<u64> {
        let mut sum = 0_u64;
        for address in random_addresses() {
            sum = sum.wrapping_add(self.table.translate_addr(VirtAddr::new_truncate(address))?.as_u64());
        }
        Some(sum)
    }
}
