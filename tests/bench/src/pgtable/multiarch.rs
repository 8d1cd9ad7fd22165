//! `page_table_multiarch`, with x86-64 entries.

use super::{Arena, Leaves, PAGE, START, Subject, random_addresses};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_multiarch::{MappingFlags, PageSize, PagingHandler, x86_64::X64PageTable};
use std::cell::RefCell;

const READ: MappingFlags = MappingFlags::READ.union(MappingFlags::USER);
const READ_WRITE: MappingFlags = READ.union(MappingFlags::WRITE);

thread_local! {
    /// Its handler has no value to keep frames in.
    static FRAMES: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

struct Handler;

impl PagingHandler for Handler {
    fn alloc_frames(count: usize, _align: usize) -> Option<PhysAddr> {
        assert_eq!(count, 1, "tables of one frame");
        FRAMES.with_borrow_mut(|frames| frames.as_mut()?.take()).map(|frame| PhysAddr::from(frame as usize))
    }
    fn dealloc_frames(frame: PhysAddr, _count: usize) {
        FRAMES
            .with_borrow_mut(|frames| frames.as_mut().map(|arena| arena.give_back(frame.as_usize() as u64)));
    }
    fn phys_to_virt(frame: PhysAddr) -> VirtAddr {
        VirtAddr::from(frame.as_usize())
    }
}

pub struct Theirs(X64PageTable<Handler>);

impl Theirs {
    pub fn new() -> Self {
        FRAMES.set(Some(Arena::new()));
        match X64PageTable::try_new() {
            Ok(table) => Self(table),
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn virt(offset: u64) -> VirtAddr {
    VirtAddr::from((START + offset) as usize)
}

impl Subject for Theirs {
    #[inline(never)]
    fn map_all(&mut self, leaves: Leaves) -> Option<()> {
        let phys = |at: VirtAddr| PhysAddr::from(at.as_usize() - START as usize + leaves.memory() as usize);
        let large = leaves.bytes != PAGE;
        self.0.cursor().map_region(virt(0), phys, leaves.total() as usize, READ_WRITE, large).ok()
    }
    #[inline(never)]
    fn map_each(&mut self, leaves: Leaves) -> Option<()> {
        let size = match leaves.bytes {
            PAGE => PageSize::Size4K,
            0x20_0000 => PageSize::Size2M,
            _ => PageSize::Size1G,
        };
        let mut cursor = self.0.cursor();
        for at in leaves.each() {
            cursor.map(virt(at), PhysAddr::from((leaves.memory() + at) as usize), size, READ_WRITE).ok()?;
        }
        Some(())
    }
    #[inline(never)]
    fn unmap_all(&mut self, leaves: Leaves) -> Option<()> {
        self.0.cursor().unmap_region(virt(0), leaves.total() as usize).ok()
    }
    #[inline(never)]
    fn unmap_each(&mut self, leaves: Leaves) -> Option<()> {
        let mut cursor = self.0.cursor();
        for at in leaves.each() {
            cursor.unmap(virt(at)).ok()?;
        }
        Some(())
    }
    #[inline(never)]
    fn protect_all(&mut self, leaves: Leaves) -> Option<()> {
        self.0.cursor().protect_region(virt(0), leaves.total() as usize, READ).ok()
    }
    #[inline(never)]
    fn protect_each(&mut self, leaves: Leaves) -> Option<()> {
        let mut cursor = self.0.cursor();
        for at in leaves.each() {
            cursor.protect(virt(at), READ).ok()?;
        }
        Some(())
    }
    #[inline(never)]
    fn translate(&mut self) -> Option<u64> {
        let mut sum = 0_u64;
        for address in random_addresses() {
            let (phys, ..) = self.0.query(VirtAddr::from(address as usize)).ok()?;
            sum = sum.wrapping_add(phys.as_usize() as u64);
        }
        Some(sum)
    }
}
